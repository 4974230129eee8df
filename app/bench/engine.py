"""`arriero bench engine`: the engine alone, offline, batch by batch, against the card's limits.

What it says comes as records, one as soon as it is known: dicts of numbers and words that end as
lines of JSON and rows of tables. Imports nothing of HTTP or text: it also runs where neither is.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from app.bench.limits import CardRates, Limits
from app.bench.offline import OfflineEngine, RunFailed, Trace
from app.bench.report import Record, markdown
from app.engine.collector import settle_collector
from model.config import LoadOptions
from model.loader import ModelInfo, load_runner
from model.runner import ModelRunner

Emit = Callable[[Record], None]
_Work = tuple[str, Callable[[int], None], int]  # what it is, what measures it, its size
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_LAYER_BYTES = {"fp8": 1.0, "int8": 1.0, "int4": 0.625}  # with the scales of blocks
_HEAD_BYTES = {"int8": 1.0, "int4": 1.0625}
NUM_WARM_TOKENS = 16
NUM_PREFILLS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of the engine. Nothing is begun after `seconds`, counted from the start."""

    batches: tuple[int, ...]
    num_prompt: int
    num_output: int
    prefills: tuple[int, ...] = ()
    temperature: float = 0.0
    seconds: float | None = None
    seed: int = 0
    is_profiled: bool = False

    @property
    def longest(self) -> int:
        warm = NUM_WARM_TOKENS + 1
        return max(warm, self.num_prompt + self.num_output, *(n + 1 for n in self.prefills))


def run(args: argparse.Namespace, options: LoadOptions) -> int:
    """Measure what the flags say; print lines of JSON with `--json`, else a table at the end."""
    workload = Workload(
        batches=tuple(args.batch_size),
        num_prompt=args.input_len,
        num_output=args.output_len,
        prefills=tuple(args.prefill_len),
        temperature=args.temperature or 0.0,
        seconds=args.seconds,
        seed=options.seed,
        is_profiled=args.profile,
    )
    records: list[Record] = []

    def emit(record: Record) -> None:
        records.append(record)
        if args.json:
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()

    rates = read_rates(args.card) if args.card else None
    if rates is None and not args.json:
        sys.stderr.write("without --card FILE no figure is held against a limit\n")
    measure(options, workload, rates, emit)
    if not args.json:
        sys.stdout.write(markdown(records))
    if args.output_json is not None:
        args.output_json.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    return 1 if any(record["kind"] == "fault" for record in records) else 0


def read_rates(file: Path) -> CardRates:
    """Read the line of a card that `python -m model.bench` has printed. Raises OSError."""
    fields = json.loads(file.read_text("utf-8").splitlines()[0])
    fp8 = fields.get("fp8_flops_per_s")
    return CardRates(
        bytes_per_s=float(fields["bytes_per_s"]),
        flops_per_s=float(fields["flops_per_s"]),
        fp8_flops_per_s=None if fp8 is None else float(fp8),
    )


def measure(options: LoadOptions, workload: Workload, rates: CardRates | None, emit: Emit) -> None:
    """Load a model, measure it, emit records. Raises ModelError; faults of a batch are records."""
    options = _with_room(options, workload)
    started_s = time.monotonic()
    age_s = process_age_s()
    info, runner = load_runner(options)
    load_s = time.monotonic() - started_s
    settle_collector()
    engine = OfflineEngine(runner, seed=workload.seed)
    first = engine.run(1, NUM_WARM_TOKENS, 1)
    start: Record = {
        "kind": "start",
        "model": info.source,
        "precision": info.precision.name,
        "device": info.plan.device,
        "load_s": load_s,
        "first_token_s": time.monotonic() - started_s,
        "first_delay_s": first.first_delays_s[0],
    }
    if age_s is not None:
        start["start_to_first_token_s"] = age_s + time.monotonic() - started_s
    emit(start)
    bench = _Bench(info, runner, engine, workload, limits_of(info, rates), emit)
    bench.run(started_s)


def limits_of(info: ModelInfo, rates: CardRates | None) -> Limits | None:
    """Return the limits of a loaded model, if it is known what the card can do."""
    if rates is None:
        return None
    precision = info.precision
    dtype_bytes = _DTYPE_BYTES[precision.dtype]
    return Limits(
        config=info.config,
        rates=rates,
        layer_bytes=_LAYER_BYTES.get(precision.quantization, dtype_bytes),
        head_bytes=_HEAD_BYTES.get(precision.quantization, dtype_bytes),
        kv_bytes_per_token=info.plan.kv_bytes_per_token,
    )


def _with_room(options: LoadOptions, workload: Workload) -> LoadOptions:
    """Have as many rows and as long a context as is asked for, unless the flags say otherwise."""
    return dataclasses.replace(
        options,
        max_num_seqs=options.max_num_seqs or max(workload.batches),
        max_model_len=options.max_model_len or workload.longest,
    )


class _Bench:
    """One loaded model and what is asked of it."""

    def __init__(
        self,
        info: ModelInfo,
        runner: ModelRunner,
        engine: OfflineEngine,
        workload: Workload,
        limits: Limits | None,
        emit: Emit,
    ) -> None:
        self._info = info
        self._runner = runner
        self._engine = engine
        self._workload = workload
        self._limits = limits
        self._emit = emit

    def run(self, started_s: float) -> None:
        """Measure everything for which there is time."""
        before_s = time.monotonic()
        num_graphs = self._runner.capture_all()
        self._emit(
            {
                "kind": "graphs",
                "num_graphs": num_graphs,
                "seconds": time.monotonic() - before_s if num_graphs else 0.0,
            }
        )
        work: list[_Work] = [
            (f"batch {batch}", self._batch, batch) for batch in self._workload.batches
        ]
        work += [(f"prompt of {size}", self._prefill, size) for size in self._workload.prefills]
        seconds = self._workload.seconds
        for what, measure_one, size in _watched(work):
            if seconds is not None and time.monotonic() - started_s > seconds:
                self._emit({"kind": "fault", "what": what, "error": "out of time"})
                continue
            try:
                measure_one(size)
            except RunFailed as error:
                self._emit({"kind": "fault", "what": what, "error": str(error)})
        self._emit(self._memory())

    def _batch(self, batch: int) -> None:
        workload = self._workload
        sizes = (workload.num_prompt, workload.num_output)
        warm_sizes = (min(NUM_WARM_TOKENS, size) for size in sizes)
        self._engine.run(batch, *warm_sizes, temperature=workload.temperature)
        trace = self._engine.run(batch, *sizes, temperature=workload.temperature)
        self._emit({"kind": "batch", "batch": batch, **self._figures(batch, trace)})
        if workload.is_profiled:
            self._profile(batch)

    def _profile(self, batch: int) -> None:
        """Run the batch once more and say what its steps are made of."""
        from model.bench.steps import NUM_STEPS, StepProfile

        workload, profile = self._workload, StepProfile(self._runner.device)
        self._engine.run(
            batch, workload.num_prompt, workload.num_output, temperature=workload.temperature,
            watch=profile.watch,
        )  # fmt: skip
        lines = list(profile.lines())
        if not lines:
            error = f"fewer than {NUM_STEPS} steps in which all decode: raise --output-len"
            self._emit({"kind": "fault", "what": f"profile of batch {batch}", "error": error})
        for name, launches, us in lines:
            record: Record = {"batch": batch, "name": name, "launches": launches, "us": us}
            self._emit({"kind": "step", **record})

    def _figures(self, batch: int, trace: Trace) -> Record:
        delays_s = trace.first_delays_s
        figures: Record = {
            "num_prompt": trace.num_prompt,
            "num_output": trace.num_output,
            "num_tokens": sum(trace.num_tokens.values()),
            "ttft_s": statistics.median(delays_s),
            "ttft_max_s": delays_s[-1],
            "prefill_tokens_per_s": batch * trace.num_prompt / delays_s[-1],
            "output_tokens_per_s": trace.output_tokens_per_s,
        }
        if (window := trace.window()) is not None:
            figures |= {
                "decode_tokens_per_s": window.tokens_per_s,
                "step_ms": 1000 * window.median_step_s,
                "mean_context": window.mean_context,
                "num_steps": window.num_steps,
            }
        if self._limits is None:
            return figures
        whole_s = self._limits.whole_s(batch, trace.num_prompt, trace.num_output)
        figures["output_share"] = whole_s / trace.seconds
        figures["prefill_share"] = self._limits.prefill_s(trace.num_prompt, batch) / delays_s[-1]
        if window is not None:
            limit_s = self._limits.decode_s(batch, window.mean_context)
            figures["limit_step_ms"] = 1000 * limit_s
            figures["decode_share"] = window.tokens_per_s * limit_s / batch
        return figures

    def _prefill(self, num_tokens: int) -> None:
        self._engine.run(1, num_tokens, 1)
        delays_s = [
            self._engine.run(1, num_tokens, 1).first_delays_s[0] for _ in range(NUM_PREFILLS)
        ]
        seconds = statistics.median(delays_s)
        record: Record = {
            "kind": "prefill",
            "num_prompt": num_tokens,
            "ttft_s": seconds,
            "prefill_tokens_per_s": num_tokens / seconds,
        }
        if self._limits is not None:
            limit_s = self._limits.prefill_s(num_tokens)
            record |= {"limit_s": limit_s, "prefill_share": limit_s / seconds}
        self._emit(record)

    def _memory(self) -> Record:
        # Imported here: it measures with torch, which the flags alone do not need.
        from model.bench.card import peak_bytes

        plan = self._info.plan
        return {
            "kind": "memory",
            "weights_bytes": plan.weights_bytes,
            "kv_cache_bytes": plan.kv_cache_bytes,
            "workspace_bytes": plan.workspace_bytes,
            "logits_bytes": plan.logits_bytes,
            "graphs_bytes": plan.graphs_bytes,
            "planned_bytes": plan.planned_bytes,
            **peak_bytes(plan.device),
        }


def _watched(work: Sequence[_Work]) -> Iterable[_Work]:
    """Draw a bar if anybody is there to see it, and tqdm to draw it."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return work
    from tqdm import tqdm

    bar: Iterable[_Work] = tqdm(work, unit="run", leave=False)
    return bar


def process_age_s() -> float | None:
    """Return the seconds since this process was started, None where the kernel does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return age_s if 0 <= age_s < 3600 else None
