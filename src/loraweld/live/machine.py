"""What the machine has for a save: packages, and a folder for what is only needed meanwhile."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from loraweld.errors import RequestError


def require(*packages: str) -> None:
    """Check that packages of the extra `live` are there.

    Raises:
        RequestError: names those that are not, and how to get them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RequestError(f"a model in memory needs {' and '.join(missing)}: pip install 'loraweld[live]'")


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
