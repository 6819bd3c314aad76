"""Random bits of an element: a function of seed, tensor and place, not of a generator's state.

So they are the same in whatever order, by however many threads and in however large pieces a tensor is computed.

Word number i of a tensor is what SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
generators") returns in step i, from 0 on, from a state that is hashed from seed and name. Element e of the tensor,
counted row by row, has 16 bits of word e div 4, those from bit 16·(e mod 4) on.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from loraweld.planning.merge_plan import Draw

PIECE_ELEMENTS = 1 << 16  # whose words stay near the core

_WORD = 4  # elements
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_STEPS = np.arange(PIECE_ELEMENTS // _WORD + 1, dtype=np.uint64) * np.uint64(_GAMMA)

Random = npt.NDArray[np.uint16]
_Words = npt.NDArray[np.uint64]


class RandomBits:
    """The bits of one tensor, for one thread."""

    def __init__(self, draw: Draw) -> None:
        digest = hashlib.sha256(f"{draw.seed}\0{draw.tensor}".encode()).digest()
        self._state = int.from_bytes(digest[:8], "little")
        self._words, self._shifted = np.empty_like(_STEPS), np.empty_like(_STEPS)

    def run(self, first: int, count: int) -> Random:
        """Return the bits of elements [first, first + count), (count,); valid until the next call.

        `count` is at most `PIECE_ELEMENTS`.
        """
        word, skipped = divmod(first, _WORD)
        num_words = -(-(skipped + count) // _WORD)
        words, shifted = self._words[:num_words], self._shifted[:num_words]
        np.add(_STEPS[:num_words], np.uint64((self._state + (word + 1) * _GAMMA) & _MASK), out=words)
        return _mixed(words, shifted).view(np.uint16)[skipped : skipped + count]

    def at(self, flat: npt.NDArray[np.int64]) -> Random:
        """Return the bits of elements anywhere, (K,)."""
        word, place = np.divmod(flat, _WORD)
        words = word.astype(np.uint64) * np.uint64(_GAMMA) + np.uint64((self._state + _GAMMA) & _MASK)
        return (_mixed(words, np.empty_like(words)) >> (16 * place).astype(np.uint64)).astype(np.uint16)


def _mixed(words: _Words, shifted: _Words) -> _Words:
    """SplitMix64's finaliser, in place; `shifted` is room for as many."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= np.right_shift(words, np.uint64(shift), out=shifted)
        words *= np.uint64(factor)
    words ^= np.right_shift(words, np.uint64(31), out=shifted)
    return words
