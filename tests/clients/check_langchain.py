"""`langchain-openai`."""

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from report import Target, expect, run
from shapes import ASK_PERSON, ASK_WEATHER, MAX_TOKENS, Person, Weather


@tool(args_schema=Weather)
def get_weather(city: str, unit: str, days: int) -> str:
    """Tell the weather in a city."""
    return f"21 degrees {unit} in {city} for {days} days"


def model_of(target: Target, **options) -> ChatOpenAI:
    options = {"temperature": 0, "max_tokens": MAX_TOKENS, "max_retries": 0, **options}
    return ChatOpenAI(model=target.model, base_url=target.base_url, api_key=target.key, **options)


def invoke(target):
    """invoke: text, usage and reason."""
    answer = model_of(target, max_tokens=16).invoke(
        [SystemMessage("Be brief."), HumanMessage("Tell of a llama.")]
    )
    expect(isinstance(answer.content, str), answer)
    expect(answer.usage_metadata["output_tokens"] > 0, answer)
    expect(answer.response_metadata["finish_reason"] in ("stop", "length"), answer)


def stream(target):
    """stream: the pieces are the whole, with usage."""
    model = model_of(target, max_tokens=16, stream_usage=True)
    pieces = list(model.stream("Tell of a llama."))
    whole = model.invoke("Tell of a llama.")
    expect("".join(piece.content for piece in pieces) == whole.content, pieces)
    total = sum(pieces[1:], pieces[0])
    expect(total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"], total)


async def batch(target):
    """abatch: four prompts at once."""
    answers = await model_of(target, max_tokens=4).abatch(["One", "Two", "Three", "Four"])
    expect(len(answers) == 4 and all(a.usage_metadata for a in answers), answers)


def structured(method: str, **options):
    def check(target):
        model = model_of(target).with_structured_output(Person, method=method, **options)
        expect(isinstance(model.invoke(ASK_PERSON), Person))

    check.__doc__ = f"with_structured_output: {method}" + ", strict" * bool(options)
    return check


def structured_stream(target):
    """with_structured_output: json_schema, streamed."""
    model = model_of(target).with_structured_output(Person, method="json_schema")
    *_, last = model.stream(ASK_PERSON)
    expect(isinstance(last, Person), last)


def called(target):
    """bind_tools: a forced call has valid arguments."""
    model = model_of(target)
    for choice in ("get_weather", "any"):
        bound = model.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
        answer = bound.invoke(ASK_WEATHER)
        expect(not answer.invalid_tool_calls, answer)
        (call,) = answer.tool_calls
        expect(call["name"] == "get_weather" and call["id"], call)
        Weather.model_validate(call["args"])


def called_streamed(target):
    """bind_tools: a streamed call is the whole one."""
    bound = model_of(target).bind_tools([get_weather], tool_choice="get_weather")
    pieces = list(bound.stream(ASK_WEATHER))
    total = sum(pieces[1:], pieces[0])
    whole = bound.invoke(ASK_WEATHER)
    expect(total.tool_calls[0]["args"] == whole.tool_calls[0]["args"], total)


def round_trip(target):
    """bind_tools: ToolMessage round trip."""
    model = model_of(target)
    asked = [HumanMessage(ASK_WEATHER)]
    call = model.bind_tools([get_weather], tool_choice="get_weather").invoke(asked)
    result = get_weather.invoke(call.tool_calls[0])
    expect(isinstance(result, ToolMessage), result)
    free = model_of(target, max_tokens=8).bind_tools([get_weather], tool_choice="none")
    answer = free.invoke([*asked, call, result])
    expect(isinstance(answer.content, str) and not answer.tool_calls, answer)


def completion(target):
    """OpenAI: a completion, whole and streamed."""
    model = OpenAI(
        model=target.model,
        base_url=target.base_url,
        api_key=target.key,
        temperature=0,
        max_tokens=12,
        max_retries=0,
    )
    whole = model.invoke("Once upon a time")
    expect("".join(model.stream("Once upon a time")) == whole, whole)


run(
    [
        invoke,
        stream,
        batch,
        structured("json_schema"),
        structured("json_schema", strict=True),
        structured("function_calling"),
        structured_stream,
        called,
        called_streamed,
        round_trip,
        completion,
    ]
)
