// Tables sort by a click on a heading: up, down, and back to the order of the report. Long ones have a filter.

/** The number that a cell begins with, or null. */
function numberIn(text) {
  const found = /^\s*-?[\d,]*\.?\d+(?:e[-+]?\d+)?/.exec(text);
  return found ? Number(found[0].replaceAll(",", "")) : null;
}

function sortBy(table, column, direction) {
  const body = table.tBodies[0];
  const rows = table.originalRows;
  const cell = (row) => row.cells[column].textContent;
  const isNumber = rows.some((row) => row.cells[column].classList.contains("number"));
  const order = direction === "none" ? rows : [...rows].sort((first, second) => {
    const sign = direction === "ascending" ? 1 : -1;
    if (!isNumber) return sign * cell(first).localeCompare(cell(second), "en", { numeric: true });
    const [one, other] = [numberIn(cell(first)), numberIn(cell(second))];
    if (one === null || other === null) return (one === null) - (other === null); // without a number: last
    return sign * (one - other);
  });
  body.append(...order);
}

function makeSortable(table) {
  table.originalRows = [...table.tBodies[0].rows];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = make("button", { type: "button", className: "sort" }, heading.textContent);
    heading.replaceChildren(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[heading.getAttribute("aria-sort")];
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", next);
      sortBy(table, column, next);
    });
  });
}

function makeFilter(table) {
  const field = make("input", { type: "search", placeholder: "part of a name" });
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of table.originalRows) {
      const labels = [...row.cells].filter((cell) => !cell.classList.contains("number"));
      row.hidden = !labels.some((cell) => cell.textContent.toLowerCase().includes(wanted));
    }
  });
  table.closest(".scroll").before(make("label", { className: "filter" }, "Show rows with", field));
}

function prepareTables() {
  for (const table of document.querySelectorAll("table")) {
    makeSortable(table);
    if (table.dataset.filter) makeFilter(table);
  }
}
