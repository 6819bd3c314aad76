"""Objects that grow part by part, from any process and in any order, and appear when they are complete.

On S3, and what speaks its protocol, these are its multipart uploads. Other stores of fsspec get each part as an object
of its own, beside the output; they are read again and put together at the end.
Source: Amazon S3 API reference, "Multipart upload limits": 10,000 parts, each but the last of 5 MiB or more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

MAX_PARTS = 10_000
MIN_PART_BYTES = 5 << 20


def part_unit(size: int) -> int:
    """Return the least size of a part of an object of `size` bytes: so many bytes begin a part each, if at all."""
    return max(MIN_PART_BYTES, -(-size // (MAX_PARTS - 1)))


def part_number(offset: int, size: int) -> int:
    """Return the number, from 1, of the part that begins at `offset`; parts of `part_unit` or more never share one."""
    return 1 + offset // part_unit(size)


class Uploads(Protocol):
    """What a store does for objects that grow; `upload` is what `begin` has returned."""

    def begin(self, path: str) -> str:
        """Open an upload of the object `path`."""

    def put(self, path: str, upload: str, number: int, data: bytes) -> None:
        """Store a part; once more replaces it."""

    def sizes(self, path: str, upload: str) -> Mapping[int, int] | None:
        """Return the bytes of each part that is there, by number; None if there is no such upload any more."""

    def complete(self, path: str, upload: str) -> None:
        """Make the object appear."""

    def abort(self, path: str, upload: str) -> None:
        """Remove the parts, if there are any."""


class MultipartUploads:
    """S3's own; `filesystem` is one of s3fs."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def begin(self, path: str) -> str:
        return str(self._call("create_multipart_upload", path)["UploadId"])

    def put(self, path: str, upload: str, number: int, data: bytes) -> None:
        self._call("upload_part", path, UploadId=upload, PartNumber=number, Body=data)

    def sizes(self, path: str, upload: str) -> Mapping[int, int] | None:
        try:
            return {int(part["PartNumber"]): int(part["Size"]) for part in self._parts(path, upload)}
        except FileNotFoundError:
            return None

    def complete(self, path: str, upload: str) -> None:
        parts = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in self._parts(path, upload)]
        self._call("complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": parts})
        self._filesystem.invalidate_cache(path)

    def abort(self, path: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", path, UploadId=upload)
        except FileNotFoundError:
            return

    def _parts(self, path: str, upload: str) -> Iterator[Any]:
        """The parts, page by page."""
        after: Mapping[str, int] = {}
        while True:
            page = self._call("list_parts", path, UploadId=upload, **after)
            yield from page.get("Parts", ())
            if not page.get("IsTruncated"):
                return
            after = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _call(self, method: str, path: str, **values: Any) -> Any:
        bucket, key, _ = self._filesystem.split_path(path)
        return self._filesystem.call_s3(method, Bucket=bucket, Key=key, **values)


class GatheredUploads:
    """Parts as objects in `folder`, one for each upload; any file system of fsspec has what this needs."""

    def __init__(self, filesystem: Any, folder: str) -> None:
        self._filesystem = filesystem
        self._folder = folder
        self._numbers = itertools.count()

    def begin(self, path: str) -> str:
        return f"{self._folder}/upload-{next(self._numbers)}"

    def put(self, path: str, upload: str, number: int, data: bytes) -> None:
        self._filesystem.makedirs(upload, exist_ok=True)
        self._filesystem.pipe_file(f"{upload}/{number:05d}", data)

    def sizes(self, path: str, upload: str) -> Mapping[int, int] | None:
        self._filesystem.invalidate_cache(upload)
        if not self._filesystem.exists(upload):
            return None
        found = self._filesystem.ls(upload, detail=True)
        return {int(one["name"].rsplit("/", 1)[-1]): int(one["size"]) for one in found}

    def complete(self, path: str, upload: str) -> None:
        self._filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with self._filesystem.open(path, "wb") as whole:
            for number in sorted(self.sizes(path, upload) or ()):
                whole.write(self._filesystem.cat_file(f"{upload}/{number:05d}"))
        self.abort(path, upload)

    def abort(self, path: str, upload: str) -> None:
        if self._filesystem.exists(upload):
            self._filesystem.rm(upload, recursive=True)
