"""A private nginx for the HTTP benchmarks: serves a folder, with milliseconds added to each answer.

Needs nginx with its Lua module: `apt-get install nginx libnginx-mod-http-lua` on Debian and Ubuntu.
It runs as one process on a free port of this machine, out of a folder of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = (Path("/usr/lib/nginx/modules"), Path("/usr/lib64/nginx/modules"))
NEEDED = (
    "this benchmark needs nginx with its Lua module (ndk_http_module.so, ngx_http_lua_module.so in "
    f"{' or '.join(map(str, MODULES))}): apt-get install nginx libnginx-mod-http-lua"
)

CONFIG = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    {tls}
    location /0ms/ {{ alias {served}/; }}
    location ~ ^/([0-9]+)ms/(.*)$ {{
      set $wait $1;
      set $name $2;
      access_by_lua_block {{ ngx.sleep(tonumber(ngx.var.wait) / 1000) }}
      alias {served}/$name;
    }}
  }}
}}
"""
TLS = "listen 127.0.0.1:{port} ssl; ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;"


@dataclass(frozen=True)
class Served:
    """`url(name, ms)`: a file of the folder, answered after so many milliseconds."""

    base: str
    tls_base: str
    certificate: str
    pid: int

    def url(self, name: str, ms: int = 0, tls: bool = False) -> str:
        """Where it is."""
        return f"{self.tls_base if tls else self.base}/{ms}ms/{name}"


@contextlib.contextmanager
def nginx(served: Path, folder: Path) -> Iterator[Served]:
    """Serve `served` until left; configuration, keys and logs go to the empty `folder`.

    SystemExit, saying what to install, when nginx or its Lua module is missing.
    """
    modules = next((m for m in MODULES if (m / "ngx_http_lua_module.so").exists()), None)
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if modules is None or program is None:
        raise SystemExit(NEEDED)
    port, tls_port = free_port(), free_port()
    make_certificate(folder)
    tls = TLS.format(port=tls_port, folder=folder)
    (folder / "nginx.conf").write_text(
        CONFIG.format(modules=modules, folder=folder, port=port, served=served, tls=tls)
    )
    process = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"])
    try:
        wait_for(port, process)
        yield Served(
            f"http://127.0.0.1:{port}",
            f"https://127.0.0.1:{tls_port}",
            str(folder / "cert.pem"),
            process.pid,
        )
    finally:
        process.terminate()
        process.wait(10)


def make_certificate(folder: Path) -> None:
    """A self-signed certificate for 127.0.0.1."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until it listens, at most ten seconds."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit("nginx did not start; its own message is above.")


def cpu_seconds(pid: int) -> float:
    """User and system time of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
