"""What a million rows of features cost: written, recognised, opened, looked at; and in the peers' forms.

    python benchmarks/embeddings_scale.py [--rows N] [--dim D] [--files N] [--out FILE]

Each in a process of its own, block after block in turns; memory is what the process grew by over its
imports. The peers: the safetensors library (all in memory), kaiko-eva's form (one file of torch.save a sample;
written and read for `--files` of them, extrapolated to all, and marked), and TRIDENT's HDF5 (one chunk a row; of
100,000 rows, extrapolated too).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
import torch
from common import about_this_run, write_out

from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.embeddings.table import save_streamed

STEP = 16_384
LOOKED_AT = 1_000
TRIDENT_ROWS = 100_000


def main() -> None:
    """Measure everything, print it, write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.blocks):
            for name in PARTS:
                found[name].append(apart(name, Path(folder), args))
        sizes = {p.name: p.stat().st_size / 2**20 for p in sorted(Path(folder).glob("*.*"))}
    lines = [about_this_run("numpy", "safetensors", "h5py", "torch")]
    lines += [f"{args.rows:,} rows of {args.dim}, medians of {args.blocks} blocks", ""]
    lines += [*ratios(found), "", f"{'what':<52}{'s':>10}{'memory, MB':>12}"]
    for name, values in found.items():
        seconds, memory = (statistics.median(v[i] for v in values) for i in (0, 1))
        lines.append(f"{PARTS[name][0]:<52}{seconds:>10.3f}{memory:>12.0f}")
    lines += ["", *(f"{name:<24}{size:>10.0f} MB" for name, size in sizes.items())]
    write_out(lines, args.out)


def ratios(found: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Peers' times over ours, block by block."""
    out = []
    for ours, theirs in (
        ("write", "safetensors write"),
        ("write", "eva write"),
        ("write", "trident write"),
        ("look", "eva look"),
        ("look", "trident look"),
        ("load", "safetensors load"),
    ):
        each = [b[0] / a[0] for a, b in zip(found[ours], found[theirs], strict=True)]
        told = f"{min(each):.2f} to {max(each):.2f}"
        out.append(f"time, {PARTS[theirs][0]} / ours: {statistics.median(each):.2f} x ({told})")
    return out


def apart(name: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """`part` in a forked process: its memory is its own, and nothing is imported again."""
    forked = multiprocessing.get_context("fork")
    ours, theirs = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: theirs.send(part(name, folder, args)))
    process.start()
    process.join()
    if process.exitcode or not ours.poll():
        raise SystemExit(f"{name} failed")
    seconds, memory = ours.recv()
    return seconds, memory


def part(name: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and MB of one of them."""
    work = PARTS[name][1](folder, args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.perf_counter()
    factor = work() or 1.0
    seconds = (time.perf_counter() - began_s) * factor
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def blocks(n: int, d: int) -> Iterator[np.ndarray]:
    """Features as a model would give them, a batch of rows at a time."""
    block = np.random.default_rng(0).normal(size=(STEP, d)).astype(np.float32)
    for at in range(0, n, STEP):
        yield block[: min(STEP, n - at)]


def info(storage: str = "fp32") -> EmbeddingsInfo:
    """What the features would have been made of."""
    return EmbeddingsInfo("a", "vit", "b" * 64, "", "d", "c" * 64, 224, storage=storage)


def ours_write(storage: str) -> Any:
    """Our file, streamed."""

    def prepare(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
        n = args.rows
        rows = SimpleNamespace(
            labels=np.arange(n, dtype=np.int64) % 9,
            classes=tuple("abcdefghi"),
            paths=tuple(f"class_{i % 9}/slide_{i // 500:05d}_{i:07d}.png" for i in range(n)),
            groups=(),
            splits=(),
        )
        path = folder / f"ours_{storage}.safetensors"
        return lambda: save_streamed(path, rows, info(storage), (n, args.dim), blocks(n, args.dim))

    return prepare


def key(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    """Is it the right file?"""

    def work() -> None:
        assert stored_key(folder / "ours_fp32.safetensors") == info().key

    return work


def load(storage: str, mmap: bool) -> Any:
    """Everything, checked to be finite, with paths and labels."""

    def prepare(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
        def work() -> None:
            got = Embeddings.load(folder / f"ours_{storage}.safetensors", mmap=mmap)
            assert len(got.paths) == args.rows

        return work

    return prepare


def chosen(n: int) -> np.ndarray:
    """Rows to look at, ascending."""
    return np.sort(np.random.default_rng(1).choice(n, LOOKED_AT, replace=False))


def look(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    """1,000 rows here and there of an open file."""
    features = Embeddings.load(folder / "ours_fp32.safetensors", mmap=True).features

    def work() -> None:
        features[chosen(args.rows)].sum()

    return work


def theirs_write(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    """The safetensors library: one table, so it must be whole."""

    def work() -> None:
        whole = np.concatenate([*blocks(args.rows, args.dim)])
        tensors = {"features": whole, "labels": np.zeros(args.rows, np.int64)}
        safetensors.numpy.save_file(tensors, folder / "library.safetensors")

    return work


def theirs_load(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    """The library's own reader."""

    def work() -> None:
        found = safetensors.numpy.load_file(folder / "library.safetensors")
        assert np.isfinite(found["features"]).all()

    return work


def eva_write(folder: Path, args: argparse.Namespace) -> Callable[[], float]:
    """One file of torch.save a sample."""
    files = folder / "eva"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    table = torch.from_numpy(next(blocks(STEP, args.dim)))

    def work() -> float:
        for i in range(args.files):
            torch.save(table[i % STEP].clone(), files / f"{i}.pt")
        return float(args.rows / args.files)

    return work


def eva_look(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    """1,000 of its files."""

    def work() -> None:
        for i in chosen(args.files).tolist():
            torch.load(folder / "eva" / f"{i}.pt", weights_only=True)

    return work


def trident_write(folder: Path, args: argparse.Namespace) -> Callable[[], float]:
    """As its save_h5: a chunk a row, grown batch by batch."""

    n = min(args.rows, TRIDENT_ROWS)

    def work() -> float:
        with h5py.File(folder / "trident.h5", "w") as file:
            shape, most = (0, args.dim), (None, args.dim)
            table = file.create_dataset(
                "features", shape, "f4", maxshape=most, chunks=(1, args.dim)
            )
            for block in blocks(n, args.dim):
                table.resize(len(table) + len(block), axis=0)
                table[-len(block) :] = block
        return float(args.rows / n)

    return work


def trident_look(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    """1,000 rows of it."""

    def work() -> None:
        with h5py.File(folder / "trident.h5", "r") as file:
            file["features"][chosen(min(args.rows, TRIDENT_ROWS))].sum()

    return work


PARTS: dict[str, tuple[str, Any]] = {
    "write": ("write, float32", ours_write("fp32")),
    "write bf16": ("write, bfloat16", ours_write("bf16")),
    "key": ("recognise by key", key),
    "load": ("load all, float32, checked", load("fp32", mmap=False)),
    "map": ("the same, mapped", load("fp32", mmap=True)),
    "load bf16": ("load all, bfloat16, widened, checked", load("bf16", mmap=False)),
    "look": ("1,000 rows of a mapped file", look),
    "safetensors write": ("safetensors library: write", theirs_write),
    "safetensors load": ("safetensors library: load, checked, no paths", theirs_load),
    "eva write": ("eva's form: write, a file a row (extrapolated)", eva_write),
    "eva look": ("eva's form: 1,000 rows", eva_look),
    "trident write": ("TRIDENT's form: write, a chunk a row (extrapolated)", trident_write),
    "trident look": ("TRIDENT's form: 1,000 of 100,000 rows", trident_look),
}


if __name__ == "__main__":
    main()
