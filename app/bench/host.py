"""Time everything but the model: streams of a server whose runner only keeps time.

    scripts/bench-host                               256 chat streams, steps of 10 ms
    scripts/bench-host --endpoint completions --step-ms 0

The runner "computes" each step in a fixed time and gives out the ids of a real text, so what is
left is what a step costs the host: scheduling, detokenising, JSON, server-sent events, HTTP. The
client is a process of its own and counts events; its CPU time is reported too.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import httpx

from app.api.connections import EdgeConfig
from app.bench.process import ServerProcess, free_port
from app.cli import parse
from app.cli.command import Command
from app.engine.collector import settle_collector
from app.factory import create_app
from app.logs import set_up_logging
from app.main import DrainingServer, bind, make_context
from app.settings import read_environment
from model.loader import LoadedModel, inspect_model
from model.step import (
    FillMasks,
    RowResult,
    RunnerLimits,
    StepHandle,
    StepPlan,
    StepResult,
)
from model.tokenizers import load_tokenizer
from model.weights.checkpoint import open_checkpoint

TEXT = (
    "The pack llamas walked slowly up the mountain path, each with a bundle of wool, while the "
    "arriero whistled an old tune. Below them the valley lay in the morning light: fields of "
    'quinoa, a river, and the white walls of the village. "How far is it to the pass?" asked the '
    'boy. "Three hours," said his grandfather, "or four, if the snow has come early."\n'
)

PROMPT = "Tell me of the llamas."
NUM_CONTEXT = 2048


class TimedRunner:
    """A Runner that takes a fixed time a step and continues every row with the same text."""

    def __init__(self, token_ids: list[int], num_streams: int, vocab_size: int, step_s: float):
        self._token_ids = token_ids
        self._step_s = step_s
        self._due_s: dict[int, float] = {}
        self._last_due_s = 0.0
        self.limits = RunnerLimits(
            max_num_seqs=num_streams,
            max_num_batched_tokens=max(2048, num_streams),
            max_model_len=NUM_CONTEXT,
            block_size=16,
            num_blocks=num_streams * NUM_CONTEXT // 16,
            vocab_size=vocab_size,
            max_inflight=2,
        )

    def launch(self, plan: StepPlan, fill_masks: FillMasks) -> StepHandle:
        """Put a step behind the last one: it ends `step_s` after that, or after now."""
        del fill_masks
        self._last_due_s = max(self._last_due_s, time.monotonic()) + self._step_s
        self._due_s[plan.step_id] = self._last_due_s
        return StepHandle(plan=plan)

    def collect(self, handle: StepHandle) -> StepResult:
        """Sleep until the step is over; the GIL is free meanwhile, as it is beside a device."""
        plan, ids = handle.plan, self._token_ids
        left_s = self._due_s.pop(plan.step_id) - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        rows = tuple(
            RowResult(
                row=row.row,
                token_ids=(ids[(row.start + row.num_tokens) % len(ids)],) if row.sample else (),
            )
            for row in plan.rows
        )
        return StepResult(step_id=plan.step_id, rows=rows)


def load(args: argparse.Namespace) -> tuple[Command, LoadedModel]:
    """Return a command line as `arriero serve` has it, and a model that only keeps time."""
    command = parse(
        ["serve", *([args.model] if args.model else []), "--port", str(args.port)],
        read_environment(),
    )
    checkpoint = open_checkpoint(command.load)
    vocab_size = checkpoint.config.vocab_size
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, expected_vocab_size=vocab_size)
    checkpoint.close()
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    runner = TimedRunner(token_ids, args.streams, vocab_size, args.step_ms / 1000)
    loaded = LoadedModel(info=inspect_model(command.load), runner=runner, tokenizer=tokenizer)
    return command, loaded


def serve(args: argparse.Namespace) -> None:
    """Run the whole service, as `arriero serve` does, over a runner that only keeps time."""
    command, loaded = load(args)
    set_up_logging(command.server.log_level)
    context = make_context(command, loaded)
    settle_collector()
    listener = bind(command.server)
    config = EdgeConfig(create_app(context, command.server), command.server)
    DrainingServer(config, context.engine, 1.0).run(sockets=[listener])


@dataclass(slots=True)
class Tally:
    """What has come of all streams so far."""

    num_events: int = 0
    num_reads: int = 0
    num_open: int = 0
    num_done: int = 0
    all_open: asyncio.Event = field(default_factory=asyncio.Event)
    first_done: asyncio.Event = field(default_factory=asyncio.Event)
    all_done: asyncio.Event = field(default_factory=asyncio.Event)


class StreamClient(asyncio.Protocol):
    """One stream, read as fast as a client can that only counts events."""

    NEEDLE = b'data: {"id"'

    def __init__(self, request: bytes, tally: Tally, num_streams: int) -> None:
        self._request = request
        self._tally = tally
        self._num_streams = num_streams
        self._tail = b""
        self.num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        tally = self._tally
        text = self._tail + data
        num_events = text.count(self.NEEDLE)
        self._tail = text[1 - len(self.NEEDLE) :]
        tally.num_reads += 1
        if num_events and not self.num_events:
            tally.num_open += 1
            if tally.num_open == self._num_streams:
                tally.all_open.set()
        self.num_events += num_events
        tally.num_events += num_events
        if b"data: [DONE]" in text:
            tally.first_done.set()
            tally.num_done += 1
            self._transport.close()
            if tally.num_done == self._num_streams:
                tally.all_done.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run, between the moments when all streams are open and when the first ends."""

    tokens_per_s: float
    server_us_per_token: float  # CPU time of all the server's threads
    client_us_per_token: float
    events_per_read: float
    num_events: int
    num_expected: int


def request_of(args: argparse.Namespace, port: int, headers: str = "") -> bytes:
    """The bytes of one request for `args.tokens` tokens as a stream; header lines end in CRLF."""
    body: dict[str, object] = {"max_tokens": args.tokens, "stream": True, "ignore_eos": True}
    body |= {"temperature": 0}
    path = "/v1/completions"
    if args.endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        body["prompt"] = PROMPT
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    head += headers
    return head.encode() + b"content-length: %d\r\n\r\n" % len(payload) + payload


def _same(client: StreamClient) -> StreamClient:
    return client


def _no_headers(number: int) -> str:
    del number
    return ""


async def measure(
    args: argparse.Namespace,
    port: int,
    server: ServerProcess,
    headers_of: Callable[[int], str] = _no_headers,
) -> Figures:
    """Open all streams at once and read them to their ends; more headers by a stream's number."""
    loop = asyncio.get_running_loop()
    tally = Tally()
    requests = [request_of(args, port, headers_of(number)) for number in range(args.streams)]
    clients = [StreamClient(request, tally, args.streams) for request in requests]
    for client in clients:
        await loop.create_connection(partial(_same, client), "127.0.0.1", port)
    await tally.all_open.wait()
    started_s, server_s = time.monotonic(), server.cpu_seconds()
    own_s, before, reads = time.process_time(), tally.num_events, tally.num_reads
    await tally.first_done.wait()
    seconds, num = time.monotonic() - started_s, tally.num_events - before
    server_s, own_s = server.cpu_seconds() - server_s, time.process_time() - own_s
    reads = tally.num_reads - reads
    await tally.all_done.wait()
    num_extra = 1 if args.endpoint == "chat" else 0  # the role
    return Figures(
        tokens_per_s=num / seconds,
        server_us_per_token=1e6 * server_s / num,
        client_us_per_token=1e6 * own_s / num,
        events_per_read=num / max(reads, 1),
        num_events=tally.num_events,
        num_expected=args.streams * (args.tokens + num_extra),
    )


async def start_server(
    stack: ExitStack, module: str, args: argparse.Namespace, name: str, *more: str
) -> tuple[int, ServerProcess]:
    """Start the server of a module, which takes the flags of `flags`; return its port, too."""
    port = free_port()
    command = [sys.executable, "-m", module, "--serve", "--port", str(port), *more]
    command += ["--streams", str(args.streams), "--step-ms", str(args.step_ms)]
    command += ["--model", args.model] if args.model else []
    log = read_environment().cache_dir / "bench" / f"{name}.log"
    server = stack.enter_context(ServerProcess(command, log))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        await server.wait_ready(client, "/health/ready")
    return port, server


async def run_rounds(args: argparse.Namespace) -> list[Figures]:
    """Start the server, warm it up, and measure so many rounds."""
    with ExitStack() as stack:
        port, server = await start_server(stack, "app.bench.host", args, "host")
        return [await measure(args, port, server) for _ in range(args.rounds + 1)][1:]


def table(args: argparse.Namespace, figures: list[Figures]) -> str:
    """Return the rounds as Markdown, the median last."""
    rows = [
        f"{args.streams} {args.endpoint} streams, steps of {args.step_ms:g} ms, {args.tokens} "
        f"tokens each: at most {1000 * args.streams / max(args.step_ms, 1e-3):,.0f} tokens/s",
        "",
        "| round | tokens/s | server, µs of CPU a token | client | events a read | lost |",
        "|---|---|---|---|---|---|",
    ]
    ordered = sorted(figures, key=lambda figure: figure.tokens_per_s)
    named = [(str(number), figure) for number, figure in enumerate(figures, start=1)]
    for name, figure in [*named, ("median", ordered[len(ordered) // 2])]:
        rows.append(
            f"| {name} | {figure.tokens_per_s:,.0f} | {figure.server_us_per_token:.1f} "
            f"| {figure.client_us_per_token:.1f} | {figure.events_per_read:.1f} "
            f"| {figure.num_expected - figure.num_events} |"
        )
    return "\n".join(rows) + "\n"


def flags(
    description: str, *, streams: int, tokens: int, step_ms: float, rounds: int
) -> argparse.ArgumentParser:
    """Return a parser of how much is asked of how many servers that only keep time."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--streams", type=int, default=streams)
    parser.add_argument("--tokens", type=int, default=tokens, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=step_ms)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--model", help="whose tokenizer and template to use; the demo model's")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Parse the command line, run, print."""
    description = __doc__.split("\n\n")[0]
    parser = flags(description, streams=256, tokens=512, step_ms=10.0, rounds=3)
    parser.add_argument("--endpoint", choices=["chat", "completions"], default="chat")
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    sys.stdout.write(table(args, asyncio.run(run_rounds(args))))


if __name__ == "__main__":
    main()
