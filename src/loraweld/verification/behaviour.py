"""Does a merged model behave as base + adapter? Both are run on prompts on the CPU, and their logits compared.

The reference is PEFT's forward pass with the adapters unmerged, which shares nothing with a merge but the files.
Weights are widened to float32 and all is computed in it, so what differs is what is stored, not how kernels round.

One model is in memory at a time. The base writes its logits to a temporary file, alone and with the adapters on it; the
merged model is compared with both.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loraweld.adapter.edits import Weighted
from loraweld.adapter.files import Adapter
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.mounted import mounted_in
from loraweld.checkpoint.origins import place_of
from loraweld.errors import RequestError, shortened
from loraweld.free_memory import free_memory_bytes
from loraweld.request import QUANTIZED_FROM
from loraweld.verification.agreement import Agreement, Behaviour, combined
from loraweld.verification.findings import Finding
from loraweld.verification.intended import Intended
from loraweld.verification.opened import Opened

MAX_TOKENS = 2048  # of a prompt
_PACKAGES = ("transformers", "peft")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FLOAT_BYTES = 4
_BLOCK = 64  # positions that are compared at a time, in float64
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is to be compared: the prompts, each with its tokens, and what they are given to."""

    opened: Opened
    intended: Intended
    prompts: Sequence[str]
    tokens: Sequence[Sequence[int]]


def check_packages() -> None:
    """Raises:
    RequestError: names the packages that are missing, and how to get them.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise RequestError(f"--behaviour needs {' and '.join(missing)}: pip install 'loraweld[peft]'")


def prepare_trial(opened: Opened, intended: Intended, prompts: Sequence[str]) -> Trial:
    """Return what a comparison needs, before the first weight is read.

    Raises:
        RequestError: a model is no language model of one text, the adapters act together as PEFT cannot, there is no
            tokenizer, a prompt is too long, or memory or disk are too small.
    """
    _check_expressible(intended)
    _check_here(opened, intended)
    with _quiet():
        _check_causal(intended.base.folder)
        if opened.config:  # else it is damaged, and a finding
            _check_causal(opened.folder)
        tokens = _tokenised(prompts, _tokenizer_folder(opened, intended))
    trial = Trial(opened=opened, intended=intended, prompts=prompts, tokens=tokens)
    _check_room(trial)
    return trial


def run_trial(trial: Trial) -> tuple[Behaviour | None, list[Finding]]:
    """Run both models; what is wrong with the merged one is a finding.

    Raises:
        RequestError: transformers or PEFT cannot load base and adapters, or run them.
    """
    with (
        tempfile.TemporaryDirectory(prefix="loraweld-", ignore_cleanup_errors=True) as scratch,
        _quiet(),
        torch.inference_mode(),
    ):
        found = _merged(trial, _reference(trial, Path(scratch) / "logits"))
    if isinstance(found, str):
        return None, [_finding(trial, found)]
    behaviour = Behaviour(total=combined(found), prompts=tuple(found), in_codes=_is_encoded(trial.opened))
    return behaviour, [] if behaviour.holds else [_finding(trial, str(behaviour))]


def _finding(trial: Trial, message: str) -> Finding:
    return Finding(check="behaviour", where=trial.opened.folder.name, message=message)


def _is_encoded(opened: Opened) -> bool:
    return any(isinstance(tensor, EncodedTensor) for tensor in opened.tensors.values())


# What can be refused before


def _check_expressible(intended: Intended) -> None:
    """PEFT's forward pass chains adapters and scales factors; it has no word for what a merge takes in part besides."""
    if intended.request.merge_base == QUANTIZED_FROM:
        raise RequestError(
            "--behaviour loads the base as it is, not as merge_base quantized-from makes it; verify without one of them"
        )
    partly = next((r.name for r in intended.recipes.values() if any(isinstance(e, Weighted) for e in r.edits)), None)
    other = next((a for a in _acting(intended) if a.weight != 1 and a.config.peft_type != "LORA"), None)
    if partly or other:
        where = f"{partly} is" if partly else f"{other.config.peft_type} of {other.label} is" if other else ""
        raise RequestError(
            f"--behaviour cannot compare this combination: {where} taken in part (weights or scale other than 1), and "
            "PEFT's forward pass can do that with plain LoRA factors only; verify without --behaviour"
        )


def _check_here(opened: Opened, intended: Intended) -> None:
    """transformers and PEFT read files, not what is mounted in their place."""
    folders = [opened.folder, intended.base.folder, *(adapter.folder for adapter in intended.facts.adapters)]
    away = next((path for folder in folders for path in mounted_in(folder)), None)
    if away is not None:
        raise RequestError(f"--behaviour loads models from folders on this machine; {place_of(away)} is not on it")


def _acting(intended: Intended) -> list[Adapter]:
    """Those that are merged: as given, or the one that they were combined to."""
    return [adapter for adapter in intended.facts.adapters if adapter.weight != 0]


def _check_causal(folder: Path) -> None:
    import transformers as tf

    try:
        config: Any = tf.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a stranger's config makes transformers raise
        raise RequestError(f"transformers cannot read its config: {_told(error)}", path=folder) from None
    known: Any = tf.MODEL_FOR_CAUSAL_LM_MAPPING
    named = list(getattr(config, "architectures", None) or ())
    model = known.get(type(config), None)
    if model is None or (named and model.__name__ not in named):
        raise RequestError(
            f"is {' or '.join(map(str, named)) or config.model_type}; --behaviour is for language models with a causal "
            "head, which read text alone",
            path=folder,
        )


def _tokenizer_folder(opened: Opened, intended: Intended) -> Path:
    """The one asked for, else the output's own, else the one that a merge would have shipped."""
    asked, given = intended.request.tokenizer, [adapter.folder for adapter in intended.facts.given]
    folders = [Path(asked)] if asked else [opened.folder, *given, intended.base.folder]
    found = next((one for one in folders if any((one / name).is_file() for name in _TOKENIZER_FILES)), None)
    if found is None:
        raise RequestError(f"there is no tokenizer in {', '.join(map(str, folders))}; give its folder with --tokenizer")
    return found


def _tokenised(prompts: Sequence[str], folder: Path) -> list[list[int]]:
    import transformers as tf

    auto: Any = tf.AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokens = [list(map(int, tokenizer(prompt)["input_ids"])) for prompt in prompts]
    except Exception as error:  # as above
        raise RequestError(f"transformers cannot use its tokenizer: {_told(error)}", path=folder) from None
    for number, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True), start=1):
        if not 1 <= len(ids) <= MAX_TOKENS:
            raise RequestError(
                f"prompt {number}, {shortened(prompt[:60])}, has {len(ids)} tokens, expected 1 to {MAX_TOKENS}"
            )
    return tokens


def _check_room(trial: Trial) -> None:
    """In memory one model in float32, the adapters, the logits of a prompt; on disk twice the logits of all prompts."""
    sizes = [
        sum(math.prod(tensor.shape) for tensor in tensors.values())
        for tensors in (trial.intended.base.tensors, trial.opened.tensors)
    ]
    factors = sum(adapter.weights.stat().st_size for adapter in _acting(trial.intended))
    row = _FLOAT_BYTES * _vocabulary(trial.intended)
    longest, total = max(map(len, trial.tokens)), sum(map(len, trial.tokens))
    needed, free = _FLOAT_BYTES * max(sizes) + 2 * factors + 3 * longest * row, free_memory_bytes()
    if needed > free:
        raise RequestError(
            f"--behaviour runs the model in float32 and needs about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; verify without it, the weights are compared all the same"
        )
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    kept = 2 * total * row
    if kept > room:
        raise RequestError(
            f"--behaviour keeps the logits of {total} tokens in {folder}, {kept / 1e9:.1f} GB, {room / 1e9:.1f} GB are "
            "free; give fewer prompts, or another folder with TMPDIR"
        )


def _vocabulary(intended: Intended) -> int:
    config = intended.config
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("vocab_size")
    return found if isinstance(found, int) else 0


# The two models


def _reference(trial: Trial, file: Path) -> Logits:
    """Return the logits of the base, and of base + adapters, (2, tokens, vocabulary) on disk."""
    model = _base(trial)
    spans = _spans(trial.tokens)
    try:
        first_TV = _logits(model, trial.tokens[0])
        kept = np.memmap(file, np.float32, "w+", shape=(2, spans[-1].stop, first_TV.shape[1]))
        _keep(model, trial, kept[0])
        _keep(_with_adapters(model, trial), trial, kept[1])
    except RequestError:
        raise
    except Exception as error:  # of a model's own code, or PEFT's
        raise RequestError(f"base + adapter cannot be run: {_told(error)}", path=trial.intended.base.folder) from None
    return kept


def _keep(model: Any, trial: Trial, kept: Logits) -> None:
    for span, ids in zip(_spans(trial.tokens), trial.tokens, strict=True):
        kept[span] = _logits(model, ids).numpy()


def _merged(trial: Trial, kept: Logits) -> list[Agreement] | str:
    """Return for each prompt how the merged model agrees with the reference, or why it cannot be said."""
    try:
        model, missing = _load(trial.opened.folder)
        if missing:
            return f"transformers finds no values for {len(missing)} parameters, the first is {missing[0]}"
        found = []
        for span, ids, prompt in zip(_spans(trial.tokens), trial.tokens, trial.prompts, strict=True):
            logits_TV = _logits(model, ids)
            if logits_TV.shape[1] != kept.shape[2]:
                return f"has {logits_TV.shape[1]} logits, base + adapter {kept.shape[2]}"
            base_TV, expected_TV = (torch.from_numpy(kept[i, span]) for i in range(2))
            found.append(_agreement(prompt, base_TV, expected_TV, logits_TV))
    except Exception as error:  # of whatever is wrong with the files
        return f"cannot be loaded or run: {_told(error)}"
    return found


def _base(trial: Trial) -> Any:
    """The base with as many rows of embeddings as the adapters have; they say what the row of a new token holds."""
    folder = trial.intended.base.folder
    try:
        model, missing = _load(folder)
    except Exception as error:  # as above
        raise RequestError(f"transformers cannot load the base: {_told(error)}", path=folder) from None
    if missing:
        raise RequestError(f"transformers finds no values for {missing[0]} of the base", path=folder)
    rows, wanted = model.get_input_embeddings().weight.shape[0], _vocabulary(trial.intended)
    if wanted and wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[rows:] = 0
    return model


def _with_adapters(model: Any, trial: Trial) -> Any:
    """Put PEFT around the model, all adapters active, each at its weight."""
    import peft

    adapters = _acting(trial.intended)
    names = [f"given_{i}_" for i in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        folder = str(adapter.config.path.parent)
        if name == names[0]:
            made: Any = peft.PeftConfig.from_pretrained(folder)
            made.inference_mode = True
            model = peft.PeftModel(model, made, name)
        told = model.load_adapter(folder, name, torch_device="cpu")
        _check_loaded(model, name, adapter, told)
        _scale(model, name, adapter.weight)
    if adapters:
        model.base_model.set_adapter(names)
    return model.eval()


def _check_loaded(model: Any, name: str, adapter: Adapter, told: Any) -> None:
    """A reference that lacks a part of the adapter would blame the merge.

    Raises:
        RequestError: PEFT's model has not all that the file holds, or holds other values.
    """
    import peft

    stored = peft.load_peft_weights(str(adapter.config.path.parent), device="cpu")
    loaded = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    other = [key for key in stored.keys() & loaded.keys() if not torch.equal(stored[key].to(loaded[key]), loaded[key])]
    lost = [key for key in told.unexpected_keys if not _is_stored_again(key, stored)]
    odd = sorted([*told.missing_keys, *lost, *other])
    if odd:
        raise RequestError(
            f"PEFT loads {adapter.label} in part: {shortened(odd[0])} and {len(odd) - 1} more of its tensors have no "
            "place in the model, or not their own; verify without --behaviour"
        )


def _is_stored_again(key: str, stored: Mapping[str, Tensor]) -> bool:
    """Of tied or saved layers a file may hold the same tensor under a second name, which PEFT passes over."""
    return key in stored and any(
        name != key and value.shape == stored[key].shape and torch.equal(value, stored[key])
        for name, value in stored.items()
    )


def _scale(model: Any, name: str, weight: float) -> None:
    for module in model.modules():
        scaling = getattr(module, "scaling", None)  # of attention it is a number
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= weight


def _load(folder: Path) -> tuple[Any, list[str]]:
    """Return the model in float32, and the parameters that its files do not hold.

    Codes are decoded where transformers can, and activations are not rounded; other quantised models run as they do.
    """
    import transformers as tf

    auto: Any = tf.AutoModelForCausalLM
    model, told = auto.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True
    )
    if getattr(model, "is_quantized", False):
        model = _plain(model)
    model.config.use_cache = False
    return model.eval(), sorted(told["missing_keys"])


def _plain(model: Any) -> Any:
    if model.hf_quantizer.quantization_config.quant_method == "compressed-tensors":  # decodes at the first forward pass
        from compressed_tensors.quantization import disable_quantization

        return model.apply(disable_quantization)
    with suppress(NotImplementedError):
        return model.dequantize().float()
    return model


# The comparison


def _spans(tokens: Sequence[Sequence[int]]) -> list[slice]:
    ends = np.cumsum([len(ids) for ids in tokens]).tolist()
    return [slice(end - len(ids), end) for end, ids in zip(ends, tokens, strict=True)]


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits at each position of a prompt, (tokens, vocabulary) in float32."""
    logits_1TV: Tensor = model(input_ids=torch.tensor([ids])).logits
    return logits_1TV[0].float()


def _agreement(prompt: str, base_TV: Tensor, expected_TV: Tensor, found_TV: Tensor) -> Agreement:
    """Compare the logits at each position of a prompt, in float64."""
    kl_T = _divergence(expected_TV, found_TV)
    return Agreement(
        prompt=prompt,
        tokens=len(kl_T),
        kl_mean=float(kl_T.mean()),
        kl_max=float(kl_T.max()),
        top1=float((expected_TV.argmax(-1) == found_TV.argmax(-1)).double().mean()),
        logit_difference=float((expected_TV - found_TV).abs().max()),
        adapter_kl_mean=float(_divergence(expected_TV, base_TV).mean()),
        base_kl_mean=float(_divergence(base_TV, found_TV).mean()),
    )


def _divergence(first_TV: Tensor, second_TV: Tensor) -> Tensor:
    """Return KL(first ‖ second) at each position, in nats."""
    kls = []
    for first_BV, second_BV in zip(torch.split(first_TV, _BLOCK), torch.split(second_TV, _BLOCK), strict=True):
        p_BV, q_BV = (logits_BV.double().log_softmax(-1) for logits_BV in (first_BV, second_BV))
        kls.append((p_BV.exp() * (p_BV - q_BV)).sum(-1).clamp(min=0))  # rounding can put a 0 below itself
    return torch.cat(kls)


def _told(error: Exception) -> str:
    """The first line of what a library says; strangers may have chosen it."""
    return shortened(f"{type(error).__name__}: {error}".split("\n")[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the progress bars and the advice of transformers and PEFT."""
    from transformers.utils import logging as told

    logging: Any = told
    verbosity, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows:
            logging.enable_progress_bar()
