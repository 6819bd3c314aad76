"""Names that are URLs: what kind of place they name, and a folder of an object store through fsspec.

Whatever fsspec has a file system for that lists folders. Credentials are what the file systems find themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from loraweld.checkpoint.remote import MAX_SMALL_BYTES, Entry, RemoteFolder, insistent
from loraweld.errors import CheckpointError, shortened

HUB_SCHEME = "hf"
_LOCAL_SCHEMES = ("file", "local")
_NO_FOLDERS = ("http", "https", "data")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}
_MOUNTED = "*.safetensors"
MAX_PICKLE_BYTES = 2 << 30
_MAX_FILES = 10_000
_DEPTH = 2  # the folder and those in it
_CONFIGS = ("config.json", "adapter_config.json")
_OLDER = "checkpoint-"  # beside a model: states of its training
# What changes with the content, by the names that file systems have for it, the surest first.
_IDENTITIES = (
    *("ETag", "etag", "e_tag", "md5Hash", "md5", "content_md5", "checksum", "generation"),
    *("mtime", "LastModified", "last_modified", "updated", "modified", "created"),
)
_HUB_NAME = re.compile(r"([^/@]+/[^/@]+)(?:@(.+))?")


def is_url(name: str) -> bool:
    """Whether a name is a URL, rather than a path or a Hub id."""
    return "://" in name


def check_not_url(name: str, who: str, option: str) -> None:
    """A URL is followed only where the user gives it: the file of a stranger could have anything be asked for.

    Raises:
        CheckpointError: it is one.
    """
    if is_url(name):
        raise CheckpointError(
            f"{who}: names the base {shown(name)[:200]}; a URL that a file names is not followed, give it with "
            f"{option} if you trust it"
        )


def scheme_of(url: str) -> str:
    return url.partition("://")[0]


def shown(name: str) -> str:
    """Return a name as messages, reports and records may hold it: without user, password and query of a URL."""
    if not is_url(name):
        return name
    scheme, _, rest = name.partition("://")
    user, query = _secrets(rest)
    return f"{scheme}://{rest.removeprefix(f'{user}@').removesuffix(f'?{query}')}"


def _secrets(rest: str) -> tuple[str, str]:
    """User with password, and query, of what follows the scheme; az's CONTAINER@ACCOUNT is no user."""
    place, _, query = rest.partition("?")
    user = place.rpartition("@")[0]
    return user if ":" in user else "", query


def local_path(url: str) -> str | None:
    """Return the path that a URL of this machine names, None if it names another place."""
    if scheme_of(url) not in _LOCAL_SCHEMES:
        return None
    from fsspec.implementations.local import LocalFileSystem

    return str(LocalFileSystem._strip_protocol(url))


def hub_name(url: str) -> tuple[str, str | None] | None:
    """Return id and revision of a model of the Hub, None if the URL names another place.

    Raises:
        CheckpointError: not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION.
    """
    scheme, _, rest = url.partition("://")
    if scheme != HUB_SCHEME:
        return None
    match = _HUB_NAME.fullmatch(rest.rstrip("/"))
    if match is None:
        raise CheckpointError(f"{shown(url)!r} is not a model of the Hub; expected hf://OWNER/NAME or …@REVISION")
    return match[1], unquote(match[2]) if match[2] else None


def url_folder(url: str, *, what: str, patterns: Sequence[str], pickles: Sequence[str]) -> RemoteFolder:
    """Return a folder that stands for that of a URL: weights are mounted, the small files that fit `patterns` copied.

    Where there are no safetensors the files that fit `pickles` are copied too, up to a bound.

    Raises:
        CheckpointError: it cannot be listed or read, holds no files, too many, or pickles that are too large.
    """
    store = _Store(url, what)
    files = store.list()
    weights = [name for name in files if fnmatch(name, _MOUNTED)]
    small = [
        name
        for name, entry in files.items()
        if entry.size <= MAX_SMALL_BYTES and any(fnmatch(name, pattern) for pattern in patterns)
    ]
    pickled = [] if weights else [name for name in files if any(fnmatch(name, pattern) for pattern in pickles)]
    size = sum(files[name].size for name in pickled)
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{what} {store.label!r} holds {size} bytes of pickles, which are copied whole, up to {MAX_PICKLE_BYTES}; "
            "save it as safetensors, or give a copy of it on this machine"
        )
    chosen = {name: files[name] for name in dict.fromkeys((*weights, *small, *pickled))}
    name = PurePosixPath(store.root).name
    return RemoteFolder(name, store.read, chosen, frozenset(weights), store.look)


class _Store:
    """The folder of a URL; `label` is its name without credentials."""

    def __init__(self, url: str, what: str) -> None:
        self.label = shown(url).rstrip("/")
        self._url = url
        self._what = what
        self._files, root = self._opened()
        self.root = str(root).rstrip("/")

    def list(self) -> Mapping[str, Entry]:
        """Return the files by their names in the folder.

        Raises:
            CheckpointError: it cannot be listed, or holds none or too many.
        """
        try:
            found = self._listed()
        except CheckpointError:
            raise
        except FileNotFoundError:
            raise self._error("is not there; check bucket and path") from None
        except PermissionError as error:
            raise self._error(f"may not be read ({self._said(error)}); check the credentials") from None
        except Exception as error:  # whatever the file system's client raises
            raise self._error(f"cannot be had: {type(error).__name__}: {self._said(error)}") from None
        if not found:
            raise self._error("holds no files; expected the folder of a model or an adapter")
        return found

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of a file, named as in its entry."""
        with self._discreet():
            return bytes(self._files.cat_file(self.root + path.removeprefix(self.label), start=start, end=end))
        raise AssertionError

    def look(self) -> Mapping[str, str]:
        """Return what identifies the content of each file now, by the paths of their entries."""

        def listed() -> dict[str, Entry]:
            with self._discreet():
                return self._listed()
            raise AssertionError

        files = insistent(f"{self.label}: cannot be listed", self.label, listed)
        return {entry.path: entry.identity for entry in files.values()}

    def _opened(self) -> tuple[Any, str]:
        scheme = scheme_of(self._url)
        if "::" in self._url:
            raise self._error("is a chain of file systems; give the URL of the folder itself")
        if scheme in _NO_FOLDERS:
            raise self._error(f"is of {scheme}, which has no folders; give a folder, a Hub id or a URL such as s3://…")
        from fsspec.core import url_to_fs

        try:
            opened: tuple[Any, str] = url_to_fs(self._url, skip_instance_cache=True)
            return opened
        except ImportError as error:
            package = _PACKAGES.get(scheme)
            hint = f"pip install {package}" if package else self._said(error)
            raise self._error(f"needs a package that is not installed: {hint}") from None
        except Exception as error:  # of any file system: no such protocol, no connection, no credentials
            raise self._error(f"cannot be opened: {type(error).__name__}: {self._said(error)}") from None

    def _listed(self) -> dict[str, Entry]:
        self._files.invalidate_cache()
        found: dict[str, Entry] = {}
        for name, info in self._walked(self.root, _DEPTH):
            if len(found) == _MAX_FILES:
                raise self._error(f"holds more than {_MAX_FILES} files; expected the folder of a model or an adapter")
            found[name] = Entry(path=f"{self.label}/{name}", size=_size(info), identity=_identity(info))
        return found

    def _walked(self, folder: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Files in `folder` and in those below, by their names from the root on; a folder's own mark is none."""
        listed = {str(info["name"]).rstrip("/"): info for info in self._files.ls(folder, detail=True)}
        is_model = not listed.keys().isdisjoint(f"{folder}/{name}" for name in _CONFIGS)
        for path, info in listed.items():
            if not path.startswith(f"{folder}/"):
                continue
            last = path.rpartition("/")[2]
            if info["type"] != "directory":
                yield path.removeprefix(f"{self.root}/"), info
            elif depth > 1 and last not in (".", "..") and not (is_model and last.startswith(_OLDER)):
                yield from self._walked(path, depth - 1)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._what} {self.label!r} {problem}")

    def _said(self, error: Exception) -> str:
        """What a library says, without what the URL has of credentials."""
        text = str(error).replace(self._url, self.label)
        user, query = _secrets(self._url.partition("://")[2])
        for secret in (user, user.partition(":")[2], query):
            text = text.replace(secret, "…") if secret else text
        return " ".join(text.split())[:300]

    @contextmanager
    def _discreet(self) -> Iterator[None]:
        """Take what the URL has of credentials out of what a library raises."""
        try:
            yield
        except (CheckpointError, FileNotFoundError):
            raise
        except Exception as error:
            said = self._said(error)
            if any(_secrets(self._url.partition("://")[2])):
                raise (PermissionError if isinstance(error, PermissionError) else OSError)(said) from None
            raise


def _size(info: Mapping[str, Any]) -> int:
    size = info.get("size")
    if not isinstance(size, int):
        raise CheckpointError(f"{shortened(info['name'])}: its size is not told, and nothing can be read by ranges")
    return size


def _identity(info: Mapping[str, Any]) -> str:
    known = next((f"{key} {info[key]}" for key in _IDENTITIES if info.get(key) is not None), "")
    return f"{info.get('size')} {known}"
