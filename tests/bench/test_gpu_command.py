"""`scripts/gpu` on a CPU with a tiny model: its report, its faults, and what it may not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.bench.gpu import Child, main, run_child
from app.bench.report import markdown

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--models", "tiny", "--modes", "cpu", "--batches", "1", "3"]
TINY += ["--input-len", "8", "--output-len", "16", "--prefill-len", "32"]
TINY += ["--serve-arg=--kv-cache-memory-bytes=1000000"]
NOT_NEEDED = (
    "fastapi", "starlette", "uvicorn", "pydantic", "llguidance", "prometheus_client", "openai",
    "hypothesis", "sentencepiece", "httpx", "jinja2", "tqdm", "tokenizers", "transformers",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder and the records of one run of all parts but the peer."""
    folder = tmp_path_factory.mktemp("gpu")
    parts = ["--parts", "card", "engine", "kernels", "--output", str(folder)]
    assert main([*TINY, "--profile", *parts]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def of(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def test_report_holds_every_part(report):
    _, records = report
    kinds = [record["kind"] for record in records]
    assert kinds[:3] == ["card", "start", "graphs"]
    assert {"batch", "prefill", "memory", "kernel"} <= set(kinds)
    assert "fault" not in kinds


def test_batches_have_the_tokens_that_were_asked_for(report):
    batches = of(report[1], "batch")
    assert [(batch["batch"], batch["num_tokens"]) for batch in batches] == [(1, 16), (3, 48)]
    assert all((batch["model"], batch["mode"]) == ("tiny", "cpu") for batch in batches)
    for batch in batches:
        assert batch["mean_context"] == pytest.approx(8 + 8.5, abs=1)
        assert batch["decode_share"] > 0
        assert 0 < batch["ttft_s"] <= batch["ttft_max_s"]


def test_steps_are_profiled(report):
    steps = of(report[1], "step")
    assert {each["batch"] for each in steps} == {1, 3}
    whole = [each for each in steps if each["name"] == "all"]
    assert len(whole) == 2
    for each in steps:
        of_all = next(all_ for all_ in whole if all_["batch"] == each["batch"])
        assert 0 < each["us"] <= of_all["us"]
        assert 0 < each["launches"] <= of_all["launches"]


def test_answers_too_short_to_profile_are_a_fault(tmp_path):
    line = [*TINY, "--output-len", "8", "--profile", "--parts", "engine", "--output", str(tmp_path)]
    assert main(line) == 1
    records = json.loads((tmp_path / "report.json").read_text())
    assert not of(records, "step")
    faults = of(records, "fault")
    assert [fault["what"] for fault in faults[:2]] == ["profile of batch 1", "profile of batch 3"]
    assert all("raise --output-len" in str(fault["error"]) for fault in faults[:2])
    assert len(of(records, "batch")) == 2


def test_kernels_have_limits(report):
    kernels = of(report[1], "kernel")
    assert {"add_rms_norm", "silu_mul", "gate_up product"} <= {each["name"] for each in kernels}
    assert all(each["share"] == pytest.approx(each["limit_us"] / each["us"]) for each in kernels)


def test_table_shows_every_batch(report):
    folder, records = report
    text = (folder / "report.md").read_text()
    assert text == markdown(records, "arriero on a GPU")
    assert text.count("| tiny | cpu | 1 |") == 1
    assert "## Kernels" in text


def test_unknown_mode_is_a_fault_and_stops_nobody(tmp_path):
    modes = ["--modes", "invariant", "cpu", "--parts", "engine", "--output", str(tmp_path)]
    if main([*TINY, *modes, "--serve-arg=--no-such-flag"]) != 1:
        pytest.fail("a flag that nobody knows was taken")
    faults = of(json.loads((tmp_path / "report.json").read_text()), "fault")
    assert [fault["mode"] for fault in faults] == ["invariant", "cpu"]
    assert "means nothing here" in str(faults[1]["error"])


def test_time_that_is_over_is_said_of_each_part(tmp_path):
    assert main([*TINY, "--seconds", "0", "--parts", "card", "engine", "--output", str(tmp_path)])
    faults = of(json.loads((tmp_path / "report.json").read_text()), "fault")
    assert [fault["error"] for fault in faults] == ["out of time", "out of time"]


def run_one(code: str, seconds: float = 60.0, what: str = "part") -> list[dict]:
    records: list[dict] = []
    child = Child(what=what, command=[sys.executable, "-c", code], labels={"mode": "m"}, seconds=60)
    run_child(child, seconds, records.append)
    return records


def test_records_before_an_end_by_force_are_kept():
    code = 'import os; print(\'{"kind": "a"}\', flush=True); os.kill(os.getpid(), 9)'
    kept, fault = run_one(code)
    assert kept == {"kind": "a", "mode": "m"}
    assert "ended with -9" in fault["error"]


def test_record_behind_a_progress_bar_is_found():
    (kept,) = run_one("print('50%', end=' '); print('{\"kind\": \"a\"}')")
    assert kept["kind"] == "a"


def test_child_that_takes_too_long_is_ended():
    code = 'import threading; print(\'{"kind": "a"}\', flush=True); threading.Event().wait()'
    kept, fault = run_one(code, seconds=2.0)
    assert kept["kind"] == "a"
    assert "killed after" in fault["error"]


def test_outcome_of_tests_is_their_last_line():
    (outcome,) = run_one("print('F.'); print('1 failed, 1 passed')", what="tests/gpu")
    assert outcome["summary"] == "1 failed, 1 passed"


def test_engine_needs_no_library_of_http_or_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_tiny_config()))
    code = f"""
import sys
for name in {NOT_NEEDED!r}:
    sys.modules[name] = None
from app.cli import main
main(["bench", "engine", {str(tmp_path)!r}, "--load-format", "dummy", "--dtype", "bfloat16",
      "--device", "cpu", "--batch-size", "2", "--input-len", "4", "--output-len", "3", "--json",
      "--kv-cache-memory-bytes", "1000000"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (batch,) = of([json.loads(line) for line in done.stdout.splitlines()], "batch")
    assert batch["num_tokens"] == 6


def _tiny_config() -> dict:
    from app.bench.gpu import MODELS

    return MODELS["tiny"]
