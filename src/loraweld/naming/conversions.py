"""What transformers does to the names of a checkpoint while it loads it.

The `rows` of `renamings.json` (see `loraweld.naming.architecture`) are by model type or class name; a name instead of
a list stands for the rows of another entry. A row has `find`, an expression with one group g0, g1, … for each spelling
on disk, and `put`, what takes the place of what was found. A row with `operations` is a converter: it makes the
tensors of the model (`memory`, patterns) from those of the file (`disk`, patterns; `*` is any number) by these
operations in order, each {"name": …, its arguments}.

The rows are applied as transformers applies them, from the name on disk to the name in memory: the way back is not
unique. Source: `conversion_mapping.py` and `core_model_loading.py` of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from loraweld.naming.architecture import Part, parts, prefix_of, table

_LEGACY = "legacy"
_CUTS = ([{"name": "Chunk", "dim": 0}],)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LITERAL_NUMBER = re.compile(r"\.[0-9]|\[")
_BACK_REFERENCE = re.compile(r"\\(\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One row, and where in the model it acts: under one of `scopes`, the first that a name begins with.

    `disk`, `memory` and `operations` are those of a converter, empty for a renaming. A row with `only_if` acts only
    on a checkpoint that has such a name. `offset` is added to the number that is found.
    """

    find: re.Pattern[str]
    put: tuple[str, ...]
    scopes: tuple[str, ...] = ("",)
    disk: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    operations: tuple[Mapping[str, Any], ...] = ()
    only_if: str | None = None
    offset: int = 0

    @property
    def is_renaming(self) -> bool:
        """Whether the row changes nothing but names."""
        return not self.operations

    def rename(self, name: str) -> str | None:
        """Return what this row makes of `name`, which is as the rows before it left it; None if it does not fit."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        inner = name[len(scope) :] if scope is not None else ""
        hit = self.find.search(inner) if scope is not None else None
        if hit is None or scope is None:
            return None
        group = next(key for key, value in hit.groupdict().items() if value is not None)
        put = self.put[int(group[1:])] if self.only_if else self.put[0]
        return scope + inner.replace(hit[0], self._filled(put, hit, group), 1)

    def _filled(self, put: str, hit: re.Match[str], group: str) -> str:
        """Put the groups inside `group` into `put`."""
        first = self.find.groupindex[group]

        def value(reference: re.Match[str]) -> str:
            found = hit[first + int(reference[1])]
            return str(int(found) + self.offset) if self.offset else found

        return _BACK_REFERENCE.sub(value, put)


def conversions(config: Mapping[str, Any]) -> tuple[Conversion, ...]:
    """Return the rows for a model with this config, in the order in which transformers applies them.

    Source: `get_model_conversion_mapping`. A row of a part acts on the names under the part's path, given with
    the model's own prefix or without.
    """
    prefix = prefix_of(config)
    claimed: dict[str, list[str]] = {}
    found: list[Conversion] = []
    for part in parts(config):
        key = _key_of(part, claimed)
        if key is None:
            continue
        claimed.setdefault(part.class_name, []).append(part.path)
        if key != part.class_name:
            claimed.setdefault(key, []).append(part.path)
        found += [replace(row, scopes=_scopes(part.path, prefix)) for row in _rows(key)]
    return (*found, *_rows(_LEGACY))


def trained_names(stored: Collection[str], rows: Iterable[Conversion]) -> dict[str, str]:
    """Return the name in memory of each stored tensor that `rows` rename; converters are left out."""
    active = [row for row in rows if row.is_renaming and (row.only_if is None or _has(stored, row.only_if))]
    by_kind: dict[str, list[str]] = {}
    for name in stored:
        by_kind.setdefault(_NUMBER.sub("#", name), []).append(name)
    if not any(_LITERAL_NUMBER.search(row.find.pattern) for row in active):
        # Names that differ in a number only are renamed all or none: one of them tells.
        kinds = [names for names in by_kind.values() if _renamed(names[0], active) != names[0]]
    else:
        kinds = list(by_kind.values())
    renamed = ((name, _renamed(name, active)) for names in kinds for name in names)
    return {name: in_memory for name, in_memory in renamed if in_memory != name}


@dataclass(frozen=True, slots=True)
class Split:
    """A parameter of the trained model that is part `part` of the `parts` equal ones of a stored tensor, row by row."""

    stored: str
    part: int
    parts: int


def split_names(stored: Collection[str], rows: Sequence[Conversion]) -> dict[str, Split]:
    """Return, by their names in memory, the parameters that transformers makes by cutting a stored tensor into rows."""
    renamings = [row for row in rows if row.is_renaming and (row.only_if is None or _has(stored, row.only_if))]
    cutting = [row for row in rows if [dict(one) for one in row.operations] in _CUTS]
    found: dict[str, Split] = {}
    for name in stored if cutting else ():
        renamed = _renamed(name, renamings)
        for row in cutting:
            parts = [replace(row, put=(put,)).rename(renamed) for put in row.put]
            found |= {part: Split(name, i, len(parts)) for i, part in enumerate(parts) if part is not None}
    return found


def _renamed(name: str, rows: Iterable[Conversion]) -> str:
    for row in rows:
        name = row.rename(name) or name
    return name


def _key_of(part: Part, claimed: Mapping[str, list[str]]) -> str | None:
    """Return whose rows a part gets: its class's, else its model type's, unless a model around it has had them."""
    if _is_inside(part.path, claimed.get(part.class_name, ())):
        return None
    if part.class_name in table()["rows"]:
        return part.class_name
    if part.model_type not in table()["rows"] or _is_inside(part.path, claimed.get(part.model_type, ())):
        return None
    return part.model_type


def _is_inside(path: str, others: Iterable[str]) -> bool:
    return any(not other or path.startswith(f"{other}.") for other in others)


def _scopes(path: str, prefix: str) -> tuple[str, ...]:
    if not path:
        return ("",)
    inner = path.removeprefix(prefix).removeprefix(".")
    scope = f"{inner}." if inner else ""
    return (f"{prefix}.{scope}" if prefix else scope, scope)


def _has(stored: Iterable[str], pattern: str) -> bool:
    expression = re.compile(pattern)
    return any(expression.search(name) for name in stored)


@cache
def _rows(key: str) -> tuple[Conversion, ...]:
    rows = table()["rows"][key]
    if isinstance(rows, str):
        return _rows(rows)
    return tuple(
        Conversion(
            find=re.compile(row["find"]),
            put=tuple(row["put"]),
            disk=tuple(row.get("disk", ())),
            memory=tuple(row.get("memory", ())),
            operations=tuple(row.get("operations", ())),
            only_if=row.get("only_if"),
            offset=row.get("offset", 0),
        )
        for row in rows
    )
