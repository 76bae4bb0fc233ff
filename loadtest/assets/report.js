// What a report shows. Figures are computed elsewhere; only the curves of CDFs are counted here.

const root = document.getElementById("report");
const NAMES = {
  ttft: "TTFT", ttft_service: "TTFT, service", itl: "ITL (tokens)", tpot: "TPOT", ntpot: "NTPOT", e2e: "E2E",
  e2e_service: "E2E, service", itl_max: "longest pause", send_gap: "send gap", server_queue: "server: queue", server_ttft: "server: TTFT",
};
const section = (title, note, ...content) => root.append(el("h2", {}, title, note ? el("small", {}, note) : null), ...content);
const rateText = (r) => r ? count(r.value) : "–";
const interval = (r, format) => r && r.low !== undefined && r.low !== null ? el("small", {}, `${format(r.low)} … ${format(r.high)}`) : null;

// Bucket of a sparse histogram back to its value in seconds (1024 buckets per power of two).
function bucketValue(index) {
  const shift = Math.max(Math.floor(index / 1024) - 1, 0);
  const low = (index - shift * 1024) * 2 ** shift;
  return (shift ? low + 2 ** shift / 2 : low) * 1e-6;
}

function cdfOfValues(name, values) {
  const sorted = values.filter((v) => v !== null && v > 0).sort((a, b) => a - b), n = sorted.length;
  const keep = Math.min(n, 400), x = [], y = [];
  // points are even on the tail-stretched axis, so p99.9 is drawn as finely as the median
  for (let k = 0; k < keep; k++) {
    const p = keep > 1 ? 1 - (1 / (n + 1)) ** (k / (keep - 1)) : 0.5;
    x.push(sorted[Math.min(Math.floor(p * n), n - 1)]); y.push(p);
  }
  return { name, x, y };
}

function cdfOfHistograms(name, batches) {
  const counts = new Map();
  for (const batch of batches) for (const [index, n] of batch) counts.set(index, (counts.get(index) || 0) + n);
  const entries = [...counts].sort((a, b) => a[0] - b[0]), total = entries.reduce((s, e) => s + e[1], 0);
  const x = [], y = [];
  let seen = 0, last = -1;
  for (const [index, n] of entries) {
    seen += n;
    const p = seen / (total + 1), depth = -Math.log10(1 - p);
    if (depth - last > 0.008 && index) { x.push(bucketValue(index)); y.push(p); last = depth; }
  }
  return { name, x, y };
}

function header(d, name) {
  root.append(el("h1", {}, name), el("p", { class: "sub" }, `${d.target} · model ${d.model} · ${d.started.replace("T", " ").slice(0, 19)} UTC`));
}

function latencyTable(d) {
  const columns = ["p50", "p90", "p95", "p99", "p99.9"];
  const rows = [];
  for (const [label, window] of [["full", d.full], ["steady", d.steady]]) {
    if (!window) continue;
    for (const name of Object.keys(NAMES)) {
      const found = window.latency[name];
      if (!found) continue;
      rows.push([`${NAMES[name]}`, label, count(found.count), el("td", {}, seconds(found.mean.value), interval(found.mean, seconds)),
        ...columns.map((q) => {
          const p = found.percentiles[q];
          return p.value === undefined || p.value === null ? el("td", { class: "dim", title: p.reason }, "too few samples") : el("td", {}, seconds(p.value), interval(p, seconds));
        })]);
    }
  }
  return table(["", "window", "n", "mean", ...columns], rows);
}

function runReport(d) {
  header(d, d.scenario.name);
  if (!d.audit.valid) root.append(el("div", { class: "banner" }, "INVALID: the client was the bottleneck, these figures are not the server's.", el("ul", {}, d.audit.reasons.map((r) => el("li", {}, r)))));
  if (d.stopped) root.append(el("p", { class: "note" }, `The load was ended early: ${d.stopped}.`));
  if (d.interrupted) root.append(el("p", { class: "note" }, "The run was interrupted; what was in flight counts as unfinished."));
  const chip = (kind, text) => el("span", { class: `chip ${kind}` }, text);
  root.append(el("div", { class: "chips" },
    chip(d.audit.valid ? "pass" : "fail", d.audit.valid ? "client: valid" : "client: INVALID"),
    d.verdicts.map((v) => chip(v.passed === null ? "open" : v.passed ? "pass" : "fail", `${v.gate}${v.passed === null ? `: ${v.note}` : v.passed ? " ✓" : " ✗"}`)),
    d.canary ? chip(d.canary.mismatched || d.canary.failed ? "fail" : "pass", `canary: ${d.canary.matched} of ${d.canary.sent} right`) : null));
  const full = d.full, p = (name, q) => full.latency[name] ? seconds(full.latency[name].percentiles[q].value) : "–";
  const card = (label, value, extra) => el("div", { class: "card" }, el("span", {}, label), el("b", {}, value), el("span", {}, extra || ""));
  root.append(el("div", { class: "cards" },
    card("requests", count(full.requests), `${count(full.completed)} complete, ${count(full.failed)} failed${full.cancelled ? `, ${full.cancelled} cancelled` : ""}`),
    card("requests/s", rateText((d.steady || full).rates.request_rate), d.steady ? "steady state" : "full run"),
    card("output tokens/s", rateText((d.steady || full).rates.output_token_rate), d.steady ? "steady state" : "full run"),
    card("TTFT p50", p("ttft", "p50"), `p99 ${p("ttft", "p99")}`), card("ITL p50", p("itl", "p50"), `p99 ${p("itl", "p99")}`),
    card("E2E p50", p("e2e", "p50"), `p99 ${p("e2e", "p99")}`),
    full.goodput_ratio ? card("goodput", percent(full.goodput_ratio.value), `${rateText(full.rates.goodput_rate)} good requests/s`) : null));
  section("Latency", "from the intended send; small print: 95 % intervals", latencyTable(d));
  if (d.steady_note !== "found") root.append(el("p", { class: "note" }, `Steady state: ${d.steady_note}`));
  for (const [name, reason] of Object.entries(full.refused)) root.append(el("p", { class: "note" }, `${NAMES[name]} not given: ${reason}`));
  if (full.itl_exact_ratio !== null && full.itl_exact_ratio < 1) root.append(el("p", { class: "note" }, `${percent(1 - full.itl_exact_ratio)} of inter-token latencies are a chunk's gap divided by its tokens, not exact.`));
  if (d.early_stops) root.append(el("p", { class: "note" }, `${d.early_stops} answers ended early: the server does not honour ignore_eos.`));

  const r = d.requests, ok = (i) => r.outcome[i] === "ok" && !r.slow_reader[i];
  const pick = (values) => values.filter((_, i) => ok(i));
  const service = r.intended.map((_, i) => r.first_token[i] === null || r.sent[i] === null ? null : r.first_token[i] - r.sent[i]);
  const cdf = (title, series) => lineChart({ title, series, x: { scale: "log", format: seconds }, y: { scale: "tail", low: 0, format: (v) => `p${+(v * 100).toFixed(3)}` }, height: 270 });
  section("Distributions", "tail-stretched; click a name to hide it", el("div", { class: "grid" },
    cdf("Requests", [cdfOfValues("TTFT", pick(r.ttft)), cdfOfValues("TTFT, service", pick(service)), cdfOfValues("E2E", pick(r.e2e))]),
    cdf("Tokens", [cdfOfHistograms("ITL, per token", d.itl_batches), cdfOfValues("TPOT, per request", pick(r.tpot)), cdfOfValues("longest pause, per request", pick(r.itl_max))])));

  const t = d.timeline, mid = t.times.map((v) => v + t.width / 2), bands = d.steady ? [[d.steady.start, d.steady.end]] : [];
  const over = (title, series, format) => lineChart({ title, series, x: { label: "seconds", low: 0 }, y: { zero: true, format }, bands, height: 190 });
  section("Over time", bands.length ? "shaded: steady state" : "", el("div", { class: "grid" },
    over("Requests per second", [{ name: "intended", x: mid, y: t.launched }, { name: "completed", x: mid, y: t.completed }, ...(full.failed ? [{ name: "failed", x: mid, y: t.failed, color: "var(--red)" }] : [])]),
    over("Requests in flight", [{ name: "in flight", x: mid, y: t.in_flight }]),
    over("Output tokens per second", [{ name: "tokens/s", x: mid, y: t.output_tokens }]),
    over("TTFT", [{ name: "p50", x: mid, y: t.ttft_p50 }, { name: "p99 of the slice", x: mid, y: t.ttft_p99 }], seconds),
    Object.entries(d.heat).map(([name, map]) => heatMap(NAMES[name], map, bands))));

  const n = r.intended.length, shown = Math.min(n, 250), rows = [];
  for (let k = 0; k < shown; k++) {
    const i = Math.floor(k * n / shown), parts = [], failed = r.outcome[i] !== "ok" && r.outcome[i] !== "cancelled";
    const sent = r.sent[i] ?? r.end[i], first = r.first_token[i] ?? r.end[i];
    parts.push([r.intended[i], sent, "var(--purple)"], [sent, first, failed ? "var(--red)" : "var(--orange)"]);
    if (r.first_token[i] !== null) parts.push([first, r.end[i], failed ? "var(--red)" : r.outcome[i] === "cancelled" ? "var(--grey)" : "var(--blue)"]);
    rows.push({ parts });
  }
  section("Requests", shown < n ? `${shown} of ${count(n)}, evenly chosen` : "", gantt("Each line is a request", "by intended time", rows, full.end,
    [["client: intended to sent", "var(--purple)"], ["waiting for the first token", "var(--orange)"], ["decoding", "var(--blue)"], ["cancelled as planned", "var(--grey)"], ["failed", "var(--red)"]]));

  const failures = Object.entries(d.failures);
  section("Failures", "", failures.length ? table(["kind", "count", "HTTP status", "median time", "examples"], failures.map(([kind, f]) =>
    [kind, count(f.count), Object.entries(f.statuses).map(([code, k]) => `${k} × ${code}`).join(", ") || "–", seconds(f.median_time), el("td", { class: "text" }, f.examples.join(" · "))]))
    : el("p", { class: "sub" }, "None."));
  if (d.retried) root.append(el("p", { class: "note" }, `${d.retried} retries; their time counts.`));
  if (Object.keys(d.by_traffic).length) section("By class", "", table(["class", "requests", "failed", "TTFT p50", "TTFT p99", "TPOT p50", "E2E p50", "E2E p99"], Object.entries(d.by_traffic).map(([name, f]) => {
    const q = (figure, k) => f.latency[figure] ? seconds(f.latency[figure].percentiles[k].value) : "–";
    return [name, count(f.requests), count(f.failed), q("ttft", "p50"), q("ttft", "p99"), q("tpot", "p50"), q("e2e", "p50"), q("e2e", "p99")];
  })));
  const weight = (name) => (/wait|queue/.test(name) ? 0 : /running|batch|slot/.test(name) ? 1 : /page|kv|conv|cache/.test(name) ? 2 : /step|itl|token/.test(name) ? 3 : 4);
  const told = (m) => m.values.filter((v) => v !== null), moves = (m) => told(m).some((v) => v !== told(m)[0]);
  const metrics = d.server_metrics.filter(moves).sort((a, b) => weight(a.name) - weight(b.name)).slice(0, 36);
  const still = d.server_metrics.filter((m) => told(m).length && !moves(m) && told(m)[0] !== 0);
  if (metrics.length) section("Server metrics", "from its /metrics, on the same time axis", el("div", { class: "grid small" }, metrics.map((m) =>
    lineChart({ title: m.name, note: m.kind === "counter" ? "per second" : "", series: [{ name: m.name, x: m.times, y: m.values }], x: { label: "seconds", low: 0, high: full.end }, y: { zero: true }, height: 150 }))),
    ...(still.length ? [el("p", { class: "sub" }, `Unchanged throughout: ${still.map((m) => `${m.name} ${count(told(m)[0])}`).join(", ")}.`)] : []));
  const a = d.audit;
  section("The client", "is it fast enough to judge the server?", table(["", "p50", "p99", "max"], [
    ["send lag", seconds(a.send_lag_p50), seconds(a.send_lag_p99), seconds(a.send_lag_max)], ["event loop lag", seconds(a.loop_lag_p50), seconds(a.loop_lag_p99), seconds(a.loop_lag_max)]]),
    el("p", { class: "sub" }, `${a.workers} worker process(es); the busiest used ${percent(a.cpu)} of a core, ${percent(a.parse)} on decoding.`), ...a.warnings.map((w) => el("p", { class: "note" }, w)));
  closing(d);
}

function sweepReport(d) {
  header(d, `${d.scenario.name}: sweep`);
  root.append(el("div", { class: "chips" }, d.conclusions.map((c) => el("span", { class: "chip" }, c))));
  const of = (kind) => d.points.filter((p) => p.kind === kind).sort((a, b) => a.level - b.level), open = of("open"), closed = of("closed");
  const curve = (points, key, name) => ({ name, dots: true, x: points.map((p) => p.request_rate), y: points.map((p) => p[key]) });
  const marks = [d.knee && { x: d.knee, name: "knee" }, d.slo_rate && { x: d.slo_rate, name: "SLO", row: 1 }].filter(Boolean);
  const chart = (title, keys) => lineChart({ title, series: keys.flatMap(([key, name]) => [curve(open, key, `${name}, open loop`), { ...curve(closed, key, `${name}, closed loop`), dash: "4 3" }]), x: { label: "requests/s carried", zero: true }, y: { scale: "log", format: seconds }, marks, height: 280 });
  section("Latency against throughput", "", el("div", { class: "grid" }, chart("TTFT", [["ttft_p50", "p50"], ["ttft_p99", "p99"]]), chart("E2E", [["e2e_p50", "p50"], ["e2e_p99", "p99"]]),
    lineChart({ title: "Speed for one user against speed for all", note: "output tokens/s", series: [["closed loop", closed], ["open loop", open]].map(([name, ps]) => ({ name, dots: true, x: ps.map((p) => p.output_token_rate), y: ps.map((p) => p.tpot_p50 ? 1 / p.tpot_p50 : null) })), x: { label: "tokens/s, all users", zero: true }, y: { zero: true }, height: 280 }),
    open.some((p) => p.goodput !== null) ? lineChart({ title: "Goodput share", series: [{ name: "goodput", dots: true, x: open.map((p) => p.level), y: open.map((p) => p.goodput) }], x: { label: "requests/s offered", zero: true }, y: { zero: true, format: percent }, marks, height: 280 }) : null));
  section("Points", "", table(["load", "requests", "req/s", "tok/s", "TTFT p50", "TTFT p99", "E2E p50", "E2E p99", "goodput", "errors", ""], d.points.map((p) =>
    [p.label, count(p.requests), count(p.request_rate), count(p.output_token_rate), seconds(p.ttft_p50), seconds(p.ttft_p99), seconds(p.e2e_p50), seconds(p.e2e_p99), percent(p.goodput), percent(p.error_ratio), [p.valid ? "" : "INVALID", p.saturated ? "beyond capacity" : ""].filter(Boolean).join(", ")])));
  closing(d);
}

function compareReport(d) {
  root.append(el("h1", {}, "Comparison"), el("p", { class: "sub" }, `${d.a} → ${d.b} · ${d.runs_a} and ${d.runs_b} run(s)`));
  if (!d.valid) root.append(el("div", { class: "banner" }, "INVALID: in some run the client was the bottleneck."));
  const reach = Math.max(...d.rows.map((r) => Math.max(Math.abs(r.low), Math.abs(r.high), r.noise)), 0.05) * 1.1, at = (v) => 100 + 100 * Math.max(Math.min(v / reach, 1), -1);
  const forest = (r) => {
    const s = svg("svg", { viewBox: "0 0 200 16", style: "width:200px" }), color = { better: "var(--green)", worse: "var(--red)", same: "var(--grey)", unclear: "var(--orange)" }[r.verdict];
    s.append(svg("rect", { x: at(-r.noise), y: 2, width: at(r.noise) - at(-r.noise), height: 12, fill: "var(--band)" }), svg("line", { x1: 100, x2: 100, y1: 0, y2: 16, class: "axis" }),
      svg("line", { x1: at(r.low), x2: at(r.high), y1: 8, y2: 8, stroke: color, "stroke-width": 2 }), svg("circle", { cx: at(r.change), cy: 8, r: 3.5, fill: color }));
    return el("td", {}, s);
  };
  const signed = (v) => `${v >= 0 ? "+" : "−"}${Math.abs(v * 100).toFixed(1)} %`;
  section("Figures", "change of B against A with 95 % interval; shaded: noise floor between runs of A", table(["", "A", "B", "change", "interval", "", "noise", "verdict"], d.rows.map((r) => {
    const format = r.figure.endsWith("_rate") ? count : seconds;
    return [r.figure, format(r.a), format(r.b), signed(r.change), `${signed(r.low)} … ${signed(r.high)}`, forest(r), percent(r.noise), el("td", {}, el("span", { class: `chip ${r.verdict}` }, r.verdict))];
  })));
  d.notes.forEach((n) => root.append(el("p", { class: "note" }, n)));
}

function closing(d) {
  const block = (value) => el("pre", {}, JSON.stringify(value, null, 2));
  section("To repeat this", "", el("pre", {}, d.command.map((a) => /^[\w@%+=:,./-]+$/.test(a) ? a : `'${a.replaceAll("'", "'\\''")}'`).join(" ")),
    el("details", {}, el("summary", {}, "scenario"), block(d.scenario)), el("details", {}, el("summary", {}, "client environment"), block(d.environment)), el("details", {}, el("summary", {}, "server, as it describes itself"), block(d.server)));
  section("Definitions", "", el("dl", {}, [
    ["TTFT", "first token's arrival − intended send"], ["service", "the same from the bytes going out, not from the intended send"],
    ["ITL", "gap between tokens; a chunk of k tokens counts as k gaps of 1/k; all tokens pooled"], ["TPOT", "(last token − first token) / (tokens − 1), per request"],
    ["NTPOT", "E2E / tokens"], ["E2E", "end of the complete answer − intended send"], ["send gap", "bytes going out − intended send"],
    ["goodput", "requests that are complete and within every limit, as a share and per second"],
  ].flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)])));
}

({ run: runReport, sweep: sweepReport })[DATA.kind] ? ({ run: runReport, sweep: sweepReport })[DATA.kind](DATA) : compareReport(DATA);
