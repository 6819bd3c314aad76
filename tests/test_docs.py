"""The documentation is true: every command parses, every name exists, and what can run on a tiny model runs."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import loraweld
from fakes import random_factors, write_adapter
from gguf_models import needs_converter, needs_llama, write_tiny_llama
from loraweld.checkpoint.base import open_base
from loraweld.cli import make_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "architecture.md")]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A page that makes its own inputs; its blocks run one after the other in one folder.
STORY = "tutorial.md"
# First words of lines that are not ours to run, and why.
NOT_OURS = {
    "pip": "installs packages",
    "make": "a target of the Makefile, run by .ci/run",
    ".ci/run": "runs these tests",
    "vllm": "another program",
    "ollama": "another program",
    "llama-cli": "another program",
}
# Parts of commands and snippets that cannot run offline on a tiny model, and why.
NOT_HERE = {
    "--push-to-hub": "needs the Hub; tests/test_push.py",
    "--stream-base": "needs the Hub; tests/test_stream.py",
    "s3://": "needs a store; tests/test_urls.py, tests/test_parts.py",
    "unsloth/": "a base of the Hub",
    "published/": "headers that benchmarks/synthetic_published.py writes; tests/test_sizing.py",
    "HuggingFaceTB/": "a base of the Hub; tests/test_live_notebook.py",
    "loraweld.attach(model)": "needs a trained model in memory; tests/test_live.py",
    "save_pretrained_merged(model": "needs a trained model in memory; tests/test_live.py",
}
# Options in the text that are those of other programs.
FOREIGN_OPTIONS = {"--shape", "--help", "--verify-outputs"}


@dataclass(frozen=True, slots=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, comments off."""
        lines = (shlex.join(shlex.split(line, comments=True)) for line in self.text.splitlines())
        return [line for line in lines if line]

    @property
    def runnable(self) -> bool:
        return bool(self.script) and not any(part in self.text for part in NOT_HERE)

    @property
    def script(self) -> list[str]:
        """What is run of it: the snippet, or the commands that are ours."""
        if self.language == "python":
            return [self.text]
        return [line for line in self.commands if line.split()[0] == "loraweld"]


@cache
def blocks() -> tuple[Block, ...]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2]))
    return tuple(found)


def of_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


ALONE = [
    block for block in blocks() if block.language in ("sh", "python") and block.runnable and block.page.name != STORY
]


def parsed(command: str) -> argparse.Namespace:
    """Parse a command line that begins with `loraweld`; a usage error ends the test."""
    return make_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("block", of_language("sh"), ids=str)
def test_every_command_parses(block: Block) -> None:
    """A line is one of ours, with options that exist, or of a program in the table of those that are not run."""
    for command in block.commands:
        program = command.split()[0]
        if program == "loraweld":
            parsed(command)
        elif program != "python":
            assert program in NOT_OURS, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_in_the_text_exists(page: Path) -> None:
    known = set(options(make_parser())) | FOREIGN_OPTIONS
    text = re.sub(r"<!--.*?-->", "", page.read_text())
    named = set(
        re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", "\n".join(line for line in text.splitlines() if "pip" not in line))
    )
    assert named <= known


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def test_every_option_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    missing = sorted({name for name in options(make_parser()) if name.startswith("--") and name not in text})
    assert missing == ["--help", "--no-private", "--output", "--version"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_exists(page: Path) -> None:
    """`loraweld.x` and `from loraweld import x` are public names; `::: path` is an object of ours."""
    text = page.read_text()
    named = set(re.findall(r"\bloraweld\.([A-Za-z_]\w*)\b(?!\.)", re.sub(r"::: .*", "", text)))
    for line in re.findall(r"from loraweld import ([\w, ]+)", text):
        named |= {name.strip() for name in line.split(",")}
    assert named - {"json", "toml"} <= set(loraweld.__all__)
    for path in re.findall(r"^::: (\S+)", text, re.MULTILINE):
        module, _, name = path.rpartition(".")
        if path != "loraweld.errors":
            assert hasattr(__import__(module, fromlist=[name]), name), path


def test_links_lead_somewhere() -> None:
    """A relative link names a page or an image; what is generated is known."""
    generated = {"reference/cli.md"}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                path = (page.parent / target).resolve()
                assert path.exists() or path.relative_to(ROOT / "docs").as_posix() in generated, f"{page}: {target}"


def test_what_the_site_generates_is_there() -> None:
    """The reference has every command's help; each table that a page asks for is in the results."""
    hooks = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))
    reference = hooks["cli_reference"]()
    assert all(f"## loraweld {name}\n" in reference for name, _ in hooks["commands"](make_parser()))
    assert all(name in reference for name in options(make_parser()))
    asked = [name for page in PAGES for name in re.findall(r"<!-- results: (.+?) -->", page.read_text())]
    assert len(asked) >= 4
    assert all("|" in hooks["results"](name) for name in asked)


def test_the_exceptions_are_needed() -> None:
    """Each entry of the tables is met by a block, so that none outlives its reason."""
    lines = [line for block in of_language("sh") for line in block.commands]
    assert NOT_OURS.keys() <= {line.split()[0] for line in lines}
    text = "\n".join(block.text for block in blocks())
    assert [part for part in NOT_HERE if part not in text] == []
    assert len(ALONE) > 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: base, adapters, a merged model."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "my-base").mkdir()
    write_tiny_llama(folder / "my-base")
    shapes = {name: source.shape for name, source in open_base(folder / "my-base").tensors.items() if "proj" in name}
    for seed, name in enumerate(("my-adapter", "A", "B", "lora_model", "outputs/lora-out")):
        write_adapter(folder / name, random_factors(shapes, rank=4, seed=seed), base_model_name_or_path="my-base", r=4)
    loraweld.merge(folder / "my-adapter", base=folder / "my-base", output=folder / "my-model")
    loraweld.merge(folder / "outputs/lora-out", base=folder / "my-base", output=folder / "merged")
    (folder / "merged").rename(folder / "outputs/lora-out/merged")  # where axolotl puts it
    (folder / "prompts.txt").write_text("word3 and 17 more\nword5 and 4 more and word1\n")
    return folder


def run(block: Block, folder: Path) -> None:
    """Run a block's script in `folder`; a command that fails ends the test with what it said."""
    for part in block.script:
        argv: Sequence[str] = ["-c", part] if block.language == "python" else ["-m", "loraweld", *shlex.split(part)[1:]]
        done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}: {part}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


def marked(block: Block) -> object:
    marks = [needs_converter] if "gguf" in block.text else []
    marks += [needs_llama] if re.search(r"q\d_k", block.text) else []
    return pytest.param(block, marks=marks, id=str(block))


@pytest.mark.parametrize("block", [marked(block) for block in ALONE])
def test_blocks_run(block: Block, inputs: Path, tmp_path: Path) -> None:
    """A block runs where the base, the adapters and the model that it names are, and its output is not there yet."""
    folder = tmp_path / "place"
    shutil.copytree(inputs, folder)
    made = {Path(parsed(line).output).name for line in block.script if block.language == "sh" and makes_output(line)}
    made |= set(re.findall(r'output="([^"]+)"', block.text))
    for name in made:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
    run(block, folder)
    assert all((folder / name).exists() for name in made if "plan" not in block.text)


def makes_output(line: str) -> bool:
    return line.split()[1] in ("merge", "extract", "report") and bool(getattr(parsed(line), "output", None))


def test_the_tutorial_runs_from_an_empty_folder(tmp_path: Path) -> None:
    """Its blocks in order, each with what the ones before have made."""
    story = [block for block in blocks() if block.page.name == STORY]
    for block in story:
        run(block, tmp_path)
    assert {"my-base", "my-adapter", "my-model", "report.html", "extracted"} <= {p.name for p in tmp_path.iterdir()}
