// Show the trace of a search, which the server sends as HTML. Live and finished traces differ only in what it sends.

import follow from "./trace.js";

// Where a trace's style attributes place its columns and arrows. Scripts may set these, and the page's policy allows no
// style attributes. A quote in a text is escaped, so the pattern finds attributes alone.
const PLACES = ["columns", "middle"];
const STYLE = / style="--(columns|middle): ([\d.]+%?)"/g;

export class Result {
  #root;
  #moves = new AbortController();

  constructor(root) {
    this.#root = root;
  }

  clear() {
    this.#moves.abort();
    this.#root.replaceChildren();
  }

  // Put `html` into the place of what was shown before. Focus, scrolling and unfolded texts stay.
  show(html, { isLive }) {
    const before = this.#state();
    const template = document.createElement("template");
    template.innerHTML = html.replaceAll(STYLE, ' data-$1="$2"');
    for (const name of PLACES) {
      for (const part of template.content.querySelectorAll(`[data-${name}]`)) {
        part.style.setProperty(`--${name}`, part.dataset[name]);
      }
    }
    this.#moves.abort();
    this.#root.replaceChildren(template.content);
    this.#root.classList.toggle("live", isLive);
    if (isLive) {
      for (const card of this.#cards()) card.classList.toggle("new", !before.cards.has(card.id));
    } else {
      this.#moves = new AbortController();
      follow(this.#document(this.#moves.signal));
    }
    this.#restore(before);
  }

  #cards() {
    return this.#root.querySelectorAll(".card");
  }

  #state() {
    const focused = document.activeElement?.closest(".card");
    return {
      cards: new Set([...this.#cards()].map((card) => card.id)),
      unfolded: [...this.#root.querySelectorAll(".card details[open]")].map((details) => details.closest(".card").id),
      focused: focused && this.#root.contains(focused) ? focused.id : null,
      scrolled: [...this.#root.querySelectorAll(".wide")].map((part) => part.scrollLeft),
    };
  }

  #restore({ unfolded, focused, scrolled }) {
    for (const id of unfolded) document.getElementById(id)?.querySelector("details")?.setAttribute("open", "");
    this.#root.querySelectorAll(".wide").forEach((part, index) => { part.scrollLeft = scrolled[index] || 0; });
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  // What the script of a trace sees as its document. Its keys do nothing outside of the trace, where people type.
  #document(signal) {
    const root = this.#root;
    const isOutside = (target) => target !== document.body && !root.contains(target);
    return {
      addEventListener: (kind, handle) => document.addEventListener(kind, (event) => {
        if (!isOutside(event.target)) handle(event);
      }, { signal }),
      createElement: (name) => document.createElement(name),
      getElementById: (id) => document.getElementById(id),
      querySelector: (selector) => root.querySelector(selector),
      querySelectorAll: (selector) => root.querySelectorAll(selector),
      get activeElement() { return document.activeElement; },
    };
  }
}
