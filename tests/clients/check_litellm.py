"""`litellm`."""

import json

import litellm
from report import Target, expect, raised, run
from shapes import ASK_PERSON, ASK_WEATHER, MAX_TOKENS, Person, Weather

TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": Weather.model_json_schema()},
    }
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def ask(target: Target, text: str = "Tell of a llama.", **fields):
    fields = {"max_tokens": 16, "temperature": 0, "num_retries": 0, "max_retries": 0, **fields}
    return litellm.completion(
        model=f"openai/{target.model}",
        api_base=target.base_url,
        api_key=target.key,
        messages=[{"role": "user", "content": text}],
        **fields,
    )


def completion(target):
    """completion: text, usage and reason."""
    answer = ask(target)
    expect(isinstance(answer.choices[0].message.content, str), answer)
    expect(answer.choices[0].finish_reason in ("stop", "length"), answer)
    expect(answer.usage.total_tokens > answer.usage.prompt_tokens > 0, answer)


def stream(target):
    """stream: the pieces are the whole, with usage."""
    whole = ask(target)
    chunks = list(ask(target, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    expect(text == whole.choices[0].message.content, (text, whole))
    built = litellm.stream_chunk_builder(chunks)
    expect(built.usage.total_tokens == whole.usage.total_tokens, (built, whole))


async def in_async(target):
    """acompletion."""
    answer = await litellm.acompletion(
        model=f"openai/{target.model}",
        api_base=target.base_url,
        api_key=target.key,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=4,
    )
    expect(answer.usage.completion_tokens > 0, answer)


def tools(target):
    """tools: a forced call has valid arguments, streamed as whole."""
    fields = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": MAX_TOKENS}
    (call,) = ask(target, ASK_WEATHER, **fields).choices[0].message.tool_calls
    Weather.model_validate(json.loads(call.function.arguments))
    chunks = list(ask(target, ASK_WEATHER, stream=True, **fields))
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    expect(streamed.function.arguments == call.function.arguments, (streamed, call))
    expect(streamed.function.name == "get_weather", streamed)


def schema(target):
    """response_format with a pydantic class."""
    answer = ask(target, ASK_PERSON, response_format=Person, max_tokens=MAX_TOKENS)
    Person.model_validate_json(answer.choices[0].message.content)


def errors(target):
    """errors: context window exceeded, bad request, not found, authentication."""
    raised(litellm.ContextWindowExceededError, lambda: ask(target, max_tokens=10**6))
    raised(litellm.ContextWindowExceededError, lambda: ask(target, "llama " * 20_000))
    raised(litellm.BadRequestError, lambda: ask(target, temperature=3))
    raised(litellm.AuthenticationError, lambda: ask(Target(
        url=target.url, model=target.model, key="wrong"
    )))  # fmt: skip
    raised(litellm.NotFoundError, lambda: ask(Target(
        url=target.url, model="nobody", key=target.key
    )))  # fmt: skip


def text_completion(target):
    """text_completion."""
    answer = litellm.text_completion(
        model=f"text-completion-openai/{target.model}",
        api_base=target.base_url,
        api_key=target.key,
        prompt="Once upon a time",
        max_tokens=8,
    )
    expect(isinstance(answer.choices[0].text, str) and answer.usage.completion_tokens, answer)


run([completion, stream, in_async, tools, schema, errors, text_completion])
