/**
 * An answer: the tokens that the model chose, what else it weighed, and the text they make.
 *
 * A unit is what can be shown and taken back: one token, or the few that only together are a
 * character. Knows nothing of the page.
 */

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });
const LONGEST_CHARACTER = 4; // bytes of UTF-8

export class Answer {
  /** Begin with units kept of another answer, and with their text. */
  constructor(units = [], text = "") {
    this.units = [...units];
    this.text = text;
    this.numKept = units.length;
    this.finish = null; // stop, length, tool_calls, user, chosen, error
    this.stopString = null;
    this.reasoning = "";
    this.toolCalls = [];
    this.results = null; // of the tools, once given
    this.usage = null;
    this.failure = null;
    this.startedMs = performance.now();
    this.firstMs = null;
    this.endedMs = null;
    this.pending = [];
  }

  /** Take one event's choice, of a chat or of a completion; return the units it completes. */
  take(choice) {
    const delta = choice.delta;
    this.text += (delta ? delta.content : choice.text) ?? "";
    this.reasoning += delta?.reasoning_content ?? "";
    this.#takeToolCalls(delta?.tool_calls ?? []);
    if (choice.finish_reason) this.finish = choice.finish_reason;
    if (typeof choice.stop_reason === "string") this.stopString = choice.stop_reason;
    const tokens = delta ? chatTokens(choice.logprobs) : legacyTokens(choice.logprobs);
    if (this.firstMs === null && (tokens.length || delta?.content || choice.text)) {
      this.firstMs = performance.now();
    }
    const added = [];
    for (const token of tokens) {
      this.pending.push(token);
      const unit = unitOf(this.pending);
      if (unit) added.push(unit);
      if (unit) this.pending = [];
    }
    this.units.push(...added);
    return added;
  }

  /** Say that nothing more comes, and find out which units are part of the text. */
  end(finish = this.finish) {
    this.finish = finish;
    this.endedMs = performance.now();
    if (this.pending.length) this.units.push(unitOf(this.pending, true));
    this.pending = [];
    let place = 0;
    let numToSkip = this.#numBeforeText();
    for (const unit of this.units) {
      const left = numToSkip > 0 ? "" : this.text.slice(place);
      numToSkip -= unit.text.length;
      if (left.startsWith(unit.text)) unit.kept = unit.text;
      else unit.kept = left && unit.text.startsWith(left) ? left : ""; // cut by a stop string
      // Neither a template nor a server takes half of these back.
      unit.isFixed = unit.kept === "" && this.hasHidden;
      place += unit.kept.length;
    }
  }

  /** True if the tokens say more than the text: reasoning, or calls of tools. */
  get hasHidden() {
    return this.reasoning !== "" || this.toolCalls.length > 0;
  }

  /** Return the units of the text before a place, as they stand in it. */
  keptBefore(place = this.units.length) {
    const kept = this.units.slice(0, place).filter((unit) => unit.kept);
    return kept.map((unit) => ({ ...unit, text: unit.kept }));
  }

  /** Count the characters of tokens that come before the text: reasoning is said first. */
  #numBeforeText() {
    if (!this.hasHidden) return 0;
    const said = this.units.map((unit) => unit.text).join("");
    return Math.max(0, this.text ? said.lastIndexOf(this.text) : said.length);
  }

  get numNew() {
    return this.usage?.completion_tokens ?? this.units.length - this.numKept;
  }

  #takeToolCalls(parts) {
    for (const part of parts) {
      const call = (this.toolCalls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
      call.id ||= part.id ?? "";
      call.name += part.function?.name ?? "";
      call.arguments += part.function?.arguments ?? "";
    }
  }
}

/** Return the unit that a person chose instead of another: the same alternatives, another pick. */
export function pickedUnit(unit, alternative) {
  return {
    ...unit,
    text: alternative.text,
    kept: alternative.text,
    logprob: alternative.logprob,
    numTokens: 1,
    isPicked: true,
  };
}

/** Make a unit of tokens if their bytes are text; `isLast` takes what there is. */
function unitOf(tokens, isLast = false) {
  const bytes = tokens.flatMap((token) => token.bytes);
  const exact = decode(bytes);
  if (exact === null && !isLast && bytes.length < LONGEST_CHARACTER) return null;
  return {
    text: exact ?? lenient.decode(Uint8Array.from(bytes)),
    logprob: tokens.reduce((sum, token) => sum + token.logprob, 0),
    numTokens: tokens.length,
    alternatives: tokens[0].alternatives,
    isPicked: false,
  };
}

function decode(bytes) {
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return null; // part of a character
  }
}

function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((entry) => withAlternatives(entry, entry.top_logprobs));
}

function legacyTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((token, at) => {
    const top = Object.entries(logprobs.top_logprobs?.[at] ?? {});
    return withAlternatives(
      { bytes: legacyBytes(token), logprob: logprobs.token_logprobs[at] ?? 0 },
      top.map(([text, logprob]) => ({ bytes: legacyBytes(text), logprob })),
    );
  });
}

/** Bytes that are no text come as "bytes:\xe2\x80". */
function legacyBytes(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return [...new TextEncoder().encode(token)];
  return [...token.matchAll(/\\x(..)/g)].map((match) => parseInt(match[1], 16));
}

function withAlternatives({ bytes, logprob }, top) {
  const same = (other) => other.bytes.join() === bytes.join();
  const all = top.some(same) ? top : [...top, { bytes, logprob }];
  const alternatives = all
    .map((other) => ({
      text: decode(other.bytes),
      label: decode(other.bytes) ?? other.bytes.map((byte) => `\\x${byte.toString(16)}`).join(""),
      logprob: other.logprob,
      isChosen: same(other),
    }))
    .sort((one, other) => other.logprob - one.logprob);
  return { bytes, logprob, alternatives };
}
