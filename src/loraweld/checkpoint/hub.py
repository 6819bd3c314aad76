"""A base or an adapter by path, Hub id or URL → a folder on this machine, or one that stands for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraweld.checkpoint.base import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_NAME, SINGLE_NAME
from loraweld.checkpoint.jsonfile import read_json_object
from loraweld.checkpoint.remote import hub_folder
from loraweld.checkpoint.url import hub_name, is_url, local_path, shown, url_folder
from loraweld.errors import CheckpointError
from loraweld.hub.client import explained

# What a base needs: weights in safetensors and the small files beside them; pickles only where there are no others.
_SMALL = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.spm",
    "*.md",
    "LICENSE*",
]
_PATTERNS = ["*.safetensors", *_SMALL]
_OF_ADAPTERS = ["adapter_*", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*/adapter_*"]
_PICKLES = [PICKLE_NAME, "pytorch_model-*.bin"]
_PICKLED_ADAPTERS = ["adapter_model.bin", "*/adapter_model.bin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A model's folder, what the user called it, and the Hub's commit if it is a snapshot.

    `scratch` keeps the folder alive, if it is one for the time being.
    """

    folder: Path
    label: str
    commit: str | None = None
    scratch: object = None


def locate_base(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Located:
    """Return the folder of `name`: itself if it is one, one that stands for that of a URL, else the Hub's snapshot.

    Raises:
        CheckpointError: neither a folder, nor a URL of one, nor a model the Hub (or, offline, the cache) has.
    """
    if is_url(name):
        return _by_url(name, "base", here=locate_base, on_hub=partial(_streamed, token=token))
    path = Path(name).expanduser()
    if path.is_dir():
        return Located(folder=path, label=name)
    _check_name(name, path, "base")
    return _snapshot(name, revision, token)


def stream_base(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Located:
    """Return a folder whose weights are read from the Hub as they are needed; nothing of them is stored.

    So are those of any URL.

    Raises:
        CheckpointError: no model of the Hub, or one that holds pickles only.
    """
    if is_url(name):
        return locate_base(name, token=token)
    path = Path(name).expanduser()
    if path.exists():
        raise CheckpointError(f"base {name!r} is on this machine; --stream-base is for one on the Hub")
    _check_name(name, path, "base")
    return _streamed(name, revision, token=token)


def locate_adapter(name: str, *, token: str | bool | None = None) -> Located:
    """Return the folder of an adapter: itself if it is there, one that stands for a URL's, else the Hub's snapshot.

    Raises:
        CheckpointError: no such folder at that URL, or the Hub (or, offline, the cache) has no such repository.
    """
    snapshot = partial(_snapshot_of, what="adapter", patterns=_OF_ADAPTERS, token=token)
    if is_url(name):
        return _by_url(name, "adapter", here=locate_adapter, on_hub=snapshot)
    path = Path(name)
    name = path.as_posix()
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Located(folder=path, label=path.name or str(path))
    return snapshot(name, None)


def locate_tokenizer(name: str, *, token: str | bool | None = None) -> Located:
    """Return the folder of a tokenizer: `name` itself, or one that stands for that of a URL.

    Raises:
        CheckpointError: there is no such folder at that URL.
    """
    if not is_url(name):
        return Located(folder=Path(name), label=name)
    snapshot = partial(_snapshot_of, what="tokenizer", patterns=_SMALL, token=token)
    return _by_url(name, "tokenizer", here=locate_tokenizer, on_hub=snapshot)


def _by_url(
    url: str, what: str, *, here: Callable[[str], Located], on_hub: Callable[[str, str | None], Located]
) -> Located:
    path, of_hub = local_path(url), hub_name(url)
    if path is not None:
        return here(path)
    if of_hub is not None:
        return on_hub(*of_hub)
    folder = url_folder(url, what=what, patterns=_SMALL, pickles=[*_PICKLES, *_PICKLED_ADAPTERS])
    return Located(folder=folder.folder, label=shown(url), scratch=folder)


def _streamed(repo_id: str, revision: str | None, *, token: str | bool | None) -> Located:
    with _explained(repo_id, revision, token=token):
        folder, commit = hub_folder(repo_id, revision, token, patterns=_PATTERNS)
    return Located(folder=folder.folder, label=repo_id, commit=commit, scratch=folder)


def _snapshot_of(
    repo_id: str, revision: str | None, *, what: str, patterns: list[str], token: str | bool | None
) -> Located:
    from huggingface_hub import snapshot_download

    with _explained(repo_id, revision, what=what, option="its path", token=token):
        found = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns)
    return Located(folder=Path(found), label=repo_id, commit=Path(found).name)


def _check_name(name: str, path: Path, what: str) -> None:
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{what} {name!r} is not a folder; give a model folder or a Hub id with --base")


def locate_config(name: str, *, revision: str | None = None) -> Located:
    """Return a folder with the config.json of `name`: itself if it is one, else the Hub's, without the weights.

    Raises:
        CheckpointError: neither a folder, nor a URL of one, nor a model the Hub (or, offline, the cache) has.
    """
    if is_url(name):
        return locate_base(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return Located(folder=path, label=name)
    with _explained(name, revision, option="--merge-base quantized-from:FOLDER"):
        return Located(folder=Path(_config(name, revision)).parent, label=name)


def small_files(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path | None:
    """Return a folder with the files that lie beside the weights of `name`: itself, else the Hub's, else the cache's.

    None if there is none to be had: no such model, no access, no network.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # HTTPError is of httpx or requests, as it may be.
    away: tuple[type[Exception], ...] = (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_SMALL))
    except HFValidationError:
        return None
    except away:
        return _cached_folder(name, revision)


def _cached_folder(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def known_config(name: str, *, revision: str | None = None) -> Path | None:
    """Return the config.json of `name` if it is on this machine already, without asking the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path / "config.json" if (path / "config.json").is_file() else None
    from huggingface_hub.errors import HFValidationError

    try:
        folder = _cached_folder(name, revision)
    except HFValidationError:
        return None
    return folder / "config.json" if folder is not None else None


def _snapshot(repo_id: str, revision: str | None, token: str | bool | None) -> Located:
    with _explained(repo_id, revision, token=token):
        folder = Path(_cached_or_downloaded(repo_id, revision, token))
    return Located(folder=folder, label=repo_id, commit=folder.name)


@contextmanager
def _explained(
    repo_id: str,
    revision: str | None,
    *,
    what: str = "base",
    option: str = "--base",
    token: str | bool | None = None,
) -> Iterator[None]:
    """Turn what the Hub's client raises into one message for the user."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    at = f" at revision {revision!r}" if revision else ""
    with explained(f"{what} {repo_id!r}{at} cannot be had", CheckpointError, token=token):
        try:
            yield
        except HFValidationError:
            raise CheckpointError(
                f"{what} {repo_id!r} is neither a folder nor a valid Hub id; give its folder with {option}"
            ) from None
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"{what} {repo_id!r}{at} is not in the local Hub cache and the Hub cannot be reached; "
                f"give its folder with {option}, or go online (HF_HUB_OFFLINE unset)"
            ) from None


def _config(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repo_id, "config.json", revision=revision))


def _cached_or_downloaded(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    """Prefer a complete snapshot in the cache: no network, and the same bytes as the last time."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=True)
        if _is_complete(Path(found)):
            return str(found)
    except LocalEntryNotFoundError:
        pass
    found = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_PATTERNS)
    if not _holds(Path(found), SINGLE_NAME, INDEX_NAME):
        found = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_PICKLES)
    return str(found)


def _is_complete(folder: Path) -> bool:
    """Whether a download was not interrupted: there are weights, and all files that their index names."""
    index = INDEX_NAME if _holds(folder, "*.safetensors", INDEX_NAME) else PICKLE_INDEX_NAME
    if not _holds(folder, index) or _holds(folder, SINGLE_NAME, PICKLE_NAME):
        return _holds(folder, "*.safetensors", *_PICKLES)
    weight_map = read_json_object(folder / index).get("weight_map")
    named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return all((folder / name).exists() for name in named)


def _holds(folder: Path, *patterns: str) -> bool:
    return any(path for pattern in patterns for path in folder.glob(pattern))
