"""What the documents say of the code and of one another is so."""

import ast
import itertools
import re
from pathlib import Path

import pytest

from app.cli import build_parser
from app.errors import ServiceError
from app.protocol.chat import ChatRequest
from app.protocol.common import HARMLESS, UNSUPPORTED
from app.protocol.completions import CompletionRequest
from app.serving.energy import GpuMeter
from app.serving.metrics import RequestMetrics
from tests.api.test_metrics import Nvml
from tests.fake_engine import FakeEngine, says
from tests.house.test_source import all_options

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
QUOTED = re.compile(r'"([^"]+)"')


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target, anchor in LINK.findall(document.read_text("utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path = (document.parent / target) if target else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path.read_text("utf-8")), f"{target}#{anchor}"


def texts_in_the_source() -> str:
    """Every string of the source, one a line; what is formatted in stands as {}."""
    lines = []
    for folder in ("app", "model"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        part.value if isinstance(part, ast.Constant) else "{}"
                        for part in node.values
                    ]
                    lines.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines.append(node.value)
    return "\n".join(lines)


def test_messages_that_troubleshooting_quotes_are_the_servers():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quotes = [quote for quote in QUOTED.findall(text) if not re.fullmatch(r"[a-z_]+", quote)]
    assert len(quotes) > 10
    source = texts_in_the_source()
    assert [quote for quote in quotes if quote not in source] == []


def test_every_document_is_linked_from_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    linked = {target for target, _ in LINK.findall(readme)}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def migrations() -> list[list[str]]:
    """The rows of the tables in docs/migrating.md: theirs, ours."""
    text = (ROOT / "docs" / "migrating.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE)
    return [[theirs, ours] for theirs, ours in rows if theirs not in ("vLLM", "Ollama", "OpenAI")]


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))


def fields_of(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


def known_fields() -> set[str]:
    names = set()
    for model in (ChatRequest, CompletionRequest):
        for name, field in model.model_fields.items():
            names |= {name, field.alias or name}
    return names


def test_flags_that_take_the_place_of_others_exist():
    options = all_options(build_parser())
    ours = set().union(*(flags_of(ours) for _, ours in migrations()))
    assert "--max-num-seqs" in ours
    assert ours <= options
    same = [theirs for theirs, ours in migrations() if ours.startswith("the same")]
    assert set().union(*map(flags_of, same)) <= options


def test_fields_that_are_said_to_be_the_same_are_fields():
    same = [theirs for theirs, ours in migrations() if ours.startswith("the same")]
    fields = set().union(*map(fields_of, same)) - {"extra_body", "type", "code", "param"}
    assert {"top_k", "seed", "logit_bias"} <= fields
    assert fields <= known_fields()


@pytest.mark.parametrize(
    ("ours", "names"), [("refused", UNSUPPORTED.keys()), ("taken, without effect", HARMLESS)]
)
def test_fields_that_are_said_to_be_refused_or_without_effect_are(ours, names):
    rows = [theirs for theirs, said in migrations() if said.startswith(ours)]
    fields = set().union(*map(fields_of, rows))
    assert fields
    assert fields <= set(names)


@pytest.mark.parametrize("name", ["models", "tuning", "troubleshooting", "operations"])
def test_flags_that_a_document_names_exist(name):
    elsewhere = {  # of other programs
        "--build-arg", "--target", "--profile", "--scale", "--merge", "--cpus", "--full",
    }  # fmt: skip
    flags = flags_of((ROOT / "docs" / f"{name}.md").read_text("utf-8"))
    assert flags
    assert flags - elsewhere <= all_options(build_parser())


@pytest.mark.parametrize("name", ["tuning", "operations"])
def test_metrics_that_a_document_names_exist(name):
    metrics = RequestMetrics("fake", FakeEngine(says("x")), GpuMeter(Nvml()))
    metrics.count_error("overloaded")
    known = set(re.findall(r"^# TYPE (\S+)", metrics.render().decode(), re.MULTILINE))
    text = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    named = set(re.findall(r"`((?:vllm|arriero):[a-z_]+)", text))
    assert named
    assert named <= known


def test_codes_that_troubleshooting_names_are_those_of_errors():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| \d{3}[^|`]*`([a-z_]+)`", text, re.MULTILINE)
    codes, kinds = set(), [ServiceError]
    while kinds:
        kind = kinds.pop()
        codes.add(getattr(kind, "code", None))
        kinds += kind.__subclasses__()
    assert len(rows) > 2
    assert set(rows) - {"param"} <= codes


READING_ORDER = (
    "models", "api", "cookbook", "tuning", "operations", "migrating", "troubleshooting",
    "how-it-works",
)  # fmt: skip


@pytest.mark.parametrize(("name", "following"), [*itertools.pairwise(READING_ORDER)])
def test_a_document_leads_on_to_the_next(name, following):
    last = (ROOT / "docs" / f"{name}.md").read_text("utf-8").rstrip().splitlines()[-1]
    assert last.startswith("Next: ")
    assert f"]({following}.md)" in last
