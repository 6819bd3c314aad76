"""JSON of strangers → values, within bounds: bytes, what they become in memory, depth, digits, names given twice.

Infinity and NaN are let through: configs of transformers have them (Mamba 2's `time_step_limit`). Where a number is
read it is checked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from loraweld.errors import shortened

MAX_DEPTH = 100  # configs of nested models have about ten levels
MAX_DIGITS = 40  # more than any size, offset or id; a float has room for it
MAX_VALUE_BYTES = 200_000_000  # Gemma's tokenizer.json, of 515,000 merges, takes about 150 MB
# What a value costs in memory: CPython's sizes of a small object, a list and a dict with one entry.
_COSTS = {b",": 64, b":": 64, b"[": 72, b"{": 232}
_CONTAINERS = (dict, list)


def parse_json(text: bytes, *, unique_names: bool = True) -> Any:
    """Return the value that `text` is, in UTF-8.

    `unique_names`: whether an object that has a name twice is refused; readers of JSON differ in which one counts.

    Raises:
        ValueError: it is not JSON, or out of bounds; the message says how.
    """
    needed = sum(text.count(sign) * cost for sign, cost in _COSTS.items())
    if needed > MAX_VALUE_BYTES:
        raise ValueError(f"its values would take about {needed} bytes of memory, limit is {MAX_VALUE_BYTES}")
    hook: Callable[[list[tuple[str, Any]]], Any] | None = _unique_object if unique_names else None
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=hook, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if b"\\u" in text:  # an escape may stand for half a character, which cannot be written again
        _check_writable(value)
    _check_depth(value)
    return value


def _check_writable(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (name, count), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {shortened(name)} {count} times, expected once")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, limit is {MAX_DIGITS}")
    return int(digits)


def _check_depth(value: object) -> None:
    level = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, _CONTAINERS)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
