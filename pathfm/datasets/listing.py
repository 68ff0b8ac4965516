"""Files of a data set, found and named without leaving its folder."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pathfm.runtime import PathfmError

if TYPE_CHECKING:
    from pathfm.datasets.benchmark import Facts

MAX_FILES = 2_000_000
_MAX_TABLE_BYTES = 512 << 20
_MAX_DEPTH = 16


def lacking(facts: Facts, root: Path, what: str) -> PathfmError:
    """The error for a copy that is not whole: what, where, the layout wanted, where to get it."""
    return PathfmError(
        f"{facts.name} at {root}: {what}. Wanted there: {facts.layout}. "
        f"Download: {facts.page} (licence {facts.licence})"
    )


def files_under(root: Path, folder: str, suffixes: Sequence[str]) -> list[str]:
    """Files below `root/folder` that end so (in any case), as POSIX paths relative to the root.

    Sorted by folder, then by name; hidden files and folders are left out. A link that leads out of
    the root is refused: a data set must not make us read what lies elsewhere.
    """
    return [path for path, _ in sorted(_walk(root, folder, tuple(suffixes)), key=_by_folder)]


def folders_in(root: Path) -> list[str]:
    """Names of the folders in the root, sorted; hidden ones are left out, links out of it refused."""
    real_root = root.resolve()
    try:
        with os.scandir(root) as entries:
            found = [entry for entry in entries if entry.name[0] != "." and entry.is_dir()]
    except OSError as error:
        raise PathfmError(f"{root}: cannot be listed: {error.strerror}") from None
    for entry in found:
        if entry.is_symlink():
            refuse_link_out(real_root, root / entry.name)
    return sorted(entry.name for entry in found)


def _by_folder(item: tuple[str, str]) -> tuple[str, str]:
    path, name = item
    return path[: -len(name)].rstrip("/"), name  # as os.walk tells them


def _walk(root: Path, folder: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    real_root = root.resolve()
    if (root / folder).is_dir():
        refuse_link_out(real_root, root / folder)
    waiting, found = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop()
        try:
            with os.scandir(root / here) as entries:
                listed = [entry for entry in entries if entry.name[0] != "."]
        except OSError as error:
            raise PathfmError(f"{root / here}: cannot be listed: {error.strerror}") from None
        for entry in listed:
            path = f"{here}/{entry.name}" if here else entry.name
            if entry.is_symlink():
                refuse_link_out(real_root, root / path)
            if entry.is_dir():
                if depth >= _MAX_DEPTH:  # also what ends a link to a folder above itself
                    raise PathfmError(f"{root / path}: deeper than {_MAX_DEPTH} folders")
                waiting.append((path, depth + 1))
            elif entry.name.lower().endswith(suffixes):
                found += 1
                if found > MAX_FILES:
                    raise PathfmError(f"{root}: more than {MAX_FILES:,} files")
                yield path, entry.name


def refuse_link_out(real_root: Path, path: Path) -> None:
    """`PathfmError` for a link that leads nowhere, or out of the root (which is resolved)."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise PathfmError(f"{path}: a link that leads nowhere; remove it") from None
    if not target.is_relative_to(real_root):
        raise PathfmError(
            f"{path}: a link out of the data set's folder {real_root}; copy the file there"
        )


def named_file(root: Path, name: str, where: str) -> str:
    """A file that a table names, as a POSIX path relative to the root.

    `PathfmError` (it begins with `where`) for an absolute path, one with `..`, one that leads out
    of the root by a link, and for no file.
    """
    path = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts:
        raise PathfmError(f"{where}: {name!r} is no path inside {root}; write it relative to it")
    file = root / path
    if not file.is_file():
        raise PathfmError(f"{where}: there is no file {file}")
    if not file.resolve().is_relative_to(root.resolve()):
        raise PathfmError(f"{where}: {name!r} is a link out of {root}; copy the file there")
    return path.as_posix()


def read_rows(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header that has at least these columns; cells are stripped.

    `PathfmError` for a table that is missing, larger than 512 MiB, no UTF-8 text, without one of
    the columns, or ragged.
    """
    rows: list[dict[str, str]] = []
    reader = csv.DictReader(io.StringIO(_text(table), newline=""), skipinitialspace=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in columns if name not in names]
        if missing:
            raise PathfmError(
                f"{table}: no column {' nor '.join(missing)} in its header ({', '.join(names)})"
            )
        if len(set(names)) != len(names):
            raise PathfmError(f"{table}: a column of its header comes twice")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                raise PathfmError(f"{table}: line {reader.line_num} has not {len(names)} cells")
            rows.append({key: cell.strip() for key, cell in row.items()})
            if len(rows) > MAX_FILES:
                raise PathfmError(f"{table}: more than {MAX_FILES:,} rows")
    except csv.Error as error:
        raise PathfmError(f"{table}: line {reader.line_num} is no CSV ({error})") from None
    return rows


def _text(table: Path) -> str:
    try:
        if table.stat().st_size > _MAX_TABLE_BYTES:
            raise PathfmError(f"{table}: larger than {_MAX_TABLE_BYTES >> 20} MiB")
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PathfmError(f"{table}: not a UTF-8 text file; save it as one") from None
    except OSError as error:
        raise PathfmError(f"{table}: cannot be read: {error.strerror}") from None


def read_groups(root: Path, paths: Sequence[str]) -> list[str]:
    """The group (patient, slide) of each picture by `root/groups.csv` (`path,group`); [] without it.

    Paths in it are relative to the root. `PathfmError` for one that comes twice, a picture without a
    group, and what `read_rows` refuses.
    """
    table = root / "groups.csv"
    if not os.path.lexists(table):
        return []
    refuse_link_out(root.resolve(), table)
    group_of: dict[str, str] = {}
    for row in read_rows(table, ("path", "group")):
        path = PurePosixPath(row["path"]).as_posix()
        if path in group_of:
            raise PathfmError(f"{table}: {path} comes twice; one row a picture")
        group_of[path] = row["group"]
    missing = [path for path in paths if not group_of.get(path)]
    if missing:
        raise PathfmError(
            f"{table}: {len(missing):,} of {len(paths):,} pictures have no group, first {missing[0]}"
        )
    return [group_of[path] for path in paths]


def read_table(table: Path) -> list[list[str]]:
    """Rows of a CSV file without a header, cells stripped, empty lines left out; bounds as above."""
    try:
        rows = csv.reader(io.StringIO(_text(table), newline=""))
        return [[cell.strip() for cell in row] for row in rows if row]
    except csv.Error as error:
        raise PathfmError(f"{table}: no CSV ({error})") from None
