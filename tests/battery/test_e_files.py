"""Group E, files: a model folder is hostile until it has been checked."""

import dataclasses
import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from app.cli import parse
from app.errors import InvalidRequest
from app.factory import create_app
from app.main import make_context
from app.settings import ServerSettings, read_environment
from app.text import template_limits
from app.text.chat_template import ChatTemplate
from model.errors import ModelError, TokenizerError
from model.loader import load_model
from tests.api.serve import run
from tests.battery.client import CHAT, ROOT
from tests.fake_engine import FakeEngine, says
from tests.fake_engine import make_context as make_fake_context
from tests.toy import write_json, write_toy_checkpoint, write_toy_gguf


def refusal_of(path: Path) -> str:
    """The one line that a model is refused with."""
    command = parse(["serve", str(path), "--device", "cpu"], read_environment())
    with pytest.raises(ModelError) as caught:
        make_context(command, load_model(command.load))
    line = str(caught.value)
    assert "\n" not in line
    assert 0 < len(line) < 600
    return line


def run_arriero(*paths: Path) -> list[tuple[int, str]]:
    """Serve models in processes of their own, all at once: exit codes and what they say."""
    code = "from app.cli import main; main()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(path), "--device", "cpu", "--port", "0"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in paths
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def edit_header(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


def test_e01_safetensors_cut_anywhere_are_refused(tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        assert "model.safetensors" in refusal_of(folder)
    path.write_bytes(raw + b"\0")
    assert "model.safetensors" in refusal_of(folder)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**40, 10**9, 0])
def test_e01_header_of_absurd_length_is_refused(tmp_path, size):
    folder = write_toy_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    assert "model.safetensors" in refusal_of(folder)


LIES = {
    "huge shape": {"shape": [2**62, 2**62]},
    "negative shape": {"shape": [-1, 64]},
    "wrong shape": {"shape": [64, 320]},
    "offsets past the end": {"data_offsets": [0, 2**40]},
    "offsets reversed": {"data_offsets": [100, 0]},
    "negative offsets": {"data_offsets": [-8, 8]},
    "unknown dtype": {"dtype": "F1024"},
    "no offsets": {"data_offsets": None},
    "text as shape": {"shape": "64"},
}


@pytest.mark.parametrize("name", LIES)
def test_e01_entry_that_lies_is_refused_before_anything_is_allocated(tmp_path, name):
    folder = write_toy_checkpoint(tmp_path)
    edit_header(folder, lambda header: header["model.embed_tokens.weight"].update(LIES[name]))
    refusal_of(folder)


def test_e01_flipped_bits_are_refused_or_harmless(tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    command = parse(["serve", str(folder), "--device", "cpu"], read_environment())
    num_refused = 0
    for place in range(0, 3000, 149):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            load_model(command.load)
        except ModelError:
            num_refused += 1
    assert num_refused > 10


def test_e01_missing_and_escaping_shards_are_refused(tmp_path):
    folder = write_toy_checkpoint(tmp_path / "model", shards=2)
    index = folder / "model.safetensors.index.json"
    honest = json.loads(index.read_text())
    outside = tmp_path / "outside.safetensors"
    save_file(load_file(folder / "model-00001-of-00002.safetensors"), outside)
    for name in ("../outside.safetensors", str(outside), "/etc/passwd", "model-00003.safetensors"):
        weight_map = dict.fromkeys(honest["weight_map"], name)
        write_json(index, {**honest, "weight_map": weight_map})
        refusal_of(folder)
    write_json(index, honest)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal_of(folder)


def test_e01_process_leaves_with_one_line_and_an_exit_code(tmp_path):
    """Damaged weights and no GGUF, as an operator meets them."""
    cut = write_toy_checkpoint(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"x" * 100)
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF" + b"\xff" * 100)
    for code, said in run_arriero(cut, gguf):
        assert code == 1
        (line,) = said.splitlines()
        assert line.startswith("arriero: ")


ABSURD: list[dict[str, object]] = [
    {"hidden_size": 2**40},
    {"hidden_size": -64},
    {"hidden_size": 0},
    {"hidden_size": 64.5},
    {"hidden_size": "64"},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 0},
    {"vocab_size": 2**40},
    {"vocab_size": -1},
    {"intermediate_size": 2**50},
    {"num_attention_heads": 3},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": -2},
    {"head_dim": 0},
    {"head_dim": 2**30},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": 2**60},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": -1.0},
    {"rope_theta": float("nan")},
    {"rope_theta": 0},
    {"rope_theta": float("inf")},
    {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
    {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
    {"rope_scaling": {"rope_type": "unheard-of", "factor": 2.0}},
    {"rope_scaling": []},
    {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
    {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    {"hidden_act": "import os"},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
]


@pytest.mark.parametrize("fields", ABSURD, ids=lambda fields: "-".join(map(str, fields.items())))
def test_e02_absurd_config_is_refused_before_weights_are_read(tmp_path, monkeypatch, fields):
    folder = write_toy_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **fields})
    refusal_of(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": 1}', b"5" * 10_000]
)
def test_e02_config_that_is_no_config_is_refused(tmp_path, content):
    folder = write_toy_checkpoint(tmp_path)
    (folder / "config.json").write_bytes(content)
    refusal_of(folder)


def test_e03_pickles_and_code_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "it-was-run"
    code = f"open({str(marker)!r}, 'w').close()\nraise SystemExit\n"
    pickle = b"cbuiltins\nexec\n(V" + code.encode().replace(b"\n", b"\\u000a") + b"\ntR."
    bare = write_toy_checkpoint(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    (bare / "pytorch_model.bin").write_bytes(pickle)
    assert "safetensors" in refusal_of(bare)
    coded = write_toy_checkpoint(
        tmp_path / "coded",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )
    for name in ("code", "modeling_llama", "configuration_llama", "tokenization_llama"):
        (coded / f"{name}.py").write_text(code)
    with_tokenizer = json.loads((coded / "tokenizer_config.json").read_text())
    with_tokenizer["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    write_json(coded / "tokenizer_config.json", with_tokenizer)
    refusal_of(coded)
    assert not marker.exists()


def test_e04_vocabulary_beyond_the_embedding_is_refused(tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {**tokenizer["added_tokens"][0], "id": 5000, "content": "<|beyond|>"}
    tokenizer["added_tokens"].append(added)
    write_json(folder / "tokenizer.json", tokenizer)
    refusal_of(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_e04_tokenizer_that_is_none_is_refused(tmp_path, content):
    folder = write_toy_checkpoint(tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    refusal_of(folder)


def test_e04_model_that_names_no_end_of_text_has_none_and_is_served(tmp_path):
    folder = write_toy_checkpoint(tmp_path, eos_token_id=None)
    for name in ("generation_config.json", "tokenizer_config.json"):
        write_json(folder / name, {})
    command = parse(["serve", str(folder), "--device", "cpu"], read_environment())
    context = make_context(command, load_model(command.load))
    assert context.eos_token_ids == frozenset()
    assert context.chat_template is None
    context.grammars.close()


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('true') }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__code__.co_filename }}",
    "{{ namespace.__init__.__globals__['sys'] }}",
    "{{ self._TemplateReference__context.environment.filters }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% set x = messages[0].pop('role') %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ messages|map(attribute='__class__')|list }}",
)
BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% for a in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
    "{% for a in [[1]*99]*99 recursive %}{{ loop([[1]*99]*99) }}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set t %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = t %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set n.x = n.x|replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set n.x = [n.x, n.x]|join('') %}{{ n.x|length }}{% endfor %}",
    "{{ 'a' * 200000000 }}",
    "{{ [1] * 200000000 }}",
    "{{ 9 ** 999999999 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%0999999999d'|format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ 'x'.ljust(10**9) }}{{ 'x'.zfill(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|indent(10**9, first=true) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ ('x' * 9999)|list|join('x' * 9999) }}",
    "{{ ('x' * 9999).join(['x'] * 9999) }}",
    "{{ [1]|batch(10**9, 0)|list }}",
    "{{ lipsum(n=99999) }}",
    "{% for a in messages[0].content * 9999 %}{% for b in messages[0].content * 9999 %}"
    "{% endfor %}{% endfor %}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_e04_template_reaches_no_code_and_changes_nothing(source):
    messages = [{"role": "user", "content": "x"}]
    try:
        template = ChatTemplate(source, special_tokens={}, added_tokens=())
        said = "".join(text for text, _ in template.render(messages))
    except (InvalidRequest, TokenizerError) as error:
        said = str(error)
        assert len(said) < 500
    assert messages == [{"role": "user", "content": "x"}]
    assert "<class" not in said
    assert "<module" not in said
    assert "root:" not in said


@pytest.mark.parametrize("source", BOMBS)
def test_e04_template_that_does_not_end_or_fills_the_memory_is_stopped(source, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    messages = [{"role": "user", "content": "x" * 100}]
    with pytest.raises((InvalidRequest, TokenizerError)) as caught:
        ChatTemplate(source, special_tokens={}, added_tokens=()).render(messages)
    assert len(str(caught.value)) < 500


def test_e04_hostile_template_costs_its_request_alone(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    loop = f"{{% if messages[0].content == 'hi' %}}{BOMBS[0]}{{% endif %}}x"
    template = ChatTemplate(loop, special_tokens={}, added_tokens=())
    engine = FakeEngine(says("x"))
    context = dataclasses.replace(make_fake_context(engine), chat_template=template)

    async def scenario():
        transport = httpx.ASGITransport(app=create_app(context, ServerSettings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for content, status in (("hi", 400), ("hello", 200)):
                body = {"messages": [{"role": "user", "content": content}]}
                assert (await client.post(CHAT, json=body)).status_code == status

    run(scenario())
    context.grammars.close()


def test_e05_nothing_loads_an_adapter(live):
    names = ["../x", "/etc/passwd", "http://127.0.0.1:1/x", "..%2fx"]
    paths = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/lora", "/v1/adapters", "/load"]
    for path, name in itertools.product(paths, names):
        body = {"lora_name": name, "lora_path": name, "adapter": name}
        live.post(path, body).check_refusal((404, 405))
    for name in names:
        live.complete("a", model=name).check_refusal(404)
    answer = live.complete("a", lora_path="/etc/passwd", adapter="../x")
    assert answer.status == 200
    assert "lora_path" in answer.headers["x-ignored-fields"]


def test_e06_gguf_cut_anywhere_is_refused(tmp_path):
    path = write_toy_gguf(tmp_path)
    raw = path.read_bytes()
    for size in (0, 3, 4, 8, 23, 24, 100, 5000, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        assert "toy.gguf" in refusal_of(path)


@pytest.mark.parametrize("count", [2**60, 2**63, 2**64 - 1, 10**9])
@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "fields"])
def test_e06_absurd_counts_are_refused(tmp_path, count, place):
    path = write_toy_gguf(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[place : place + 8] = struct.pack("<Q", count)
    path.write_bytes(raw)
    assert "toy.gguf" in refusal_of(path)


def test_e06_flipped_bytes_are_refused_or_harmless(tmp_path):
    path = write_toy_gguf(tmp_path)
    raw = path.read_bytes()
    start = raw.index(b"token_embd.weight")
    command = parse(["serve", str(path), "--device", "cpu"], read_environment())
    num_refused = 0
    places = [*range(4, 400, 13), *range(start - 8, start + 400, 11)]
    for place in places:
        flipped = bytearray(raw)
        flipped[place] = 0xFF
        path.write_bytes(flipped)
        try:
            load_model(command.load)
        except ModelError:
            num_refused += 1
    assert num_refused > 20
