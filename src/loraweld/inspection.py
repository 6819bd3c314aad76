"""What a folder is (a base, an adapter, an output of a merge), from headers and configs alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraweld.adapter.config import CONFIG_NAME
from loraweld.adapter.files import Adapter, open_adapter
from loraweld.checkpoint.base import Base, open_base
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.recognise import quantization_settings
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.stored import StoredTensor
from loraweld.checkpoint.url import shown
from loraweld.errors import RequestError
from loraweld.planning.merge_plan import RECORD_NAME


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what `path` (a folder, a Hub id or a URL) is, as plain JSON values.

    Raises:
        LoraweldError: neither a model nor an adapter, or damaged.
    """
    try:
        located = locate_base(str(path))
        folder = located.folder
        where = shown(str(path)) if located.scratch else None
        if (folder / CONFIG_NAME).exists() or len(list(folder.glob(f"*/{CONFIG_NAME}"))) == 1:
            return _adapter(open_adapter(folder), where)
        return _model(open_base(folder, label=located.label, commit=located.commit), where)
    except OSError as error:  # a name too long, a folder that may not be read
        raise RequestError(f"{str(error.filename)[:200]}: {error.strerror}") from None


def _adapter(adapter: Adapter, where: str | None) -> dict[str, Any]:
    config = adapter.config
    tensors = [tensor for parts in adapter.modules.values() for tensor in parts.values()]
    return {
        "kind": "adapter",
        "path": where or str(adapter.folder),
        "peft_type": config.peft_type,
        "base": config.base,
        "revision": config.revision,
        "rank": config.rank or None,
        "alpha": config.alpha if config.rank else None,
        "rslora": config.use_rslora,
        "dora": config.use_dora,
        "init": config.init,
        "task_type": config.task_type or None,
        "modules": len(adapter.modules),
        "targets": sorted({module.rpartition(".")[2] for module in adapter.modules}),
        "replaced_parameters": sorted(adapter.parameters),
        **_totals([*tensors, *adapter.parameters.values(), *adapter.shared.values()]),
    }


def _model(base: Base, where: str | None) -> dict[str, Any]:
    record = base.folder / RECORD_NAME
    return {
        "kind": "merged model" if record.exists() else "model",
        "path": where or str(base.folder),
        "commit": base.commit,
        "model_type": base.model_type or None,
        "architectures": base.config.get("architectures"),
        "vocab_size": base.config.get("vocab_size"),
        "tie_word_embeddings": base.config.get("tie_word_embeddings"),
        "quantization": quantization_settings(base.config).get("quant_method"),
        "main_dtype": base.main_dtype,
        "files": [{"name": file.path.name, "bytes": file.file_bytes} for file in base.files],
        "encodings": dict(Counter(t.encoding.kind for t in base.tensors.values() if isinstance(t, EncodedTensor))),
        **_totals(base.stored.values()),
        "parameters": sum(math.prod(tensor.shape) for tensor in base.tensors.values()),
        **({"merged_from": read_json_object(record)} if record.exists() else {}),
    }


def _totals(tensors: Iterable[StoredTensor]) -> dict[str, Any]:
    tensors = list(tensors)
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.rows * tensor.cols for tensor in tensors),
        "bytes": sum(tensor.num_bytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors)),
    }
