const table = document.querySelector(".index");
const body = table.tBodies[0];
const rows = [...body.rows];
const headings = [...table.tHead.rows[0].cells];
const search = document.createElement("input");
search.type = "search";
search.placeholder = "text";
search.setAttribute("aria-label", "text that a row must have");
const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
let shows = () => true;

function update() {
  const wanted = search.value.toLowerCase();
  rows.forEach((row) => { row.hidden = !(shows(row) && words.get(row).includes(wanted)); });
}

const KEYS = [["j k ↓ ↑", "next, last"], ["Enter", "open"], ["f", "filter"], ["/", "text"], ["Esc", "back"]];
const kinds = table.dataset.filters.split(" ").map((kind) => [kind, (row) => row.classList.contains(kind)]);
const bar = filterBar(rows, [["all", () => true], ...kinds], KEYS, (chosen) => {
  shows = chosen;
  update();
});
bar.nav.querySelector(".note").before(search);
search.addEventListener("input", update);

function value(row, column) {
  const cell = row.cells[column]; // a row that failed has two
  if (!cell) return null;
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}

function sort(column) {
  const heading = headings[column];
  const first = heading.dataset.kind === "number" && column > 0 ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heading.getAttribute("aria-sort") === first ? other : first;
  headings.forEach((each) => each.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  rows.sort((one, two) => {
    const [a, b] = [value(one, column), value(two, column)];
    if (a === null || b === null) return (a === null) - (b === null); // those without one last, in both orders
    const difference = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return sign * difference || value(one, 0) - value(two, 0);
  });
  body.append(...rows);
}

headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => sort(column)));

function focus(row) {
  if (!row) return;
  row.focus({ preventScroll: true });
  row.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (hasModifier(event)) return;
  if (document.activeElement === search) {
    if (event.key === "Escape" || event.key === "Enter") search.blur();
    return;
  }
  const shown = rows.filter((row) => !row.hidden);
  const here = document.activeElement.closest("tr");
  const at = shown.indexOf(here);
  const isRow = here && here === document.activeElement;
  const link = isRow && here.querySelector("a");
  const details = isRow && here.querySelector("details");
  const moves = {
    j: () => focus(shown[Math.min(at + 1, shown.length - 1)]),
    k: () => focus(shown[Math.max(at - 1, 0)]),
    f: bar.next,
    "/": () => search.focus(),
    Escape: () => { search.value = ""; bar.choose(0); },
  };
  moves.ArrowDown = moves.j;
  moves.ArrowUp = moves.k;
  if (details) moves.Enter = () => { details.open = !details.open; };
  else if (link) moves.Enter = () => link.click();
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});

bar.choose(0);
