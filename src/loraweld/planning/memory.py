"""How much memory a merge takes, from the plan alone; the budget decides how many threads and how large buffers are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraweld.adapter.edits import (
    Dora,
    Edit,
    Hadamard,
    LowRank,
    OnRows,
    PeftLayer,
    Residual,
    SingularValues,
    Weighted,
    unwrapped,
)
from loraweld.checkpoint.encodings.encoded import EncodedTensor, RequantisedTensor, Source
from loraweld.checkpoint.encodings.microscaled import MxFp4, NvFp4
from loraweld.checkpoint.remote import CACHE_BYTES, REQUEST_BYTES
from loraweld.checkpoint.url import is_url
from loraweld.errors import RequestError
from loraweld.planning.merge_plan import Recipe
from loraweld.request import MergeRequest

# The most that a thread takes on, and the journal notes. It ends where a tile begins if it can (`execute/items.py`).
ITEM_BYTES = 1 << 26
# An item is written in portions of this size, down to the least where the budget is small. Measured on an 8B model:
# half of it took 12 % longer, as threads wait for each other at each portion; twice as much took 5 % less, and 60 MiB.
BUFFER_BYTES = 1 << 24
MIN_BUFFER_BYTES = 1 << 20
# Python, torch and its thread pools, measured with torch 2.13 (CPU build): not part of the budget.
LIBRARY_BYTES = 260 << 20
# Rows are edited in tiles of about this many elements: large enough that the cost of calls does not show, and that a
# product's rows share what it lays out anew of the right factor (a third of the time at rank 256 where they are 36).
# 128 rows of 14,336: a thread holds three of them, and 2**21 were 3 % faster, but took 15 MiB more.
TILE_ELEMENTS = 7 << 18
# Of the rows of a left factor, those in memory: all of a buffer, whose elements in doubt are repaired at its end.
HELD_STRETCHES = 5
# Float32 copies of a weight that PEFT's layers hold while they are made and merged, measured on 3000 × 3000: 2 to 9
# with most tuners, 15 with FRoD, which computes in float64; and ours before and after. PEFT itself takes memory too.
PEFT_COPIES = 12
FROD_COPIES = 18
PEFT_LIBRARY_BYTES = 200 << 20
# A client of an object store with what it imports, measured with s3fs 2026.9.
CLIENT_BYTES = 40 << 20
# Of a thread that writes to one: two parts that it holds, one on its way, and what the client makes of that.
SENDING_BYTES = 56 << 20
_FACTORED = (LowRank, Dora, Residual, SingularValues, Hadamard)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes of a work item and of a thread's buffer, items in flight, and the expected peak of the whole process."""

    item_bytes: int
    buffer_bytes: int
    workers: int
    peak_bytes: int


def plan_memory(request: MergeRequest, recipes: Sequence[Recipe]) -> MemoryPlan:
    """Choose workers and buffers within the budget.

    Raises:
        RequestError: the budget cannot hold the smallest unit of work; names the tensor that needs more.
    """
    matrix, matrix_name = _largest_matrix(recipes)
    factors = max((_factor_bytes(recipe) for recipe in recipes), default=0)
    tile = max((_tile_bytes(recipe) for recipe in recipes if not recipe.keeps_bytes), default=0)
    workers = request.workers
    while workers > 1 and matrix + workers * (MIN_BUFFER_BYTES + factors + tile) > request.max_memory_bytes:
        workers -= 1
    left = request.max_memory_bytes - matrix - workers * (factors + tile)
    if left < MIN_BUFFER_BYTES:
        needed = matrix + factors + tile + MIN_BUFFER_BYTES
        raise RequestError(
            f"max_memory is {request.max_memory_bytes} bytes, but tensor {matrix_name!r} needs {needed} at a time; "
            f"give --max-memory {needed // 10**6 + 1}MB"
        )
    buffer = min(BUFFER_BYTES, left // workers) & ~(MIN_BUFFER_BYTES - 1)
    return MemoryPlan(
        item_bytes=ITEM_BYTES,
        buffer_bytes=buffer,
        workers=workers,
        peak_bytes=_library_bytes(recipes)
        + matrix
        + workers * (buffer + factors + tile)
        + _network_bytes(request, workers),
    )


def _library_bytes(recipes: Iterable[Recipe]) -> int:
    by_peft = any(isinstance(edit, PeftLayer) for recipe in recipes for edit in unwrapped(recipe.edits))
    return LIBRARY_BYTES + (PEFT_LIBRARY_BYTES if by_peft else 0)


def _network_bytes(request: MergeRequest, workers: int) -> int:
    """What lies in memory of a base and of adapters that are read from the network, and of an output that is sent."""
    urls = [is_url(name) for name in (request.base or "", *request.adapters)]
    places = sum(urls) + (request.stream_base and not urls[0])
    reading = places * CACHE_BYTES + bool(places) * workers * REQUEST_BYTES
    writing = workers * SENDING_BYTES if request.store else 0
    return reading + writing + (sum(urls) + bool(request.store)) * CLIENT_BYTES


def _largest_matrix(recipes: Iterable[Recipe]) -> tuple[int, str]:
    """Bytes of the largest tensor that must be held whole: its float32 form and its decomposition."""
    needs = [
        (max(_matrix_bytes(edit, recipe.source) for edit in unwrapped(recipe.edits)), recipe.name)
        for recipe in recipes
        if recipe.edits
    ]
    return max(needs, default=(0, max((r.name for r in recipes), key=len, default="")))


def _matrix_bytes(edit: Edit, source: Source) -> int:
    """PEFT makes several copies of a weight, one layer at a time."""
    if isinstance(edit, PeftLayer):
        held = edit.weight or source
        copies = FROD_COPIES if edit.tuner == "FROD" else PEFT_COPIES
        return 4 * copies * held.rows * held.cols + sum(tensor.num_bytes for tensor in edit.refs)
    return 4 * 4 * source.rows * source.cols if isinstance(edit, Residual) else 0


def _factor_bytes(recipe: Recipe) -> int:
    """Float32 factors of a recipe: the side along the columns whole, the other for a few stretches of rows."""
    edits = list(unwrapped(recipe.edits))
    parts = [edit for edit in edits if isinstance(edit, OnRows)]
    whole = sum(_side_bytes(edit, recipe) for edit in edits if not isinstance(edit, OnRows))
    if not parts:
        return whole
    # Of the parts, as many are loaded as an item's rows touch.
    touched = _item_rows(recipe) // min(part.stop - part.start for part in parts) + 2
    largest = max(_side_bytes(part.edit, recipe) for part in parts)
    return whole + min(touched, len(parts)) * largest


def _item_rows(recipe: Recipe) -> int:
    return min(recipe.rows, ITEM_BYTES // (2 * max(1, recipe.source.cols)) + 2)


def _side_bytes(edit: Edit, recipe: Recipe) -> int:
    if isinstance(edit, PeftLayer):
        return 2 * 4 * recipe.source.rows * recipe.source.cols  # of the merged weight, which tiles are taken from
    if not isinstance(edit, _FACTORED):
        return 0
    pairs = 2 if isinstance(edit, Hadamard) else 1
    stretches = min((HELD_STRETCHES + 1) * stretch_rows(recipe.source.cols), _item_rows(recipe))
    # A product of bfloat16 factors lays the right one out anew, and other edits want it in float32 too.
    right = 6 if any(tensor.dtype == "BF16" for tensor in edit.refs) else 4
    return edit.rank * (right * recipe.source.cols + 4 * stretches) * pairs


def stretch_rows(num_cols: int) -> int:
    """Return how many rows of a left factor are loaded at a time: whole tiles, about a quarter of those in a buffer."""
    height = tile_height(num_cols)
    tiles = BUFFER_BYTES // 2 // (height * max(1, num_cols))
    return max(1, -(-tiles // (HELD_STRETCHES - 1))) * height


def tile_height(num_cols: int, unit_rows: int = 1) -> int:
    """Return the rows of a tile, a multiple of `unit_rows`."""
    cols = max(1, num_cols)
    height = max(2, TILE_ELEMENTS // cols)
    return max(unit_rows, height // unit_rows * unit_rows)


def _tile_bytes(recipe: Recipe) -> int:
    """Scratch of one step: float32 values, a second copy, and flags; more copies where codes are unpacked or made.

    An edit with a weight has the rows without and with it, and their difference.
    """
    unit = recipe.encoding.unit_rows(recipe.shape) if recipe.encoding and recipe.is_encoded else 1
    cols = recipe.source.cols
    elements = max(TILE_ELEMENTS, tile_height(cols, unit) * cols)
    decoding = isinstance(recipe.source, EncodedTensor | RequantisedTensor)
    codes = min(ITEM_BYTES, recipe.source.codes.num_bytes) if isinstance(recipe.source, EncodedTensor) else 0
    # A weight that is quantised on the way has its block scales in memory, twice in float32.
    scales = 2 * 4 * math.prod(recipe.shape) // 32 if isinstance(recipe.source, RequantisedTensor) else 0
    in_part = any(isinstance(edit, Weighted) for edit in recipe.edits)
    return (
        (12 + 16 * decoding + 16 * recipe.is_encoded + 12 * in_part) * elements + codes + scales + _held_bytes(recipe)
    )


def _held_bytes(recipe: Recipe) -> int:
    """What an encoder holds until its weight is done: scales, and codes that do not lie row by row.

    Scales and zeros are float32 in decoder and encoder, but those of small blocks, of which there are many, bytes.
    """
    if not (recipe.encoding and recipe.is_encoded):
        return 0
    codes, *scales = recipe.parts
    per_scale = 2 if isinstance(recipe.encoding, NvFp4 | MxFp4) else 16
    held = sum(per_scale * math.prod(part.shape) for part in scales)
    return held if recipe.encoding.streams else held + codes.num_bytes
