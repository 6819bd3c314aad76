"""What the user asks for: every option parsed and checked once, at the edge."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from loraweld.checkpoint.encodings.bnb4 import BLOCKSIZES
from loraweld.checkpoint.url import HUB_SCHEME, is_url, local_path, scheme_of, shown
from loraweld.combine.methods import Combination, check_seed, make_combination
from loraweld.errors import OutputError, RequestError
from loraweld.gguf_types import parse_quantization
from loraweld.hub.target import HubTarget, parse_target
from loraweld.save_methods import ONLY_FOR, nearest_name, normal_name, parse_save_method

QUANT_TYPES = ("nf4", "fp4")
QUANTIZERS = ("mse", "absmax")
AS_GIVEN, QUANTIZED_FROM = "as-given", "quantized-from"
EXPERT_LAYOUTS = ("auto", "standard", "swapped")
DTYPES = ("auto", "bfloat16", "float16", "float32")
NEAREST, STOCHASTIC = "nearest", "stochastic"
ROUNDINGS = (NEAREST, STOCHASTIC)
EXECUTORS = ("local", "ray")
CPU = "cpu"
DEVICES = (CPU, "cuda", "cuda:N", "mps", "xpu")
MIN_MEMORY_BYTES = 64 * 10**6
MAX_SIZE_BYTES = 2**62
MAX_WORKERS = 256
DEFAULT_WORKERS = 4
WHOLE_METHODS = ("gguf", "lora")  # their files are made of the whole model, or are small
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """A merge as asked for. Sizes in bytes; `base` None means the one the adapter's config names.

    `base`, `adapters` and `tokenizer` are names: paths, Hub ids or URLs.

    `merge_base` is "as-given", or "quantized-from" with what follows a colon in `quantized_base`: the checkpoint that
    the adapter was trained on, None for the one that its config names. `hub`: the repository to push to; without
    `keeps_output` the output is then only the name beside which files are staged. `combination`: how the adapters act
    together, and how strongly. `rounding_seed`: of stochastic rounding, None rounds to nearest. `reads_only`: the
    output is there and looked at, nothing is written. `store`: the URL that the output goes to, `output` is then only
    its name. `executor`: "local", or "ray" for the tasks of a cluster, at `ray_address`. `device`: where weights are
    quantised and decomposed, as torch names it; whether it is there is not known yet.
    """

    adapters: tuple[str, ...]
    combination: Combination
    output: Path
    base: str | None
    save_method: str
    dtype: str
    max_shard_bytes: int | None
    max_memory_bytes: int
    workers: int
    overwrite: bool
    resume: bool
    tokenizer: str | None
    merge_base: str = AS_GIVEN
    quantized_base: str | None = None
    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    quantizer: str = "mse"
    skip_modules: tuple[str, ...] = ()
    gguf_types: tuple[str, ...] = ()
    keep_merged: bool = False
    expert_layout: str = "auto"
    allow_nonfinite: bool = False
    stream_base: bool = False
    token: str | bool | None = field(default=None, repr=False)
    hub: HubTarget | None = None
    keeps_output: bool = True
    reads_only: bool = False
    verify: bool = False
    rounding_seed: int | None = None
    store: str | None = None
    executor: str = "local"
    ray_address: str | None = None
    device: str = CPU

    @property
    def is_in_parts(self) -> bool:
        """Whether the output is prepared, made in parts and published."""
        return self.store is not None or self.executor != "local"

    @property
    def is_local(self) -> bool:
        """Whether the output, or what is staged of it, is a folder on this machine."""
        return self.store is None and not self.streams_to_hub

    @property
    def streams_to_hub(self) -> bool:
        """Whether files go to the Hub one by one and leave the disk; not those that are made of the whole model."""
        return self.hub is not None and not self.keeps_output and self.save_method not in WHOLE_METHODS


def make_request(
    adapter: PathLike | Sequence[PathLike],
    *,
    output: PathLike | None = None,
    base: PathLike | None = None,
    save_method: str = "merged_16bit",
    dtype: str = "auto",
    rounding: str = NEAREST,
    max_shard_size: int | str | None = None,
    max_memory: int | str = "512MB",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    tokenizer: PathLike | None = None,
    merge_base: str = AS_GIVEN,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    blocksize: int | None = None,
    quantizer: str | None = None,
    skip_modules: Sequence[str] | None = None,
    gguf_type: str | Sequence[str] | None = None,
    keep_merged: bool = False,
    expert_layout: str = "auto",
    allow_nonfinite: bool = False,
    stream_base: bool = False,
    token: str | bool | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    density: float | None = None,
    seed: int | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str | None = None,
    scale: float | None = None,
    verify: bool = False,
    executor: str = "local",
    ray_address: str | None = None,
    device: str = CPU,
) -> MergeRequest:
    """Check the options and return them as one value.

    Raises:
        RequestError: an unknown name, a size that cannot be read or is too small, no adapter.
        OutputError: the output's name is none that the file system takes.
    """
    adapters = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if not adapters:
        raise RequestError("no adapter was given; expected one or more PEFT folders")
    method, implied = parse_save_method(save_method)
    given: dict[str, Any] = {
        "dtype": dtype if dtype != "auto" else None,
        "quant_type": quant_type,
        "double_quant": double_quant,
        "blocksize": blocksize,
        "quantizer": quantizer,
        "skip_modules": skip_modules,
        "gguf_type": gguf_type,
        "keep_merged": keep_merged or None,
    }
    options = _options(save_method, method, implied, given, merge_base)
    hub = _hub(push_to_hub, token, private=private, revision=revision, create_pr=create_pr, message=commit_message)
    if output is None and hub is None:
        raise RequestError("no output was given; expected a folder (-o OUT), or a repository (--push-to-hub)")
    rounding_seed = _rounding_seed(rounding, seed, method, options["dtype"])
    combination = make_combination(
        len(adapters),
        weights=weights,
        combine=combine,
        density=density,
        seed=seed,
        svd_rank=svd_rank,
        majority_sign_method=majority_sign_method,
        scale=scale,
        seed_is_shared=rounding_seed is not None,
    )
    store = _store(output, method, hub)
    if verify:
        _check_verifiable(method, is_kept=output is not None and store is None)
    folded, _, quantized_base = merge_base.partition(":")
    return MergeRequest(
        adapters=tuple(os.fspath(path) for path in adapters),
        combination=combination,
        output=_place(output, store) if output is not None else _staged_for(hub, method),
        base=None if base is None else os.fspath(base),
        save_method=method,
        max_shard_bytes=None if max_shard_size is None else parse_size("max_shard_size", max_shard_size),
        max_memory_bytes=_memory(max_memory),
        workers=_workers(workers),
        overwrite=overwrite,
        resume=resume,
        tokenizer=None if tokenizer is None else os.fspath(tokenizer),
        merge_base=_choice("merge_base", folded, (AS_GIVEN, QUANTIZED_FROM)),
        quantized_base=quantized_base or None,
        expert_layout=_choice("expert_layout", expert_layout, EXPERT_LAYOUTS),
        allow_nonfinite=allow_nonfinite,
        stream_base=stream_base,
        token=token,
        hub=hub,
        keeps_output=output is not None,
        verify=verify,
        rounding_seed=rounding_seed,
        store=store,
        **_processors(executor, ray_address, device),
        **options,
    )


def _workers(workers: int | None) -> int:
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise RequestError(f"workers is {workers}, expected 1 to {MAX_WORKERS}")
    return workers or DEFAULT_WORKERS


def _device(device: str) -> str:
    name = device.strip().lower()
    if re.sub(r"(?<=cuda:)\d{1,3}$", "N", name) not in DEVICES:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    return name


def _rounding_seed(rounding: str, seed: int | None, method: str, dtype: str) -> int | None:
    """Return the seed of stochastic rounding, None if it was not asked for."""
    if _choice("rounding", rounding, ROUNDINGS) == NEAREST:
        return None
    if method not in ONLY_FOR["rounding"]:
        methods = " and ".join(ONLY_FOR["rounding"])
        raise RequestError(f"rounding stochastic has no effect with save_method {method}, only with {methods}")
    if dtype == "float32":
        raise RequestError(
            "rounding stochastic has no effect with dtype float32, which keeps what is computed; leave one of them out"
        )
    return check_seed(seed)


def _check_verifiable(method: str, *, is_kept: bool) -> None:
    if method in WHOLE_METHODS:
        raise RequestError(f"verify has no effect with save_method {method}, only with those that write a merged model")
    if not is_kept:
        raise RequestError(
            "verify needs the whole output in a folder; give one (-o OUT), or verify what has been published"
        )


def _hub(
    repo_id: str | None,
    token: str | bool | None,
    *,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> HubTarget | None:
    if repo_id is not None:
        return parse_target(
            repo_id, token=token, private=private, revision=revision, create_pr=create_pr, commit_message=message
        )
    given = {"private": private, "revision": revision, "create_pr": create_pr or None, "commit_message": message}
    for option, value in given.items():
        if value is not None:
            raise RequestError(f"{option} has no effect without push_to_hub; give the repository, or leave it out")
    return None


def parse_size(option: str, value: int | str) -> int:
    """Return `value` in bytes: an int, or a string as "5GB" (decimal) or "5GiB" (binary).

    Raises:
        RequestError: not a size, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(str(value))
        if match is None or match[2].upper() not in _UNITS:
            raise RequestError(f"{option} is {value!r}, expected a size such as 500MB, 5GB or 5GiB")
        size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if not 1 <= size <= MAX_SIZE_BYTES:
        raise RequestError(f"{option} is {value!r}, expected more than zero bytes and at most 4 EiB")
    return size


def _staged_for(hub: HubTarget | None, method: str) -> Path:
    """The place, here, of a model that goes to the Hub only: one that is sent in pieces is only staged beside it."""
    assert hub is not None
    return Path(hub.name) if method not in WHOLE_METHODS else Path(f".{hub.name}.loraweld-push") / hub.name


def _store(output: PathLike | None, method: str, hub: HubTarget | None) -> str | None:
    """The URL of an output in an object store, None for a folder on this machine."""
    url = "" if output is None else os.fspath(output)
    if not is_url(url) or local_path(url) is not None:
        return None
    if scheme_of(url) == HUB_SCHEME:
        raise RequestError(f"output {url}: what goes to the Hub is given with push_to_hub, as owner/name")
    if method in WHOLE_METHODS or hub is not None:
        what = "push_to_hub" if hub is not None else f"save_method {method}"
        raise RequestError(f"{what} needs a folder on this machine; {shown(url)} is not on it")
    return url.rstrip("/")


def _processors(executor: str, ray_address: str | None, device: str) -> dict[str, Any]:
    chosen = _choice("executor", executor, EXECUTORS)
    if ray_address is not None and chosen != "ray":
        raise RequestError("ray_address has no effect without executor ray")
    return {"executor": chosen, "ray_address": ray_address, "device": _device(device)}


def _place(output: PathLike, store: str | None) -> Path:
    """The folder; of a store's only the name."""
    if store is not None:
        return Path(shown(store).rpartition("/")[2])
    name = os.fspath(output)
    return _output(Path((local_path(name) if is_url(name) else None) or name))


def _output(path: Path) -> Path:
    """A link stands for the folder it points to: that is where the model appears."""
    try:
        return path.resolve() if path.is_symlink() else path
    except OSError as error:
        raise OutputError(f"output {str(path)[:200]}: {error.strerror}") from None


def _memory(value: int | str) -> int:
    size = parse_size("max_memory", value)
    if size < MIN_MEMORY_BYTES:
        raise RequestError(f"max_memory is {value!r}, the least that works is {MIN_MEMORY_BYTES // 10**6}MB")
    return size


def _options(
    name: str, method: str, implied: Mapping[str, str], given: Mapping[str, Any], merge_base: str
) -> dict[str, Any]:
    """Return the checked options that only some methods have, without those that were not given."""
    found = {option: value for option, value in given.items() if value is not None}
    folds = merge_base != AS_GIVEN
    for option in found:
        methods = ONLY_FOR.get(option, (method,))
        if method not in methods and not (folds and option in ("quant_type", "double_quant", "blocksize")):
            raise RequestError(f"{option} has no effect with save_method {method}, only with {' and '.join(methods)}")
    for option, value in implied.items():
        if found.setdefault(option, value) != value:
            raise RequestError(f"save_method {name!r} means {option} {value}, but {option} is {found[option]!r}")
    found["dtype"] = _choice("dtype", found.get("dtype", "auto"), DTYPES)
    if method == "preserve" and found["dtype"] != "auto":
        raise RequestError("dtype has no effect with save_method preserve, which keeps every tensor's own")
    for option, valid in (("quant_type", QUANT_TYPES), ("quantizer", QUANTIZERS)):
        if option in found:
            found[option] = _choice(option, found[option], valid)
    if found.get("blocksize", BLOCKSIZES[0]) not in BLOCKSIZES:
        raise RequestError(f"blocksize is {found['blocksize']}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    if "skip_modules" in found:
        found["skip_modules"] = tuple(found["skip_modules"])
    if method == "gguf":
        found["gguf_types"] = parse_quantization(found.pop("gguf_type", "q8_0"))
    return found


def _choice(option: str, value: str, valid: Sequence[str]) -> str:
    by_normal = {normal_name(name): name for name in valid}
    return by_normal[nearest_name(option, value, by_normal, shown=valid)]
