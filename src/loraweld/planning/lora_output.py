"""`--save-method lora`: the adapter alone, in PEFT's format, without touching a base."""

from __future__ import annotations

from loraweld.adapter.config import CONFIG_NAME
from loraweld.adapter.files import SAFE_NAME, in_file
from loraweld.combine.adapter import combined_adapter
from loraweld.errors import RequestError
from loraweld.planning.companions import override_files
from loraweld.planning.disk import free_bytes
from loraweld.planning.facts import input_folders, named_base, open_adapters, open_tokenizer
from loraweld.planning.memory import LIBRARY_BYTES
from loraweld.planning.merge_plan import Input, MergePlan, SmallFile
from loraweld.planning.paths import check_output
from loraweld.request import CPU, MergeRequest


def plan_lora(request: MergeRequest) -> MergePlan:
    """Plan a checked copy of one adapter; a pickled one becomes safetensors. Several are combined to one first.

    Raises:
        RequestError: several adapters that are to be summed, a strength, or an option that only a merge has.
        AdapterError: the adapter is damaged or of a kind that cannot be merged.
    """
    combination = request.combination
    if len(request.adapters) != 1 and not combination.makes_adapter:
        raise RequestError(
            "save_method lora writes one adapter; combine several to one (combine cat is their sum), or merge "
            "them with merged_16bit"
        )
    if not combination.makes_adapter and not combination.is_plain:
        raise RequestError("weights and scale have no effect with save_method lora and one adapter; leave them out")
    if request.dtype != "auto" or request.max_shard_bytes is not None or request.device != CPU:
        raise RequestError("dtype, max_shard_size and device have no effect with save_method lora; leave them out")
    given, located = open_adapters(request), open_tokenizer(request)
    check_output(request, input_folders(None, given, located))
    adapter = given[0]
    if combination.makes_adapter:
        adapter = combined_adapter(given, combination, base=named_base(request, given))
    adapter = in_file(adapter)
    files = [
        SmallFile(name=CONFIG_NAME, source=adapter.config.path),
        SmallFile(name=SAFE_NAME, source=adapter.safetensors),
    ]
    tokenizer = (located or given[-1]).folder
    files += [SmallFile(name=p.relative_to(tokenizer).as_posix(), source=p) for p in override_files(tokenizer)]
    return MergePlan(
        base=adapter.config.base or "",
        adapters=tuple(adapter.label for adapter in given),
        combination=None if combination.is_plain else combination,
        output=request.output,
        save_method=request.save_method,
        dtype="auto",
        weights=(),
        small=tuple(files),
        modules=(),
        notes=(),
        inputs=tuple(Input(adapter.weights, adapter.identity) for adapter in given),
        scratch=(adapter, *given, located),
        item_bytes=0,
        buffer_bytes=0,
        workers=1,
        peak_memory_bytes=LIBRARY_BYTES,
        free_disk_bytes=free_bytes(request.output),
    )
