"""`pydantic-ai`."""

from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from report import Target, expect, run
from shapes import ASK_PERSON, ASK_WEATHER, MAX_TOKENS, Person, Weather


def model_of(target: Target) -> OpenAIChatModel:
    provider = OpenAIProvider(base_url=target.base_url, api_key=target.key)
    return OpenAIChatModel(target.model, provider=provider)


def agent_of(target: Target, *, max_tokens: int = MAX_TOKENS, **options) -> Agent:
    settings = {"temperature": 0.0, "max_tokens": max_tokens}
    return Agent(model_of(target), model_settings=settings, retries=0, **options)


async def text(target):
    """an agent that answers in text."""
    result = await agent_of(target, max_tokens=12, instructions="Be brief.").run("Tell of a llama.")
    expect(isinstance(result.output, str), result)


async def streamed(target):
    """run_stream: text."""
    agent = agent_of(target, max_tokens=12)
    async with agent.run_stream("Tell of a llama.") as result:
        pieces = [piece async for piece in result.stream_text(delta=True)]
    expect("".join(pieces) == (await agent.run("Tell of a llama.")).output, pieces)


async def tool_output(target):
    """an output type, as a tool."""
    result = await agent_of(target, output_type=ToolOutput(Person)).run(ASK_PERSON)
    expect(isinstance(result.output, Person), result)


async def native_output(target):
    """an output type, as a JSON schema."""
    result = await agent_of(target, output_type=NativeOutput(Person)).run(ASK_PERSON)
    expect(isinstance(result.output, Person), result)


async def streamed_output(target):
    """run_stream: an output type."""
    agent = agent_of(target, output_type=ToolOutput(Person))
    async with agent.run_stream(ASK_PERSON) as result:
        output = await result.get_output()
    expect(isinstance(output, Person), output)


async def tool_then_output(target):
    """a tool is called, then the output type is given."""
    calls = []

    async def only_tools(context: RunContext, definitions):
        return definitions if calls else []  # no end before the call

    async def only_once(context: RunContext, definition):
        return None if calls else definition

    agent = agent_of(
        target, output_type=ToolOutput(Person), capabilities=[PrepareOutputTools(only_tools)]
    )

    @agent.tool_plain(prepare=only_once)
    def weather(about: Weather) -> str:
        """Tell the weather in a city."""
        calls.append(about)
        return "21 degrees"

    result = await agent.run(ASK_WEATHER, model_settings={"parallel_tool_calls": False})
    expect(calls and isinstance(calls[0], Weather), calls)
    expect(isinstance(result.output, Person), result)


run([text, streamed, tool_output, native_output, streamed_output, tool_then_output])
