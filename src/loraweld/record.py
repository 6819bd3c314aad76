"""loraweld.json: what an output was merged from, without clocks, paths or machine names.

Two merges of the same inputs give the same record, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraweld._version import __version__
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.jsonfile import dump_json, read_json_if_there
from loraweld.checkpoint.mounted import open_stored
from loraweld.errors import CheckpointError
from loraweld.planning.facts import Facts
from loraweld.planning.merge_plan import MergePlan, rounding_json
from loraweld.request import CPU

CHECKSUMS = "tensors_crc32"
_PIECE_BYTES = 1 << 20


def make_record(plan: MergePlan, facts: Facts) -> Mapping[str, Any]:
    """Return what is known of a merge before it is made; reads the adapters once to hash them."""
    return {
        "loraweld_version": __version__,
        "save_method": plan.save_method,
        **({"gguf_types": list(plan.export.types)} if plan.export else {}),
        "dtype": plan.dtype,
        "fingerprint": plan.fingerprint,
        "base": _base(facts.base),
        "adapters": [
            {
                "name": adapter.label,
                "sha256": file_sha256(adapter.weights),
                "config_sha256": file_sha256(adapter.config.path),
            }
            for adapter in facts.given
        ],
        **({"combination": plan.combination.to_json()} if plan.combination else {}),
        **({"rounding": rounding} if (rounding := rounding_json(plan.rounding_seed)) else {}),
        **({"device": plan.device} if plan.device != CPU else {}),
        "recipes": dict(plan.recipes_by_kind),
        "modules": [
            {"adapter": m.adapter, "module": m.module, "tensor": m.tensor, "what": m.what} for m in plan.modules
        ],
        "notes": list(plan.notes),
    }


def record_text(record: Mapping[str, Any], checksums: Mapping[str, int]) -> str:
    """Return the text of loraweld.json; `checksums` are the CRC-32 of the tensors that the merge has made."""
    found = {name: f"{value:08x}" for name, value in sorted(checksums.items())}
    return dump_json({**record, **({CHECKSUMS: found} if found else {})})


def is_record(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the file is there and is that of a merge with this record, whatever it says of the tensors."""
    try:
        found = read_json_if_there(path)
    except CheckpointError:
        return False
    found.pop(CHECKSUMS, None)
    return record_text(found, {}) == record_text(record, {})


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's contents.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_stored(path) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    return digest.hexdigest()


def _base(base: Base) -> Mapping[str, Any]:
    """Name, commit and header hashes; a local folder counts by its last part."""
    return {
        "name": base.label if base.commit else Path(base.label).name,
        "commit": base.commit,
        "headers_sha256": {file.path.name: hashlib.sha256(file.description).hexdigest() for file in base.files},
    }
