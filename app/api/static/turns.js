/** What is on the page for each turn of a conversation. Sends nothing itself. */

import { TokenList } from "./alternatives.js";
import { el } from "./dom.js";

/** What a person said. */
export class UserTurn {
  constructor(text) {
    this.text = text;
    this.node = el(
      "article",
      { className: "turn user", "aria-label": "You" },
      el("h2", {}, "You"),
      el("p", { className: "said" }, text),
    );
  }

  messages() {
    return [{ role: "user", content: this.text }];
  }
}

/** The versions of an answer, one of them shown; a completion's begins with its prompt. */
export class AnswerTurn {
  constructor({ panel, prompt = null, onPick, onGoOn, onAgain, onResults }) {
    Object.assign(this, { panel, prompt, onPick, onGoOn, onAgain, onResults });
    this.answers = [];
    this.place = -1;
    this.list = null;
    const name = prompt === null ? "Assistant" : "Completion";
    this.plain = el("p", { className: "said" }); // shown without probabilities, else for ears alone
    this.body = el("div", { className: "body" });
    this.thoughts = el("p", { className: "said" });
    this.reasoning = el("details", {}, el("summary", {}, "Reasoning"), this.thoughts);
    this.calls = el("div", { className: "calls" });
    this.foot = el("div", { className: "foot" });
    this.node = el(
      "article",
      { className: "turn answer", "aria-label": name, tabIndex: -1 },
      el("h2", {}, name),
      this.reasoning,
      this.body,
      this.calls,
      this.foot,
    );
  }

  get answer() {
    return this.answers[this.place];
  }

  /** Return what was said; calls of tools only with their results, as templates want both. */
  messages() {
    const { text = "", toolCalls = [], results = null } = this.answer ?? {};
    const message = { role: "assistant", content: text };
    if (!results) return text ? [message] : [];
    const calls = toolCalls.map(({ id, name, arguments: args }) => ({
      id,
      type: "function",
      function: { name, arguments: args },
    }));
    const told = results.map((content, at) => ({
      role: "tool",
      tool_call_id: toolCalls[at].id,
      content,
    }));
    return [{ ...message, tool_calls: calls }, ...told];
  }

  /** Show a new version, which is yet to be written. */
  begin(answer) {
    const hadFocus = [this.node, this.panel.node].some((node) =>
      node.contains(document.activeElement),
    );
    this.answers.push(answer);
    this.#show(this.answers.length - 1);
    if (hadFocus) this.node.focus({ preventScroll: true }); // what had it is gone
    this.node.setAttribute("aria-busy", "true");
  }

  /** Take back a version that came to nothing; return whether there is another one. */
  withdraw() {
    this.answers.splice(this.place, 1);
    this.node.removeAttribute("aria-busy");
    if (this.answers.length) this.#show(this.answers.length - 1);
    return this.answers.length > 0;
  }

  append(units) {
    if (units.length && this.answer.withTokens) this.#tokens().append(units);
    else if (!this.answer.withTokens) this.plain.textContent = this.answer.text;
    this.reasoning.hidden = !this.answer.reasoning;
    this.thoughts.textContent = this.answer.reasoning;
  }

  /** Show how a version came to its end. */
  end() {
    this.node.removeAttribute("aria-busy");
    const { answer } = this;
    this.append(answer.units.slice(this.list?.units.length ?? 0));
    this.list?.settle();
    this.plain.textContent = answer.text;
    this.#close();
  }

  #show(place) {
    this.panel.close();
    this.place = place;
    const { answer } = this;
    this.list = null;
    this.body.replaceChildren();
    if (this.prompt !== null) this.body.append(el("span", { className: "given" }, this.prompt));
    this.body.append(this.plain);
    this.plain.className = answer.withTokens ? "said unseen" : "said";
    const isOver = answer.endedMs !== null;
    this.plain.textContent = isOver || !answer.withTokens ? answer.text : "";
    this.append(answer.units);
    this.calls.replaceChildren();
    this.foot.replaceChildren();
    if (!isOver) return;
    this.list?.settle();
    this.#close();
  }

  #close() {
    this.calls.replaceChildren(...this.#calls());
    this.foot.replaceChildren(...this.#foot());
  }

  #tokens() {
    if (!this.list) {
      this.list = new TokenList(this.panel, (place, alternative) =>
        this.onPick(this, place, alternative),
      );
      this.body.append(this.list.node);
    }
    return this.list;
  }

  #foot() {
    const { answer } = this;
    const actions = el("span", { className: "actions" });
    const action = (name, onclick, label = name) =>
      el("button", { type: "button", className: "quiet", "aria-label": label, onclick }, name);
    const turnTo = (place) => {
      this.#show(place);
      this.foot.querySelector(".versions button:not(:disabled)")?.focus();
    };
    if (this.answers.length > 1) {
      const back = action("‹", () => turnTo(this.place - 1), "Version before");
      const on = action("›", () => turnTo(this.place + 1), "Version after");
      back.disabled = this.place === 0;
      on.disabled = this.place === this.answers.length - 1;
      const which = el("span", {}, `${this.place + 1} of ${this.answers.length}`);
      actions.append(el("span", { className: "versions" }, back, which, on));
    }
    const isWhole = ["stop", "tool_calls", "chosen"].includes(answer.finish);
    const canGoOn = !isWhole && answer.text !== "" && !answer.toolCalls.length;
    if (canGoOn)
      actions.append(action("Go on", () => this.onGoOn(this), "Go on writing this"));
    actions.append(action("Again", () => this.onAgain(this), "Again: another answer"));
    return [el("p", { className: "hint" }, summary(answer)), actions];
  }

  #calls() {
    const { toolCalls } = this.answer;
    if (!toolCalls.length) return [];
    const inputs = toolCalls.map((call, at) =>
      el("textarea", {
        rows: 2,
        "aria-label": `Result of ${call.name}, call ${at + 1}`,
        placeholder: "its result",
      }),
    );
    const send = el(
      "button",
      { type: "button" },
      toolCalls.length > 1 ? "Give the results" : "Give the result",
    );
    send.addEventListener("click", () => {
      this.answer.results = inputs.map((input) => input.value);
      send.disabled = true;
      this.onResults();
    });
    const shown = toolCalls.map((call, at) =>
      el(
        "div",
        { className: "call" },
        el("p", {}, "Calls ", el("code", {}, call.name), " with"),
        el("pre", {}, indented(call.arguments)),
        inputs[at],
      ),
    );
    return [...shown, send];
  }
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

/** Say in a line how an answer ended and how fast it came. */
export function summary(answer) {
  const ends = {
    stop: answer.stopString === null ? "ended by itself" : `ended at “${answer.stopString}”`,
    length: "cut at the limit",
    tool_calls: "asks for a tool",
    user: "stopped by you",
    chosen: "ended where you chose",
    error: "broken off",
  };
  const parts = [];
  const { numNew, firstMs, startedMs, endedMs } = answer;
  if (numNew > 0 && answer.finish !== "chosen")
    parts.push(`${numNew} ${numNew === 1 ? "token" : "tokens"}`);
  const seconds = (endedMs - firstMs) / 1000;
  if (numNew > 1 && seconds > 0.05) parts.push(`${((numNew - 1) / seconds).toFixed(1)} a second`);
  if (firstMs !== null) parts.push(`first after ${((firstMs - startedMs) / 1000).toFixed(2)} s`);
  parts.push(ends[answer.finish] ?? "ended");
  if (answer.isUnbound) parts.push("written on without the schema");
  return parts.join(" · ");
}
