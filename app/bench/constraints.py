"""What structured output costs: CPU seconds a token with and without, in alternating pairs.

    scripts/bench-constraints --pairs 7

One server with the demo model; 16 requests at once, each with a schema of its own that was never
seen before, all cut at the same length. Counted is the CPU time of the server and of the process
that checks grammars, so waiting and other tenants of the machine hardly show.
"""

import argparse
import asyncio
import random
import statistics
import sys
from dataclasses import dataclass

import httpx

from app.bench.process import ServerProcess, free_port
from app.settings import read_environment

NUM_REQUESTS = 16


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: rounds of 16 requests of so many tokens."""

    num_rounds: int
    num_tokens: int


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        prog="bench-constraints",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=7, help="with and without (default 7)")
    parser.add_argument("--rounds", type=int, default=3, help="of 16 requests (default 3)")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (default 96)")
    parser.add_argument("model", nargs="?", help="default: the demo model")
    args = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve"]
    command += [args.model] if args.model else []
    log = read_environment().cache_dir / "bench" / "logs" / "constraints.log"
    load = Load(args.rounds, args.tokens)
    with ServerProcess([*command, "--port", str(port)], log) as server:
        pairs = asyncio.run(_measure(server, port, args.pairs, load))
    ratios = [with_ / without for with_, without in pairs]
    for with_, without in pairs:
        sys.stdout.write(f"{without * 1e6:.0f} -> {with_ * 1e6:.0f} µs a token\n")
    sys.stdout.write(
        f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f}-{max(ratios):.3f}\n"
    )


async def _measure(
    server: ServerProcess, port: int, num_pairs: int, load: Load
) -> list[tuple[float, float]]:
    rng = random.Random(0)
    pairs = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        await server.wait_ready(client, "/health")
        await _cost(client, server, load, rng, is_bound=True)  # what is made once
        for _ in range(num_pairs):
            with_ = await _cost(client, server, load, rng, is_bound=True)
            pairs.append((with_, await _cost(client, server, load, rng, is_bound=False)))
    return pairs


async def _cost(
    client: httpx.AsyncClient,
    server: ServerProcess,
    load: Load,
    rng: random.Random,
    *,
    is_bound: bool,
) -> float:
    """Return the server's CPU seconds a token over a few rounds."""
    before = server.cpu_seconds()
    num_tokens = 0
    for _ in range(load.num_rounds):
        bodies = [_body(rng, load.num_tokens, is_bound) for _ in range(NUM_REQUESTS)]
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=body) for body in bodies)
        )
        for answer in answers:
            answer.raise_for_status()
            num_tokens += answer.json()["usage"]["completion_tokens"]
    if num_tokens != load.num_rounds * NUM_REQUESTS * load.num_tokens:
        raise RuntimeError("an answer was not cut at its length")
    return (server.cpu_seconds() - before) / num_tokens


def _body(rng: random.Random, num_tokens: int, is_bound: bool) -> dict[str, object]:
    fields: dict[str, object] = {
        "messages": [{"role": "user", "content": f"Describe {rng.random()} people as JSON."}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0.7,
        "seed": rng.randrange(1 << 30),
    }
    if is_bound:
        schema = {"name": "people", "schema": _schema(rng)}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _schema(rng: random.Random) -> dict[str, object]:
    """A schema as people write them, of names never used before, whose answer has no short end."""

    def name() -> str:
        return "field_" + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    person = {
        name(): {"type": "string", "minLength": 20},
        name(): {"type": "integer", "minimum": 0, "maximum": 150},
        name(): {"enum": ["tea", "coffee", "water"]},
        name(): {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 5},
        name(): {"anyOf": [{"type": "number"}, {"type": "null"}]},
        name(): {"type": "boolean"},
    }
    item = {
        "type": "object",
        "properties": person,
        "required": list(person),
        "additionalProperties": False,
    }
    people = {"type": "array", "items": item, "minItems": 50}
    return {"type": "object", "properties": {"people": people}, "required": ["people"]}


if __name__ == "__main__":
    main()
