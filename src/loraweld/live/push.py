"""A model in memory → a repository of the Hub, in one commit; what can be refused is refused before the merge."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.errors import LoraweldError, OutputError, RequestError
from loraweld.live.machine import workspace
from loraweld.live.parameters import HubOptions, SaveOptions
from loraweld.live.save import CARD_NAME, save_model

_STALE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
)
_log = logging.getLogger("loraweld")
_WRITING_ROLES = ("write", "fineGrained", "admin")


def push_model(model: Any, options: SaveOptions, hub: HubOptions) -> None:
    """Save the model to a staging folder and upload it; the repository is as it was if anything fails.

    Raises:
        RequestError: the token cannot write, or the repository has the other visibility.
        OutputError: the Hub refuses or cannot be reached.
        LoraweldError: the model cannot be saved.
    """
    from huggingface_hub import HfApi

    token = _token(options.token)
    api = HfApi(token=token)
    repo_id = _full_name(hub.repo_id, _user(api))
    exists = _check_repository(api, repo_id, hub)
    card = _existing_card(api, repo_id, hub) if exists else None
    name = repo_id.rpartition("/")[2]
    with workspace(options.temporary_location) as work:
        folder = Path(name) if hub.keep_folder else work / name
        save_model(model, replace(options, token=token), folder, card=card or "")
        _upload(api, repo_id, folder, hub, options, exists)
        if not hub.keep_folder:
            shutil.rmtree(folder, ignore_errors=True)


def _token(token: str | bool | None) -> str:
    if isinstance(token, str):
        return token
    from huggingface_hub import get_token

    stored = get_token()
    if stored is None:
        raise RequestError(f"token is {token!r}, and there is no stored login; give a token, or run hf auth login")
    return stored


@contextmanager
def _explained(what: str, kind: type[LoraweldError] = OutputError) -> Iterator[None]:
    """Turn what the Hub's client raises into one message for the user; never with the token in it."""
    from huggingface_hub import errors

    # HTTPError is of httpx or requests, as it may be.
    of_client: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, OSError)

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise kind(f"{what}: the Hub's client is offline (HF_HUB_OFFLINE)") from None
    except errors.HfHubHTTPError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{what}: {' '.join(line for line in lines if line.strip())[:400]}") from None
    except of_client as error:
        raise kind(f"{what}: {type(error).__name__}: {str(error)[:200]}") from None


def _user(api: Any) -> str:
    with _explained("token: the Hub does not take it", RequestError):
        found = api.whoami()
    access = (found.get("auth") or {}).get("accessToken") or {}
    role = access.get("role")
    if role is not None and role not in _WRITING_ROLES:
        raise RequestError(f"token: it may only {role}; an upload needs one with write permission")
    return str(found["name"])


def _full_name(repo_id: str, user: str) -> str:
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def _check_repository(api: Any, repo_id: str, hub: HubOptions) -> bool:
    """Return whether the repository exists.

    Raises:
        RequestError: it has another visibility than asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(f"repository {repo_id}"):
        try:
            info = api.repo_info(repo_id)
        except RepositoryNotFoundError:
            if hub.revision is not None and hub.revision.startswith("refs/pr/"):
                raise RequestError(f"revision is {hub.revision!r}, but {repo_id} does not exist") from None
            return False
    if hub.private is not None and bool(info.private) is not hub.private:
        found = "private" if info.private else "public"
        raise RequestError(f"private is {hub.private}, but {repo_id} exists and is {found}; change it on the Hub first")
    return True


def _existing_card(api: Any, repo_id: str, hub: HubOptions) -> str | None:
    """Return the text of the repository's README.md, None if it has none."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    with _explained(f"README.md of {repo_id}"):
        for revision in dict.fromkeys((hub.revision, None)):
            try:
                return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_text(encoding="utf-8")
            except RevisionNotFoundError:
                continue  # a branch that will be made from the default one
            except EntryNotFoundError:
                return None
    return None


def _upload(api: Any, repo_id: str, folder: Path, hub: HubOptions, options: SaveOptions, exists: bool) -> None:
    """One commit, whatever the number of files: `upload_folder` makes several of a large model."""
    with _explained(f"upload to {repo_id} failed"):
        if not exists:
            api.create_repo(repo_id, private=hub.private, exist_ok=True)
        if hub.revision is not None and not hub.revision.startswith("refs/"):
            api.create_branch(repo_id, branch=hub.revision, exist_ok=True)
        done = api.create_commit(
            repo_id=repo_id,
            operations=_operations(api, repo_id, folder, hub, options),
            commit_message=hub.commit_message,
            commit_description=hub.commit_description,
            create_pr=hub.create_pr,
            revision=hub.revision,
        )
    if hub.create_pr:
        _log.warning("pull request: %s", done.pr_url)


def _operations(api: Any, repo_id: str, folder: Path, hub: HubOptions, options: SaveOptions) -> list[Any]:
    """Add the files of the folder; weights of an earlier model that would be mixed with them go in the same commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    if options.method in ("lora", "gguf") or options.variant is not None:
        return added
    there = [sibling.rfilename for sibling in api.repo_info(repo_id, revision=hub.revision).siblings or ()]
    stale = [name for name in there if _STALE.fullmatch(name) and name not in files]
    return [*added, *(CommitOperationDelete(path_in_repo=name) for name in stale)]
