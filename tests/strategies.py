"""Hypothesis strategies: values near rounding ties, entries of a header, bytes that almost are one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from hypothesis import strategies as st

from exact import Format
from loraweld.dtypes import DTYPES

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype code, shape

# Any name that UTF-8 can hold; `__metadata__` is not a tensor.
NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
METADATA = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)


@st.composite
def near_ties(draw: st.DrawFn, form: Format) -> float:
    """The midpoint of two neighbouring values of `form`, or a float64 a few steps beside it."""
    exponent = draw(st.integers(form.min_exponent - form.precision, form.max_exponent))
    step = 2.0 ** (max(exponent, form.min_exponent) - form.precision + 1)
    whole = draw(st.integers(0, 2**form.precision - 2))
    value = (whole + 0.5) * step
    for _ in range(draw(st.integers(0, 2))):
        value = math.nextafter(value, draw(st.sampled_from([-math.inf, math.inf])))
    return value * draw(st.sampled_from([-1, 1]))


@st.composite
def shapes(draw: st.DrawFn, code: str) -> tuple[int, ...]:
    """A shape of few elements; those smaller than a byte fill whole bytes together."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    return tuple(shape) if DTYPES[code].bits >= 8 else (*shape, 4)


@st.composite
def entries(draw: st.DrawFn, *, codes: Sequence[str] = tuple(DTYPES), min_size: int = 0) -> list[Entry]:
    """Tensors with different names."""
    found = draw(st.lists(NAMES, unique=True, min_size=min_size, max_size=8))
    of_tensors = [draw(st.sampled_from(codes)) for _ in found]
    return [(name, code, draw(shapes(code))) for name, code in zip(found, of_tensors, strict=True)]


def json_values() -> st.SearchStrategy[object]:
    """Any JSON, with the words of a header here and there."""
    words = st.sampled_from(["__metadata__", "dtype", "shape", "data_offsets", "F32", "U8", "w"])
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=5,
    )


@st.composite
def header_like_entries(draw: st.DrawFn) -> bytes:
    """The JSON of a header whose fields have the right names and any values."""
    numbers = st.sampled_from([0, 1, 2, 4, 6, -1, 2**48, 2**63, 10**30, True, None, 1.0])
    other = st.sampled_from([None, "", 7, [], {}, [[]], [{}]])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F32", "F4", "X1"]) | other,
            "shape": st.lists(numbers, max_size=3) | other,
            "data_offsets": st.tuples(numbers, numbers) | other,
        }
    )
    body = draw(st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entry | other, max_size=3))
    return json.dumps(body).encode()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes changed, put in or cut off."""
    mutable = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(mutable)))
        change = draw(st.sampled_from(["set", "insert", "remove", "cut"]))
        if change == "cut":
            del mutable[at:]
        elif change == "remove":
            del mutable[at : at + draw(st.integers(1, 8))]
        else:
            end = at + 1 if change == "set" else at
            mutable[at:end] = draw(
                st.binary(min_size=1, max_size=3) | st.sampled_from([b'"', b"}", b"[", b"9", b"\\u"])
            )
    return bytes(mutable)
