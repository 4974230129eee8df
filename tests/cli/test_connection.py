"""How the commands reach a server: in this process or by HTTP, streamed, and stopped."""

import asyncio
import contextlib
import socket
from pathlib import Path

import httpx
import pytest

from app.cli import parse_arguments
from app.cli.connection import connect
from app.cli.errors import RequestFailed
from app.cli.transport import AppTransport
from app.factory import create_app
from app.settings import Environment, ServerSettings
from tests.api.serve import real_server
from tests.cli.talk import connected
from tests.fake_engine import FakeEngine, make_context, says

ENVIRONMENT = Environment(cache_dir=Path("nowhere"), api_keys=(), hf_token=None, is_offline=True)
PATH = "/v1/completions"


def texts_of(connection, body) -> list[str]:
    texts: list[str] = []
    assert connection.stream(PATH, body, lambda event: texts.append(event["choices"][0]["text"]))
    return texts


def test_answer_of_this_process_streams():
    async def run() -> None:
        engine = FakeEngine(says("abc"))
        context = make_context(engine)
        transport = AppTransport(create_app(context, ServerSettings()))
        engine.gate.clear()
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
            client.stream("POST", PATH, json={"prompt": "x", "stream": True}) as response,
        ):
            assert response.status_code == 200  # before the engine has said anything
            assert not engine.streams[0].was_aborted.is_set()
        assert engine.streams[0].was_aborted.is_set()
        context.grammars.close()

    asyncio.run(run())


def test_streamed_texts_are_those_of_the_whole_answer():
    text = "a\u2028b\r\n\x85c"
    with connected(FakeEngine(says(text))) as connection:
        streamed = "".join(texts_of(connection, {"prompt": "x", "max_tokens": 20}))
        whole = connection.post(PATH, {"prompt": "x", "max_tokens": 20})
    assert streamed == whole["choices"][0]["text"] == text


def test_stop_ends_the_request_at_the_engine_and_the_next_one_works():
    engine = FakeEngine(says("abc"))
    engine.gate.clear()

    @contextlib.contextmanager
    def watch(stop):
        asyncio.get_running_loop().call_later(0, stop)
        yield

    with connected(engine) as connection:
        assert not connection.stream(PATH, {"prompt": "x"}, lambda event: None, watch)
        engine.gate.set()
        assert "".join(texts_of(connection, {"prompt": "x"})) == "abc"
    assert not engine.streams or engine.streams[-1].was_aborted.is_set() is False


def test_refusal_is_the_servers_own_line():
    with (
        connected(FakeEngine(says("x"))) as connection,
        pytest.raises(RequestFailed, match="'temperature'"),
    ):
        connection.stream(PATH, {"prompt": "x", "temperature": 7}, lambda event: None)


def test_failure_within_a_stream_is_raised():
    engine = FakeEngine(says("x"))
    engine.error = "the step failed"
    with connected(engine) as connection, pytest.raises(RequestFailed):
        connection.stream(PATH, {"prompt": "x"}, lambda event: None)


def served(**options):
    engine = FakeEngine(says("abc"))
    return real_server(create_app(make_context(engine), ServerSettings(**options)))


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_server_elsewhere_is_asked_under_the_name_of_its_model(suffix):
    with served(api_keys=("k",)) as url:
        line = ["generate", "--base-url", url + suffix, "--api-key", "k"]
        with connect(parse_arguments(line), ENVIRONMENT) as connection:
            assert connection.model == "fake"
            assert "".join(texts_of(connection, {"prompt": "x"})) == "abc"


def test_missing_key_is_told():
    with served(api_keys=("k",)) as url:
        args = parse_arguments(["generate", "--base-url", url])
        with pytest.raises(RequestFailed, match="No API key"), connect(args, ENVIRONMENT):
            raise AssertionError("let in")


def test_server_that_is_not_there_is_a_line_with_a_next_step():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        args = parse_arguments(["chat", "--base-url", url])
        with pytest.raises(RequestFailed, match="arriero serve"), connect(args, ENVIRONMENT):
            raise AssertionError("let in")


def test_flag_of_loading_has_no_place_beside_a_server(capsys):
    args = parse_arguments(["chat", "--base-url", "http://a", "--dtype", "float32"])
    with pytest.raises(SystemExit), connect(args, ENVIRONMENT):
        raise AssertionError("let in")
    assert "--dtype is for a model that is loaded here" in capsys.readouterr().err
