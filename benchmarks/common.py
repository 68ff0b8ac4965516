"""What the benchmarks share: who ran what where, tissue, one core, blocks in turn, paired ratios."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from online_patching import ForegroundMask, Slide
from online_patching.native import ABOUT


def about_this_run(*packages: str) -> str:
    """Date, commit, machine, Python, which decoder we run on, and versions of the packages named."""
    names = packages or ("openslide-bin", "tiffslide")
    versions = ", ".join(f"{name} {installed(name)}" for name in names)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, {cpu()}, Python {platform.python_version()}, "
        f"{ABOUT}, {versions}"
    )


def installed(package: str) -> str:
    """A package's version, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The commit measured, marked when the tree differs from it by more than results."""
    name = subprocess.run(
        ["git", "describe", "--always"], capture_output=True, text=True, check=False
    )
    differs = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
    dirty = subprocess.run(differs, check=False).returncode == 1
    return (name.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def pin(core: int | None) -> None:
    """Keep every thread of this process, and those to come, on one core; None leaves them free."""
    if core is None:
        return
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def last_core() -> int:
    """The highest core this process may use: the one that interrupts visit least."""
    return max(os.sched_getaffinity(0))


def tissue(slide: Slide) -> ForegroundMask:
    """Saturated enough to be stained; good enough to keep everyone off the glass."""
    hsv = np.asarray(Image.fromarray(slide.thumbnail(8.0)).convert("HSV"))
    return ForegroundMask.from_array(
        hsv[..., 1] > 25, slide.dimensions, (slide.index.mpp_x, slide.index.mpp_y)
    )


Work = Callable[[int], Sized]
"""Block number -> the patches made, to be counted."""


@dataclass
class Series:
    """One reader's blocks: patches a second by the clock, and microseconds of CPU a patch."""

    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def in_turns(works: Mapping[str, Work], blocks: int) -> dict[str, Series]:
    """Run every work once a block, block 0 to warm up, nobody always first.

    Machines drift by 1.6 x within a run: only rates of the same block are compared.
    """
    names, out = [*works], {name: Series() for name in works}
    for k in range(blocks + 1):
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            clock, cpu_s = time.perf_counter(), time.process_time()
            patches = len(works[name](k))
            seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu_s
            if k:
                out[name].rates.append(patches / seconds)
                out[name].cpu_us.append(cpu_s / patches * 1e6)
    return out


def paired(ours: list[float], theirs: list[float]) -> str:
    """The median of ours / theirs over blocks, with the smallest and largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):6.2f} x  ({min(ratios):5.2f} to {max(ratios):5.2f})"


def write_out(lines: list[str], out: Path | None) -> None:
    """Print, and write a text that ends with one newline where asked."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
