"""The tensors that a merge has made, against their checksums in its record: is a file still what was written?"""

from __future__ import annotations

from collections.abc import Iterator

from zlib_ng.zlib_ng import crc32

from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.errors import CheckpointError
from loraweld.record import CHECKSUMS
from loraweld.verification.findings import Finding
from loraweld.verification.opened import Opened

_PIECE_BYTES = 4 << 20


def damaged(opened: Opened, reader: Reader) -> Iterator[Finding]:
    """Yield a finding for each tensor whose bytes are not those that the record speaks of."""
    noted = opened.record.get(CHECKSUMS)
    for name, expected in noted.items() if isinstance(noted, dict) else ():
        tensor = opened.stored.get(name)
        if tensor is None:
            continue
        try:
            found = f"{_crc32(tensor, reader):08x}"
        except CheckpointError:
            continue  # told where its values are read
        if found != expected:
            message = f"was changed or damaged after it was written: CRC-32 {found}, loraweld.json has {expected!s:.20}"
            yield Finding(check="checksum", where=name, message=message)


def _crc32(tensor: StoredTensor, reader: Reader) -> int:
    value, buffer = 0, memoryview(bytearray(min(_PIECE_BYTES, tensor.num_bytes)))
    for start in range(0, tensor.num_bytes, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, tensor.num_bytes - start)]
        reader.read_into(tensor.path, tensor.offset + start, piece)
        value = crc32(piece, value)
    return value
