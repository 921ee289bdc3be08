// Which policies are shown, and how each looks. One legend serves all charts and the samples.

const DATA = JSON.parse(document.getElementById("report-data").textContent);
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const KEYS = new Map(DATA.legend.map((item) => [item.key, item]));
const hidden = new Set();
const listeners = [];

function isShown(key) {
  return key === null || !hidden.has(key);
}

function colourOf(key) {
  const item = KEYS.get(key);
  return item ? item[DARK.matches ? "dark" : "light"] : cssValue("--text");
}

function cssValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function onChange(listener) {
  listeners.push(listener);
}

function changed() {
  for (const button of document.querySelectorAll("#legend .key")) {
    button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.key)));
  }
  for (const listener of listeners) listener();
}

/** An element with properties and children; children that are strings become text, never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Corners of each of matplotlib's markers on a circle of radius 1: how many, and the angle of the first. */
const CORNERS = {
  "s": [4, 45], "D": [4, 0], "^": [3, -90], "v": [3, 90], "<": [3, 180], ">": [3, 0], "p": [5, -90], "h": [6, -90],
  "8": [8, 22.5],
};

function swatch(key) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "-1.1 -1.1 2.2 2.2");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
  shape.setAttribute("d", markerPath(KEYS.get(key).marker));
  const isCross = KEYS.get(key).marker === "X";
  shape.setAttribute(isCross ? "stroke" : "fill", colourOf(key));
  if (isCross) shape.setAttribute("stroke-width", ".55");
  svg.append(shape);
  return svg;
}

function markerPath(marker) {
  if (marker === "o") return "M-1,0A1,1 0 1 1 1,0A1,1 0 1 1 -1,0Z";
  if (marker === "X") return "M-.75,-.75L.75,.75M-.75,.75L.75,-.75";
  const [number, start] = marker === "*" ? [10, -90] : CORNERS[marker];
  const points = Array.from({ length: number }, (_, place) => {
    const angle = ((start + (360 / number) * place) * Math.PI) / 180;
    const radius = marker === "*" && place % 2 ? 0.42 : 1;
    return `${(radius * Math.cos(angle)).toFixed(3)},${(radius * Math.sin(angle)).toFixed(3)}`;
  });
  return `M${points.join("L")}Z`;
}

function drawLegend() {
  const place = document.getElementById("legend");
  place.replaceChildren();
  for (const { key, failed } of DATA.legend) {
    const name = failed ? `${key} (failed)` : key;
    const button = make("button", { type: "button", className: "key", disabled: failed }, swatch(key), name);
    button.dataset.key = key;
    if (failed) {
      button.title = "There is no policy to show.";
    } else {
      button.setAttribute("aria-pressed", String(!hidden.has(key)));
      button.addEventListener("click", () => {
        hidden.has(key) ? hidden.delete(key) : hidden.add(key);
        changed();
      });
    }
    place.append(button);
  }
  const all = make("button", { type: "button", className: "all" }, "Show all");
  all.addEventListener("click", () => { hidden.clear(); changed(); });
  const none = make("button", { type: "button", className: "all" }, "Hide all");
  none.addEventListener("click", () => { for (const key of KEYS.keys()) hidden.add(key); changed(); });
  place.append(all, none);
}
