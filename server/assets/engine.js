"use strict";
// The engine, watched: asks for its figures every second and draws them.

const PERIOD = 1000;

const whole = (n) => Math.round(n).toLocaleString("en");
const small = (text) => el("small", {}, text);
const seconds = (s) => s >= 10 ? `${s.toFixed(0)} s` : s >= 1 ? `${s.toFixed(2)} s` : s >= 0.1 ? `${(s * 1e3).toFixed(0)} ms` : s >= 0.001 ? `${(s * 1e3).toFixed(1)} ms` : `${(s * 1e6).toFixed(0)} µs`;
const bytes = (n) => {
  let unit = 0;
  for (; n >= 1024 && unit < 4; unit++) n /= 1024;
  return `${n >= 100 || unit === 0 ? n.toFixed(0) : n.toFixed(1)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
};

class EngineView {
  // `onState(state, words)`: "ready", "busy", "warn", "down" or "key". `onInfo(info)`: whenever it is another server.
  constructor(charts, facts, { onState, onInfo }) {
    this.charts = charts;
    this.facts = facts;
    this.onState = onState;
    this.onInfo = onInfo;
    this.info = null;
    this.last = null;
    this.timer = 0;
    this.lines = {
      speed: new Sparkline("Tokens a second", { wide: true }),
      sequences: new Sparkline("Sequences", { lines: 2 }),
      batch: new Sparkline("Rows a step"),
      step: new Sparkline("Step time"),
      hits: new Sparkline("Prompt from cache"),
      pages: new Sparkline("KV pages", { wide: true, lines: 2 }),
      slots: new Sparkline("Conv slots"),
      tails: new Sparkline("Conv tails"),
    };
    charts.append(...Object.values(this.lines).map((line) => line.node));
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.look(); });
  }

  // Asks now, and from then on every period while the page can be seen.
  async look() {
    clearTimeout(this.timer);
    const asked = (this.asked = {});
    let state = null;
    try {
      if (!this.info) {
        this.info = await (await call("server_info")).json();
        this.#tell();
      }
      this.#draw(await (await call("stats")).json());
    } catch (error) {
      this.info = this.last = null; // another server may answer next time
      state = error.kind === "key" ? ["key", "key wanted"] : error.kind === "unreachable" ? ["down", "unreachable"] : ["warn", "no figures"];
      state.push(error.message);
    }
    if (asked !== this.asked) return; // somebody asked again meanwhile
    if (state) this.onState(...state);
    if (!document.hidden) this.timer = setTimeout(() => this.look(), state ? 2 * PERIOD : PERIOD);
  }

  #tell() {
    const info = this.info, met = JSON.stringify(info);
    if (met === this.met) return; // back again
    this.met = met;
    const rows = [
      ["Model", info.model_type], ["Convolution", info.conv], ["Device", `${info.device}, ${info.dtype}`],
      ["Context", `${whole(info.max_model_len)} tokens`], ["Weights", bytes(info.weight_bytes)],
      ["Page pool", `${whole(info.num_pages)} × ${info.page_size} tokens, ${bytes(info.page_pool_bytes)}`],
      ["KV", `${bytes(info.kv_bytes_per_token)} a token`],
    ];
    if (info.conv_bytes_per_sequence) rows.push(["Conv state", `${bytes(info.conv_bytes_per_sequence)} a sequence`]);
    rows.push(["Version", info.version]);
    this.facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    this.lines.slots.node.hidden = this.lines.tails.node.hidden = !info.conv_bytes_per_sequence;
    this.onInfo(info);
  }

  #draw(now) {
    const before = this.last ?? now, { lines, info } = this;
    this.last = now;
    const passed = now.time - before.time, steps = now.steps - before.steps;
    const speed = passed > 0 ? (now.generation_tokens - before.generation_tokens) / passed : 0;
    const rows = steps ? now.step_tokens : 0;
    const took = steps ? (now.step_seconds_total - before.step_seconds_total) / steps : 0;
    lines.speed.push([speed], 1, speed >= 100 ? whole(speed) : speed.toFixed(speed ? 1 : 0));
    lines.sequences.push([now.running, now.waiting], Math.min(info.max_num_seqs, 8),
      String(now.running), small(" running"), now.waiting ? el("small", { class: "key-b" }, `${now.waiting} waiting`) : "");
    lines.batch.push([rows], 4, steps ? whole(rows) : "–");
    lines.step.push(steps ? [took] : null, 0, steps ? seconds(took) : "–");
    const asked = now.prefix_queries, found = now.prefix_hits;
    lines.hits.push(asked ? [found / asked] : null, 1, asked ? percent(found / asked) : "–");
    lines.pages.push([now.pages_used, now.pages_kept], now.pages_total,
      whole(now.pages_used), small(` of ${whole(now.pages_total)}`), now.pages_kept ? el("small", { class: "key-b" }, `${whole(now.pages_kept)} kept`) : "");
    lines.slots.push([now.slots_used], now.slots_total, whole(now.slots_used), small(` of ${whole(now.slots_total)}`));
    lines.tails.push([now.tails_stored], now.tails_total, whole(now.tails_stored), small(` of ${whole(now.tails_total)}`));
    if (!now.alive) this.onState("down", "engine stopped", "The engine has stopped; the server is about to end.");
    else if (!now.ready) this.onState("warn", now.draining ? "shutting down" : "engine silent");
    else this.onState(now.running ? "busy" : "ready", now.running ? "writing" : "ready");
  }
}
