"""Every parameter of the saving methods, checked before anything is touched: honoured, or rejected by its name."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraweld.errors import RequestError
from loraweld.hub.target import check_flag
from loraweld.request import parse_size
from loraweld.save_methods import parse_save_method

TEMPORARY_LOCATION = "_unsloth_temporary_saved_buffers"
MAX_SHARD_SIZE = "5GB"
MAX_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """What the user asked for, parsed. `output` is a folder, or None for what goes to the Hub.

    `method` is one of loraweld's save methods, `implied` the option that another name for it implies.
    """

    output: Path | None
    tokenizer: Any
    method: str
    implied: Mapping[str, str] = field(default_factory=dict)
    token: str | bool | None = None
    state_dict: Mapping[str, torch.Tensor] | None = None
    save_function: Callable[..., Any] = torch.save
    max_shard_bytes: int = 5 * 10**9
    safe_serialization: bool = True
    variant: str | None = None
    save_peft_format: bool = True
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    temporary_location: Path = Path(TEMPORARY_LOCATION)
    maximum_memory_usage: float = 0.75
    gguf_types: tuple[str, ...] = ()


def parse_options(
    output: Path | None,
    *,
    tokenizer: Any,
    save_method: object,
    token: str | bool | None,
    state_dict: Mapping[str, torch.Tensor] | None,
    save_function: Callable[..., Any],
    max_shard_size: int | str,
    safe_serialization: bool,
    variant: str | None,
    save_peft_format: bool,
    tags: Sequence[str] | None,
    temporary_location: str | os.PathLike[str],
    maximum_memory_usage: float,
    datasets: Sequence[str] | None,
) -> SaveOptions:
    """Check all options that do not depend on the model.

    Raises:
        RequestError: names the parameter, its value and what would be valid.
    """
    if not isinstance(save_method, str):
        raise RequestError(f"save_method is {save_method!r}, expected a name such as merged_16bit")
    method, implied = parse_save_method(save_method)
    check_flag("safe_serialization", safe_serialization)
    check_flag("save_peft_format", save_peft_format)
    _check_tokenizer(tokenizer)
    _check_token(token)
    _check_state(state_dict)
    _check_save_function(save_function, safe_serialization)
    _check_variant(variant)
    options = SaveOptions(
        output=output,
        tokenizer=tokenizer,
        method=method,
        implied=implied,
        token=token,
        state_dict=state_dict,
        save_function=save_function,
        max_shard_bytes=parse_size("max_shard_size", _size(max_shard_size)),
        safe_serialization=safe_serialization,
        variant=variant,
        save_peft_format=save_peft_format,
        tags=_names("tags", tags),
        datasets=_names("datasets", datasets),
        temporary_location=_location(temporary_location),
        maximum_memory_usage=_share(maximum_memory_usage),
    )
    _check_method(options, max_shard_size)
    return options


def parse_directory(save_directory: object) -> Path:
    """Return the output folder.

    Raises:
        RequestError: not a path.
    """
    if not isinstance(save_directory, str | os.PathLike) or not os.fspath(save_directory):
        raise RequestError(f"save_directory is {save_directory!r}, expected a path")
    return Path(save_directory).expanduser()


def _check_tokenizer(tokenizer: object) -> None:
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise RequestError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained; expected a tokenizer or processor"
        )


def _check_token(token: object) -> None:
    if token is not None and not isinstance(token, str | bool):
        raise RequestError(f"token is a {type(token).__name__}, expected a text, True, False or None")
    if token == "":
        raise RequestError("token is empty; expected a token of the Hub, True, False or None")


def _check_state(state_dict: object) -> None:
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise RequestError(f"state_dict is a {type(state_dict).__name__}, expected a dict of tensors")


def _check_save_function(save_function: object, safe_serialization: bool) -> None:
    if not callable(save_function):
        raise RequestError(f"save_function is {save_function!r}, expected a callable as torch.save")
    if safe_serialization and save_function is not torch.save:
        raise RequestError(
            "save_function has no effect with safetensors; give safe_serialization=False with it, or leave it out"
        )


def _check_variant(variant: object) -> None:
    if variant is None:
        return
    if not isinstance(variant, str) or not re.fullmatch(r"\w[\w-]*", variant, re.ASCII):
        raise RequestError(f"variant is {variant!r}, expected a part of a file name: letters, digits, _ and -")
    if re.search(r"-\d{5}-of-\d{5}", variant):
        raise RequestError(f"variant is {variant!r}, which reads as the number of a shard")


def _check_method(options: SaveOptions, max_shard_size: object) -> None:
    """What has an effect with some methods only is rejected with the others."""
    method = options.method
    if method == "lora":
        if max_shard_size != MAX_SHARD_SIZE:
            raise RequestError(f"max_shard_size is {max_shard_size!r}: an adapter is one file with save_method lora")
        if options.variant is not None:
            raise RequestError(
                f"variant is {options.variant!r}: PEFT has no variants; leave it out with save_method lora"
            )
        return
    if not options.save_peft_format:
        raise RequestError(f"save_peft_format is for save_method lora; the output of {method} holds no adapter")
    if not options.safe_serialization and method != "merged_16bit":
        raise RequestError(
            f"safe_serialization is False: {method} is written as safetensors only; "
            "pickles are written by merged_16bit and lora"
        )
    if method == "gguf" and options.variant is not None:
        raise RequestError(f"variant is {options.variant!r}: files of save_method gguf have no variants")


def _size(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise RequestError(f"max_shard_size is {value!r}, expected a size such as 500MB, 5GB or 5GiB")
    return value


def _names(option: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise RequestError(f"{option} is {value!r}, expected a list of texts")
    return tuple(value)


def _location(value: object) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise RequestError(f"temporary_location is {value!r}, expected a path")
    path = Path(value).expanduser()
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(f"temporary_location is {str(path)!r}: {existing} is not a folder that can be written")
    return path


def _share(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= MAX_SHARE:
        raise RequestError(f"maximum_memory_usage is {value!r}, expected a number over 0, at most {MAX_SHARE}")
    return float(value)
