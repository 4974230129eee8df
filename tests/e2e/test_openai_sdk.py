"""OpenAI's own client against a real server over a scripted engine."""

import openai
import pytest

from app.factory import create_app
from app.settings import ServerSettings
from tests.api.serve import real_server
from tests.fake_engine import FakeEngine, make_context, says

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine():
    return FakeEngine(says("Hello, llama"))


@pytest.fixture
def client(engine):
    app = create_app(make_context(engine), ServerSettings(api_keys=("key",)))
    with (
        real_server(app) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="key", max_retries=0, timeout=10) as client,
    ):
        yield client


def test_completion_and_chat_are_read(client):
    completion = client.completions.create(model="fake", prompt="a", max_tokens=50)
    assert completion.choices[0].text == "Hello, llama"
    chat = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert chat.choices[0].message.content == "Hello, llama"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.prompt_tokens_details.cached_tokens == 4


def test_stream_ends_with_its_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello, llama"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 13
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_logprobs_carry_the_exact_bytes(client):
    chat = client.chat.completions.create(
        model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).startswith(b"Hello, llama")
    assert len(content[0].top_logprobs) == 2


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["fake", "other-name"]
    assert client.models.retrieve("other-name").id == "other-name"


def test_errors_raise_their_own_classes(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fake", prompt="a", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_draining_server_is_told_as_worth_a_retry(client, engine):
    engine.is_draining = True
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="fake", prompt="a")
    assert refused.value.status_code == 503
    assert refused.value.response.headers["x-should-retry"] == "true"
    assert refused.value.response.headers["retry-after-ms"]


def test_failure_in_a_stream_raises(client, engine):
    engine.error = "the step failed"
    with pytest.raises(openai.APIError, match="the step failed"):
        list(client.completions.create(model="fake", prompt="a", stream=True))
