"""One adapter of each tuner that the installed PEFT has, on each kind of layer that it can be merged into."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import hira, loha, lokr
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraweld.adapter.tuners import TUNERS
from models import MODELS, TRAINED_TOKENS, TinyModel

BY_NAME = {model.name: model for model in MODELS}

# The options that a tuner needs on layers of 32 features; the rest are PEFT's defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 3, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20, "scaling": 20.0},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2, "alpha": 2},
    "IA3": {"feedforward_modules": ["down_proj", "c_fc"]},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 8},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4, "randlora_alpha": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TINYLORA": {"r": 2, "u": 4, "weight_tying": 0.5},
    "TRAINABLE_TOKENS": {"token_indices": list(TRAINED_TOKENS)},
    "UNILORA": {"theta_d_length": 16, "init_theta_d_bound": 0.5},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2},
    "WAVEFT": {"n_frequency": 20, "scaling": 3.0},
    **{name: {"r": 4} for name in ("DELORA", "HIRA", "HRA", "LOHA", "LOKR", "MISS", "PVERA", "VERA")},
}

# Where each kind of layer is found.
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Linear": ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "Conv1D": ("gpt2", ("c_attn", "c_proj", "c_fc")),
    "Conv2d": ("vit", ("projection",)),
    "Conv1d": ("whisper", ("conv1", "conv2")),
    "Embedding": ("llama", ("embed_tokens",)),
    "Norm": ("llama", ("input_layernorm", "norm")),
}

# LN tuning copies whatever module it is given; token rows of a linear layer lose its bias in PEFT's forward.
_ONE_KIND = {"LN_TUNING": "Norm", "TRAINABLE_TOKENS": "Embedding"}

# What the options of a tuner turn into another layer, or another file.
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("BOFT", "Linear", {"boft_n_butterfly_factor": 2}),
    ("DEFT", "Linear", {"decomposition_method": "relu"}),
    ("GRALORA", "Linear", {"hybrid_r": 2}),
    ("HRA", "Linear", {"apply_GS": True}),
    ("IA3", "Conv2d", {"feedforward_modules": ["projection"]}),
    ("LOHA", "Conv2d", {"use_effective_conv2d": True}),
    ("LOHA", "Conv1d", {"use_effective_conv2d": True}),
    ("LOKR", "Linear", {"r": 1, "decompose_both": True, "alpha": 3}),
    ("LOKR", "Conv2d", {"r": 1, "use_effective_conv2d": True}),
    ("LOKR", "Conv2d", {"r": 1, "decompose_both": True}),
    ("LOKR", "Linear", {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 2}}),
    ("MISS", "Linear", {"init_weights": "bat"}),
    ("MISS", "Linear", {"init_weights": "mini"}),
    ("OFT", "Linear", {"block_share": True, "coft": True, "eps": 0.3}),
    ("OSF", "Linear", {"rank_pattern": {"q_proj": 4}}),
    ("PSOFT", "Linear", {"ab_svd_init": "pissa_init"}),
    ("PVERA", "Linear", {"save_projection": False}),
    ("RANDLORA", "Linear", {"save_projection": False}),
    ("RANDLORA", "Linear", {"sparse": True}),
    ("ROAD", "Linear", {"variant": "road_2"}),
    ("ROAD", "Linear", {"variant": "road_4"}),
    ("TINYLORA", "Linear", {"save_projection": False, "weight_tying": 1.0}),
    ("UNILORA", "Linear", {"save_indices": True}),
    ("VBLORA", "Linear", {"save_only_topk_weights": True}),
    ("VERA", "Linear", {"save_projection": False}),
    ("LORA", "Linear", {"kasa_config": KasaConfig()}),
    ("LORA", "Linear", {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)}),
    ("LORA", "Linear", {"velora_config": VeloraConfig()}),
    ("LORA", "Linear", {"monteclora_config": MontecloraConfig()}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerCase:
    """One adapter of one tuner on one kind of layer."""

    tuner: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.tuner, self.kind, *self.options])

    @property
    def model(self) -> TinyModel:
        return BY_NAME[TARGETS[self.kind][0]]

    def config(self, targets: list[str]) -> Any:
        options = {"target_modules": targets, **OPTIONS.get(self.tuner, {}), **self.options}
        if self.tuner == "IA3":
            options["feedforward_modules"] = [name for name in options["feedforward_modules"] if name in targets]
        if self.tuner == "BEFT":
            options["target_modules"] = [name for name in targets if name in self.model.biased] or targets
        if self.tuner == "FROD":
            options["progressbar"] = False
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.tuner)](**options)

    def load_base(self, base: Path, dtype: torch.dtype) -> tf.PreTrainedModel:
        return self.model.auto.from_pretrained(base, dtype=dtype).eval()

    def train(self, base: Path, output: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write an adapter whose every parameter is away from its initial value."""
        torch.manual_seed(zlib.crc32(str(self).encode()))
        peft = get_peft_model(self.load_base(base, dtype), self.config(list(TARGETS[self.kind][1])))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        peft.save_pretrained(output)
        return output

    def unmerged(self, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
        peft = PeftModel.from_pretrained(self.load_base(base, dtype), adapter).eval()
        for module in peft.modules():
            if isinstance(module, loha.layer.Conv1d | lokr.layer.Conv1d | hira.layer.Conv1d):
                module.stride = module.get_base_layer().stride  # Whisper's encoder reads it from its convolutions
        return peft


def installed(tuner: str) -> bool:
    return all(importlib.util.find_spec(name) for name in TUNERS[tuner].packages)


def mergeable() -> Iterator[str]:
    """Yield the tuners of the installed PEFT that end in weights."""
    yield from (tuner.value for tuner in PeftType if tuner.value in TUNERS and tuner.value != "LORA")


def cases() -> list[TunerCase]:
    found = [TunerCase(tuner=t, kind=kind) for t in mergeable() if installed(t) for kind in kinds_of(t)]
    return found + [TunerCase(tuner=t, kind=kind, options=options) for t, kind, options in VARIANTS]


def kinds_of(tuner: str) -> list[str]:
    """Return the kinds of layers that PEFT can attach the tuner to and merge."""
    return [kind for kind in TARGETS if _merges(tuner, kind)]


def _merges(tuner: str, kind: str) -> bool:
    if tuner in _ONE_KIND:
        return kind == _ONE_KIND[tuner]
    with (
        warnings.catch_warnings(),
        contextlib.suppress(TypeError, ValueError, NotImplementedError, AttributeError, KeyError),
    ):
        warnings.simplefilter("ignore")
        case = TunerCase(tuner=tuner, kind=kind)
        name = "q_proj"
        peft = get_peft_model(nn.ModuleDict({"a": nn.ModuleDict({name: _layer(kind)})}), case.config([name]))
        layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.merge()
        return bool(layers)
    return False


def _layer(kind: str) -> nn.Module:
    match kind:
        case "Linear":
            return nn.Linear(32, 32)
        case "Conv1D":
            return Conv1D(64, 32)
        case "Conv2d":
            return nn.Conv2d(8, 16, 4)
        case "Conv1d":
            return nn.Conv1d(8, 16, 3)
        case "Embedding":
            return nn.Embedding(96, 32)
        case _:
            return nn.RMSNorm(32)
