"""Tiny random models, one per architecture that the tests against PEFT cover."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VOCAB = 96
HIDDEN = 32
NUM_LABELS = 3
TRAINED_TOKENS = (3, 5)  # every text input holds them, so a trained row shows in the logits


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """What the adapter table needs to know about one architecture."""

    name: str
    build: Callable[[], tf.PreTrainedModel]
    auto: Any  # the Auto class that reloads the model
    inputs: Callable[[int], dict[str, Tensor]]  # vocabulary size -> forward arguments
    linears: tuple[str, ...]
    biased: tuple[str, ...] = ()  # linear layers that have a bias
    convs: tuple[str, ...] = ()
    embedding: str | None = None
    head: str
    norm: str
    tied: bool = False
    classifier: bool = False  # AutoModelForSequenceClassification knows it
    disk_key: Callable[[str], str] | None = None  # for files as older tools wrote them
    only: frozenset[str] = frozenset()  # cases that a variant is for; empty: all

    @property
    def input_table(self) -> str | None:
        """The module that `get_input_embeddings` returns; that of T5 is one its encoder and decoder only share."""
        return "shared" if self.name == "t5" else self.embedding

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the model, the same weights at every call, to `folder`."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.build().eval()
        randomise_(model)
        model.to(dtype).save_pretrained(folder)
        if self.disk_key is not None:
            file = folder / "model.safetensors"
            save_file({self.disk_key(k): v for k, v in load_file(file).items()}, file, {"format": "pt"})


def randomise_(model: nn.Module) -> None:
    """Fill all weights so that logits are of order one and no bias is 0, no norm weight 1."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif isinstance(module, nn.Embedding):
                parameter.data.copy_(0.3 * torch.randn_like(parameter))
            else:
                fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter[0].numel()
                parameter.data.copy_(0.5 * matrix(parameter.shape) / fan_in**0.5)


def matrix(shape: torch.Size) -> Tensor:
    """Return noise of variance one in which four directions stand out.

    PiSSA splits a weight at its singular values; where they are close, as in plain noise, the split depends
    on the number of threads.
    """
    rows, columns = shape[0], shape[1:].numel()
    noise = torch.randn(rows, columns) + torch.randn(rows, 4) @ torch.randn(4, columns)
    return (noise / 5**0.5).reshape(shape)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Run `model` and return its main output: logits of any kind, else the last hidden state."""
    with torch.no_grad():
        output = model(**inputs)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if name in output:
            return output[name]
    raise AssertionError(f"no logits in {list(output)}")


def token_ids(vocab: int, *, batch: int = 2, length: int = 12) -> Tensor:
    """Return ids that hold the trained tokens and the last row of the vocabulary, but no padding."""
    ids = torch.randint(6, vocab, (batch, length), generator=torch.Generator().manual_seed(11))
    ids[:, 1 : 1 + len(TRAINED_TOKENS)] = torch.tensor(TRAINED_TOKENS)
    ids[:, 4] = vocab - 1
    return ids


def text_inputs(vocab: int) -> dict[str, Tensor]:
    return {"input_ids": token_ids(vocab)}


def seq2seq_inputs(vocab: int) -> dict[str, Tensor]:
    return {"input_ids": token_ids(vocab), "decoder_input_ids": token_ids(vocab, length=9)}


def speech_inputs(vocab: int) -> dict[str, Tensor]:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(12))
    return {"input_features": features, "decoder_input_ids": token_ids(vocab, length=9)}


def image_inputs(vocab: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(13))}


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, **TOKENS, "vocab_size": VOCAB, "max_position_embeddings": 64}
GATED = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def llama() -> tf.PreTrainedModel:
    config = tf.LlamaConfig(**GATED, attention_bias=True, tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config)


def qwen3() -> tf.PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GATED, head_dim=8, tie_word_embeddings=True))


def gemma2() -> tf.PreTrainedModel:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**GATED, head_dim=8, query_pre_attn_scalar=8))


def phi3() -> tf.PreTrainedModel:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**GATED))


def gpt2() -> tf.PreTrainedModel:
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **TOKENS))


def opt() -> tf.PreTrainedModel:
    return tf.OPTForCausalLM(tf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=24))


def bert() -> tf.PreTrainedModel:
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT, intermediate_size=48))


def bert_pretraining() -> tf.PreTrainedModel:
    return tf.BertForPreTraining(tf.BertConfig(**TEXT, intermediate_size=48))


def t5() -> tf.PreTrainedModel:
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **tokens))


def whisper() -> tf.PreTrainedModel:
    sizes = {"d_model": HIDDEN, "vocab_size": VOCAB, "num_mel_bins": 8}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    positions = {"max_source_positions": 16, "max_target_positions": 16}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**sizes, **positions, **TOKENS, decoder_start_token_id=1)
    )


def vit() -> tf.PreTrainedModel:
    config = tf.ViTConfig(**SMALL, intermediate_size=48, image_size=8, patch_size=4, num_labels=7)
    return tf.ViTForImageClassification(config)


def old_bert_key(key: str) -> str:
    """Return the name that BERT files written before 2019, still on the Hub, have for a tensor of a norm."""
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


CAUSAL = {"auto": tf.AutoModelForCausalLM, "inputs": text_inputs, "head": "lm_head", "classifier": True}
LLAMA_LIKE = {**CAUSAL, "linears": LLAMA_LINEARS, "embedding": "embed_tokens", "norm": "norm"}
GPT2 = {
    **CAUSAL,
    "build": gpt2,
    "linears": ("c_attn", "c_proj", "c_fc"),
    "biased": ("c_attn", "c_proj", "c_fc"),
    "embedding": "wte",
    "norm": "ln_f",
    "tied": True,
}
ENCODER_DECODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
BERT = {
    "build": bert,
    "auto": tf.AutoModelForMaskedLM,
    "inputs": text_inputs,
    "linears": ("query", "key", "value", "dense"),
    "biased": ("query", "key", "value", "dense"),
    "embedding": "word_embeddings",
    "head": "decoder",
    "norm": "LayerNorm",
    "tied": True,
}

MODELS: tuple[TinyModel, ...] = (
    TinyModel(name="llama", build=llama, **LLAMA_LIKE, biased=ATTENTION, tied=True),
    TinyModel(name="qwen3", build=qwen3, **LLAMA_LIKE, tied=True),
    TinyModel(name="gemma2", build=gemma2, **LLAMA_LIKE, tied=True),
    TinyModel(
        name="phi3",
        build=phi3,
        **(LLAMA_LIKE | {"linears": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}),
    ),
    TinyModel(name="gpt2", **GPT2),
    TinyModel(
        name="opt",
        build=opt,
        **CAUSAL,
        linears=ENCODER_DECODER,
        biased=ENCODER_DECODER,
        embedding="embed_tokens",
        norm="final_layer_norm",
        tied=True,
    ),
    TinyModel(name="bert", **BERT),
    TinyModel(
        name="t5",
        build=t5,
        auto=tf.AutoModelForSeq2SeqLM,
        inputs=seq2seq_inputs,
        linears=("q", "k", "v", "o", "wi", "wo"),
        embedding="embed_tokens",
        head="lm_head",
        norm="final_layer_norm",
        tied=True,
    ),
    TinyModel(
        name="whisper",
        build=whisper,
        auto=tf.AutoModelForSpeechSeq2Seq,
        inputs=speech_inputs,
        linears=ENCODER_DECODER,
        biased=("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
        convs=("conv1", "conv2"),
        embedding="embed_tokens",
        head="proj_out",
        norm="layer_norm",
        tied=True,
    ),
    TinyModel(
        name="vit",
        build=vit,
        auto=tf.AutoModelForImageClassification,
        inputs=image_inputs,
        linears=(*ATTENTION, "fc1", "fc2"),
        biased=(*ATTENTION, "fc1", "fc2"),
        convs=("projection",),
        head="classifier",
        norm="layernorm",
    ),
    TinyModel(
        name="gpt2-without-prefix",  # as on the Hub: `h.0…` where the class says `transformer.h.0…`
        **GPT2,
        disk_key=lambda key: key.removeprefix("transformer."),
        only=frozenset({"linears", "bias-all", "head", "tokens", "classifier", "backbone"}),
    ),
    TinyModel(
        name="bert-old-norms",
        **BERT,
        disk_key=old_bert_key,
        only=frozenset({"linears", "bias-all", "save-norm"}),
    ),
    TinyModel(
        name="bert-pretraining",  # the masked-LM class has no pooler, so no classifier can be trained on it
        **(BERT | {"build": bert_pretraining, "auto": tf.AutoModelForPreTraining, "classifier": True}),
        only=frozenset({"linears", "head", "classifier"}),
    ),
)
