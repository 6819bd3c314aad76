"""Which of PEFT's tuners end in weights, and what their tensors are called; one table each for yes and no.

Source: PEFT 0.21.2, `peft.utils.peft_types.PeftType` and the `layer.py` and `model.py` of each tuner.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """How the tensors of one tuner are named, and what a layer of it depends on.

    `prefix` begins the name of each of its tensors behind the path of a module, or behind `base_model.` where all
    layers share it. `is_native`: its formula is in `compute/`; PEFT's own layer does what is left.

    `needs_all_layers`: shapes of the other layers decide what this one is. `needs_order`: so does their order.
    `needs_base`: what it changes hangs on the values that the weight has. `shares_tensors`: some tensors lie beside the
    layers. `changes` are the parameters of a layer that it changes, where the layer has them. `packages` are modules
    that PEFT imports for this tuner alone.
    """

    prefix: str
    is_native: bool = False
    needs_all_layers: bool = False
    needs_order: bool = False
    needs_base: bool = False
    shares_tensors: bool = False
    changes: tuple[str, ...] = ("weight",)
    packages: tuple[str, ...] = ()


_BOTH = ("weight", "bias")

TUNERS: dict[str, Tuner] = {
    "LORA": Tuner(prefix="lora_", is_native=True),
    "ADALORA": Tuner(prefix="lora_", is_native=True),
    "LOHA": Tuner(prefix="hada_", is_native=True),
    "LOKR": Tuner(prefix="lokr_", is_native=True),
    "IA3": Tuner(prefix="ia3_", needs_base=True, is_native=True, changes=_BOTH),
    "LN_TUNING": Tuner(prefix="ln_tuning_", is_native=True),
    "TRAINABLE_TOKENS": Tuner(prefix="trainable_tokens_", is_native=True),
    "ADAMSS": Tuner(prefix="adamss_", needs_base=True, changes=_BOTH, packages=("sklearn",)),
    "BEFT": Tuner(prefix="beft_", changes=("bias",)),
    "BOFT": Tuner(prefix="boft_", needs_base=True),
    "C3A": Tuner(prefix="c3a_"),
    "DEFT": Tuner(prefix="deft_", needs_base=True),
    "DELORA": Tuner(prefix="delora_"),
    "FOURIERFT": Tuner(prefix="fourierft_"),
    "FROD": Tuner(prefix="frod_", needs_base=True, shares_tensors=True),
    "GLORA": Tuner(prefix="glora_", needs_base=True, changes=_BOTH),
    "GRALORA": Tuner(prefix="gralora_"),
    "HIRA": Tuner(prefix="hira_", needs_base=True),
    "HRA": Tuner(prefix="hra_", needs_base=True),
    "MISS": Tuner(prefix="miss_", needs_base=True),
    "OFT": Tuner(prefix="oft_", needs_base=True),
    "OSF": Tuner(prefix="osf_", needs_base=True),
    "PEANUT": Tuner(prefix="peanut_", needs_base=True),
    "PSOFT": Tuner(prefix="psoft_", needs_base=True),
    "PVERA": Tuner(prefix="pvera_", needs_all_layers=True, shares_tensors=True),
    "RANDLORA": Tuner(prefix="randlora_", needs_all_layers=True, shares_tensors=True),
    "ROAD": Tuner(prefix="road_", needs_base=True, changes=_BOTH),
    "SHIRA": Tuner(prefix="shira_"),
    "SUPERTUNING": Tuner(prefix="supertuning_"),
    "TINYLORA": Tuner(prefix="tinylora_", needs_all_layers=True, shares_tensors=True, needs_order=True),
    "UNILORA": Tuner(prefix="unilora_", needs_all_layers=True, shares_tensors=True, needs_order=True),
    "VBLORA": Tuner(prefix="vblora_", shares_tensors=True),
    "VERA": Tuner(prefix="vera_", needs_all_layers=True, shares_tensors=True),
    "WAVEFT": Tuner(prefix="waveft_"),
}

_VIRTUAL_TOKENS = "it trains virtual tokens in front of the prompt, and no weight of the base stands for them"

UNMERGEABLE: dict[str, str] = {
    "ADAPTION_PROMPT": "its gated attention over virtual tokens is added to each layer; no weight does that",
    "BONE": "PEFT no longer reads it; convert it to MISS with the PEFT version that trained it",
    "CARTRIDGE": "it trains keys and values of a cache; serve it as a cache in front of the base",
    "CPT": _VIRTUAL_TOKENS,
    "LILY": "a router mixes its shared B matrices for each input; no single weight does that",
    "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
    "POLY": "a router mixes its skills for each task; no single weight does that",
    "PREFIX_TUNING": "it trains keys and values in front of those of the prompt; no weight of the base stands for them",
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "SHADOW": "a second network runs beside the base; no weight of the base stands for it",
    "XLORA": "a classifier scales its LoRAs for each token; no single weight does that",
}
