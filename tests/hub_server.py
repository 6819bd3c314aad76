"""The Hub on this machine: its HTTP protocol as huggingface_hub speaks it, with repositories in memory.

Content lies in blobs; one of more than `LARGE` bytes, or of weights, is an LFS object, found by its sha256. Uploads are
checked against the checksum they were announced with. Connections can be cut and requests be failed on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read"), "hf_fine": ("me", "fineGrained")}
LARGE = 10_000_000
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model")
PIECE = 1 << 20


class Blob(Protocol):
    """Content of known size and checksum."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def read(self, start: int, count: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    """Content in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, start: int, count: int) -> bytes:
        return self.data[start : start + count]


@dataclass(frozen=True)
class Forgotten:
    """Content that was checked as it came and not kept."""

    size: int
    sha256: str

    def read(self, start: int, count: int) -> bytes:
        raise AssertionError("the content was not kept")


class Files(dict[str, Blob]):
    """Files by path; plain bytes become blobs."""

    def __init__(self, files: dict[str, Any] | None = None) -> None:
        super().__init__({name: as_blob(content) for name, content in (files or {}).items()})


def as_blob(content: Any) -> Blob:
    return Bytes(content) if isinstance(content, bytes) else content


@dataclass
class Repository:
    """Branches of files and, by its sha, every state there was."""

    private: bool = False
    gated: bool = False
    branches: dict[str, Any] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, Blob] = field(default_factory=dict)
    history: dict[str, Files] = field(default_factory=dict)
    region: str = "us"

    def __post_init__(self) -> None:
        self.branches = {name: Files(files) for name, files in self.branches.items()}
        for files in self.branches.values():
            self.keep(files)

    def keep(self, files: Files) -> str:
        sha = hashlib.sha1(repr(sorted((name, blob.sha256) for name, blob in files.items())).encode()).hexdigest()
        self.history[sha] = files
        self.objects |= {blob.sha256: blob for name, blob in files.items() if is_lfs(name, blob)}
        return sha

    def at(self, revision: str) -> tuple[str, Files] | None:
        """Return the sha and the files of a branch or a commit."""
        if revision in self.history:
            return revision, self.history[revision]
        files = self.branches.get(revision)
        return None if files is None else (self.keep(files), files)


def is_lfs(name: str, blob: Blob) -> bool:
    return blob.size > LARGE or name.endswith(LFS_SUFFIXES)


@dataclass
class Hub:
    """What a test sees: the repositories, all requests, and what is to go wrong.

    `fails_at`: a part of the paths that get 403. `statuses`: (part of a path, status, how often). `cut`: the share of
    connections that end at a random place. `received`: sha256 and size of each object that came in full, in order.
    """

    url: str = ""
    storage_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens_seen: set[str] = field(default_factory=set)
    fails_at: str = ""
    statuses: list[list[Any]] = field(default_factory=list)
    cut: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    cuts: int = 0
    sent_bytes: int = 0
    received: list[tuple[str, int]] = field(default_factory=list)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    keeps_content: bool = True
    part_bytes: int | None = None
    offers_copies: bool = True
    on_object: Callable[[int], None] = lambda count: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def content(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch as bytes."""
        files = self.repositories[name].branches[branch]
        return {path: blob.read(0, blob.size) for path, blob in files.items()}


class Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # -- answers

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str = "no") -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def stream(self, blob: Blob, name: str) -> None:
        """Send a blob or the range of it that was asked for."""
        start, end, status = 0, blob.size, 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found:
            start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else blob.size, blob.size)
            if start >= blob.size:
                return self.refuse(416, "Range")
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{blob.size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = start + int((end - start) * self.hub.chance.random()) if self.is_cut() else end
        for first in range(start, stop, PIECE):
            data = blob.read(first, min(PIECE, stop - first))
            self.wfile.write(data)
            with self.hub.lock:
                self.hub.sent_bytes += len(data)
        if stop < end:
            raise Cut

    def is_cut(self) -> bool:
        with self.hub.lock:
            cut = self.hub.chance.random() < self.hub.cut
            self.hub.cuts += cut
            return cut

    # -- requests

    def handle_any(self) -> None:
        try:
            self.dispatch()
        except (Cut, ConnectionError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/storage/"):
            return self.storage(path.removeprefix("/storage/"))
        self.body = b"".join(self.incoming())
        if self.hub.fails_at and self.hub.fails_at in path:
            return self.answer(403, {"error": "not today"})
        for failing in self.hub.statuses:
            if failing[0] in path and failing[2] > 0:
                failing[2] -= 1
                return self.answer(failing[1], {"error": f"status {failing[1]}"}, Retry_After="0")
        if path == "/api/agent-harnesses":
            return self.answer(404, {"error": "none"})
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.token and self.token not in TOKENS:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        self.user, self.role = TOKENS.get(self.token, ("", ""))
        if path == "/api/whoami-v2":
            if not self.user:
                return self.answer(401, {"error": "Invalid username or password."})
            return self.answer(200, {"name": self.user, "auth": {"accessToken": {"role": self.role}}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create()
        self.repository(path)

    def incoming(self) -> Iterator[bytes]:
        """Yield the body of the request as it comes; it may be cut."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        stop = int(left * self.hub.chance.random()) if left and self.is_cut() else -1
        while left:
            data = self.rfile.read(min(left, PIECE))
            if not data:
                raise Cut
            left -= len(data)
            if 0 <= stop and left <= stop:
                raise Cut
            yield data

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.role == "read" or not self.user:
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo"})
        self.hub.repositories[name] = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def repository(self, path: str) -> None:
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.user):
            return self.refuse(401 if not self.user else 404, "RepoNotFound", "Repository not found")
        match rest:
            case ["branch", *branch]:
                found.branches.setdefault("/".join(branch), Files(dict(found.branches["main"])))
                return self.answer(200, {})
            case ["preupload", *_]:
                return self.preupload()
            case ["info", "lfs", "objects", "batch"]:
                return self.batch(found, name)
            case ["lfs-files", "duplicate"]:
                return self.duplicate(found)
            case ["commit", *branch]:
                return self.commit(found, name, "/".join(branch))
            case ["resolve", *place]:
                return self.resolve(found, name, place)
            case ["tree", *branch]:
                return self.tree(found, "/".join(branch))
            case ["paths-info", *branch]:
                return self.paths(found, "/".join(branch))
        return self.info(found, name, "/".join(rest[1:]) or "main")

    # -- reading

    def info(self, found: Repository, name: str, revision: str) -> None:
        state = found.at(revision)
        if state is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": file} for file in state[1]]
        about = {"id": name, "private": found.private, "gated": found.gated, "sha": state[0], "tags": []}
        self.answer(200, {**about, "siblings": siblings})

    def describe(self, path: str, blob: Blob) -> dict[str, Any]:
        about: dict[str, Any] = {"type": "file", "path": path, "size": blob.size}
        if is_lfs(path, blob):
            pointer = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            return {**about, "oid": blob.sha256[:40], "lfs": pointer, "xetHash": blob.sha256}
        return {**about, "oid": git_hash(blob.read(0, blob.size))}

    def tree(self, found: Repository, revision: str) -> None:
        state = found.at(revision)
        if state is None:
            return self.refuse(404, "RevisionNotFound")
        self.answer(200, [self.describe(path, blob) for path, blob in state[1].items()])

    def paths(self, found: Repository, revision: str) -> None:
        state = found.at(revision)
        if state is None:
            return self.refuse(404, "RevisionNotFound")
        kind = self.headers.get("Content-Type") or ""
        asked = json.loads(self.body)["paths"] if "json" in kind else parse_qs(self.body.decode()).get("paths", [])
        self.answer(200, [self.describe(path, state[1][path]) for path in asked if path in state[1]])

    def resolve(self, found: Repository, name: str, place: list[str]) -> None:
        """Large content is on another path, as it is on another server of the Hub."""
        if found.gated and self.role != "write":
            return self.refuse(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted")
        for cut in range(1, len(place)):
            state = found.at("/".join(place[:cut]))
            if state is not None:
                break
        else:
            return self.refuse(404, "RevisionNotFound")
        sha, files = state
        path = "/".join(place[cut:])
        blob = files.get(path)
        if blob is None:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        if is_lfs(path, blob):
            headers = {"X_Linked_Size": str(blob.size), "X_Linked_Etag": f'"{blob.sha256}"', "X_Repo_Commit": sha}
            return self.answer(
                302,
                b"",
                Location=f"{self.hub.storage_url}/storage/{name}/{blob.sha256}",
                ETag=f'"{blob.sha256}"',
                **headers,
            )
        data = blob.read(0, blob.size)
        self.answer(200, data, ETag=f'"{git_hash(data)}"', X_Repo_Commit=sha)

    # -- writing

    def preupload(self) -> None:
        files = json.loads(self.body)["files"]
        large = [file["size"] > LARGE or file["path"].endswith(LFS_SUFFIXES) for file in files]
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            for file, lfs in zip(files, large, strict=True)
        ]
        self.answer(200, {"files": modes})

    def batch(self, found: Repository, name: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in found.objects:
                place = f"{self.hub.storage_url}/storage/{name}/{asked['oid']}"
                upload: dict[str, Any] = {"href": place}
                step = self.hub.part_bytes
                if step and asked["size"] > step:
                    parts = -(-asked["size"] // step)
                    upload["header"] = {"chunk_size": str(step)} | {
                        str(i + 1): f"{place}?part={i + 1}" for i in range(parts)
                    }
                one["actions"] = {"upload": upload, "verify": {"href": f"{place}?verify=1"}}
            objects.append(one)
        multipart = any("header" in one.get("actions", {}).get("upload", {}) for one in objects)
        self.answer(200, {"transfer": "multipart" if multipart else "basic", "objects": objects})

    def storage(self, place: str) -> None:
        """The server that holds the objects: reads, uploads in one piece or in parts, and checks."""
        name, _, oid = place.rpartition("/")
        found = self.hub.repositories[name]
        if self.command in ("GET", "HEAD"):
            return self.stream(found.objects[oid], oid)
        if self.command == "PUT" and "part" in self.query:
            self.hub.parts[oid, int(self.query["part"][0])] = b"".join(self.incoming())
            return self.answer(200, b"", ETag='"part"')
        if self.command == "PUT":
            return self.store(found, oid, self.incoming())
        body = json.loads(b"".join(self.incoming()))
        if "verify" in self.query:
            known = found.objects.get(oid)
            right = known is not None and known.size == body["size"]
            return self.answer(200 if right else 404, {"message": "ok" if right else "not there"})
        numbers = [part["partNumber"] for part in body["parts"]]
        self.store(found, oid, (self.hub.parts.pop((oid, number)) for number in numbers))

    def store(self, found: Repository, oid: str, pieces: Iterator[bytes]) -> None:
        digest, size, kept = hashlib.sha256(), 0, []
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            if self.hub.keeps_content:
                kept.append(piece)
        if digest.hexdigest() != oid:
            return self.answer(400, {"error": "checksum mismatch"})
        found.objects[oid] = Bytes(b"".join(kept)) if self.hub.keeps_content else Forgotten(size, oid)
        with self.hub.lock:
            self.hub.received.append((oid, size))
        self.answer(200, b"", ETag='"whole"')
        self.hub.on_object(len(self.hub.received))

    def duplicate(self, found: Repository) -> None:
        asked = json.loads(self.body)
        target = self.hub.repositories[asked["target"]["name"]]
        if not self.hub.offers_copies or target.region != found.region:
            failed = [{"sha256": file["sha256"], "error": "another region"} for file in asked["files"]]
            return self.answer(200, {"failed": failed})
        target.objects |= {file["sha256"]: found.objects[file["sha256"]] for file in asked["files"]}
        self.answer(200, {"success": [file["sha256"] for file in asked["files"]], "failed": []})

    def commit(self, found: Repository, name: str, branch: str) -> None:
        if self.role == "read":
            return self.answer(403, {"error": "Forbidden: this token may only read"})
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        makes_pull = "create_pr" in self.query
        if makes_pull:
            branch = f"refs/pr/{1 + sum(other.startswith('refs/pr/') for other in found.branches)}"
            found.branches[branch] = Files(dict(found.branches["main"]))
        state = found.at(branch)
        if state is None:
            return self.refuse(404, "RevisionNotFound")
        if header.get("parentCommit") not in (None, state[0]):
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = Files(dict(state[1]))
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = Bytes(base64.b64decode(value["content"]))
                case "lfsFile" if value["oid"] in found.objects:
                    files[value["path"]] = found.objects[value["oid"]]
                case "lfsFile":
                    return self.answer(400, {"error": f"LFS pointer of {value['path']} points to no object"})
                case "deletedFile":
                    del files[value["path"]]
        found.branches[branch] = files
        order = [line["value"]["path"] for line in lines[1:]]
        found.commits.append({"branch": branch, "order": order, **header})
        url = f"{self.hub.url}/{name}/discussions/1"
        made = {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": found.keep(files), "success": True}
        self.answer(200, made | ({"pullRequestUrl": url} if makes_pull else {}))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        pass


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty Hub on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.storage_url = f"http://localhost:{server.server_port}"  # another host, as for the client it is
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
