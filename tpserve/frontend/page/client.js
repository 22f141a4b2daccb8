// The server's API. URLs are relative to the page, which may lie behind a proxy's prefix.

const BASE = location.origin + location.pathname.replace(/\/?$/, "/");
const keys = stored.get("keys", { api: "", admin: "", metrics: "" });

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Send a request. ServerError when the server refuses it; the browser's own error when no server answers. */
async function call(path, { body, key, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(BASE + path, { ...options, cache: "no-store", credentials: "same-origin" });
  if (!response.ok) throw new ServerError(await errorText(response), response.status);
  return response;
}

async function errorText(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}: ${text.slice(0, 200)}`;
  }
}

/** The events of a streamed answer, parsed, up to [DONE]. An error in the stream is thrown. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("the connection was cut before the answer was complete", 0);
    rest += value;
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data:")) continue;
      const data = part.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, event.error.code);
      yield event;
    }
  }
}

/** GET a page of JSON, also one of status 503, which /readyz has while the server starts. Null when no server answers. */
async function getJson(path, key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    const response = await fetch(BASE + path, { headers, cache: "no-store", signal: AbortSignal.timeout(5000) });
    return { status: response.status, body: await response.json() };
  } catch {
    return null;
  }
}
