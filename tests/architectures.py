"""Tiny random models of many architectures, as a table: the class, its config, what it is asked."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models import randomise_

VOCAB = 99
HIDDEN = 32
IMAGE_TOKEN = 90

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One class with a tiny config; `without` are the ends of linear layers that PEFT cannot adapt there."""

    name: str
    model: type[tf.PreTrainedModel]
    config: Callable[[], tf.PretrainedConfig]
    inputs: Callable[[], Inputs]
    without: tuple[str, ...] = ()
    towers: tuple[str, ...] = ("",)  # beginnings of the paths of which each has to have adapted layers
    kinds: int = 2  # of linear layers in each tower: attention and MLP
    tolerance: float = 1e-5

    @property
    def is_tied(self) -> bool:
        return getattr(self.config(), "tie_word_embeddings", False) is True

    @property
    def has_tables(self) -> bool:
        return self.model.__name__.endswith(
            ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", "MaskedLM")
        )

    def save(self, folder: Path) -> None:
        """Write the model, the same weights at every call, to `folder`."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.model(self.config()).eval()
        randomise_(model)
        model.save_pretrained(folder)

    def linears(self, model: nn.Module) -> list[str]:
        """Return the paths of the linear layers below the head."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        inside_attention = {
            f"{path}.out_proj" for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
        }
        return [
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and module is not head
            and path not in inside_attention
            and not path.endswith(self.without or ("#",))
        ]


def ids(length: int = 10) -> Tensor:
    """Return tokens that are neither special nor an image."""
    return torch.randint(6, 80, (2, length), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def text() -> Inputs:
    return {"input_ids": ids()}


def seq2seq() -> Inputs:
    return {"input_ids": ids(), "decoder_input_ids": ids(7)}


def image() -> Inputs:
    return {"pixel_values": noise(2, 3, 16, 16)}


def pair() -> Inputs:
    return {"input_ids": ids(), "pixel_values": noise(2, 3, 16, 16)}


def audio() -> Inputs:
    return {"input_values": noise(2, 400)}


def speech() -> Inputs:
    return {"input_features": noise(2, 8, 32), "decoder_input_ids": ids(7)}


def with_image(tokens: int, pixels: Callable[[], Tensor], **more: Callable[[], Tensor]) -> Callable[[], Inputs]:
    """Return inputs of a text in which an image takes the place of some tokens."""

    def inputs() -> Inputs:
        text = ids(tokens + 6)
        text[:, 2 : 2 + tokens] = IMAGE_TOKEN
        return {"input_ids": text, "pixel_values": pixels(), **{name: value() for name, value in more.items()}}

    return inputs


def patches(size: int, *, grid: int = 4) -> dict[str, Callable[[], Tensor]]:
    """Return the flattened patches of two square images, as Qwen's models take them."""
    return {
        "pixels": lambda: noise(2 * grid * grid, size),
        "image_grid_thw": lambda: torch.tensor([[1, grid, grid]] * 2),
        "mm_token_type_ids": lambda: (with_image(4, lambda: noise(1))()["input_ids"] == IMAGE_TOKEN).int(),
    }


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, **TOKENS, "vocab_size": VOCAB, "max_position_embeddings": 64}
GATED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GATED, "head_dim": 8}
GPT = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB, **TOKENS}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 8}
SIDES = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "d_model": HIDDEN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    **TOKENS,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
WAV = {
    **SMALL,
    "vocab_size": VOCAB,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "feat_proj_dropout": 0.0,
    "mask_time_prob": 0.0,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
}
# WavLM's attention takes the weights out of its layers, and with them not what PEFT adds to the layers' outputs.
WAVLM_ATTENTION = ("q_proj", "k_proj", "v_proj", "attention.out_proj")
TOWERS = ("text_model.", "vision_model.")
LLAVA_TOWERS = ("model.vision_tower.", "model.language_model.")
QWEN_TOWERS = ("model.visual.", "model.language_model.")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def config(cls: type[tf.PretrainedConfig], *options: dict[str, Any], **more: Any) -> Callable[[], tf.PretrainedConfig]:
    """Return a maker of configs from several groups of options."""
    together: dict[str, Any] = {}
    for group in (*options, more):
        together |= group
    return lambda: cls(**together)


def table() -> dict[str, dict[str, Any]]:
    return {**causal_models(), **encoders(), **encoder_decoders(), **vision_and_audio(), **image_text_models()}


def causal_models() -> dict[str, dict[str, Any]]:
    """Return language models that write from left to right."""
    return {
        name: {"model": model, "config": made, "inputs": text} | dict(*more)
        for name, (model, made, *more) in {
            "llama": (tf.LlamaForCausalLM, config(tf.LlamaConfig, GATED)),
            "mistral": (tf.MistralForCausalLM, config(tf.MistralConfig, GATED)),
            "ministral": (tf.MinistralForCausalLM, config(tf.MinistralConfig, HEADS)),
            "qwen2": (tf.Qwen2ForCausalLM, config(tf.Qwen2Config, GATED, tie_word_embeddings=True)),
            "qwen3": (tf.Qwen3ForCausalLM, config(tf.Qwen3Config, HEADS)),
            "phi": (tf.PhiForCausalLM, config(tf.PhiConfig, GATED)),
            "phi3": (tf.Phi3ForCausalLM, config(tf.Phi3Config, GATED)),
            "gemma": (tf.GemmaForCausalLM, config(tf.GemmaConfig, HEADS)),
            "gemma2": (tf.Gemma2ForCausalLM, config(tf.Gemma2Config, HEADS, query_pre_attn_scalar=8)),
            "gemma3-text": (tf.Gemma3ForCausalLM, config(tf.Gemma3TextConfig, HEADS)),
            "olmo": (tf.OlmoForCausalLM, config(tf.OlmoConfig, GATED)),
            "olmo2": (tf.Olmo2ForCausalLM, config(tf.Olmo2Config, GATED)),
            "olmo3": (tf.Olmo3ForCausalLM, config(tf.Olmo3Config, GATED)),
            "cohere": (tf.CohereForCausalLM, config(tf.CohereConfig, GATED)),
            "cohere2": (tf.Cohere2ForCausalLM, config(tf.Cohere2Config, HEADS)),
            "stablelm": (tf.StableLmForCausalLM, config(tf.StableLmConfig, GATED)),
            "starcoder2": (tf.Starcoder2ForCausalLM, config(tf.Starcoder2Config, GATED)),
            "granite": (tf.GraniteForCausalLM, config(tf.GraniteConfig, GATED)),
            "glm": (tf.GlmForCausalLM, config(tf.GlmConfig, HEADS)),
            "glm4": (tf.Glm4ForCausalLM, config(tf.Glm4Config, HEADS)),
            "smollm3": (tf.SmolLM3ForCausalLM, config(tf.SmolLM3Config, GATED)),
            "exaone4": (tf.Exaone4ForCausalLM, config(tf.Exaone4Config, GATED)),
            "nemotron": (tf.NemotronForCausalLM, config(tf.NemotronConfig, HEADS)),
            "persimmon": (tf.PersimmonForCausalLM, config(tf.PersimmonConfig, TEXT)),
            "helium": (tf.HeliumForCausalLM, config(tf.HeliumConfig, HEADS)),
            "ernie4_5": (tf.Ernie4_5ForCausalLM, config(tf.Ernie4_5Config, HEADS)),
            "seed_oss": (tf.SeedOssForCausalLM, config(tf.SeedOssConfig, HEADS)),
            "falcon": (tf.FalconForCausalLM, config(tf.FalconConfig, TEXT, ffn_hidden_size=48)),
            "gpt2": (tf.GPT2LMHeadModel, config(tf.GPT2Config, GPT)),
            "gpt_bigcode": (tf.GPTBigCodeForCausalLM, config(tf.GPTBigCodeConfig, GPT)),
            "gpt_neo": (
                tf.GPTNeoForCausalLM,
                config(tf.GPTNeoConfig, TEXT, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
            ),
            "gpt_neox": (tf.GPTNeoXForCausalLM, config(tf.GPTNeoXConfig, TEXT)),
            "gptj": (tf.GPTJForCausalLM, config(tf.GPTJConfig, GPT, rotary_dim=4, tie_word_embeddings=False)),
            "codegen": (tf.CodeGenForCausalLM, config(tf.CodeGenConfig, GPT, rotary_dim=4)),
            "opt": (tf.OPTForCausalLM, config(tf.OPTConfig, TEXT, ffn_dim=48, word_embed_proj_dim=HIDDEN)),
            "bloom": (tf.BloomForCausalLM, config(tf.BloomConfig, TEXT, n_layer=2, n_head=4)),
            "mpt": (
                tf.MptForCausalLM,
                config(tf.MptConfig, d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=VOCAB),
            ),
            "xglm": (
                tf.XGLMForCausalLM,
                config(tf.XGLMConfig, TEXT, d_model=HIDDEN, num_layers=2, attention_heads=4, ffn_dim=48),
            ),
            "biogpt": (tf.BioGptForCausalLM, config(tf.BioGptConfig, TEXT)),
            "mamba": (
                tf.MambaForCausalLM,
                config(tf.MambaConfig, hidden_size=HIDDEN, num_hidden_layers=2, vocab_size=VOCAB, state_size=4),
                {"without": ("out_proj",), "kinds": 1},
            ),
            "mamba2": (
                tf.Mamba2ForCausalLM,
                config(
                    tf.Mamba2Config,
                    {"hidden_size": HIDDEN, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8},
                    **{"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, **TOKENS},
                ),
                {"without": ("out_proj",), "kinds": 1},
            ),
        }.items()
    }


def encoders() -> dict[str, dict[str, Any]]:
    """Return models that read a text."""
    bert_like = {
        "bert": (tf.BertForMaskedLM, tf.BertConfig),
        "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig),
        "xlm-roberta": (tf.XLMRobertaForMaskedLM, tf.XLMRobertaConfig),
        "camembert": (tf.CamembertForMaskedLM, tf.CamembertConfig),
        "electra": (tf.ElectraForMaskedLM, tf.ElectraConfig),
        "albert": (tf.AlbertForMaskedLM, tf.AlbertConfig),
        "mpnet": (tf.MPNetForMaskedLM, tf.MPNetConfig),
        "deberta": (tf.DebertaForMaskedLM, tf.DebertaConfig),
        "deberta-v2": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config),
        "ernie": (tf.ErnieForMaskedLM, tf.ErnieConfig),
        "esm": (tf.EsmForMaskedLM, tf.EsmConfig),
        "modernbert": (tf.ModernBertForMaskedLM, tf.ModernBertConfig),
        "bert-classifier": (tf.BertForSequenceClassification, tf.BertConfig),
        "roberta-tagger": (tf.RobertaForTokenClassification, tf.RobertaConfig),
    }
    more = {"embedding_size": HIDDEN, "pooler_hidden_size": HIDDEN, "cls_token_id": 1, "sep_token_id": 2}
    distilbert = {"dim": HIDDEN, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}
    return {
        **{
            name: {"model": model, "config": config(made, TEXT, more), "inputs": text}
            for name, (model, made) in bert_like.items()
        },
        "distilbert": {
            "model": tf.DistilBertForMaskedLM,
            "config": config(tf.DistilBertConfig, distilbert, max_position_embeddings=64),
            "inputs": text,
        },
    }


def encoder_decoders() -> dict[str, dict[str, Any]]:
    """Return models that read one sequence and write another."""
    listening = {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8}
    found = {
        "t5": (tf.T5ForConditionalGeneration, config(tf.T5Config, T5)),
        "mt5": (tf.MT5ForConditionalGeneration, config(tf.MT5Config, T5)),
        "umt5": (tf.UMT5ForConditionalGeneration, config(tf.UMT5Config, T5)),
        "longt5": (tf.LongT5ForConditionalGeneration, config(tf.LongT5Config, T5, local_radius=4)),
        "bart": (tf.BartForConditionalGeneration, config(tf.BartConfig, SIDES)),
        "mbart": (tf.MBartForConditionalGeneration, config(tf.MBartConfig, SIDES)),
        "pegasus": (tf.PegasusForConditionalGeneration, config(tf.PegasusConfig, SIDES)),
        "marian": (tf.MarianMTModel, config(tf.MarianConfig, SIDES)),
        "m2m_100": (tf.M2M100ForConditionalGeneration, config(tf.M2M100Config, SIDES)),
        "blenderbot": (tf.BlenderbotForConditionalGeneration, config(tf.BlenderbotConfig, SIDES)),
        "whisper": (tf.WhisperForConditionalGeneration, config(tf.WhisperConfig, SIDES, listening)),
    }
    return {
        name: {"model": model, "config": made, "inputs": speech if name == "whisper" else seq2seq}
        for name, (model, made) in found.items()
    }


def vision_and_audio() -> dict[str, dict[str, Any]]:
    """Return models that look or listen, alone or beside a text."""
    swin = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    clip = {"text_config": TEXT, "vision_config": IMAGES, "projection_dim": 16}
    found: dict[str, tuple[Any, ...]] = {
        "vit": (tf.ViTForImageClassification, config(tf.ViTConfig, IMAGES, num_labels=5), image),
        "deit": (tf.DeiTForImageClassification, config(tf.DeiTConfig, IMAGES, num_labels=5), image),
        "beit": (tf.BeitForImageClassification, config(tf.BeitConfig, IMAGES, num_labels=5), image),
        "vit_msn": (tf.ViTMSNModel, config(tf.ViTMSNConfig, IMAGES), image),
        "dinov2": (tf.Dinov2ForImageClassification, config(tf.Dinov2Config, IMAGES, num_labels=5), image),
        "dinov2_with_registers": (tf.Dinov2WithRegistersModel, config(tf.Dinov2WithRegistersConfig, IMAGES), image),
        "swin": (tf.SwinForImageClassification, config(tf.SwinConfig, swin, num_labels=5), image),
        "swinv2": (tf.Swinv2ForImageClassification, config(tf.Swinv2Config, swin, num_labels=5), image),
        "clip": (tf.CLIPModel, config(tf.CLIPConfig, clip), pair, {"towers": TOWERS}),
        "clip-vision": (tf.CLIPVisionModel, config(tf.CLIPVisionConfig, IMAGES), image),
        "siglip": (tf.SiglipModel, config(tf.SiglipConfig, clip), pair, {"towers": TOWERS}),
        "altclip": (tf.AltCLIPModel, config(tf.AltCLIPConfig, clip), pair, {"towers": TOWERS}),
        "wav2vec2": (tf.Wav2Vec2ForCTC, config(tf.Wav2Vec2Config, WAV), audio),
        "hubert": (tf.HubertForCTC, config(tf.HubertConfig, WAV), audio),
        "wavlm": (tf.WavLMForCTC, config(tf.WavLMConfig, WAV), audio, {"without": WAVLM_ATTENTION}),
        "ast": (
            tf.ASTForAudioClassification,
            config(tf.ASTConfig, SMALL, patch_size=4, max_length=16, num_mel_bins=8, num_labels=5),
            lambda: {"input_values": noise(2, 16, 8)},
        ),
    }
    return {
        name: {"model": model, "config": made, "inputs": inputs} | dict(*more)
        for name, (model, made, inputs, *more) in found.items()
    }


def image_text_models() -> dict[str, dict[str, Any]]:
    """Return models that write about an image."""
    square = lambda: noise(2, 3, 16, 16)  # noqa: E731
    one_of_many = lambda: noise(2, 1, 3, 16, 16)  # noqa: E731
    clip = {**IMAGES, "model_type": "clip_vision_model"}
    siglip = {**IMAGES, "model_type": "siglip_vision_model", "vision_use_head": False}
    llama = {**GATED, "model_type": "llama"}
    seen = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
    qwen_text = {**GATED, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    qwen_eye = {"depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    qwen25_eye = {**qwen_eye, "intermediate_size": 48, "out_hidden_size": HIDDEN, "window_size": 16}
    qwen3_eye = {**qwen25_eye, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    patch = patches(3 * 2 * 4 * 4)
    qwen = with_image(4, patch["pixels"], **{name: value for name, value in patch.items() if name != "pixels"})
    found: dict[str, tuple[Any, ...]] = {
        "llava": (
            tf.LlavaForConditionalGeneration,
            config(tf.LlavaConfig, seen, vision_config=clip, text_config=llama, vision_feature_layer=-1),
            with_image(4, square),
        ),
        "llava-siglip-qwen2": (
            tf.LlavaForConditionalGeneration,
            config(
                tf.LlavaConfig,
                {**seen, "vision_config": siglip, "text_config": {**GATED, "model_type": "qwen2"}},
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
            with_image(4, square),
        ),
        "gemma3": (
            tf.Gemma3ForConditionalGeneration,
            config(tf.Gemma3Config, seen, vision_config=siglip, text_config=HEADS, mm_tokens_per_image=4),
            with_image(4, square, token_type_ids=lambda: torch.zeros(2, 10, dtype=torch.long)),
        ),
        "paligemma": (
            tf.PaliGemmaForConditionalGeneration,
            config(
                tf.PaliGemmaConfig,
                {**seen, "vision_config": siglip, "text_config": {**HEADS, "model_type": "gemma"}},
                projection_dim=HIDDEN,
            ),
            with_image(4, square),
        ),
        "mistral3": (
            tf.Mistral3ForConditionalGeneration,
            config(
                tf.Mistral3Config,
                {**seen, "vision_config": {**IMAGES, "patch_size": 4, "head_dim": 8, "model_type": "pixtral"}},
                text_config={**HEADS, "model_type": "mistral"},
                vision_feature_layer=-1,
            ),
            with_image(4, square, image_sizes=lambda: torch.tensor([[16, 16]] * 2)),
        ),
        "aya_vision": (
            tf.AyaVisionForConditionalGeneration,
            config(tf.AyaVisionConfig, seen, vision_config=siglip, text_config={**HEADS, "model_type": "cohere2"}),
            with_image(1, square),
        ),
        "internvl": (
            tf.InternVLForConditionalGeneration,
            config(
                tf.InternVLConfig,
                {**seen, "text_config": {**GATED, "model_type": "qwen2"}, "downsample_ratio": 0.5},
                vision_config={**SMALL, "image_size": [16, 16], "patch_size": [8, 8]},
            ),
            with_image(1, square),
        ),
        "qwen2_vl": (
            tf.Qwen2VLForConditionalGeneration,
            config(tf.Qwen2VLConfig, seen, text_config=qwen_text, vision_config=qwen_eye),
            qwen,
        ),
        "qwen2_5_vl": (
            tf.Qwen2_5_VLForConditionalGeneration,
            config(tf.Qwen2_5_VLConfig, seen, text_config=qwen_text, vision_config=qwen25_eye),
            qwen,
        ),
        "qwen3_vl": (
            tf.Qwen3VLForConditionalGeneration,
            config(tf.Qwen3VLConfig, seen, text_config={**qwen_text, "head_dim": 8}, vision_config=qwen3_eye),
            qwen,
        ),
        "idefics3": (
            tf.Idefics3ForConditionalGeneration,
            config(tf.Idefics3Config, seen, text_config=llama, vision_config=IMAGES, scale_factor=2),
            with_image(1, one_of_many),
        ),
        "smolvlm": (
            tf.SmolVLMForConditionalGeneration,
            config(tf.SmolVLMConfig, seen, text_config=llama, vision_config=IMAGES, scale_factor=2),
            with_image(1, one_of_many),
        ),
        "blip-2": (
            tf.Blip2ForConditionalGeneration,
            config(
                tf.Blip2Config,
                {**seen, "vision_config": IMAGES, "num_query_tokens": 4},
                qformer_config={**TEXT, "encoder_hidden_size": HIDDEN},
                text_config={**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
            ),
            with_image(4, square),
        ),
    }
    towers = {
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QWEN_TOWERS),
        **dict.fromkeys(("idefics3", "smolvlm"), ("model.vision_model.", "model.text_model.")),
        "blip-2": ("vision_model.", "qformer.", "language_model."),
    }
    return {
        name: {"model": model, "config": made, "inputs": inputs, "towers": towers.get(name, LLAVA_TOWERS)}
        for name, (model, made, inputs) in found.items()
    }


ARCHITECTURES = tuple(Architecture(name=name, **options) for name, options in table().items())

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
RENAMED = [
    BY_NAME[name]
    for name in (
        *(
            "vit",
            "deit",
            "beit",
            "vit_msn",
            "dinov2",
            "dinov2_with_registers",
            "ast",
            "llava",
            "llava-siglip-qwen2",
            "gemma3",
        ),
        *("paligemma", "mistral3", "aya_vision", "internvl", "qwen2_vl", "qwen2_5_vl"),
    )
]
WITH_BACKBONE = [
    BY_NAME[name]
    for name in (
        *(
            "llama",
            "gpt2",
            "gpt_neox",
            "opt",
            "bloom",
            "mamba",
            "bert",
            "roberta-tagger",
            "distilbert",
            "deberta-v2",
            "bart",
        ),
        *("t5", "whisper", "vit", "dinov2", "wav2vec2", "llava", "gemma3", "qwen2_5_vl", "qwen3_vl"),
    )
]
