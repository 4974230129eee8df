/** The playground as a person meets it: each test is a page of its own on one server. */

const assert = require("node:assert/strict");
const { execFileSync } = require("node:child_process");
const fs = require("node:fs");
const path = require("node:path");
const { after, afterEach, before, test } = require("node:test");
const { chromium } = require("playwright-core");
const { Server } = require("./server.cjs");

const AXE = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const DESK = { width: 1280, height: 860 };
const PHONE = { width: 360, height: 740 };
const KEY = "clé secret";

let server;
let browser;
let contexts = [];

before(async () => {
  server = await Server.start();
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
});
after(async () => {
  await browser?.close();
  await server?.kill();
});
afterEach(async () => {
  for (const context of contexts) await context.close();
  contexts = [];
});

/** Open the page; faults of scripts and breaches of the policy make the test fail at `check`. */
async function open({ viewport = DESK, url = server.url, ...options } = {}) {
  const context = await browser.newContext({ viewport, ...options });
  contexts.push(context);
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  page.faults = [];
  page.on("pageerror", (error) => page.faults.push(String(error)));
  page.on("console", (message) => {
    if (/Content.Security.Policy/i.test(message.text())) page.faults.push(message.text());
  });
  await page.goto(url);
  return page;
}

async function set(page, fields) {
  for (const [name, value] of Object.entries(fields)) {
    const input = page.locator(`#field-${name}`);
    await input.evaluate((node) => (node.closest("details").open = true));
    await input.fill(value);
  }
}

async function ask(page, text, fields = { temperature: "0", max_tokens: "24" }) {
  await set(page, fields);
  await page.fill("#prompt", text);
  await page.click("#send");
}

const isOver = (page) => page.waitForSelector("#send", { state: "visible" });
const tokens = (page) => page.locator(".thread:not([hidden]) .tokens .token");
const shown = async (page) => (await tokens(page).allTextContents()).join("");
const picture = (page, name) =>
  page.screenshot({ path: path.join(process.env.ARRIERO_SCREENSHOTS, `${name}.png`) });

const ended = (reason) => ({ delta: {}, finish_reason: reason });

/** One token of a stream written here, beside the text that it makes. */
function said(delta, bytes, token = String.fromCharCode(...bytes)) {
  const entry = { token, logprob: -0.5, bytes };
  const other = { token: "a", logprob: -2, bytes: [97] };
  return { delta, logprobs: { content: [{ ...entry, top_logprobs: [entry, other] }] } };
}

/** Answer chats with choices written here, a list for each request; return the bodies seen. */
async function answerWith(page, answers) {
  const bodies = [];
  await page.route("**/v1/chat/completions", async (route) => {
    const choices = answers[bodies.length];
    bodies.push(route.request().postDataJSON());
    const events = choices.map((choice) => JSON.stringify({ choices: [{ index: 0, ...choice }] }));
    const body = [...events, "[DONE]"].map((event) => `data: ${event}\n\n`).join("");
    await route.fulfill({ contentType: "text/event-stream", body });
  });
  return bodies;
}

/** Fail on what axe-core finds serious, or on a fault of the page itself. */
async function check(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => window.axe.run());
  const serious = violations.filter((found) => ["serious", "critical"].includes(found.impact));
  const told = serious.map(
    ({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" | ")}`,
  );
  const others = violations.filter((found) => !serious.includes(found)).map(({ id }) => id);
  if (others.length) console.log(`axe-core, not serious: ${others.join(", ")}`);
  assert.deepEqual(told, []);
  assert.deepEqual(page.faults, []);
}

test("an answer is streamed, counted and coloured by probability", async () => {
  const page = await open();
  await picture(page, "empty");
  await check(page);
  await ask(page, "Where is the Eiffel Tower?");
  await page.waitForSelector(".tokens .token");
  await isOver(page);
  assert.match(await shown(page), /Paris/);
  assert.match(await page.textContent(".foot"), /\d+ tokens .* first after/);
  await page.waitForFunction(() =>
    /\d+ of [\d,]+ tokens/.test(document.getElementById("count").textContent),
  );
  assert.match(await page.textContent("#status"), /The answer is there/);
  assert.ok((await page.locator(".tokens .band-0").count()) > 0);
  await check(page);
  await picture(page, "chat");
});

test("a token shows its alternatives and the answer is written anew from one of them", async () => {
  const page = await open();
  await ask(page, "Where is the Eiffel Tower?");
  await isOver(page);
  const texts = await tokens(page).allTextContents();
  const place = 3;
  await tokens(page).nth(place).hover();
  await page.waitForSelector("#alternatives:not([hidden])");
  await picture(page, "alternatives");
  await check(page);
  const other = page.locator("#alternatives li button:not(.chosen):not([aria-disabled])").first();
  const picked = (await other.locator("code").textContent())
    .replaceAll("␣", " ")
    .replaceAll("↵", "\n");
  await other.click();
  await page.waitForSelector(".token.picked");
  await isOver(page);
  const now = await tokens(page).allTextContents();
  assert.deepEqual(now.slice(0, place), texts.slice(0, place));
  assert.equal(now[place], picked);
  assert.notEqual(now.join(""), texts.join(""));
  assert.match(await page.textContent(".versions"), /2 of 2/);
  await picture(page, "regenerated");
  await page.click("[aria-label='Version before']");
  assert.equal(await shown(page), texts.join(""));
  await check(page);
});

test("the end of an answer is a token too, and can be chosen", async () => {
  const page = await open();
  await page.locator("#field-skip_special_tokens").evaluate((node) => node.click());
  await ask(page, "Say hello.", { temperature: "0", max_tokens: "200" });
  await page.waitForSelector(".foot .hint");
  const last = tokens(page).last();
  assert.equal(await last.textContent(), "<|im_end|>");
  assert.match(await last.getAttribute("class"), /outside/);
  await picture(page, "end");
  await last.click();
  await page.locator("#alternatives .chosen").click();
  await page.waitForSelector(".versions");
  assert.match(await page.textContent(".foot"), /ended where you chose/);
  await check(page);
});

test("keys alone reach a token, its alternatives and the way back", async () => {
  const page = await open();
  await page.fill("#field-max_tokens", "12");
  await page.focus("#prompt");
  await page.keyboard.type("Name three birds.");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".foot .hint");
  const focused = () => page.evaluate(() => document.activeElement.textContent);
  await tokens(page).first().focus();
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  assert.equal(await focused(), await tokens(page).nth(2).textContent());
  assert.match(await tokens(page).nth(2).getAttribute("aria-label"), / %; instead of /);
  await page.keyboard.press("Enter");
  assert.ok(await page.evaluate(() => document.activeElement.closest("#alternatives")));
  await page.keyboard.press("ArrowDown");
  await picture(page, "keyboard");
  await check(page);
  await page.keyboard.press("Escape");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".versions");
  assert.equal(await page.evaluate(() => document.activeElement.className), "turn answer");
  await tokens(page).nth(2).focus();
  await page.keyboard.press("Escape");
  assert.ok(await page.locator("#alternatives").isHidden());
  assert.equal(await focused(), await tokens(page).nth(2).textContent());
});

test("stop closes the stream, the engine is idle, and the answer goes on from there", async () => {
  const page = await open();
  await ask(page, "Tell me a long story.", { temperature: "0", max_tokens: "2000" });
  await page.waitForFunction(() => document.querySelectorAll(".tokens .token").length > 5);
  await picture(page, "streaming");
  await page.click("#stop");
  await isOver(page);
  assert.match(await page.textContent(".foot"), /stopped by you/);
  let stats = await server.engine();
  for (let tries = 0; stats.num_requests_running && tries < 40; tries += 1)
    stats = await server.engine();
  assert.equal(stats.num_requests_running, 0);
  const text = await shown(page);
  await set(page, { max_tokens: "8" });
  await page.click("text=Go on");
  await page.waitForSelector(".versions");
  await isOver(page);
  const longer = await shown(page);
  assert.ok(longer.startsWith(text) && longer.length > text.length);
});

test("a text is continued, and written anew from a token, in completion mode", async () => {
  const page = await open();
  await page.check("[value=completion]", { force: true });
  await ask(page, "Once upon a time", { temperature: "0", max_tokens: "20" });
  await page.waitForSelector(".tokens .token");
  await isOver(page);
  const texts = await tokens(page).allTextContents();
  assert.equal(texts.length, 20);
  await tokens(page).nth(4).click();
  await page.locator("#alternatives li button:not(.chosen)").first().click();
  await page.waitForSelector(".token.picked");
  await isOver(page);
  assert.deepEqual((await tokens(page).allTextContents()).slice(0, 4), texts.slice(0, 4));
  await picture(page, "completion");
  await check(page);
});

test("tokens that only together are a character are shown as one", async () => {
  const page = await open();
  const smile = [0xf0, 0x9f, 0x99, 0x82];
  await answerWith(page, [
    [
      said({ content: "Hi " }, [72, 105, 32]),
      said({}, smile.slice(0, 3), "\ufffd"),
      said({ content: "🙂" }, smile.slice(3), "\ufffd"),
      said({ content: "\n<b>" }, [10, 60, 98, 62]),
      ended("stop"),
    ],
  ]);
  await ask(page, "Smile.");
  await page.waitForSelector(".foot .hint");
  assert.deepEqual(await tokens(page).allTextContents(), ["Hi ", "🙂", "\n<b>"]);
  await tokens(page).nth(1).click();
  assert.match(await page.textContent("#alternatives"), /2 tokens make this character/);
  assert.equal(await page.locator("#alternatives li button[aria-disabled]").count(), 1);
  await check(page);
});

test("reasoning is shown apart, and only the text is taken up again", async () => {
  const page = await open();
  const bytes = (text) => [...Buffer.from(text)];
  const bodies = await answerWith(page, [
    [
      said({}, bytes("<think>")),
      said({ reasoning_content: "Yes" }, bytes("Yes")),
      said({}, bytes("</think>")),
      said({ content: "Yes" }, bytes("Yes")),
      said({ content: " sir" }, bytes(" sir")),
      ended("stop"),
    ],
    [said({ content: "!" }, bytes("!")), ended("stop")],
  ]);
  await ask(page, "Sure?");
  await page.waitForSelector(".foot .hint");
  assert.equal(await page.locator(".token.outside").count(), 3);
  assert.equal(await page.textContent(".answer details p"), "Yes");
  await tokens(page).nth(1).click();
  assert.equal(await page.locator("#alternatives button:not([aria-disabled])").count(), 0);
  await check(page);
  await tokens(page).nth(4).click();
  await page.locator("#alternatives .chosen").click();
  await page.waitForSelector(".versions");
  assert.deepEqual(bodies[1].messages.at(-1), { role: "assistant", content: "Yes sir" });
  assert.equal(bodies[1].continue_final_message, true);
  assert.equal(await shown(page), "Yes sir!");
});

test("an answer keeps to a JSON schema", async () => {
  const page = await open();
  const schema = {
    type: "object",
    properties: { city: { type: "string", maxLength: 20 } },
    required: ["city"],
    additionalProperties: false,
  };
  await ask(page, "Where is the Eiffel Tower?", {
    temperature: "0",
    max_tokens: "60",
    response_format: JSON.stringify(schema),
  });
  await page.waitForSelector(".foot .hint");
  assert.deepEqual(Object.keys(JSON.parse(await page.textContent(".answer .body .said"))), [
    "city",
  ]);
  await picture(page, "schema");
  await check(page);
});

test("a tool call is shown, and its result goes back to the model", async () => {
  const page = await open();
  const call = { index: 0, id: "call_1", function: { name: "weather", arguments: "" } };
  const rest = { index: 0, function: { arguments: '{"city":"Paris"}' } };
  // The model is too small to call tools at will, so that these answers are written here.
  const bodies = await answerWith(page, [
    [{ delta: { tool_calls: [call] } }, { delta: { tool_calls: [rest] } }, ended("tool_calls")],
    [{ delta: { content: "Sunny." } }, ended("stop")],
  ]);
  await page.locator("#field-tool_choice").evaluate((node) => (node.value = "required"));
  const tool = { type: "function", function: { name: "weather", parameters: { type: "object" } } };
  await ask(page, "Weather in Paris?", { tools: JSON.stringify([tool]) });
  await page.waitForSelector(".call");
  assert.match(await page.textContent(".call pre"), /"city": "Paris"/);
  await picture(page, "tool-call");
  await check(page);
  await page.fill(".call textarea", "22 degrees, sun");
  await page.click("text=Give the result");
  await page.waitForSelector("text=Sunny.");
  assert.deepEqual(bodies[0].tools, [tool]);
  assert.equal(bodies[0].tool_choice, "required");
  const [, said, result] = bodies[1].messages;
  assert.equal(said.tool_calls[0].function.arguments, '{"city":"Paris"}');
  assert.deepEqual(result, { role: "tool", tool_call_id: "call_1", content: "22 degrees, sun" });
});

test("what is wrong with a setting is said beside it, and nothing is sent", async () => {
  const page = await open();
  let numSent = 0;
  page.on("request", (request) => (numSent += request.url().includes("/v1/chat/")));
  await ask(page, "Hello", { response_format: "{nonsense", temperature: "9" });
  assert.match(await page.textContent("#field-temperature-fault"), /Between 0 and 2/);
  assert.match(await page.textContent("#field-response_format-fault"), /This is not JSON/);
  assert.equal(await page.getAttribute("#field-temperature", "aria-invalid"), "true");
  assert.equal(numSent, 0);
  await picture(page, "settings-wrong");
  await check(page);
});

test("a refusal is told in plain words and gives the text back", async () => {
  const page = await open();
  await ask(page, "Hello", { max_tokens: "1000000" });
  await page.waitForSelector("#failure p");
  assert.match(
    await page.textContent("#failure"),
    /too long for the model.*maximum context length/s,
  );
  assert.equal(await page.inputValue("#prompt"), "Hello");
  assert.equal(await page.locator(".turn").count(), 0);
  await picture(page, "refused");
  await check(page);
});

test("the request comes as curl and as Python", async () => {
  const page = await open();
  await set(page, { temperature: "0.5", top_k: "7", stop: "\\n\\n", max_tokens: "8" });
  await page.fill("#system", "Be brief.");
  await page.fill("#prompt", "It's me");
  await page.click("#code-open");
  const curl = await page.inputValue("#code");
  assert.match(curl, /^curl -N http:\/\/127\.0\.0\.1:\d+\/v1\/chat\/completions/);
  assert.match(curl, /It'\\''s me/);
  await picture(page, "code");
  await page.check("[value=python]", { force: true });
  const python = await page.inputValue("#code");
  assert.match(python, /extra_body=\{"top_k": 7\}/);
  const options = { encoding: "utf8", timeout: 60_000 };
  assert.match(execFileSync("bash", ["-c", curl], { ...options, stdio: "pipe" }), /data: \[DONE\]/);
  assert.match(execFileSync(".venv/bin/python", ["-c", python], options), /\w/);
  await check(page);
});

test("the engine is watched while its panel is open, and only then", async () => {
  const page = await open();
  let numAsked = 0;
  page.on("request", (request) => (numAsked += request.url().endsWith("/v1/engine")));
  await ask(page, "Tell me a long story.", { max_tokens: "400" });
  assert.equal(numAsked, 0);
  await page.click("#engine-toggle");
  await page.waitForFunction(() => Number(document.getElementById("rate").textContent) > 0);
  await page.waitForFunction(() => document.getElementById("rate-line").points.length > 2);
  assert.match(await page.textContent("#running"), /[01] of 4/);
  await picture(page, "engine");
  const end = () =>
    page.evaluate(() => document.documentElement.scrollHeight - scrollY - innerHeight);
  assert.ok((await end()) < 80, "the page follows what is written");
  const top = (id) => page.evaluate((id) => document.querySelector(id).getBoundingClientRect().top, id);
  assert.equal(await top("#engine"), 0, "and the panel stays in sight");
  const { height } = await page.locator("#engine").boundingBox();
  // Near enough: the page may have grown in between.
  assert.ok((await top("aside")) > height - 8, "above the settings, not over them");
  await check(page);
  await page.click("#engine-toggle");
  const before = numAsked;
  await page.waitForTimeout(1500);
  assert.equal(numAsked, before);
});

test("on a phone nothing is wider than the screen", async () => {
  const page = await open({ viewport: PHONE, hasTouch: true, isMobile: true });
  await ask(page, "Where is the Eiffel Tower?", {});
  await page.waitForSelector(".foot .hint");
  await picture(page, "phone");
  const width = () => page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok((await width()) <= PHONE.width);
  await tokens(page).nth(2).tap();
  await page.waitForSelector("#alternatives:not([hidden])");
  await picture(page, "phone-alternatives");
  await check(page);
  await page.click("#settings-toggle");
  await page.click("#engine-toggle");
  assert.ok((await width()) <= PHONE.width);
  await picture(page, "phone-panels");
  await check(page);
});

test("in the dark everything can be read", async () => {
  const page = await open({ colorScheme: "dark" });
  await ask(page, "Name three birds.", { temperature: "1.5", max_tokens: "60", seed: "3" });
  await page.waitForSelector(".foot .hint");
  await tokens(page).nth(4).hover();
  await page.waitForSelector("#alternatives:not([hidden])");
  await picture(page, "dark");
  await check(page);
});

test("a server that goes is missed, what came is kept, and its return is seen", async () => {
  const page = await open();
  await ask(page, "Tell me a long story.", { max_tokens: "4000" });
  await page.waitForFunction(() => document.querySelectorAll(".tokens .token").length > 3);
  await server.kill();
  await page.waitForSelector("#gone:not([hidden])");
  assert.match(await page.textContent("#failure"), /broke off/);
  assert.ok((await tokens(page).count()) > 3);
  assert.match(await page.textContent(".foot"), /broken off/);
  await picture(page, "gone");
  await check(page);
  await server.run();
  await page.waitForSelector("#gone", { state: "hidden" });
  await set(page, { max_tokens: "5" });
  await page.click("text=Go on");
  await page.waitForSelector(".versions");
  await isOver(page);
  assert.match(await page.textContent(".versions"), /2 of 2/);
});

test("a server with a key asks for it, says when it is wrong, and is then as any other", async () => {
  await server.kill();
  server = await Server.start("--api-key", KEY);
  const page = await open();
  await page.waitForSelector("#key-dialog[open]");
  await picture(page, "key");
  await check(page);
  await page.fill("#key", "wrong");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() =>
    /not accepted/.test(document.getElementById("key-why").textContent),
  );
  await page.fill("#key", KEY);
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.getElementById("model").value);
  await ask(page, "Where is the Eiffel Tower?");
  await page.waitForSelector(".foot .hint");
  assert.match(await shown(page), /Paris/);
  const kept = await page.evaluate(() => [
    sessionStorage.length,
    localStorage.length,
    document.cookie,
  ]);
  assert.deepEqual(kept, [1, 0, ""]);
  await page.click("#code-open");
  assert.match(await page.inputValue("#code"), /Bearer \$ARRIERO_API_KEY/);
  assert.doesNotMatch(await page.inputValue("#code"), /secret/);
});
