// Charts: what charts.py describes, as traces of plotly.js.

const SYMBOLS = {
  "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "p": "pentagon",
  "<": "triangle-left", ">": "triangle-right", "h": "hexagon", "8": "octagon", "X": "x", "*": "star",
};
const CONFIG = {
  responsive: true, displaylogo: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
};
const drawn = []; // [element, chart]

function symbolOf(key) {
  return SYMBOLS[KEYS.get(key)?.marker ?? "o"];
}

/** Text that plotly.js would take for markup is shown as it is. */
function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** Some markers look smaller than others of the same width. */
const LARGER = { "triangle-up": 1.3, "triangle-down": 1.3, "triangle-left": 1.3, "triangle-right": 1.3, "pentagon": 1.15, "star": 1.3 };

function sizeOf(key, size) {
  return Math.round(size * (LARGER[symbolOf(key)] ?? 1));
}

function errorBars(values, colour) {
  if (!values || values.every((value) => value === null)) return undefined;
  return { type: "data", array: values, color: colour, thickness: 1.2, width: 3 };
}

function traceOf(line) {
  const colour = colourOf(line.key);
  const trace = {
    type: "scatter", x: line.x, y: line.y, name: line.name, meta: line.name, showlegend: false,
    marker: { color: colour, symbol: symbolOf(line.key), size: sizeOf(line.key, 11), line: { color: cssValue("--card"), width: 1 } },
    line: { color: colour, width: 1.8 },
    hovertemplate: line.text ? "%{hovertext}<extra></extra>" : `<b>${plain(line.name)}</b><br>%{x:.4~g}, %{y:.4~g}<extra></extra>`,
  };
  if (line.text) trace.hovertext = line.text;
  switch (line.role) {
    case "mean": case "bar":
      return { ...trace, mode: "markers",
        error_x: errorBars(line.ex, colour), error_y: errorBars(line.ey, colour) };
    case "seed":
      return { ...trace, mode: "markers", marker: { color: "rgba(0,0,0,0)", size: 6, line: { color: colour, width: 1.2 } } };
    case "grid":
      return { ...trace, mode: "lines+markers", marker: { ...trace.marker, size: sizeOf(line.key, 8) }, line: { color: colour, width: 1.4 },
        error_x: errorBars(line.ex, colour), error_y: errorBars(line.ey, colour) };
    case "steps":
      return { ...trace, mode: "lines+markers", marker: { ...trace.marker, size: sizeOf(line.key, 8) } };
    case "dashed":
      return { ...trace, mode: "lines+markers", line: { color: colour, width: 1.4, dash: "dash" },
        marker: { color: cssValue("--card"), symbol: symbolOf(line.key), size: sizeOf(line.key, 7), line: { color: colour, width: 1.4 } } };
    case "dots":
      return { ...trace, mode: "markers", opacity: 0.5, marker: { color: colour, size: 6 } };
    case "mean line": // with a mark at its end, which is all that there is of a short one
      return { ...trace, mode: "lines+markers", marker: { ...trace.marker, size: line.x.map((_, place) => (place === line.x.length - 1 ? sizeOf(line.key, 10) : 0)) } };
    case "expected":
      return { ...trace, mode: "lines+markers", marker: { ...trace.marker, size: sizeOf(line.key, 6) } };
    case "band": // drawn once around, under its line
      return { ...trace, mode: "none", fill: "toself", fillcolor: colour, opacity: 0.16, hoverinfo: "skip", hovertemplate: undefined };
    case "so far":
      return { ...trace, mode: "lines", line: { color: colour, width: 1.8, shape: "hv" } };
    case "frontier":
      return { ...trace, mode: "lines", line: { color: cssValue("--soft"), width: 1.6 },
        hovertemplate: `${plain(line.name)}<br>%{y:.3f} at KL %{x:.3f}<extra></extra>` };
    case "law":
      return { ...trace, mode: "lines", line: { color: colour, width: 1.4, dash: "dot" } };
    case "curve":
      return { ...trace, mode: "lines", line: { color: colour, width: 1.5 },
        hovertemplate: `<b>${plain(line.name)}</b><br>step %{x}<br>%{y:.4~g}<extra></extra>` };
    default:
      return { ...trace, mode: "lines" };
  }
}

/** The range of bars and their errors, with `at` well inside. */
function rangeWith(at, lines) {
  const ends = lines.flatMap(({ x, ex }) => x.flatMap((value, place) => [value - (ex[place] ?? 0), value + (ex[place] ?? 0)]));
  const [low, high] = [Math.min(at, ...ends), Math.max(at, ...ends)];
  const margin = 0.08 * (high - low || 1);
  return [low - margin, high + margin];
}

function layoutOf(chart, lines) {
  const [text, soft, grid] = ["--text", "--soft", "--line"].map(cssValue);
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, exponentformat: "power", title: { standoff: 10 } };
  const layout = {
    margin: { l: 56, r: 16, t: 10, b: 48 }, hovermode: "closest", dragmode: "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: cssValue("--sans"), size: 12, color: soft },
    hoverlabel: { bgcolor: cssValue("--card"), bordercolor: soft, font: { color: text, size: 13 }, align: "left", namelength: -1 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: cssValue("--accent") },
    xaxis: { ...axis, title: { text: chart.x, standoff: 10 } },
    yaxis: { ...axis, title: { text: chart.y, standoff: 10 } },
  };
  if (chart.ticks) {
    Object.assign(layout.xaxis, { type: "log", tickvals: chart.ticks, ticktext: chart.ticks.map((value) => value.toLocaleString("en")) });
  }
  if (lines.some((line) => line.role === "bar")) {
    Object.assign(layout.yaxis, { type: "category", range: [lines.length - 0.4, -0.6], gridcolor: "rgba(0,0,0,0)", tickfont: { color: text } });
    if (typeof chart.at === "number") {
      layout.shapes = [{ type: "line", x0: chart.at, x1: chart.at, y0: 0, y1: 1, yref: "paper", line: { color: soft, width: 1.2, dash: "dot" } }];
      layout.xaxis.range = rangeWith(chart.at, lines);
    } else {
      layout.xaxis.rangemode = "tozero";
    }
  }
  if (!lines.length) {
    Object.assign(layout.xaxis, { visible: false });
    Object.assign(layout.yaxis, { visible: false });
    layout.annotations = [{ text: "Everything here is hidden: choose policies above.", showarrow: false, font: { size: 13, color: soft } }];
  }
  return layout;
}

function draw(element, chart) {
  const lines = chart.lines.filter((line) => isShown(line.key));
  if (chart.lines.some((line) => line.role === "bar")) element.style.height = `${Math.max(11, 5 + 1.9 * lines.length)}rem`;
  const isBare = lines.every((line) => line.key === null);
  Plotly.react(element, isBare ? [] : lines.map(traceOf), layoutOf(chart, isBare ? [] : lines), CONFIG);
  if (!isBare) nameThePoints(element, lines);
}

/** Where a name of a size stands beside a point: plotly's word for it, and the name's box. */
const BESIDE = [
  ["middle right", (x, y, w, h) => [x + 10, y - h / 2, w, h]],
  ["middle left", (x, y, w, h) => [x - 10 - w, y - h / 2, w, h]],
  ["top center", (x, y, w, h) => [x - w / 2, y - 9 - h, w, h]],
  ["bottom center", (x, y, w, h) => [x - w / 2, y + 9, w, h]],
  ["top right", (x, y, w, h) => [x + 8, y - 6 - h, w, h]],
  ["bottom right", (x, y, w, h) => [x + 8, y + 6, w, h]],
  ["top left", (x, y, w, h) => [x - 8 - w, y - 6 - h, w, h]],
  ["bottom left", (x, y, w, h) => [x - 8 - w, y + 6, w, h]],
];
const MOST_NAMES = 12;

function overlap([x, y, w, h], [left, top, width, height]) {
  return x < left + width && left < x + w && y < top + height && top < y + h;
}

/** Names beside the means, where there is room for them; the legend and the mouse tell the others. */
function nameThePoints(element, lines) {
  const means = lines.map((line, trace) => ({ line, trace })).filter(({ line }) => line.role === "mean");
  if (!means.length || means.length > MOST_NAMES) return;
  const { xaxis, yaxis } = element._fullLayout;
  const at = (line, place) => [xaxis.d2p(line.x[place]), yaxis.d2p(line.y[place])];
  const taken = lines.flatMap((line) => line.x.flatMap((value, place) => {
    const [x, y] = at(line, place);
    if (line.role !== "mean") return [[x - 3, y - 3, 6, 6]];
    const across = line.ex[place] ? xaxis.d2p(value + line.ex[place]) - x : 0;
    const up = line.ey[place] ? y - yaxis.d2p(line.y[place] + line.ey[place]) : 0;
    return [[x - 7, y - 7, 14, 14], [x - across, y - 2, 2 * across, 4], [x - 2, y - up, 4, 2 * up]];
  }));
  const frame = [0, 0, xaxis._length, yaxis._length];
  const inside = ([x, y, w, h]) => x >= frame[0] && y >= frame[1] && x + w <= frame[2] && y + h <= frame[3];
  for (const { line, trace } of means) {
    const [width, height] = [6.7 * line.name.length, 15];
    const boxes = BESIDE.map(([position, box]) => [position, box(...at(line, 0), width, height)]);
    const free = boxes.find(([, box]) => inside(box) && !taken.some((other) => overlap(box, other)));
    if (!free) continue;
    taken.push(free[1]);
    const font = { size: 12, color: cssValue("--text"), family: cssValue("--sans") };
    Plotly.restyle(element, { mode: "markers+text", text: [[plain(line.name)]], textposition: free[0], textfont: font }, [trace]);
  }
}

/** A figure for each chart, drawn when it first comes near the window. */
function placeCharts() {
  const waiting = new Map(); // element -> chart
  const drawFirst = (element) => {
    const chart = waiting.get(element);
    waiting.delete(element);
    observer.unobserve(element);
    drawn.push([element, chart]);
    draw(element, chart);
  };
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting && waiting.has(target)) drawFirst(target);
  }, { rootMargin: "400px" });
  window.addEventListener("beforeprint", () => [...waiting.keys()].forEach(drawFirst));
  for (const place of document.querySelectorAll("[data-charts]")) {
    for (const chart of DATA.charts[place.dataset.charts]) {
      if (typeof Plotly === "undefined") {
        place.replaceChildren(make("p", { className: "warning" },
          "Charts are missing because the package plotly was not installed when this page was written. " +
          "Install it and run `prefarena report` again; figures/ has the same as images."));
        break;
      }
      const plot = make("div", { className: "plot", id: `plot-${chart.id}`, role: "img", ariaLabel: `Chart: ${chart.title}` });
      waiting.set(plot, chart);
      const note = chart.note ? [make("p", { className: "note" }, chart.note)] : [];
      place.append(make("figure", {}, make("h3", {}, chart.title), plot, make("figcaption", {}, ...note)));
      observer.observe(plot);
    }
  }
}

function redrawCharts() {
  for (const [element, chart] of drawn) draw(element, chart);
}
