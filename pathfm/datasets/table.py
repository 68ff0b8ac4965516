"""A CSV of labelled samples: pictures, places in slides, or whole slides.

Which one its header tells: `path,label` are pictures beside the table; `slide,x_um,y_um,label` (or
`x_px0,y_px0`) are centres of patches, read through the byte ranges of the slides; `slide,label` are
slides. `split`, `group`, `mpp` and `slide_mpp` are optional in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from online_patching.stores import is_ranged, is_remote, redact
from pathfm.datasets.benchmark import SPLITS, Benchmark, Facts, SlideSource, Source, Task
from pathfm.datasets.listing import files_under, named_file, read_rows, refuse_link_out
from pathfm.datasets.slide_patches import Place, SlidePatches
from pathfm.datasets.sources import PictureFiles, SlideFiles, assemble
from pathfm.runtime import PathfmError

Rows = Sequence[dict[str, str]]


def open_table(table: Path, *, mpp: float | None = None, size_px: int = 224) -> Benchmark:
    """The samples of a CSV file in its order; paths in it are relative to its folder.

    Patches in slides are `size_px` pixels at `mpp` µm/px (else at the column's `mpp`), the same
    places whatever the mpp; their group is the slide where no group is told. `PathfmError` for a table
    without samples or with fewer than two classes, a sample that comes twice, a split that is none, some
    rows without one, or a group in two splits.
    """
    if not table.is_file():
        raise PathfmError(f"table {table}: there is no such file")
    rows = read_rows(table, ("label",))
    if not rows:
        raise PathfmError(f"{table}: a header and no rows")
    classes = tuple(sorted({row["label"] for row in rows}))
    if "" in classes:
        lacking = [number for number, row in enumerate(rows, 1) if not row["label"]]
        raise PathfmError(
            f"{table}: {len(lacking):,} of {len(rows):,} rows have no label, first row {lacking[0]:,}: "
            "label them, or leave them out"
        )
    if len(classes) < 2:
        raise PathfmError(
            f"{table}: all {len(rows):,} rows are of class {classes[0]!r}; a probe needs two classes"
        )
    splits = _splits(table, rows)
    task, paths, source, at_mpp = _samples(table, rows, mpp, size_px)
    _refuse_twice(table, rows, paths, at_mpp)
    found = assemble(
        _facts(table, task, classes, splits),
        table.parent,
        paths,
        labels=[classes.index(row["label"]) for row in rows],
        splits=splits,
        groups=_groups(table, rows, paths, source),
        source=source,
        mpp=at_mpp,
    )
    refuse_torn(found)
    return found


def refuse_torn(found: Benchmark) -> None:
    """`PathfmError` when a group (patient, slide) has samples in two splits."""
    torn = found.torn_groups()
    if torn:
        raise PathfmError(
            f"{found.name}: {len(torn):,} groups are in more than one split, first {torn[0]!r}; "
            f"what is judged must not have been learnt"
        )


def _refuse_twice(table: Path, rows: Rows, paths: Sequence[str], at_mpp: Sequence[float]) -> None:
    """`PathfmError` for a file, a slide or a place (at one µm/px) in two rows, whatever their labels."""
    places = "x_um" in rows[0] or "x_px0" in rows[0]
    first: dict[tuple[str, ...], int] = {}
    for number, (path, row, mpp) in enumerate(zip(paths, rows, at_mpp, strict=True), start=1):
        key = (path, f"{mpp:g}", row.get("slide_mpp", "")) if places else (path,)
        if key in first:
            asked = (
                "; of http(s) slides nothing behind '?' tells them apart" if is_remote(path) else ""
            )
            raise PathfmError(
                f"{table}: rows {first[key]:,} and {number:,} are one sample, {path!r}: it would be "
                f"learnt and judged, or count twice{asked}. Leave one out"
            )
        first[key] = number


def _groups(table: Path, rows: Rows, paths: Sequence[str], source: object) -> list[str]:
    """The column `group`; of places whose rows have none, the slide: its patches are neighbours."""
    told = [row.get("group", "") for row in rows]
    if not isinstance(source, SlidePatches):
        return told
    slides = [path.rpartition("#")[0] for path in paths]
    grouped = {slide for slide, group in zip(slides, told, strict=True) if group}
    for number, (slide, group) in enumerate(zip(slides, told, strict=True), start=1):
        if not group and slide in grouped:
            raise PathfmError(
                f"{table}: row {number:,} has no group, and other rows of {slide!r} have one; give all one"
            )
    return [group or slide for group, slide in zip(told, slides, strict=True)]


def _facts(table: Path, task: Task, classes: tuple[str, ...], splits: Sequence[str]) -> Facts:
    return Facts(
        name=table.stem,
        title=table.name,
        task=task,
        classes=classes,
        mpp=math.nan,
        counts={},
        licence="",
        page="",
        layout="",
        reported="test" if "test" in splits else "val",
    )


def _splits(table: Path, rows: Rows) -> list[str]:
    splits = [row.get("split", "") for row in rows]
    wrong = set(splits) - {"", *SPLITS}
    if wrong:
        raise PathfmError(f"{table}: split {min(wrong)!r}; wanted {', '.join(SPLITS)}")
    if any(splits) and not all(splits):
        raise PathfmError(f"{table}: {splits.count(''):,} rows have no split, the others have one")
    return splits


def _samples(
    table: Path, rows: Rows, mpp: float | None, size_px: int
) -> tuple[Task, list[str], Source | SlideSource, list[float]]:
    columns, root = rows[0].keys(), table.parent
    if "path" in columns:
        paths = [named_file(root, row["path"], str(table)) for row in rows]
        pictures = PictureFiles(root, tuple(paths))
        return "classification", paths, pictures, _numbers(table, rows, "mpp", math.nan)
    if "slide" not in columns:
        raise PathfmError(f"{table}: wants a column path, or slide, beside label")
    at = {name: _slide(root, name, table) for name in dict.fromkeys(row["slide"] for row in rows)}
    slides = [at[row["slide"]] for row in rows]
    for x, y in (("x_um", "y_um"), ("x_px0", "y_px0")):
        if x in columns and y in columns:
            return _patches(table, rows, slides, (x, y), mpp, size_px)
    at_mpp = _numbers(table, rows, "slide_mpp", math.nan)
    return "slide", [_name(slide) for slide in slides], SlideFiles(root, tuple(slides)), at_mpp


def _patches(
    table: Path,
    rows: Rows,
    slides: Sequence[str],
    columns: tuple[str, str],
    mpp: float | None,
    size_px: int,
) -> tuple[Task, list[str], Source, list[float]]:
    at_mpp = _numbers(table, rows, "mpp", math.nan) if mpp is None else [mpp] * len(rows)
    if not all(0 < value < math.inf for value in at_mpp):
        raise PathfmError(f"{table}: no µm/px for its patches; give mpp, or a column mpp")
    if not 1 <= size_px <= 8192:
        raise PathfmError(f"{table}: patches of {size_px:,} px; wanted 1 to 8,192")
    xs, ys = (_numbers(table, rows, column, None) for column in columns)
    slide_mpps = _numbers(table, rows, "slide_mpp", 0.0)
    in_px0 = columns[0] == "x_px0"
    places = tuple(
        Place(slide if is_remote(slide) else str(table.parent / slide), x, y, in_px0, slide_mpp)
        for slide, x, y, slide_mpp in zip(slides, xs, ys, slide_mpps, strict=True)
    )
    unit = "px0" if in_px0 else "um"
    paths = [f"{_name(s)}#{x:.10g},{y:.10g} {unit}" for s, x, y in zip(slides, xs, ys, strict=True)]
    return (
        "classification",
        paths,
        SlidePatches(places, np.asarray(at_mpp), size_px, mpp is not None),
        at_mpp,
    )


def _slide(root: Path, name: str, table: Path) -> str:
    """A URI as it is; a path only inside the table's folder. A DICOM slide is a folder."""
    if is_remote(name):
        if not is_ranged(name):  # fsspec's local:// and its chains would read any file here
            raise PathfmError(
                f"{table}: {redact(name)!r}: slides are read from http(s), s3, gs and az, or from beside "
                "the table; copy it there"
            )
        return name
    path = PurePosixPath(name)
    if name and "\0" not in name and ".." not in path.parts and (root / path).is_dir():
        refuse_link_out(root.resolve(), root / path)
        files_under(root, path.as_posix(), ("",))  # its files are no links out either
        return path.as_posix()
    return named_file(root, name, str(table))


def _name(slide: str) -> str:
    """What a slide is called in files and messages: a URI without password and signature."""
    return redact(slide) if is_remote(slide) else slide


def _numbers(table: Path, rows: Rows, column: str, missing: float | None) -> list[float]:
    """A column of finite numbers, `missing` where it or a cell is not there; None: it must be."""
    found = []
    for number, row in enumerate(rows, start=1):
        cell = row.get(column, "")
        try:
            value = missing if not cell and missing is not None else float(cell)
        except ValueError:
            raise PathfmError(f"{table}: row {number}: {column} {cell!r} is no number") from None
        if cell and not math.isfinite(value):
            raise PathfmError(f"{table}: row {number}: {column} {cell!r} is not finite")
        found.append(value)
    return found
