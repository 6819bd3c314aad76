"""The memory in which one thread makes the bytes of an item, one portion after the other."""

from __future__ import annotations

from loraweld.sinks.system import BLOCK_BYTES, aligned_buffer


class Buffer:
    """Room for a portion: its `body`, which begins on a page and is written, between two blocks that are not.

    A tile that goes over the ends of a portion by less than a block is computed in its place all the same.
    """

    def __init__(self, num_bytes: int) -> None:
        self._memory = memoryview(aligned_buffer(num_bytes + 2 * BLOCK_BYTES))
        self.body = self._memory[BLOCK_BYTES : BLOCK_BYTES + num_bytes]

    def around(self, count: int) -> memoryview:
        """Return the first `count` bytes of the body with the block before them and the block behind."""
        return self._memory[: count + 2 * BLOCK_BYTES]
