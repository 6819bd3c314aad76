"""The output place against the inputs: what would overwrite what it reads is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loraweld.checkpoint.url import is_url, shown
from loraweld.errors import OutputError, RequestError
from loraweld.request import MergeRequest


def check_output(request: MergeRequest, inputs: Iterable[Path]) -> None:
    """Check that the output is a place of its own.

    Raises:
        RequestError: it is, holds, or lies in an input, by any path or link.
        OutputError: it is a file.
    """
    if request.reads_only:
        return
    if request.is_local:
        check_place(request.output, inputs)
    else:
        _check_store(request)


def _check_store(request: MergeRequest) -> None:
    store = f"{request.store}/" if request.store else ""
    for name in filter(is_url, (request.base or "", request.tokenizer or "", *request.adapters)):
        source = name.rstrip("/") + "/"
        if store and (source.startswith(store) or store.startswith(source)):
            raise RequestError(
                f"output {shown(store)} and input {shown(name)} lie in one another; choose another output"
            )


def check_place(place: Path, inputs: Iterable[Path]) -> None:
    """Check that the folder `place` is none of the inputs, holds none and lies in none.

    Raises:
        RequestError: it does, by any path or link.
        OutputError: it is a file.
    """
    output = place.resolve()
    for folder in inputs:
        source = folder.resolve()
        if output == source or (output.exists() and output.samefile(source)):
            raise RequestError(f"output {place} is the input {folder}; choose another folder")
        if source.is_relative_to(output):
            raise RequestError(f"output {place} holds the input {folder}; choose another folder")
        if output.is_relative_to(source):
            raise RequestError(f"output {place} lies inside the input {folder}; choose another folder")
    if place.exists() and not place.is_dir():
        raise OutputError("is a file; the output is a folder", path=place)
