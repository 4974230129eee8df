"""Measure a card's rates and every kernel against them; a JSON object a line, the card's first.

python3 -m model.bench                       at the sizes of Llama 3.1 8B
python3 -m model.bench --config FILE --quick --kernels decode
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from model.bench.card import Card, measure_card
from model.bench.cases import Case, Sizes, cases_of
from model.bench.timing import num_copies, seconds_of
from model.config import ModelConfig
from model.operations import choose_operations
from model.weights.fields import read_json
from model.weights.huggingface import config_from_hf

QUICK = Sizes(tokens=(1, 256, 2048), batches=(1, 32, 256), contexts=(768,), prompts=(512, 2048))
TINY = Sizes(tokens=(1, 4), batches=(1, 2), contexts=(32,), prompts=(16,))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="model.bench", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--config", type=Path, required=True, help="config.json whose sizes to take")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="fewer sizes")
    add("--tiny", action="store_true", help="sizes that only show that it runs")
    add("--card", type=Path, metavar="FILE", help="its rates as an earlier run printed them")
    add("--card-only", action="store_true", help="the card's rates alone")
    add("--kernels", default="", help="only those whose name contains this")
    add("--seconds", type=float, default=120.0, help="begin no case after this time")
    args = parser.parse_args()
    deadline_s = time.monotonic() + args.seconds
    device = torch.device(args.device)
    with torch.inference_mode():
        small = {"copy_bytes": 1 << 22, "side": 128} if args.tiny else {}
        if args.card is None:
            card = measure_card(device, **small)
            _print({"kind": "card", **dataclasses.asdict(card)})
        else:
            fields = json.loads(args.card.read_text("utf-8"))
            card = Card(**{field.name: fields[field.name] for field in dataclasses.fields(Card)})
        if args.card_only:
            return
        config = config_from_hf(read_json(args.config), str(args.config))
        sizes = TINY if args.tiny else QUICK if args.quick else Sizes()
        measure_kernels(config, sizes, card, device, args.kernels, deadline_s)


def measure_kernels(
    config: ModelConfig,
    sizes: Sizes,
    card: Card,
    device: torch.device,
    wanted: str,
    deadline_s: float,
) -> None:
    """Print a line for each case; one that fails says so, and the next is tried."""
    for case in cases_of(config, choose_operations(config, device), sizes, device):
        if wanted not in case.name:
            continue
        if time.monotonic() > deadline_s:
            _print({"kind": "fault", "what": "kernels", "error": "out of time"})
            return
        try:
            calls = [case.make() for _ in range(num_copies(case.num_bytes, device))]
            seconds = seconds_of(calls, device, is_captured=case.is_captured)
        except Exception as error:  # compilers have errors of their own; it is this row's alone
            _print({"kind": "fault", "what": f"{case.name}, {case.size}", "error": _line(error)})
            continue
        finally:
            calls = []
        _print(
            {
                "kind": "kernel",
                "name": case.name,
                "size": case.size,
                "us": seconds * 1e6,
                "limit_us": (limit_s := limit_of(case, card)) * 1e6,
                "share": limit_s / seconds,
                "gb_per_s": case.num_bytes / seconds / 1e9,
                "tflops_per_s": case.flops / seconds / 1e12,
            }
        )


def limit_of(case: Case, card: Card) -> float:
    """Return the least time in seconds that the card could take."""
    rate = card.fp8_flops_per_s if case.is_fp8 else card.flops_per_s
    return max(case.num_bytes / card.bytes_per_s, case.flops / (rate or card.flops_per_s))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _print(record: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
