"""Every store passes the public contract, against the real thing or a server that speaks like it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest

from online_patching.stores import FsspecStore, HttpStore, LocalStore, RetryPolicy
from online_patching.testing.store_contract import StoreContract
from tests.cloud_servers import ACCOUNT_KEY, CloudServer
from tests.servers import FaultServer

POLICY = RetryPolicy(attempts=2, first_delay_s=0.01)


class TestLocalStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.root = tmp_path

    def make_store(self) -> LocalStore:
        return LocalStore()

    def put(self, name: str, data: bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    def remove(self, name: str) -> None:
        (self.root / name).unlink()


class TestHttp(StoreContract):
    lists = False
    secrets = ("s3cret", "hunter2")

    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path) -> Iterator[None]:
        self.root = tmp_path
        with FaultServer(tmp_path, etag="") as self.server:
            yield

    def make_store(self) -> HttpStore:
        return HttpStore(POLICY)

    def put(self, name: str, data: bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"{self.server.url}/{quote(name)}?sig=s3cret&by=hunter2"

    def remove(self, name: str) -> None:
        (self.root / name).unlink()


class TestFsspecMemory(StoreContract):
    @pytest.fixture(autouse=True)
    def _memory(self) -> Iterator[None]:
        self.fs = fsspec.filesystem("memory")
        yield
        self.fs.store.clear()

    def make_store(self) -> FsspecStore:
        return FsspecStore(POLICY)

    def put(self, name: str, data: bytes) -> str:
        self.fs.pipe_file(f"/root/{name}", data)
        return f"memory://root/{name}"

    def remove(self, name: str) -> None:
        self.fs.rm_file(f"/root/{name}")


class CloudContract(StoreContract):
    server: CloudServer

    def make_store(self) -> HttpStore:
        return HttpStore(POLICY)

    def put(self, name: str, data: bytes) -> str:
        return self.server.put(name, data)

    def remove(self, name: str) -> None:
        self.server.remove(name)


class TestS3(CloudContract):
    secrets = ("s3-secret-of-tests", "AKIAOFTESTS", "X-Amz", "Signature")

    @pytest.fixture(autouse=True)
    def _server(self, s3_cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = s3_cloud
        s3_cloud.enter(monkeypatch)


class TestGcs(CloudContract):
    @pytest.fixture(autouse=True)
    def _server(self, gcs_cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = gcs_cloud
        gcs_cloud.enter(monkeypatch)


class TestAzure(CloudContract):
    secrets = (ACCOUNT_KEY, "sig=", "AccountKey")

    @pytest.fixture(autouse=True)
    def _server(self, azure_cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = azure_cloud
        azure_cloud.enter(monkeypatch)
