"""bitsandbytes 4 bit: NF4 and FP4 codes in blocks of the flattened weight, with or without double quantisation.

Source: `QuantState.as_dict(packed=True)` of bitsandbytes 0.50.2; Dettmers et al. 2023, "QLoRA", section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraweld.checkpoint.encodings.encoded import CODES, EncodedTensor, PartLayout, encoded
from loraweld.checkpoint.parsing import parse_json
from loraweld.checkpoint.stored import StoredTensor, read_bytes
from loraweld.dtypes import FLOAT_CODE_BY_NAME
from loraweld.errors import CheckpointError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# Values of the codes 0 to 15: quantiles of the normal distribution, and floats with two bits of exponent and one of
# mantissa over their largest. Source: `get_4bit_type` of bitsandbytes 0.50.2; arXiv:2305.14314, appendix E.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12),
        *(-0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12),
    ),
}
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MAX_STATE_BYTES, _MAX_DIMENSIONS = 4096, 8
_STORAGE = ("U8", "I8", "BF16", "F16", "F32", "F64", "I16", "I32", "I64", "U16", "U32", "U64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bnb4:
    """`nested_blocksize` is 0 without double quantisation; `state_bytes` is the length of the JSON beside the codes."""

    quant_type: str
    blocksize: int
    nested_blocksize: int
    state_bytes: int
    nested_offset: float = 0.0
    streams: bool = True

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.quant_type}"

    def unit_rows(self, shape: tuple[int, ...]) -> int:
        """Blocks run on over the ends of rows."""
        return self.blocksize // math.gcd(self.blocksize, shape[-1])

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, PartLayout]:
        count = math.prod(shape)
        blocks = -(-count // self.blocksize)
        nested = {
            "nested_absmax": PartLayout(
                name=f"{name}.nested_absmax", dtypes=("F32",), shape=(-(-blocks // max(1, self.nested_blocksize)),)
            ),
            "nested_quant_map": PartLayout(name=f"{name}.nested_quant_map", dtypes=("F32",), shape=(256,)),
        }
        return {
            CODES: PartLayout(name=name, dtypes=_STORAGE, shape=((count + 1) // 2, 1), packed=True),
            "absmax": PartLayout(
                name=f"{name}.absmax", dtypes=("U8" if self.nested_blocksize else "F32",), shape=(blocks,)
            ),
            "quant_map": PartLayout(name=f"{name}.quant_map", dtypes=("F32",), shape=(16,)),
            **(nested if self.nested_blocksize else {}),
            "state": PartLayout(
                name=f"{name}.quant_state.bitsandbytes__{self.quant_type}", dtypes=("U8",), shape=(self.state_bytes,)
            ),
        }


def state_bytes(shape: tuple[int, ...]) -> int:
    """Return room for the JSON of any state of a weight of this shape."""
    return 240 + 16 * len(shape)


def find(tensors: Mapping[str, StoredTensor]) -> Iterator[EncodedTensor]:
    """Yield the 4-bit weights among `tensors`.

    Raises:
        CheckpointError: a state that cannot be read, or parts that do not fit it.
    """
    for name, state in tensors.items():
        match = _STATE.fullmatch(name)
        if match:
            yield _weight(match[1], match[2], state, tensors)


def _weight(name: str, quant_type: str, state: StoredTensor, tensors: Mapping[str, StoredTensor]) -> EncodedTensor:
    values = _read_state(state)
    try:
        shape = tuple(values["shape"])
        dtype = FLOAT_CODE_BY_NAME[values["dtype"]]
        nested = values.get("nested_blocksize") or 0
        encoding = Bnb4(
            quant_type=values["quant_type"],
            blocksize=values["blocksize"],
            nested_blocksize=nested,
            state_bytes=state.num_bytes,
            nested_offset=float(values["nested_offset"]) if nested else 0.0,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"tensor {state.name!r} lacks or garbles {str(error)[:200]}: {str(values)[:200]}", path=state.path
        ) from None
    if encoding.quant_type != quant_type or not _is_sane(shape, encoding):
        raise CheckpointError(
            f"tensor {state.name!r} does not describe a {quant_type} weight: {str(values)[:200]}", path=state.path
        )
    return encoded(name, dtype, shape, encoding, tensors)


def _is_sane(shape: tuple[object, ...], encoding: Bnb4) -> bool:
    """Whether values from a stranger's JSON are what their types say, and of a size that bitsandbytes writes."""
    nested = encoding.nested_blocksize
    return (
        0 < len(shape) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 < size < 2**40 for size in shape)
        and type(encoding.blocksize) is int
        and encoding.blocksize in BLOCKSIZES
        and type(nested) is int
        and 0 <= nested < 2**40
        and math.isfinite(encoding.nested_offset)
    )


def _read_state(state: StoredTensor) -> dict[str, Any]:
    if state.dtype != "U8" or state.num_bytes > _MAX_STATE_BYTES:
        raise CheckpointError(
            f"tensor {state.name!r} is {state.dtype} {state.shape}, expected a short JSON text as U8", path=state.path
        )
    try:
        values = parse_json(read_bytes(state))
    except ValueError as error:
        raise CheckpointError(f"tensor {state.name!r} is not valid JSON ({error})", path=state.path) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"tensor {state.name!r} is not a JSON object", path=state.path)
    return values
