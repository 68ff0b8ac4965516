"""What the native decoder must know of a Zarr chunk, in the form that it reads."""

from __future__ import annotations

from online_patching.slide_index import Codec


def native_spec(codec: Codec) -> bytes | None:
    """The description of a chunk codec for the native decoder; None where only the portable one knows it."""
    del codec
    return None
