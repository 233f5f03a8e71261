// What the engine does now: figures, two charts, and the KV pool as a grid.

import { make } from "./chat.js";

const HISTORY = 120; // seconds
const MAX_ROWS = 64; // that are listed
const FREE = -1, KEPT = -2, SHARED = -3; // owners of blocks that are no rows

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
    this.forget();
    this.resized = new ResizeObserver(() => this.last && this.draw());
    this.resized.observe(element("engine"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.last && this.draw());
  }

  /** Another engine is shown from now on. */
  forget() {
    this.last = null;
    this.points = []; // [time, tokens/s, share of bandwidth]: values of the time since the point before
  }

  show(look) {
    this.chooseOf(look.num_engines);
    if (this.last && look.time < this.last.time) this.forget(); // another clock
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
    this.points.push([look.time, decode ?? 0, look.bandwidth_share ?? 0]);
    while (this.points[1]?.[0] < look.time - HISTORY) this.points.shift();
    this.last = look;
    this.showPool(look);
    this.draw();
  }

  chooseOf(count) {
    element("which").hidden = count === 1;
    const select = element("which-engine");
    if (select.options.length === count) return;
    select.replaceChildren(...Array.from({ length: count }, (_, number) => make("option", { value: String(number) }, String(number))));
  }

  showPool({ num_blocks, block_size, kv_cache_usage, preemptions, pool }) {
    const count = (value) => value.toLocaleString("en");
    const every = pool.stride > 1 ? ` One of every ${pool.stride} blocks is shown.` : "";
    const text = `${count(Math.round(kv_cache_usage * num_blocks))} of ${count(num_blocks)} blocks of ${block_size} ` +
      `tokens are held (${percent(kv_cache_usage)}); ${count(preemptions)} preemptions so far.${every}`;
    element("pool-text").textContent = text;
    element("pool").ariaLabel = text;
    const rows = Object.entries(pool.num_tokens).map(([row, tokens]) => [Number(row), tokens]).sort((a, b) => a[0] - b[0]);
    element("rows-title").hidden = !rows.length;
    element("rows").replaceChildren(...rows.slice(0, MAX_ROWS).map(([row, tokens]) => {
      const swatch = make("span", { className: "key" });
      swatch.style.background = rowColour(row);
      return make("li", {}, swatch, `${row}: ${count(tokens)}`);
    }));
    element("more-rows").textContent = rows.length > MAX_ROWS ? `and ${rows.length - MAX_ROWS} more` : "";
  }

  draw() {
    if (element("engine").hidden) return;
    this.colours = getComputedStyle(document.documentElement);
    this.chart(element("rate-chart"), 1, Math.max(10, ...this.points.map((point) => point[1])), rounded);
    this.chart(element("share-chart"), 2, 1, percent);
    this.grid(element("pool"), this.last.pool.owners);
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

  /** One value of the points, as steps: each holds since the point before. */
  chart(canvas, which, top, words) {
    const height = 56;
    const [context, width] = this.surface(canvas, height);
    const x = (time) => width * (1 - (this.last.time - time) / HISTORY);
    const y = (value) => height - 1 - (height - 4) * Math.min(1, value / top);
    context.beginPath();
    this.points.forEach((point, index) => {
      context.lineTo(x(this.points[Math.max(0, index - 1)][0]), y(point[which]));
      context.lineTo(x(point[0]), y(point[which]));
    });
    context.strokeStyle = this.colour("--accent");
    context.lineWidth = 1.5;
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(x(this.points[0][0]), height);
    context.globalAlpha = 0.15;
    context.fillStyle = this.colour("--accent");
    context.fill();
    context.globalAlpha = 1;
    context.fillStyle = this.colour("--muted");
    context.font = "11px system-ui, sans-serif";
    context.fillText(words(top), 4, 12);
  }

  grid(canvas, owners) {
    const [cell, gap] = owners.length > 512 ? [6, 1] : [10, 2]; // CSS pixels
    const columns = Math.max(1, Math.floor((canvas.clientWidth + gap) / (cell + gap)));
    const [context] = this.surface(canvas, Math.ceil(owners.length / columns) * (cell + gap));
    const colours = { [FREE]: this.colour("--free"), [KEPT]: this.colour("--kept"), [SHARED]: this.colour("--text") };
    owners.forEach((owner, index) => {
      const x = (index % columns) * (cell + gap), y = Math.floor(index / columns) * (cell + gap);
      context.fillStyle = colours[owner] ??= rowColour(owner);
      context.fillRect(x, y, cell, cell);
      if (owner === SHARED) context.clearRect(x + cell / 2 - 1, y + cell / 2 - 1, 2, 2); // seen without colours, too
    });
  }
}
