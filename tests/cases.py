"""Adapter options as a table, and the adapters and oracles made from it with PEFT."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Conv1d
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from models import MODELS, NUM_LABELS, TRAINED_TOKENS, VOCAB, TinyModel

Configs = Callable[[TinyModel], "tuple[LoraConfig, ...]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCase:
    """One way to use an adapter; `configs` returns one config per adapter, none where it does not apply."""

    name: str
    configs: Configs
    trained_on: Literal["model", "backbone", "classifier"] = "model"
    adapter_names: tuple[str, ...] = ("default",)
    new_tokens: int = 0  # rows added to the vocabulary before training
    save: dict[str, Any] = field(default_factory=dict)
    lost_on_reload: frozenset[str] = frozenset()  # models whose adapter PEFT itself cannot load again

    def load_base(self, model: TinyModel, folder: Path) -> tf.PreTrainedModel:
        """Load the class that the adapter is trained on from a base folder, resized if the case says so."""
        if self.trained_on == "classifier":
            auto, options = tf.AutoModelForSequenceClassification, {"num_labels": NUM_LABELS}
        else:
            auto, options = (tf.AutoModel if self.trained_on == "backbone" else model.auto), {}
        base = auto.from_pretrained(folder, **options).eval()
        if self.new_tokens:
            base.resize_token_embeddings(VOCAB + self.new_tokens, mean_resizing=False)
        return base

    def inputs(self, model: TinyModel) -> dict[str, Tensor]:
        return model.inputs(VOCAB + self.new_tokens)

    def train(self, model: TinyModel, base: Path, output: Path) -> tuple[PeftModel, tuple[Path, ...]]:
        """Write random adapters for `base` under `output`; return the live model and their folders."""
        torch.manual_seed(zlib.crc32(f"{model.name}/{self.name}".encode()))
        loaded = self.load_base(model, base)
        first, *rest = self.configs(model)
        peft = get_peft_model(loaded, first, adapter_name=self.adapter_names[0])
        for name, config in zip(self.adapter_names[1:], rest, strict=True):
            peft.add_adapter(name, config)
        train_(peft)
        if self.new_tokens:
            perturb_(loaded.get_input_embeddings(), loaded.get_output_embeddings())
        peft.save_pretrained(output, **self.save)
        folders = tuple(output if name == "default" else output / name for name in self.adapter_names)
        return as_merged_(peft, self.adapter_names), folders

    def unmerged(self, model: TinyModel, base: Path, adapters: tuple[Path, ...]) -> PeftModel:
        """Load base and adapters afresh, all adapters active."""
        names = self.adapter_names
        peft = PeftModel.from_pretrained(self.load_base(model, base), adapters[0], adapter_name=names[0])
        for name, path in zip(names[1:], adapters[1:], strict=True):
            peft.load_adapter(path, adapter_name=name)
        return as_merged_(peft, names)


def as_merged_(peft: PeftModel, adapter_names: tuple[str, ...]) -> PeftModel:
    """Make all adapters active, and mend where the forward of PEFT 0.21.2 lags behind its own merge."""
    peft.base_model.set_adapter(list(adapter_names))
    for module in peft.modules():
        if isinstance(module, Conv1d):
            module.stride = module.base_layer.stride  # Whisper's encoder reads it from its convolutions
        elif isinstance(module, TrainableTokensLayer):
            module.register_forward_hook(add_bias_of_head)
    return peft.eval()


def add_bias_of_head(layer: TrainableTokensLayer, _: Any, output: Tensor) -> Tensor:
    # PEFT leaves out the bias of a tied head (BERT) when it replaces rows of its weight.
    bias = None if layer.merged else getattr(layer.base_layer, "bias", None)
    return output if bias is None else output + bias


def train_(peft: PeftModel) -> None:
    """Move every adapter parameter, biases and saved modules included, away from its initial value."""
    for name, parameter in peft.named_parameters():
        if not parameter.is_floating_point():
            continue  # codes of a quantised base
        noise = torch.randn_like(parameter)
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.1 * noise)
        elif "lora_" in name or parameter.requires_grad:
            parameter.data.add_(0.1 * noise)


def perturb_(*modules: nn.Module | None) -> None:
    """Change the tables of a resized vocabulary, tied ones together, as training them in full would."""
    for module in modules:
        for parameter in () if module is None else module.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def reload_strictly(auto: type, folder: Path) -> nn.Module:
    """Load a merged model and check that the class and the file agree on every tensor."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    return model.eval()


def reload_merged(model: TinyModel, case: AdapterCase, folder: Path) -> nn.Module:
    if case.trained_on == "classifier":
        return reload_strictly(tf.AutoModelForSequenceClassification, folder)
    merged = reload_strictly(model.auto, folder)
    return tf.AutoModel.from_pretrained(folder).eval() if case.trained_on == "backbone" else merged


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6} | options))


def on_linears(**options: Any) -> Configs:
    return lambda model: (config(target_modules=list(model.linears), **options),)


def on_biased(**options: Any) -> Configs:
    return lambda model: (config(target_modules=list(model.biased), **options),) if model.biased else ()


def on_convs(**options: Any) -> Configs:
    def configs(model: TinyModel) -> tuple[LoraConfig, ...]:
        linears = model.biased if "lora_bias" in options else model.linears
        targets = [*model.convs, *linears]
        return (config(target_modules=targets, **options),) if model.convs else ()

    return configs


def on_embedding(**options: Any) -> Configs:
    return lambda model: (config(target_modules=[model.embedding], **options),) if model.embedding else ()


def on_embedding_and_head(*, tied_only: bool = False, **options: Any) -> Configs:
    def configs(model: TinyModel) -> tuple[LoraConfig, ...]:
        if model.embedding is None or (tied_only and not model.tied):
            return ()
        return (config(target_modules=[model.embedding, model.head], **options),)

    return configs


def saving(*parts: str, tied_only: bool = False, **options: Any) -> Configs:
    """Return configs with LoRA on one kind of layer and the named parts of the model trained in full."""

    def configs(model: TinyModel) -> tuple[LoraConfig, ...]:
        modules = [getattr(model, part) for part in parts]
        if None in modules or (tied_only and not model.tied):
            return ()
        return (config(target_modules=[model.linears[0]], modules_to_save=modules, **options),)

    return configs


def with_patterns(model: TinyModel) -> tuple[LoraConfig, ...]:
    first, last = model.linears[0], model.linears[-1]
    patterns = {"rank_pattern": {first: 6, rf".*\.1\..*{last}": 2}, "alpha_pattern": {last: 3}}
    return on_linears(**patterns)(model)


def with_tokens(*where: str) -> Configs:
    """Return configs that train single rows; one set of ids per named part of the model, or a plain list."""

    def configs(model: TinyModel) -> tuple[LoraConfig, ...]:
        if model.embedding is None:
            return ()
        names = [getattr(model, part) for part in where]
        by_name = {name: [token + i for token in TRAINED_TOKENS] for i, name in enumerate(names)}
        tokens = by_name or list(TRAINED_TOKENS)
        return (config(target_modules=[model.linears[0]], trainable_token_indices=tokens),)

    return configs


def with_new_tokens(model: TinyModel) -> tuple[LoraConfig, ...]:
    return on_linears()(model) if model.embedding else ()


def with_new_trained_rows(model: TinyModel) -> tuple[LoraConfig, ...]:
    if model.embedding is None:
        return ()
    return (config(target_modules=[model.linears[0]], trainable_token_indices=[3, VOCAB + 3]),)


def for_classifier(model: TinyModel) -> tuple[LoraConfig, ...]:
    return on_linears(task_type="SEQ_CLS")(model) if model.classifier else ()


def for_backbone(model: TinyModel) -> tuple[LoraConfig, ...]:
    # Not all linears: AutoModel adds a random pooler to BERT, which "dense" would match.
    return (config(target_modules=list(model.linears[:3])),)


def with_olora(model: TinyModel) -> tuple[LoraConfig, ...]:
    # PEFT decomposes a Conv1D weight without transposing it, so the shapes do not fit.
    return () if "c_attn" in model.linears else on_linears(init_lora_weights="olora")(model)


def two(first: dict[str, Any], second: dict[str, Any]) -> Configs:
    """Return configs of two adapters of different rank that overlap in some layers."""

    def configs(model: TinyModel) -> tuple[LoraConfig, ...]:
        return (
            config(target_modules=list(model.linears), **first),
            config(target_modules=list(model.linears[1:]), r=3, lora_alpha=2, **second),
        )

    return configs


def for_name(name: str, configs: Configs) -> Configs:
    return lambda model: configs(model) if model.name == name else ()


CASES: tuple[AdapterCase, ...] = (
    AdapterCase(name="linears", configs=on_linears()),
    AdapterCase(name="all-linear", configs=lambda model: (config(target_modules="all-linear"),)),
    AdapterCase(name="rslora", configs=on_linears(use_rslora=True)),
    AdapterCase(name="patterns", configs=with_patterns),
    AdapterCase(name="one-layer", configs=on_linears(layers_to_transform=[1])),
    AdapterCase(name="dora", configs=on_linears(use_dora=True)),
    AdapterCase(name="dora-rslora", configs=on_linears(use_dora=True, use_rslora=True)),
    AdapterCase(name="lora-bias", configs=on_biased(lora_bias=True)),
    AdapterCase(name="bias-all", configs=on_biased(bias="all")),
    AdapterCase(name="bias-lora-only", configs=on_biased(bias="lora_only")),
    AdapterCase(name="lora-bias-and-bias", configs=on_biased(lora_bias=True, bias="lora_only")),
    AdapterCase(name="conv", configs=on_convs()),
    AdapterCase(name="conv-dora", configs=on_convs(use_dora=True)),
    AdapterCase(name="conv-lora-bias", configs=on_convs(lora_bias=True, bias="all")),
    AdapterCase(name="embedding", configs=on_embedding()),
    AdapterCase(name="embedding-dora", configs=on_embedding(use_dora=True)),
    AdapterCase(name="head", configs=lambda model: (config(target_modules=[model.head]),)),
    AdapterCase(name="head-dora", configs=lambda model: (config(target_modules=[model.head], use_dora=True),)),
    AdapterCase(name="linears-and-head", configs=lambda model: (config(target_modules=[*model.linears, model.head]),)),
    AdapterCase(name="embedding-and-head", configs=on_embedding_and_head()),
    AdapterCase(
        name="embedding-and-head-tied",
        configs=on_embedding_and_head(tied_only=True, ensure_weight_tying=True),
        lost_on_reload=frozenset({"gpt2", "t5"}),  # its config names the embedding only
    ),
    AdapterCase(name="save-head", configs=saving("head")),
    AdapterCase(name="save-embedding", configs=saving("embedding")),
    AdapterCase(name="save-embedding-and-head", configs=saving("embedding", "head")),
    AdapterCase(
        name="save-embedding-and-head-tied",
        configs=saving("embedding", "head", tied_only=True, ensure_weight_tying=True),
    ),
    AdapterCase(name="save-norm", configs=saving("norm")),
    AdapterCase(name="tokens", configs=with_tokens()),
    AdapterCase(name="tokens-by-name", configs=with_tokens("input_table")),
    AdapterCase(name="tokens-untied", configs=with_tokens("embedding", "head")),
    AdapterCase(name="classifier", configs=for_classifier, trained_on="classifier"),
    AdapterCase(name="backbone", configs=for_backbone, trained_on="backbone"),
    AdapterCase(name="pissa", configs=on_linears(init_lora_weights="pissa")),
    AdapterCase(name="olora", configs=with_olora),
    AdapterCase(name="named", configs=on_linears(), adapter_names=("other",)),
    AdapterCase(name="pickled", configs=on_linears(), save={"safe_serialization": False}),
    AdapterCase(name="two", configs=two({}, {"use_rslora": True}), adapter_names=("a", "b")),
    AdapterCase(
        name="lora-then-dora",
        configs=for_name("llama", two({}, {"use_dora": True})),
        adapter_names=("a", "b"),
    ),
    AdapterCase(
        name="dora-then-lora",
        configs=for_name("llama", two({"use_dora": True}, {})),
        adapter_names=("a", "b"),
    ),
    AdapterCase(
        name="dora-then-dora",
        configs=for_name("llama", two({"use_dora": True}, {"use_dora": True})),
        adapter_names=("a", "b"),
    ),
    AdapterCase(name="new-tokens", configs=with_new_tokens, new_tokens=4),
    AdapterCase(name="new-tokens-saved", configs=saving("embedding", "head"), new_tokens=4),
    AdapterCase(name="new-tokens-trained", configs=with_new_trained_rows, new_tokens=4),
)


def pairs(*case_names: str) -> list[tuple[TinyModel, AdapterCase]]:
    """Return every model with every case (of these names, or of all) that applies to it."""
    return [
        (model, case)
        for model in MODELS
        for case in CASES
        if (not case_names or case.name in case_names)
        and (not model.only or case.name in model.only)
        and case.configs(model)
    ]
