/** Talking to the server: the key, requests, server-sent events, and failures in plain words. */

const KEY_NAME = "arriero-key";
const base = new URL(".", document.baseURI);

/** A failure worth showing: `message` for people, `detail` as the server put it. */
export class Failure extends Error {
  constructor(message, { detail = "", status = 0, param = null } = {}) {
    super(message);
    this.detail = detail;
    this.status = status;
    this.param = param;
  }

  get isGone() {
    return this.status === 0;
  }
}

export const urlOf = (path) => new URL(path, base).href;
export const hasKey = () => sessionStorage.getItem(KEY_NAME) !== null;

/** Keep the key until the tab is closed; an empty one forgets it. */
export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY_NAME, key);
  else sessionStorage.removeItem(KEY_NAME);
}

const gone = () =>
  new Failure("The server does not answer. It may be stopped, restarting or out of reach.");

/** Send a request and return its response. Throws Failure, or AbortError when told to stop. */
async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY_NAME);
  if (key) headers.Authorization = `Bearer ${encodeKey(key)}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(urlOf(path), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw gone();
  }
  if (response.ok) return response;
  throw explain(response.status, await readError(response));
}

/** Header values are Latin-1 to `fetch`; the server compares the bytes of UTF-8. */
const encodeKey = (key) => String.fromCharCode(...new TextEncoder().encode(key));

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

export async function postJson(path, body, signal) {
  return (await request(path, { body, signal })).json();
}

/** Tell whether the server is ready, unready or gone; the question needs no key. */
export async function askHealth() {
  try {
    const { ok } = await fetch(urlOf("health"), { cache: "no-store" });
    return ok ? "ready" : "unready";
  } catch {
    return "gone";
  }
}

/** Yield a stream's events. Leaving early closes the connection, which ends the work. */
export async function* streamEvents(path, body, signal) {
  const response = await request(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) break;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue; // a comment that keeps the line open
        if (block === "data: [DONE]") return;
        const event = JSON.parse(block.slice(6));
        if (event.error) throw explain(500, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already, which is as good as closed
  }
  throw brokenOff();
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw brokenOff();
  }
}

const brokenOff = () => new Failure("The connection broke off before the answer was complete.");

async function readError(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return { message: `${response.status} ${response.statusText}`.trim() };
  }
}

function explain(status, { message = "", code = null, param = null }) {
  const words = {
    invalid_api_key: "This server asks for an API key.",
    context_length_exceeded: "This is too long for the model: shorten it, or ask for fewer tokens.",
    model_not_found: "The server no longer serves this model. Reload the page.",
    payload_too_large: "This is more text than the server takes at once.",
    overloaded: "Too many requests are waiting. Try again in a moment.",
    shutting_down: "The server is shutting down.",
    engine_dead: "The server's engine has stopped; it has to be restarted.",
    engine_error: "The server failed while it computed this answer.",
  };
  const byStatus = {
    401: words.invalid_api_key,
    403: "This key may not do that.",
    429: "Too many requests for this key. Try again in a moment.",
    502: "Something before the server cannot reach it.",
    503: "The server cannot take requests now. Try again in a moment.",
    504: "The server took too long to answer.",
  };
  const otherwise = status < 500 ? "The server refused this request." : "The server had an error.";
  return new Failure(words[code] ?? byStatus[status] ?? otherwise, {
    detail: message,
    status,
    param,
  });
}
