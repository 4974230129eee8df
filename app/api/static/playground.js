/** The playground: what the buttons do. One answer is written at a time. */

import { Panel } from "./alternatives.js";
import { Answer, pickedUnit } from "./answer.js";
import { Failure, askHealth, getJson, postJson, streamEvents } from "./api.js";
import { CodeDialog, KeyDialog } from "./dialogs.js";
import { byId, el, say } from "./dom.js";
import { EngineView } from "./engine.js";
import { Settings } from "./settings.js";
import { AnswerTurn, UserTurn, summary } from "./turns.js";

const HEALTH_MS = 5000;
const HEALTH_GONE_MS = 1000;
const COUNT_AFTER_MS = 400;
const FOLLOW_PX = 80; // so near to the end of the page is at its end
const PATHS = { chat: "v1/chat/completions", completion: "v1/completions" };
const CONTROL_TOKEN = /^\s*(<.+>|\[.+\])\s*$/s;

const GONE_WORDS = {
  gone: "The server does not answer. Looking for it every second…",
  unready: "The server takes no requests at the moment. Asking again every second…",
};
const WORDS = {
  chat: { label: "Message", send: "Send", keys: "Enter sends, Shift+Enter breaks the line" },
  completion: { label: "Text to continue", send: "Continue", keys: "Ctrl+Enter continues" },
};

class Playground {
  constructor() {
    this.mode = "chat";
    this.turns = { chat: [], completion: [] };
    this.drafts = { chat: "", completion: "" };
    this.running = null; // { controller, done } of the answer that is being written
    this.isGone = false;
    this.isFollowing = true;
    this.frame = 0;
    this.settings = new Settings(byId("fields"));
    this.panel = new Panel();
    this.engine = new EngineView();
    this.keyDialog = new KeyDialog();
    this.codeDialog = new CodeDialog();
    this.prompt = byId("prompt");
    this.#wire();
    this.#setMode("chat");
    this.#load();
    this.#watch();
  }

  // What the page shows

  #wire() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.#stop());
    byId("clear").addEventListener("click", () => {
      this.#clear();
      this.prompt.focus();
    });
    byId("code-open").addEventListener("click", () => this.#showCode());
    byId("key-open").addEventListener("click", async () => {
      if (await this.keyDialog.ask()) this.#load();
    });
    byId("settings-toggle").addEventListener("click", () => {
      const isOpen = byId("settings").classList.toggle("open");
      byId("settings-toggle").setAttribute("aria-expanded", String(isOpen));
    });
    for (const radio of document.querySelectorAll("[name=mode]")) {
      radio.addEventListener("change", () => this.#setMode(radio.value));
    }
    this.prompt.addEventListener("keydown", (event) => {
      const isAsked = this.mode === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
      if (event.key !== "Enter" || !isAsked || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    document.addEventListener("keydown", (event) => {
      const isBusyElsewhere = !this.panel.node.hidden || document.querySelector("dialog[open]");
      if (event.key === "Escape" && !event.defaultPrevented && !isBusyElsewhere) this.#stop();
    });
    let lastY = 0;
    document.addEventListener("scroll", () => {
      const { scrollHeight } = document.documentElement;
      // More may have been written since the page was at its end: only a way up is a will.
      if (innerHeight + scrollY >= scrollHeight - FOLLOW_PX) this.isFollowing = true;
      else if (scrollY < lastY) this.isFollowing = false;
      lastY = scrollY;
    });
    for (const input of [this.prompt, byId("system")]) {
      input.addEventListener("input", () => this.#countSoon());
    }
  }

  #setMode(mode) {
    this.#stop();
    this.drafts[this.mode] = this.prompt.value;
    this.mode = mode;
    const words = WORDS[mode];
    this.prompt.value = this.drafts[mode];
    this.prompt.placeholder = byId("prompt-label").textContent = words.label;
    this.prompt.classList.toggle("tall", mode !== "chat");
    byId("send").textContent = words.send;
    byId("keys").textContent = words.keys;
    byId("thread-chat").hidden = byId("system-field").hidden = mode !== "chat";
    byId("thread-completion").hidden = mode === "chat";
    document.querySelector(`[name=mode][value=${mode}]`).checked = true;
    this.#fail(null);
    this.#refresh();
    this.#countSoon();
  }

  #refresh() {
    byId("empty").hidden = this.turns[this.mode].length > 0;
    const [stop, send] = [byId("stop"), byId("send")];
    const hadFocus = [stop, send].includes(document.activeElement);
    stop.hidden = this.running === null;
    send.hidden = this.running !== null;
    if (hadFocus) (this.running ? stop : send).focus();
  }

  /** Show a failure in plain words, or take the last one away. */
  #fail(failure) {
    const place = byId("failure");
    place.replaceChildren();
    if (!failure) return;
    place.append(el("p", {}, failure.message));
    if (failure.detail && failure.status !== 401)
      place.append(el("p", { className: "hint" }, failure.detail));
  }

  #clear() {
    this.#stop();
    this.turns[this.mode] = [];
    byId(`thread-${this.mode}`).replaceChildren();
    this.#fail(null);
    this.#refresh();
    this.#countSoon();
  }

  #add(turn) {
    this.turns[this.mode].push(turn);
    byId(`thread-${this.mode}`).append(turn.node);
    this.#refresh();
    this.#toEnd();
  }

  #drop(turn) {
    for (const mode of Object.keys(this.turns)) {
      this.turns[mode] = this.turns[mode].filter((other) => other !== turn);
    }
    turn.node.remove();
    this.#refresh();
  }

  /** Follow what is written, once a frame, unless somebody has scrolled up to read. */
  #follow() {
    if (!this.isFollowing || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.isFollowing) this.#toEnd();
    });
  }

  #toEnd() {
    this.isFollowing = true;
    scrollTo({ top: document.documentElement.scrollHeight });
  }

  // What is asked of the server

  async #send() {
    if (this.running) return;
    const text = this.mode === "chat" ? this.prompt.value.trim() : this.prompt.value;
    if (!text || !this.#fields()) {
      if (!text) this.prompt.focus();
      return;
    }
    const isChat = this.mode === "chat";
    if (!isChat) this.#clear();
    const user = isChat ? new UserTurn(text) : null;
    if (user) this.#add(user);
    const turn = this.#newAnswerTurn(isChat ? null : text);
    this.#add(turn);
    if (isChat) this.prompt.value = "";
    const isAnswered = await this.#write(turn, new Answer());
    if (isAnswered) return;
    this.#drop(turn);
    if (!user) return;
    this.#drop(user); // nothing came: what was typed goes back to where it can be changed
    this.prompt.value ||= text;
    this.#countSoon();
  }

  #newAnswerTurn(prompt = null) {
    return new AnswerTurn({
      panel: this.panel,
      prompt,
      onPick: (turn, place, alternative) => this.#writeFrom(turn, place, alternative),
      onGoOn: (turn) => this.#goOn(turn),
      onAgain: (turn) => this.#again(turn),
      onResults: () => this.#answerResults(),
    });
  }

  async #answerResults() {
    const turn = this.#newAnswerTurn();
    this.#add(turn);
    if (!(await this.#write(turn, new Answer()))) this.#drop(turn);
  }

  async #again(turn) {
    this.#cutAfter(turn);
    await this.#stop();
    await this.#write(turn, new Answer());
  }

  async #goOn(turn) {
    this.#cutAfter(turn);
    await this.#stop();
    await this.#write(turn, new Answer(turn.answer.keptBefore(), turn.answer.text));
  }

  /** Write an answer anew from one of its tokens on, with another one in its place. */
  async #writeFrom(turn, place, alternative) {
    this.panel.close();
    await this.#stop();
    const { answer } = turn;
    const picked = pickedUnit(answer.units[place], alternative);
    const kept = answer.keptBefore(place);
    const text = kept.map((unit) => unit.text).join("");
    this.#cutAfter(turn);
    this.#fail(null);
    try {
      if (await isControlToken(alternative.text)) {
        const ended = new Answer([...kept, { ...picked, kept: "" }], text);
        ended.withTokens = true;
        turn.begin(ended);
        ended.end("chosen");
        turn.end();
        say("The answer ends there now.");
        return;
      }
    } catch (failure) {
      this.#failed(failure);
      return;
    }
    await this.#write(turn, new Answer([...kept, picked], text + alternative.text));
  }

  /** What was said after a turn answered another version of it. */
  #cutAfter(turn) {
    const turns = this.turns[this.mode];
    for (const later of turns.slice(turns.indexOf(turn) + 1)) this.#drop(later);
  }

  async #stop() {
    if (!this.running) return;
    const { controller, done } = this.running;
    controller.abort();
    await done;
  }

  /** Have an answer written; return whether anything came of it. */
  async #write(turn, answer) {
    const fields = this.#fields();
    if (!fields || this.running) return turn.answers.length > 0;
    const body = this.#bodyFor(turn, answer, fields);
    answer.withTokens = byId("top").value !== "";
    this.#fail(null);
    const controller = new AbortController();
    let isDone;
    this.running = { controller, done: new Promise((resolve) => (isDone = resolve)) };
    this.#refresh();
    turn.begin(answer);
    say("Answering.");
    const { mode } = this;
    try {
      await this.#stream(mode, body, controller.signal, turn, answer);
      answer.end();
    } catch (error) {
      answer.end(error.name === "AbortError" ? "user" : "error");
      if (error.name !== "AbortError") this.#failed(error);
    } finally {
      this.running = null;
      isDone();
      this.#refresh();
    }
    return this.#settle(turn, answer);
  }

  #settle(turn, answer) {
    const hasNothing = answer.numNew <= 0 && !answer.text && !answer.toolCalls.length;
    if (hasNothing && ["user", "error"].includes(answer.finish)) return turn.withdraw();
    turn.end();
    if (answer.finish !== "error") say(`The answer is there: ${summary(answer)}.`);
    this.#countSoon();
    return true;
  }

  async #stream(mode, body, signal, turn, answer) {
    for (;;) {
      try {
        for await (const event of streamEvents(PATHS[mode], body, signal)) {
          if (event.usage) answer.usage = event.usage;
          for (const choice of event.choices) {
            turn.append(answer.take(choice));
            this.#follow();
          }
        }
        return;
      } catch (error) {
        if (error.status !== 401 || !(await this.keyDialog.ask(error))) throw error;
        answer.startedMs = performance.now();
      }
    }
  }

  #failed(error) {
    const failure =
      error instanceof Failure
        ? error
        : new Failure("This page has a fault.", { detail: String(error) });
    this.#fail(failure);
    if (failure.isGone) this.#check();
    const field = failure.param && this.settings.inputs.get(failure.param.split(".")[0]);
    if (field) {
      field.fault.textContent = "The server refused this.";
      field.input.setAttribute("aria-invalid", "true");
      field.input.closest("details").open = true;
    }
  }

  /** Return the settings' fields, or null after showing which of them is wrong. */
  #fields() {
    const fields = this.settings.read(this.mode === "chat");
    if (!fields.fault) return fields;
    byId("settings").classList.add("open");
    byId("settings-toggle").setAttribute("aria-expanded", "true");
    fields.fault.focus();
    say("A setting is not valid.");
    return null;
  }

  #messages(turns, draft = "") {
    const system = byId("system").value.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...turns.flatMap((turn) => turn.messages()),
      ...(draft ? [{ role: "user", content: draft }] : []),
    ];
  }

  #bodyFor(turn, answer, fields) {
    const turns = this.turns[this.mode];
    const top = byId("top").value;
    const body = { model: byId("model").value || undefined };
    const isOngoing = answer.text !== "";
    if (this.mode === "chat") {
      body.messages = this.#messages(turns.slice(0, turns.indexOf(turn)));
      if (isOngoing) {
        body.messages.push({ role: "assistant", content: answer.text });
        Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
      }
      if (top) Object.assign(body, { logprobs: true, top_logprobs: Number(top) });
    } else {
      body.prompt = turn.prompt + answer.text;
      if (top) body.logprobs = Number(top);
    }
    Object.assign(body, fields, { stream: true, stream_options: { include_usage: true } });
    if (isOngoing && body.response_format) {
      delete body.response_format; // a schema holds for a whole text, not for the rest of one
      answer.isUnbound = true;
    }
    return body;
  }

  #showCode() {
    const fields = this.#fields();
    if (!fields) return;
    const body = { model: byId("model").value };
    const draft = this.prompt.value;
    if (this.mode === "chat") {
      const turns = this.turns.chat;
      const isAnswered = turns.at(-1) instanceof AnswerTurn;
      const asked = !draft.trim() && isAnswered ? turns.slice(0, -1) : turns;
      body.messages = this.#messages(asked, draft.trim() || (turns.length ? "" : "Hello!"));
    } else {
      body.prompt = draft || "Once upon a time";
    }
    this.codeDialog.open(PATHS[this.mode], { ...body, ...fields, stream: true });
  }

  // The server

  async #load() {
    try {
      const { data } = await getJson("v1/models");
      const select = byId("model");
      select.replaceChildren(...data.map((model) => el("option", {}, model.id)));
      const maxLen = data[0].max_model_len.toLocaleString("en");
      byId("model-note").textContent = `${data[0].precision ?? ""} · ${maxLen} tokens`;
      this.#countSoon();
      await this.#checkTemplate();
    } catch (failure) {
      if (failure.status === 401 && (await this.keyDialog.ask(failure))) await this.#load();
      else if (failure.isGone) this.#check();
      else this.#fail(failure);
    }
  }

  /** A model without a chat template can only continue a text. */
  async #checkTemplate() {
    const chat = document.querySelector("[name=mode][value=chat]");
    try {
      await postJson("tokenize", { messages: [{ role: "user", content: "Hello" }] });
      chat.disabled = false;
    } catch (failure) {
      if (failure.status !== 400) throw failure;
      chat.disabled = true;
      chat.parentElement.title = "This model has no chat template";
      this.#setMode("completion");
    }
  }

  /** Look now and then whether the server is there; more often while it is not. */
  async #watch() {
    if (!document.hidden) await this.#check();
    setTimeout(() => this.#watch(), this.isGone ? HEALTH_GONE_MS : HEALTH_MS);
  }

  async #check() {
    const health = await askHealth();
    const words = GONE_WORDS[health] ?? "";
    const wasGone = this.isGone;
    this.isGone = words !== "";
    const banner = byId("gone");
    banner.hidden = !this.isGone;
    if (banner.textContent !== words) banner.textContent = words;
    if (this.isGone || !wasGone) return;
    say("The server answers again.");
    this.#fail(null);
    this.#load();
  }

  #countSoon() {
    clearTimeout(this.countTimer);
    this.countTimer = setTimeout(() => this.#count(), COUNT_AFTER_MS);
  }

  /** Show how many tokens would be sent as it stands. */
  async #count() {
    const isChat = this.mode === "chat";
    const body = isChat
      ? { messages: this.#messages(this.turns.chat, this.prompt.value.trim()) }
      : { prompt: this.prompt.value };
    const isEmpty = isChat ? !body.messages.length : !body.prompt;
    const show = (text) => (byId("count").textContent = text);
    if (isEmpty) {
      show("");
      return;
    }
    this.counting?.abort();
    this.counting = new AbortController();
    try {
      const { count, max_model_len: most } = await postJson("tokenize", body, this.counting.signal);
      show(`${count.toLocaleString("en")} of ${most.toLocaleString("en")} tokens`);
    } catch {
      if (!this.counting.signal.aborted) show(""); // it is a courtesy; sending tells what is wrong
    }
  }
}

/** Tell whether a text is a control token to the model: then it cannot be sent as text. */
async function isControlToken(text) {
  if (!CONTROL_TOKEN.test(text)) return false;
  const ask = (special) =>
    postJson("tokenize", { prompt: text, add_special_tokens: false, parse_special: special });
  const [parsed, plain] = await Promise.all([ask(true), ask(false)]);
  return parsed.tokens.join() !== plain.tokens.join();
}

new Playground();
