"""What the machine has for a save: packages, free memory, and a folder for what is only needed meanwhile."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from loraweld.errors import RequestError

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_UNKNOWN = 4 << 30


def require(*packages: str) -> None:
    """Check that packages of the extra `live` are there.

    Raises:
        RequestError: names those that are not, and how to get them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RequestError(f"a model in memory needs {' and '.join(missing)}: pip install 'loraweld[live]'")


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


@contextmanager
def workspace(location: Path) -> Iterator[Path]:
    """Yield a folder of its own in `location`; afterwards it is gone, and what of `location` was made for it.

    Raises:
        RequestError: the place cannot be written.
    """
    made = [place for place in (location, *location.parents) if not place.exists()]
    try:
        location.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="loraweld-", dir=location))
    except OSError as error:
        raise RequestError(f"temporary_location is {str(location)!r}: {error.strerror}") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for place in made:
            with suppress(OSError):  # not empty: something else is there
                place.rmdir()
