"""A folder that stays where it is: its small files in a temporary one, its weights read by ranges as they are needed.

Weights are mounted beside the small files (see `mounted`), so that nothing after this knows the difference.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from loraweld.checkpoint.mounted import mount_for
from loraweld.checkpoint.origins import Look, Origin, stand_for
from loraweld.errors import CheckpointError, shortened
from loraweld.hub.client import explained

# Small reads are served from pieces of this size; those of neighbouring rows lie in the same.
PIECE_BYTES = 2 << 20
# A large read is one request after the other of at most this size: what fails is asked for again.
REQUEST_BYTES = 4 << 20
CACHED_PIECES = 16
CACHE_BYTES = CACHED_PIECES * PIECE_BYTES
_STREAMED = ".safetensors"
_TRIES = 6
_FINAL = (401, 403, 404)  # asking again gives the same answer
_FIRST_WAIT_SECONDS = 0.5
MAX_SMALL_BYTES = 100 << 20
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f\\:]")
_Answer = TypeVar("_Answer")
# (path, start, end) → those bytes, from any thread.
ReadRange = Callable[[str, int, int], bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a remote folder: its size, and what changes with its content.

    `path` names the folder too; it is the same in every process, is shown to the user, and holds no credentials.
    """

    path: str
    size: int
    identity: str


class RemoteFolder:
    """A temporary folder that stands for a remote one; it lives as long as this object.

    It has the last part of the remote one's name. `files` by their names in it; those in `weights` are mounted, the
    others copied by `read`. `look` tells what their content is identified by now, by `Entry.path`.

    Raises:
        CheckpointError: a file cannot be read, or has a name that leads out of the folder.
    """

    def __init__(
        self, name: str, read: ReadRange, files: Mapping[str, Entry], weights: Container[str], look: Look
    ) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="loraweld-"))
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self.folder = scratch / _plain_name(name, name)
        self.folder.mkdir()
        cache = _Pieces()
        for relative, entry in files.items():
            path = self.folder.joinpath(*(_plain_name(part, entry.path) for part in relative.split("/")))
            if relative in weights:
                mount_for(self, path, RemoteFile(read, entry, cache))
            else:
                _copy(read, entry, path)
            stand_for(self, path, Origin(entry.path, entry.identity, look))


def _plain_name(part: str, where: str) -> str:
    """Strangers name the files: none may lead out of the folder."""
    if part in ("", ".", "..") or _NOT_IN_NAMES.search(part):
        raise CheckpointError(f"{where}: {shortened(part)} is no name of a file or folder; rename it")
    return part


def _copy(read: ReadRange, entry: Entry, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for start in range(0, entry.size, MAX_SMALL_BYTES):  # small files as one: not every server cuts them
                file.write(_fetch(read, entry, start, min(start + MAX_SMALL_BYTES, entry.size)))
    except OSError as error:
        raise CheckpointError(f"{entry.path}: cannot be copied to {path.parent}: {error.strerror or error}") from None


def hub_folder(
    name: str, revision: str | None, token: str | bool | None, *, patterns: Sequence[str]
) -> tuple[RemoteFolder, str]:
    """Return a model of the Hub as it is at `revision`, the files that fit `patterns`, and its commit.

    Raises:
        CheckpointError: it has no safetensors.
        Exception: what the Hub's client raises.
    """
    from huggingface_hub import HfApi, HfFileSystem, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token)
    commit = str(api.repo_info(name, revision=revision).sha)
    tree = api.list_repo_tree(name, revision=commit, recursive=True)
    files = {
        one.path: Entry(
            path=f"{name}@{commit}/{one.path}", size=one.size, identity=one.lfs.sha256 if one.lfs else one.blob_id
        )
        for one in tree
        if isinstance(one, RepoFile) and any(fnmatch(one.path, pattern) for pattern in patterns)
    }
    weights = {path for path in files if path.endswith(_STREAMED) and "/" not in path}
    if not weights:
        raise CheckpointError(
            f"base {name!r} has no *{_STREAMED}, and other weights are not streamed; leave out --stream-base"
        )
    chosen = {
        path: one
        for path, one in files.items()
        if path in weights or (not path.endswith(_STREAMED) and one.size <= MAX_SMALL_BYTES)
    }
    identities = {one.path: one.identity for one in chosen.values()}  # those of a commit stay
    filesystem = HfFileSystem(token=token, endpoint=constants.ENDPOINT, skip_instance_cache=True)

    def read(path: str, start: int, end: int) -> bytes:
        try:
            return bytes(filesystem.cat_file(path, start=start, end=end, cache_type="none"))
        except HfHubHTTPError as error:
            if error.response.status_code not in _FINAL:
                raise
            with explained(f"base {name!r} cannot be had", CheckpointError, token=token):
                raise
        raise AssertionError

    return RemoteFolder(name.rpartition("/")[2], read, chosen, weights, lambda: identities), commit


class _Pieces:
    """The last few pieces that were read, of all files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def get(self, key: tuple[str, int]) -> bytes | None:
        with self._lock:
            found = self._pieces.get(key)
            if found is not None:
                self._pieces.move_to_end(key)
            return found

    def put(self, key: tuple[str, int], data: bytes) -> None:
        with self._lock:
            self._pieces[key] = data
            while len(self._pieces) > CACHED_PIECES:
                self._pieces.popitem(last=False)


class RemoteFile:
    """A file read by ranges, from any thread."""

    def __init__(self, read: ReadRange, entry: Entry, cache: _Pieces) -> None:
        self._read = read
        self._entry = entry
        self._cache = cache
        self.size = entry.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            CheckpointError: they cannot be read, or the file ends before.
        """
        if offset + len(buffer) > self.size:
            raise CheckpointError(f"{self._entry.path}: ends at byte {self.size}, expected {offset + len(buffer)}")
        done = 0
        while done < len(buffer):
            left = len(buffer) - done
            data = self._whole(offset + done, left) if left >= PIECE_BYTES else self._part(offset + done, left)
            buffer[done : done + len(data)] = data
            done += len(data)

    def _whole(self, offset: int, count: int) -> bytes:
        return _fetch(self._read, self._entry, offset, offset + min(count, REQUEST_BYTES))

    def _part(self, offset: int, count: int) -> bytes:
        number, start = divmod(offset, PIECE_BYTES)
        key = self._entry.path, number
        piece = self._cache.get(key)
        if piece is None:
            first = number * PIECE_BYTES
            piece = _fetch(self._read, self._entry, first, min(first + PIECE_BYTES, self.size))
            self._cache.put(key, piece)
        return piece[start : start + count]


def _fetch(read: ReadRange, entry: Entry, start: int, end: int) -> bytes:
    """Return bytes [start, end), all of them; asks again, after a wait, where they do not come.

    Raises:
        CheckpointError: the last try has failed too.
    """
    if end <= start:
        return b""

    def whole() -> bytes:
        data = read(entry.path, start, end)
        if len(data) != end - start:
            raise EOFError(f"{len(data)} of {end - start} bytes came")
        return data

    return insistent(f"{entry.path}: cannot be read at byte {start}", entry.path, whole)


def insistent(what: str, path: str, ask: Callable[[], _Answer]) -> _Answer:
    """Return the answer to what is asked of the network; `what` could not be done otherwise, with `path`.

    Raises:
        CheckpointError: asking again gives the same answer, or the last try has failed too.
    """
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return ask()
        except CheckpointError:
            raise
        except PermissionError as error:
            raise CheckpointError(f"{path}: may not be read: {error}") from None
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is not there any more; did it change?") from None
        except Exception as error:  # whatever the file system's client raises: its connections may recover
            problem = f"{type(error).__name__}: {str(error)[:200]}"
    raise CheckpointError(f"{what}: {problem}; the same command continues")
