"""An object store on this machine: moto's server, which speaks S3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from fakes import contents

BUCKET = "bucket"


@dataclass(frozen=True)
class Store:
    """A server with an empty bucket, and the variables by which S3's clients find it in this process and in others."""

    environment: Mapping[str, str]

    def put(self, name: str, files: Path | Mapping[str, bytes]) -> str:
        """Store a folder's files, or these, in the folder `name` of the bucket; return its URL."""
        client = self.client()
        for path, data in (contents(files) if isinstance(files, Path) else files).items():
            client.pipe_file(f"{BUCKET}/{name}/{path}", data)
        return f"s3://{BUCKET}/{name}"

    def get(self, name: str) -> dict[str, bytes]:
        """Return the files below the folder `name` of the bucket."""
        client, root = self.client(), f"{BUCKET}/{name}/"
        return {path.removeprefix(root): client.cat_file(path) for path in client.find(root)}

    def client(self) -> Any:
        """Return another client than the one that is tested."""
        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Yield a store of its own; the variables are set meanwhile."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIA0123456789ABCDEF",
        "AWS_SECRET_ACCESS_KEY": "secret/of/the+store",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    store = Store(environment)
    try:
        # moto keeps what it stores in the process, whatever server it came to.
        urlopen(Request(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()
        store.client().mkdir(BUCKET)
        yield store
    finally:
        server.stop()
