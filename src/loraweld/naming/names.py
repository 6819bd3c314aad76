"""Parameter name in a trained model → name of the stored tensor."""

from __future__ import annotations

import re
from collections.abc import Collection

from loraweld.errors import MatchError
from loraweld.naming.families import renamings


class Names:
    """Finds the stored tensor that a parameter of the trained model lies in.

    A name is tried as it stands, then with its family's renamings, then with one leading component more or
    less: an adapter of `LlamaModel` has no `model.`, the GPT-2 files of the Hub have no `transformer.`.
    """

    def __init__(self, stored: Collection[str], model_type: str) -> None:
        self._stored = frozenset(stored)
        self._renamings = [(re.compile(pattern), new) for pattern, new in renamings(model_type)]
        self._leading = sorted({name.partition(".")[0] for name in stored})

    def find(self, name: str) -> str | None:
        """Return the stored name of parameter `name`, None if there is none.

        Raises:
            MatchError: several stored tensors fit equally well.
        """
        spellings = self._spellings(name)
        for candidates in (spellings, [new for name in spellings for new in self._other_prefixes(name)]):
            hits = sorted(self._stored.intersection(candidates))
            if len(hits) > 1:
                raise MatchError(f"{name!r} fits several tensors of the base: {', '.join(hits)}")
            if hits:
                return hits[0]
        return None

    def knows(self, part: str) -> bool:
        """Return whether any stored name has `part`, one component or more, between its dots."""
        return any(f".{part}." in f".{name}." for name in self._stored)

    def _spellings(self, name: str) -> list[str]:
        renamed = (pattern.sub(new, name) for pattern, new in self._renamings)
        return list(dict.fromkeys([name, *renamed]))

    def _other_prefixes(self, name: str) -> list[str]:
        return [name.partition(".")[2], *(f"{leading}.{name}" for leading in self._leading)]
