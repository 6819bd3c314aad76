"""The four saving methods, as functions of a model; `attach` puts them on one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loraweld.errors import RequestError
from loraweld.gguf_types import parse_quantization
from loraweld.hub.target import COMMIT_MESSAGE, check_flag, parse_target
from loraweld.live.parameters import (
    MAX_SHARD_SIZE,
    TEMPORARY_LOCATION,
    parse_directory,
    parse_options,
)
from loraweld.live.push import push_model
from loraweld.live.save import save_model


def save_pretrained_merged(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    save_function: Callable[..., Any] = torch.save,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    safe_serialization: bool = True,
    variant: str | None = None,
    save_peft_format: bool = True,
    tags: Sequence[str] | None = None,
    temporary_location: str | os.PathLike[str] = TEMPORARY_LOCATION,
    maximum_memory_usage: float = 0.75,
    datasets: Sequence[str] | None = None,
) -> None:
    """Merge the active adapters of a model in memory and save one standalone model; the model itself is not changed.

    Args:
        model: a transformers model, or PEFT around one.
        save_directory: the folder, or the Hub repository with `push_to_hub`.
        tokenizer: a tokenizer or processor to save beside the weights; None takes the files of the base.
        save_method: "merged_16bit", "merged_4bit", "merged_8bit", "merged_fp8", "preserve", "gguf", or "lora".
        push_to_hub: upload to the Hub instead of keeping a folder.
        token: of the Hub; True: the stored login; None: the stored login, if there is one.
        is_main_process: False on the other processes of a distributed run: nothing is done.
        state_dict: tensors to save in place of the model's own, by the names of `model.state_dict()`.
        save_function: with `safe_serialization=False`, called with a dict of tensors and a path, once a file.
        max_shard_size: largest weight file, in bytes or as "5GB".
        safe_serialization: False writes pickles instead of safetensors.
        variant: infix in the names of weight files.
        save_peft_format: with "lora", whether keys begin with "base_model.model.".
        tags: for the metadata of README.md.
        temporary_location: folder for what is only needed during the save.
        maximum_memory_usage: share of the free memory that may be used.
        datasets: Hub datasets, for the metadata of README.md.

    Raises:
        LoraweldError: something the user can fix; the output place is as it was.
    """
    check_flag("push_to_hub", push_to_hub)
    check_flag("is_main_process", is_main_process)
    hub = parse_target(save_directory, name="save_directory", token=token) if push_to_hub else None
    options = parse_options(
        None if hub else parse_directory(save_directory),
        tokenizer=tokenizer,
        save_method=save_method,
        token=token,
        state_dict=state_dict,
        save_function=save_function,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        variant=variant,
        save_peft_format=save_peft_format,
        tags=tags,
        temporary_location=temporary_location,
        maximum_memory_usage=maximum_memory_usage,
        datasets=datasets,
    )
    if not is_main_process:
        return
    if hub is not None:
        push_model(model, options, hub)
    else:
        assert options.output is not None
        save_model(model, options, options.output)


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    use_temp_dir: bool | None = None,
    commit_message: str | None = COMMIT_MESSAGE,
    private: bool | None = None,
    token: str | bool | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    create_pr: bool = False,
    safe_serialization: bool = True,
    revision: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
    temporary_location: str | os.PathLike[str] = TEMPORARY_LOCATION,
    maximum_memory_usage: float = 0.75,
    datasets: Sequence[str] | None = None,
) -> None:
    """Merge the active adapters of a model in memory and upload one standalone model, in one commit.

    Args:
        model: a transformers model, or PEFT around one.
        repo_id: "owner/name", or "name" under the token's user; made if it is missing.
        tokenizer: as in `save_pretrained_merged`.
        save_method: as in `save_pretrained_merged`.
        use_temp_dir: False keeps the staged model in a local folder named like the repository.
        commit_message: first line of the commit.
        private: visibility of a new repository; None: the Hub's default.
        token: as in `save_pretrained_merged`; checked before anything is merged.
        max_shard_size: as in `save_pretrained_merged`.
        create_pr: upload as a pull request.
        safe_serialization: as in `save_pretrained_merged`, with torch.save.
        revision: branch to commit to, made if it is missing; "refs/pr/N" adds to a pull request.
        commit_description: the commit's text.
        tags: as in `save_pretrained_merged`; added to those of the repository.
        temporary_location: as in `save_pretrained_merged`; the model is staged there.
        maximum_memory_usage: as in `save_pretrained_merged`.
        datasets: as in `save_pretrained_merged`.

    Raises:
        LoraweldError: something the user can fix; the repository is as it was.
    """
    if use_temp_dir is not None:
        check_flag("use_temp_dir", use_temp_dir)
    hub = parse_target(
        repo_id,
        name="repo_id",
        token=token,
        commit_message=commit_message,
        commit_description=commit_description,
        private=private,
        create_pr=create_pr,
        revision=revision,
    )
    options = parse_options(
        None,
        tokenizer=tokenizer,
        save_method=save_method,
        token=token,
        state_dict=None,
        save_function=torch.save,
        max_shard_size=max_shard_size,
        safe_serialization=safe_serialization,
        variant=None,
        save_peft_format=True,
        tags=tags,
        temporary_location=temporary_location,
        maximum_memory_usage=maximum_memory_usage,
        datasets=datasets,
    )
    push_model(model, options, hub, keep_folder=use_temp_dir is False)


def save_pretrained_gguf(
    model: Any,
    save_directory: str | os.PathLike[str],
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    temporary_location: str | os.PathLike[str] = TEMPORARY_LOCATION,
    maximum_memory_usage: float = 0.75,
) -> None:
    """Merge the active adapters of a model in memory and save it as .gguf files, one for each quantisation.

    Args:
        model: a transformers model, or PEFT around one.
        save_directory: the folder, or the Hub repository with `push_to_hub`.
        tokenizer: as in `save_pretrained_merged`.
        quantization_method: types of GGUF or their other names, one or a list.
        push_to_hub: upload to the Hub instead of keeping a folder.
        token: as in `save_pretrained_merged`.
        temporary_location: as in `save_pretrained_merged`.
        maximum_memory_usage: as in `save_pretrained_merged`.

    Raises:
        LoraweldError: something the user can fix; the output place is as it was.
    """
    check_flag("push_to_hub", push_to_hub)
    if push_to_hub:
        push_to_hub_gguf(
            model,
            os.fspath(save_directory),
            tokenizer,
            quantization_method,
            token=token,
            temporary_location=temporary_location,
            maximum_memory_usage=maximum_memory_usage,
        )
        return
    options = _gguf_options(
        tokenizer, quantization_method, token, temporary_location, maximum_memory_usage, tags=None, datasets=None
    )
    save_model(model, options, parse_directory(save_directory))


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    commit_message: str | None = COMMIT_MESSAGE,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
    temporary_location: str | os.PathLike[str] = TEMPORARY_LOCATION,
    maximum_memory_usage: float = 0.75,
    datasets: Sequence[str] | None = None,
) -> None:
    """Merge the active adapters of a model in memory and upload it as .gguf files, in one commit.

    Args:
        model: a transformers model, or PEFT around one.
        repo_id: as in `push_to_hub_merged`.
        tokenizer: as in `save_pretrained_merged`.
        quantization_method: as in `save_pretrained_gguf`.
        commit_message: as in `push_to_hub_merged`.
        private: as in `push_to_hub_merged`.
        token: as in `push_to_hub_merged`.
        create_pr: as in `push_to_hub_merged`.
        revision: as in `push_to_hub_merged`.
        commit_description: as in `push_to_hub_merged`.
        tags: as in `push_to_hub_merged`.
        temporary_location: as in `push_to_hub_merged`.
        maximum_memory_usage: as in `push_to_hub_merged`.
        datasets: as in `push_to_hub_merged`.

    Raises:
        LoraweldError: something the user can fix; the repository is as it was.
    """
    hub = parse_target(
        repo_id,
        name="repo_id",
        token=token,
        commit_message=commit_message,
        commit_description=commit_description,
        private=private,
        create_pr=create_pr,
        revision=revision,
    )
    options = _gguf_options(
        tokenizer, quantization_method, token, temporary_location, maximum_memory_usage, tags=tags, datasets=datasets
    )
    push_model(model, options, hub)


def _gguf_options(
    tokenizer: Any,
    quantization_method: str | Sequence[str],
    token: str | bool | None,
    temporary_location: str | os.PathLike[str],
    maximum_memory_usage: float,
    *,
    tags: Sequence[str] | None,
    datasets: Sequence[str] | None,
) -> Any:
    if not isinstance(quantization_method, str | list | tuple) or not quantization_method:
        raise RequestError(f"quantization_method is {quantization_method!r}, expected a type of GGUF or a list of them")
    types = parse_quantization(quantization_method)
    options = parse_options(
        None,
        tokenizer=tokenizer,
        save_method="gguf",
        token=token,
        state_dict=None,
        save_function=torch.save,
        max_shard_size=MAX_SHARD_SIZE,
        safe_serialization=True,
        variant=None,
        save_peft_format=True,
        tags=tags,
        temporary_location=temporary_location,
        maximum_memory_usage=maximum_memory_usage,
        datasets=datasets,
    )
    return replace(options, gguf_types=types)
