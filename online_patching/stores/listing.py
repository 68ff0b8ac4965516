"""What lies below a folder or prefix: one form for every store."""

from __future__ import annotations

import os
from dataclasses import dataclass

from online_patching.errors import ObjectNotFoundError, StoreError, redact

MOST_LISTED = 1_000_000
"""Objects that one listing may hold; more are refused rather than gathered."""


@dataclass(frozen=True, order=True, slots=True)
class Listed:
    """One object that a listing found: its URI, its size, and the token of this version ('' for none)."""

    uri: str
    size_bytes: int
    token: str


def list_folder(folder: str, most: int = MOST_LISTED) -> list[Listed]:
    """Every file below a local folder, by URI; or the file itself. Folders behind symlinks are not entered.

    ObjectNotFoundError when there is nothing, StoreError past `most` files or where one cannot look.
    """
    if not os.path.lexists(folder):
        raise ObjectNotFoundError(folder, "there is no such file or folder. Check the path.")
    found: list[Listed] = []
    try:
        if os.path.isfile(folder):
            found.append(_listed(folder, os.stat(folder)))
        waiting = [folder] if os.path.isdir(folder) else []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file():  # a link to nowhere is none
                        found.append(_listed(entry.path, entry.stat()))
            check_count(folder, len(found), most)
    except OSError as error:
        raise StoreError(folder, f"cannot be listed: {error.strerror}.") from None
    return in_order(folder, found)


def token_of(stat: os.stat_result) -> str:
    """What identifies a local file's version: it changes when the file is written."""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _listed(path: str, stat: os.stat_result) -> Listed:
    return Listed(path, stat.st_size, token_of(stat))


def in_order(prefix: str, found: list[Listed]) -> list[Listed]:
    """Sorted by URI; ObjectNotFoundError when there is nothing."""
    if not found:
        raise ObjectNotFoundError(redact(prefix), "there is nothing below it. Check the path.")
    return sorted(found)


def check_count(prefix: str, count: int, most: int) -> None:
    """StoreError when a listing has grown past what it may hold."""
    if count > most:
        raise StoreError(
            redact(prefix), f"more than {most:,} objects lie below it. List its parts one by one."
        )


def cannot_list(prefix: str) -> StoreError:
    """The error for http(s), which has no listing."""
    return StoreError(
        redact(prefix),
        "http(s) cannot list what lies below a URL. Give a table of URLs (CSV or Parquet) instead.",
    )
