// How the page speaks with its server: the key, errors in words, server-sent events.

const KEY = "miniserve-api-key";

export class Lost extends Error {} // nobody answers, or the server says that it cannot

export function savedKey() {
  return sessionStorage.getItem(KEY);
}

export function saveKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Seconds to wait before the next try, after `failures` in a row. */
export function backOff(failures) {
  return Math.min(5, 0.5 * 2 ** Math.max(0, failures - 1));
}

/**
 * The answer to a request. Where the server wants a key, or another one, `askForKey(refused)` says whether there is one.
 * Throws `Lost`, also where all of the answer is not there in `patience` ms, an AbortError, or an Error with the
 * server's own sentence.
 */
export async function call(path, { askForKey, body, signal, patience } = {}) {
  for (;;) {
    const key = savedKey();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal: patience ? AbortSignal.timeout(patience) : signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost("The server does not answer.");
    }
    if (response.ok) return response;
    if (response.status === 401 && savedKey() !== key) continue; // it was given in the meantime
    if (response.status === 401) {
      if (askForKey && (await Promise.race([askForKey(key !== null), aborted(signal)]))) continue;
      throw new Error("The server asks for an API key.");
    }
    const answer = await response.json().catch(() => null);
    const message = answer?.error?.message ?? `The server answered ${response.status}.`;
    throw response.status === 503 ? new Lost(message) : new Error(message);
  }
}

function aborted(signal) {
  return new Promise((_, reject) => signal?.addEventListener("abort", () => reject(signal.reason)));
}

/** The JSON of each event of a stream, up to [DONE]. Throws `Lost` where it breaks off. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost("The connection was lost in the middle of the answer.");
    }
    if (piece.done) throw new Lost("The connection was lost in the middle of the answer.");
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // empty lines, and comments that keep the connection alive
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}
