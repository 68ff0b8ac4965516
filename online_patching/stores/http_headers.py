"""Headers that one server wants with every request, such as the token of a data commons.

They are named in the environment, so that every process of a run has them and no file of a run does:

    PATCHING_HTTP_HEADERS='{"https://api.gdc.cancer.gov": {"X-Auth-Token": "~/gdc-token.txt"}}'

A header belongs to one origin (scheme, host, port) and is sent nowhere else, not after a redirect either. Its
value is read from the file named, when it is first needed.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable

from yarl import URL

from online_patching.errors import StoreError

ENVIRONMENT = "PATCHING_HTTP_HEADERS"
MOST_VALUE_BYTES = 8 * 2**10
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_OWN = frozenset({"host", "range", "if-match", "accept-encoding", "connection", "content-length"})

_lock = threading.Lock()
_values: dict[str, tuple[tuple[str, str], ...]] = {}
_forget: list[Callable[[], None]] = []


def headers_for(url: URL) -> tuple[tuple[str, str], ...]:
    """(name, value) of the headers that this URL's server wants; StoreError where they cannot be read."""
    if not os.environ.get(ENVIRONMENT):
        return ()
    origin = str(url.origin())
    with _lock:
        if origin not in _values:
            told = _told().get(origin, {})
            _values[origin] = tuple((name, _value(name, path)) for name, path in told.items())
        return _values[origin]


def send_header(origin: str, name: str, file: str) -> None:
    """From now on, here and in processes started from here, send `origin` the header whose value `file` holds.

    StoreError when the file holds none.
    """
    _value(name, file)
    with _lock:
        told = _told()
        told[_origin(origin)] = {**told.get(_origin(origin), {}), name: file}
        os.environ[ENVIRONMENT] = json.dumps(told)
    forget()


def forget() -> None:
    """Read the environment and the files anew when they are next needed."""
    with _lock:
        _values.clear()
    for call in _forget:
        call()


def on_forget(call: Callable[[], None]) -> None:
    """Have something that keeps headers told when they may have changed."""
    _forget.append(call)


def _told() -> dict[str, dict[str, str]]:
    """What the environment says: origin -> name -> file."""
    try:
        found = json.loads(os.environ.get(ENVIRONMENT) or "{}")
        return {
            _origin(origin): {str(name): str(file) for name, file in headers.items()}
            for origin, headers in found.items()
        }
    except (ValueError, AttributeError, RecursionError):
        raise StoreError(
            ENVIRONMENT, 'is not {"https://host": {"Header-Name": "/path/of/a/file"}}.'
        ) from None


def _origin(text: str) -> str:
    return str(URL(text).origin())


def _value(name: str, file: str) -> str:
    """A header's value: the one line in its file. Messages never hold any of it."""
    if not _NAME.fullmatch(name) or name.lower() in _OWN:
        raise StoreError(ENVIRONMENT, f"names {name[:40]!r}, which is no header to be added.")
    try:
        with open(os.path.expanduser(file), "rb") as handle:
            text = handle.read(MOST_VALUE_BYTES + 1).decode("latin-1").strip()
    except OSError as error:
        raise StoreError(file, f"the value of {name} cannot be read: {error.strerror}.") from None
    if len(text) > MOST_VALUE_BYTES or not _VALUE.fullmatch(text):
        raise StoreError(file, f"does not hold the value of {name}: one line of plain characters.")
    return text
