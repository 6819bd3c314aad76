"""The memory that is free for this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_UNKNOWN = 4 << 30


def free_memory_bytes() -> int:
    """Return the memory that is free for this process: of the machine, or of its container if that is less."""
    return max(0, min([_available(), *_of_containers()]))


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN


def _of_containers() -> Iterator[int]:
    for limit, usage in _CGROUPS:
        with suppress(OSError, ValueError):  # no limit reads "max"
            yield int(Path(limit).read_text()) - int(Path(usage).read_text()) + _reclaimable()


def _reclaimable() -> int:
    """Cached files count as used, but give way."""
    with suppress(OSError, ValueError):
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return 0
