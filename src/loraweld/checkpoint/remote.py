"""A base that stays where it is: its small files in a temporary folder, its weights read by ranges as they are needed.

Weights are mounted beside the small files (see `mounted`), so that nothing after this knows the difference.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from loraweld.checkpoint.mounted import mount_for
from loraweld.errors import CheckpointError
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
_MAX_SMALL_BYTES = 100 << 20
# (path, start, end) → those bytes, from any thread.
ReadRange = Callable[[str, int, int], bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a remote folder: its path there, its size, and what changes with its content."""

    path: str
    size: int
    identity: str


class RemoteFolder:
    """A temporary folder that stands for a remote one; it lives as long as this object.

    `files` by their names in the folder; those in `weights` are mounted, the others copied by `read`.
    """

    def __init__(self, read: ReadRange, files: Mapping[str, Entry], weights: Container[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loraweld-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        cache = _Pieces()
        for name, entry in files.items():
            path = self.folder / PurePosixPath(name)
            if name in weights:
                mount_for(self, path, RemoteFile(read, entry, cache))
            elif entry.size <= _MAX_SMALL_BYTES:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_fetch(read, entry, 0, entry.size))


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
    chosen = {path: one for path, one in files.items() if path in weights or not path.endswith(_STREAMED)}
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

    return RemoteFolder(read, chosen, weights), commit


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
        self.identity = entry.identity

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
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            data = read(entry.path, start, end) if end > start else b""
        except CheckpointError:
            raise
        except PermissionError as error:
            raise CheckpointError(f"{entry.path}: may not be read: {error}") from None
        except FileNotFoundError:
            raise CheckpointError(f"{entry.path}: is not there any more; did it change?") from None
        except Exception as error:  # whatever the file system's client raises: its connections may recover
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if len(data) == end - start:
            return data
        problem = f"{len(data)} of {end - start} bytes came"
    raise CheckpointError(f"{entry.path}: cannot be read at byte {start}: {problem}; the same command continues")
