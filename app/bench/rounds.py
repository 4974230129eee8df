"""The run: in every round each peer has one turn, in an order that moves on from round to round.

A turn is a fresh server with the machine to itself: nothing idle beside it takes memory or spins.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import httpx

from app.bench.peer import Launch, Model, Peer, PeerFault, Workplace
from app.bench.process import ServerProcess, free_port
from app.bench.wire import Address
from app.bench.workload import Asker, Workload, measure

Log = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Results:
    """What each peer reached, a list of turns for each, and why some have none."""

    turns: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is to be run."""

    workload: Workload
    num_rounds: int
    num_threads: int
    seed: int = 0


def order_of(peers: Sequence[Peer], round_number: int) -> list[Peer]:
    """Return the turns of a round: everybody is first, last and in between equally often."""
    start = round_number % len(peers)
    return [*peers[start:], *peers[:start]]


def run_rounds(
    model: Model, peers: Sequence[Peer], workplace: Workplace, plan: Plan, log: Log
) -> Results:
    """Give every peer its turns. A fault ends the part of that peer alone and is kept."""
    results = Results()
    prepared = {}
    for peer in peers:
        try:
            log(f"{model.name}: preparing {peer.name}")
            prepared[peer.name] = peer.prepare(model, workplace)
        except PeerFault as fault:
            log(f"{model.name}: {peer.name}: {fault}")
            results.faults[peer.name] = str(fault)
    rng = random.Random(plan.seed)
    for number in range(plan.num_rounds):
        for peer in order_of(peers, number):
            if peer.name in results.faults:
                continue
            launch = Launch(
                model=prepared[peer.name], port=free_port(), num_threads=plan.num_threads
            )
            turn = _turn(peer, launch, model, workplace, plan.workload, rng)
            try:
                figures = asyncio.run(turn)
            except PeerFault as fault:
                results.faults[peer.name] = str(fault)
                log(f"{model.name}, round {number + 1}: {peer.name}: {fault}")
                continue
            results.turns.setdefault(peer.name, []).append(figures)
            shown = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
            log(f"{model.name}, round {number + 1}: {peer.name}: {shown}")
    return results


async def _turn(
    peer: Peer,
    launch: Launch,
    model: Model,
    workplace: Workplace,
    workload: Workload,
    rng: random.Random,
) -> dict[str, float]:
    log = workplace.cache / "logs" / f"{model.name}-{peer.name.replace(' ', '-')}.log"
    url = f"http://127.0.0.1:{launch.port}"
    request = partial(peer.request, launch.model)
    asker = Asker(address=Address.parse(url), model=model, rng=rng, request=request)
    with ServerProcess(peer.command(launch, workplace), log) as server:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            await server.wait_ready(client, peer.ready_path)
        first = await asker.ask(8, 1)
        figures = await measure(asker, workload)
        figures["start"] = first.first_token_s - server.started_s
        figures["resident"] = server.resident_bytes() / 2**20
        return figures
