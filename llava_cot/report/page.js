"use strict";
const cards = [...document.querySelectorAll(".card")];
const rounds = [...new Set(cards.map((card) => card.dataset.round))];
const filters = [
  ["all", () => true],
  ["kept", (card) => card.dataset.state !== "pruned"],
  ["winner path", (card) => card.dataset.state === "winner"],
  ...(rounds.length > 1 ? rounds.map((round) => ["round " + round, (card) => card.dataset.round === round]) : []),
];
let current = 0;

const nav = document.createElement("nav");
const buttons = filters.map(([name, shows], index) => {
  const button = document.createElement("button");
  button.textContent = name + " (" + cards.filter(shows).length + ")";
  button.addEventListener("click", () => filter(index));
  nav.append(button);
  return button;
});
const help = document.createElement("span");
help.className = "note";
for (const [keys, does] of [["j k ↓ ↑", "next, last"], ["→ ←", "child, parent"], ["Enter", "unfold"], ["f", "filter"]]) {
  const kbd = document.createElement("kbd");
  kbd.textContent = keys;
  help.append(kbd, " " + does + "  ");
}
nav.append(help);
document.querySelector("main").before(nav);

function filter(index) {
  current = index;
  const shows = filters[index][1];
  cards.forEach((card) => { card.hidden = !shows(card); });
  buttons.forEach((button, at) => button.setAttribute("aria-pressed", at === index));
  // What belongs to a round that is wholly hidden goes with it: its title, its notes and the arrow that leads to it.
  const shown = new Set(cards.filter((card) => !card.hidden).map((card) => card.dataset.round));
  document.querySelectorAll(".round, .cell, .retrace").forEach((part) => { part.hidden = !shown.has(part.dataset.round); });
}

function focus(card) {
  if (!card) return;
  if (card.hidden) filter(0);
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
  if (event.ctrlKey || event.metaKey || event.altKey) return;
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
    f: () => filter((current + 1) % filters.length),
  };
  moves.ArrowDown = moves.j;
  moves.ArrowUp = moves.k;
  if (details && document.activeElement === here) moves.Enter = () => { details.open = !details.open; };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});

filter(0);
