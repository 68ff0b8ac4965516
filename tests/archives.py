"""Public archives as they answer: the GDC's data endpoint over HTTP, the IDC's bucket over S3."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from tests.cloud_servers import CloudServer, s3_server


def gdc_manifest(path: Path, files: dict[str, Path], sizes: dict[str, int] | None = None) -> Path:
    """The portal's TSV of files by id, named as the files are; `sizes` are told instead of the true ones."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    for number, file in files.items():
        data = file.read_bytes()
        size = (sizes or {}).get(number, len(data))
        lines.append(f"{number}\t{file.name}\t{hashlib.md5(data).hexdigest()}\t{size}\treleased")
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class GdcServer:
    """Serves `files` by id under /data, as the GDC does: ranges, Content-Disposition, no conditions heeded.

    `etag_every` n: only each n-th answer has an ETag (0: none), and a new one each time. `controlled` ids want the
    header X-Auth-Token. With `redirect`, /data sends on to that origin (a path of this server when "").
    """

    files: dict[str, Path]
    controlled: dict[str, str] = field(default_factory=dict)
    etag_every: int = 0
    redirect: str | None = None

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.ranges: list[tuple[str, int, int]] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        state = self

        class Handler(_GdcHandler):
            gdc = state

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def endpoint(self) -> str:
        return f"{self.origin}/data"

    def __enter__(self) -> GdcServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.shutdown()
        self.http.server_close()


class _GdcHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gdc: GdcServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        state = self.gdc
        with state.lock:
            state.seen.append((self.path, dict(self.headers)))
            count = len(state.seen)
        folder, _, number = self.path.lstrip("/").partition("/")
        if folder == "data" and state.redirect is not None:
            where = f"{state.redirect or state.origin}/files/{number}"
            return self._send(302, b"", {"Location": where})
        if number not in state.files:
            return self._send(404, b'{"message": "file not found"}', {})
        wanted = state.controlled.get(number)
        if wanted is not None and self.headers.get("X-Auth-Token") != wanted:
            return self._send(403, b'{"message": "Your token is invalid or expired."}', {})
        file = state.files[number]
        data = file.read_bytes()
        head = {
            "Content-Disposition": f"attachment; filename={file.name}",
            "Accept-Ranges": "bytes",
        }
        if state.etag_every and count % state.etag_every == 0:
            head["ETag"] = f'"{count}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return self._send(200, data, head)
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return self._send(416, b"", head | {"Content-Range": f"bytes */{len(data)}"})
        with state.lock:
            state.ranges.append((number, start, stop))
        head["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], head)

    def _send(self, status: int, body: bytes, head: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def idc_bucket(folder: Path, objects: dict[str, bytes]) -> Iterator[CloudServer]:
    """An S3 server with these objects in `s3://idc-open-data`; its `env` is how it is reached."""
    import botocore.session

    with s3_server(folder) as server:
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket="idc-open-data")
        for key, data in objects.items():
            client.put_object(Bucket="idc-open-data", Key=key, Body=data)
        client.close()
        yield server


def with_patient(instance: bytes, name: str, number: str) -> bytes:
    """A DICOM file (explicit little endian) with a patient's name and id where it has empty ones."""
    for tag, kind, text in (
        (b"\x10\x00\x10\x00", b"PN", name),
        (b"\x10\x00\x20\x00", b"LO", number),
    ):
        value = text.encode() + b" " * (len(text) % 2)
        empty = tag + kind + b"\0\0"
        assert instance.count(empty) == 1
        instance = instance.replace(empty, tag + kind + len(value).to_bytes(2, "little") + value)
    return instance


def not_a_slide(number: str) -> bytes:
    """A CT image's file: what an archive holds besides slides."""

    def element(tag: bytes, kind: bytes, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        long = kind in (b"OB", b"OW")
        size = (
            b"\0\0" + len(value).to_bytes(4, "little") if long else len(value).to_bytes(2, "little")
        )
        return tag + kind + size + value

    ct = b"1.2.840.10008.5.1.4.1.1.2"
    meta = element(b"\2\0\2\0", b"UI", ct) + element(b"\2\0\3\0", b"UI", b"1.2.3")
    meta += element(b"\2\0\x10\0", b"UI", b"1.2.840.10008.1.2.1")
    return (
        bytes(128) + b"DICM" + element(b"\2\0\0\0", b"UL", len(meta).to_bytes(4, "little")) + meta
        + element(b"\x08\0\x16\0", b"UI", ct) + element(b"\x08\0\x60\0", b"CS", b"CT")
        + element(b"\x10\0\x20\0", b"LO", number.encode()) + element(b"\xe0\x7f\x10\0", b"OW", bytes(32))
    )  # fmt: skip
