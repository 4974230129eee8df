/** The two dialogs: the one that asks for a key, the one that shows the request as code. */

import { hasKey, keepKey } from "./api.js";
import { asCurl, asPython } from "./code.js";
import { byId, say } from "./dom.js";

export class KeyDialog {
  constructor() {
    this.node = byId("key-dialog");
    byId("key-cancel").addEventListener("click", () => this.node.close(""));
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      keepKey(byId("key").value.trim());
      this.node.close("given");
    });
  }

  /** Ask for the key, because of a refusal if there was one; return whether one was given. */
  ask(failure = null) {
    if (this.node.open) return Promise.resolve(false);
    const why = failure?.message ?? "Needed only where the server was started with one.";
    const wasWrong = failure && hasKey();
    byId("key-why").textContent = wasWrong ? "This key was not accepted. Try another." : why;
    byId("key").value = "";
    this.node.returnValue = "";
    this.node.showModal();
    return new Promise((resolve) => {
      const tell = () => resolve(this.node.returnValue === "given");
      this.node.addEventListener("close", tell, { once: true });
    });
  }
}

export class CodeDialog {
  constructor() {
    this.request = null;
    byId("code-close").addEventListener("click", () => byId("code-dialog").close());
    byId("code-copy").addEventListener("click", () => this.#copy());
    for (const radio of document.querySelectorAll("[name=language]")) {
      radio.addEventListener("change", () => this.#fill());
    }
  }

  open(path, body) {
    this.request = [path, body];
    this.#fill();
    byId("code-dialog").showModal();
  }

  #fill() {
    const language = document.querySelector("[name=language]:checked").value;
    const spell = language === "python" ? asPython : asCurl;
    byId("code").value = spell(...this.request, hasKey());
    byId("code-note").textContent = hasKey() ? "The key is taken from ARRIERO_API_KEY." : "";
  }

  async #copy() {
    const code = byId("code");
    const note = byId("code-note");
    try {
      await navigator.clipboard.writeText(code.value);
      note.textContent = "Copied.";
    } catch {
      code.select(); // no clipboard outside a secure context
      note.textContent = "Selected: press Ctrl+C.";
    }
    say(note.textContent);
  }
}
