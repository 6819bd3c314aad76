"""A folder of an object store as the output: any URL that fsspec opens.

    PARENT/NAME/...                      appears when all is there: weights, then the small files, index and record last
    PARENT/.NAME.loraweld/merge          which merge is prepared, and its open uploads
    PARENT/.NAME.loraweld/part-3-of-64   the journal of a part

Weights go up in parts, as they are made, by any process (see `uploads`). A store has no rename: what makes the output
a model, its index and config, comes after its weights.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraweld.checkpoint.url import shown
from loraweld.errors import OutputError
from loraweld.planning.merge_plan import RECORD_NAME
from loraweld.sinks.folder import TAKEN, Complete
from loraweld.sinks.journal import PartJournal, PartRecord, read_part
from loraweld.sinks.uploads import GatheredUploads, MultipartUploads, Uploads, part_number, part_unit

_HEAD_NAME = "merge"
_CHUNK_BYTES = 8 << 20


class Store:
    """Prepares, fills and publishes an output at `url`, for the merge `identity`."""

    def __init__(self, url: str, *, identity: str, overwrite: bool) -> None:
        self._url = shown(url)
        self._identity = identity
        self._overwrite = overwrite
        self.filesystem, self.root = _opened(url)
        parent, _, name = self.root.rpartition("/")
        self._state = f"{parent}/.{name}.loraweld"
        self._uploads: Uploads = (
            MultipartUploads(self.filesystem)
            if hasattr(self.filesystem, "call_s3")
            else GatheredUploads(self.filesystem, self._state)
        )

    def copies(self, source: Path) -> bool:
        """A file of the base is sent in parts like any other."""
        return False

    def starts_from(self, name: str, source: Path) -> bool:
        """There are no clones."""
        return False

    def least_bytes(self, size: int) -> int:
        """The least size of a part."""
        return part_unit(size)

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Open an upload for each weight file; those of an earlier run of the same merge stay open.

        Raises:
            OutputError: the output exists, or the store cannot be written.
        """
        if self.is_prepared():
            return  # even if there are objects: those that it has begun to publish
        if not self._overwrite and self._exists():
            raise OutputError(f"{self._url}: {TAKEN}")
        self.discard()
        uploads: dict[str, tuple[str, int]] = {}
        try:
            for name, size in sizes.items():
                uploads[name] = self._uploads.begin(f"{self.root}/{name}"), size
            self._write(_HEAD_NAME, json.dumps({"merge": self._identity, "uploads": uploads}).encode())
        except BaseException:  # nobody would know of them
            self._abort(uploads)
            raise

    @contextmanager
    def part(self, name: str) -> Iterator[StoreSink]:
        """Yield the sink of a part.

        Raises:
            OutputError: nothing is prepared.
        """
        record = read_part(self._read(name), self._identity)
        journal = PartJournal(self._identity, record, lambda data: self._write(name, data))
        yield StoreSink(self, self._uploads, self._prepared(), journal)

    def records(self) -> dict[str, PartRecord]:
        """Return what the parts have noted, by their names."""
        self.filesystem.invalidate_cache(self._state)
        found = self.filesystem.ls(self._state, detail=False) if self.filesystem.exists(self._state) else []
        names = sorted(name for path in found if (name := str(path).rsplit("/", 1)[-1]).startswith("part-"))
        return {name: read_part(self._read(name), self._identity) for name in names}

    def was_published(self) -> bool:
        """Publishing can be continued until the state is gone, so there is never a rest to clean up."""
        return False

    @contextmanager
    def publisher(self, complete: Complete | None) -> Iterator[StorePublisher]:
        """Yield what completes and publishes what the parts have sent.

        Raises:
            OutputError: nothing is prepared, or bytes are missing.
        """
        assert complete is None, "other programs need a folder"
        yield StorePublisher(self, self._uploads, self._prepared())

    def discard(self) -> None:
        """Remove what was sent and is not published."""
        head = self._head()
        self._abort(head["uploads"] if head else {})
        self.clean_up()

    def clean_up(self) -> None:
        """Remove the notes beside the output."""
        self.filesystem.invalidate_cache(self._state)
        if self.filesystem.exists(self._state):
            self.filesystem.rm(self._state, recursive=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output."""
        self.filesystem.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
        self.filesystem.pipe_file(f"{self.root}/{name}", data)

    def remove_others(self, names: Container[str]) -> None:
        """Remove what an output that is replaced had besides `names`."""
        self.filesystem.invalidate_cache(self.root)
        for path in self.filesystem.find(self.root):
            if str(path)[len(self.root) + 1 :] not in names:
                self.filesystem.rm_file(path)

    def size_of(self, name: str) -> int | None:
        """Return the bytes of an object of the output, None if there is none."""
        path = f"{self.root}/{name}"
        self.filesystem.invalidate_cache(path)
        with suppress(FileNotFoundError):
            return int(self.filesystem.info(path)["size"])
        return None

    def is_prepared(self) -> bool:
        """Whether the place is ready for parts of this very merge."""
        head = self._head()
        return head is not None and head["merge"] == self._identity

    def _abort(self, uploads: Mapping[str, tuple[str, int]]) -> None:
        for name, (upload, _) in uploads.items():
            self._uploads.abort(f"{self.root}/{name}", upload)

    def _exists(self) -> bool:
        self.filesystem.invalidate_cache(self.root)
        return bool(self.filesystem.exists(self.root) and self.filesystem.find(self.root))

    def _prepared(self) -> Mapping[str, tuple[str, int]]:
        """The upload and the size of each weight file."""
        head = self._head()
        if head is None or head["merge"] != self._identity:
            raise OutputError(f"{self._url}: is not prepared for this plan; make the plan again with --save")
        return {name: (upload, size) for name, (upload, size) in head["uploads"].items()}

    def _head(self) -> Any:
        data = self._read(_HEAD_NAME)
        return None if data is None else json.loads(data)

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self.filesystem.cat_file(f"{self._state}/{name}"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        self.filesystem.makedirs(self._state, exist_ok=True)
        self.filesystem.pipe_file(f"{self._state}/{name}", data)


class StoreSink:
    """Sends what each thread writes in parts; a stretch is held until there is enough for one."""

    files_at_once: int | None = None

    def __init__(
        self, store: Store, uploads: Uploads, prepared: Mapping[str, tuple[str, int]], journal: PartJournal
    ) -> None:
        self.journal = journal
        self._store = store
        self._uploads = uploads
        self._prepared = prepared
        self._local = threading.local()

    def create(self, name: str, size: int, *, aligned: bool) -> None:
        """The upload is open."""
        assert self._prepared[name][1] == size

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None:
        """Hold bytes, and send what is enough for a part while enough is left for another."""
        chunk = max(_CHUNK_BYTES, part_unit(self._prepared[name][1]))
        held = self._held(offset, 2 * chunk)
        taken = 0
        while taken < count:
            taken += held.take(buffer[taken:count])
            while held.count >= 2 * chunk:
                self._send(name, held, chunk)

    def end_stretch(self, name: str) -> None:
        """Send the rest of a stretch."""
        held: _Held | None = getattr(self._local, "held", None)
        if held is not None and held.count:
            self._send(name, held, held.count)

    def copy(self, name: str, source: Path) -> None:
        """No file is copied whole."""
        raise NotImplementedError

    def make_durable(self, names: Iterable[str]) -> None:
        """What the store has taken is durable."""

    def finish(self, name: str, size: int) -> None:
        """The object appears when all others are complete."""

    def _held(self, offset: int, size: int) -> _Held:
        """Return what this thread holds, in memory of `size` bytes that it keeps: it goes from `offset` on."""
        held: _Held | None = getattr(self._local, "held", None)
        if held is None or (len(held.memory) < size and not held.count):
            held = self._local.held = _Held(size)
        if not held.count:
            held.offset = offset
        assert held.offset + held.count == offset, "a stretch is written from its start to its end"
        return held

    def _send(self, name: str, held: _Held, count: int) -> None:
        upload, size = self._prepared[name]
        path = f"{self._store.root}/{name}"
        self._uploads.put(path, upload, part_number(held.offset, size), bytes(held.memory[:count]))
        held.drop(count)


class StorePublisher:
    """Takes the small files, then lets everything appear: weights first, index and record last."""

    def __init__(self, store: Store, uploads: Uploads, prepared: Mapping[str, tuple[str, int]]) -> None:
        self._store = store
        self._uploads = uploads
        self._prepared = prepared
        self._small: dict[str, bytes] = {}

    def copy(self, name: str, source: Path) -> None:
        """Take a small file."""
        self._small[name] = source.read_bytes()

    def write_text(self, name: str, text: str) -> None:
        """Take a small file."""
        self._small[name] = text.encode()

    def publish(self) -> None:
        """Complete all uploads and write what was taken; what was not complete before stays invisible.

        Raises:
            OutputError: bytes of a weight file are missing.
        """
        left = [name for name in self._prepared if not self._is_complete(name)]
        for name in left:
            self._uploads.complete(f"{self._store.root}/{name}", self._prepared[name][0])
        for name in sorted(self._small, key=_is_last):
            self._store.write(name, self._small[name])
        self._store.remove_others(self._prepared.keys() | self._small.keys())
        self._store.clean_up()

    def _is_complete(self, name: str) -> bool:
        """Whether an earlier run has completed the upload already; if not, all its parts must be there."""
        upload, size = self._prepared[name]
        parts = self._uploads.sizes(f"{self._store.root}/{name}", upload)
        if parts is None and self._store.size_of(name) == size:
            return True
        reached = 0
        for number, count in sorted((parts or {}).items()):
            if number != part_number(reached, size):
                break
            reached += count
        if reached != size:
            path = f"{self._store.root}/{name}"
            raise OutputError(f"{path}: byte {reached} and what follows did not arrive; run its part again")
        return False


def _is_last(name: str) -> tuple[bool, bool]:
    return name == RECORD_NAME, name.endswith(".index.json")


class _Explained:
    """A file system of fsspec whose failures are messages for the user; that something is not there is no failure.

    Raises:
        OutputError: from any of its methods, if the store refuses or cannot be reached.
    """

    def __init__(self, filesystem: Any, url: str) -> None:
        self._filesystem = filesystem
        self._url = url

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._filesystem, name)

        def explained(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            except FileNotFoundError:
                raise
            except Exception as error:  # whatever the client of the store raises
                said = f"{type(error).__name__}: {error}"[:300]
                raise OutputError(f"{self._url}: cannot be written: {said}; the same command continues") from None

        return explained


def _opened(url: str) -> tuple[_Explained, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        OutputError: there is none for such a URL, or its package is missing.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(url, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise OutputError(f"{shown(url)}: {error}") from None
    return _Explained(filesystem, shown(url)), str(root).rstrip("/")


class _Held:
    """The first `count` bytes of `memory`: those from `offset` of a file on."""

    def __init__(self, size: int) -> None:
        self.memory = memoryview(bytearray(size))
        self.offset = 0
        self.count = 0

    def take(self, data: memoryview) -> int:
        """Add what there is room for; return how much that is."""
        taken = min(len(data), len(self.memory) - self.count)
        self.memory[self.count : self.count + taken] = data[:taken]
        self.count += taken
        return taken

    def drop(self, count: int) -> None:
        """Forget the first bytes."""
        self.memory[: self.count - count] = self.memory[count : self.count]
        self.offset, self.count = self.offset + count, self.count - count
