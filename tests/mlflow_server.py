"""A real MLflow server that tests may kill, and a proxy before it that loses answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(uri: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """`mlflow server` over a store, answering when this returns."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", uri, "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "NO_PROXY": "127.0.0.1"}
    # of its eight processes seven wait for jobs that tracking has none of
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder
        )
    deadline_s = time.monotonic() + 180
    while time.monotonic() < deadline_s and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.1)
    kill(server)
    raise RuntimeError((folder / "server.log").read_text())


def kill(server: subprocess.Popen[bytes]) -> None:
    """The server and its workers, which are in a session of their own."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(10)


class LossyProxy:
    """Lets requests through; of those whose path ends so, every n-th answer is withheld.

    The server has done what it was asked; the client waits until its patience ends, or (`cut`)
    sees the connection close. `sent` counts (key, step) of every metric in requests let through.
    """

    def __init__(self, upstream: str, path_end: str, lose_every: int, *, cut: bool) -> None:
        self.sent: Counter[tuple[str, int]] = Counter()
        self.lost = 0
        proxy, seen, closing = self, [0], threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass()

            def do_POST(self) -> None:
                self._pass()

            def do_PATCH(self) -> None:
                self._pass()

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(upstream + self.path, body or None, method=self.command)
                request.add_header("Content-Type", self.headers.get("Content-Type", ""))
                try:
                    with urlopen(request, timeout=30) as answer:
                        status, data = answer.status, answer.read()
                except HTTPError as error:
                    status, data = error.code, error.read()
                proxy._count(self.path, body)
                if self.path.split("?")[0].endswith(path_end):
                    seen[0] += 1
                    if seen[0] % lose_every == 1:
                        proxy.lost += 1
                        if not cut:
                            closing.wait(20)
                        self.close_connection = True
                        return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._closing = closing
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _count(self, path: str, body: bytes) -> None:
        if path.endswith("/log-batch"):
            for metric in json.loads(body).get("metrics", ()):
                self.sent[metric["key"], int(metric["step"])] += 1

    def __enter__(self) -> LossyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
