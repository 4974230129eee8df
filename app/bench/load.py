"""Load on a server: which requests, when each is sent, and what came of it.

Requests arrive by a clock (a rate, in bursts or not) or as fast as a cap on those open at once lets
them. Prompts are random, but for a beginning that all may share.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from app.bench.client import Completion
from app.bench.peer import PeerFault, WireRequest
from app.bench.wire import Address, Exchange, exchange

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FIRST_ID = 300  # ids below are special, or bytes, in most vocabularies
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line"
)  # a token each, in most vocabularies


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one request looks like. Lengths vary evenly by `range_ratio` around what is said."""

    model: str
    endpoint: str = COMPLETIONS
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0  # tokens that all prompts begin with, beside `input_len`
    vocab_size: int = 30_000
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When requests are sent. Without a rate all at once, as far as `max_concurrency` allows."""

    num_prompts: int
    request_rate: float = math.inf
    burstiness: float = 1.0  # 1: Poisson; below: bursts; above: more even
    max_concurrency: int | None = None
    timeout_s: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request that is ready to be sent."""

    request: WireRequest
    num_input: int  # tokens, as far as the client knows
    num_output: int


@dataclass(slots=True, kw_only=True)
class Sent:
    """A request on its way, and what came of it in the end. Instants are of the monotonic clock."""

    draft: Draft
    due_s: float  # when it was to be sent
    exchange: Exchange | None = None
    fault: str | None = None
    completion: Completion | None = None


class Drafts:
    """Draws requests, no two alike but for the beginning that they share."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._rng = random.Random(seed)
        self._words = WORDS.split()
        self._prefix = self._tokens(shape.prefix_len)

    def draw(self) -> Draft:
        """Return the next one."""
        shape = self._shape
        num_output = self._vary(shape.output_len)
        tokens = [*self._prefix, *self._tokens(self._vary(shape.input_len))]
        body: dict[str, object] = {
            "model": shape.model,
            "max_tokens": num_output,
            "temperature": shape.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if shape.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": num_output}
        if shape.endpoint == CHAT:
            text = " ".join(self._words[token % len(self._words)] for token in tokens)
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = tokens
        request = WireRequest(path=shape.endpoint, body=body | shape.extra_body)
        return Draft(request=request, num_input=len(tokens), num_output=num_output)

    def _tokens(self, count: int) -> list[int]:
        first = min(FIRST_ID, self._shape.vocab_size // 2)
        return self._rng.choices(range(first, self._shape.vocab_size), k=count)

    def _vary(self, length: int) -> int:
        spread = int(length * self._shape.range_ratio)
        return max(1, self._rng.randint(length - spread, length + spread))


def arrivals(pace: Pace, seed: int) -> Iterator[float]:
    """Yield when each request is due, in seconds from the start: gaps of a gamma distribution."""
    if math.isinf(pace.request_rate):
        yield from itertools.repeat(0.0, pace.num_prompts)
        return
    rng = random.Random(seed)
    scale_s = 1 / (pace.request_rate * pace.burstiness)
    due_s = 0.0
    for _ in range(pace.num_prompts):
        yield due_s
        due_s += rng.gammavariate(pace.burstiness, scale_s)


async def put_load(
    address: Address, drafts: Drafts, pace: Pace, seed: int, on_end: Callable[[], None]
) -> tuple[list[Sent], float]:
    """Send all requests in their time and read every answer to its end; a fault is kept with it.

    Answers are read as events only when the last has come. `on_end` is called at each end. Returns
    the client's own CPU seconds beside, up to the last end.
    """
    ready = [(draft, due_s) for due_s in arrivals(pace, seed) for draft in (drafts.draw(),)]
    gate = asyncio.Semaphore(pace.max_concurrency or pace.num_prompts)
    begun_s, cpu_s = time.monotonic(), time.process_time()
    sent = [Sent(draft=draft, due_s=begun_s + due_s) for draft, due_s in ready]

    async def send(each: Sent) -> None:
        async with gate:
            try:
                each.exchange = await exchange(address, each.draft.request, pace.timeout_s)
            except PeerFault as fault:
                each.fault = str(fault)
        on_end()

    tasks = []
    for each in sent:
        wait_s = each.due_s - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(send(each)))
    await asyncio.gather(*tasks)
    cpu_s = time.process_time() - cpu_s
    for each in sent:
        _read(each, has_fixed_length="ignore_eos" in each.draft.request.body)
    return sent, cpu_s


def _read(each: Sent, *, has_fixed_length: bool) -> None:
    if each.exchange is None:
        return
    try:
        num_output = each.draft.num_output if has_fixed_length else None
        each.completion = each.exchange.completion(num_output)
    except PeerFault as fault:
        each.fault = str(fault)
