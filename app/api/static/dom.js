/** Building elements and nothing else: no markup is ever made from text. */

/** Return an element; `props` are properties, `on…` listeners, or attributes where a name has "-". */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** Return the element with this id; the page is ours, so it is there. */
export const byId = (id) => document.getElementById(id);

/** Tell those who listen instead of looking. The same words again are said again. */
export function say(words) {
  const region = byId("status");
  region.textContent = region.textContent === words ? `${words}\u00a0` : words;
}

export const percent = (probability) => {
  const share = probability * 100;
  if (share > 0 && share < 0.01) return "< 0.01 %";
  return `${share.toFixed(share >= 99.95 || share < 0.1 ? 2 : 1)} %`;
};

/** Spell out what cannot be seen: spaces at the ends, line ends, odd characters, nothing at all. */
export function visible(text) {
  if (text === "") return "(nothing)";
  return text
    .replaceAll("\n", "↵")
    .replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length))
    .replace(
      /[^\S ]|\p{C}/gu,
      (odd) => `U+${odd.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`,
    );
}

/** The same for ears. */
export function spoken(text) {
  const words = text.replaceAll("\n", " line end ").replaceAll("\t", " tab ").trim();
  return words || (text ? "space" : "nothing");
}
