"use strict";
// Small drawings of the last minute. They know numbers and labels, not what is measured.

const SAMPLES = 60;

const svgEl = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

// One figure: a value, and under it up to two stacked lines ("a" below, "b" on top of it).
class Sparkline {
  constructor(title, { wide = false, lines = 1 } = {}) {
    this.rows = [];
    this.value = el("output", {}, "–");
    this.svg = svgEl("svg", { viewBox: `0 0 ${SAMPLES - 1} 100`, preserveAspectRatio: "none", role: "img" });
    this.paths = ["a", "b"].slice(0, lines).flatMap((name) => ["area", "line"].map((kind) => {
      const path = svgEl("path", { class: `${name} ${kind}` });
      this.svg.append(path);
      return path;
    }));
    this.title = title;
    this.node = el("figure", { class: wide && "wide" }, el("figcaption", {}, title, this.value), this.svg);
  }

  // `heights`: one number a line, or null where there is none. `full`: what fills the height, at least.
  push(heights, full, said, ...parts) {
    this.rows.push(heights);
    if (this.rows.length > SAMPLES) this.rows.shift();
    this.value.replaceChildren(said, ...parts);
    this.svg.setAttribute("aria-label", `${this.title}, last minute; now ${this.value.textContent}`);
    this.#draw(full);
  }

  #draw(full) {
    const first = SAMPLES - this.rows.length;
    const sums = this.rows.map((heights) => heights?.reduce((all, h) => [...all, (all.at(-1) ?? 0) + h], []));
    const top = Math.max(full, ...sums.map((s) => s?.at(-1) ?? 0)) || 1;
    for (let line = 0; line < this.paths.length / 2; line++) {
      let edge = "", area = "", run = [];
      const close = () => {
        if (!run.length) return;
        const points = run.map(([x, y]) => `${x} ${y}`).join(" L");
        edge += `M${points}`;
        area += `M${run[0][0]} 100 L${points} L${run.at(-1)[0]} 100 Z`;
        run = [];
      };
      sums.forEach((sum, i) => {
        const shown = sum && (line === 0 || this.rows[i][line] > 0); // nothing on top: no second line
        if (shown) run.push([first + i, (97 - 94 * sum[line] / top).toFixed(1)]); else close();
      });
      close();
      this.paths[line * 2].setAttribute("d", area);
      this.paths[line * 2 + 1].setAttribute("d", edge);
    }
  }
}
