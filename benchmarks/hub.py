"""A base streamed from the Hub and the result pushed to it: what lies on the disk meanwhile, and the peak memory."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from cases import BENCHMARKS, LORAWELD
from measuring import ENVIRONMENT, GB, MIB, measure, say
from reporting import Part, conditions, promise, show, table
from synthetic import write_adapter

SHAPE, RANK, SHARDS = "5B", 16, "1GB"
MOST_DISK_BYTES, MOST_RSS_BYTES = int(2.2 * GB), 600 * MIB
LOOK_SECONDS = 0.05
CONDITIONS = (
    f"`loraweld merge ADAPTER --base org/base --stream-base --push-to-hub me/model --max-shard-size {SHARDS}`, all "
    "seven projections. The Hub is the tests' server in another process of the same machine; the base is made as it is "
    f"asked for, uploads are checked and forgotten. The disk is looked at every {LOOK_SECONDS * 1000:.0f} ms: blocks "
    "of all files that the merge has made, in its folder and in the folder for temporary files."
)


class DiskWatch:
    """Looks at folders again and again, and keeps the largest sum of what their files take."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most_bytes = 0

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.most_bytes = max(self.most_bytes, sum(map(taken, self._folders)))


def taken(folder: Path) -> int:
    """Return the bytes on disk of all files below a folder."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(path) / name).st_blocks * 512
            except FileNotFoundError:
                continue  # gone since it was listed
    return total


def measured(args: argparse.Namespace, work: Path) -> Part:
    """Stream, merge and push once."""
    adapter, here, temporary = work / "adapter", work / "here", work / "tmp"
    write_adapter(adapter, Path("org/base"), SHAPE, RANK)
    here.mkdir()
    temporary.mkdir()
    command = [sys.executable, str(BENCHMARKS / "virtual_hub.py"), SHAPE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        say(f"hub: {SHAPE}, in shards of {SHARDS}")
        ENVIRONMENT.update(
            HF_ENDPOINT=url,
            HF_TOKEN="hf_writer",
            HF_HOME=str(work / "home"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            TMPDIR=str(temporary),
        )
        merge = [*LORAWELD, "merge", str(adapter), "--base", "org/base", "--stream-base", "--quiet"]
        merge += ["--push-to-hub", "me/model", "--max-shard-size", SHARDS]
        with DiskWatch(here, temporary, work / "home") as watch:
            sample = measure(["env", "-C", str(here), *merge], work / "log.txt")
        print(file=server.stdin, flush=True)
        told = json.loads(server.stdout.readline())
        server.stdin.close()
        server.wait()
    assert any(name.endswith(".index.json") for name in told["files"]), "the model is not there"
    rows = [
        ["base streamed", show(told["sent_bytes"], 2, GB) + " GB"],
        ["result pushed", f"{show(sum(told['received']), 2, GB)} GB in {len(told['received'])} files"],
        ["most on the disk at any time", show(watch.most_bytes, 2, GB) + " GB"],
        ["left on the disk", f"{taken(here) + taken(temporary)} bytes"],
        ["peak RSS", show(sample.peak_rss_bytes, 0, MIB) + " MiB"],
        ["wall time", show(sample.wall_s, 1) + " s"],
        ["CPU time", show(sample.cpu_s, 1) + " s"],
    ]
    promises = [
        promise("Local disk ≤ 2.2 GB", [watch.most_bytes / GB], "GB", lambda value: value * GB <= MOST_DISK_BYTES),
        promise(
            "Peak RSS ≤ 600 MiB", [sample.peak_rss_bytes / MIB], "MiB", lambda value: value * MIB <= MOST_RSS_BYTES
        ),
    ]
    blocks = [table(["", "one run"], rows), *conditions(CONDITIONS, work)]
    return Part(title="Streamed from the Hub and pushed to it", promises=promises, blocks=blocks)
