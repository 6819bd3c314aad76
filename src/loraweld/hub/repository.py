"""A repository of the Hub as the target of a push: looked at before the merge, made and committed to after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraweld.errors import OutputError, RequestError
from loraweld.hub.client import explained, resolve_token
from loraweld.hub.target import HubTarget

CARD_NAME = "README.md"
_WRITING_ROLES = ("write", "fineGrained", "admin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """`name` in full, whether it `exists`, and the text of its README.md, if it has one."""

    target: HubTarget
    token: str = field(repr=False)
    api: Any = field(repr=False)
    name: str
    exists: bool
    card: str | None

    def make(self) -> None:
        """Create the repository and the branch, where they are missing.

        Raises:
            OutputError: the Hub refuses.
        """
        with explained(f"repository {self.name}", OutputError, token=self.token):
            if not self.exists:
                self.api.create_repo(self.name, private=self.target.private, exist_ok=True)
            branch = self.target.revision
            if branch is not None and not branch.startswith("refs/"):
                self.api.create_branch(self.name, branch=branch, exist_ok=True)

    def state(self) -> tuple[str, Sequence[str]]:
        """Return the commit that the branch is at, and the files it has."""
        info = self.api.repo_info(self.name, revision=self.target.revision)
        return str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]


def look_at_repository(target: HubTarget) -> Repository:
    """Check token, name and visibility; changes nothing.

    Raises:
        RequestError: the token cannot write, the repository has the other visibility, or there is no such pull request.
        OutputError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    token = resolve_token(target.token)
    api = HfApi(token=token)
    user = _user(api, token)
    name = target.repo_id if "/" in target.repo_id else f"{user}/{target.repo_id}"
    exists = _check(api, name, target, token)
    card = _existing_card(api, name, target, token) if exists else None
    return Repository(target=target, token=token, api=api, name=name, exists=exists, card=card)


def _user(api: Any, token: str) -> str:
    with explained("token: the Hub does not take it", RequestError, token=token):
        found = api.whoami()
    access = (found.get("auth") or {}).get("accessToken") or {}
    role = access.get("role")
    if role is not None and role not in _WRITING_ROLES:
        raise RequestError(f"token: it may only {role}; an upload needs one with write permission")
    return str(found["name"])


def _check(api: Any, name: str, target: HubTarget, token: str) -> bool:
    """Return whether the repository exists.

    Raises:
        RequestError: it has another visibility than asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with explained(f"repository {name}", OutputError, token=token):
        try:
            info = api.repo_info(name)
        except RepositoryNotFoundError:
            if target.revision is not None and target.revision.startswith("refs/pr/"):
                raise RequestError(f"revision is {target.revision!r}, but {name} does not exist") from None
            return False
    if target.private is not None and bool(info.private) is not target.private:
        found = "private" if info.private else "public"
        raise RequestError(f"private is {target.private}, but {name} exists and is {found}; change it on the Hub first")
    return True


def _existing_card(api: Any, name: str, target: HubTarget, token: str) -> str | None:
    """Return the text of the repository's README.md, None if it has none."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    with explained(f"README.md of {name}", OutputError, token=token):
        for revision in dict.fromkeys((target.revision, None)):
            try:
                return Path(api.hf_hub_download(name, CARD_NAME, revision=revision)).read_text(encoding="utf-8")
            except RevisionNotFoundError:
                continue  # a branch that will be made from the default one
            except EntryNotFoundError:
                return None
    return None
