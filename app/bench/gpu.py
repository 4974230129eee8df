"""Everything that is measured on a GPU box, in one command: `scripts/gpu`.

    scripts/gpu                               all of it, in under nine minutes
    scripts/gpu --quick                       shorter answers, fewer sizes
    scripts/gpu --parts engine --models 8B --modes graphs fp8 --batches 1 32 256

Parts are processes of their own, one after the other, so that one that breaks the card's context
or runs out of time takes nothing else with it. Each prints a record as soon as it has one;
report.json and report.md are written anew with each. Needs Python, torch and Triton alone.
"""

import argparse
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.bench.report import Record, line_of, markdown

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tests", "card", "kernels", "engine", "peer")
TEST_FOLDERS = ("tests/gpu", "tests/model/kernels", "tests/model/test_choose_operations.py")
NO_GPU_TESTS = (
    "tests/model/kernels/test_interpreter.py",
    "tests/model/kernels/test_compile.py",
)
"""Of kernels without a card: they take minutes, and say nothing about this one."""
TEST_SECONDS = 100.0
KERNEL_SECONDS = 70.0
PEER_SECONDS = 60.0
EAGER_OUTPUT = 96  # tokens: a step's time shows as well, and eager steps are slow
ENTRY = "from app.cli import main; main()"

_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, object]] = {
    "8B": {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
           "tie_word_embeddings": False},
    "1B": {**_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
           "tie_word_embeddings": True},
    "tiny": {**_LLAMA3, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16, "tie_word_embeddings": False},
}  # fmt: skip
"""Llama 3.1 8B, Llama 3.2 1B, and what only shows that everything runs."""

MODES: dict[str, tuple[str, ...]] = {
    "graphs": (),
    "fp8": ("--quantization", "fp8", "--kv-cache-dtype", "fp8"),
    "fp8-weights": ("--quantization", "fp8"),
    "eager": ("--enforce-eager",),
    "invariant": ("--batch-invariant",),
    "cpu": ("--dtype", "bfloat16"),
}
"""Flags of each way to run; one that this version does not know is a fault of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A process that measures; `labels` go into each of its records."""

    what: str
    command: list[str]
    labels: Record
    seconds: float


class Report:
    """All records so far, in a folder, whole after each one."""

    def __init__(self, folder: Path, title: str) -> None:
        self.records: list[Record] = []
        self._folder = folder
        self._title = title
        self.card_file = folder / "card.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.card_file.unlink(missing_ok=True)  # of another run, maybe on another card

    def add(self, record: Record) -> None:
        self.records.append(record)
        if record["kind"] == "card":
            self.card_file.write_text(json.dumps(record) + "\n", "utf-8")
        sys.stderr.write(line_of(record) + "\n")
        sys.stderr.flush()
        text = json.dumps(self.records, indent=1)
        (self._folder / "report.json").write_text(text + "\n", "utf-8")
        (self._folder / "report.md").write_text(markdown(self.records, self._title), "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line says; 1 if anything failed."""
    args = _parser().parse_args(argv)
    report = Report(args.output, "arriero on a GPU")
    deadline_s = time.monotonic() + args.seconds
    if "tests" in args.parts and importlib.util.find_spec("pytest") is None:
        report.add({"kind": "tests", "what": "all", "summary": "not run: there is no pytest here"})
    for child in _children(args, report.card_file, deadline_s):
        left_s = deadline_s - time.monotonic()
        if left_s < 5:
            fault: Record = {"kind": "fault", "what": child.what, "error": "out of time"}
            report.add({**fault, **child.labels})
            continue
        run_child(child, min(child.seconds, left_s), report.add)
    sys.stdout.write(markdown(report.records, "arriero on a GPU"))
    return 1 if any(record["kind"] == "fault" for record in report.records) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu-report"), metavar="DIR",
        help="folder for report.json and report.md (gpu-report)")  # fmt: skip
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--models", nargs="+", choices=list(MODELS), default=["8B", "1B"], help="8B 1B")
    modes = ["graphs", "fp8", "eager"]
    add("--modes", nargs="+", choices=list(MODES), default=modes, help=" ".join(modes))
    add("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256], metavar="N")
    add("--input-len", type=int, default=512, metavar="N", help="tokens of a prompt (512)")
    add("--output-len", type=int, default=512, metavar="N", help="tokens of an answer (512)")
    add("--prefill-len", type=int, nargs="*", default=[512, 2048, 8192], metavar="N",
        help="prompts alone (512 2048 8192)")  # fmt: skip
    add("--quick", action="store_true", help="answers of 128 tokens, fewer kernels")
    add("--profile", action="store_true", help="what decode steps are made of, kernel by kernel")
    add("--seconds", type=float, default=525.0, help="of everything (525)")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: does it run at all?")
    add("--temperature", type=float, default=0.0, metavar="T", help="of the engine's samples (0)")
    add("--tests", nargs="+", default=list(TEST_FOLDERS), metavar="PATH", help="for pytest")
    add("--serve-arg", action="append", default=[], metavar="ARG",
        help="for the engine, as in --serve-arg=--max-num-batched-tokens=8192")  # fmt: skip
    return parser


def write_config(name: str, folder: Path) -> Path:
    """Write a model's config.json; return the folder that is then loaded as a dummy."""
    model = folder / "models" / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[name], indent=1) + "\n", "utf-8")
    return model


def _children(args: argparse.Namespace, card_file: Path, deadline_s: float) -> Iterator[Child]:
    """Yield the processes in order: what says most comes before what may not be reached."""
    if "tests" in args.parts and importlib.util.find_spec("pytest") is not None:
        yield from _tests(args)
    first = write_config(args.models[0], args.output) / "config.json"
    small = ["--tiny"] if args.models[0] == "tiny" else ["--quick"] if args.quick else []
    bench = [sys.executable, "-m", "model.bench", "--device", args.device]
    bench += ["--config", str(first), *small]
    needs_card = {"card", "kernels", "engine"} & set(args.parts)
    if needs_card:
        yield Child(what="card", command=[*bench, "--card-only"], labels={}, seconds=60)
    if "engine" in args.parts:
        yield from _engines(args, card_file, deadline_s)
    if "kernels" in args.parts:
        limit = ["--seconds", str(KERNEL_SECONDS - 10), "--card", str(card_file)]
        yield Child(what="kernels", command=[*bench, *limit], labels={}, seconds=KERNEL_SECONDS)
    if "peer" in args.parts:
        yield _peer(args)


def _engines(args: argparse.Namespace, card_file: Path, deadline_s: float) -> Iterator[Child]:
    num_left = len(args.models) * len(args.modes)
    reserve_s = KERNEL_SECONDS * ("kernels" in args.parts) + PEER_SECONDS * ("peer" in args.parts)
    for model in args.models:
        folder = write_config(model, args.output)
        for mode in args.modes:
            left_s = max(20.0, deadline_s - time.monotonic() - reserve_s)
            # An 8B model takes about twice as long as a small one.
            seconds = left_s if num_left == 1 else max(20.0, 2 * left_s / (num_left + 1))
            num_left -= 1
            num_output = 128 if args.quick else args.output_len
            if mode == "eager":
                num_output = min(num_output, EAGER_OUTPUT)
            command = [sys.executable, "-c", ENTRY, "bench", "engine", str(folder), "--json"]
            command += ["--load-format", "dummy", "--device", args.device, "--batch-size"]
            command += [str(batch) for batch in args.batches]
            command += ["--input-len", str(args.input_len), "--output-len", str(num_output)]
            command += ["--prefill-len", *map(str, args.prefill_len)]
            command += ["--temperature", str(args.temperature)]
            command += ["--profile"] * args.profile
            command += ["--seconds", str(seconds - 10), *MODES[mode], *args.serve_arg]
            if card_file.exists():
                command += ["--card", str(card_file)]
            labels: Record = {"model": model, "mode": mode}
            yield Child(what="engine", command=command, labels=labels, seconds=seconds)


def _peer(args: argparse.Namespace) -> Child:
    model = write_config(args.models[0], args.output)
    batches = [batch for batch in args.batches if batch in (1, 32, 256)] or args.batches[:1]
    num_output = 128 if args.quick else min(args.output_len, 256)
    command = [sys.executable, "-m", "model.bench.transformers_batch", "--device", args.device]
    command += ["--config", str(model / "config.json"), "--batch-size", *map(str, batches)]
    command += ["--input-len", str(args.input_len), "--output-len", str(num_output)]
    command += ["--seconds", str(PEER_SECONDS / 2)]
    labels: Record = {"model": args.models[0], "mode": "transformers"}
    return Child(what="transformers", command=command, labels=labels, seconds=PEER_SECONDS)


def _tests(args: argparse.Namespace) -> Iterator[Child]:
    for path in args.tests:
        if not (ROOT / path).exists():
            continue
        # A warning of another version's torch is no reason to fail here.
        command = [sys.executable, "-m", "pytest", "--maxfail=10", "-W", "default", "-p"]
        command += ["no:cacheprovider", "--tb=short", path]
        command += [f"--ignore={other}" for other in NO_GPU_TESTS]
        yield Child(what=path, command=command, labels={}, seconds=TEST_SECONDS)


def run_child(child: Child, seconds: float, add: Callable[[Record], None]) -> None:
    """Run a child and hand on its records; one that fails or takes too long leaves a fault.

    A line that is no record is pytest's or an error's: the last of them is the outcome.
    """
    started_s = time.monotonic()
    said: list[str] = []
    with subprocess.Popen(
        child.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines))
        reader.start()
        is_whole = False
        try:
            is_whole = _take(child, lines, started_s + seconds, add, said)
        finally:
            if not is_whole:
                os.killpg(process.pid, signal.SIGKILL)
            reader.join()
    took_s = time.monotonic() - started_s
    if child.what.startswith("tests"):
        summary = _last(said) if is_whole else "out of time"
        add({"kind": "tests", "what": child.what, "summary": summary, "seconds": took_s})
    if not is_whole or process.returncode:
        error = f"ended with {process.returncode}: {_last(said)}"
        error = error if is_whole else f"killed after {took_s:.0f} s"
        add({"kind": "fault", "what": child.what, "error": error, **child.labels})


def _take(
    child: Child,
    lines: "queue.SimpleQueue[str | None]",
    deadline_s: float,
    add: Callable[[Record], None],
    said: list[str],
) -> bool:
    """Hand on records until the pipe is at its end, gather other lines; False when it is late."""
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            return False
        if line is None:
            return True
        # What a library draws without an end of line may stand before a record.
        _, brace, rest = line.partition('{"kind"')
        if brace:
            add({**json.loads(brace + rest), **child.labels})
        elif line:
            said.append(line)
            sys.stderr.write(f"  {line}\n")


def _read(pipe: Iterator[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in pipe:
        lines.put(line.rstrip())
    lines.put(None)


def _last(lines: list[str]) -> str:
    """Return what a child ended with: of a usage error the line before its hint."""
    spoken = [line for line in lines if not line.startswith("`")]
    return spoken[-1][:300] if spoken else "no word"


if __name__ == "__main__":
    sys.exit(main())
