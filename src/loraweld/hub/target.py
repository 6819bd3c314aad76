"""Where on the Hub a model is to go: the options of a push, checked before anything is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraweld.errors import RequestError

COMMIT_MESSAGE = "Upload model merged with loraweld"
_REPO_ID = re.compile(r"([\w][\w.-]*/)?[\w][\w.-]*", re.ASCII)
_BRANCH = re.compile(r"[\w][\w./-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTarget:
    """A repository, the branch in it, and what the commit and the model card say.

    `repo_id` is "owner/name", or "name" under the token's user; `private` None: the Hub's default for a new one.
    """

    repo_id: str
    token: str | bool | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str = COMMIT_MESSAGE
    commit_description: str | None = None
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.rpartition("/")[2]


def parse_target(
    repo_id: object,
    *,
    name: str = "push_to_hub",
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> HubTarget:
    """Check the options of a push; `name` is what the caller's parameter for the repository is called.

    Raises:
        RequestError: names the parameter, its value and what would be valid.
    """
    text = os.fspath(repo_id) if isinstance(repo_id, str | os.PathLike) else ""
    if not _REPO_ID.fullmatch(text) or ".." in text or "--" in text or text.endswith((".git", ".", "-")):
        raise RequestError(f"{name} is {repo_id!r}, expected a Hub repository: 'name' or 'owner/name'")
    if token is False:
        raise RequestError("token is False, and nothing is uploaded without one; give a token, True or None")
    if private is not None:
        check_flag("private", private)
    check_flag("create_pr", create_pr)
    for option, said in (("commit_message", commit_message), ("commit_description", commit_description)):
        if said is not None and not isinstance(said, str):
            raise RequestError(f"{option} is {said!r}, expected a text")
    _check_revision(revision)
    if create_pr and revision is not None:
        raise RequestError(
            f"create_pr is True and revision {revision!r}: a pull request is opened on the default branch"
        )
    return HubTarget(
        repo_id=text,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or COMMIT_MESSAGE,
        commit_description=commit_description,
        tags=tuple(tags),
        datasets=tuple(datasets),
    )


def _check_revision(revision: object) -> None:
    if revision is None:
        return
    is_branch = isinstance(revision, str) and _BRANCH.fullmatch(revision) and ".." not in revision
    is_other = str(revision).startswith("refs/") and not re.fullmatch(r"refs/pr/[1-9]\d*", str(revision))
    if not is_branch or is_other:
        raise RequestError(f"revision is {revision!r}, expected the name of a branch or refs/pr/N")


def check_flag(option: str, value: object) -> None:
    """Raises:
    RequestError: the value is not True or False.
    """
    if not isinstance(value, bool):
        raise RequestError(f"{option} is {value!r}, expected True or False")
