"use strict";
// The page itself: what is asked, what is answered, and the controls around them.

const $ = (id) => document.getElementById(id);

// name, label, least, most, step, default where the model says nothing
const KNOBS = [
  ["temperature", "Temperature", 0, 2, 0.05, 1],
  ["top_p", "Top p", 0.01, 1, 0.01, 1],
  ["top_k", "Top k", 0, 200, 1, 0],
  ["min_p", "Min p", 0, 1, 0.01, 0],
  ["repetition_penalty", "Repetition", 0.5, 2, 0.05, 1],
  ["presence_penalty", "Presence", -2, 2, 0.1, 0],
  ["max_tokens", "Most tokens", 1, 2048, 1, 512],
];
const EXAMPLES = {
  chat: ["What is a convolution, in one sentence?", "Write four lines about rain on a tin roof.", "Explain caching to a ten-year-old."],
  complete: ["Once upon a time, in a library by the sea,", "The three laws of good tools are:\n1.", "def fibonacci(n):\n"],
};

class Page {
  constructor() {
    keyStore.load();
    this.messages = []; // of the conversation so far
    this.running = null; // AbortController of the reply being written
    this.defaults = {};
    this.trouble = null; // what the notice is about
    this.tip = new TokenTip($("tip"), $("announcer"));
    this.tip.watch($("transcript"));
    this.#makeKnobs();
    this.#listen();
    this.#showMode();
    this.engine = new EngineView($("charts"), $("facts"), {
      onState: (state, words, why) => this.#showState(state, words, why),
      onInfo: (info) => this.#meet(info),
    });
    this.engine.look();
  }

  get mode() {
    return $("modes").querySelector(":checked").value;
  }

  // ---- controls

  #makeKnobs() {
    const form = $("sampling");
    form.append(this.#field("system", "System prompt (chat)", "textarea", { rows: 2 }));
    for (const [name, label, min, max, step, value] of KNOBS) {
      const number = el("input", { type: "number", id: name, min, max, step: step < 1 ? "any" : 1, value, required: true });
      const range = el("input", { type: "range", min, max, step, value, "aria-label": `${label}, slider` });
      number.addEventListener("input", () => { range.value = number.value; });
      range.addEventListener("input", () => { number.value = range.value; });
      form.append(el("div", { class: "knob" }, el("label", { for: name }, label), range, number));
      this.defaults[name] = value;
    }
    form.append(
      this.#field("seed", "Seed (empty: another each time)", "input", { type: "number", step: 1 }),
      this.#field("stops", "Stop at, one a line", "textarea", { rows: 1 }),
      el("label", { class: "check" }, el("input", { type: "checkbox", id: "probabilities", checked: true }), "Ask for probabilities"),
      el("button", { type: "button", class: "quiet", click: () => this.#reset() }, "Back to the model's defaults"),
    );
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  #field(id, label, tag, attributes) {
    return el("div", { class: "field" }, el("label", { for: id }, label), el(tag, { id, spellcheck: "false", ...attributes }));
  }

  #reset() {
    $("sampling").reset();
    for (const [name, value] of Object.entries(this.defaults)) this.#turn(name, value);
  }

  #turn(name, value) {
    $(name).value = value;
    $(name).dispatchEvent(new Event("input"));
  }

  #listen() {
    $("composer").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      this.tip.hide();
      this.running?.abort();
      if (narrow.matches) showPanel(false);
    });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("clear").addEventListener("click", () => this.#clear());
    $("modes").addEventListener("change", () => { this.#clear(); this.#showMode(); });
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      keyStore.save($("key").value.trim());
      this.engine.look();
    });
    const narrow = matchMedia("(max-width: 860px)");
    const showPanel = (shown) => {
      $("panel").hidden = !shown;
      $("panel-button").setAttribute("aria-expanded", String(shown));
    };
    narrow.addEventListener("change", () => showPanel(!narrow.matches));
    showPanel(!narrow.matches);
    $("panel-button").addEventListener("click", () => showPanel($("panel").hidden));
  }

  #showMode() {
    const chat = this.mode === "chat";
    $("prompt").placeholder = chat ? "Ask something" : "Begin a text, and the model goes on";
    $("system").parentElement.hidden = !chat;
    $("examples").replaceChildren(...EXAMPLES[this.mode].map((text) => el("li", {}, el("button", {
      type: "button", click: () => { $("prompt").value = text; $("prompt").focus(); },
    }, text))));
  }

  #clear() {
    this.running?.abort();
    this.messages = [];
    this.tip.hide();
    $("transcript").replaceChildren($("welcome"));
    $("welcome").hidden = false;
    $("clear").hidden = true;
    $("prompt").focus();
  }

  // ---- state of the server

  #meet(info) {
    $("model").textContent = info.model;
    document.title = `${info.model} · convserve`;
    const most = $("max_tokens");
    most.max = most.parentElement.querySelector("[type=range]").max = info.max_model_len;
    const untouched = KNOBS.filter(([name]) => Number($(name).value) === this.defaults[name]);
    for (const [name, , , , , value] of KNOBS) this.defaults[name] = info.defaults[name] ?? value;
    this.defaults.max_tokens = Math.min(info.defaults.max_new_tokens ?? 512, info.max_model_len >> 1); // the rest is for the prompt
    for (const [name] of untouched) this.#turn(name, this.defaults[name]); // what was set before the model was known stays
    const [chat, complete] = $("modes").querySelectorAll("input");
    chat.disabled = !info.chat;
    chat.parentElement.title = info.chat ? "" : "This model has no chat template";
    if (!info.chat && chat.checked) {
      complete.checked = true;
      this.#showMode();
    }
  }

  #showState(state, words, why) {
    $("status").dataset.state = state === "key" ? "warn" : state;
    if ($("status").textContent !== words) $("status").textContent = words;
    const trouble = state === "down" || state === "key" ? state : null;
    if (trouble === "key" && this.trouble === "key" && keyStore.key) $("notice-text").textContent = "The server does not know that key.";
    if (trouble === this.trouble) return;
    this.trouble = trouble;
    $("notice").hidden = !trouble;
    $("notice").dataset.kind = state;
    $("key-form").hidden = trouble !== "key";
    if (trouble === "key") {
      $("notice-text").textContent = keyStore.key ? "The server does not know that key." : "This server wants an API key.";
      $("key").focus();
    } else if (trouble) {
      $("notice-text").textContent = state === "down" && words === "unreachable" ? `${why} Trying again every few seconds.` : why;
    }
  }

  // ---- asking

  send() {
    const prompt = this.mode === "chat" ? $("prompt").value.trim() : $("prompt").value;
    if (!prompt || this.running) return;
    if (!$("sampling").reportValidity()) return;
    $("prompt").value = "";
    $("welcome").hidden = true;
    $("clear").hidden = false;
    if (this.mode === "chat") {
      this.messages.push({ role: "user", content: prompt });
      $("transcript").append(el("article", { class: "turn mine", "aria-label": "You" }, el("h3", {}, "You"), el("div", { class: "text" }, prompt)));
    }
    this.#answer(this.mode === "chat" ? null : prompt);
  }

  #request(prompt) {
    const body = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for (const [name] of KNOBS) body[name] = Number($(name).value);
    if ($("seed").value !== "") body.seed = Number($("seed").value);
    const stops = $("stops").value.split("\n").filter(Boolean);
    if (stops.length) body.stop = stops;
    const likely = $("probabilities").checked;
    if (prompt !== null) return ["v1/completions", { ...body, prompt, ...(likely && { logprobs: 5 }) }];
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.messages];
    return ["v1/chat/completions", { ...body, messages, ...(likely && { logprobs: true, top_logprobs: 5 }) }];
  }

  // Writes one reply: of the conversation, or going on from `prompt`.
  async #answer(prompt) {
    const reply = new TokenText(prompt), foot = el("footer");
    const turn = el("article", { class: "turn", "aria-label": "Reply" }, prompt === null ? el("h3", {}, $("model").textContent || "Model") : null, reply.node, foot);
    const log = $("transcript");
    let follows = true; // the reader has not scrolled away
    const onScroll = () => { follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80; };
    log.addEventListener("wheel", onScroll, { passive: true });
    log.addEventListener("touchmove", onScroll, { passive: true });
    reply.onGrown = () => { if (follows) log.scrollTop = log.scrollHeight; };
    log.querySelectorAll(".acts").forEach((acts) => acts.remove());
    log.append(turn);
    log.scrollTop = log.scrollHeight;

    const mine = (this.running = new AbortController());
    this.#busy(true);
    const clock = { sent: performance.now(), first: 0, last: 0 };
    const tell = (ending) => foot.replaceChildren(...this.#figures(clock, usage, ending));
    let usage = null, ending = "";
    const ticking = setInterval(() => tell(""), 200);
    try {
      const [path, body] = this.#request(prompt);
      for await (const event of eventsOf(await call(path, { body, signal: mine.signal }))) {
        usage = event.usage ?? usage;
        for (const choice of event.choices) {
          const { text, tokens, finish } = readChoice(choice);
          if (text || tokens.length) {
            clock.last = performance.now();
            clock.first ||= clock.last;
          }
          reply.push(text, tokens);
          if (finish) ending = { stop: "ended by itself", length: "most tokens reached" }[finish] ?? finish;
        }
      }
    } catch (error) {
      ending = error.name === "AbortError" ? "stopped" : error;
      if (error.kind === "key" || error.kind === "unreachable") this.engine.look();
    } finally {
      clearInterval(ticking);
      log.removeEventListener("wheel", onScroll);
      log.removeEventListener("touchmove", onScroll);
    }
    reply.end();
    tell(ending);
    if (this.running === mine) {
      this.running = null;
      this.#busy(false);
    }
    if (!turn.isConnected) return; // cleared meanwhile
    const failed = ending instanceof Error;
    if (prompt === null && reply.text) this.messages.push({ role: "assistant", content: reply.text });
    $("announcer").textContent = failed ? ending.message : `Reply ${ending}. ${reply.text}`;
    const again = () => {
      if (this.running) return;
      if (prompt === null && this.messages.at(-1)?.role === "assistant") this.messages.pop();
      turn.remove();
      this.#answer(prompt);
    };
    foot.append(el("span", { class: "acts" },
      reply.text && el("button", { type: "button", class: "quiet", click: (event) => this.#copy((prompt ?? "") + reply.text, event.target) }, "Copy"),
      el("button", { type: "button", class: "quiet", click: again }, failed ? "Try again" : "Again")));
    reply.onGrown();
  }

  #busy(busy) {
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    if (!busy && document.activeElement === document.body) $("prompt").focus();
  }

  #figures(clock, usage, ending) {
    const count = usage?.completion_tokens ?? 0, span = (clock.last - clock.first) / 1000;
    const parts = [];
    const part = (value, words) => parts.push(el("span", {}, el("b", {}, value), ` ${words}`));
    if (count > 1 && span > 0) part(((count - 1) / span).toFixed(1), "tokens/s");
    if (clock.first) part(seconds((clock.first - clock.sent) / 1000), "to the first");
    else if (!ending) parts.push(el("span", {}, `waiting ${seconds((performance.now() - clock.sent) / 1000)}`));
    if (count) part(whole(count), count === 1 ? "token" : "tokens");
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (usage && ending) part(whole(usage.prompt_tokens), cached ? `in the prompt, ${whole(cached)} cached` : "in the prompt");
    if (ending instanceof Error) parts.push(el("span", { class: "failure" }, ending.message));
    else if (ending) parts.push(el("span", {}, ending));
    return parts;
  }

  async #copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1200);
  }
}

new Page();
