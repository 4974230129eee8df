"""Turns, faults and the table, with a fake peer that is a real process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from app.bench.gguf_file import interleaved, tensor_name
from app.bench.peer import Launch, Model, Peer, PeerFault, Workplace
from app.bench.rounds import Plan, Results, order_of, run_rounds
from app.bench.shapes import Shape, read_tensors, tensor_shapes, words, write_checkpoint
from app.bench.table import markdown
from app.bench.vllm_cpu import write_w8a8
from app.bench.workload import METRICS, Workload

MODEL = Model(name="toy", vocab_size=400, first_id=300)
TINY = Workload(
    prefill_tokens=8, num_prefills=1, decode_prompt=4, decode_tokens=4, num_decodes=1,
    batches=(2,), batch_prompt=4, batch_tokens=4,
)  # fmt: skip
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        open(sys.argv[2], "a").write(json.dumps(body["prompt"]) + "\\n")
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "t"}]}\\n\\n')
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\\n\\n")

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(name: str, script: str, asked: Path, *, bits: int = 8, is_ours: bool = False) -> Peer:
    def command(launch: Launch, _workplace: Workplace) -> list[str]:
        return [sys.executable, "-c", script, str(launch.port), str(asked)]

    return Peer(
        name=name, bits=bits, is_ours=is_ours, command=command, prepare=lambda *_: Path("none")
    )


@pytest.fixture
def workplace(tmp_path) -> Workplace:
    return Workplace(cache=tmp_path, python_of=lambda _: Path(sys.executable))


def run(peers: list[Peer], workplace: Workplace, num_rounds: int = 1) -> Results:
    plan = Plan(workload=TINY, num_rounds=num_rounds, num_threads=1)
    return run_rounds(MODEL, peers, workplace, plan, lambda _: None)


def test_a_turn_measures_everything(workplace, tmp_path):
    turn = run([fake("peer", SERVER, tmp_path / "asked")], workplace).turns["peer"][0]
    assert set(turn) == {"prefill", "decode", "batch_2", "start", "resident"}
    assert all(value > 0 for value in turn.values())


def test_no_prompt_is_asked_twice(workplace, tmp_path):
    run([fake("peer", SERVER, tmp_path / "asked")], workplace, num_rounds=2)
    prompts = (tmp_path / "asked").read_text().splitlines()
    assert len(set(prompts)) == len(prompts)
    assert all(300 <= token < 400 for prompt in prompts for token in json.loads(prompt))


def test_a_peer_that_cannot_start_says_why_and_stops_nobody(workplace, tmp_path):
    broken = fake("broken", "raise SystemExit('needs AVX-512')", tmp_path / "asked")
    results = run([broken, fake("peer", SERVER, tmp_path / "asked")], workplace)
    assert "needs AVX-512" in results.faults["broken"]
    assert list(results.turns) == ["peer"]


def test_a_peer_that_cannot_be_installed_says_why(workplace, tmp_path):
    def prepare(_model: Model, _workplace: Workplace) -> Path:
        raise PeerFault("no wheel for this machine")

    absent = Peer(name="absent", bits=8, prepare=prepare, command=lambda *_: [])
    assert run([absent], workplace).faults == {"absent": "no wheel for this machine"}


def test_everybody_is_first_once():
    peers = [fake(name, "", Path()) for name in "abc"]
    assert [order_of(peers, number)[0].name for number in range(3)] == ["a", "b", "c"]


def turn(value: float) -> dict[str, float]:
    return {metric.key: value for metric in METRICS}


def test_table_shows_medians_spread_ratios_and_the_absent():
    peers = [
        fake("ours", "", Path(), is_ours=True),
        fake("slow", "", Path()),
        fake("fast", "", Path()),
        fake("4-bit", "", Path(), bits=4),
    ]
    results = Results(
        turns={
            "ours": [turn(40), turn(60), turn(50)],
            "slow": [turn(10)],
            "fast": [turn(20)],
            "4-bit": [turn(500)],
        },
        faults={"gone": "no wheel"},
    )
    lines = markdown("M", peers, results).splitlines()
    assert lines[4].startswith("| **ours** | 50 (40–60) | 50.0 (40.0–60.0) |")
    # A rate is compared with the highest, a time or a size with the lowest.
    ratios = "| 2.50 | 2.50 | 2.50 | 2.50 | 5.00 | 5.00 |"
    assert lines[8] == f"| ours / best 8-bit peer {ratios}"
    assert lines[-1] == "gone has no figures or not all: no wheel"


SHAPE = Shape(
    name="T", hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16
)


def test_checkpoint_holds_the_tensors_of_the_shape(tmp_path):
    folder = write_checkpoint(SHAPE, tmp_path / "T")
    tensors = dict(read_tensors(folder / "model.safetensors"))
    assert {name: values.shape for name, values in tensors.items()} == tensor_shapes(SHAPE)
    assert 0.015 < tensors["lm_head.weight"].std() < 0.025


def test_words_and_ids_map_one_to_one(tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(write_checkpoint(SHAPE, tmp_path / "T") / "tokenizer.json"))
    ids = [300, 31_999, 259, 3000]
    assert tokenizer.encode("".join(words()[index] for index in ids)).ids == ids
    assert tokenizer.decode(ids) == "".join(words()[index] for index in ids)


def test_gguf_names_and_order_of_rows():
    import numpy as np

    assert tensor_name("model.layers.3.mlp.down_proj.weight") == "blk.3.ffn_down.weight"
    assert tensor_name("lm_head.weight") == "output.weight"
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_w8a8_checkpoint_keeps_its_weights_within_half_a_step(tmp_path):
    shape = Shape(
        name="toy", hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=64
    )
    source = write_checkpoint(shape, tmp_path / "bf16")
    write_w8a8(source, tmp_path / "w8a8")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "w8a8" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    scale = after[name + "_scale"]
    assert scale.shape == (32, 1)
    assert ((after[name] * scale - before[name].float()).abs() <= 0.501 * scale).all()
    assert after["lm_head.weight"].equal(before["lm_head.weight"].float())
    config = json.loads((tmp_path / "w8a8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
