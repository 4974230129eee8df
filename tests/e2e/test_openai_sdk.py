"""The openai SDK against a real server on a free port: the whole service over a tiny real model.

Engine, scheduler, network, sampler and HTTP are all the real ones; only the weights are random.
"""

import asyncio
import gc
import socket
import threading

import httpx
import openai
import psutil
import pytest

from app.cli import parse
from app.factory import create_app
from app.main import make_context
from app.settings import ServerSettings, read_environment
from model.loader import load_model
from tests.api.serve import real_server
from tests.toy import write_toy_checkpoint

MODEL = "toy"


def make_server_context(folder, *flags: str):
    arguments = ["serve", str(folder), "--served-model-name", MODEL, "--device", "cpu", *flags]
    command = parse(arguments, read_environment())
    return make_context(command, load_model(command.load))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def context(folder):
    return make_server_context(folder)


@pytest.fixture(scope="module")
def url(context):
    with real_server(create_app(context, ServerSettings(api_keys=("secret",)))) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_completion_streamed_equals_completion_whole(client):
    fields = {"model": MODEL, "prompt": "Hello", "max_tokens": 20, "seed": 7, "temperature": 1}
    whole = client.completions.create(**fields)
    chunks = list(
        client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert whole.choices[0].finish_reason in ("length", "stop")


def test_chat_streamed_equals_chat_whole(client):
    fields = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_completion_tokens": 20,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    entries = whole.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace") == text
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)


def test_seed_repeats_and_n_choices_differ(client):
    fields = {"model": MODEL, "prompt": "Hello", "max_tokens": 12, "seed": 3, "n": 3}
    first, second = (client.completions.create(**fields) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


def test_second_turn_reuses_the_first(client):
    prompt = "The quick brown fox jumps over the lazy dog again and again. " * 2
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_errors_have_the_sdks_classes(client, url):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
    ):
        stranger.models.list()


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def wait_until_free(context) -> None:
    """Wait for all blocks to come back; bounded by the suite's patience, not by a guess."""
    pause = threading.Event()
    for _ in range(2000):
        stats = context.engine.stats()
        if stats.num_free_blocks == stats.num_blocks and not stats.num_requests_waiting:
            return
        pause.wait(0.005)
    raise AssertionError("blocks are still held")


def test_closed_stream_frees_its_blocks(client, context):
    stream = client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_until_free(context)
    assert context.engine.is_alive


def test_many_disconnects_leave_nothing_behind(url, context, full):
    body = {
        "model": MODEL,
        "prompt": "Hello",
        "max_tokens": 240,
        "ignore_eos": True,
    }
    num_threads = threading.active_count()
    process = psutil.Process()

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        """Go away in the middle of a stream, or of the wait for a whole answer."""
        wants_stream = number % 2 == 0
        try:
            async with client.stream(
                "POST",
                f"{url}/v1/completions",
                json={**body, "stream": wants_stream},
                headers={"authorization": "Bearer secret"},
                timeout=None if wants_stream else 0.05,
            ) as response:
                async for _ in response.aiter_bytes():
                    break
        except httpx.TimeoutException:
            assert not wants_stream

    async def flood(count: int) -> None:
        async with httpx.AsyncClient() as client:
            for first in range(0, count, 20):
                await asyncio.gather(*(leave(client, first + i) for i in range(20)))

    asyncio.run(flood(20))  # what is set up once is there after this
    wait_until_free(context)
    gc.collect()
    num_files, resident = process.num_fds(), process.memory_info().rss
    asyncio.run(flood(1000 if full else 60))
    wait_until_free(context)
    gc.collect()
    assert threading.active_count() <= num_threads + 1
    # A connection that the server has yet to notice as closed is no leak; one a client would be.
    assert process.num_fds() <= num_files + 20
    assert process.memory_info().rss < resident + (48 << 20)
    assert context.engine.is_alive


def test_many_requests_share_a_pool_that_holds_a_few(folder, full):
    flags = ["--kv-cache-memory-bytes", str(8 * 48 * toy_bytes_per_token(folder))]
    context = make_server_context(folder, *flags, "--max-model-len", "64")
    roomy = make_server_context(folder, "--no-enable-prefix-caching")
    count = 64 if full else 24

    async def texts(url: str, width: int) -> list[str]:
        gate = asyncio.Semaphore(width)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

            async def one(number: int) -> str:
                async with gate:
                    answer = await client.completions.create(
                        model=MODEL,
                        prompt=[number + 1, number + 2, 3],
                        max_tokens=40,
                        seed=number,
                        extra_body={"ignore_eos": True},
                    )
                assert answer.usage.completion_tokens == 40
                return answer.choices[0].text

            return await asyncio.gather(*(one(number) for number in range(count)))

    with real_server(create_app(context, ServerSettings())) as url:
        crowded = asyncio.run(texts(url, count))
        assert context.engine.stats().num_preemptions > 0
    with real_server(create_app(roomy, ServerSettings())) as url:
        assert crowded == asyncio.run(texts(url, 1))


def toy_bytes_per_token(folder) -> int:
    command = parse(["info", str(folder), "--device", "cpu"], read_environment())
    return load_model(command.load).info.plan.kv_bytes_per_token


def test_port_that_is_taken_is_one_line_and_no_traceback(folder, capsys):
    from app.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as left:
            main(["serve", str(folder), "--port", str(taken.getsockname()[1])])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("arriero: cannot listen on 127.0.0.1")


def test_missing_model_is_one_line_and_no_traceback(tmp_path, capsys):
    from app.cli import main

    with pytest.raises(SystemExit) as left:
        main(["info", str(tmp_path / "nothing")])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such file or folder" in line
