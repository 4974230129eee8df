"""Runs the server: bind, load, serve, drain. The wiring that `arriero serve` stands on."""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Generator
from types import FrameType

import uvicorn
from tqdm import tqdm

from app.api.connections import EdgeConfig
from app.api.routes.info import own_version
from app.cli import Command
from app.engine.client import EngineClient
from app.engine.collector import settle_collector
from app.engine.engine import Engine, EngineOptions
from app.engine.watchdog import Verdict, Watchdog
from app.factory import create_app
from app.serving.context import ServingContext
from app.serving.energy import open_gpu_meter
from app.serving.metrics import RequestMetrics
from app.serving.tracing import RequestTracer, open_tracer
from app.settings import ServerSettings
from app.text.chat_template import ChatTemplate, end_of_turn_ids
from app.text.grammar.compiler import GrammarCompiler
from app.text.reasoning import detect_think_tags
from app.text.tools.parser import TAGS, detect_format
from model.errors import ConfigError
from model.loader import LoadedModel, ModelInfo, Progress, inspect_model, load_model

logger = logging.getLogger("arriero")

BACKLOG = 2048  # connections that the kernel holds until they are accepted
ACCEPTED_AT_ONCE = 32
CLOSE_TIMEOUT_S = 5  # for clients to read their last event
OTHER_FILES = 512  # open besides connections: probes above the cap, libraries, logs


def describe(command: Command) -> int:
    """Print what would be loaded."""
    for line in plan_lines(inspect_model(command.load)):
        sys.stdout.write(line + "\n")
    return 0


def serve(command: Command) -> int:
    """Serve until told to stop; returns the exit code."""
    started_s = time.monotonic()
    settings = command.server
    settings = _with_open_files(settings)
    # Bound before the weights are read: a port that is taken is no news after a minute.
    listener = bind(settings)
    tracer = None
    if settings.otlp_traces_endpoint is not None:
        tracer = open_tracer(
            settings.otlp_traces_endpoint, command.served_model_names[0], own_version()
        )
    loaded = load_model(command.load, progress_bar())
    context = make_context(command, loaded, tracer)
    app = create_app(context, settings)
    for line in plan_lines(loaded.info):
        logger.info("%s", line)
    settle_collector()
    _log_ready(listener, settings, context, time.monotonic() - started_s)
    config = EdgeConfig(app, settings)
    server = DrainingServer(config, context.engine, settings.shutdown_timeout_s)
    server.run(sockets=[listener])
    return 1 if server.has_failed else 0


def make_context(
    command: Command, loaded: LoadedModel, tracer: RequestTracer | None = None
) -> ServingContext:
    """Put together what the use cases need. Raises ConfigError for a bad chat template."""
    info, tokenizer = loaded.info, loaded.tokenizer
    source = tokenizer.chat_template
    if command.chat_template is not None:
        try:
            source = command.chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {command.chat_template}: {error}") from error
    template = None
    ends = {*info.eos_token_ids, *tokenizer.eos_token_ids}
    if source is not None:
        template = ChatTemplate(
            source,
            special_tokens=tokenizer.special_token_texts,
            added_tokens=tokenizer.added_tokens,
        )
        ends.update(end_of_turn_ids(source, tokenizer))
    keys = command.server.keys()
    options = EngineOptions(
        enable_prefix_caching=command.enable_prefix_caching,
        speculation=command.speculation,
        tenant_weights={key.name: key.weight for key in keys},
    )
    engine = Engine(loaded.runner, options)
    gpus = open_gpu_meter() if info.plan.device.startswith("cuda") else None
    return ServingContext(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=template,
        model_names=command.served_model_names,
        max_model_len=info.plan.max_model_len,
        vocab_size=info.config.vocab_size,
        defaults=info.generation,
        eos_token_ids=frozenset(ends),
        system_fingerprint=info.fingerprint,
        precision=info.precision.name,
        metrics=RequestMetrics(command.served_model_names[0], engine, gpus),
        grammars=GrammarCompiler(tokenizer, vocab_size=info.config.vocab_size, end_token_ids=ends),
        tracer=tracer,
        tool_format=command.tool_call_parser or detect_format(source),
        think_tags=detect_think_tags(source),
        tag_token_ids=frozenset(
            tokenizer.added_tokens[tag] for tag in TAGS if tag in tokenizer.added_tokens
        ),
    )


def plan_lines(info: ModelInfo) -> list[str]:
    """Say in a few lines what is loaded and where the bytes go."""
    config, plan = info.config, info.plan

    def mib(num_bytes: int) -> str:
        return f"{num_bytes / 2**20:,.0f} MiB"

    return [
        f"model {info.source} ({info.load_format}), {config.num_parameters / 1e6:,.1f} M "
        f"parameters, {info.precision.name} on {plan.device}",
        f"memory: weights {mib(plan.weights_bytes)}, K/V {mib(plan.kv_cache_bytes)} "
        f"({plan.num_blocks} blocks of {plan.block_size} tokens, {plan.kv_bytes_per_token} bytes "
        f"a token), work space {mib(plan.workspace_bytes)}, logits {mib(plan.logits_bytes)}"
        + (f", graphs {mib(plan.graphs_bytes)}" if plan.graphs_bytes else ""),
        f"limits: context {plan.max_model_len} tokens, {plan.max_num_seqs} sequences, "
        f"{plan.max_num_batched_tokens} tokens a step",
    ]


class DrainingServer(uvicorn.Server):
    """Uvicorn that drains on a signal, and leaves when the engine cannot go on."""

    def __init__(
        self, config: uvicorn.Config, engine: EngineClient, drain_timeout_s: float
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._watchdog = Watchdog(engine)
        self._drain_timeout_s = drain_timeout_s
        self.has_failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, a few connections at a time.

        asyncio accepts as many in a row as may queue: in a flood the first would be answered when
        the last has come in.
        """
        self.config.backlog = ACCEPTED_AT_ONCE
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Look after the engine ten times a second; return whether to leave."""
        if self._watchdog.look() is Verdict.LEAVE:
            self.has_failed = True
            return True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take the signals, and ignore them after: the process is about to end as it should."""
        numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            signal.signal(number, self.handle_exit)
        yield
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Stop at the first signal, leave at once at the second; neither is an error."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish before connections are closed."""
        self._watchdog.stop()
        draining = asyncio.ensure_future(self._engine.drain(self._drain_timeout_s))
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=0.1)
        draining.cancel()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        connections = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while connections and not self.force_exit and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        await self._hang_up()
        await self.lifespan.shutdown()

    async def _hang_up(self) -> None:
        """Close what is still open. Requests end as with clients that go, not by cancelling."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)


def _with_open_files(settings: ServerSettings) -> ServerSettings:
    """Make room for as many sockets as connections may be open, or allow fewer connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + OTHER_FILES
    if not settings.max_connections or soft == resource.RLIM_INFINITY or soft >= needed:
        return settings
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed >= needed:
        return settings
    num_connections = max(allowed - OTHER_FILES, allowed // 4)
    logger.warning("the limit of %d open files allows %d connections", allowed, num_connections)
    return dataclasses.replace(settings, max_connections=num_connections)


def bind(settings: ServerSettings) -> socket.socket:
    """Return the one socket that is listened on. Raises ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        hint = ""
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            hint = "; choose another --port, or 0 for any that is free"
        where = f"{settings.host}:{settings.port}"
        raise ConfigError(f"cannot listen on {where}: {error}{hint}") from error
    return listener


def url_of(host: str, port: int, settings: ServerSettings) -> str:
    """Return the URL of a server at an address of either family."""
    scheme = "https" if settings.ssl_certfile else "http"
    address = f"[{host}]" if ":" in host else host
    return f"{scheme}://{address}:{port}{settings.root_path}"


def local_url(listener: socket.socket, settings: ServerSettings) -> str:
    """Return the URL of a listener for a client on this machine."""
    host, port = listener.getsockname()[:2]
    # What listens on all addresses is asked at the loopback's: not every client knows 0.0.0.0.
    return url_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, settings)


def progress_bar() -> Progress | None:
    """Return what draws a bar while weights load, if anybody is there to see it."""
    if not sys.stderr.isatty():
        return None
    bar: tqdm | None = None

    def progress(num_done: int, num_all: int) -> None:
        nonlocal bar
        if bar is None:  # not before: what is said until then would stand in its line
            bar = tqdm(unit="B", unit_scale=True, desc="loading", leave=False)
        bar.total = num_all
        bar.update(num_done - bar.n)
        if num_done >= num_all:
            bar.close()

    return progress


def _log_ready(
    listener: socket.socket, settings: ServerSettings, context: ServingContext, seconds: float
) -> None:
    host, port = listener.getsockname()[:2]
    url = url_of(host, port, settings)
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    kind, prompt = ("completions", '"prompt": "Once upon a time"')
    if context.chat_template is not None:
        kind, prompt = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    logger.info("serving %s on %s, %.1f s after start", context.model_names[0], url, seconds)
    logger.info(
        "try: curl %s/v1/%s -H 'Content-Type: application/json'%s -d '{%s, \"temperature\": 0}'",
        local_url(listener, settings),
        kind,
        key,
        prompt,
    )
