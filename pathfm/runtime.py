"""What every verb stands on: errors for people, device, precision, provenance, progress.

Cheap to import: torch comes in when a function needs it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from online_patching.errors import redact
from online_patching.philox import words
from online_patching.stores.local import atomic_write_text

if TYPE_CHECKING:
    import torch

# Before torch is loaded: OpenMP threads that wait should sleep. By default they spin, and as soon as
# decoding (or a neighbour) wants one of the cores, a DINO step on two of them took 8.4 s, not 1.5.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INDEX_UNFINISHED = "index.unfinished"
"""In a corpus folder while `pathfm index` writes to it, and after one that was killed."""

Precision = Literal["auto", "bf16", "fp32"]

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_FILE_SCHEMES = ("sqlite:", "file:")  # their `?` and `#` belong to a path
_SECRET_NAME = re.compile(
    r"(^|[._-])(password|passwd|secret|token|api_?key|access_?key)s?$", re.IGNORECASE
)
_QUIET_INTERVAL_S = 10.0  # one line this often where nobody watches a bar


class PathfmError(Exception):
    """What a person must know or mend, on one line: what, where, the numbers, the remedy."""

    exit_code = 2


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called ``name``; "auto" takes a GPU where there is one.

    Raises ``PathfmError`` for a device this machine does not have.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PathfmError(f"device {name!r} is no torch device: try auto, cpu or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise PathfmError(f"device {name!r}: this machine shows {found} GPUs. Use --device cpu")
    return device


def plan_precision(asked: Precision, device: torch.device) -> Literal["bf16", "fp32"]:
    """What "auto" means here: bf16 wherever the GPU or the processor computes in it, else fp32.

    Decided by the hardware, never by timing, so that a rerun decides the same. On a core with
    avx512_bf16 a DINO step of ViT-Ti is 3 times as fast in bf16; without, bf16 is emulated and slower.
    """
    import torch

    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context for a forward pass; losses are computed in fp32 outside of it."""
    import torch

    if plan_precision(precision, device) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def torch_generator(seed: int, draw: int, stream: int) -> torch.Generator:
    """A CPU generator that is a pure function of (seed, draw, stream), by way of Philox."""
    import numpy as np
    import torch

    low, high = words(seed, np.array([draw]), 0, stream, 2)[0].tolist()
    return torch.Generator().manual_seed(low | high << 32)


@cache
def git_commit() -> str:
    """The commit this code stands at, "-dirty" appended where it was changed; else "unknown"."""
    here = Path(__file__)

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)

    try:
        # an installed copy may lie inside somebody else's repository: its commit is not ours
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance() -> dict[str, str]:
    """Where a result came from, flat, ready to be logged as tags.

    Commit, versions, machine, command. No host or user name, no working directory.
    """
    facts = {
        "git_commit": git_commit(),
        "command": " ".join([_program(), *map(scrubbed, sys.argv[1:])]),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    for name in ("pathfm", "torch", "timm", "lightly", "numpy", "tifffile", "zarr", "mlflow"):
        facts[f"version.{name}"] = installed_version(name) or "missing"
    torch = sys.modules.get("torch")  # not worth two seconds only to name a GPU
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts


def _program() -> str:
    """What was typed first: of `python -m pathfm` no more than that it was pathfm."""
    name = Path(sys.argv[0]).name
    return "pathfm" if name == "__main__.py" else name


def without_secrets(text: str) -> str:
    """The text with user:password cut out of every URI in it, and queries too.

    In the names of object stores and files a `?` without `=` is a character like others.
    """
    return _URI.sub(lambda found: _uri_without_secrets(found[0]), text)


def scrubbed(value: Any, name: str = "") -> Any:
    """The same structure, with secrets cut out of every string; `***` under names of secrets."""
    if isinstance(value, Mapping):
        return {key: scrubbed(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(name) and value:
        return "***"
    # one that is a URI as a whole may have blanks in it
    return _uri_without_secrets(value) if _URI.match(value) else without_secrets(value)


def _uri_without_secrets(uri: str) -> str:
    clean = redact(uri)
    if clean.startswith(_FILE_SCHEMES):
        return clean
    path, mark, query = clean.partition("?")
    return path if "=" in query else path + mark + query


def save_config(
    config: BaseModel,
    folder: Path,
    name: str = "config.yaml",
    leave_out: Mapping[str, set[str]] | None = None,
) -> Path:
    """Writes the resolved config beside a verb's outputs; ``pathfm VERB THAT_FILE`` repeats it.

    Secrets are not written: URIs that need them must be given again. `leave_out` names fields of
    parts that the file must not set.
    """
    path = make_folder(folder) / name
    values = scrubbed(config.model_dump(mode="json", exclude=dict(leave_out or {})))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    atomic_write_text(path, f"# resolved by pathfm at commit {git_commit()}\n{text}")
    return path


def make_folder(folder: Path) -> Path:
    """The folder, made where it was missing, known to be writable; else ``PathfmError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathfmError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PathfmError(f"cannot write to the folder {folder}: permission denied")
    return folder


def console() -> Console:
    """Where tables are printed: stdout, wide enough for them where it is no terminal."""
    wide = Console()
    return wide if wide.is_terminal else Console(width=160)


class _Titled(Table):
    """A table whose title stands above it on a line of its own: rich breaks titles at the table's width."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title, self.title = self.title, None
        if title:
            yield Text.from_markup(str(title), style="table.title")
        yield from super().__rich_console__(console, options)
        self.title = title


def titled(title: str, *columns: str) -> Table:
    """A table to be printed, with a title however long; markup in both."""
    return _Titled(*columns, title=title)


class Progress:
    """Counts work out loud: a bar with rate and ETA on a terminal, else a line every ten seconds.

    ``advance`` takes facts to show beside the count, e.g. ``loss=6.93, wait=0.12``.
    """

    def __init__(self, total: int, unit: str, description: str, done: int = 0) -> None:
        self.total, self.unit, self.description = total, unit, description
        self.done = self._start = done
        self._began_s = self._said_s = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(description, total=total, completed=done, facts="")

    @property
    def rate(self) -> float:
        """Units a second since the start (0 before the first)."""
        passed_s = time.monotonic() - self._began_s
        return (self.done - self._start) / passed_s if passed_s > 0 else 0.0

    def advance(self, n: int = 1, **facts: float | str) -> None:
        """Counts ``n`` more units and shows ``facts`` beside them."""
        self.done += n
        shown = f"{self.rate:.1f} {self.unit}/s " + " ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, facts=shown)
        elif time.monotonic() - self._said_s >= _QUIET_INTERVAL_S:
            self._said_s = time.monotonic()
            eta_s = (self.total - self.done) / self.rate if self.rate else float("nan")
            line = f"{self.description}: {self.done:,}/{self.total:,} {self.unit}, {shown.strip()}"
            print(f"{line}, {eta_s:.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def progress(total: int, unit: str, description: str, done: int = 0) -> Progress:
    """A ``Progress`` over ``total`` units, ``done`` of which a resumed run already has."""
    return Progress(total, unit, description, done)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Times a stage into ``seconds[name]``, also when it fails."""
    began_s = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - began_s


def counted(n: int, noun: str) -> str:
    """ "1 slide", "2,000 slides": for nouns whose plural has an s."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def told_time(seconds: float) -> str:
    """ "74 s", "12 min", "1.6 h"; "" of what is not known (nan)."""
    if seconds != seconds:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def one_line(error: BaseException) -> str:
    """An error as the one line a person gets; the type's name where it has no words."""
    return " ".join(str(error).split()) or type(error).__name__


def as_dict(config: BaseModel) -> dict[str, Any]:
    """A config as flat ``dotted.key: value`` pairs, named as on the command line; no secrets."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix.removesuffix(".")] = value

    walk("", scrubbed(config.model_dump(mode="json")))
    return flat
