"""The parts that measure arithmetic in one process: NF4, every encoding against its library, products in bfloat16."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import BENCHMARKS
from measuring import measure, say
from reporting import Part, conditions, promise, ratio_cells, show, table

QUANTISE_CONDITIONS = """\
A bfloat16 weight of 4096 × 14336 into NF4 with double quantisation and blocks of 64, in one process, in turn: our
encoder fed float32 tiles, as in a merge of a weight that no adapter touches, on two threads with a weight each;
`quantize_4bit(…, compress_statistics=True)` of bitsandbytes with two torch threads. Ratios are of the same
round. For two cores."""
CODECS_CONDITIONS = """\
One process on one core, in turn; medians. GB/s of 16-bit values. Ours decode from a file in the page cache, tile by
tile, and encode from float32 tiles as in a merge that preserves the encoding: scales are kept unless a value outgrows
them; the others work on whole tensors in memory, the way the library offers it. A dash: none of these libraries does
it without a GPU. Weights: 4096 × 4096, MXFP4 four experts of together as many."""
PRODUCTS_CONDITIONS = """\
A tile of 256 × 4096 normal bfloat16 weights, float32 factors, one thread. Misrounded: not what float64 rounds to,
before any repair of elements in doubt. bfloat16 products are torch's `addmm`; whether they are faster hangs on the
processor: flags of this one: {flags}."""


def quantise(args: argparse.Namespace, work: Path) -> Part:
    """Compare quantisation into NF4 with bitsandbytes."""
    rounds = printed_by("quantise.py", args, work)
    ratios = {q: [r[q] / r["bitsandbytes"] for r in rounds] for q in ("absmax", "mse")}
    speeds = {what: statistics.median(r[what] for r in rounds) for what in rounds[0]}
    rows = [
        [what, show(speed, 0, 1e6), *(ratio_cells(ratios[what]) if what in ratios else ["–"] * 3)]
        for what, speed in speeds.items()
    ]
    medians = {what: statistics.median(values) for what, values in ratios.items()}
    promises = [
        promise("absmax: at least 10 × bitsandbytes' elements per second", [medians["absmax"]], "×", lambda v: v >= 10),
        promise("mse: at least 3 × bitsandbytes' elements per second", [medians["mse"]], "×", lambda v: v >= 3),
    ]
    header = [f"median of {len(rounds)}", "M elements/s", "/ bitsandbytes, median", "min", "max"]
    blocks = [table(header, rows), *conditions(QUANTISE_CONDITIONS, work)]
    return Part(title="NF4 quantiser", promises=promises, blocks=blocks)


def codecs(args: argparse.Namespace, work: Path) -> Part:
    """Compare decoding and encoding of every encoding with its library."""
    found = printed_by("codecs.py", args, work)
    rows = [
        [one["encoding"], *speed_cells(one["decode"]), *speed_cells(one["encode"]), one["library"] or "–"]
        for one in found
    ]
    header = ["GB/s a core", "decode", "library", "ratio", "encode", "library", "ratio", "which"]
    return Part(title="Codecs", promises=[], blocks=[table(header, rows), *conditions(CODECS_CONDITIONS, work)])


def products(args: argparse.Namespace, work: Path) -> Part:
    """Compare products in bfloat16 with float32."""
    found = printed_by("products.py", args, work)
    rows = [
        [
            f"r {one['rank']}, ‖Δ‖/‖W‖ {one['change']:g}",
            *(f"{share:.1e}" for share in one["misrounded"]),
            *(show(ns, 2) for ns in one["ns"]),
        ]
        for one in found
    ]
    header = ["misrounded", "float32", "3 products", "6 products", "float32 ns", "3 products ns", "6 products ns"]
    sixes = [1e4 * one["misrounded"][2] for one in found]
    held = promise("six products misround at most 1e-4", sixes, "e-4", lambda value: value <= 1)
    blocks = [table(header, rows), *conditions(PRODUCTS_CONDITIONS.format(flags=_matrix_flags()), work)]
    return Part(title="bfloat16 products", promises=[held], blocks=blocks)


def _matrix_flags() -> str:
    """What the processor has for bfloat16."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii").split())
    return ", ".join(sorted(flags & {"avx512_bf16", "amx_bf16", "amx_tile"})) or "none"


def speed_cells(speeds: Sequence[Sequence[float]]) -> list[str]:
    """Return medians of our speed, of theirs, and of the ratios of neighbouring rounds."""
    ours, theirs = speeds
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
    return [show(statistics.median(values) if values else None, 2) for values in (ours, theirs, ratios)]


def printed_by(script: str, args: argparse.Namespace, work: Path, *more: str) -> Any:
    """Run one of our scripts in a fresh process and return the JSON in its last line."""
    say(f"running {script}")
    log = work / "log.txt"
    measure([sys.executable, str(BENCHMARKS / script), *more, "--rounds", str(args.rounds)], log)
    lines = log.read_text(encoding="utf-8").splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("[")))
