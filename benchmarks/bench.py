"""Measure loraweld against plain copies and writes, PEFT, bitsandbytes and others, on checkpoints of random weights.

Every run of a merge is a fresh process, followed by a sync of the output's file system, so that data on disk is
compared with data on disk. Linux only. This process stays small on purpose (no torch, no numpy): the kernel counts
the memory of a launcher into the peak of what it launches.

    python benchmarks/bench.py                                  all parts, RESULTS.md written anew
    python benchmarks/bench.py --part from-nf4 --shape 1B       one part, printed and put into RESULTS.md
    python benchmarks/bench.py --part quantise codecs --print   printed only

The parts:

    plain     16 bit → 16 bit, against `cp` and PEFT                  8B: 35 GB of disk
    ranks     what a higher rank costs, factors in float32 and in bfloat16   8B: 42 GB
    startup   how fast commands start
    from-nf4  NF4 → 16 bit, against writing as many bytes             8B: 23 GB
    to-nf4    16 bit → NF4                                            8B: 22 GB
    quantise  the NF4 encoder, against bitsandbytes                   4 GB of memory
    hub       a base of 10 GB streamed in and pushed out, disk and memory looked at
    items     what work costs by its kind, of which sizings are made   4 GB
    profile   where the time of a merge goes                          8B: 35 GB
    scale     peak memory from 1B to 30B with an output that is thrown away, and what hashes cost
    codecs    decoding and encoding of every encoding, against the library that has it
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import codec_parts
import copies_part
import from_nf4
import hub
import item_costs
import plain
import profile_part
import ranks
import scale
import startup
import to_nf4
from cases import work_folder
from measuring import REPO, BenchError, say
from reporting import Part, printed, report

PARTS: dict[str, Callable[[argparse.Namespace, Path], Part]] = {
    "plain": plain.measured,
    "ranks": ranks.measured,
    "from-nf4": from_nf4.measured,
    "quantise": codec_parts.quantise,
    "to-nf4": to_nf4.measured,
    "codecs": codec_parts.codecs,
    "startup": startup.measured,
    "hub": hub.measured,
    "scale": scale.measured,
    "profile": profile_part.measured,
    "items": item_costs.measured,
    "products": codec_parts.products,
    "copies": copies_part.measured,
}


def run(args: argparse.Namespace, work: Path) -> str:
    """Measure the parts asked for, put each into the report when it is done, and return them."""
    parts = []
    for name in args.part:
        parts.append(PARTS[name](args, work))
        if not args.print:
            old = args.markdown.read_text(encoding="utf-8") if args.markdown.exists() else ""
            args.markdown.write_text(report(parts[-1:], old), encoding="utf-8")
    return printed(parts)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Benchmarks of loraweld.")
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=[*PARTS], help="what to measure (default: everything)")
    add("--shape", nargs="+", default=["1B", "8B"], help="default 1B 8B; 8B takes 35 GB of disk")
    add("--rank", nargs="+", type=int, default=[16, 64], help="ranks of the adapters, the first for NF4 (16 64)")
    add("--runs", type=int, default=5, help="runs of each tool per shape and rank (default 5)")
    add("--rounds", type=int, default=5, help="rounds of quantise and codecs (default 5)")
    add("--other-runs", type=int, default=5, help="runs of PEFT and the peers per shape, 0 for none (default 5)")
    add("--workdir", type=Path, default=REPO / ".cache", help="where files are written (default .cache)")
    add("--keep", action="store_true", help="keep bases and adapters for the next time")
    add("--print", action="store_true", help="print only, leave the report as it is")
    add("--markdown", type=Path, default=REPO / "benchmarks" / "RESULTS.md", help="the report")
    return parser.parse_args()


def volunteer_for_oom() -> None:
    """Let the kernel end a run of ours first, should memory run out: PEFT holds the whole model."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def main() -> int:
    """Run the command line."""
    args = parse_args()
    volunteer_for_oom()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the files are removed
    try:
        with work_folder(args.workdir, keep=args.keep) as work:
            print(run(args, work))
    except BenchError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
