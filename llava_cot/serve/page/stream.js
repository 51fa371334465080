// Ask the server, and read its answer as it is sent.

export class ServerError extends Error {}

// Yields [data, text] for each event, the JSON both parsed and as it was sent, until the server says that it is done.
export async function* ask(request, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  for await (const text of messages(response.body)) {
    if (text === "[DONE]") return;
    const data = JSON.parse(text);
    if (data.error) throw new ServerError(data.error.message);
    yield [data, text];
  }
  throw new ServerError("The server stopped before the answer was there.");
}

export async function get(path) {
  return (await reach(path, {})).json();
}

async function reach(path, options) {
  let response;
  try {
    // The address of the page may have a key in it, which fetch refuses. The browser sends the key all the same.
    response = await fetch(new URL(path, location.origin + location.pathname), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message || `The server answered with ${response.status}.`;
  throw new ServerError([message, when(response.headers.get("Retry-After"))].join(" ").trim());
}

function when(retryAfter) {
  const seconds = Number(retryAfter);
  if (!retryAfter || Number.isNaN(seconds)) return "";
  const time = new Date(Date.now() + 1000 * seconds).toLocaleTimeString();
  return `Try again in ${seconds} s, at ${time}.`;
}

// The data of each server-sent event. EventSource can't send a request's body.
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server was lost.");
    }
    if (part.done) return;
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      if (line || !data.length) continue;
      yield data.join("\n");
      data = [];
    }
  }
}

// The text of the object `name` in the `llava_cot` object of a chunk. JavaScript would round its seeds, which have up to
// 63 bits. Returns null if there is none.
export function objectText(chunk, name) {
  const tokens = /"[^"\\]*(?:\\.[^"\\]*)*"|[{}[\]]/g;
  let depth = 0, start = -1;
  for (let token = tokens.exec(chunk); token; token = tokens.exec(chunk)) {
    const [mark] = token;
    if ("{[".includes(mark)) depth += 1;
    if ("}]".includes(mark)) depth -= 1;
    if (start >= 0 && depth === 2) return chunk.slice(start, tokens.lastIndex);
    const colon = /\s*:\s*(?=\{)/y;
    colon.lastIndex = tokens.lastIndex;
    if (start < 0 && depth === 2 && mark === JSON.stringify(name) && colon.test(chunk)) start = colon.lastIndex;
  }
  return null;
}
