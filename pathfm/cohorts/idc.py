"""A manifest of the Imaging Data Commons -> one DICOM series a slide, read where it lies.

The portal's manifest is a list of s5cmd commands, a series (`cp s3://bucket/series/* .`) or an instance
(`cp s3://bucket/series/instance.dcm .`) a line; its comments name the endpoint it is meant for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pathfm.cohorts.row import CohortRow
from pathfm.runtime import PathfmError

_COPY = re.compile(r"""^\s*(?:cp|sync)\s+(?:-\S+\s+)*["']?((?:s3|gs)://[^\s"']+)""")
_SERIES = re.compile(r"((?:s3|gs)://[^/]+(?:/[^/*]+)+)/(?:\*|[^/*]+)")
_GOOGLE = re.compile(r"--endpoint-url\s+https://storage\.googleapis\.com")


def is_manifest(head: str) -> bool:
    """Whether a text begins as an s5cmd manifest does: comments, then commands that copy."""
    for line in head.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            return bool(_COPY.match(line))
    return False


def read_manifest(name: str, text: str) -> Iterator[CohortRow]:
    """The series of a manifest, each once; instances of one folder are one series.

    A manifest made for Google's endpoint says s3:// and means gs://.
    """
    google = any(_GOOGLE.search(line) for line in text.splitlines() if line.lstrip()[:1] == "#")
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        uri = _series(line)
        if uri is None:
            raise PathfmError(
                f"{name}, line {number}: not `cp s3://bucket/series/* .`. DICOM files outside of a "
                "folder of their series are not read: export the manifest anew."
            )
        if google:
            uri = re.sub(r"^s3:", "gs:", uri)
        if uri not in seen:
            seen.add(uri)
            yield CohortRow(uri)


def _series(line: str) -> str | None:
    copied = _COPY.match(line)
    series = _SERIES.fullmatch(copied[1]) if copied else None
    return f"{series[1]}/" if series else None
