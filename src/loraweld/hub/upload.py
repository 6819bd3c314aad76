"""Files → one commit: large ones are sent as they become ready, and what was sent is remembered for the next run.

A large file is an object of the Hub before it is part of a commit. Sending it early shows nothing to anybody; the
commit names all of them at once, so that a reader sees the whole model or none of it.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraweld.errors import OutputError
from loraweld.hub.client import explained
from loraweld.hub.repository import Repository

_STALE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
)
_LAST = re.compile(r".*\.index(\.[\w-]+)?\.json")
_TRIES = 4
_CONFLICTS = (409, 412)
_FETCHED = "fetched"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """An object that the Hub has: of a file that was sent, or (`copied`) of one of the base's repository."""

    name: str
    sha256: str
    size: int
    copied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HubBase:
    """The base's repository and commit, whose unchanged files the Hub can copy by itself."""

    name: str
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did: bytes sent by this run, by earlier ones, and copied on the server."""

    url: str
    commit: str
    sent_bytes: int
    resumed_bytes: int
    copied_bytes: int


class Upload:
    """Sends files to one repository and commits them together; used by several threads.

    `memory` is a file of what was sent, for a run that continues this one.
    """

    def __init__(self, repository: Repository, *, base: HubBase | None = None, memory: Path | None = None) -> None:
        self._repository = repository
        self._base = base
        self._base_files: Mapping[str, Any] | None = None
        self._memory = memory
        self._lock = threading.Lock()
        self.sent = {one.name: one for one in _remembered(memory)}
        self._resumed = sum(one.size for one in self.sent.values() if not one.copied)
        self._sent_bytes = 0

    def send(self, name: str, path: Path) -> bool:
        """Send a file as it is now; returns when the Hub has it. False: it is small, and goes with the commit.

        Raises:
            OutputError: the Hub refuses or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd

        target = self._repository.target
        with self._explained():
            operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
            size = path.stat().st_size
            self._repository.api.preupload_lfs_files(
                self._repository.name, [operation], revision=target.revision, create_pr=target.create_pr or None
            )
            if not operation._is_uploaded:
                return False
            self._note(Sent(name=name, sha256=operation.upload_info.sha256.hex(), size=size))
        with self._lock:
            self._sent_bytes += size
        return True

    def copy(self, name: str, source: str, local: Path | None) -> bool:
        """Let the Hub copy file `source` of the base's repository; False if that cannot be.

        `local` is the file on this machine that stands for it: it has to be the very one that the repository has.
        """
        if name != source or not self.can_copy(source, local):
            return False
        found = self._of_base(source)
        self._note(Sent(name=name, sha256=found.lfs.sha256, size=found.size, copied=True))
        return True

    def can_copy(self, source: str, local: Path | None) -> bool:
        """Whether the base's repository has this very file, as an object that the Hub copies."""
        found = self._of_base(source)
        return found is not None and found.lfs is not None and bool(found.xet_hash) and _is_that(local, found.lfs)

    def commit(self, folder: Path, *, replaces_weights: bool) -> Pushed:
        """Commit what was sent and the files in `folder`, the index last; weights of an earlier model go.

        Raises:
            OutputError: the Hub refuses; what was sent is still remembered.
        """
        from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError

        for left in reversed(range(_TRIES)):
            with self._explained():
                try:
                    return self._commit(folder, replaces_weights)
                except FileDuplicationError:  # it copies within a storage region only
                    self._send_instead_of_copying(folder)
                except HfHubHTTPError as error:
                    if not left or error.response.status_code not in _CONFLICTS:
                        raise
        raise AssertionError

    def copies(self) -> list[Sent]:
        """What the Hub is to copy from the base's repository."""
        return [one for one in self.sent.values() if one.copied]

    def _send_instead_of_copying(self, folder: Path) -> None:
        """Bring the files that the Hub would have copied to this machine, one by one, and send them."""
        assert self._base is not None
        for one in self.copies():
            self._repository.api.hf_hub_download(
                self._base.name, one.name, revision=self._base.commit, local_dir=folder.parent / _FETCHED
            )
            path = folder.parent / _FETCHED / one.name
            if self.send(one.name, path):
                path.unlink()

    def _commit(self, folder: Path, replaces_weights: bool) -> Pushed:
        target, api = self._repository.target, self._repository.api
        head, there = self._repository.state()
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        named = files.keys() | self.sent.keys()
        stale = [name for name in there if _STALE.fullmatch(name) and name not in named] if replaces_weights else []
        done = api.create_commit(
            repo_id=self._repository.name,
            operations=list(self._operations(files, stale)),
            commit_message=target.commit_message,
            commit_description=target.commit_description,
            create_pr=target.create_pr,
            revision=target.revision,
            parent_commit=None if target.create_pr else head,
        )
        return Pushed(
            url=str(done.pr_url or done.commit_url),
            commit=str(done.oid),
            sent_bytes=self._sent_bytes + sum(path.stat().st_size for path in files.values()),
            resumed_bytes=self._resumed,
            copied_bytes=sum(one.size for one in self.copies()),
        )

    def _operations(self, files: Mapping[str, Path], stale: Iterable[str]) -> Iterator[Any]:
        """Stale files first, then weights, what lies beside them, and the index."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        yield from (CommitOperationDelete(path_in_repo=name) for name in stale)
        yield from (_sent_operation(one) for one in self.sent.values() if not one.copied)
        yield from self._copy_operations()
        last = [name for name in files if _LAST.fullmatch(name)]
        for name in (*(name for name in files if name not in last), *last):
            yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name])

    def _copy_operations(self) -> list[Any]:
        from huggingface_hub import CommitOperationCopy

        if self._base is None:
            return []
        return [
            CommitOperationCopy(
                src_path_in_repo=one.name,
                path_in_repo=one.name,
                src_revision=self._base.commit,
                src_repo_id=self._base.name,
                src_repo_type="model",
            )
            for one in self.copies()
        ]

    def _of_base(self, name: str) -> Any:
        """What the Hub says of a file of the base's repository, None if there is none."""
        if self._base is None:
            return None
        with self._lock:
            if self._base_files is None:
                with self._explained():
                    tree = self._repository.api.list_repo_tree(self._base.name, revision=self._base.commit)
                    self._base_files = {one.path: one for one in tree if hasattr(one, "blob_id")}
            return self._base_files.get(name)

    def _note(self, one: Sent) -> None:
        with self._lock:
            self.sent[one.name] = one
            self._write_memory()

    def _write_memory(self) -> None:
        if self._memory is None:
            return
        new = self._memory.with_suffix(".new")
        with new.open("w") as file:
            json.dump([asdict(one) for one in self.sent.values()], file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._memory)

    def _explained(self) -> Any:
        return explained(f"upload to {self._repository.name} failed", OutputError, token=self._repository.token)


def _remembered(memory: Path | None) -> list[Sent]:
    if memory is None or not memory.is_file():
        return []
    try:
        return [Sent(**one) for one in json.loads(memory.read_text())]
    except (ValueError, TypeError):
        return []


def _sent_operation(one: Sent) -> Any:
    """An addition as `preupload_lfs_files` leaves it: the Hub has the content already."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(path_in_repo=one.name, path_or_fileobj=b"")
    operation.upload_info = UploadInfo(sha256=bytes.fromhex(one.sha256), size=one.size, sample=b"")
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True
    return operation


def _is_that(local: Path | None, lfs: Any) -> bool:
    """Whether a file of the Hub's cache is the object: there a file has the name of its contents."""
    return local is None or (local.is_symlink() and local.resolve().name == lfs.sha256)
