"""The part of the Hub that an upload needs, on this machine: repositories with branches of files, in memory."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read"), "hf_fine": ("me", "fineGrained")}
Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Hub:
    """What a test sees: the repositories, all requests, and a path at which to fail."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails_at: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.chunks()
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fails_at and self.hub.fails_at in path:
            return self.answer(403, {"error": "not today"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in TOKENS:
            return self.answer(401, {"error": "Invalid credentials"})
        self.user, role = TOKENS[token]
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": self.user, "auth": {"accessToken": {"role": role}}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create()
        return self.repository(path)

    do_GET = do_HEAD = do_POST = handle_any

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists"})
        self.hub.repositories[name] = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def repository(self, path: str) -> None:
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        match rest:
            case ["branch", *branch]:
                found.branches.setdefault("/".join(branch), dict(found.branches["main"]))
                return self.answer(200, {})
            case ["preupload", *_]:
                files = json.loads(self.body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                return self.answer(200, {"files": modes})
            case ["commit", *branch]:
                return self.commit(found, name, "/".join(branch))
            case ["resolve", *place]:
                return self.resolve(found, place)
        return self.info(found, name, "/".join(rest[1:]) or "main")

    def info(self, found: Repository, name: str, branch: str) -> None:
        if branch not in found.branches:
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": file} for file in found.branches[branch]]
        self.answer(200, {"id": name, "private": found.private, "sha": "0" * 40, "siblings": siblings, "tags": []})

    def commit(self, found: Repository, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        makes_pull = "create_pr=1" in self.path
        if makes_pull:
            branch = f"refs/pr/{1 + sum(other.startswith('refs/pr/') for other in found.branches)}"
            found.branches[branch] = dict(found.branches["main"])
        files = dict(found.branches[branch])
        for line in lines[1:]:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                del files[line["value"]["path"]]
        found.branches[branch] = files
        found.commits.append({"branch": branch, **header})
        url = f"{self.hub.url}/{name}/discussions/1"
        made = {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        self.answer(200, made | ({"pullRequestUrl": url} if makes_pull else {}))

    def resolve(self, found: Repository, place: list[str]) -> None:
        branch, file = "/".join(place[:-1]), place[-1]
        if branch not in found.branches:
            return self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        data = found.branches[branch].get(file)
        if data is None:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
        self.answer(200, data, ETag='"tag"', X_Repo_Commit="0" * 40)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty Hub on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
