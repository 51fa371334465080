"use strict";
// The bar above a page's items: a button for each filter, the keys that the page knows, and which filter is on.
function filterBar(items, filters, keys, onChange) {
  const nav = document.createElement("nav");
  const bar = { nav, current: 0 };
  const buttons = filters.map(([name, shows], index) => {
    const button = document.createElement("button");
    button.textContent = name + " (" + items.filter(shows).length + ")";
    button.addEventListener("click", () => bar.choose(index));
    nav.append(button);
    return button;
  });
  const help = document.createElement("span");
  help.className = "note";
  for (const [key, does] of keys) {
    const kbd = document.createElement("kbd");
    kbd.textContent = key;
    help.append(kbd, " " + does + "  ");
  }
  nav.append(help);
  bar.choose = (index) => {
    bar.current = index;
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", at === index));
    onChange(filters[index][1]);
  };
  bar.next = () => bar.choose((bar.current + 1) % filters.length);
  document.querySelector("main").before(nav);
  return bar;
}

function hasModifier(event) {
  return event.ctrlKey || event.metaKey || event.altKey;
}
