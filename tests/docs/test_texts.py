"""What the documents say of the code and of one another is so."""

import ast
import re
from pathlib import Path

import pytest

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
