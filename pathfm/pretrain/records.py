"""What a run leaves behind besides weights: sampled patches, pictures, a summary."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from online_patching import PatchBatch, PatchRef
from online_patching.stores.local import atomic_write_bytes
from pathfm.pictures import mosaic
from pathfm.runtime import PathfmError, console, make_folder
from pathfm.views import ViewSpec
from pathfm.views.render import make_views

SAMPLED = "sampled.jsonl"
_FIELDS = ("draw", "slide_id", "x_px0", "y_px0", "width_px0", "height_px0", "mpp")


class SampledLog:
    """sampled.jsonl: one line a sampled patch, in the order of the draws, none of them twice."""

    def __init__(self, path: Path, draws_done: int, rows_done: int, max_rows: int) -> None:
        """Opens the log with its first `rows_done` rows; later ones are drawn again.

        One that had reached its maximum stays as it is, also under a higher one: no gaps.
        """
        self.rows = rows_done
        self._max_rows = rows_done if rows_done < draws_done else max_rows
        kept = b"".join(_lines(path)[:rows_done])
        if kept.count(b"\n") < rows_done:
            raise PathfmError(
                f"{path} has {kept.count(bytes([10])):,} whole rows, the checkpoint speaks of "
                f"{rows_done:,}. It was cut or replaced: start a new run in another folder"
            )
        atomic_write_bytes(path, kept)
        self._file = path.open("ab")

    def append(self, refs: Sequence[PatchRef]) -> None:
        """Add a batch; rows past the maximum are left out."""
        refs = refs[: max(0, self._max_rows - self.rows)]
        rows = [{name: getattr(ref, name) for name in _FIELDS} for ref in refs]
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self.rows += len(rows)

    def sync(self) -> None:
        """Everything appended is on disk when this returns: call it before a checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> SampledLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_sampled(path: Path) -> list[dict[str, Any]]:
    """The rows of a sampled.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def sampling_facts(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Distinct patches and the realised share of each slide and magnification, largest first."""
    rows = list(rows)
    places = {(row["slide_id"], row["x_px0"], row["y_px0"], row["mpp"]) for row in rows}
    facts: dict[str, Any] = {"distinct_patches": len(places)}
    for name, field in (("slide_share", "slide_id"), ("mpp_share", "mpp")):
        counts = Counter(row[field] for row in rows)
        facts[name] = {str(key): n / len(rows) for key, n in counts.most_common()}
    return facts


def print_shares(facts: dict[str, Any], slides: Sequence[str], mpps: Sequence[float]) -> None:
    """The realised mix as two tables; a slide or µm/px that never came shows its 0 %."""
    for title, shares, wanted in (
        ("share of the sampled patches", facts["slide_share"], list(slides)),
        ("realised magnifications", facts["mpp_share"], [str(mpp) for mpp in mpps]),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("slide" if wanted == list(slides) else "µm/px")
        table.add_column("%", justify="right")
        every = sorted(wanted, key=lambda key: -shares.get(key, 0.0))
        for key in every[:100]:
            table.add_row(key, f"{100 * shares.get(key, 0.0):.2f}")
        if len(every) > 100:
            table.add_row(f"... and {len(every) - 100:,} more, in summary.json", "")
        console().print(table)


def save_mosaic(path: Path, batch: PatchBatch) -> None:
    """Sampled patches: a column a slide, two rows a magnification, finest first; white: none."""
    chosen, columns = choose_for_mosaic(batch.refs)
    blank = np.full_like(batch.pixels[0], 255)
    captions = [
        "" if i is None else f"{batch.refs[i].mpp:g} · {batch.refs[i].slide_id}" for i in chosen
    ]
    pictures = [blank if i is None else batch.pixels[i] for i in chosen]
    make_folder(path.parent)
    mosaic(pictures, captions, columns).save(path, quality=88)


def choose_for_mosaic(
    refs: Sequence[PatchRef], rows_a_mpp: int = 2, max_slides: int = 12
) -> tuple[list[int | None], int]:
    """Positions in `refs` row by row, None where a slide has no such patch; and the columns."""
    slides = sorted({ref.slide_id for ref in refs})[:max_slides]
    rows: list[list[int | None]] = []
    for mpp in sorted({ref.mpp for ref in refs}):
        cells = [
            [i for i, ref in enumerate(refs) if (ref.slide_id, ref.mpp) == (slide, mpp)]
            for slide in slides
        ]
        deep = min(rows_a_mpp, max(map(len, cells)))
        rows += [[cell[row] if row < len(cell) else None for cell in cells] for row in range(deep)]
    return [i for row in rows for i in row], len(slides)


def save_views(path: Path, batch: PatchBatch, specs: Sequence[ViewSpec], seed: int) -> None:
    """The batch's first patch and each of its views, as the network gets them at its draw."""
    pixels = torch.from_numpy(batch.pixels[:1])
    views = make_views(pixels, batch.draws[:1], specs, seed=seed, mean=(0.0,) * 3, std=(1.0,) * 3)
    pictures: list[NDArray[np.uint8]] = [batch.pixels[0]]
    captions = [f"patch, {batch.refs[0].mpp:g} µm/px"]
    for number, view in enumerate(views):
        pictures.append((view[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        captions.append(f"view {number}, {view.shape[-1]} px")
    make_folder(path.parent)
    mosaic(pictures, captions, columns=min(8, len(pictures)), tile_px=160).save(path, quality=92)


def _lines(path: Path) -> list[bytes]:
    """Whole lines of a file; a torn last one is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
