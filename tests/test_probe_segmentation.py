"""The verb `probe-segmentation`, and how it cuts and resizes pictures with their masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm import cli
from pathfm.probe_segmentation import ProbeSegmentationConfig, run
from pathfm.runtime import PathfmError
from pathfm.segmentation_probe.pictures import fit_mask, read_pictures, tiles
from pathfm.tracking import TrackingConfig
from tests.datasets_mini import MAKERS


@pytest.mark.parametrize(
    ("height", "width", "size"), [(250, 250, 224), (37, 52, 32), (64, 30, 48), (20, 33, 20)]
)
def test_a_mask_is_resized_as_eva_s_transform_does(height: int, width: int, size: int) -> None:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    mask = np.random.default_rng(0).integers(0, 6, (height, width)).astype(np.uint8)
    theirs = v2.Compose([v2.Resize(size=size), v2.CenterCrop(size=size)])
    wanted = theirs(tv_tensors.Mask(torch.from_numpy(mask.astype(np.int64))))
    assert np.array_equal(fit_mask(mask, size), wanted.numpy())


def test_tiles_are_whole_squares_row_by_row_of_picture_and_mask_alike() -> None:
    mask = np.arange(7 * 11, dtype=np.uint8).reshape(7, 11)
    pixels = np.repeat(mask[..., None], 3, axis=2)
    found = list(tiles(pixels, mask, 3))
    assert [int(m[0, 0]) for _, m in found] == [0, 3, 6, 33, 36, 39]
    for part, m in found:
        assert np.array_equal(part[..., 1], m)
        assert m.shape == (3, 3)
    assert len(list(tiles(pixels, mask, 0))) == 1
    with pytest.raises(PathfmError, match="11 x 7 px holds no tile of 8 px"):
        next(tiles(pixels, mask, 8))
    with pytest.raises(PathfmError, match=r"a mask \(7, 10\) for a picture \(7, 11\)"):
        next(tiles(pixels, mask[:, :-1], 3))


def config(data: str, out: Path, **changes: object) -> ProbeSegmentationConfig:
    given = {
        "data": data,
        "weights": ["random"],
        "names": ["untrained"],
        "out": out,
        "n_runs": 2,
        "steps": 3,
        "batch": 4,
        "input_px": 32,
        "tile_px": 20,
        "partial": True,
        "device": "cpu",
        "tracking": TrackingConfig(enabled=False),
    }
    return ProbeSegmentationConfig(**given | changes)  # type: ignore[arg-type]


def test_consep_is_cut_into_tiles_and_reported_on_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["consep"](tmp_path / "consep")
    given = config(f"consep={tmp_path / 'consep'}", tmp_path / "out")
    result = run(given)
    said = capsys.readouterr().out
    assert "consep: 12 pictures of 32 px reported: val (it chose the epoch too)" in said
    assert [m.protocol for m in result.models] == ["conv", "mlp", "linear"]
    assert result.models[2].parameters == 192 * 5 + 5
    held = json.loads((tmp_path / "out" / "segmentation_probe.json").read_text())
    assert held["models"][0]["values"] == result.models[0].values
    assert set(held["models"][0]["per_class"]) == {*result.classes}
    eva = json.loads((tmp_path / "out" / "untrained.conv.results.json").read_text())["metrics"]
    assert eva["test"] == []
    assert eva["val"][0]["val/MonaiDiceScore"]["values"] == result.models[0].values
    run(given)
    assert "is up to date" in capsys.readouterr().out


def test_monusac_s_ambiguous_pixels_are_no_class_and_count_as_eva_counts_them(
    tmp_path: Path,
) -> None:
    MAKERS["monusac"](tmp_path / "monusac")
    data = f"monusac={tmp_path / 'monusac'}"
    changes = {"tile_px": 0, "heads": ("linear",), "n_runs": 1}
    as_eva = run(config(data, tmp_path / "a", **changes))
    strict = run(config(data, tmp_path / "b", eva_ignore=False, **changes))
    assert as_eva.classes[-1] == "Macrophage"
    assert len(as_eva.classes) == 5
    assert "Ambiguous" in as_eva.caveats[-1]
    assert strict.models[0].mean >= as_eva.models[0].mean


def test_pictures_and_masks_of_a_data_set_come_at_the_input_size(tmp_path: Path) -> None:
    from pathfm.datasets import open_dataset

    MAKERS["consep"](tmp_path)
    data = open_dataset(f"consep={tmp_path}", partial=True)
    whole = read_pictures(data, 40, 40)  # pictures of 60 x 40 hold one tile of 40
    assert whole.pixels.shape == (5, 40, 40, 3)
    assert whole.splits == data.splits
    for i in range(5):
        assert np.array_equal(whole.pixels[i], data.read(i)[:40, :40])
        assert np.array_equal(whole.masks[i], data.mask(i)[:40, :40])


def test_mistakes_are_one_line_and_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["consep"](tmp_path / "consep")
    MAKERS["bach"](tmp_path / "bach")

    def told(data: str, *words: str) -> str:
        given = ["probe-segmentation", "--data", f"{data}={tmp_path / data}", "--weights", "random"]
        out = ["--out", str(tmp_path / "o"), "--tracking.enabled", "false"]
        code = cli.main([*given, *out, *words])
        error = capsys.readouterr().err.strip()
        assert code == 2
        assert "\n" not in error
        return error

    assert "consep" in told("consep")  # a copy with other counts than the published ones
    partial = ("--partial", "true")
    assert "a classification data set, it has no masks" in told("bach", *partial)
    assert "holds no tile of 250 px" in told("consep", *partial)
    assert "input_px = 40 is no multiple" in told("consep", *partial, "--input_px", "40")
    assert "give each one of its own" in told("consep", *partial, "--names", "a", "b")
