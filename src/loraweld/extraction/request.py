"""What an extraction is asked for: every option checked once, at the edge."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from loraweld.errors import RequestError
from loraweld.request import PathLike

DEFAULT_RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractRequest:
    """`rank` is the largest of any module; `energy` the share of a change's squared norm that is enough, None: all.

    `saves_modules`: whether what no low rank expresses goes into the adapter whole, or ends the extraction.
    """

    base: str
    tuned: str
    output: Path
    rank: int
    energy: float | None
    saves_modules: bool
    overwrite: bool
    token: str | bool | None


def make_extract_request(
    *,
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    rank: int = DEFAULT_RANK,
    energy: float | None = None,
    modules_to_save: bool = True,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> ExtractRequest:
    """Check the options and return them as one value.

    Raises:
        RequestError: a rank below 1, or a share that is none.
    """
    if type(rank) is not int or rank < 1:
        raise RequestError(f"rank is {rank!r}, expected a whole number from 1 on")
    if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
        raise RequestError(f"energy is {energy!r}, expected a share of the change, above 0 and up to 1, such as 0.99")
    place = Path(output)
    return ExtractRequest(
        base=os.fspath(base),
        tuned=os.fspath(tuned),
        output=place.resolve() if place.is_symlink() else place,
        rank=rank,
        energy=energy,
        saves_modules=modules_to_save,
        overwrite=overwrite,
        token=token,
    )
