"""Errors of every status that the application gives, as clients meet them.

Those of the socket itself (408, 431, too many connections) are in tests/api/test_connections.py,
those of retries and deadlines (409, 410, 504) in test_retries.py and test_completions.py beside it.
"""

import asyncio
import json
from dataclasses import dataclass, field

from app.settings import ApiKey
from tests.api.serve import client_of
from tests.conformance.answers import CHAT, COMPLETIONS, HELLO, SAY
from tests.fake_engine import FakeEngine, says

JSON = "application/json"
METRICS_KEY = ApiKey(name="prometheus", key="key", scope="metrics")
LIMITED_KEY = ApiKey(name="alice", key="key", tokens_per_minute=1)


@dataclass(frozen=True, kw_only=True)
class Mishap:
    """A request that fails; the engine may be what fails."""

    method: str = "POST"
    path: str = COMPLETIONS
    body: bytes = b""
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    is_draining: bool = False
    engine_error: str | None = None


def _posted(body: dict, **more) -> Mishap:
    return Mishap(body=json.dumps(body).encode(), **more)


def _with_key(key: ApiKey) -> Mishap:
    headers = {"authorization": f"Bearer {key.key}"}
    return _posted(SAY, settings={"named_keys": (key,)}, headers=headers)


MISHAPS: dict[str, tuple[int, Mishap]] = {
    "no JSON": (400, Mishap(body=b"{")),
    "a value out of range": (400, _posted({**SAY, "temperature": 3})),
    "no messages": (400, _posted({"model": "fake"}, path=CHAT)),
    "a field that is not done": (400, _posted({**SAY, "suffix": "a"})),
    "a prompt over the context": (400, _posted({**SAY, "prompt": [1] * 300})),
    "no key": (401, _posted(SAY, settings={"api_keys": ("key",)})),
    "a key that may read metrics alone": (403, _with_key(METRICS_KEY)),
    "another model": (404, _posted({**SAY, "model": "nobody"})),
    "the card of another model": (404, Mishap(method="GET", path="/v1/models/nobody")),
    "another path": (404, Mishap(path="/v1/nothing")),
    "another method": (405, Mishap(method="GET")),
    "a body over the limit": (413, _posted(SAY, settings={"max_request_bytes": 8})),
    "another content type": (415, Mishap(body=b"a=b", content_type="text/plain")),
    "a prompt over the key's tokens a minute": (429, _with_key(LIMITED_KEY)),
    "a step that fails": (500, _posted(SAY, engine_error="the step failed")),
    "a chat's step that fails": (500, _posted(HELLO, path=CHAT, engine_error="the step failed")),
    "a server that shuts down": (503, _posted(SAY, is_draining=True)),
}


async def meet(mishap: Mishap) -> tuple[int, dict]:
    """Return the status and the body of what goes wrong."""
    engine = FakeEngine(says("x"))
    engine.is_draining, engine.error = mishap.is_draining, mishap.engine_error
    async with client_of(engine, **mishap.settings) as client:
        response = await client.request(
            mishap.method,
            mishap.path,
            content=mishap.body,
            headers={"content-type": mishap.content_type, **mishap.headers},
        )
    return response.status_code, response.json()


async def meet_in_stream(url: str, body: dict) -> dict:
    """Return the event by which a stream ends whose engine fails after its first token."""
    engine = FakeEngine(says("abc"))
    async with client_of(engine) as client:
        engine.gate.clear()
        waiting = asyncio.create_task(client.post(url, json={**body, "stream": True}))
        while not engine.streams:
            await asyncio.sleep(0)
        engine.error = "the step failed"
        engine.gate.set()
        response = await waiting
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    return json.loads(lines[-1])
