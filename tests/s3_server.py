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
SECRET = "secret/of/the+store"


@dataclass(frozen=True)
class Store:
    """A server with a bucket, and the variables by which S3's clients find it, in this process and in others.

    `client` is another one than those that are tested.
    """

    environment: Mapping[str, str]
    client: Any

    def reset(self) -> None:
        """Leave nothing but an empty bucket. moto keeps what it stores in the process, whatever server it came to."""
        self._ask("reset")
        self.client.mkdir(BUCKET)

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Take requests of known users only within the block; there are none."""
        self._ask("reset-auth", b"0")
        try:
            yield
        finally:
            self._ask("reset-auth", b"inf")

    def put(self, name: str, files: Path | Mapping[str, bytes]) -> str:
        """Store a folder's files, or these, in the folder `name` of the bucket; return its URL."""
        for path, data in (contents(files) if isinstance(files, Path) else files).items():
            self.client.pipe_file(f"{BUCKET}/{name}/{path}", data)
        return f"s3://{BUCKET}/{name}"

    def get(self, name: str) -> dict[str, bytes]:
        """Return the files below the folder `name` of the bucket."""
        root = f"{BUCKET}/{name}/"
        return {path.removeprefix(root): self.client.cat_file(path) for path in self.client.find(root)}

    def _ask(self, path: str, data: bytes = b"") -> None:
        url = f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/{path}"
        urlopen(Request(url, data=data, headers={"Content-Type": "text/plain"}, method="POST")).close()


@contextmanager
def s3_store() -> Iterator[Store]:
    """Yield a store; the variables are set meanwhile."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIA0123456789ABCDEF",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
                patch.delenv(name, raising=False)
            client = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
            store = Store(environment, client)
            store.reset()
            yield store
    finally:
        server.stop()
