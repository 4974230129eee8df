"""What is measured on a server that runs: the rows of the table, from prompts never seen before.

Every prompt is drawn afresh, so that no prefix cache of any server can help.
"""

import asyncio
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from app.bench.client import Completion
from app.bench.peer import Model, WireRequest
from app.bench.wire import Address, exchange

TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A column of the table."""

    key: str
    title: str
    is_rate: bool = True  # more is better
    num_decimals: int = 0


METRICS = (
    Metric(key="prefill", title="prefill 512, tok/s"),
    Metric(key="decode", title="one stream, tok/s", num_decimals=1),
    Metric(key="batch_8", title="8 concurrent, tok/s"),
    Metric(key="batch_32", title="32 concurrent, tok/s"),
    Metric(key="start", title="start to first token, s", is_rate=False, num_decimals=1),
    Metric(key="resident", title="resident, MiB", is_rate=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is asked in one turn."""

    prefill_tokens: int = 512
    num_prefills: int = 3
    decode_prompt: int = 32
    decode_tokens: int = 128
    num_decodes: int = 2
    batches: tuple[int, ...] = (8, 32)
    batch_prompt: int = 128
    batch_tokens: int = 64


QUICK = Workload(num_prefills=1, decode_tokens=16, num_decodes=1, batch_prompt=16, batch_tokens=8)
"""Enough to see that everything runs; its figures mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Sends fresh random prompts to one server."""

    address: Address
    model: Model
    rng: random.Random
    request: Callable[[list[int], int], WireRequest]

    async def ask(self, num_prompt: int, num_output: int) -> Completion:
        """Complete a prompt nobody has seen. Raises PeerFault."""
        ids = self.rng.choices(range(self.model.first_id, self.model.vocab_size), k=num_prompt)
        answer = await exchange(self.address, self.request(ids, num_output), TIMEOUT_S)
        return answer.completion(num_output)


async def measure(asker: Asker, workload: Workload) -> dict[str, float]:
    """Take the rates of one turn; keys are those of METRICS. Raises PeerFault."""
    await asker.ask(workload.prefill_tokens, 8)  # warms allocators and compiled kernels
    prefills = [await asker.ask(workload.prefill_tokens, 1) for _ in range(workload.num_prefills)]
    decodes = [
        await asker.ask(workload.decode_prompt, workload.decode_tokens)
        for _ in range(workload.num_decodes)
    ]
    figures = {
        "prefill": workload.prefill_tokens
        / statistics.median(answer.first_token_delay_s for answer in prefills),
        "decode": statistics.median(answer.decode_tokens_per_s for answer in decodes),
    }
    for size in workload.batches:
        answers = await asyncio.gather(
            *(asker.ask(workload.batch_prompt, workload.batch_tokens) for _ in range(size))
        )
        figures[f"batch_{size}"] = output_rate(answers)
    return figures


def output_rate(answers: list[Completion]) -> float:
    """Output tokens a second from the first request to the last answer, prompts included."""
    begun_s = min(answer.started_s for answer in answers)
    ended_s = max(answer.ended_s for answer in answers)
    return sum(answer.num_output_tokens for answer in answers) / (ended_s - begun_s)
