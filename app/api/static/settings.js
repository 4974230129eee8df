/** The fields of a request: what can be set, how it is written, what is wrong with it. */

import { el } from "./dom.js";

const whole = { kind: "number", step: 1 };
const part = { kind: "number", step: 0.05 };

/** Names, ranges and meanings are the API's. */
const GROUPS = [
  {
    title: "Sampling",
    isOpen: true,
    fields: [
      { name: "max_tokens", ...whole, min: 1, initial: "256" },
      { name: "temperature", ...part, min: 0, max: 2 },
      { name: "top_p", ...part, min: 0, max: 1, above: 0 },
      { name: "top_k", ...whole, min: -1, hint: "0 means all" },
      { name: "min_p", ...part, min: 0, max: 1 },
      { name: "seed", ...whole, hint: "repeats an answer" },
    ],
  },
  {
    title: "Penalties",
    fields: [
      { name: "presence_penalty", ...part, min: -2, max: 2 },
      { name: "frequency_penalty", ...part, min: -2, max: 2 },
      { name: "repetition_penalty", ...part, min: 0, max: 2, above: 0 },
    ],
  },
  {
    title: "Where it ends",
    fields: [
      { name: "stop", kind: "lines", most: 4, hint: "up to four strings, one a line" },
      { name: "stop_token_ids", kind: "ids", hint: "ids, with commas" },
      { name: "min_tokens", ...whole, min: 0 },
      { name: "ignore_eos", kind: "flag", hint: "write on past the end of text" },
      { name: "include_stop_str_in_output", kind: "flag", hint: "keep the stop string" },
    ],
  },
  {
    title: "Which tokens",
    fields: [
      { name: "logit_bias", kind: "object", hint: '{"42": -100}' },
      { name: "bad_words", kind: "lines", most: 128, hint: "one a line" },
      { name: "allowed_token_ids", kind: "ids", hint: "ids, with commas" },
      {
        name: "skip_special_tokens",
        kind: "flag",
        initial: true,
        hint: "off: the end is shown too",
      },
    ],
  },
  {
    title: "Structure",
    fields: [
      {
        name: "response_format",
        kind: "object",
        rows: 6,
        hint: "a JSON schema for the answer",
        wrap: (schema) => ({ type: "json_schema", json_schema: { name: "answer", schema } }),
      },
      {
        name: "tools",
        kind: "list",
        rows: 6,
        isChatOnly: true,
        hint: "functions the model may call",
      },
      {
        name: "tool_choice",
        kind: "choice",
        options: ["auto", "required", "none"],
        isChatOnly: true,
      },
    ],
  },
];

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

const READERS = {
  number(text, field) {
    const value = Number(text);
    if (!Number.isFinite(value)) throw new Error("a number, please");
    if (field.step === 1 && !Number.isSafeInteger(value)) throw new Error("a whole number, please");
    const isLow =
      field.above === undefined ? value < (field.min ?? -Infinity) : value <= field.above;
    if (isLow || value > (field.max ?? Infinity)) throw new Error(rangeOf(field));
    return value;
  },
  choice: (text) => text,
  lines(text, field) {
    const lines = text.split("\n").filter(Boolean).map(unescaped);
    if (lines.length > field.most) throw new Error(`at most ${field.most} lines`);
    return lines;
  },
  ids(text) {
    const ids = text.split(/[\s,]+/).filter(Boolean);
    if (!ids.every((id) => /^\d+$/.test(id))) throw new Error("token ids are whole numbers");
    return ids.map(Number);
  },
  object(text) {
    const value = parsed(text);
    if (!isObject(value)) throw new Error("a JSON object, please: { … }");
    return value;
  },
  list(text) {
    const value = parsed(text);
    if (!Array.isArray(value)) throw new Error("a JSON list, please: [ … ]");
    const isTool = (tool) => isObject(tool) && tool.type === "function" && tool.function?.name;
    if (!value.every(isTool)) {
      throw new Error('each tool is {"type": "function", "function": {"name": …}}');
    }
    return value;
  },
};

/** Let a line of a stop list say a line end. */
const unescaped = (line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t");

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`this is not JSON: ${error.message}`);
  }
}

function rangeOf({ min, max, above }) {
  if (max === undefined) return `${min} or more`;
  return above === undefined ? `between ${min} and ${max}` : `above ${above}, at most ${max}`;
}

/** The form of all fields; an empty one is not sent, so that the server's default holds. */
export class Settings {
  constructor(place) {
    this.inputs = new Map();
    for (const group of GROUPS) place.append(this.#group(group));
  }

  /** Return the body's fields, or null after pointing at the first one that is wrong. */
  read(isChat) {
    const body = {};
    let firstFault = null;
    for (const { field, input, fault } of this.inputs.values()) {
      const message = this.#readInto(body, field, input, isChat);
      fault.textContent = message;
      input.setAttribute("aria-invalid", message ? "true" : "false");
      if (message) firstFault ??= input;
    }
    if (!firstFault) return body;
    firstFault.closest("details").open = true;
    return { fault: firstFault };
  }

  #readInto(body, field, input, isChat) {
    if (field.isChatOnly && !isChat) return "";
    if (field.kind === "flag") {
      if (input.checked !== Boolean(field.initial)) body[field.name] = input.checked;
      return "";
    }
    // A number's input gives out nothing for what is no number, so ask what it holds.
    if (input.validity.badInput) return "a number, please";
    const text = field.kind === "lines" ? input.value : input.value.trim();
    if (!text) return "";
    try {
      const value = READERS[field.kind](text, field);
      body[field.name] = field.wrap ? field.wrap(value) : value;
      return "";
    } catch (error) {
      return `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
    }
  }

  #group({ title, isOpen, fields }) {
    const rows = fields.map((field) => this.#row(field));
    return el(
      "details",
      { className: "group", open: Boolean(isOpen) },
      el("summary", {}, title),
      ...rows,
    );
  }

  #row(field) {
    const id = `field-${field.name}`;
    const input = inputOf(field, id);
    const fault = el("p", { className: "fault", id: `${id}-fault` });
    const hints = field.hint
      ? [el("span", { className: "hint", id: `${id}-hint` }, field.hint)]
      : [];
    input.setAttribute("aria-describedby", `${hints.length ? `${id}-hint ` : ""}${id}-fault`);
    input.addEventListener("change", () => {
      fault.textContent = this.#readInto({}, field, input, true);
      input.setAttribute("aria-invalid", fault.textContent ? "true" : "false");
    });
    this.inputs.set(field.name, { field, input, fault });
    const label = el("label", { htmlFor: id }, el("code", {}, field.name));
    const isWide = !["flag", "number", "choice"].includes(field.kind);
    return el(
      "div",
      { className: `field ${isWide ? "wide" : field.kind}` },
      label,
      ...hints,
      input,
      fault,
    );
  }
}

function inputOf(field, id) {
  if (field.kind === "flag")
    return el("input", { id, type: "checkbox", checked: Boolean(field.initial) });
  if (field.kind === "number") {
    const { min, max, step, initial = "" } = field;
    const limits = { ...(min !== undefined && { min }), ...(max !== undefined && { max }) };
    return el("input", {
      id,
      type: "number",
      step: step === 1 ? 1 : "any",
      placeholder: "default",
      value: initial,
      ...limits,
    });
  }
  if (field.kind === "choice") {
    const options = field.options.map((name) => el("option", {}, name));
    return el("select", { id }, el("option", { value: "" }, "default"), ...options);
  }
  if (field.kind === "ids")
    return el("input", { id, type: "text", spellcheck: false, autocomplete: "off" });
  return el("textarea", { id, rows: field.rows ?? 2, spellcheck: false });
}
