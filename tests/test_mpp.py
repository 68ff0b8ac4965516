"""µm/px by axis: refused beyond 5 % unless a person says so, and then each axis is resampled."""

from __future__ import annotations

import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    Slide,
    SlideIndex,
    errors,
    open_slide,
    read_slide_index,
)
from online_patching.geometry import Box
from online_patching.testing import SyntheticSlide, write_ome_zarr
from online_patching.testing.odd_slides import OddSlide, odd_picture, write_odd_slide
from online_patching.testing.raw_tiff import RawImage, ascii_text, build_tiff, rational, shorts
from tests.test_reader import MEAN_BOUND, area_average

TWO = (0.25, 0.40)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return str(write_odd_slide(tmp_path_factory.mktemp("mpp") / "a.svs", OddSlide(downsamples=())))


def plain(tmp_path, **tags):
    image = RawImage((70, 40), [bytes(1536)] * 9, (32, 16), compression=1,
                     tags={int(code[1:]): value for code, value in tags.items()})  # fmt: skip
    (tmp_path / "a.tif").write_bytes(build_tiff([image]))
    return str(tmp_path / "a.tif")


@pytest.mark.parametrize("given", [TWO, list(TWO)])
def test_two_values_are_taken_as_they_are(odd, tmp_path, given):
    index = read_slide_index(odd, mpp=given)
    assert (index.mpp_x, index.mpp_y, index.mpp_source) == (*TWO, "override table")
    assert (index.levels[0].mpp_x, index.levels[0].mpp_y) == TWO
    index.save(tmp_path / "a.index")
    again = SlideIndex.load(tmp_path / "a.index")
    assert (again.mpp_x, again.mpp_y, again.digest) == (*TWO, index.digest)
    assert index.digest != read_slide_index(odd, mpp=0.25).digest


def test_one_value_is_both_axes(odd):
    index = read_slide_index(odd, mpp=0.3)
    assert (index.mpp_x, index.mpp_y) == (0.3, 0.3)


@pytest.mark.parametrize("given", [(0.25, 9.0), (0.01, 0.25), (0.25, float("nan")), (-0.25, 0.25)])
def test_neither_value_may_be_absurd(odd, given):
    with pytest.raises(errors.MppError, match=r"is outside 0\.05 to 8"):
        read_slide_index(odd, mpp=given)


@pytest.mark.parametrize(
    "given", [(0.25,), (0.25, 0.25, 0.25), (), ("a", "b"), "fine", (0.25, None)]
)
def test_what_is_no_pair_of_numbers_is_told(odd, given):
    with pytest.raises(errors.MppError, match="give one number, or two"):
        read_slide_index(odd, mpp=given)


def test_what_the_file_says_may_not_differ_beyond_5_percent(tmp_path):
    def per_cm(x: float, y: float) -> dict:
        return {
            "t282": rational(round(1e8 / x), 10**4),
            "t283": rational(round(1e8 / y), 10**4),
            "t296": shorts(3),
        }

    near = read_slide_index(plain(tmp_path, **per_cm(0.50, 0.48)))
    assert (near.mpp_x, near.mpp_y) == pytest.approx((0.50, 0.48))
    path = plain(tmp_path, **per_cm(0.50, 0.47))
    with pytest.raises(errors.MppError, match=r"differ by axis: 0\.5 and 0\.47 \(resolution tag\)"):
        read_slide_index(path)
    assert read_slide_index(path, mpp=(0.50, 0.47)).mpp_y == 0.47
    xml = '<OME><Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.6"/></OME>'
    with pytest.raises(errors.MppError, match=r"differ by axis: 0\.5 and 0\.6 \(ome metadata\)"):
        read_slide_index(plain(tmp_path, t270=ascii_text(xml)))


def test_units_of_ome_are_undone(tmp_path):
    for unit, factor in (("µm", 1), ("nm", 1e-3), ("mm", 1e3), ("&#181;m", 1)):
        size = 0.5 / factor
        xml = (
            f'<OME xmlns="x"><Image/><Pixels PhysicalSizeX="{size}" PhysicalSizeXUnit="{unit}" '
            f'PhysicalSizeY="{size}" PhysicalSizeYUnit="{unit}"/><broken</OME>'
        )
        assert read_slide_index(plain(tmp_path, t270=ascii_text(xml))).mpp == pytest.approx(0.5)


@pytest.mark.parametrize("mpp", [0.4, 0.5, 0.55])
def test_each_axis_is_resampled_by_its_own(odd, mpp):
    """A square patch in µm is a box of other sides in pixels: the exact mean over that box says so."""
    side, (x, y) = 90, (24, 30)
    with open_slide(odd, mpp=TWO) as slide:
        whole = slide.read_box(0, Box(0, 0, 700, 500))
        ours = slide.read_patch(x_um=x * TWO[0], y_um=y * TWO[1], mpp=mpp, size_px=side)
        assert ours.shape == (side, side, 3)
    width, height = (side * mpp / axis for axis in TWO)
    truth = area_average(whole, (x, y, x + width, y + height), side)
    assert np.abs(ours - truth).mean() < MEAN_BOUND
    square = area_average(whole, (x, y, x + width, y + width), side)
    assert np.abs(ours - square).mean() > 3 * MEAN_BOUND


def test_a_loader_delivers_the_same_patches(odd):
    index = read_slide_index(odd, mpp=TWO)
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=64, mpp=[0.5, 0.8])
    with PatchLoader(sampler, 16) as loader, Slide(index) as slide:
        batch = loader.next_batch()
        for ref, patch in zip(batch.refs, batch.pixels, strict=True):
            assert ref.width_px0 == pytest.approx(64 * ref.mpp / TWO[0])
            assert ref.height_px0 == pytest.approx(64 * ref.mpp / TWO[1])
            theirs = slide.read_patch(
                x_um=ref.x_px0 * TWO[0], y_um=ref.y_px0 * TWO[1], mpp=ref.mpp, size_px=64
            )
            assert (patch == theirs).all()


def test_a_thumbnail_keeps_the_shape_of_the_tissue(odd):
    with open_slide(odd, mpp=TWO) as slide:
        small = slide.thumbnail(2.0)
    assert small.shape == (round(500 * TWO[1] / 2), round(700 * TWO[0] / 2), 3)
    truth = odd_picture(700, 500).mean(axis=(0, 1))
    assert np.abs(small.mean(axis=(0, 1)) - truth).max() < 3


def test_zarr_and_fallback_readers_take_two_values_too(tmp_path, shared_data):
    zarr = write_ome_zarr(tmp_path / "z.ome.zarr", SyntheticSlide(4, 400, 300), chunk_px=128)
    dicom = shared_data / "wsi" / "converted" / "gallery-06_oral_scc_dicom"
    for uri in (zarr, dicom):
        index = read_slide_index(str(uri), mpp=TWO)
        assert (index.mpp_x, index.mpp_y, index.mpp_source) == (*TWO, "override table")


def test_ome_xml_with_a_dtd_says_nothing(tmp_path):
    size = 'PhysicalSizeX="&x;" PhysicalSizeY="&x;"'
    for dtd in ('<!DOCTYPE OME [<!ENTITY x "0.5">]>', "<!DOCTYPE OME>"):
        path = plain(
            tmp_path, t270=ascii_text(f"{dtd}<OME><Pixels {size.replace('&x;', '0.5')}/></OME>")
        )
        with pytest.raises(errors.MppError, match="carries no µm/px"):
            read_slide_index(path)
    entity = f'<!DOCTYPE OME [<!ENTITY x "0.5">]><OME><Pixels {size}/></OME>'
    with pytest.raises(errors.MppError, match="carries no µm/px"):
        read_slide_index(plain(tmp_path, t270=ascii_text(entity)))
