"""Hold the source to its shape: function bodies with a median of at most 8 lines and none over 60, modules ≤ 600.

Run by `make lint`. A body is counted without its docstring.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

MEDIAN_LINES = 8
LONGEST_LINES = 60
MODULE_LINES = 600
SOURCE = Path(__file__).parent.parent / "src"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from the first statement after the docstring to the end of the function."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (place, lines) of each function of a module that does something."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = body_lines(node)
            if lines:
                yield f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}", lines


def main() -> None:
    """Print the figures and exit with 1 if one is over its limit."""
    paths = sorted(SOURCE.rglob("*.py"))
    found = [item for path in paths for item in functions(path)]
    median = statistics.median(lines for _, lines in found)
    problems = [f"{place}: {lines} lines, limit {LONGEST_LINES}" for place, lines in found if lines > LONGEST_LINES]
    modules = {path: len(path.read_text().splitlines()) for path in paths}
    problems += [f"{path.name}: {n} lines, limit {MODULE_LINES}" for path, n in modules.items() if n > MODULE_LINES]
    if median > MEDIAN_LINES:
        problems.append(f"median of function bodies is {median} lines, limit {MEDIAN_LINES}")
    longest = max(found, key=lambda item: item[1])
    print(f"{len(found)} functions, median {median:g} lines, longest {longest[1]} ({longest[0]})")
    print("\n".join(problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
