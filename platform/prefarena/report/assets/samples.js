// The samples: what each policy answered to the same prompt. Every text is shown as text, whatever it holds.

const PAGE = 10;
const browser = { order: "disagreement", first: null, second: null, seed: "all", words: "", page: 0 };

function sampleRows() {
  return DATA.samples.rows.map(([seed, place, prompt, answers]) => ({ seed, place, prompt, answers }));
}

function shownPolicies() {
  return DATA.samples.policies
    .map(([name, key], index) => ({ name, key, index }))
    .filter(({ key }) => isShown(key));
}

/** How far the shown policies are apart: [whether by scores, the range]. The same as `disagreement` in samples.py. */
function apart(row, policies) {
  const answers = policies.map(({ index }) => row.answers[index]).filter(Boolean);
  const scores = answers.map((answer) => answer[1]).filter((score) => score !== null);
  if (scores.length > 1) return [1, Math.max(...scores) - Math.min(...scores)];
  const lengths = answers.map((answer) => answer[2]);
  return [0, lengths.length ? Math.max(...lengths) - Math.min(...lengths) : 0];
}

function scoreDifference(row) {
  const [one, other] = [browser.first, browser.second].map((index) => row.answers[index]?.[1] ?? null);
  return one === null || other === null ? null : one - other;
}

const ORDERS = {
  disagreement: ["largest disagreement first", (row, policies) => apart(row, policies)],
  difference: ["one policy's score above another's", (row) => {
    const difference = scoreDifference(row);
    return difference === null ? [0, 0] : [1, difference];
  }],
  length: ["longest response first", (row, policies) => [1, Math.max(0, ...policies.map(({ index }) => row.answers[index]?.[2] ?? 0))]],
  place: ["order of the evaluation", (row) => [1, -row.place]],
};

function chosenRows(policies) {
  const words = browser.words.trim().toLowerCase();
  const has = (text) => text.toLowerCase().includes(words);
  const rank = ORDERS[browser.order][1];
  return sampleRows()
    .filter((row) => browser.seed === "all" || String(row.seed) === browser.seed)
    .filter((row) => !words || has(row.prompt) || policies.some(({ index }) => row.answers[index] && has(row.answers[index][0])))
    .map((row) => [rank(row, policies), row])
    .sort(([first, one], [second, other]) => second[0] - first[0] || second[1] - first[1] || one.seed - other.seed || one.place - other.place)
    .map(([, row]) => row);
}

function shownNumber(value) {
  return value.toLocaleString("en", { maximumFractionDigits: 3 }).replace("-", "−");
}

function answerCard(answer, policy, best) {
  const name = make("strong", {}, swatch(policy.key), policy.name);
  if (!answer) {
    return make("div", { className: "answer" }, make("header", {}, name), make("p", { className: "text none" }, "No sample of this prompt."));
  }
  const [response, score, length] = answer;
  const facts = `${score === null ? "no score" : `score ${shownNumber(score)}`} · ${length} ${length === 1 ? "token" : "tokens"}`;
  const isBest = best !== null && score === best;
  const mark = isBest ? [make("span", { className: "mark" }, "highest")] : [];
  const text = response ? make("p", { className: "text" }, response) : make("p", { className: "text none" }, "The response is empty.");
  return make("div", { className: isBest ? "answer best" : "answer" },
    make("header", {}, name, ...mark, make("span", { className: "facts" }, facts)), text);
}

function sampleArticle(row, policies, hasSeeds) {
  const [byScore, range] = apart(row, policies);
  const scores = policies.map(({ index }) => row.answers[index]?.[1] ?? null).filter((score) => score !== null);
  const isTold = scores.length > 1 && Math.max(...scores) > Math.min(...scores);
  const where = `Sample ${row.place + 1}${hasSeeds ? `, seed ${row.seed}` : ""}`;
  const spread = byScore ? `scores differ by ${shownNumber(range)}` : `lengths differ by ${range} tokens`;
  const cards = policies.map((policy) => answerCard(row.answers[policy.index], policy, isTold ? Math.max(...scores) : null));
  return make("article", { className: "sample" },
    make("h3", {}, where, ...(policies.length > 1 ? [make("span", {}, spread)] : [])),
    make("p", { className: "text prompt" }, row.prompt),
    make("div", { className: "answers" }, ...cards));
}

function drawSamples() {
  const policies = shownPolicies();
  const rows = policies.length ? chosenRows(policies) : [];
  const numPages = Math.max(1, Math.ceil(rows.length / PAGE));
  browser.page = Math.min(browser.page, numPages - 1);
  const start = browser.page * PAGE;
  const hasSeeds = new Set(DATA.samples.rows.map((row) => row[0])).size > 1;
  document.getElementById("samples-list").replaceChildren(
    ...rows.slice(start, start + PAGE).map((row) => sampleArticle(row, policies, hasSeeds)));
  const text = !policies.length ? "All policies are hidden: choose some in the legend."
    : !rows.length ? "No sample holds these words."
    : `Samples ${start + 1} to ${Math.min(start + PAGE, rows.length)} of ${rows.length}`;
  for (const pager of document.querySelectorAll("#samples-browser .pager")) {
    pager.querySelector("p").textContent = text;
    pager.querySelector(".previous").disabled = browser.page === 0;
    pager.querySelector(".next").disabled = browser.page >= numPages - 1;
  }
}

function turn(by) {
  browser.page += by;
  drawSamples();
  document.getElementById("samples-browser").scrollIntoView();
}

function pager(isLive) {
  const previous = make("button", { type: "button", className: "button previous" }, "Previous");
  const next = make("button", { type: "button", className: "button next" }, "Next");
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  const status = make("p");
  if (isLive) status.setAttribute("aria-live", "polite");
  return make("div", { className: "pager" }, previous, next, status);
}

function choice(label, options, value, chosen) {
  const select = make("select", {}, ...options.map(([id, name]) => make("option", { value: id }, name)));
  select.value = value;
  select.addEventListener("change", () => { chosen(select.value); browser.page = 0; drawSamples(); });
  return make("label", {}, label, select);
}

function prepareSamples() {
  const place = document.getElementById("samples-browser");
  if (!place) return;
  const policies = DATA.samples.policies.map(([name], index) => [String(index), name]);
  [browser.first, browser.second] = [policies.length - 1, 0];
  const first = choice("Score of", policies, String(browser.first), (value) => { browser.first = Number(value); });
  const second = choice("above that of", policies, String(browser.second), (value) => { browser.second = Number(value); });
  const pairOnly = () => { first.hidden = second.hidden = browser.order !== "difference"; };
  const hasScores = DATA.samples.rows.some(([, , , answers]) => answers.some((answer) => answer && answer[1] !== null));
  const orders = Object.entries(ORDERS).filter(([id]) => id !== "difference" || (hasScores && policies.length > 1));
  const order = choice("Order", orders.map(([id, [name]]) => [id, name]), browser.order, (value) => { browser.order = value; pairOnly(); });
  const seeds = [...new Set(DATA.samples.rows.map((row) => row[0]))].sort((one, other) => one - other);
  const seed = choice("Seed", [["all", "all"], ...seeds.map((value) => [String(value), String(value)])], "all", (value) => { browser.seed = value; });
  const field = make("input", { type: "search" });
  field.addEventListener("input", () => { browser.words = field.value; browser.page = 0; drawSamples(); });
  const search = make("label", { className: "search" }, "Prompts and responses with", field);
  pairOnly();
  place.append(
    make("div", { className: "tools" }, order, first, second, ...(seeds.length > 1 ? [seed] : []), search),
    pager(true), make("div", { id: "samples-list" }), pager(false));
  drawSamples();
}
