"""Slides as Zarr: OME-Zarr 0.4 (Zarr v2) and 0.5 (v3), bioformats2raw containers and plain arrays; sharded or
not, with every codec and order of axes that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

Axes = Literal["cyx", "yxc", "tczyx"]


@dataclass(frozen=True)
class Storage:
    """How an array is stored. `compressor` is zstd, blosc, gzip, zlib (v2), jpeg (v2, axes y, x, c), none, or a
    Blosc by name, number and block size: "blosc-lz4-2-0" (compressor, shuffle, bytes; 0: its own choice).

    `shard_px` (v3) packs chunks; `table` tells where its table is, and "end-unchecked" leaves out its CRC.
    `crc32c` (v3) adds a checksum to each chunk. `order` "F" stores the last axis slowest: by v2's order, by
    v3's transpose codec.
    """

    version: Literal[2, 3] = 2
    chunk_px: int = 256
    channel_chunk: int = 3
    compressor: str = "zstd"
    axes: Axes = "cyx"
    shard_px: int | None = None
    table: Literal["start", "end", "end-unchecked"] = "end"
    crc32c: bool = False
    order: Literal["C", "F"] = "C"
    separator: Literal["/", "."] = "/"
    fill: int = 0

    def shape(self, size_px: int | tuple[int, int], channels: int) -> tuple[int, ...]:
        """The shape along `axes` of something so many pixels high and wide."""
        high, wide = size_px if isinstance(size_px, tuple) else (size_px, size_px)
        sizes = {"y": high, "x": wide, "c": channels}
        return tuple(sizes.get(axis, 1) for axis in self.axes)

    def arranged(self, picture: Picture) -> Picture:
        """A picture (y, x, c) in the order of `axes`."""
        axes = [axis for axis in self.axes if axis in "cyx"]
        turned = picture.transpose(["yxc".index(axis) for axis in axes])
        return np.ascontiguousarray(
            turned.reshape(self.shape((picture.shape[0], picture.shape[1]), picture.shape[2]))
        )


def write_ome_zarr(
    path: Path | str,
    slide: SyntheticSlide,
    *,
    version: Literal["0.4", "0.5"] = "0.4",
    chunk_px: int = 256,
    channel_chunk: Literal[1, 3] = 3,
    compressor: str = "zstd",
    shard_px: int | None = None,
    downsamples: Sequence[float] | None = None,
    level0: Picture | None = None,
    progress: Progress | None = None,
    storage: Storage | None = None,
    container: bool = False,
    consolidated: bool = False,
) -> Path:
    """An OME-Zarr multiscale image at `path` (a folder); returns the path. Axes c, y, x, if `storage` does
    not say otherwise; it also takes the place of `chunk_px` to `shard_px`.

    0.4 is Zarr v2 with "/" between chunk indices, 0.5 is Zarr v3; `shard_px` (0.5 only, a multiple
    of `chunk_px`) packs chunks into shards. Unit micrometer; scales are exact per level. A `container` has
    the image in its group "0", as bioformats2raw writes it.
    """
    import zarr

    path = Path(path)
    number: Literal[2, 3] = 2 if version == "0.4" else 3
    storage = storage or Storage(number, chunk_px, channel_chunk, compressor, shard_px=shard_px)
    level0 = draw_level0(slide, progress) if level0 is None else level0
    scales = default_downsamples(slide) if downsamples is None else tuple(downsamples)
    levels = pyramid(level0, scales)
    group = root = zarr.open_group(str(path), mode="w", zarr_format=number)
    if container:
        layout: dict[str, Any] = {"bioformats2raw.layout": 3}
        root.attrs.update(layout if version == "0.4" else {"ome": {"version": "0.5", **layout}})
        group = root.create_group("0")
    for level, picture in enumerate(levels):
        _create(group, str(level), picture, storage)
    multiscales = [_multiscale(slide, levels, version, storage.axes)]
    if version == "0.4":
        group.attrs["multiscales"] = multiscales
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    if consolidated:
        zarr.consolidate_metadata(root.store)
    return path


def write_zarr_array(path: Path | str, picture: Picture, storage: Storage | None = None) -> Path:
    """A picture (y, x, c) as a plain array without µm/px; returns the path."""
    import zarr

    storage = storage or Storage()
    path = Path(path)
    store = zarr.storage.LocalStore(str(path))
    _create(store, "", picture, storage)
    return path


def _create(place: Any, name: str, picture: Picture, storage: Storage) -> None:
    """One array in a group (or as a store's root)."""
    import zarr

    values = storage.arranged(picture)
    create = place.create_array if name else zarr.create_array
    where = {"name": name} if name else {"store": place, "zarr_format": storage.version}
    array = create(
        **where, shape=values.shape, dtype="uint8", fill_value=storage.fill, **_layout(storage)
    )
    array[...] = values


def _layout(storage: Storage) -> dict[str, Any]:
    chunk = storage.shape(storage.chunk_px, storage.channel_chunk)
    if storage.version == 2:
        return {
            "chunks": chunk, "compressors": _compressor_2(storage.compressor), "order": storage.order,
            "chunk_key_encoding": {"name": "v2", "separator": storage.separator},
        }  # fmt: skip
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec

    turned = [TransposeCodec(order=tuple(range(len(chunk)))[::-1])] if storage.order == "F" else []
    last = [c for c in [_compressor_3(storage.compressor)] if c is not None]
    last += [Crc32cCodec()] if storage.crc32c else []
    keys = {"name": "default", "separator": storage.separator}
    more = {"chunk_key_encoding": keys, "dimension_names": list(storage.axes)}
    if storage.shard_px is None:
        return {"chunks": chunk, "filters": turned, "compressors": last, **more}
    codec = ShardingCodec(
        chunk_shape=chunk, codecs=[*turned, BytesCodec(), *last],
        index_codecs=[BytesCodec()] if storage.table == "end-unchecked" else [BytesCodec(), Crc32cCodec()],
        index_location="start" if storage.table == "start" else "end",
    )  # fmt: skip
    shard = storage.shape(storage.shard_px, storage.channel_chunk)
    return {"chunks": shard, "serializer": codec, "compressors": None, "filters": None, **more}


def _blosc(name: str) -> tuple[str, int, int]:
    """Compressor, shuffle and block size of "blosc-lz4-2-0"."""
    parts = [*name.split("-")[1:], "lz4", "1", "0"][:3] if name != "blosc" else ["lz4", "1", "0"]
    return parts[0], int(parts[1]), int(parts[2])


def _compressor_2(name: str) -> Any:
    import numcodecs  # type: ignore[import-untyped]

    if name.startswith("blosc"):
        cname, shuffle, block = _blosc(name)
        return numcodecs.Blosc(cname, 5, shuffle, block)
    if name == "jpeg":
        import imagecodecs.numcodecs

        imagecodecs.numcodecs.register_codecs("imagecodecs_jpeg", verbose=False)
        return imagecodecs.numcodecs.Jpeg(level=85)
    made = {"zstd": numcodecs.Zstd, "gzip": numcodecs.GZip, "zlib": numcodecs.Zlib}
    return None if name == "none" else made[name](level=3)


def _compressor_3(name: str) -> Any:
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

    if name.startswith("blosc"):
        cname, shuffle, block = _blosc(name)
        kinds = ("noshuffle", "shuffle", "bitshuffle")
        given: Any = {"cname": cname, "shuffle": kinds[shuffle]}
        return BloscCodec(clevel=5, blocksize=block, typesize=1, **given)
    made: dict[str, Any] = {"zstd": ZstdCodec(level=3), "gzip": GzipCodec(level=3), "none": None}
    return made[name]


def _multiscale(
    slide: SyntheticSlide, levels: Sequence[Picture], version: str, axes: str
) -> dict[str, Any]:
    def scale(picture: Picture) -> list[float]:
        height, width = levels[0].shape[:2]
        um = {"y": slide.mpp * height / picture.shape[0], "x": slide.mpp * width / picture.shape[1]}
        return [um.get(axis, 1.0) for axis in axes]

    kinds = {"c": "channel", "t": "time"}
    made: dict[str, Any] = {
        "name": f"synthetic-{slide.seed}",
        "axes": [
            {"name": a, "type": kinds.get(a, "space")} | ({"unit": "micrometer"} if a in "zyx" else {})
            for a in axes
        ],
        "datasets": [
            {
                "path": str(number),
                "coordinateTransformations": [{"type": "scale", "scale": scale(picture)}],
            }
            for number, picture in enumerate(levels)
        ],
    }  # fmt: skip
    return {**made, "version": "0.4"} if version == "0.4" else made
