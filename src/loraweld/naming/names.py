"""Parameter name in a trained model → name of the stored tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loraweld.errors import MatchError
from loraweld.naming.architecture import parts
from loraweld.naming.conversions import Split, conversions, split_names, trained_names


class Names:
    """Finds the stored tensor that a parameter of the trained model lies in.

    A stored tensor answers to two names: the one in the file (which adapters of transformers 4 use) and the one that
    transformers 5 gives it in memory. A name is tried as it stands; then with one leading component more or less, since
    an adapter of `LlamaModel` has no `model.` and the GPT-2 files of the Hub have no `transformer.`; then as the
    name of a parameter of a model inside the model, since a text model may be trained alone.
    """

    def __init__(self, stored: Collection[str], config: Mapping[str, Any]) -> None:
        rows = conversions(config)
        self._in_memory = trained_names(stored, rows)
        self._splits = split_names(stored, rows)
        self._stored = frozenset(stored)
        self._on_disk: dict[str, list[str]] = {}
        for name, renamed in self._in_memory.items():
            self._on_disk.setdefault(renamed, []).append(name)
        self._leading = sorted({name.partition(".")[0] for name in (*self._stored, *self._on_disk)})
        self._paths = [part.path for part in parts(config) if part.path]

    def find(self, name: str) -> str | None:
        """Return the stored name of parameter `name`, None if there is none.

        Raises:
            MatchError: several stored tensors fit equally well.
        """
        further = (self._one_of(name, candidates(name)) for candidates in (self._other_prefixes, self._inner))
        return self.exact(name) or next(filter(None, further), None)

    def exact(self, name: str) -> str | None:
        """Return the stored tensor that answers to `name` itself, None if there is none.

        Raises:
            MatchError: it is the name on disk of one tensor, and in memory of another.
        """
        return self._one_of(name, [name])

    def find_part(self, name: str) -> Split | None:
        """Return which part of a stored tensor parameter `name` is, None if there is no such tensor."""
        candidates = (name, *self._other_prefixes(name))
        return next((self._splits[candidate] for candidate in candidates if candidate in self._splits), None)

    def in_memory(self, stored: str) -> str:
        """Return the name in the trained model of a stored tensor."""
        return self._in_memory.get(stored, stored)

    def knows(self, part: str) -> bool:
        """Return whether any name has `part`, one component or more, between its dots."""
        return any(f".{part}." in f".{name}." for name in (*self._stored, *self._on_disk))

    def _one_of(self, name: str, candidates: Iterable[str]) -> str | None:
        hits = {hit for candidate in candidates for hit in self._answering_to(candidate)}
        if len(hits) > 1:
            raise MatchError(f"{name!r} fits several tensors of the base: {', '.join(sorted(hits))}")
        return next(iter(hits), None)

    def _answering_to(self, name: str) -> list[str]:
        renamed = self._on_disk.get(name, [])
        return [name, *renamed] if name in self._stored else renamed

    def _other_prefixes(self, name: str) -> Iterable[str]:
        return [name.partition(".")[2], *(f"{leading}.{name}" for leading in self._leading)]

    def _inner(self, name: str) -> Iterable[str]:
        return [f"{path}.{inner}" for path in self._paths for inner in (name, name.partition(".")[2])]
