"""What the config of a compressed-tensors model says about its weights. Source: `QuantizationArgs` of release 0.20."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraweld.errors import CheckpointError

MAX_SIZE = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Codes of `bits`, integers or floats; a scale for each `group` of a row, or each `block`, or coarser (None).

    `reordered`: the columns of a group are not neighbours, and a tensor says which they are.
    """

    bits: int
    is_float: bool
    symmetric: bool
    reordered: bool
    group: int | None
    block: tuple[int, int] | None

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The rows and columns that share a scale, if they are less than a row: none or one."""
        size = self.block or (self.group and (1, self.group))
        return (size,) if size else ()


def parse_schemes(settings: Mapping[str, Any]) -> list[Scheme]:
    """Return the schemes of the weights in `config_groups`, each once.

    Raises:
        CheckpointError: a group is not of the form that compressed-tensors writes, or the weights are rotated.
    """
    if settings.get("transform_config"):
        raise CheckpointError(
            "quantization_config has a transform_config (rotated weights), which loraweld does not read"
        )
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("config_groups in quantization_config is not an object of objects")
    weights = [group["weights"] for group in groups.values() if group.get("weights")]
    return list(dict.fromkeys(_scheme(args) for args in weights))


def parse_block(value: object) -> tuple[int, int]:
    """Return the rows and columns of a block.

    Raises:
        CheckpointError: not two positive integers.
    """
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and 0 < v < MAX_SIZE for v in value):
        return value[0], value[1]
    raise CheckpointError(f"the block size in quantization_config is {str(value)[:80]}, expected two positive integers")


def _scheme(args: object) -> Scheme:
    args = args if isinstance(args, dict) else {}
    bits, group, block = args.get("num_bits"), args.get("group_size"), args.get("block_structure")
    if type(bits) is not int or not 0 < bits <= 16 or not (group is None or _is_group(group)):
        raise CheckpointError(
            f"weights in quantization_config have num_bits {str(bits)[:80]} and group_size {str(group)[:80]}, "
            "expected 1 to 16 and a positive number, -1 or null"
        )
    return Scheme(
        bits=bits,
        is_float=args.get("type") == "float",
        symmetric=args.get("symmetric") is not False,
        reordered=group not in (None, -1) and args.get("actorder") in ("group", "dynamic", True),
        group=group if group != -1 else None,
        block=parse_block(block) if block is not None else None,
    )


def _is_group(value: object) -> bool:
    return type(value) is int and (value == -1 or 0 < value < MAX_SIZE)
