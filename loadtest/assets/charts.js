"use strict";
// Small drawing helpers: each returns a <figure>. They know data and axes, not what is measured.

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node[key] = value; else node.setAttribute(key, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
};
const svg = (tag, attributes = {}, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const COLORS = ["--blue", "--orange", "--green", "--purple", "--grey", "--red"].map((c) => `var(${c})`);

const seconds = (v) => v === null || v === undefined ? "–"
  : Math.abs(v) >= 100 ? `${v.toFixed(0)} s` : Math.abs(v) >= 1 ? `${v.toFixed(2)} s`
  : Math.abs(v) >= 0.1 ? `${(v * 1e3).toFixed(0)} ms` : Math.abs(v) >= 1e-3 ? `${(v * 1e3).toFixed(2)} ms`
  : `${(v * 1e6).toFixed(0)} µs`;
const count = (v) => v === null || v === undefined ? "–"
  : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(3));
const percent = (v) => v === null || v === undefined ? "–" : `${(v * 100).toFixed(v > 0.9 && v < 1 ? 2 : 1)} %`;

// Axis scales: position in 0..1, and ticks. `tail` spreads 0.9, 0.99, 0.999 evenly.
const scales = {
  linear: (low, high) => {
    if (high <= low) high = low + 1;
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const ticks = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) ticks.push(+t.toPrecision(12));
    return { at: (v) => (v - low) / (high - low), invert: (p) => low + p * (high - low), ticks };
  },
  log: (low, high) => {
    const a = Math.log10(low), b = Math.max(Math.log10(high), a + 0.1), ticks = [];
    if (b - a < 0.7) ticks.push(...scales.linear(low, 10 ** b).ticks.filter((t) => t > 0));
    else for (let p = Math.floor(a); p <= b; p++)
      for (const m of b - a > 3.2 ? [1] : b - a > 1 ? [1, 3] : [1, 2, 3, 5, 7]) {
        const t = m * 10 ** p;
        if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t);
      }
    return { at: (v) => (Math.log10(v) - a) / (b - a), invert: (p) => 10 ** (a + p * (b - a)), ticks };
  },
  tail: (low, high) => {
    const depth = Math.max(-Math.log10(1 - Math.min(high, 1 - 1e-9)), 1);
    const ticks = [0, 0.5, 0.9, 0.99, 0.999, 0.9999].filter((t) => -Math.log10(1 - t) <= depth);
    return { at: (v) => -Math.log10(1 - Math.min(v, 1 - 1e-12)) / depth, invert: (p) => 1 - 10 ** (-p * depth), ticks };
  },
};

// series: [{name, x: [], y: [], dash?, dots?, color?, step?}], null y leaves a gap.
function lineChart({ title, note = "", series, x = {}, y = {}, bands = [], marks = [], height = 230 }) {
  const W = 560, H = height, L = 58, R = 12, T = 8, B = 34;
  const figure = el("figure", {}, el("figcaption", {}, title, " ", el("small", {}, note)));
  const tip = el("div", { class: "tip" }), holder = el("div"), legend = el("div", { class: "legend" });
  const hidden = new Set();
  series = series.filter((s) => s.x.length);
  series.forEach((s, i) => { s.color = s.color || COLORS[i % COLORS.length]; });
  const draw = () => {
    const shown = series.filter((s) => !hidden.has(s.name));
    const xs = shown.flatMap((s) => s.x), ys = shown.flatMap((s) => s.y).filter((v) => v !== null);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
    holder.replaceChildren(root);
    if (!xs.length || !ys.length) return;
    const reach = (values, axis) => {
      const positive = axis.scale === "log" ? values.filter((v) => v > 0) : values;
      let low = positive.reduce((a, b) => Math.min(a, b), Infinity), high = positive.reduce((a, b) => Math.max(a, b), -Infinity);
      if (axis.zero) low = Math.min(low, 0);
      if ((axis.scale || "linear") === "linear" && axis.zero) high *= 1.05;
      return scales[axis.scale || "linear"](axis.low ?? low, axis.high ?? high);
    };
    const sx = reach(xs, x), sy = reach(ys, y);
    const px = (v) => L + sx.at(v) * (W - L - R), py = (v) => H - B - sy.at(v) * (H - T - B);
    for (const band of bands) root.append(svg("rect", { x: px(band[0]), y: T, width: Math.max(px(band[1]) - px(band[0]), 0), height: H - T - B, fill: "var(--band)" }));
    for (const t of sy.ticks) {
      root.append(svg("line", { x1: L, x2: W - R, y1: py(t), y2: py(t), class: "gridline" }));
      root.append(svg("text", { x: L - 6, y: py(t) + 4, "text-anchor": "end" }, (y.format || count)(t)));
    }
    let last = -1e9;
    for (const t of sx.ticks) {
      if (px(t) - last < 44) continue;
      last = px(t);
      root.append(svg("text", { x: px(t), y: H - B + 15, "text-anchor": "middle" }, (x.format || count)(t)));
    }
    root.append(svg("line", { x1: L, x2: W - R, y1: H - B, y2: H - B, class: "axis" }));
    if (x.label) root.append(svg("text", { x: (L + W - R) / 2, y: H - 3, "text-anchor": "middle" }, x.label));
    for (const mark of marks) {
      root.append(svg("line", { x1: px(mark.x), x2: px(mark.x), y1: T, y2: H - B, stroke: "var(--red)", "stroke-dasharray": "4 3" }));
      root.append(svg("text", { x: px(mark.x) + 4, y: T + 11 + 13 * (mark.row || 0) }, mark.name));
    }
    for (const s of shown) {
      let path = "", open = false;
      s.x.forEach((v, i) => {
        const usable = s.y[i] !== null && !(y.scale === "log" && s.y[i] <= 0) && !(x.scale === "log" && v <= 0);
        if (usable) path += `${open ? "L" : "M"}${px(v).toFixed(1)} ${py(s.y[i]).toFixed(1)}`;
        open = usable;
        if (usable && s.dots) root.append(svg("circle", { cx: px(v), cy: py(s.y[i]), r: 3, fill: s.color }));
      });
      root.append(svg("path", { d: path, fill: "none", stroke: s.color, "stroke-width": 1.7, "stroke-linejoin": "round", "stroke-dasharray": s.dash || "" }));
    }
    const cursor = svg("line", { y1: T, y2: H - B, stroke: "var(--soft)", visibility: "hidden" });
    root.append(cursor);
    root.onmousemove = (event) => {
      const box = root.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width * W - L) / (W - L - R);
      if (at < 0 || at > 1) return root.onmouseleave();
      const where = sx.invert(at);
      const lines = shown.map((s) => {
        let best = 0;
        s.x.forEach((v, i) => { if (Math.abs(sx.at(v) - at) < Math.abs(sx.at(s.x[best]) - at)) best = i; });
        return s.y[best] === null ? null : `${s.name}  ${(y.format || count)(s.y[best])}`;
      }).filter(Boolean);
      cursor.setAttribute("x1", px(where)); cursor.setAttribute("x2", px(where)); cursor.setAttribute("visibility", "visible");
      tip.textContent = [(x.format || count)(where), ...lines].join("\n");
      tip.style.display = "block";
      tip.style.left = `${Math.min(event.clientX - box.left + 24, box.width - 150)}px`; tip.style.top = "34px";
    };
    root.onmouseleave = () => { tip.style.display = "none"; cursor.setAttribute("visibility", "hidden"); };
  };
  if (series.length > 1) for (const s of series) {
    const button = el("button", { onclick: () => { hidden.has(s.name) ? hidden.delete(s.name) : hidden.add(s.name); button.classList.toggle("off"); draw(); } },
      el("i", { style: `background:${s.color}` }), s.name);
    legend.append(button);
  }
  figure.append(holder, legend, tip);
  draw();
  return figure;
}

// map: {times: edges, edges: latency edges, counts: [time][bin]}; drawn as SVG cells, log latency axis.
function heatMap(title, map, bands = []) {
  const W = 560, H = 210, L = 58, R = 12, T = 8, B = 34;
  const figure = el("figure", {}, el("figcaption", {}, title, " ", el("small", {}, "darker is more; log scale of counts")));
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  const sx = scales.linear(map.times[0], map.times.at(-1)), sy = scales.log(map.edges[0], map.edges.at(-1));
  const px = (v) => L + sx.at(v) * (W - L - R), py = (v) => H - B - sy.at(v) * (H - T - B);
  const most = Math.log1p(map.counts.flat().reduce((a, b) => Math.max(a, b), 1));
  map.counts.forEach((column, i) => column.forEach((n, j) => {
    if (!n) return;
    const cell = svg("rect", { x: px(map.times[i]), y: py(map.edges[j + 1]), width: px(map.times[i + 1]) - px(map.times[i]) + 0.3, height: py(map.edges[j]) - py(map.edges[j + 1]) + 0.3, fill: `rgba(var(--hot), ${0.12 + 0.88 * Math.log1p(n) / most})` });
    cell.append(svg("title", {}, `${n} at ${seconds(map.edges[j])} to ${seconds(map.edges[j + 1])}`));
    root.append(cell);
  }));
  for (const t of sy.ticks) root.append(svg("text", { x: L - 6, y: py(t) + 4, "text-anchor": "end" }, seconds(t)));
  for (const t of sx.ticks) root.append(svg("text", { x: px(t), y: H - B + 15, "text-anchor": "middle" }, count(t)));
  root.append(svg("line", { x1: L, x2: W - R, y1: H - B, y2: H - B, class: "axis" }));
  root.append(svg("text", { x: (L + W - R) / 2, y: H - 3, "text-anchor": "middle" }, "seconds"));
  for (const band of bands) for (const edge of band) root.append(svg("line", { x1: px(edge), x2: px(edge), y1: T, y2: H - B, stroke: "var(--soft)", "stroke-dasharray": "3 3" }));
  figure.append(root);
  return figure;
}

// rows: [{parts: [[from, to, color]]}], one thin line each, on a canvas (there may be hundreds).
function gantt(title, note, rows, end, legendItems) {
  const height = Math.max(Math.min(rows.length * 5, 620), 60) + 26;
  const canvas = el("canvas", { style: `height:${height}px` });
  const legend = el("div", { class: "legend" }, legendItems.map(([name, color]) => el("span", {}, el("i", { style: `background:${color}` }), name)));
  const figure = el("figure", {}, el("figcaption", {}, title, " ", el("small", {}, note)), canvas, legend);
  const draw = () => {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth || 1100;
    canvas.width = width * ratio; canvas.height = height * ratio;
    const c = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const color = (v) => style.getPropertyValue(v.slice(4, -1)).trim();
    c.scale(ratio, ratio);
    const scale = scales.linear(0, end), px = (v) => scale.at(v) * (width - 8) + 4, row = (height - 26) / Math.max(rows.length, 1);
    c.font = "11px system-ui"; c.textAlign = "center";
    for (const t of scale.ticks) {
      c.fillStyle = color("var(--grid)"); c.fillRect(px(t), 0, 1, height - 20);
      c.fillStyle = color("var(--soft)"); c.fillText(`${count(t)} s`, Math.min(Math.max(px(t), 12), width - 14), height - 6);
    }
    rows.forEach((r, i) => r.parts.forEach(([from, to, fill]) => {
      c.fillStyle = color(fill); c.fillRect(px(from), i * row, Math.max(px(to) - px(from), 0.8), Math.max(row * 0.78, 0.8));
    }));
  };
  requestAnimationFrame(draw);
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return figure;
}

function table(headings, rows) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, headings.map((h) => el("th", {}, h)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) => cell instanceof Node && cell.tagName === "TD" ? cell : el("td", {}, cell)))))));
}
