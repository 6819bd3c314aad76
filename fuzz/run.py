"""What the fuzzers share: a scene, seeds, a time limit for each input, and atheris.

    python fuzz/fuzz_header.py SECONDS [CORPUS]

New inputs go to CORPUS (default: a temporary folder); one that ends in anything but LoraweldError, or takes longer than
`LIMIT_SECONDS`, is printed and kept by libFuzzer as crash-… or timeout-…: put it into tests/corpus/KIND.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
SCENE = Path(tempfile.mkdtemp(prefix="loraweld-fuzz-"))
LIMIT_SECONDS = 5
sys.path.insert(0, str(ROOT / "tests"))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What is imported in the block is instrumented; torch and the tests' tools, which it imports, are not."""
    import torch  # noqa: F401
    from safetensors.torch import save_file  # noqa: F401

    with atheris.instrument_imports(include=["loraweld"]):
        yield


def fuzz(one: Callable[[bytes], None], *, kind: str) -> None:
    """Feed inputs to `one` for as many seconds as the command line says."""
    import hostile

    hostile.make_scene(SCENE)
    seconds = int(sys.argv[1])
    grown = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="loraweld-corpus-"))
    for number, data in enumerate(_seeds(kind)):
        (grown / f"seed-{number}").write_bytes(data)
    options = [f"-max_total_time={seconds}", f"-timeout={LIMIT_SECONDS}", "-rss_limit_mb=2048", "-max_len=65536"]
    known = ROOT / "tests" / "corpus" / kind
    atheris.Setup([sys.argv[0], *options, str(grown), *([str(known)] if known.is_dir() else [])], one)
    atheris.Fuzz()


def _seeds(kind: str) -> Iterator[bytes]:
    """The valid files that inputs begin as."""
    import hostile

    if kind == "header":
        yield (SCENE / hostile.FILES["adapter"]).read_bytes()
    elif kind == "json":
        for number, name in enumerate(("adapter_config", "config", "index", "tokenizer")):
            yield bytes([number]) + (SCENE / hostile.FILES[name]).read_bytes()
    else:
        yield b"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\nmodel.layers.0.self_attn.q_proj"
        yield (
            rb"(?:.*?(?:vision|language).*?(?:self_attn|mlp)\.(?:[qkvo]|up)_proj)|\blayers\.\d+" + b"\nlayers.0.q_proj"
        )
