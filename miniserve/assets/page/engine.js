// What the engine does now: figures, two charts, and the KV pool as a grid.

import { make } from "./chat.js";

const HISTORY = 120; // looks
const CELL = 10, GAP = 2; // CSS pixels
const MAX_ROWS = 32; // of the table

const element = (id) => document.getElementById(id);
const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
const rounded = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

/** A colour for a row, far from those of its neighbours: by the golden angle. */
export function rowColour(row) {
  return `hsl(${Math.round(row * 137.508) % 360} 65% 52%)`;
}

/** Tokens a second between two looks; null before the second one, and after the server has started anew. */
export function rate(before, now, name) {
  if (!before || now.time <= before.time || now[name] < before[name]) return null;
  return (now[name] - before[name]) / (now.time - before.time);
}

export class EngineView {
  constructor() {
    this.last = null;
    this.rates = [];
    this.shares = [];
    this.resized = new ResizeObserver(() => this.last && this.draw());
    this.resized.observe(element("engine"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.last && this.draw());
  }

  show(look) {
    const decode = rate(this.last, look, "decoded_tokens");
    const prefill = rate(this.last, look, "prefilled_tokens");
    element("running").textContent = `${look.running} of ${look.max_running}`;
    element("waiting").textContent = look.waiting;
    element("decode-rate").textContent = decode === null ? "–" : rounded(decode);
    element("prefill-rate").textContent = prefill === null ? "–" : rounded(prefill);
    element("share").textContent = percent(look.bandwidth_share);
    const asked = look.prefix_cache_queries;
    element("hits").textContent = asked ? percent(look.prefix_cache_hits / asked) : "–";
    element("steps").textContent = look.steps ?? "No step decoded in the last second.";
    this.rates = [...this.rates, decode ?? 0].slice(-HISTORY);
    this.shares = [...this.shares, look.bandwidth_share ?? 0].slice(-HISTORY);
    this.last = look;
    this.showPool(look);
    this.draw();
  }

  showPool({ num_blocks, block_size, kv_cache_usage, preemptions, pool }) {
    const every = pool.stride > 1 ? ` Every ${pool.stride}th block is shown.` : "";
    const text = `${percent(kv_cache_usage)} of ${num_blocks.toLocaleString("en")} blocks of ${block_size} tokens are ` +
      `held; ${preemptions} preemptions so far.${every}`;
    element("pool-text").textContent = text;
    element("pool").ariaLabel = text;
    const blocks = new Map();
    for (const owner of pool.owners) blocks.set(owner, (blocks.get(owner) ?? 0) + 1);
    const rows = Object.entries(pool.num_tokens).map(([row, tokens]) => [Number(row), tokens]).sort((a, b) => a[0] - b[0]);
    element("rows").hidden = !rows.length;
    element("rows").tBodies[0].replaceChildren(...rows.slice(0, MAX_ROWS).map(([row, tokens]) => {
      const swatch = make("span", { className: "key" });
      swatch.style.background = rowColour(row);
      return make("tr", {}, make("td", {}, swatch, String(row)), make("td", {}, tokens.toLocaleString("en")),
        make("td", {}, String(blocks.get(row) ?? 0)));
    }));
    element("more-rows").textContent = rows.length > MAX_ROWS ? `and ${rows.length - MAX_ROWS} more` : "";
  }

  draw() {
    if (element("engine").hidden) return;
    this.colours = getComputedStyle(document.documentElement);
    this.chart(element("rate-chart"), this.rates, Math.max(10, ...this.rates), (value) => rounded(value));
    this.chart(element("share-chart"), this.shares, 1, percent);
    this.grid(element("pool"), this.last.pool);
  }

  colour(name) {
    return this.colours.getPropertyValue(name);
  }

  /** A canvas sharp on this screen, `height` CSS pixels high and as wide as its place. */
  surface(canvas, height) {
    const width = canvas.clientWidth, scale = devicePixelRatio;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    return [context, width];
  }

  chart(canvas, values, top, words) {
    const height = 56;
    const [context, width] = this.surface(canvas, height);
    const step = width / (HISTORY - 1), left = width - step * (values.length - 1);
    const y = (value) => height - 1 - (height - 4) * Math.min(1, value / top);
    context.beginPath();
    values.forEach((value, index) => context.lineTo(left + index * step, y(value)));
    context.strokeStyle = this.colour("--accent");
    context.lineWidth = 1.5;
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(left, height);
    context.globalAlpha = 0.15;
    context.fillStyle = this.colour("--accent");
    context.fill();
    context.globalAlpha = 1;
    context.fillStyle = this.colour("--muted");
    context.font = "11px system-ui, sans-serif";
    context.fillText(words(top), 4, 12);
  }

  grid(canvas, { owners, num_holders }) {
    const columns = Math.max(1, Math.floor((canvas.clientWidth + GAP) / (CELL + GAP)));
    const [context] = this.surface(canvas, Math.ceil(owners.length / columns) * (CELL + GAP));
    owners.forEach((owner, index) => {
      const x = (index % columns) * (CELL + GAP), y = Math.floor(index / columns) * (CELL + GAP);
      context.fillStyle = owner >= 0 ? rowColour(owner) : this.colour(owner === -2 ? "--kept" : "--free");
      context.fillRect(x, y, CELL, CELL);
      if (num_holders[index] > 1) { // a hole, so that it does not depend on seeing colours
        context.fillStyle = this.colour("--back");
        context.fillRect(x + 3, y + 3, CELL - 6, CELL - 6);
      }
    });
  }
}
