"""One row of a cohort -> the index of its slide, by the rules of the row's source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from online_patching import SlideIndex, read_slide_index
from online_patching.errors import ObjectChangedError
from online_patching.formats import slide_id_of
from online_patching.stores import Stores
from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.patients import patient_in
from pathfm.cohorts.row import CohortRow, Mpp
from pathfm.cohorts.salting import Salt


def index_row(
    row: CohortRow,
    mpp: Mpp,
    stores: Stores,
    options: CohortOptions | None = None,
    salt: Salt | None = None,
) -> tuple[SlideIndex, CohortRow]:
    """The index of a row's slide, and the row with what only the slide's own header says.

    A slide whose source promises its bytes (`row.content`) must have the promised size, and is not pinned
    to an ETag, which its server may give or not. A DICOM series without a patient gets the salted id of its
    PatientID. Raises as `read_slide_index` does.
    """
    if row.content:
        _check_size(row, stores)
        index = read_slide_index(row.uri, mpp=mpp, stores=cast(Stores, _Unpinned(stores)))
        index = replace(index, token="")
    else:
        index = read_slide_index(row.uri, mpp=mpp, stores=stores)
    if row.name:
        index = replace(index, slide_id=slide_id_of(row.name))
    if not row.patient and salt is not None:
        row = replace(row, patient=salt.id("patient", patient_in(index, stores)))
    return index, row


def _check_size(row: CohortRow, stores: Stores) -> None:
    size = stores.version(row.uri)[0]
    if row.size_bytes and size != row.size_bytes:
        raise ObjectChangedError(
            row.uri,
            f"has {size:,} bytes where its manifest says {row.size_bytes:,}. Export the manifest anew.",
        )


class _Unpinned:
    """Stores that name no version of an object, for servers whose ETags come and go."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stores, name)

    def version(self, uri: str) -> tuple[int, str]:
        """Size in bytes, and no token."""
        return self._stores.version(uri)[0], ""
