"""µm/px for slides whose files carry none, or a wrong one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from online_patching.slide_index import MPP_SANE_RANGE
from online_patching.stores import is_remote, local_path
from pathfm.cohorts.records import read_csv
from pathfm.runtime import PathfmError


class MppOverrides:
    """µm/px for slides: columns file, and mpp or mpp_x and mpp_y, and maybe source.

    A row is matched by the file's name, or by a longer ending of its path where `file` has
    folders in it; the longest match wins.
    """

    def __init__(
        self,
        table: Mapping[str, float | tuple[float, float]],
        source: str = "",
        hide_names: bool = False,
    ) -> None:
        self.table, self.source, self._hide_names = dict(table), source, hide_names
        self._used: set[str] = set()

    @classmethod
    def read(cls, path: Path, hide_names: bool = False) -> MppOverrides:
        """The table in a CSV; `PathfmError` names the line of an absurd or doubled value.

        With `hide_names`, rows that no slide matched are counted, not named.
        """
        table: dict[str, float | tuple[float, float]] = {}
        records = read_csv(path, required=("file",))
        if records and not {"mpp", "mpp_x"} & set(records[0][1]):
            found = ", ".join(sorted(records[0][1]))
            raise PathfmError(f"{path}: no column 'mpp' (nor 'mpp_x' and 'mpp_y'); found: {found}")
        for line, record in records:
            where = f"{path}, line {line}"
            name = str(PurePosixPath(record["file"]))
            mpp = mpp_of(record, where)
            if mpp is None:
                raise PathfmError(f"{where}: no µm/px for {name}")
            check_mpp(mpp, where)
            if table.setdefault(name, mpp) != mpp:
                raise PathfmError(
                    f"{where}: {name} has two values, {_told(table[name])} and {_told(mpp)} µm/px"
                )
        return cls(table, str(path), hide_names)

    def find(self, uri: str) -> float | tuple[float, float] | None:
        """The µm/px told for a slide by its URI or name, or None; a link is known by its target too."""
        found = self._find(uri)
        if found is None and not is_remote(uri) and os.path.islink(local_path(uri)):
            return self._find(os.readlink(local_path(uri)))
        return found

    def _find(self, uri: str) -> float | tuple[float, float] | None:
        name = str(PurePosixPath(uri.partition("?")[0]))
        while name:
            if name in self.table:
                self._used.add(name)
                return self.table[name]
            name = name.partition("/")[2]
        return None

    @property
    def unmatched(self) -> list[str]:
        """Rows that no slide asked for so far: a typo, or a slide that is not there."""
        left = [name for name in self.table if name not in self._used]
        return [f"{len(left):,} files"] if left and self._hide_names else left


def mpp_of(record: Mapping[str, str], where: str) -> float | tuple[float, float] | None:
    """The µm/px in a table's row: columns mpp, or mpp_x and mpp_y; None where it says nothing."""
    x, y = record.get("mpp_x", ""), record.get("mpp_y", "")
    if bool(x) != bool(y):
        raise PathfmError(f"{where}: mpp_x and mpp_y go together; one of them is empty")
    if x:
        told = (_number(x, where), _number(y, where))
        return told[0] if told[0] == told[1] else told
    return _number(record["mpp"], where) if record.get("mpp") else None


def check_mpp(mpp: float | tuple[float, float], where: str) -> None:
    """Raises `PathfmError` for µm/px that no scanner makes."""
    low, high = MPP_SANE_RANGE
    for value in mpp if isinstance(mpp, tuple) else (mpp,):
        if not low <= value <= high:
            raise PathfmError(
                f"{where}: {value:g} µm/px is outside {low:g} to {high:g}: not a scan"
            )


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PathfmError(f"{where}: {text!r} is not a number of µm/px") from None


def _told(mpp: float | tuple[float, float]) -> str:
    return " x ".join(f"{v:g}" for v in mpp) if isinstance(mpp, tuple) else f"{mpp:g}"
