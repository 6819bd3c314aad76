"""CRC-32 of the tensors that a merge makes: of each item as it is made, put together in whatever order items come.

Tensors that are kept have none. They are the base's bytes, which some sinks never read. CRC-32 is that of zlib and PNG
(ISO 3309): other tools can check it, the sum of two pieces follows from theirs, and it costs less than a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from zlib_ng.zlib_ng import crc32

from loraweld.execute.items import Item
from loraweld.planning.merge_plan import PlacedPart

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # bits are reflected: the highest is that of x⁰


class ItemChecksums:
    """The checksums of what is made in one item, part by part, while its bytes come in order."""

    def __init__(self, item: Item) -> None:
        self._parts = made_parts(item)
        self.values = [0] * len(self._parts)

    def add(self, offset: int, data: memoryview) -> None:
        """Count bytes that begin at `offset` of the output file."""
        for index, part in enumerate(self._parts):
            start, end = max(part.offset, offset), min(part.end, offset + len(data))
            if start < end:
                self.values[index] = crc32(data[start - offset : end - offset], self.values[index])


def made_parts(item: Item) -> list[PlacedPart]:
    """Return the tensors of which an item has bytes that are not the base's."""
    return [part for part in item.placed if not part.recipe.keeps_bytes and part.end > part.offset]


def tensor_checksums(items: Iterable[Item], noted: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Return the CRC-32 of each tensor that was made, by its name.

    `items` are those of a whole merge, in order; `noted` has by an item's key its checksums first.
    """
    found: dict[str, int] = {}
    for item in items:
        for part, value in zip(made_parts(item), noted[item.key], strict=False):
            num_bytes = min(part.end, item.end) - max(part.offset, item.start)
            name = part.part.name
            found[name] = joined(found[name], int(value), num_bytes) if name in found else int(value)
    return found


def joined(first: int, second: int, num_bytes: int) -> int:
    """Return the CRC-32 of two byte strings one after the other; `num_bytes` are those of the second.

    The first is multiplied by x to the number of bits that follow it, modulo the polynomial, as in zlib's
    crc32_combine.
    """
    return _product(_power(8 * num_bytes), first) ^ second


def _product(one: int, other: int) -> int:
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


@lru_cache(maxsize=1 << 10)  # nearly all items are of one size
def _power(exponent: int) -> int:
    """Return x to this exponent."""
    power, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            power = _product(square, power)
        square = _product(square, square)
        exponent >>= 1
    return power
