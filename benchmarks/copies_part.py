"""How bytes that do not change are best copied: by the kernel, or as the items of a merge are written."""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from codec_parts import printed_by
from reporting import Part, conditions, ratio_cells, show, table

FILE_GB = 4.295
CONDITIONS = """\
A file of 4 GiB of random bytes, in the page cache, copied until it is durable, the two in turn. By the kernel:
`copy_file_range`, as whole files are that do not change. As items: read into aligned buffers of 16 MiB and written past
the page cache, by four threads, as ranges are that do not change."""


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Measure both ways."""
    folder = work / "copies"
    folder.mkdir(exist_ok=True)
    try:
        rounds = printed_by("copies.py", args, work, str(folder))
    finally:
        shutil.rmtree(folder)
    rows = []
    for name in rounds[0]:
        wall, cpu = (statistics.median(one[name][index] for one in rounds) for index in (0, 1))
        rows.append([name, show(wall, 2), show(cpu, 2), show(FILE_GB / wall, 2)])
    ratios = [one["as items"][0] / one["by the kernel"][0] for one in rounds]
    times = table([f"median of {len(rounds)}", "wall s", "CPU s", "GB/s"], rows)
    pairs = table(["wall time", "median", "min", "max"], [["as items / by the kernel", *ratio_cells(ratios)]])
    return Part(title="Unchanged bytes", promises=[], blocks=[times, pairs, *conditions(CONDITIONS, work)])
