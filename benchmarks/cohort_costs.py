"""What a cohort of 100,000 slides costs before a slide is read: its table, its salted ids, its splits, its twins.

    python benchmarks/cohort_costs.py [--rows N] [--twins N] [--out FILE]

Each in a process of its own. The peer is pandas reading the same table into strings, which resolves no path,
checks no patient and salts nothing. Twins are sought among prints of one size, the dearest case; and what copies
of the real slides in other codecs, tilings and pyramids differ by is measured, as the limits in
`pathfm/cohorts/twins.py` want it.
"""

from __future__ import annotations

import argparse
import base64
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from common import about_this_run, write_out

from online_patching import open_slide, read_slide_index
from online_patching.stores import Stores
from pathfm.cohorts import Cohort, find_cohort, find_twins, fingerprint

WSI = Path(__file__).parent.parent / "../shared/data/wsi"
REAL = ("vendor/CMU-1-Small-Region.svs", "converted/metastatic_sarcoma_liver_HE_crop4096.svs")
WAYS = (("jpeg", 30, 256), ("jpeg", 90, 512), ("zlib", None, 256))


def main() -> None:
    """Measure everything, print it, write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--twins", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(part(args.part[0], Path(args.part[1]), args.twins))
        return
    lines = [about_this_run("pandas", "pyarrow", "numpy")]
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder), args.rows)
        lines += [f"{args.rows:,} rows, {args.twins:,} prints of one size", ""]
        lines.append(f"{'what':<34}{'CPU, s':>9}{'memory, MB':>12}")
        for name in ("imports", "pandas", "csv", "parquet", "salted", "splits", "twins"):
            command = [sys.executable, __file__, "--part", name, str(table)]
            command += ["--twins", str(args.twins)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            lines.append(done.stdout.rstrip("\n"))
        lines += ["", *differences(Path(folder))]
    write_out(lines, args.out)


def write_table(folder: Path, rows: int) -> Path:
    """A CSV of slides in a bucket, three a patient, and the same as Parquet beside it."""
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    table = folder / "cohort.csv"
    with table.open("w") as file:
        file.write("uri,patient,case,stain,site,label\n")
        for i in range(rows):
            file.write(
                f"s3://bucket/site{i % 40}/slide-{i:06d}.svs,patient-{i // 3},block-{i // 2},"
            )
            file.write(f"HE,site{i % 40},tumour\n")
    pq.write_table(pc.read_csv(table), table.with_suffix(".parquet"))
    return table


def part(name: str, table: Path, twins: int) -> str:
    """One line: the CPU seconds and the memory of one piece of work, imports apart."""
    cohort = find_cohort([str(table)]) if name == "splits" else Cohort(())
    prints = _prints(twins) if name == "twins" else []
    if name == "pandas":
        import pandas
    began_s, before = time.process_time(), _peak_mb()
    if name == "pandas":
        pandas.read_csv(table, dtype=str)
    elif name == "csv":
        find_cohort([str(table)])
    elif name == "parquet":
        find_cohort([str(table.with_suffix(".parquet"))])
    elif name == "salted":
        find_cohort([str(table)], beside=table.parent / "corpus")
    elif name == "splits":
        cohort.with_splits({"train": 0.8, "test": 0.2}, seed=0)
    elif name == "twins":
        find_twins(prints)
    told = {
        "csv": "find_cohort, CSV",
        "parquet": "find_cohort, Parquet",
        "salted": "the same, CSV, salted",
    }
    spent_s, grown = time.process_time() - began_s, _peak_mb() - before
    return (
        f"{told.get(name, name):<34}{spent_s:>9.2f}{grown if name != 'imports' else before:>12.0f}"
    )


def _prints(count: int) -> list[tuple[str, tuple[int, int], str]]:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (count, 256)).astype(np.uint8)
    return [
        (str(i), (9, 9), base64.b64encode(row.tobytes()).decode()) for i, row in enumerate(data)
    ]


def _peak_mb() -> float:
    """The most memory that this process held: getrusage would count what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def differences(folder: Path) -> list[str]:
    """How far the prints of re-encoded real slides are from the original's, in grey levels."""
    lines = [f"{'copies of':<46}{'as':<18}{'RMS':>7}{'mean':>7}{'contrast':>10}"]
    for name in REAL:
        if not (WSI / name).exists():
            return [*lines, "no real slides here"]
        with open_slide(str(WSI / name), mpp=0.5) as slide:
            pixels = slide.read_region((0, 0), 0, slide.dimensions)
        first = _print_of(WSI / name)
        for codec, level, tile in WAYS:
            copy = folder / "copy.tif"
            more: dict[str, Any] = {"compressionargs": {"level": level}} if level else {}
            tifffile.imwrite(
                copy, pixels, tile=(tile, tile), compression=codec, photometric="rgb", **more
            )
            apart = first - _print_of(copy)
            told = f"{codec} {level or ''} {tile} px"
            lines.append(
                f"{Path(name).name:<46}{told:<18}{apart.std():>7.2f}{apart.mean():>7.2f}{first.std():>10.1f}"
            )
    return lines


def _print_of(path: Path) -> np.ndarray:
    stores = Stores()
    index = replace(read_slide_index(str(path), mpp=0.5, stores=stores), token="")
    data = base64.b64decode(fingerprint(index, stores))
    stores.close()
    return np.frombuffer(data, np.uint8).astype(float)


if __name__ == "__main__":
    main()
