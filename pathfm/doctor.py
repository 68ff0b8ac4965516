"""``pathfm doctor``: what is installed, what is missing, and the command that mends it.

Imports nothing it does not look at, and looks at everything inside a guard: a broken package is a
line in the table, never a traceback.
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field
from rich.markup import escape
from rich.table import Table

from pathfm.runtime import (
    console,
    git_commit,
    installed_version,
    one_line,
    pick_device,
    plan_precision,
    without_secrets,
)
from pathfm.tracking import TrackingConfig

State = Literal["ok", "note", "missing"]

# distribution, module, what it is for
_REQUIRED = (
    ("numpy", "numpy", "arrays"),
    ("torch", "torch", "training"),
    ("torchvision", "torchvision", "imported by timm and lightly"),
    ("timm", "timm", "backbones"),
    ("lightly", "lightly.loss", "DINO loss and heads"),
    ("safetensors", "safetensors", "weights"),
    ("mlflow", "mlflow", "run tracking"),
    ("tifffile", "tifffile", "synthetic slides"),
    ("zarr", "zarr", "OME-Zarr of the tests"),
    ("imagecodecs", "imagecodecs", "JPEG 2000, LZW, deflate"),
    ("simplejpeg", "simplejpeg", "JPEG tiles"),
    ("openslide-python", "openslide", "fallback reader"),
    ("tiffslide", "tiffslide", "fallback reader"),
    ("aiohttp", "aiohttp", "slides over http(s)"),
    ("defusedxml", "defusedxml", "OME-XML"),
    ("pydantic", "pydantic", "configs"),
    ("tyro", "tyro", "help of the verbs"),
    ("jinja2", "jinja2", "report.html"),
)
# extra of pyproject.toml, in its order; a distribution that it brings; what it is for
_EXTRAS = (
    ("s3", "botocore", "s3:// slides"),
    ("gcs", "google-auth", "gs:// slides"),
    ("azure", "azure-identity", "az:// slides"),
    ("hf", "transformers", "backbones as Hugging Face's folders hold them"),
    ("maps", "umap-learn", "maps of embeddings by UMAP"),
    ("notebooks", "ipykernel", "notebooks"),
    ("test", "pytest", "tests"),
    ("bench", "tensorstore", "the peers of the benchmarks"),
    ("dev", "build", "wheels"),
)
_SHM = "/dev/shm"  # noqa: S108  # looked at, nothing is put there
_MIN_SHM_BYTES = 512 * 2**20  # one ring of 256-patch batches of 256 px a worker is 50 MB
_MIN_FREE_BYTES = 2 * 2**30
_MIN_MEMORY_BYTES = 4 * 2**30
_MIN_FILES = 1024


class DoctorConfig(BaseModel, frozen=True, extra="forbid"):
    """Where ``pathfm doctor`` looks."""

    out: Path = Field(Path("."), description="folder whose disk and MLflow store are looked at")
    tracking_uri: str | None = Field(
        None, description="MLflow store to try; unset: $MLFLOW_TRACKING_URI, else mlflow.db in OUT"
    )


@dataclass(frozen=True)
class Finding:
    """One line of the table: ``missing`` makes pathfm unusable, ``note`` only poorer."""

    what: str
    state: State
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class DoctorResult:
    """All findings; exit code 2 when something required is missing."""

    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 when everything required works, else 2."""
        return 2 if any(finding.state == "missing" for finding in self.findings) else 0


def run(config: DoctorConfig) -> DoctorResult:
    """Looks at everything and prints a table."""
    findings = [_python()]
    findings += [_package(*entry) for entry in _REQUIRED]
    findings += [_extra(*entry) for entry in _EXTRAS]
    looks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("JPEG decoder", _decoder),
        ("OpenSlide library", _openslide),
        ("GPU", _gpu),
        ("cores", _cores),
        (_SHM, _shared_memory),
        ("memory", _memory),
        ("free disk", lambda: _disk("free disk", config.out)),
        ("temporary files", lambda: _disk("temporary files", Path(tempfile.gettempdir()))),
        ("open files", _open_files),
        ("MLflow store", lambda: _store(config)),
        ("code", lambda: Finding("code", "ok", f"commit {git_commit()}")),
    )
    findings += [_guarded(what, look) for what, look in looks]
    result = DoctorResult(tuple(findings))
    _show(result)
    return result


def _guarded(what: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # whatever a broken installation raises is the finding
        return Finding(what, "note", f"cannot be looked at: {one_line(error)}")


def _python() -> Finding:
    version = platform.python_version()
    state: State = "ok" if sys.version_info >= (3, 11) else "missing"
    return Finding("Python", state, version, "" if state == "ok" else "use Python 3.11 or newer")


def _package(distribution: str, module: str, purpose: str) -> Finding:
    version = installed_version(distribution)
    try:
        importlib.import_module(module)
    except Exception as error:  # an ABI mismatch raises anything
        broken = "not installed" if version is None else f"{version} does not import: "
        why = "" if version is None else one_line(error)[:120]
        remedy = f"pip install -c constraints.txt --force-reinstall {distribution}"
        return Finding(distribution, "missing", f"{broken}{why} ({purpose})", remedy)
    return Finding(distribution, "ok", f"{version or 'version unknown'} ({purpose})")


def _extra(extra: str, module: str, purpose: str) -> Finding:
    version = installed_version(module)
    if version is None:
        remedy = f"pip install 'pathfm[{extra}]' if you want {purpose}"
        return Finding(f"extra {extra}", "note", f"{module} is not installed", remedy)
    return Finding(f"extra {extra}", "ok", f"{module} {version} ({purpose})")


def _decoder() -> Finding:
    from online_patching import native
    from online_patching.canvases import DECODER

    if native.AVAILABLE or os.environ.get(native.SWITCH):
        return Finding("JPEG decoder", "ok", DECODER)
    remedy = (
        "patches are right but cost about twice as much: install the wheel, or a C compiler "
        "(apt install gcc python3-dev) and then `pip install --no-deps --force-reinstall -e .`"
    )
    return Finding("JPEG decoder", "note", DECODER, remedy)


def _openslide() -> Finding:
    import openslide

    version = openslide.__library_version__
    if int(version.split(".")[0]) < 4:
        remedy = "pip install openslide-bin (4 reads DICOM)"
        return Finding("OpenSlide library", "note", version, remedy)
    return Finding("OpenSlide library", "ok", version)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        plan = plan_precision("auto", pick_device("cpu"))
        return Finding("GPU", "note", f"none: training runs on the CPU, in {plan}")
    name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: fp32"
    return Finding("GPU", "ok", f"{count} x {name}, {memory:.0f} GiB, {bf16}")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    total = os.cpu_count() or usable
    return Finding("cores", "ok", f"{usable} of {total} usable")


def _shared_memory() -> Finding:
    if not Path(_SHM).exists():
        return Finding(_SHM, "note", "none", "loader processes need it: --loader.workers 0")
    size = shutil.disk_usage(_SHM).total
    value = f"{size / 2**20:,.0f} MiB"
    if size < _MIN_SHM_BYTES:
        remedy = "docker run --shm-size=2g, or no loader processes (workers 0)"
        return Finding(_SHM, "note", value, remedy)
    return Finding(_SHM, "ok", value)


def _memory() -> Finding:
    from online_patching.loading.ring import memory_bytes

    value = f"{memory_bytes() / 2**30:,.1f} GiB"
    if memory_bytes() < _MIN_MEMORY_BYTES:
        return Finding("memory", "note", value, "fewer loader processes, a smaller batch")
    return Finding("memory", "ok", value)


def _disk(what: str, folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        remedy = "choose another --out (temporary files: another TMPDIR)"
        return Finding(what, "missing", f"{folder} is not writable", remedy)
    if free < _MIN_FREE_BYTES:
        value = f"{free / 2**30:.1f} GiB at {folder}"
        return Finding(what, "note", value, "the demo and the tests write up to 1 GiB each")
    return Finding(what, "ok", f"{free / 2**30:,.0f} GiB at {folder}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_FILES:
        return Finding("open files", "note", f"{soft} (hard limit {hard})", f"ulimit -n {hard}")
    return Finding("open files", "ok", f"{soft:,}")


def _store(config: DoctorConfig) -> Finding:
    tracking = TrackingConfig(uri=config.tracking_uri)
    uri = tracking.store(config.out)
    shown = without_secrets(uri)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if path.exists():
            return Finding("MLflow store", "ok", f"{shown}, {path.stat().st_size / 2**20:.1f} MiB")
        return Finding("MLflow store", "ok", f"{shown} (made by the first run)")
    return _server(uri, shown)


def _server(uri: str, shown: str) -> Finding:
    """Whether an MLflow server answers within five seconds."""
    import urllib.request

    if not uri.startswith(("http://", "https://")):
        return Finding("MLflow store", "ok", f"{shown} (not tried)")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:  # noqa: S310
            state: State = "ok" if answer.status == 200 else "note"
            return Finding("MLflow store", state, f"{shown} answers {answer.status}")
    except OSError as error:
        remedy = "rows are kept in metrics.jsonl and shipped later; or give another --tracking_uri"
        return Finding("MLflow store", "note", f"{shown}: {one_line(error)}", remedy)


def _show(result: DoctorResult) -> None:
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "found", "remedy"):
        table.add_column(name, overflow="fold")
    for finding in result.findings:
        table.add_row(
            marks[finding.state], *map(escape, (finding.what, finding.value, finding.remedy))
        )
    out = console()
    out.print(table)
    missing = [finding.what for finding in result.findings if finding.state == "missing"]
    if missing:
        out.print(f"not usable: {', '.join(missing)}. `make venv` installs what the tests ran with")
    else:
        out.print("everything required works")
