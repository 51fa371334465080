// The page: a form, the search that it started, and earlier ones.

import { History } from "./history.js";
import { Images, dataUri, thumbnail } from "./images.js";
import { Result } from "./result.js";
import { ask, get, objectText } from "./stream.js";

const part = (id) => document.getElementById(id);
const NUMBERS = ["candidates", "rounds", "tokens", "seconds", "seed"];
const result = new Result(part("result"));
const images = new Images(part("files"), part("images"), document.querySelector(".drop"), showError);
const history = new History();
let model = null, searches = {}, running = null, shown = null;

// --- The form ---

async function start() {
  try {
    const [models, settings] = await Promise.all([get("v1/models"), get("page/searches.json")]);
    const [{ id, llava_cot: own }] = models.data;
    [model, searches] = [id, settings];
    part("model").textContent = model;
    const names = models.data.slice(1).map((entry) => entry.llava_cot.search);
    part("search").replaceChildren(...names.map((name) => new Option(name, name, false, name === own.search)));
    offer();
  } catch (error) {
    showError(error.message);
  }
  await listEntries();
}

// Offer the settings that the chosen search has.
function offer() {
  const settings = searches[part("search").value] || {};
  for (const field of ["candidates", "rounds"]) {
    const setting = settings[field];
    part(field).disabled = !setting;
    part(field).placeholder = setting ? setting.default ?? "by stage" : "–";
  }
}

// What the form says. Empty fields are left to the server.
function written() {
  const numbers = NUMBERS.filter((name) => !part(name).disabled && part(name).value !== "");
  return {
    question: part("question").value,
    search: part("search").value,
    ...Object.fromEntries(numbers.map((name) => [name, part(name).valueAsNumber])),
  };
}

function fill(settings) {
  part("question").value = settings.question;
  part("search").value = settings.search;
  for (const name of NUMBERS) part(name).value = settings[name] ?? "";
  offer();
}

async function requestOf(settings, files) {
  const { question, search, candidates, rounds, tokens, seconds, seed } = settings;
  const names = searches[search] || {};
  const given = { candidates, rounds };
  const uris = await Promise.all(files.map(dataUri));
  const content = uris.map((url) => ({ type: "image_url", image_url: { url } }));
  return {
    model,
    messages: [{ role: "user", content: [...content, { type: "text", text: question }] }],
    seed,
    llava_cot: {
      trace: "html",
      search,
      settings: Object.fromEntries(Object.keys(names).map((field) => [names[field].name, given[field]])),
      budget: { generated_tokens: tokens, seconds },
    },
  };
}

// --- A search ---

async function run(settings, files) {
  if (running) return;
  running = new AbortController();
  shown = null;
  result.clear();
  showError("");
  showRunning();
  tell("Reading the question");
  try {
    const request = await requestOf(settings, files);
    const found = await follow(request, running.signal);
    shown = { settings, files, ...found };
    tell("Answered: ", found.answer);
    await keep(settings, files, found);
  } catch (error) {
    if (running.signal.aborted) {
      tell(part("result").childElementCount ? "Cancelled. The trace shows how far the search came." : "Cancelled.");
    } else {
      tell("");
      showError(error.message);
    }
    shown = { settings, files };
  }
  running = null;
  showRunning();
}

// Show what comes of a request, and return its answer with its last HTML and the text of its trace.
async function follow(request, signal) {
  let answer = "", own = null, trace = null;
  part("written").textContent = "";
  for await (const [chunk, text] of ask(request, signal)) {
    for (const { delta } of chunk.choices) {
      answer += delta.content || "";
      part("written").textContent += delta.content || delta.reasoning || "";
    }
    if (!chunk.llava_cot) continue;
    const { event, html } = chunk.llava_cot;
    if (event) {
      part("written").hidden = event.type !== "text_delta";
      tell(inWords(event));
      if (html) result.show(html, { isLive: true });
    } else {
      [own, trace] = [chunk.llava_cot, objectText(text, "trace")];
    }
  }
  part("written").hidden = true;
  if (own?.html) result.show(own.html, { isLive: false });
  return { answer, html: own?.html, trace };
}

function inWords(event) {
  if (event.type === "retrace") return `${event.stage} failed. Round ${event.round} goes back to ${event.to}`;
  if (event.type === "stage_final") return event.stage ? `${event.stage} stands` : "The answer stands";
  if (event.type === "text_delta") return "Writing";
  const kept = event.candidates.filter((candidate) => candidate.kept).length;
  return `${event.stage || "Answers"}, round ${event.round}: ${event.candidates.length} drawn, ${kept || "an earlier one"} kept`;
}

function cancel() {
  running?.abort();
}

// --- What the page says ---

function tell(words, quoted = "") {
  const said = document.createElement("bdi"); // a model may write marks that reverse what follows
  said.textContent = quoted;
  part("status").replaceChildren(words, said);
}

function showError(words) {
  part("error").textContent = words;
  part("error").hidden = !words;
}

function showRunning() {
  const focused = document.activeElement;
  const hadFocus = [part("submit"), part("cancel"), part("again")].includes(focused);
  part("submit").disabled = Boolean(running);
  part("cancel").hidden = !running;
  part("tools").hidden = Boolean(running) || !shown;
  part("again").disabled = !shown?.files;
  part("download").hidden = !shown?.trace;
  part("result").setAttribute("aria-busy", Boolean(running));
  if (!running) part("written").hidden = true;
  if (hadFocus) part(running ? "cancel" : "submit").focus();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([shown.trace], { type: "application/json" }));
  link.download = "trace.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- Earlier questions ---

async function keep(settings, files, { answer, html, trace }) {
  const thumbnails = (await Promise.all(files.map(thumbnail))).filter(Boolean);
  await history.add({ time: Date.now(), settings, answer, html, trace, thumbnails }).catch(() => {});
  await listEntries();
}

async function listEntries() {
  const entries = await history.all().catch(() => []); // a browser may allow no database
  part("history").hidden = !entries.length;
  part("count").textContent = entries.length;
  part("entries").replaceChildren(...entries.map(entryItem));
}

function entryItem(entry) {
  const item = document.createElement("li"), open = document.createElement("button");
  const remove = document.createElement("button"), note = document.createElement("span");
  const texts = [entry.settings.question, entry.answer].map((text) => {
    const said = document.createElement("bdi");
    said.textContent = text;
    return said;
  });
  const settings = NUMBERS.filter((name) => name in entry.settings).map((name) => `${name} ${entry.settings[name]}`);
  note.className = "note";
  note.textContent = [entry.settings.search, ...settings, new Date(entry.time).toLocaleString()].join(" · ");
  open.type = remove.type = "button";
  open.className = "entry";
  open.append(...entry.thumbnails.map(picture), ...texts, note);
  open.addEventListener("click", () => reopen(entry));
  remove.textContent = "×";
  remove.setAttribute("aria-label", "Forget this question");
  remove.addEventListener("click", async () => {
    await history.remove(entry.id);
    await listEntries();
    part("history").querySelector("summary").focus();
  });
  item.append(open, remove);
  return item;
}

function picture(url) {
  const image = new Image();
  image.src = url;
  image.alt = "";
  return image;
}

function reopen(entry) {
  if (running) return;
  fill(entry.settings);
  images.clear();
  // Only thumbnails are kept, so it can't be asked again before its images are added.
  shown = { settings: entry.settings, files: entry.thumbnails.length ? null : [], trace: entry.trace };
  showError("");
  tell("Answered: ", entry.answer);
  showRunning();
  if (entry.html) result.show(entry.html, { isLive: false });
}

// --- What happens when ---

part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run(written(), images.files);
});
part("search").addEventListener("change", offer);
part("cancel").addEventListener("click", cancel);
part("again").addEventListener("click", () => run(shown.settings, shown.files));
part("download").addEventListener("click", download);
part("clear").addEventListener("click", async () => {
  await history.clear();
  await listEntries();
  part("question").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") cancel();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("ask").requestSubmit();
});
start();
