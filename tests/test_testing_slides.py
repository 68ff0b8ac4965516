"""The synthetic slides: a pure drawing, known truth, and files that trusted readers open."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
import zarr
from PIL import Image

from online_patching.testing import (
    CLASS_NAMES,
    SyntheticSlide,
    demo_slides,
    write_demo_slides,
    write_labelled_patches,
    write_ome_zarr,
    write_tiff,
)
from online_patching.testing import (
    demo as demo_module,
)
from online_patching.testing.writers import pyramid, shrink

# Not square, no multiple of a tile, no round µm/px.
SLIDE = SyntheticSlide(seed=4, width_px0=1501, height_px0=1103, mpp=0.4321)


def test_a_window_shows_what_the_whole_picture_shows_there():
    whole = SLIDE.render(0, 0, 1501, 1103)
    window = SLIDE.render(517, 233, 640, 130)
    assert np.abs(whole[233:363, 517:1157].astype(int) - window).max() <= 1


def test_a_coarse_picture_is_the_area_average_of_a_fine_one():
    coarse = SLIDE.render(0, 0, 180, 130, mpp=0.4321 * 8).astype(float)
    fine = SLIDE.render(0, 0, 1440, 1040).astype(float)
    averaged = fine.reshape(130, 8, 180, 8, 3).mean(axis=(1, 3))
    assert np.abs(coarse - averaged).mean() < 4  # nuclei are placed to the nearest drawn pixel


def test_three_seeds_give_three_slides_and_one_seed_one():
    drawn = [SyntheticSlide(s, 700, 500, 1.0).render(0, 0, 700, 500) for s in (1, 2, 3, 1)]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    assert np.array_equal(drawn[0], drawn[3])


def test_truth_covers_the_slide_exactly_and_holds_every_class():
    truth = SLIDE.class_map(mpp=2.0)
    assert truth.shape == (round(1103 * 0.4321 / 2), round(1501 * 0.4321 / 2))
    assert set(np.unique(truth)) == set(range(len(CLASS_NAMES)))


def test_truth_and_picture_share_one_coordinate_system():
    clean = SyntheticSlide(4, 1501, 1103, 0.4321, pen=False, dust=0)
    truth = clean.class_map(mpp=4.0)
    picture = clean.render(0, 0, truth.shape[1], truth.shape[0], mpp=4.0)
    pink = picture[..., 1] < 200
    tissue = (truth > 0) & (truth != CLASS_NAMES.index("fat"))
    sure = pink[tissue].mean(), pink[truth == 0].mean()
    assert sure[0] > 0.85
    assert sure[1] < 0.05
    assert (pink[::-1][tissue].mean(), pink[:, ::-1][tissue].mean()) < (sure[0], sure[0])


def test_beyond_the_slide_lies_glass():
    beyond = SLIDE.render(1501, 0, 64, 64)
    assert np.abs(beyond.astype(float) - SLIDE.stain.glass_rgb).max() < 5


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
@pytest.mark.parametrize("tables", [True, False])
def test_an_svs_opens_in_openslide_with_tifffiles_pixels(tmp_path: Path, photometric, tables):
    path = write_tiff(
        tmp_path / "a.svs", SLIDE, photometric=photometric, tables=tables, tile_px=240,
        downsamples=(3.9995,), associated=True,
    )  # fmt: skip
    with openslide.OpenSlide(path) as slide, tifffile.TiffFile(path) as tif:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.4321)
        assert slide.level_dimensions == ((1501, 1103), (375, 275))
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
        assert (tif.pages[0].jpegtables is not None) == tables
        pixels = np.asarray(slide.read_region((0, 0), 0, (1501, 1103)).convert("RGB"))
        assert np.array_equal(pixels, tif.pages[0].asarray())
    assert np.abs(pixels.astype(int) - SLIDE.render(0, 0, 1501, 1103)).mean() < 3


def test_a_generic_tiff_carries_its_mpp_in_resolution_tags_of_every_level(tmp_path: Path):
    path = write_tiff(tmp_path / "a.tif", SLIDE, flavour="generic", tile_px=128)
    with openslide.OpenSlide(path) as slide, tifffile.TiffFile(path) as tif:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.4321, rel=1e-6)
        per_cm, of = tif.series[0].levels[1].keyframe.tags["XResolution"].value
        assert 1e4 * of / per_cm == pytest.approx(0.4321 * 1501 / 375, rel=1e-6)


def test_an_svs_without_mpp_has_none(tmp_path: Path):
    path = write_tiff(tmp_path / "a.svs", SLIDE, with_mpp=False)
    with openslide.OpenSlide(path) as slide:
        assert "openslide.mpp-x" not in slide.properties


@pytest.mark.parametrize(("version", "shard_px"), [("0.4", None), ("0.5", None), ("0.5", 512)])
@pytest.mark.parametrize("compressor", ["zstd", "blosc", "gzip", "none"])
def test_ome_zarr_holds_the_drawing_and_its_scales(tmp_path: Path, version, shard_px, compressor):
    path = write_ome_zarr(
        tmp_path / "a.zarr", SLIDE, version=version, compressor=compressor, shard_px=shard_px,
        downsamples=(2, 4.5),
    )  # fmt: skip
    group = zarr.open_group(str(path), mode="r")
    attributes: Any = group.attrs.asdict()
    meta = (attributes["ome"] if version == "0.5" else attributes)["multiscales"][0]
    level0 = np.moveaxis(np.asarray(group["0"]), 0, 2)
    assert np.array_equal(level0, SLIDE.render(0, 0, 1501, 1103))
    scale = meta["datasets"][2]["coordinateTransformations"][0]["scale"]
    assert scale == pytest.approx([1, 0.4321 * 1103 / 245, 0.4321 * 1501 / 333])


def test_a_pyramid_is_an_area_average():
    picture = SLIDE.render(400, 300, 320, 240)
    quarter, coarser = pyramid(picture, [4, 5.5])[1:]
    oracle = picture.astype(float).reshape(60, 4, 80, 4, 3).mean(axis=(1, 3))
    assert np.abs(quarter - oracle).max() <= 1
    assert coarser.shape == (43, 58, 3)
    assert np.array_equal(shrink(picture, 1.0), picture)


def test_demo_slides_are_kept_when_whole_and_drawn_again_when_not(tmp_path: Path, monkeypatch):
    small = tuple((w // 12, h // 12) for w, h in demo_module._SIZES_PX0)
    monkeypatch.setattr(demo_module, "_SIZES_PX0", small)
    calls: list[float] = []
    written = write_demo_slides(tmp_path, n=5, seed=3, progress=lambda _, s: calls.append(s))
    assert [d.path.suffix for d in written] == [".svs", ".tif", ".svs", ".zarr", ".svs"]
    assert all(d.path.exists() for d in written)
    assert calls
    stamp = written[1].path.stat().st_mtime_ns
    written[0].path.unlink()  # as if interrupted: only a draft stood beside it
    written[0].path.with_name(f".{written[0].path.name}.draft").write_bytes(b"half")
    assert write_demo_slides(tmp_path, n=5, seed=3)[0].path.exists()
    assert written[1].path.stat().st_mtime_ns == stamp
    facts = json.loads((tmp_path / "truth" / "truth.json").read_text())
    assert set(facts["slides"]) == {d.name for d in written}
    truth = np.asarray(Image.open(written[2].truth_path))
    assert np.array_equal(truth, written[2].slide.class_map(8.0))


def test_labelled_patches_are_of_their_class_and_the_same_every_time(tmp_path: Path):
    slides = [SyntheticSlide(s, 1500, 1200, 1.0) for s in (1, 2)]
    counts = write_labelled_patches(tmp_path / "a", slides, per_class=4, size_px=64, mpp=1.0)
    again = write_labelled_patches(tmp_path / "b", slides, per_class=4, size_px=64, mpp=1.0)
    assert counts == again == dict.fromkeys(CLASS_NAMES[1:], 4)
    for path in (tmp_path / "a").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        seed, x, y = (int(part) for part in path.stem.split("_"))
        truth = slides[seed - 1].class_map(8.0)[y // 8 : y // 8 + 8, x // 8 : x // 8 + 8]
        assert (truth == CLASS_NAMES.index(path.parent.name)).mean() >= 0.8


def test_the_demos_slides_differ_in_size_and_are_not_square():
    sizes = {(s.width_px0, s.height_px0) for s in demo_slides(5)}
    assert len(sizes) == 5
    assert all(w != h for w, h in sizes)
