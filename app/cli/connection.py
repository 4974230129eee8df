"""A server to talk to: one that runs somewhere, or the same application in this process.

Both are reached by the same requests to OpenAI's API through httpx. Calls are synchronous, and
Ctrl-C ends the one under way. Knows nothing of terminals.
"""

import argparse
import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator

import httpx

from app.cli.command import command_of
from app.cli.errors import RequestFailed
from app.cli.options import add_model_options
from app.cli.transport import AppTransport
from app.settings import Environment, ServerSettings

Json = dict[str, object]
Watch = Callable[[Callable[[], None]], contextlib.AbstractContextManager[None]]
"""Watches for a wish to stop while a stream runs; it gets what stops the stream."""

CONNECT_TIMEOUT_S = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Connection:
    """Requests to one server. `model` is the name that its requests carry, if any."""

    def __init__(
        self, runner: asyncio.Runner, client: httpx.AsyncClient, model: str | None = None
    ) -> None:
        self._runner = runner
        self._client = client
        self.model = model

    def get(self, path: str) -> Json:
        """Return an answer's JSON. Raises RequestFailed."""
        return self._runner.run(self._whole(self._client.build_request("GET", path)))

    def post(self, path: str, body: Json) -> Json:
        """Return the whole answer. Raises RequestFailed."""
        return self._runner.run(self._whole(self._request(path, body)))

    def stream(
        self, path: str, body: Json, take: Callable[[Json], None], watch: Watch | None = None
    ) -> bool:
        """Give each event to `take`; return whether the stream ended by itself, not by Ctrl-C.

        Raises RequestFailed, after the events that came before the failure.
        """
        request = self._request(path, {**body, "stream": True})
        try:
            self._runner.run(self._stream(request, take, watch))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return False
        return True

    def _request(self, path: str, body: Json) -> httpx.Request:
        named = {"model": self.model} if self.model else {}
        return self._client.build_request("POST", path, json={**named, **body})

    async def _whole(self, request: httpx.Request) -> Json:
        with self._telling():
            response = await self._client.send(request)
            return _checked(response)

    async def _stream(
        self, request: httpx.Request, take: Callable[[Json], None], watch: Watch | None
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        watching = watch(lambda: _cancel(task)) if watch else contextlib.nullcontext()
        with self._telling(), watching:
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    await response.aread()
                    _checked(response)
                async for event in _events(response.aiter_bytes()):
                    if "error" in event:
                        raise RequestFailed(_message_of(event))
                    take(event)
            finally:
                await response.aclose()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Say in a line what went wrong on the way."""
        url = str(self._client.base_url).rstrip("/")
        try:
            yield
        except httpx.ConnectError as error:
            raise RequestFailed(
                f"no server answers at {url}; start one with `arriero serve`, or leave --base-url "
                "out to load the model here"
            ) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise RequestFailed(f"the server at {url} broke off: {reason}") from error


def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()


def _checked(response: httpx.Response) -> Json:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestFailed(f"status {response.status_code}, and no JSON: is this OpenAI's API?")
    if response.status_code != 200:
        raise RequestFailed(_message_of(value))
    return value


def _message_of(value: Json) -> str:
    error = value.get("error", value)
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or json.dumps(value)[:500])


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[Json]:
    """Yield the JSON of each data line up to [DONE].

    Raises RequestFailed if that does not come. Not httpx's lines: those end at U+2028 too.
    """
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                return
            yield json.loads(text)
    raise RequestFailed("the answer was cut off")


@contextlib.contextmanager
def connect(args: argparse.Namespace, environment: Environment) -> Iterator[Connection]:
    """Reach the server that `--base-url` names, or load the model and be one's own server.

    Raises ModelError and RequestFailed.
    """
    opening = _reach(args, environment) if args.base_url else _load(args, environment)
    stack = contextlib.AsyncExitStack()
    with asyncio.Runner() as runner:
        try:
            client = runner.run(stack.enter_async_context(opening))
            connection = Connection(runner, client)
            if args.base_url:
                connection.model = args.model or args.model_path or _first_model(connection)
            yield connection
        finally:
            runner.run(stack.aclose())


def _reach(
    args: argparse.Namespace, environment: Environment
) -> contextlib.AbstractAsyncContextManager[httpx.AsyncClient]:
    if given := _loading_flags(args):
        args.fail(f"{given[0]} is for a model that is loaded here, not with --base-url")
    url = httpx.URL(args.base_url.rstrip("/").removesuffix("/v1"))
    key = args.api_key or next(iter(environment.api_keys), None)
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        trust_env=url.host not in _LOOPBACK,  # a proxy would look for the server on itself
    )


def _loading_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags given that say how a model is loaded."""
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return [
        "--" + name.replace("_", "-")
        for name, default in vars(parser.parse_args([])).items()
        if name not in ("model", "model_path") and getattr(args, name) != default
    ]


def _first_model(connection: Connection) -> str | None:
    """Return the name of what is served: other servers than ours insist on one."""
    models = connection.get("/v1/models").get("data")
    first = models[0] if isinstance(models, list) and models else None
    return str(first.get("id")) if isinstance(first, dict) else None


def _tell_of_compiling() -> None:
    """Have it said that a compiler runs, which takes seconds, once."""
    log = logging.getLogger("model.cpu.build")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)


def _load(
    args: argparse.Namespace, environment: Environment
) -> contextlib.AbstractAsyncContextManager[httpx.AsyncClient]:
    args.max_num_seqs = args.max_num_seqs or 1  # one person asks, one thing at a time
    command = command_of(args, environment)
    # Imported here: none of it is needed to talk to a server elsewhere.
    from app.factory import create_app
    from app.main import make_context, progress_bar
    from model.loader import load_model

    _tell_of_compiling()
    context = make_context(command, load_model(command.load, progress_bar()))
    app = create_app(context, ServerSettings())

    @contextlib.asynccontextmanager
    async def serving() -> AsyncIterator[httpx.AsyncClient]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=AppTransport(app), base_url="http://arriero", timeout=None
            ) as client,
        ):
            yield client

    return serving()
