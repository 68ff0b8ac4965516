"""Slides in every cloud give the pixels they give on disk: opened, indexed, loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from online_patching import ForegroundMask, PatchLoader, PatchSampler, open_slide, read_slide_index
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


def batches_of(uri: str) -> list[bytes]:
    index = read_slide_index(uri)
    mask = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [mask], size_px=224, mpp=[0.2531, 1.0], seed=3)
    with PatchLoader(sampler, batch_size=4, threads=2) as loader:
        found = []
        for batch, _ in zip(loader, range(2), strict=False):
            assert not batch.failures
            found.append(batch.pixels.tobytes())
        assert loader.stats.tiles > 0
    return found
