/**
 * The tokens of an answer, coloured by their probability, and what else the model weighed.
 *
 * To the keyboard an answer's tokens are one list: arrows go along it, Enter goes into the
 * alternatives of a token, Escape comes back.
 */

import { byId, el, percent, spoken, visible } from "./dom.js";

const BANDS = [0.9, 0.6, 0.3, 0.1]; // probability from which a token is in the band, 0 the surest
const HOVER_MS = 120;
const LEAVE_MS = 300;
const FIXED = "Reasoning and calls of tools cannot be taken up half-way.";

export const bandOf = (probability) => {
  const band = BANDS.findIndex((least) => probability >= least);
  return band < 0 ? BANDS.length : band;
};

/** The list of one answer's tokens; `panel` is shared by all lists. */
export class TokenList {
  constructor(panel, onPick) {
    this.node = el("div", {
      className: "tokens",
      role: "listbox",
      "aria-label": "Tokens of the answer, with their probabilities",
      "aria-orientation": "horizontal",
      onkeydown: (event) => this.#onKey(event),
      onclick: (event) => this.#onClick(event),
      onfocusin: (event) => this.#show(event.target),
      onfocusout: (event) => this.panel.leaveFor(event.relatedTarget),
      onpointerover: (event) => event.pointerType === "mouse" && this.#hover(event.target),
      onpointerout: (event) => event.pointerType === "mouse" && this.panel.leave(),
    });
    this.panel = panel;
    this.onPick = onPick;
    this.units = [];
    this.nodes = [];
    this.current = 0;
  }

  append(units) {
    for (const unit of units) {
      const node = el("span", {
        role: "option",
        "aria-selected": "false",
        tabIndex: this.nodes.length ? -1 : 0,
        textContent: unit.text,
      });
      const picked = unit.isPicked ? " picked" : "";
      // What is only blank would have no name.
      if (!unit.text.trim()) node.setAttribute("aria-label", describe(unit));
      node.className = `token band-${bandOf(Math.exp(unit.logprob))}${picked}`;
      this.units.push(unit);
      this.nodes.push(node);
      this.node.append(node);
    }
  }

  /** Mark the tokens that the answer's text leaves out: its end, or what lies past a stop string. */
  settle() {
    this.units.forEach((unit, at) => {
      this.nodes[at].classList.toggle("outside", unit.kept === "" && unit.text !== "");
    });
  }

  #placeOf(target) {
    return this.nodes.indexOf(target.closest("[role=option]"));
  }

  #show(target, canWait = false) {
    const place = this.#placeOf(target);
    if (place < 0) return;
    const node = this.nodes[place];
    const unit = this.units[place];
    this.nodes[this.current].tabIndex = -1; // one stop for the Tab key: where one was last
    node.tabIndex = 0;
    this.current = place;
    node.setAttribute("aria-label", describe(unit));
    const pick = (alternative) => this.onPick(place, alternative);
    this.panel.open(node, unit, pick, canWait ? HOVER_MS : 0);
  }

  #hover(target) {
    if (!this.panel.isHeld) this.#show(target, true);
  }

  #onClick(event) {
    const place = this.#placeOf(event.target);
    if (place < 0 || !getSelection().isCollapsed) return; // selecting text is not choosing
    this.nodes[place].focus({ preventScroll: true });
    this.#show(event.target);
    this.panel.hold();
  }

  #onKey(event) {
    const place = this.#placeOf(event.target);
    const last = this.nodes.length - 1;
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: last }[event.key];
    if (to !== undefined) this.nodes[Math.max(0, Math.min(last, to))].focus();
    else if (["Enter", " ", "ArrowDown"].includes(event.key)) {
      this.#show(event.target); // it may have been closed
      this.panel.enter();
    } else return;
    event.preventDefault();
  }
}

function describe(unit) {
  const others = unit.alternatives.filter((other) => !other.isChosen).slice(0, 3);
  const also = others.map((other) => `${spoken(other.label)} ${percent(Math.exp(other.logprob))}`);
  const head = `${spoken(unit.text)}, ${percent(Math.exp(unit.logprob))}`;
  return also.length ? `${head}; instead of ${also.join(", ")}` : head;
}

/** The one panel of alternatives: beside the token, or at the foot of a phone. */
export class Panel {
  constructor() {
    this.node = byId("alternatives");
    this.token = null;
    this.isHeld = false; // opened on purpose: the mouse's leaving does not close it
    this.timer = 0;
    this.node.addEventListener("pointerenter", () => clearTimeout(this.timer));
    this.node.addEventListener("pointerleave", () => this.leave());
    this.node.addEventListener("keydown", (event) => this.#onKey(event));
    this.node.addEventListener("focusout", (event) => this.leaveFor(event.relatedTarget));
    document.addEventListener("pointerdown", (event) => {
      if (!this.node.contains(event.target) && !event.target.closest(".tokens")) this.close();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.node.hidden) this.close();
    });
  }

  open(token, unit, onPick, delayMs) {
    clearTimeout(this.timer);
    if (token === this.token) return;
    const show = () => {
      this.#close();
      this.token = token;
      token.classList.add("shown");
      token.setAttribute("aria-selected", "true");
      this.#fill(unit, onPick);
      this.node.hidden = false;
      this.#place();
    };
    if (delayMs) this.timer = setTimeout(show, delayMs);
    else show();
  }

  hold() {
    this.isHeld = true;
  }

  /** Go into the panel. */
  enter() {
    this.hold();
    this.node.querySelector("button:not([aria-disabled=true])")?.focus();
  }

  leave() {
    clearTimeout(this.timer);
    if (!this.isHeld) this.timer = setTimeout(() => this.close(), LEAVE_MS);
  }

  /** Close when the focus goes elsewhere in the page; not when the window loses it. */
  leaveFor(target) {
    if (target && target !== this.token && !this.node.contains(target)) this.#close();
  }

  /** Close, and give the focus back if it was within. */
  close() {
    const token = this.token;
    const hadFocus = this.node.contains(document.activeElement);
    this.#close();
    if (!hadFocus || !token?.isConnected) return;
    token.focus({ preventScroll: true });
    this.#close(); // focus alone opens it
  }

  #close() {
    clearTimeout(this.timer);
    this.token?.classList.remove("shown");
    this.token?.setAttribute("aria-selected", "false");
    this.token = null;
    this.isHeld = false;
    this.node.hidden = true;
  }

  #fill(unit, onPick) {
    const share = Math.exp(unit.logprob);
    const head = [
      el("code", { className: "sample" }, visible(unit.text)),
      el("strong", {}, percent(share)),
    ];
    const notes = [];
    if (unit.isPicked) notes.push("Picked by you.");
    if (unit.numTokens > 1) notes.push(`${unit.numTokens} tokens make this character.`);
    if (unit.kept === "") notes.push("Not part of the text.");
    const rows = unit.alternatives.map((other) => row(other, unit.isFixed ? null : onPick));
    this.node.replaceChildren(
      el("p", { className: "head" }, ...head),
      ...notes.map((note) => el("p", { className: "note" }, note)),
      rows.length
        ? el("ul", {}, ...rows)
        : el("p", { className: "note" }, "No alternatives were asked for."),
      el("p", { className: "note" }, unit.isFixed ? FIXED : this.#promise()),
    );
    this.node.setAttribute("aria-label", `Alternatives to ${spoken(unit.text)}`);
  }

  #promise() {
    const isLast = !this.token.closest(".turn").nextElementSibling;
    const promise = "Pick one: the answer is written anew from there";
    return isLast ? `${promise}.` : `${promise}, and what follows it goes.`;
  }

  #place() {
    const { style } = this.node;
    style.left = style.top = "";
    const token = this.token.getClientRects()[0] ?? this.token.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.node;
    if (matchMedia("(max-width: 40rem)").matches) {
      scrollBy({ top: Math.max(0, token.bottom + height + 12 - innerHeight) });
      return;
    }
    const room = document.documentElement.clientWidth - width - 8;
    const isBelow = token.bottom + height + 12 < innerHeight || token.top < height + 12;
    style.left = `${scrollX + Math.max(8, Math.min(room, token.left - 12))}px`;
    style.top = `${scrollY + (isBelow ? token.bottom + 6 : token.top - height - 6)}px`;
  }

  #onKey(event) {
    const buttons = [...this.node.querySelectorAll("button")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = buttons.indexOf(document.activeElement);
    buttons[(at + step + buttons.length) % buttons.length]?.focus();
  }
}

function row(other, onPick) {
  const share = Math.exp(other.logprob);
  const bar = el("span", { className: "bar", "aria-hidden": "true" });
  bar.style.width = `${Math.max(share * 100, 0.5)}%`;
  const isWhole = Boolean(other.text);
  const button = el(
    "button",
    {
      type: "button",
      className: other.isChosen ? "chosen" : "",
      onclick: () => isWhole && onPick?.(other),
    },
    bar,
    el("code", { "aria-hidden": "true" }, visible(other.label)),
    el("span", { className: "unseen" }, `Write on from ${spoken(other.label)}, `),
    el("span", { className: "mark" }, other.isChosen ? "chosen " : ""),
    el("span", { className: "share" }, percent(share)),
  );
  if (!isWhole || !onPick) button.setAttribute("aria-disabled", "true");
  if (!isWhole) button.title = "Part of a character: cannot be sent as text";
  return el("li", {}, button);
}
