"""The `openai` SDK, of any major from 2 on."""

import asyncio
import json
import threading

import openai
from report import Target, expect, raised, run
from shapes import ASK_PERSON, ASK_WEATHER, MAX_TOKENS, Person, Weather

HELLO = [{"role": "user", "content": "Tell of a llama."}]
PERSON = [{"role": "user", "content": ASK_PERSON}]
WEATHER = [{"role": "user", "content": ASK_WEATHER}]
NAMED = {"type": "function", "function": {"name": "Weather"}}
PATIENCE_S = 30


def client_of(target: Target, **options) -> openai.OpenAI:
    options.setdefault("max_retries", 0)
    return openai.OpenAI(base_url=target.base_url, api_key=target.key, **options)


def counting(target: Target, *, on_response=lambda response: None, **options):
    """Return a client and the statuses of what it has been answered."""
    statuses = []

    def note(response):
        statuses.append(response.status_code)
        on_response(response)

    http = openai.DefaultHttpxClient(event_hooks={"response": [note]})
    return client_of(target, http_client=http, **options), statuses


def models(target):
    """models are listed and found."""
    client = client_of(target)
    expect(target.model in [model.id for model in client.models.list()])
    expect(client.models.retrieve(target.model).id == target.model)


def completion(target):
    """completion: streamed as whole, with usage."""
    client = client_of(target)
    fields = {"model": target.model, "prompt": "Once upon a time", "max_tokens": 24}
    whole = client.completions.create(**fields, temperature=0)
    chunks = list(
        client.completions.create(
            **fields, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    expect(text == whole.choices[0].text, (text, whole.choices[0].text))
    expect(chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0, chunks[-1])
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    expect(reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1]), reasons)


def completion_of_ids(target):
    """completion: several prompts and token ids, n, logprobs, echo."""
    client = client_of(target)
    answer = client.completions.create(
        model=target.model, prompt=["Hello", "Good day"], n=2, max_tokens=4, logprobs=2, seed=1
    )
    expect([choice.index for choice in answer.choices] == [0, 1, 2, 3])
    expect(all(len(c.logprobs.tokens) == len(c.logprobs.top_logprobs) for c in answer.choices))
    ids = client.completions.create(model=target.model, prompt=[5, 6, 7], max_tokens=2, echo=True)
    expect(ids.usage.prompt_tokens == 3, ids.usage)


def chat(target):
    """chat: streamed as whole, with usage and logprobs."""
    client = client_of(target)
    fields = {
        "model": target.model,
        "messages": HELLO,
        "max_completion_tokens": 24,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**fields)
    message = whole.choices[0].message
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    expect(text == message.content, (text, message.content))
    expect(message.role == "assistant" and message.refusal is None and message.tool_calls is None)
    entries = [e for c in chunks if c.choices for e in (c.choices[0].logprobs or _NONE).content]
    expect([e.token for e in entries] == [e.token for e in whole.choices[0].logprobs.content])
    expect(chunks[-1].usage.total_tokens == whole.usage.total_tokens, chunks[-1].usage)


class _NONE:
    content = ()


def final_of(stream):
    """Return the final completion, also of an answer cut by length, for which the helper raises."""
    try:
        return stream.get_final_completion()
    except openai.LengthFinishReasonError as error:
        return error.completion


def chat_helper(target):
    """chat: the streaming helper's text and final completion."""
    client = client_of(target)
    fields = {"model": target.model, "messages": HELLO, "max_completion_tokens": 16}
    whole = client.chat.completions.create(**fields, temperature=0)
    with client.chat.completions.stream(**fields, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = final_of(stream)
    expect("".join(pieces) == final.choices[0].message.content == whole.choices[0].message.content)


def parse(target):
    """.parse() with a pydantic schema."""
    answer = client_of(target).chat.completions.parse(
        model=target.model,
        messages=PERSON,
        response_format=Person,
        max_completion_tokens=MAX_TOKENS,
        temperature=0,
    )
    expect(isinstance(answer.choices[0].message.parsed, Person), answer)
    expect(answer.choices[0].finish_reason == "stop", answer)


def parse_sampled(target):
    """.parse() of three sampled answers."""
    answer = client_of(target).chat.completions.parse(
        model=target.model,
        messages=PERSON,
        response_format=Person,
        max_completion_tokens=MAX_TOKENS,
        n=3,
        seed=11,
    )
    expect(all(isinstance(c.message.parsed, Person) for c in answer.choices), answer)


def parse_streamed(target):
    """the streaming helper with a pydantic schema."""
    client = client_of(target)
    with client.chat.completions.stream(
        model=target.model,
        messages=PERSON,
        response_format=Person,
        max_completion_tokens=MAX_TOKENS,
        temperature=0,
    ) as stream:
        for event in stream:
            expect(event.type != "error", event)
        final = stream.get_final_completion()
    expect(isinstance(final.choices[0].message.parsed, Person), final)


def cut_short(target):
    """.parse() of an answer cut by length says so."""
    raised(
        openai.LengthFinishReasonError,
        lambda: client_of(target).chat.completions.parse(
            model=target.model, messages=PERSON, response_format=Person, max_completion_tokens=3
        ),
    )


def json_object(target):
    """response_format json_object is JSON, or cut by length."""
    choice = (
        client_of(target)
        .chat.completions.create(
            model=target.model,
            messages=[{"role": "user", "content": "Answer in JSON: who is Mara?"}],
            response_format={"type": "json_object"},
            max_completion_tokens=64,
            seed=2,
        )
        .choices[0]
    )
    expect(choice.message.content.startswith("{"), choice)
    if choice.finish_reason == "stop":
        expect(isinstance(json.loads(choice.message.content), dict), choice)


def weather_calls(target, **fields):
    return {
        "model": target.model,
        "messages": WEATHER,
        "max_completion_tokens": MAX_TOKENS,
        "temperature": 0,
        "tools": [openai.pydantic_function_tool(Weather)],
        **fields,
    }


def forced_call(target):
    """tools: named and required calls satisfy the schema, strict or not."""
    client = client_of(target)
    tool = openai.pydantic_function_tool(Weather)
    loose = {"type": "function", "function": {**tool["function"], "strict": False}}
    for choice in (NAMED, "required"):
        for one in (tool, loose):
            fields = weather_calls(
                target, tools=[one], tool_choice=choice, parallel_tool_calls=False
            )
            answer = client.chat.completions.create(**fields).choices[0]
            (call,) = answer.message.tool_calls
            expect(call.function.name == "Weather" and call.id and call.type == "function", call)
            Weather.model_validate_json(call.function.arguments)
            expect(answer.finish_reason in ("tool_calls", "stop"), answer)


def parsed_call(target):
    """tools: .parse() gives the arguments as pydantic objects."""
    answer = client_of(target).chat.completions.parse(**weather_calls(target, tool_choice=NAMED))
    (call,) = answer.choices[0].message.tool_calls
    expect(isinstance(call.function.parsed_arguments, Weather), call)


def streamed_call(target):
    """tools: the streaming helper's deltas are the final call's arguments, as when whole."""
    client = client_of(target)
    fields = weather_calls(target, tool_choice=NAMED)
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls[0]
    pieces, done = [], []
    with client.chat.completions.stream(**fields) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
            if event.type == "tool_calls.function.arguments.done":
                done.append(event)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    expect("".join(pieces) == call.function.arguments == whole.function.arguments, pieces)
    expect(len(done) == 1 and isinstance(done[0].parsed_arguments, Weather), done)
    expect(isinstance(call.function.parsed_arguments, Weather), call)
    expect(len(pieces) > 3, "arguments came in one piece")


def free_call(target):
    """tools: tool_choice auto and none answer, streamed as whole."""
    client = client_of(target)
    for choice in ("auto", "none"):
        fields = weather_calls(target, tool_choice=choice, max_completion_tokens=40)
        whole = client.chat.completions.create(**fields).choices[0]
        with client.chat.completions.stream(**fields) as stream:
            final = final_of(stream)
        message = final.choices[0].message
        expect((message.content or "") == (whole.message.content or ""), (message, whole))
        expect(len(message.tool_calls or ()) == len(whole.message.tool_calls or ()))
        expect(choice == "auto" or not whole.message.tool_calls, whole)


def round_trip(target):
    """tools: the call and its result go back and are answered."""
    client = client_of(target)
    fields = weather_calls(target, tool_choice=NAMED)
    message = client.chat.completions.create(**fields).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    for assistant in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        answer = client.chat.completions.create(
            model=target.model,
            messages=[*WEATHER, assistant, result],
            tools=fields["tools"],
            tool_choice="none",
            max_completion_tokens=8,
        )
        expect(answer.choices[0].message.content is not None, answer)


def raw_response(target):
    """with_raw_response: request id in and out, server-timing."""
    client = client_of(target)
    raw = client.chat.completions.with_raw_response.create(
        model=target.model,
        messages=HELLO,
        max_completion_tokens=2,
        extra_headers={"x-request-id": "of-my-own-1"},
    )
    expect(raw.headers["x-request-id"] == "of-my-own-1" == raw.request_id, raw.headers)
    expect("server-timing" in raw.headers, raw.headers)
    expect(raw.parse().choices[0].message.role == "assistant")
    with client.chat.completions.with_streaming_response.create(
        model=target.model, messages=HELLO, max_completion_tokens=2, stream=True
    ) as streamed:
        expect(streamed.headers["content-type"].startswith("text/event-stream"), streamed.headers)
        expect(streamed.headers["x-request-id"], streamed.headers)
        expect(sum(1 for line in streamed.iter_lines() if line) > 2)


def errors(target):
    """errors have the SDK's classes, with message, param and code."""
    client = client_of(target)

    def chat_with(**fields):
        fields = {"model": target.model, "messages": HELLO, **fields}
        return lambda: client.chat.completions.create(**fields)

    bad = raised(openai.BadRequestError, chat_with(temperature=3))
    expect(bad.param == "temperature" and bad.type == "invalid_request_error", bad)
    expect(bad.request_id, bad)
    long = raised(openai.BadRequestError, chat_with(max_completion_tokens=10**6))
    expect(long.code == "context_length_exceeded", long)
    missing = raised(openai.NotFoundError, chat_with(model="nobody"))
    expect(missing.code == "model_not_found", missing)
    stranger = client.with_options(api_key="wrong")
    raised(openai.AuthenticationError, stranger.models.list)
    bad = raised(openai.BadRequestError, chat_with(temperature=3, stream=True))
    expect(bad.param == "temperature", bad)


def not_retried(target):
    """retries: x-should-retry false keeps a 504 from being asked again."""
    client, statuses = counting(target, max_retries=2)
    error = raised(
        openai.InternalServerError,
        lambda: client.completions.create(
            model=target.model,
            prompt="Hello",
            max_tokens=400,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-timeout": "0.001"},
        ),
    )
    expect(statuses == [504], statuses)
    expect(error.code == "deadline_exceeded", error)


def retried(target):
    """retries: a 503 of a full queue is asked again, and answered when there is room."""
    other = client_of(target)
    flood = []

    def end_flood(response):
        if response.status_code == 503:
            expect(response.headers["x-should-retry"] == "true", response.headers)
            expect(response.headers["retry-after-ms"], response.headers)
            while flood:
                flood.pop().close()

    for _ in range(8):  # the queue takes 1024 sequences
        stream = other.completions.create(
            model=target.model,
            prompt="Hello",
            n=128,
            max_tokens=400,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        flood.append(stream)
    client, statuses = counting(target, max_retries=5, on_response=end_flood)
    try:
        raw = client.completions.with_raw_response.create(
            model=target.model, prompt="Hello", n=32, max_tokens=1
        )
    finally:
        while flood:
            flood.pop().close()
    expect(statuses[0] == 503 and statuses[-1] == 200, statuses)
    expect(raw.retries_taken == len(statuses) - 1, (raw.retries_taken, statuses))


def is_idle(client) -> bool:
    """Say whether nothing runs and nothing waits, as soon as that is so."""
    pause = threading.Event()
    for _ in range(PATIENCE_S * 20):
        engine = client.get("/engine", cast_to=object)
        if not engine["num_requests_running"] and not engine["num_requests_waiting"]:
            return True
        pause.wait(0.05)
    return False


def abort(target):
    """a stream that is closed, and one whose task is cancelled, free the engine."""
    client = client_of(target)
    fields = {
        "model": target.model,
        "messages": HELLO,
        "max_completion_tokens": 1500,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    stream = client.chat.completions.create(**fields)
    next(iter(stream))
    stream.close()
    expect(is_idle(client), "still running")

    async def cancelled():
        first = asyncio.Event()
        async with openai.AsyncOpenAI(base_url=target.base_url, api_key=target.key) as other:

            async def read():
                async for _ in await other.chat.completions.create(**fields):
                    first.set()

            task = asyncio.create_task(read())
            await first.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            expect(task.cancelled())

    asyncio.run(cancelled())
    expect(is_idle(client), "still running")


async def at_once(target):
    """AsyncOpenAI: twelve answers at once are those of one at a time."""
    async with openai.AsyncOpenAI(base_url=target.base_url, api_key=target.key) as client:

        async def one(seed):
            answer = await client.chat.completions.create(
                model=target.model, messages=HELLO, max_completion_tokens=12, seed=seed
            )
            return answer.choices[0].message.content

        together = await asyncio.gather(*(one(seed) for seed in range(12)))
        expect(together == [await one(seed) for seed in range(12)], together)


run(
    [
        models,
        completion,
        completion_of_ids,
        chat,
        chat_helper,
        parse,
        parse_sampled,
        parse_streamed,
        cut_short,
        json_object,
        forced_call,
        parsed_call,
        streamed_call,
        free_call,
        round_trip,
        raw_response,
        errors,
        not_retried,
        retried,
        abort,
        at_once,
    ]
)
