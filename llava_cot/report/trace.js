const cards = [...document.querySelectorAll(".card")];
const rounds = [...new Set(cards.map((card) => card.dataset.round))];
const filters = [
  ["all", () => true],
  ["kept", (card) => card.dataset.state !== "pruned"],
  ["winner path", (card) => card.dataset.state === "winner"],
  ...(cards.some((card) => card.querySelector(".flaw")) ? [["flawed", (card) => card.querySelector(".flaw")]] : []),
  ...(rounds.length > 1 ? rounds.map((round) => ["round " + round, (card) => card.dataset.round === round]) : []),
];
const KEYS = [["j k ↓ ↑", "next, last"], ["→ ←", "child, parent"], ["Enter", "unfold"], ["f", "filter"]];
const bar = filterBar(cards, filters, KEYS, (shows) => {
  cards.forEach((card) => { card.hidden = !shows(card); });
  // What belongs to a round that is wholly hidden goes with it: its title, its notes and the arrow that leads to it.
  const shown = new Set(cards.filter((card) => !card.hidden).map((card) => card.dataset.round));
  document.querySelectorAll(".round, .cell, .retrace, .spent").forEach((part) => {
    part.hidden = !shown.has(part.dataset.round);
  });
});

function focus(card) {
  if (!card) return;
  if (card.hidden) bar.choose(0);
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function parent(card) {
  return document.getElementById(card.dataset.parent);
}

document.addEventListener("focusin", (event) => {
  cards.forEach((card) => card.classList.remove("ancestor"));
  const card = event.target.closest(".card");
  for (let at = card && parent(card); at; at = parent(at)) at.classList.add("ancestor");
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#n']");
  if (!link) return;
  event.preventDefault();
  focus(document.getElementById(link.getAttribute("href").slice(1)));
});

document.addEventListener("keydown", (event) => {
  if (hasModifier(event)) return;
  const here = document.activeElement.closest(".card");
  const shown = cards.filter((card) => !card.hidden);
  const at = shown.indexOf(here);
  const children = here ? shown.filter((card) => card.dataset.parent === here.id) : [];
  const best = children.find((card) => card.dataset.state === "winner") || children[0];
  const details = here && here.querySelector("details");
  const moves = {
    j: () => focus(shown[Math.min(at + 1, shown.length - 1)]),
    k: () => focus(shown[Math.max(at - 1, 0)]),
    ArrowRight: () => focus(here ? best : shown[0]),
    ArrowLeft: () => focus(here ? parent(here) : shown[0]),
    f: bar.next,
  };
  moves.ArrowDown = moves.j;
  moves.ArrowUp = moves.k;
  if (details && document.activeElement === here) moves.Enter = () => { details.open = !details.open; };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});

bar.choose(0);
