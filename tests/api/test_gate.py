"""Who gets in: default deny, odd paths, odd keys, request ids."""

import asyncio
import logging

import httpx
import pytest
from starlette.responses import PlainTextResponse

from app.api.middleware import Gate
from app.factory import create_app
from app.settings import ApiKey, ServerSettings
from tests.api.serve import client_of, run
from tests.fake_engine import FakeEngine, make_context, says

KEYS = ("secret", "clé")
PATHS = [
    "/v1/models",
    "/v1/models/fake",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/version",
    "/docs",
    "/openapi.json",
    "/nowhere",
    "//v1/models",
    "/V1/models",
    "/v1/models/",
    "/health/",
    "/health/../v1/models",
    "/%2e/v1/models",
    "/health%2f..%2fmetrics",
]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_but_health_opens_without_a_key(method, path):
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=KEYS) as client:
            response = await client.request(method, path, headers={"host": "a/health?x="})
        assert response.status_code == 401
        assert response.headers["x-request-id"]

    run(scenario())


def test_health_is_open():
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=KEYS) as client:
            for path in ("/health", "/health/live", "/health/ready"):
                assert (await client.get(path)).status_code == 200

    run(scenario())


def test_health_is_open_under_a_root_path():
    async def scenario():
        app = create_app(make_context(FakeEngine(says("x"))), ServerSettings(api_keys=KEYS))
        transport = httpx.ASGITransport(app=app, root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/llm/health")).status_code == 200
            assert (await client.get("/llm/v1/models")).status_code == 401

    run(scenario())


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (b"Bearer secret", 200),
        (b"bearer  secret", 200),
        ("Bearer clé".encode(), 200),
        (b"Bearer secre", 401),
        (b"Bearer ", 401),
        (b"Bearer", 401),
        (b"", 401),
        (b"Basic secret", 401),
        (b"secret", 401),
        (b"Bearer \xff\xfe", 401),
        (b"Bearer " + b"x" * 10**6, 401),
    ],
    ids=range(11),
)
def test_key_is_taken_exactly_and_never_breaks_the_server(given, status):
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=KEYS) as client:
            response = await client.get("/v1/models", headers=[(b"authorization", given)])
        assert response.status_code == status

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("TRACE", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/completions/", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/nope", 404),
    ],
)
def test_what_the_router_refuses_has_openais_shape(method, path, status):
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            response = await client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    run(scenario())


@pytest.mark.parametrize(("given", "is_kept"), [("abc-1", True), ("a b\r\nx", False), ("", False)])
def test_sane_request_id_is_kept_and_another_replaced(given, is_kept):
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            response = await client.get("/version", headers=[(b"x-request-id", given.encode())])
        assert (response.headers["x-request-id"] == given) is is_kept

    run(scenario())


@pytest.mark.parametrize("root_path", ["", "/llm"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize("path", [path for path in PATHS if path != "/metrics"])
def test_key_for_metrics_opens_nothing_else(method, path, root_path):
    async def scenario():
        keys = (ApiKey(name="prometheus", key="m", scope="metrics"), ApiKey(name="a", key="a"))
        app = create_app(make_context(FakeEngine(says("x"))), ServerSettings(named_keys=keys))
        transport = httpx.ASGITransport(app=app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"authorization": "Bearer m"}
            response = await client.request(method, root_path + path, headers=headers)
            assert response.status_code == 403
            if method != "HEAD":
                error = response.json()["error"]
                assert (error["type"], error["code"]) == (
                    "permission_error",
                    "insufficient_permissions",
                )
            for open_path in ("/metrics", "/health"):
                answer = await client.get(root_path + open_path, headers=headers)
                assert answer.status_code == 200
            page = (await client.get(root_path + "/metrics", headers=headers)).text
            assert 'code="insufficient_permissions"' in page

    run(scenario())


def test_two_keys_in_one_request_open_nothing():
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=KEYS) as client:
            sent = [(b"authorization", b"Bearer secret"), (b"authorization", b"Bearer wrong")]
            for headers in (sent, sent[::-1]):
                assert (await client.get("/version", headers=headers)).status_code == 401

    run(scenario())


def test_routes_know_who_asks_but_not_with_which_key():
    states = {}

    async def note(scope, receive, send):
        states[scope["path"]] = dict(scope["state"])
        await PlainTextResponse("")(scope, receive, send)

    async def scenario():
        named = (ApiKey(name="alice", key="clé"), ApiKey(name="bob", key="b"))
        keys = ServerSettings(api_keys=("c", "d"), named_keys=named).keys()
        transport = httpx.ASGITransport(app=Gate(note, keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for key in ("clé", "b", "c", "d"):
                header = {b"authorization": b"Bearer " + key.encode()}
                await client.get(f"/{key.encode().hex()}", headers=header)
            await client.get("/health", headers=header)

    run(scenario())
    assert [state.pop("key_name") for state in states.values()] == [
        "alice",
        "bob",
        "key-1",
        "key-2",
        None,
    ]
    assert not any("clé" in repr(state) for state in states.values())


def test_settings_do_not_show_keys():
    named = (ApiKey(name="alice", key="hidden"),)
    assert "hidden" not in repr(ServerSettings(api_keys=("hidden",), named_keys=named))


PREFLIGHT = {
    "origin": "https://chat.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def test_pages_of_an_allowed_origin_may_ask_before_they_have_a_key():
    async def scenario():
        origins = ("https://chat.example",)
        engine = FakeEngine(says("x"))
        async with client_of(engine, api_keys=KEYS, allowed_origins=origins) as client:
            asked = await client.options("/v1/completions", headers=PREFLIGHT)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == "https://chat.example"
            assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
            for key, status in (("secret", 200), ("wrong", 401)):
                headers = {"origin": "https://chat.example", "authorization": f"Bearer {key}"}
                sent = await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
                assert sent.status_code == status
                assert sent.headers["access-control-allow-origin"] == "https://chat.example"
                assert "access-control-allow-credentials" not in sent.headers

    run(scenario())


@pytest.mark.parametrize("origins", [(), ("https://other.example",)], ids=["off", "other"])
def test_pages_of_other_origins_are_told_nothing(origins):
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine, api_keys=KEYS, allowed_origins=origins) as client:
            asked = await client.options("/v1/completions", headers=PREFLIGHT)
            assert asked.status_code in (400, 401)
            headers = {"origin": "https://chat.example", "authorization": "Bearer secret"}
            sent = await client.get("/version", headers=headers)
            assert "access-control-allow-origin" not in {*asked.headers, *sent.headers}

    run(scenario())


def test_any_origin_may_be_allowed_and_then_without_credentials():
    async def scenario():
        async with client_of(FakeEngine(says("x")), allowed_origins=("*",)) as client:
            headers = {"origin": "https://evil.example", "cookie": "a=b"}
            sent = await client.get("/version", headers=headers)
            assert sent.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in sent.headers

    run(scenario())


def test_client_that_leaves_is_no_failure_in_the_log(caplog):
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine) as client:
            app = client._transport.app
        bodies = iter(
            [
                {"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False},
                {"type": "http.disconnect"},
            ]
        )
        engine.gate.clear()

        async def receive():
            return next(bodies)

        async def send(message):
            return None

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await app(scope, receive, send)
        await asyncio.wait_for(engine.streams[0].was_aborted.wait(), 5)

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert not caplog.records


def test_key_says_whose_share_a_request_takes():
    async def scenario():
        engine = FakeEngine(says("x"))
        keys = (ApiKey(name="alice", key="a"), ApiKey(name="bob", key="b"))
        async with client_of(engine, named_keys=keys) as client:
            for key in ("b", "a"):
                headers = {"authorization": f"Bearer {key}"}
                await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert [request.tenant for request in engine.requests] == ["bob", "alice"]
        async with client_of(engine) as client:
            await client.post("/v1/completions", json={"prompt": "x"})
        assert engine.requests[-1].tenant == ""

    run(scenario())
