"""A model in memory → a folder: the base as it is in memory, and the adapters that act in it, by the same engine."""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from loraweld.adapter.files import open_adapter
from loraweld.checkpoint.base import CONFIG_NAME, Base
from loraweld.checkpoint.encodings.recognise import quantization_settings, recognise
from loraweld.checkpoint.hub import known_config, small_files
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.stored import MemoryFile
from loraweld.delivery import deliver
from loraweld.errors import OutputError, RequestError, listing
from loraweld.export.pipeline import completion
from loraweld.free_memory import free_memory_bytes
from loraweld.hub.card import CardFacts
from loraweld.hub.repository import Repository
from loraweld.hub.upload import Pushed
from loraweld.live.adapters import LiveAdapters, as_in_memory, find_adapters, save_adapter
from loraweld.live.layout import as_pickles, with_variant
from loraweld.live.machine import workspace
from loraweld.live.memory import tensors_as_file
from loraweld.live.parameters import SaveOptions
from loraweld.live.quantised import is_decoded, repacked_rows, zeros_from_zero
from loraweld.live.weights import base_of, base_state, checkpoint_tensors, state_of
from loraweld.planning.companions import override_files
from loraweld.planning.facts import Facts, facts_of
from loraweld.planning.merge_plan import RECORD_NAME, MergePlan, SmallFile
from loraweld.preparation import plan_request
from loraweld.request import QUANT_TYPES, MergeRequest, make_request

MAX_MEMORY_BYTES = 512 * 10**6  # more does not make it faster
_log = logging.getLogger("loraweld")
# What an earlier save has left in the output folder; anything else there is not ours to remove.
_OF_MODELS = (
    *("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index*.json", "*.gguf", "Modelfile*"),
    *("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.py", "README.md", "LICENSE*"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """A repository that the model goes to; with `keeps_output` a folder of it stays here."""

    repository: Repository
    keeps_output: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveModel:
    """A model as it is now: `state` is that of the transformers model inside, PEFT's parts included."""

    inner: Any
    state: Mapping[str, torch.Tensor]
    adapters: LiveAdapters
    origin: Path | None

    @property
    def name(self) -> str:
        """What the base was loaded from, "" if it was made here."""
        return str(getattr(self.inner.config, "_name_or_path", "") or "")


def look_at(model: Any, options: SaveOptions, *, has_card: bool) -> LiveModel:
    """Find out what there is to save; changes nothing.

    Where files of the base are wanted, a tokenizer or (`has_card`) its licence, the Hub is asked for them, as they were
    in the commit that the model was loaded from.

    Raises:
        RequestError: not a model that can be saved, or a `state_dict` that is not one of it.
    """
    inner = base_of(model)
    given = options.state_dict
    state = _given_state(model, inner, given) if given is not None else state_of(inner)
    origin = _origin(inner.config, options, ask=options.tokenizer is None or has_card)
    return LiveModel(inner=inner, state=state, adapters=find_adapters(inner), origin=origin)


def _origin(config: Any, options: SaveOptions, *, ask: bool) -> Path | None:
    name, commit = str(getattr(config, "_name_or_path", "") or ""), getattr(config, "_commit_hash", None)
    if not name:
        return None
    if ask:
        return small_files(name, revision=commit, token=options.token)
    found = known_config(name, revision=commit)
    return found.parent if found is not None else None


def save_model(model: Any, options: SaveOptions, output: Path, *, push: Push | None = None) -> Pushed | None:
    """Write what `options` ask for to the folder `output`, or `push` it; return what was pushed.

    Raises:
        LoraweldError: something the user can fix; the folder, or the repository, is as it was.
    """
    live = look_at(model, options, has_card=_has_card(options, push))
    if live.origin is not None and output.exists() and output.samefile(live.origin):
        raise OutputError("is the folder that the model was loaded from; choose another", path=output)
    with workspace(options.temporary_location) as work:
        _save_tokenizer(live, options, work)
        save = _save_lora if options.method == "lora" else _save_merged
        return save(live, options, output, work, push)


def _save_merged(live: LiveModel, options: SaveOptions, output: Path, work: Path, push: Push | None) -> Pushed | None:
    started = time.monotonic()
    _write_configs(live, work / "base")
    if live.adapters.merged or live.adapters.disabled:
        _say_adapters(live.adapters)
    state = base_state(live.inner, live.state, trained_copies=bool(live.adapters.merged))
    memory = int(options.maximum_memory_usage * free_memory_bytes())
    tensors = checkpoint_tensors(
        live.inner, state, spilled=work / "spilled", limit_bytes=max(0, memory - MAX_MEMORY_BYTES)
    )
    with tensors_as_file(tensors, repacked=repacked_rows(live.inner)) as file:
        base = _live_base(file, work / "base", live.name)
        folders = [_adapter_folder(live, name, work) for name in live.adapters.active]
        request = _for_push(_request(options, folders, output, base, memory), push)
        facts = facts_of(request, base, tuple(open_adapter(folder) for folder in folders))
        made = with_variant(_planned(request, facts, options), options.variant)
        complete = completion(made, _log.info)
        for note in made.notes:
            _log.info(note)
        if not options.safe_serialization:
            made, complete = as_pickles(made, options.save_function)
        _check_replaceable(output, made)
        report = deliver(
            request,
            made,
            facts,
            progress=lambda count: None,
            complete=complete,
            started=started,
            repository=push.repository if push is not None else None,
            card=_card(live, options, output, push),
        )
        return report.pushed


def _save_lora(live: LiveModel, options: SaveOptions, output: Path, work: Path, push: Push | None) -> Pushed | None:
    """Write one adapter as PEFT does, with the tokenizer beside it."""
    from loraweld.live.lora import adapter_files

    folder = adapter_files(live, options, work / "adapter")
    request = replace(make_request(folder, output=output, save_method="lora", resume=False), overwrite=True)
    request = _for_push(request, push)
    files = [*folder.iterdir(), *(path for path in sorted((work / "base").rglob("*")) if path.is_file())]
    made = MergePlan(
        base=live.name,
        adapters=(live.adapters.active or live.adapters.merged)[:1],
        output=output,
        save_method="lora",
        dtype="auto",
        weights=(),
        small=tuple(SmallFile(name=_name_in(path, folder, work / "base"), source=path) for path in files),
        modules=(),
        notes=(),
        inputs=(),
        scratch=(),
        item_bytes=0,
        buffer_bytes=0,
        workers=1,
        peak_memory_bytes=0,
        free_disk_bytes=shutil.disk_usage(_existing(output)).free,
    )
    _check_replaceable(output, made)
    repository, card = (push.repository if push is not None else None), _card(live, options, output, push)
    return deliver(request, made, None, progress=lambda count: None, repository=repository, card=card).pushed


def _for_push(request: MergeRequest, push: Push | None) -> MergeRequest:
    if push is None:
        return request
    return replace(request, hub=push.repository.target, keeps_output=push.keeps_output)


def _name_in(path: Path, *folders: Path) -> str:
    folder = next(folder for folder in folders if path.is_relative_to(folder))
    return path.relative_to(folder).as_posix()


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _given_state(model: Any, inner: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the user's tensors by the names that they have in `inner`.

    Raises:
        RequestError: entries that the model does not have, lacks, or has in another shape.
    """
    inside = next((path for path, module in model.named_modules() if module is inner), "")
    prefix = f"{inside}." if inside else ""
    own: dict[str, Any] = {prefix + name: value for name, value in state_of(inner).items()}
    unknown = [f"{name}: the model has no such entry" for name in given.keys() - own.keys()]
    missing = [f"{name}: missing" for name in own.keys() - given.keys()]
    wrong = []
    tensors = {name for name, value in own.items() if isinstance(value, torch.Tensor)}
    for name in tensors & given.keys():
        found: object = given[name]
        if not isinstance(found, torch.Tensor):
            wrong.append(f"{name}: a {type(found).__name__}, expected a tensor")
        elif found.shape != own[name].shape:
            wrong.append(f"{name}: of shape {tuple(found.shape)}, expected {tuple(own[name].shape)}")
    problems = [listing(kind, limit=8) for kind in (unknown, missing, wrong) if kind]
    if problems:
        raise RequestError("state_dict is not one of model.state_dict():\n" + "\n".join(problems))
    return {name.removeprefix(prefix): value for name, value in given.items()}


def _save_tokenizer(live: LiveModel, options: SaveOptions, work: Path) -> None:
    """Put what ships beside the weights into the folder of the base: the user's tokenizer, else the base's files."""
    folder = work / "base"
    folder.mkdir()
    if options.tokenizer is not None:
        options.tokenizer.save_pretrained(str(folder))
        return
    files = override_files(live.origin) if live.origin is not None else []
    warnings.warn(
        "tokenizer is None: "
        + (f"the files beside the weights are those of {live.name}" if files else "the output has no tokenizer"),
        stacklevel=4,
    )
    for path in files:
        assert live.origin is not None
        target = folder / path.relative_to(live.origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if options.method == "lora":
        (folder / "generation_config.json").unlink(missing_ok=True)


def _write_configs(live: LiveModel, folder: Path) -> None:
    """Write config.json and generation_config.json as the model has them; the model's own are not touched."""
    inner = live.inner
    config = copy.deepcopy(inner.config)
    _describe_quantisation(inner, config)
    config.architectures = [type(inner).__name__.removeprefix("FSDP")]
    if getattr(config, "quantization_config", None) is None:
        config.dtype = str(_main_dtype(live)).removeprefix("torch.")
    config.to_json_file(folder / CONFIG_NAME, use_diff=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if inner.can_generate():
        inner.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)


def _describe_quantisation(inner: Any, config: Any) -> None:
    """Say in a model's config how its weights are in memory, where that is not as they were loaded."""
    if is_decoded(inner):
        del config.quantization_config
    elif zeros_from_zero(inner):
        settings = config.quantization_config
        settings = dict(settings) if isinstance(settings, Mapping) else settings.to_dict()
        form = {"checkpoint_format": "gptq_v2"} | ({"format": "gptq_v2"} if "format" in settings else {})
        config.quantization_config = {**settings, **form}


def _main_dtype(live: LiveModel) -> torch.dtype:
    """The float type of most of the base's bytes."""
    totals: dict[torch.dtype, int] = {}
    for tensor in base_state(live.inner, live.state, trained_copies=False).values():
        if tensor.is_floating_point():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
    return max(totals, key=lambda dtype: totals[dtype]) if totals else torch.float32


def _say_adapters(adapters: LiveAdapters) -> None:
    if adapters.merged:
        _log.warning("the weights in memory hold the merged adapters %s: written as they are", list(adapters.merged))
    else:
        _log.warning("the adapters are disabled: the base is written without them, as the model computes now")


def _live_base(file: MemoryFile, folder: Path, name: str) -> Base:
    config = read_json_object(folder / CONFIG_NAME)
    stored = {tensor.name: tensor for tensor in file.tensors}
    weights = recognise(stored, config)
    return Base(
        folder=folder,
        label=name or "the model in memory",
        commit=None,
        files=(file,),
        index=None,
        config=config,
        tensors=weights.tensors,
        stored=stored,
        aside=weights.aside,
    )


def _adapter_folder(live: LiveModel, name: str, work: Path) -> Path:
    folder = save_adapter(live.inner, name, work / "adapters" / _folder_name(name), state=live.state)
    as_in_memory(folder)
    return folder


def _folder_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_ " else "_" for letter in name) or "_"


def _request(options: SaveOptions, folders: list[Path], output: Path, base: Base, memory: int) -> MergeRequest:
    """The request that the same merge of files would have."""
    settings = quantization_settings(base.config)
    extra: dict[str, Any] = {}
    if options.method == "merged_4bit" and settings.get("load_in_4bit"):
        if settings.get("bnb_4bit_quant_type") in QUANT_TYPES:
            extra["quant_type"] = settings["bnb_4bit_quant_type"]
        extra["double_quant"] = settings.get("bnb_4bit_use_double_quant") is True
    extra |= options.implied
    if options.method == "gguf" and options.gguf_types:
        extra["gguf_type"] = options.gguf_types
    request = make_request(
        folders or ["none"],
        output=output,
        base=base.label,
        save_method=options.method,
        max_shard_size=options.max_shard_bytes,
        resume=False,
        tokenizer=base.folder,
        overwrite=True,
        **extra,
    )
    return replace(request, adapters=tuple(map(str, folders)), max_memory_bytes=min(memory, MAX_MEMORY_BYTES))


def _planned(request: MergeRequest, facts: Facts, options: SaveOptions) -> MergePlan:
    try:
        made, _ = plan_request(request, facts)
    except RequestError as error:
        if not str(error).startswith("max_memory"):
            raise
        raise RequestError(
            f"maximum_memory_usage is {options.maximum_memory_usage}, of the free memory "
            f"{request.max_memory_bytes} bytes: {str(error).partition(';')[0]}"
        ) from None
    for note in made.notes:
        if note.startswith("the tokenizer has"):
            warnings.warn(note, stacklevel=5)
    return made


def _card(live: LiveModel, options: SaveOptions, output: Path, push: Push | None) -> CardFacts | None:
    """Return what README.md is to say, None if there is nothing to say."""
    if not _has_card(options, push):
        return None
    return CardFacts(
        name=push.repository.name if push is not None else output.name,
        base=live.name or None,
        base_folder=live.origin,
        adapters=(),
        architecture=type(live.inner).__name__,
        method=options.method,
        tags=options.tags,
        datasets=options.datasets,
        existing=push.repository.card if push is not None else None,
    )


def _has_card(options: SaveOptions, push: Push | None) -> bool:
    return bool(options.tags or options.datasets or push is not None)


def _check_replaceable(output: Path, made: MergePlan) -> None:
    """A save may replace an earlier one, never something else.

    Raises:
        OutputError: the folder holds what no save has written.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return
    files = [path for path in output.rglob("*") if not path.is_dir()]
    names = {file.name for file in made.files}
    foreign = [
        path.relative_to(output).as_posix()
        for path in files
        if path.relative_to(output).as_posix() not in names and not any(fnmatch(path.name, p) for p in _OF_MODELS)
    ]
    marks = (RECORD_NAME, "adapter_config.json") if made.save_method == "lora" else (RECORD_NAME,)
    if foreign or not any((output / name).exists() for name in marks):
        what = f", among others\n{listing(foreign, limit=5)}" if foreign else ""
        raise OutputError(f"exists and holds other things than a saved model{what}; choose another folder", path=output)
