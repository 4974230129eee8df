"""Writes docs/conformance.md."""

import argparse
import asyncio
from pathlib import Path

from tests.conformance.answers import see
from tests.conformance.document import OPENAI, Document
from tests.conformance.report import REPORT, ask, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", nargs="?", type=Path, default=OPENAI)
    path = parser.parse_args().document
    if not path.is_file():
        parser.error(f"{path}: no such file; name OpenAI's document, as JSON")
    REPORT.write_text(asyncio.run(_page(Document.read(path))), "utf-8")


async def _page(document: Document) -> str:
    return await report(document, await ask(document), await see(document))


if __name__ == "__main__":
    main()
