/** The `openai` SDK of Node.js, with zod. */

const assert = require("node:assert/strict");
const { OpenAI } = require("openai");
const { zodFunction, zodResponseFormat } = require("openai/helpers/zod");
const { z } = require("zod");

const [url, model, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });

const Person = z
  .object({
    name: z.string().max(16),
    age: z.number().int().min(0).max(120),
    likes: z.array(z.enum(["tea", "coffee", "water"])).max(3),
  })
  .strict();
const Weather = z
  .object({
    city: z.string().max(16),
    unit: z.enum(["celsius", "fahrenheit"]),
    days: z.number().int().min(1).max(7),
  })
  .strict();

const hello = [{ role: "user", content: "Tell of a llama." }];
const aboutMara = [{ role: "user", content: "Mara is 34 and likes tea. Who is she?" }];
const aboutLima = [{ role: "user", content: "What will the weather be in Lima for two days?" }];
const short = { model, messages: hello, max_completion_tokens: 16, temperature: 0 };
const long = { model, max_completion_tokens: 400, temperature: 0 };
const weatherTool = zodFunction({ name: "get_weather", parameters: Weather });
const named = { type: "function", function: { name: "get_weather" } };

const checks = {
  "models are listed": async () => {
    const names = [];
    for await (const card of client.models.list()) names.push(card.id);
    assert.ok(names.includes(model));
  },
  "completion: streamed as whole": async () => {
    const fields = { model, prompt: "Once upon a time", max_tokens: 16, temperature: 0 };
    const whole = await client.completions.create(fields);
    let text = "";
    for await (const chunk of await client.completions.create({ ...fields, stream: true }))
      text += chunk.choices[0].text;
    assert.equal(text, whole.choices[0].text);
  },
  "chat: streamed as whole, with usage": async () => {
    const whole = await client.chat.completions.create(short);
    const stream = await client.chat.completions.create({
      ...short,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },
  "chat: the streaming helper": async () => {
    const whole = await client.chat.completions.create(short);
    const stream = client.chat.completions.stream(short);
    assert.equal(await stream.finalContent(), whole.choices[0].message.content);
  },
  ".parse() with zod": async () => {
    const response_format = zodResponseFormat(Person, "person");
    const fields = { ...long, messages: aboutMara, response_format };
    const answer = await client.chat.completions.parse(fields);
    Person.parse(answer.choices[0].message.parsed);
    const streamed = await client.chat.completions.stream(fields).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, answer.choices[0].message.parsed);
  },
  "tools: a forced call, streamed as whole": async () => {
    const fields = { ...long, messages: aboutLima, tools: [weatherTool], tool_choice: named };
    const whole = await client.chat.completions.parse(fields);
    const [call] = whole.choices[0].message.tool_calls;
    Weather.parse(call.function.parsed_arguments);
    let pieces = "";
    const stream = client.chat.completions.stream(fields);
    stream.on("tool_calls.function.arguments.delta", (event) => (pieces += event.arguments_delta));
    const final = await stream.finalChatCompletion();
    assert.equal(pieces, call.function.arguments);
    assert.equal(final.choices[0].message.tool_calls[0].function.arguments, pieces);
  },
  "tools: runTools calls and goes back": async () => {
    const called = [];
    const tool = {
      type: "function",
      function: {
        name: "get_weather",
        description: "Tell the weather in a city.",
        parameters: weatherTool.function.parameters,
        parse: (text) => Weather.parse(JSON.parse(text)),
        function: (asked) => {
          called.push(asked);
          return "21 degrees";
        },
      },
    };
    const fields = { ...long, messages: aboutLima, tools: [tool], tool_choice: named };
    const runner = client.chat.completions.runTools(fields, { maxChatCompletions: 2 });
    await runner.done();
    assert.equal(called.length, 1);
  },
  "tools: a result goes back": async () => {
    const fields = { ...long, messages: aboutLima, tools: [weatherTool] };
    const first = await client.chat.completions.create({ ...fields, tool_choice: named });
    const { message } = first.choices[0];
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "21 degrees" };
    const answer = await client.chat.completions.create({
      ...fields,
      messages: [...aboutLima, message, result],
      tool_choice: "none",
      max_completion_tokens: 8,
    });
    assert.equal(typeof answer.choices[0].message.content, "string");
  },
  "errors have the SDK's classes": async () => {
    await assert.rejects(client.chat.completions.create({ ...short, temperature: 3 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "temperature");
      assert.ok(error.requestID);
      return true;
    });
    const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(
      (async () => stranger.models.list())(),
      (error) => error instanceof OpenAI.AuthenticationError,
    );
  },
  "a stream that is aborted frees the engine": async () => {
    const stream = await client.chat.completions.create({
      ...short,
      max_completion_tokens: 1500,
      stream: true,
      ignore_eos: true,
    });
    for await (const _ of stream) break;
    stream.controller.abort();
    const deadline = Date.now() + 30_000;
    for (;;) {
      const engine = await client.get("/engine");
      if (!engine.num_requests_running && !engine.num_requests_waiting) return;
      assert.ok(Date.now() < deadline, "still running");
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  },
  "withResponse: request id and timing": async () => {
    const { data, response, request_id } = await client.chat.completions
      .create(short, { headers: { "x-request-id": "of-node" } })
      .withResponse();
    assert.equal(request_id, "of-node");
    assert.ok(response.headers.get("server-timing"));
    assert.equal(data._request_id, "of-node");
  },
};

(async () => {
  for (const [check, body] of Object.entries(checks)) {
    let reason = null;
    try {
      await body();
    } catch (error) {
      console.error(error);
      reason = `${error.name}: ${error.message}`;
    }
    console.log(JSON.stringify({ check, reason }));
  }
})();
