"""Synthetic slides as OME-Zarr, Zarr v2 (0.4) or v3 (0.5), sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from online_patching.testing.drawing import SyntheticSlide
from online_patching.testing.writers import (
    Picture,
    Progress,
    default_downsamples,
    draw_level0,
    pyramid,
)


def write_ome_zarr(
    path: Path | str,
    slide: SyntheticSlide,
    *,
    version: Literal["0.4", "0.5"] = "0.4",
    chunk_px: int = 256,
    channel_chunk: Literal[1, 3] = 3,
    compressor: Literal["zstd", "blosc", "gzip", "none"] = "zstd",
    shard_px: int | None = None,
    downsamples: Sequence[float] | None = None,
    level0: Picture | None = None,
    progress: Progress | None = None,
) -> Path:
    """An OME-Zarr multiscale image with axes c, y, x at `path` (a folder); returns the path.

    0.4 is Zarr v2 with "/" between chunk indices, 0.5 is Zarr v3; `shard_px` (0.5 only, a multiple
    of `chunk_px`) packs chunks into shards. Unit micrometer; scales are exact per level.
    """
    import zarr

    path = Path(path)
    level0 = draw_level0(slide, progress) if level0 is None else level0
    scales = default_downsamples(slide) if downsamples is None else tuple(downsamples)
    levels = pyramid(level0, scales)
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    for number, picture in enumerate(levels):
        channels_first = np.ascontiguousarray(np.moveaxis(picture, 2, 0))
        more: dict[str, Any] = {"compressors": _zarr_compressor(version, compressor)}
        if version == "0.4":
            more["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        elif shard_px:
            more["shards"] = (3, shard_px, shard_px)
        array = group.create_array(
            str(number), shape=channels_first.shape, dtype="uint8",
            chunks=(channel_chunk, chunk_px, chunk_px), fill_value=0, **more,
        )  # fmt: skip
        array[:] = channels_first
    multiscales = [_multiscale(slide, levels, version)]
    if version == "0.4":
        group.attrs["multiscales"] = multiscales
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    return path


def _zarr_compressor(version: str, name: str) -> Any:
    if name == "none":
        return None
    if version == "0.4":
        import numcodecs  # type: ignore[import-untyped]

        old = {"zstd": numcodecs.Zstd(3), "blosc": numcodecs.Blosc(), "gzip": numcodecs.GZip(5)}
        return old[name]
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

    new = {"zstd": ZstdCodec(level=3), "blosc": BloscCodec(), "gzip": GzipCodec(level=5)}
    return new[name]


def _multiscale(slide: SyntheticSlide, levels: Sequence[Picture], version: str) -> dict[str, Any]:
    def scale(picture: Picture) -> list[float]:
        height, width = levels[0].shape[:2]
        return [1.0, slide.mpp * height / picture.shape[0], slide.mpp * width / picture.shape[1]]

    made: dict[str, Any] = {
        "name": f"synthetic-{slide.seed}",
        "axes": [
            {"name": "c", "type": "channel"},
            {"name": "y", "type": "space", "unit": "micrometer"},
            {"name": "x", "type": "space", "unit": "micrometer"},
        ],
        "datasets": [
            {
                "path": str(number),
                "coordinateTransformations": [{"type": "scale", "scale": scale(picture)}],
            }
            for number, picture in enumerate(levels)
        ],
    }
    return {**made, "version": "0.4"} if version == "0.4" else made
