"""Slides in every cloud give the pixels they give on disk: opened, indexed, loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from online_patching import ForegroundMask, PatchLoader, PatchSampler, open_slide, read_slide_index
from online_patching.testing import Storage, SyntheticSlide, write_ome_zarr
from tests.cloud_servers import CloudServer


@pytest.mark.parametrize("name", ["s3_cloud", "gcs_cloud", "azure_cloud"])
def test_a_slide_in_a_cloud_is_the_slide_on_disk(
    name: str, request: pytest.FixtureRequest, small_slides: list[Path], monkeypatch
) -> None:
    cloud: CloudServer = request.getfixturevalue(name)
    cloud.enter(monkeypatch)
    local = small_slides[0]
    uri = cloud.put("cohort/a b+#1.svs", local.read_bytes())
    with open_slide(uri) as there, open_slide(str(local)) as here:
        for _ in range(2):
            ours = there.read_patch(x_um=200.0, y_um=150.0, mpp=0.5, size_px=224)
            assert np.array_equal(
                ours, here.read_patch(x_um=200.0, y_um=150.0, mpp=0.5, size_px=224)
            )
    assert batches_of(uri) == batches_of(str(local))


def batches_of(
    uri: str, size_px: int = 224, mpp: tuple[float, float] = (0.2531, 1.0)
) -> list[bytes]:
    index = read_slide_index(uri)
    mask = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [mask], size_px=size_px, mpp=list(mpp), seed=3)
    with PatchLoader(sampler, batch_size=4, threads=2) as loader:
        found = []
        for batch, _ in zip(loader, range(2), strict=False):
            assert not batch.failures
            found.append(batch.pixels.tobytes())
        assert loader.stats.tiles > 0
    return found


ZARRS = {
    "chunks of v2": Storage(2, 64, compressor="blosc-lz4-1-4096", axes="yxc"),
    "shards of v3": Storage(3, 64, compressor="zstd", axes="yxc", shard_px=128),
}


@pytest.mark.parametrize("name", ZARRS)
def test_a_zarr_slide_on_s3_is_the_one_on_disk(
    tmp_path: Path, s3_cloud: CloudServer, monkeypatch, name: str
) -> None:
    s3_cloud.enter(monkeypatch)
    storage = ZARRS[name]
    local, prefix = tmp_path / "a b+1.zarr", f"{name.replace(' ', '_')}/a b+1.zarr"
    slide = SyntheticSlide(5, 300, 260, mpp=0.2531)
    version = "0.4" if storage.version == 2 else "0.5"
    write_ome_zarr(local, slide, version=version, downsamples=(2.0,), storage=storage)
    for file in (path for path in local.rglob("*") if path.is_file()):
        uri = s3_cloud.put(f"{prefix}/{file.relative_to(local)}", file.read_bytes())
    uri = f"{uri.partition(prefix)[0]}{prefix}"
    objects = [item.name for item in read_slide_index(uri).objects]
    assert objects == [item.name for item in read_slide_index(str(local)).objects]
    assert bool(objects) == (storage.shard_px is not None)
    assert batches_of(uri, 100, (0.2531, 0.5062)) == batches_of(str(local), 100, (0.2531, 0.5062))
