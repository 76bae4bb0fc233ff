"use strict";
// Text made of tokens, each of which can be asked how likely it was. All text goes in as text nodes.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const tokensOf = new WeakMap(); // a span of text -> the tokens that made it

// How unlikely a token was, in five steps from "no doubt" (0) to "a surprise" (4).
function doubt(logprob) {
  const p = Math.exp(logprob);
  return p >= 0.9 ? 0 : p >= 0.5 ? 1 : p >= 0.2 ? 2 : p >= 0.05 ? 3 : 4;
}

// A growing text. Spans are added once a frame, however fast tokens come.
class TokenText {
  constructor(given) {
    this.node = el("div", { class: "text writing" });
    if (given) this.node.append(el("span", { class: "given" }, given));
    this.text = "";
    this.held = []; // tokens whose text is still to come: parts of a character
    this.fresh = document.createDocumentFragment();
    this.frame = 0;
    this.onGrown = () => {};
  }

  push(text, tokens) {
    this.text += text;
    this.held.push(...tokens);
    if (!text) return;
    if (this.held.length) {
      const parts = this.held.map((token) => token.text);
      // one span a token where their texts add up to it, else one for all of them
      if (this.held.length > 1 && parts.every(Boolean) && parts.join("") === text) this.held.forEach((token) => this.#span(token.text, [token]));
      else this.#span(text, this.held);
      this.held = [];
    } else {
      this.fresh.append(text);
    }
    this.frame ||= requestAnimationFrame(() => this.#show());
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.#show();
    this.node.classList.remove("writing");
    if (!this.node.querySelector(".t")) return;
    this.node.tabIndex = 0;
    this.node.setAttribute("role", "group");
    this.node.setAttribute("aria-label", "Reply. Arrow keys go through its tokens.");
  }

  #span(text, tokens) {
    const worst = Math.min(...tokens.map((token) => token.logprob ?? 0));
    const span = el("span", { class: "t", "data-doubt": doubt(worst) || null }, text);
    tokensOf.set(span, tokens);
    this.fresh.append(span);
  }

  #show() {
    this.frame = 0;
    this.node.append(this.fresh);
    this.onGrown();
  }
}

const percent = (p) => p >= 0.9995 ? "100 %" : p === 0 ? "0 %" : p >= 0.1 ? `${(p * 100).toFixed(1)} %` : p >= 0.0001 ? `${(p * 100).toFixed(2)} %` : "< 0.01 %";
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

// The card beside a token: its probability among its best rivals'.
class TokenTip {
  constructor(node, announcer) {
    this.node = node;
    this.announcer = announcer;
    this.span = null;
  }

  show(span, byKey = false) {
    const tokens = tokensOf.get(span);
    if (!tokens || span === this.span) return;
    this.hide();
    this.span = span;
    this.byKey = byKey;
    span.classList.add("here");
    this.node.replaceChildren(el("table", {}, el("caption", {}, tokens.length > 1 ? `${tokens.length} tokens` : "Chosen among"), ...tokens.map((token) => this.#rows(token))));
    this.node.hidden = false;
    this.#place(span.getClientRects()[0] ?? span.getBoundingClientRect());
    if (byKey) this.announcer.textContent = tokens.map((t) => `${visible(t.text)}, ${t.logprob == null ? "first" : percent(Math.exp(t.logprob))}`).join("; ");
  }

  hide() {
    this.span?.classList.remove("here");
    this.span = null;
    this.node.hidden = true;
  }

  #rows(token) {
    const rows = token.rivals.map(([text, logprob]) => [text, logprob, text === token.text]);
    if (!rows.some((row) => row[2])) rows.push([token.text, token.logprob, true]);
    return el("tbody", {}, ...rows.map(([text, logprob, chosen]) => {
      const p = Math.exp(logprob ?? 0), bar = el("i");
      bar.style.width = `${p * 100}%`;
      return el("tr", { class: chosen && "chosen" }, el("td", {}, visible(text)), el("td", {}, el("div", { class: "bar" }, bar)), el("td", {}, percent(p)));
    }));
  }

  #place(at) {
    const { width, height } = this.node.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), innerWidth - width - 8);
    const top = at.top - height - 8 >= 8 ? at.top - height - 8 : Math.min(at.bottom + 8, innerHeight - height - 8);
    this.node.style.left = `${left}px`;
    this.node.style.top = `${top}px`;
  }

  // Pointer, touch and arrow keys, for every reply inside `root`.
  watch(root) {
    root.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".t");
      if (span) this.show(span); else this.hide();
    });
    // a finger leaves when it is lifted; what it pointed at stays
    root.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.hide(); });
    root.addEventListener("scroll", () => this.hide(), { passive: true });
    root.addEventListener("focusout", () => { if (this.byKey) this.hide(); });
    root.addEventListener("keydown", (event) => {
      const text = event.target.closest(".text");
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (!text || !steps || event.altKey || event.ctrlKey || event.metaKey) return;
      const spans = [...text.querySelectorAll(".t")], now = spans.indexOf(this.span);
      const next = spans[Math.min(Math.max(now + steps, 0), spans.length - 1)];
      event.preventDefault();
      next.scrollIntoView({ block: "nearest" });
      this.show(next, true);
    });
  }
}
