"""Several LoRA adapters → one new adapter in a scratch folder, in PEFT's format, with the scaling 1 (alpha = r).

From there it is an adapter as any other. Source of the form: PEFT 0.21.2, `LoraModel.add_weighted_adapter`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.adapter.config import CONFIG_NAME
from loraweld.adapter.files import SAFE_NAME, Adapter, Scratch, open_adapter
from loraweld.checkpoint.jsonfile import dump_json
from loraweld.checkpoint.stored import StoredTensor
from loraweld.checkpoint.url import shown
from loraweld.combine.methods import Combination
from loraweld.combine.modules import CombinedModule, combined_modules, kept_tensors

Kept = Sequence[tuple[Adapter, StoredTensor]]


def combined_adapter(adapters: Sequence[Adapter], combination: Combination, *, base: tuple[str, str | None]) -> Adapter:
    """Combine the adapters and return the new one, of this base and revision; the folder it lies in goes with it.

    Raises:
        AdapterError: the adapters cannot be combined in this way.
    """
    modules = combined_modules(adapters, combination)
    kept = kept_tensors(adapters, modules)
    scratch = Scratch()
    config = _config(adapters, modules, kept) | {"base_model_name_or_path": shown(base[0]), "revision": base[1]}
    (scratch.folder / CONFIG_NAME).write_text(dump_json(config), encoding="utf-8")
    _write(scratch.folder / SAFE_NAME, modules, [tensor for _, tensor in kept], combination)
    label = f"{' + '.join(adapter.label for adapter in adapters)} ({combination.method})"
    return replace(open_adapter(scratch.folder, label=label), scratch=scratch)


def _write(
    path: Path, modules: Sequence[CombinedModule], kept: Sequence[StoredTensor], combination: Combination
) -> None:
    from loraweld.combine.arithmetic import write_combination  # torch is imported only when it is needed

    write_combination(path, modules, kept, combination)


def _config(adapters: Sequence[Adapter], modules: Sequence[CombinedModule], kept: Kept) -> dict[str, Any]:
    """Return adapter_config.json; every module is named in full, so that no other is meant."""
    first = adapters[0].config.raw
    rank = modules[0].rank if modules else 1
    others = {f"^{re.escape(module.path)}": module.rank for module in modules if module.rank != rank}
    sources = list({id(adapter): adapter for adapter, _ in kept}.values())
    return {
        **{key: first[key] for key in ("auto_mapping", "peft_version", "task_type") if key in first},
        "bias": next((found for a in sources if (found := a.config.raw.get("bias", "none")) != "none"), "none"),
        "fan_in_fan_out": any(adapter.config.fan_in_fan_out for adapter in adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "alpha_pattern": others,
        "modules_to_save": list(dict.fromkeys(name for a in sources for name in a.config.modules_to_save)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "target_modules": [module.path for module in modules],
        "trainable_token_indices": next(
            (t for a in sources if (t := a.config.raw.get("trainable_token_indices"))), None
        ),
        "use_dora": False,
        "use_rslora": False,
    }
