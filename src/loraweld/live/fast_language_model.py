"""`FastLanguageModel`: loading a model and giving it an adapter in two calls, over transformers, PEFT and bitsandbytes.

The names are Unsloth's, so that a notebook changes one import. The kernels are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loraweld.errors import RequestError
from loraweld.hub.target import check_flag
from loraweld.live.attach import attach
from loraweld.live.machine import require
from loraweld.live.weights import base_of

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastLanguageModel:
    """Loads language models, gives them LoRA adapters, and switches them between training and inference."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Load a model and its tokenizer, and attach the saving methods to the model.

        Args:
            model_name: a Hub id or a folder; of an adapter, its base is loaded and the adapter put on it.
            max_seq_length: longest text in training: the tokenizer's `model_max_length`.
            dtype: of the weights; None takes the checkpoint's.
            load_in_4bit: quantise to NF4 while loading, with double quantisation.
            load_in_8bit: quantise to LLM.int8() while loading; takes the place of `load_in_4bit`.
            full_finetuning: train all weights: neither 4 nor 8 bit.
            token: of the Hub, for a gated or private model.
            device_map: as in transformers.
            trust_remote_code: whether the model's own code may run.
            revision: branch, tag or commit of the Hub.
            options: further arguments of transformers' `from_pretrained`.

        Returns:
            The model and the tokenizer.

        Raises:
            RequestError: names the parameter, its value and what would be valid.
        """
        require("transformers", "accelerate")
        import transformers as tf

        for name, value in (("load_in_4bit", load_in_4bit), ("load_in_8bit", load_in_8bit)):
            check_flag(name, value)
        _check_length(max_seq_length)
        kind = _dtype(dtype)
        hub = {"token": token, "revision": revision, "trust_remote_code": trust_remote_code}
        bits = 0 if full_finetuning else 8 if load_in_8bit else 4 if load_in_4bit else 0
        if bits and "quantization_config" not in options and not _is_quantised(model_name, hub):
            options["quantization_config"] = _settings(bits, kind)
        model = tf.AutoModelForCausalLM.from_pretrained(
            model_name, dtype=kind or "auto", device_map=_place(device_map), **hub, **options
        )
        tokenizer = tf.AutoTokenizer.from_pretrained(model_name, **hub)
        if max_seq_length is not None:
            tokenizer.model_max_length = max_seq_length
            object.__setattr__(model, "max_seq_length", max_seq_length)
        return attach(model), tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = _TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        max_seq_length: int | None = None,
        **options: Any,
    ) -> Any:
        """Put a LoRA adapter on a model, and the saving methods on the result.

        Args:
            model: of `from_pretrained`, or any of transformers.
            r: rank.
            target_modules: ends of the names of the layers, a regular expression, or "all-linear".
            lora_alpha: the scaling is lora_alpha / r.
            lora_dropout: of the adapter's input, in training.
            bias: "none", "all" or "lora_only".
            use_gradient_checkpointing: True or "unsloth" (the same here) trade time for memory in training.
            random_state: seed of the adapter's initial values.
            use_rslora: the scaling is lora_alpha / sqrt(r).
            use_dora: train magnitudes besides.
            modules_to_save: modules that are trained in full.
            init_lora_weights: as in PEFT.
            max_seq_length: longest text in training, for those who read it from the model.
            options: further fields of PEFT's `LoraConfig`.

        Returns:
            The PEFT model.

        Raises:
            RequestError: names the parameter, its value and what would be valid.
        """
        require("peft")
        import peft

        _check_length(max_seq_length)
        checkpointing = _checkpointing(use_gradient_checkpointing)
        known = {name for name in vars(peft.LoraConfig())}
        strange = sorted(set(options) - known)
        if strange:
            raise RequestError(f"{', '.join(strange)}: neither of get_peft_model nor a field of PEFT's LoraConfig")
        config = peft.LoraConfig(
            r=r,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            lora_dropout=lora_dropout,
            bias=bias,  # type: ignore[arg-type]
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=None if modules_to_save is None else list(modules_to_save),
            init_lora_weights=init_lora_weights,  # type: ignore[arg-type]
            **{"task_type": "CAUSAL_LM", **options},
        )
        inner = base_of(model)
        if getattr(inner, "hf_quantizer", None) is not None:
            prepare: Any = peft.prepare_model_for_kbit_training
            model = prepare(model, use_gradient_checkpointing=checkpointing)
        elif checkpointing:
            inner.gradient_checkpointing_enable()
            inner.enable_input_require_grads()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_state)
            made = peft.get_peft_model(model, config)
        if max_seq_length is not None:
            object.__setattr__(inner, "max_seq_length", max_seq_length)
        return attach(made)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Switch to inference: no dropout, no gradient checkpointing, the cache on; returns the model."""
        inner = base_of(model)
        model.eval()
        if inner.is_gradient_checkpointing:
            inner.gradient_checkpointing_disable()
        inner.config.use_cache = True
        return model

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
        """Switch back to training; returns the model.

        Raises:
            RequestError: `use_gradient_checkpointing` is none of True, False and "unsloth".
        """
        inner = base_of(model)
        if _checkpointing(use_gradient_checkpointing):
            inner.gradient_checkpointing_enable()
        model.train()
        return model


def _check_length(max_seq_length: object) -> None:
    if max_seq_length is not None and (type(max_seq_length) is not int or max_seq_length < 1):
        raise RequestError(f"max_seq_length is {max_seq_length!r}, expected a number of tokens")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    kind = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if (dtype is not None and kind is None) or kind not in (None, *_DTYPES.values()):
        raise RequestError(f"dtype is {dtype!r}, expected {', '.join(_DTYPES)} or None")
    return kind


def _checkpointing(value: bool | str) -> bool:
    if value not in (True, False, "unsloth"):
        raise RequestError(f"use_gradient_checkpointing is {value!r}, expected True, False or 'unsloth'")
    return bool(value)


def _is_quantised(model_name: str, hub: dict[str, Any]) -> bool:
    import transformers as tf

    try:
        config = tf.AutoConfig.from_pretrained(model_name, **hub)
    except (OSError, ValueError):  # an adapter: its base decides
        return False
    return getattr(config, "quantization_config", None) is not None


def _settings(bits: int, dtype: torch.dtype | None) -> Any:
    import transformers as tf

    require("bitsandbytes")
    settings: Any = tf.BitsAndBytesConfig
    if bits == 8:
        return settings(load_in_8bit=True)
    return settings(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def _place(device_map: Any) -> Any:
    """Without an accelerator there is nothing to spread over; "auto" would look at the disk."""
    accelerator = getattr(torch, "accelerator", torch.cuda)  # the former since torch 2.6
    return "cpu" if device_map == "auto" and not accelerator.is_available() else device_map
