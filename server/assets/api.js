"use strict";
// Talks to the server that this page came from. Knows nothing of what is shown.

// What went wrong, as the page has to tell it. kind: "unreachable", "key", "refused" or "cut off".
class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

const keyStore = {
  slot: "convserve-key",
  key: "",
  load() {
    try { this.key = sessionStorage.getItem(this.slot) ?? ""; } catch { /* storage may be off: this tab's memory will do */ }
  },
  save(key) {
    this.key = key;
    try { sessionStorage.setItem(this.slot, key); } catch { /* as above */ }
  },
};

// GET, or POST of a JSON body. Paths are relative, so a proxy may serve the page under a prefix.
async function call(path, { body, signal } = {}) {
  const headers = {};
  if (keyStore.key) headers.Authorization = `Bearer ${keyStore.key}`;
  if (body) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, cache: "no-store", credentials: "omit",
      body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("unreachable", `The server at ${location.host} cannot be reached.`);
  }
  if (!reply.ok) throw await failureOf(reply);
  return reply;
}

async function failureOf(reply) {
  let said = "";
  try { said = (await reply.json()).error.message; } catch { /* not one of the server's own replies */ }
  if (reply.status === 401) return new Failure("key", said);
  const later = reply.headers.get("Retry-After");
  const advice = later ? ` Try again in ${later} s.` : "";
  return new Failure("refused", `${said || `The server answered with status ${reply.status}`}.${advice}`.replace("..", "."));
}

// The JSON of each event of a stream, up to its [DONE].
async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      piece = { done: true };
    }
    if (piece.done) throw new Failure("cut off", "The connection broke before the end of the text.");
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure("refused", `${event.error.message}.`);
      yield event;
    }
  }
}

// One choice of a chunk of either API, in one form: {text, tokens, finish}.
function readChoice(choice) {
  const chat = choice.logprobs?.content, plain = choice.logprobs?.tokens;
  let tokens = [];
  if (chat) {
    tokens = chat.map((t) => ({
      text: t.token, logprob: t.logprob, rivals: t.top_logprobs.map((r) => [r.token, r.logprob]),
    }));
  } else if (plain) {
    tokens = plain.map((text, i) => ({
      text, logprob: choice.logprobs.token_logprobs[i],
      rivals: Object.entries(choice.logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
    }));
  }
  return { text: choice.text ?? choice.delta?.content ?? "", tokens, finish: choice.finish_reason };
}
