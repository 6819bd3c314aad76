"""The file of a page: its place is looked at first, and there is never half of it."""

from __future__ import annotations

from pathlib import Path

from loraweld.errors import OutputError
from loraweld.page.render import check_installed
from loraweld.request import PathLike


def free_place(output: PathLike, *, overwrite: bool) -> Path:
    """Return where a page is to be, if it can be drawn and put there.

    Raises:
        RequestError: what draws it is not installed.
        OutputError: something is there.
    """
    check_installed()
    page = Path(output)
    if page.is_dir() or (page.exists() and not overwrite):
        raise OutputError("exists; give --overwrite to replace it, or another name", path=page)
    return page


def write_page(page: Path, text: str) -> None:
    """Write beside the page, then rename.

    Raises:
        OutputError: it cannot be written.
    """
    part = page.with_name(f".{page.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(page)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {error.strerror}", path=page) from None
