/** The live view of the engine: asked once a second, only while somebody looks. */

import { getJson } from "./api.js";
import { byId, el } from "./dom.js";

const EVERY_MS = 1000;
const NUM_CELLS = 120;
const NUM_POINTS = 60;

const count = new Intl.NumberFormat("en");

export class EngineView {
  constructor() {
    this.panel = byId("engine");
    this.button = byId("engine-toggle");
    this.seen = [];
    this.timer = 0;
    this.cells = Array.from({ length: NUM_CELLS }, () => el("i"));
    byId("blocks").append(...this.cells);
    this.button.addEventListener("click", () => this.#toggle());
    document.addEventListener("visibilitychange", () => this.#run());
    new ResizeObserver(() => {
      const height = `${this.panel.offsetHeight}px`; // none while it is hidden
      document.documentElement.style.setProperty("--engine-height", height);
    }).observe(this.panel);
  }

  #toggle() {
    this.panel.hidden = !this.panel.hidden;
    this.button.setAttribute("aria-expanded", String(!this.panel.hidden));
    this.#run();
  }

  #run() {
    clearTimeout(this.timer);
    if (this.panel.hidden || document.hidden) this.seen = [];
    else this.#look();
  }

  async #look() {
    try {
      this.#show(await getJson("v1/engine"));
      byId("engine-fault").textContent = "";
    } catch (failure) {
      this.seen = [];
      byId("engine-fault").textContent = failure.message;
    }
    clearTimeout(this.timer);
    if (!this.panel.hidden && !document.hidden)
      this.timer = setTimeout(() => this.#look(), EVERY_MS);
  }

  #show(now) {
    this.seen = [...this.seen, now].slice(-NUM_POINTS - 1);
    const used = now.num_blocks - now.num_free_blocks;
    byId("running").textContent = `${now.num_requests_running} of ${now.max_num_seqs}`;
    byId("waiting").textContent = count.format(now.num_requests_waiting);
    byId("blocks-used").textContent = `${count.format(used)} of ${count.format(now.num_blocks)}`;
    byId("blocks-note").textContent =
      `${now.block_size} tokens a block; a square is ${count.format(Math.ceil(now.num_blocks / NUM_CELLS))} of them`;
    const hits = share(now.prefix_cache_hits, now.prefix_cache_queries);
    byId("hits").textContent = hits;
    byId("preempted").textContent = count.format(now.num_preemptions);
    byId("tokens-total").textContent =
      `${count.format(now.prompt_tokens)} in, ${count.format(now.generation_tokens)} out`;
    const filled = Math.ceil((used / (now.num_blocks || 1)) * NUM_CELLS);
    this.cells.forEach((cell, at) => cell.classList.toggle("used", at < filled));
    this.#draw(this.#rates());
  }

  /** Return the tokens given out a second, between each two looks. */
  #rates() {
    const rates = [];
    for (let at = 1; at < this.seen.length; at += 1) {
      const [before, after] = [this.seen[at - 1], this.seen[at]];
      const seconds = after.clock_s - before.clock_s;
      const tokens = after.generation_tokens - before.generation_tokens;
      // Less than before means that the server is another one.
      if (seconds > 0 && tokens >= 0) rates.push(tokens / seconds);
    }
    return rates;
  }

  #draw(rates) {
    const last = rates.at(-1);
    byId("rate").textContent = last === undefined ? "…" : last.toFixed(last < 10 ? 1 : 0);
    const most = Math.max(...rates, 1);
    byId("rate-most").textContent = `at most ${most.toFixed(0)} in the last minute`;
    const points = rates.map((rate, at) => {
      const x = 120 - (rates.length - 1 - at) * (120 / (NUM_POINTS - 1));
      return `${x.toFixed(1)},${(31 - (rate / most) * 30).toFixed(1)}`;
    });
    byId("rate-line").setAttribute("points", points.join(" "));
  }
}

const share = (hits, queries) => (queries ? `${((hits / queries) * 100).toFixed(0)} %` : "–");
