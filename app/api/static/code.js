/** The request on the page as a command or a program that does the same. */

import { urlOf } from "./api.js";

const OPENAI_FIELDS = new Set(
  (
    "model messages prompt max_tokens temperature top_p presence_penalty frequency_penalty seed " +
    "stop logit_bias logprobs top_logprobs stream stream_options response_format tools " +
    "tool_choice n"
  ).split(" "),
);

export function asCurl(path, body, needsKey) {
  const lines = [
    `curl ${body.stream ? "-N " : ""}${urlOf(path)}`,
    "-H 'Content-Type: application/json'",
    ...(needsKey ? ['-H "Authorization: Bearer $ARRIERO_API_KEY"'] : []),
    `-d ${shellQuoted(JSON.stringify(body, null, 2))}`,
  ];
  return lines.join(" \\\n  ");
}

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asPython(path, body, needsKey) {
  const isChat = path.includes("chat");
  const entries = Object.entries(body);
  const own = entries.filter(([name]) => OPENAI_FIELDS.has(name));
  const extra = entries.filter(([name]) => !OPENAI_FIELDS.has(name));
  const args = own.map(([name, value]) => `    ${name}=${python(value, 1)},`);
  if (extra.length) args.push(`    extra_body=${python(Object.fromEntries(extra), 1)},`);
  const piece = isChat ? "choice.delta.content" : "choice.text";
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `key = ${needsKey ? 'os.environ["ARRIERO_API_KEY"]' : '"none"'}`,
    `client = OpenAI(base_url=${JSON.stringify(urlOf("v1"))}, api_key=key)`,
    `stream = client.${isChat ? "chat." : ""}completions.create(`,
    ...args,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    `        print(${piece} or "", end="", flush=True)`,
    "",
  ].join("\n");
}

/** Spell a JSON value in Python; JSON's strings are Python's. */
function python(value, depth) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList
    ? value.map((item) => python(item, depth + 1))
    : Object.entries(value).map(
        ([name, item]) => `${JSON.stringify(name)}: ${python(item, depth + 1)}`,
      );
  const [open, close] = isList ? "[]" : "{}";
  const flat = `${open}${items.join(", ")}${close}`;
  if (flat.length + depth * 4 < 72 && !flat.includes("\n")) return flat;
  const indent = "    ".repeat(depth + 1);
  return `${open}\n${items.map((item) => `${indent}${item},\n`).join("")}${"    ".repeat(depth)}${close}`;
}
