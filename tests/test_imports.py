"""What may import what: torch only where something is computed; public names cost nothing until they are used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import loraweld
from fakes import llama_shapes, random_factors, random_tensors, write_adapter, write_base

SOURCE = Path(loraweld.__file__).parent
WITHOUT_TORCH = (
    *("checkpoint", "adapter", "combine", "naming", "planning", "sinks", "export"),
    *(f"extraction/{name}.py" for name in ("request", "pairs", "aside", "adapter", "report")),
    *(f"page/{name}.py" for name in ("changes", "facts", "charts", "render", "report_page")),
    *(f"verification/{name}.py" for name in ("agreement", "prompts")),
    *("gguf_types.py", "request.py", "report.py", "record.py", "inspection.py", "progress.py", "api.py", "cli.py"),
)
WITH_TORCH = {
    SOURCE / "adapter" / "pickled.py",
    SOURCE / "checkpoint" / "pickled.py",
    SOURCE / "combine" / "arithmetic.py",
}


def modules(places: tuple[str, ...]) -> list[Path]:
    """Return the files of packages and modules under the source."""
    found = [path for place in places for path in (SOURCE / place).rglob("*.py")]
    return [*found, *(SOURCE / place for place in places if place.endswith(".py"))]


def imported(tree: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Yield the full names of what a module imports, under `if TYPE_CHECKING` too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if inside_functions or not isinstance(node, ast.FunctionDef):
            yield from imported(node, inside_functions=inside_functions)


def names_of(path: Path, *, inside_functions: bool) -> list[str]:
    return list(imported(ast.parse(path.read_text()), inside_functions=inside_functions))


@pytest.mark.parametrize(
    "path", [p for p in modules(WITHOUT_TORCH) if p not in WITH_TORCH], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_what_plans_or_prints_never_imports_torch(path: Path) -> None:
    """No import of torch at any depth, nor, when it is loaded, of a module of ours that imports torch."""
    everywhere = names_of(path, inside_functions=True)
    assert not [name for name in everywhere if name.split(".")[0] == "torch"]
    of_ours = ("compute", "execute.fill", "adapter.pickled", "checkpoint.pickled", "combine.arithmetic")
    heavy = tuple(f"loraweld.{name}" for name in of_ours)
    assert not [name for name in names_of(path, inside_functions=False) if name.startswith(heavy)]


def test_the_search_finds_imports_where_they_are() -> None:
    """The modules that compute are seen to import torch, and the lazy import of the pickle reader is seen."""
    assert "torch" in names_of(SOURCE / "compute" / "kernels.py", inside_functions=False)
    lazy = "loraweld.adapter.pickled.convert_pickle"
    files = SOURCE / "adapter" / "files.py"
    assert lazy in names_of(files, inside_functions=True)
    assert lazy not in names_of(files, inside_functions=False)
    assert len(modules(WITHOUT_TORCH)) > 20


PLAN_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
from loraweld.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["--version", "--help", "plan", "inspect"])
def test_commands_that_compute_nothing_run_without_torch(command: str, tmp_path: Path) -> None:
    """Help, plans and inspections work in an interpreter in which torch cannot be imported."""
    shapes = llama_shapes(layers=1)
    base = write_base(tmp_path / "base", random_tensors(shapes, torch.bfloat16))
    adapter = write_adapter(tmp_path / "adapter", random_factors(shapes))
    arguments = {
        "plan": ["plan", str(adapter), "-o", str(tmp_path / "out"), "--base", str(base), "--json"],
        "inspect": ["inspect", str(base), "--json"],
    }.get(command, [command])
    done = subprocess.run(
        [sys.executable, "-c", PLAN_WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) if len(arguments) > 1 else "loraweld" in done.stdout
    assert not (tmp_path / "out").exists()


def test_public_names_are_sorted_and_importable() -> None:
    """`__all__` is in order, without repeats, and each name in it is there; nothing else is promised."""
    assert loraweld.__all__ == sorted(set(loraweld.__all__))
    for name in loraweld.__all__:
        assert getattr(loraweld, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(loraweld, "nothing")  # noqa: B009


def test_errors_are_one_family() -> None:
    """Whoever catches LoraweldError catches every error of ours."""
    errors = [getattr(loraweld, name) for name in loraweld.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, loraweld.LoraweldError) for error in errors)
