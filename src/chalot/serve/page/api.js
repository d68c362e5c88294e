// The server as this page sees it: three requests, and answers as they come.

const KEY = "chalot.key";

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running still?", 0, "unreachable");
  }
  if (!response.ok) {
    const found = await response.json().catch(() => ({}));
    const { message, code } = found.error ?? {};
    throw new ApiError(message ?? `The server answered ${response.status}.`, response.status, code);
  }
  return response;
}

export async function health() {
  return (await ask("/health")).json();
}

export async function models() {
  return (await ask("/v1/models")).json();
}

// Yields the parsed events of one answer; `signal` ends it and frees its place on the server.
export async function* chat(body, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection was lost in the middle of the answer.", 0, "lost");
    }
    const events = (rest + (read.value ?? "")).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const found = JSON.parse(data);
      if (found.error) throw new ApiError(found.error.message, 200, found.error.code);
      yield found;
    }
    if (read.done) throw new ApiError("The connection was lost in the middle of the answer.", 0, "lost");
  }
}
