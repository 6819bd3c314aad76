"""What of the documentation site is not written by hand: the command line's reference, the measured tables.

mkdocs calls the `on_…` functions. `python scripts/docs_hooks.py` prints the reference.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweld.cli import make_parser

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

CLI_PAGE = "reference/cli.md"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "RESULTS.md"
_PLACE = re.compile(r"<!-- results: (.+?) -->")
_WIDTH = "78"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the commands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def cli_reference() -> str:
    """Return the reference page: what `--help` says of each command."""
    os.environ["COLUMNS"] = _WIDTH  # argparse breaks its lines there
    parser = make_parser()
    pages = [("loraweld", parser), *((f"loraweld {name}", command) for name, command in commands(parser))]
    sections = [f"## {name}\n\n```text\n{page.format_help()}```\n" for name, page in pages]
    codes = (
        "Exit codes: 0 done; 1 something you can fix, with one message on stderr; 2 wrong usage; 130 interrupted, the "
        "same command continues.\n"
    )
    return "\n".join(["# Command line\n", codes, *sections])


def results(section: str) -> str:
    """Return the tables of a section of benchmarks/RESULTS.md, without its conditions.

    Raises:
        ValueError: there is no such section.
    """
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^##|\Z)", RESULTS.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{RESULTS.name} has no section {section!r}")
    return found[1].strip()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference to the pages of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, CLI_PAGE, content=cli_reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the measured tables where a page asks for them."""
    return _PLACE.sub(lambda match: results(match[1]), markdown)


if __name__ == "__main__":
    print(cli_reference())
