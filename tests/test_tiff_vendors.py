"""Philips, OME-TIFF, Leica, Ventana, lone levels: which pages are the slide, their sizes, what stays unread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from online_patching import errors, read_slide_index
from online_patching.formats import tiff
from online_patching.geometry import Box
from online_patching.resample import resize
from online_patching.slide import Slide
from online_patching.slide_index import SlideIndex
from online_patching.testing import SyntheticSlide
from online_patching.testing.hostile import HostileFile, HostileStores
from online_patching.testing.raw_tiff import (
    RawImage,
    ascii_text,
    build_tiff,
    longs,
    rational,
    shorts,
)
from online_patching.testing.tiff_codecs import Coding, Layout, coded_image, resolution
from online_patching.testing.vendor_tiffs import (
    PERSON,
    leica_images,
    philips_images,
    ventana_images,
    write_images,
)
from online_patching.testing.writers import shrink

PICTURE = SyntheticSlide(3, 800, 600).render(100, 80, 448, 320)
LEVELS = [PICTURE, shrink(PICTURE, 2), shrink(PICTURE, 4)]
SQUARE = Layout((64, 64))


def by_openslide(path: Path, level: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        found = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    return np.where(found[..., 3:] > 0, found[..., :3], 255)


def levels_of(index: SlideIndex) -> list[np.ndarray]:
    with Slide(index) as slide:
        return [
            slide.read_box(n, Box(0, 0, level.width_px, level.height_px))
            for n, level in enumerate(index.levels)
        ]


# --- Aperio ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", [{3}, {0, 6}, {20}])
def test_aperio_levels_that_lack_tiles_of_what_is_there_are_not_read(tmp_path, lacks):
    """OpenSlide draws such tiles from the level before, so we must not call them white."""
    text = b"Aperio Image Library v12\r\n448x320 [0,0 448x320] (64x64)|AppMag = 20|MPP = 0.4991\0"

    def page(picture: np.ndarray, *missing: int) -> RawImage:
        layout = Layout((64, 64), missing=frozenset(missing))
        return coded_image(picture, Coding(5, predictor=2), layout, {270: (2, text)})

    first, second, third = LEVELS
    blank = {0, 1, 7, 8} if 0 in lacks else set()  # of level 0, beneath tile 0 of level 1
    path = tmp_path / "a.svs"
    images = [page(first, *blank), page(second, *(lacks if max(lacks) < 20 else ())), page(third)]
    path.write_bytes(build_tiff(images))
    index = read_slide_index(str(path))
    assert [v.width_px for v in index.levels] == (
        [448, 112] if max(lacks) < 20 else [448, 224, 112]
    )
    with openslide.OpenSlide(path) as oracle:
        assert oracle.level_count == 3
        drawn = np.asarray(oracle.read_region((0, 0), 1, (224, 160)).convert("RGBA"))
    theirs = np.where(drawn[..., 3:] > 0, drawn[..., :3], 255).astype(int)
    with Slide(index) as slide:
        ours = slide.read_patch(x_um=0, y_um=0, mpp=0.9982, size_px=150)
    assert np.abs(ours.astype(int) - theirs[:150, :150]).mean() < 3


def test_aperio_levels_may_lack_what_the_largest_lacks_too(tmp_path):
    text = b"Aperio Image Library v12\r\n448x320 [0,0 448x320] (64x64)|AppMag = 20|MPP = 0.4991\0"
    images = [
        coded_image(
            picture, Coding(5), Layout((64, 64), missing=frozenset(missing)), {270: (2, text)}
        )
        for picture, missing in zip(LEVELS[:2], ({0, 1, 7, 8, 30}, {0}), strict=True)
    ]
    path = tmp_path / "a.svs"
    path.write_bytes(build_tiff(images))
    assert [v.width_px for v in read_slide_index(str(path)).levels] == [448, 224]


# --- Philips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
def test_philips_levels_are_as_large_as_openslide_says(tmp_path, big):
    """Level 0's sides are whole tiles, the others' tags are padded to whole tiles; two tiles are not stored."""
    layout = Layout((64, 64), missing=frozenset({0, 8}))
    path = write_images(tmp_path / "a.tiff", philips_images(LEVELS, layout=layout), big=big)
    index = read_slide_index(str(path))
    assert (index.container, index.vendor, index.mpp_source) == (
        "philips-tiff",
        "philips",
        "vendor tag",
    )
    with openslide.OpenSlide(path) as oracle:
        assert oracle.properties["openslide.vendor"] == "philips"
        assert [(v.width_px, v.height_px) for v in index.levels] == list(oracle.level_dimensions)
        assert [v.downsample_x for v in index.levels] == list(oracle.level_downsamples)
        for mpp, key in ((index.mpp_x, "x"), (index.mpp_y, "y")):
            assert mpp == pytest.approx(float(oracle.properties[f"openslide.mpp-{key}"]), abs=1e-12)
    assert (index.mpp_x, index.mpp_y) == pytest.approx((0.25, 0.2502))
    for number, ours in enumerate(levels_of(index)):
        assert (ours == by_openslide(path, number)).all()
    assert (levels_of(index)[0][:64, :64] == 255).all()


def test_of_padding_that_holds_whole_tiles_nothing_is_indexed(tmp_path):
    """A level whose true size needs fewer tiles than its tags list."""
    images = philips_images(LEVELS)
    small = shrink(PICTURE, 2)
    padded = np.pad(small, ((0, 160), (0, 96), (0, 0)), constant_values=9)
    images[1] = coded_image(padded, Coding(7, 6), SQUARE, {254: longs(1)})
    index = read_slide_index(str(write_images(tmp_path / "a.tiff", images)))
    level = index.levels[1]
    assert (level.width_px, level.height_px, level.columns, level.n_tiles) == (224, 160, 4, 12)
    ours = levels_of(index)[1]
    assert np.abs(ours.astype(int) - small).mean() < 2.5


def test_philips_metadata_that_do_not_fit_the_file_are_refused(tmp_path):
    cases = {
        "name 2 levels; the file holds 3": philips_images(LEVELS, names=2),
        "name 0 slides instead of one": philips_images(LEVELS),
    }
    cases["name 0 slides instead of one"][0] = coded_image(
        PICTURE,
        Coding(7, 6),
        SQUARE,
        {305: ascii_text("Philips DP"), 270: ascii_text("<DataObject/>")},
    )
    for says, images in cases.items():
        with pytest.raises(errors.DamagedSlideError, match=says):
            read_slide_index(str(write_images(tmp_path / "a.tiff", images)))


def test_nothing_but_numbers_of_philips_metadata_is_kept(tmp_path):
    path = write_images(tmp_path / "a.tiff", philips_images(LEVELS))
    index = read_slide_index(str(path))
    assert PERSON.encode() in path.read_bytes()
    header, _ = index.to_bytes()
    assert PERSON.encode() not in header and PERSON not in repr(index)
    broken = philips_images(LEVELS, names=1)
    with pytest.raises(errors.DamagedSlideError) as caught:
        read_slide_index(str(write_images(tmp_path / "b.tiff", broken)))
    assert PERSON not in str(caught.value)


def reads_of(data: bytes) -> tuple[SlideIndex | None, list[tuple[int, int]]]:
    """The index of bytes, and every range of them that was asked for."""
    seen: list[tuple[int, int]] = []

    class Watched(HostileStores):
        def read(self, uri, start, stop, token=""):
            seen.append((start, stop))
            return super().read(uri, start, stop, token)

    stores = Watched(HostileFile("", data, (), len(data)))
    return tiff.read_index("a.tiff", "a", None, stores, len(data), ""), seen


@pytest.mark.parametrize("vendor", ["philips", "leica", "ventana", "aperio"])
def test_label_and_macro_never_become_levels(tmp_path, vendor):
    """They are pure red."""
    if vendor == "philips":
        images = philips_images(LEVELS)
    elif vendor == "leica":
        images = leica_images(LEVELS, np.full((80, 112, 3), (255, 0, 0), np.uint8))
    elif vendor == "ventana":
        images = ventana_images(LEVELS)
    else:
        about = ascii_text("Aperio Image\r\n448x320|MPP = 0.25")
        label = np.full((160, 224, 3), (255, 0, 0), np.uint8)  # of the slide's shape, and tiled
        images = [
            coded_image(PICTURE, Coding(7, 6), SQUARE, {270: about}),
            coded_image(
                label, Coding(7, 6), SQUARE, {270: ascii_text("Aperio Image\r\nlabel 224x160")}
            ),
            coded_image(label[::2, ::2], Coding(7, 6), SQUARE, {270: about, 254: longs(9)}),
        ]
    index = read_slide_index(str(write_images(tmp_path / "a.tiff", images)))
    with Slide(index) as slide:
        for number, level in enumerate(index.levels):
            pixels = slide.read_box(number, Box(0, 0, level.width_px, level.height_px))
            assert not ((pixels[..., 0] > 200) & (pixels[..., 1] < 60)).mean() > 0.05


# --- what only looks like a pyramid ---------------------------------------------------------------


@pytest.mark.parametrize("vendor", ["leica", "ventana", "trestle"])
def test_overlapping_or_scattered_tiles_are_left_to_openslide(tmp_path, vendor):
    if vendor == "leica":
        images = leica_images(LEVELS, shrink(PICTURE, 8))
    elif vendor == "ventana":
        images = ventana_images(LEVELS)
    else:
        tags = {305: ascii_text("MedScan v2"), 282: rational(1, 2), 283: rational(1, 2)}
        tags[270] = ascii_text("Background Color=FFFFFF;OverlapsXY=8 8;Objective Power=20")
        images = [coded_image(PICTURE, Coding(7, 6), SQUARE, tags)]
    path = write_images(tmp_path / "a.tif", images)
    index = read_slide_index(str(path))
    assert (index.container, index.vendor) == ("openslide", vendor)
    with openslide.OpenSlide(path) as oracle:
        assert [(v.width_px, v.height_px) for v in index.levels] == list(oracle.level_dimensions)
    for number, ours in enumerate(levels_of(index)):
        assert (ours == by_openslide(path, number)).all()
    assert PERSON.encode() not in index.to_bytes()[0]


# --- OME-TIFF -------------------------------------------------------------------------------------


def pixels(width: int, height: int, size: float = 0.5, more: str = "", inside: str = "") -> str:
    return (
        f'<Image><Pixels SizeX="{width}" SizeY="{height}" SizeC="3" PhysicalSizeX="{size}" '
        f'PhysicalSizeY="{size}" {more}>{inside}</Pixels></Image>'
    )


def ome(*images: str) -> dict[int, tuple]:
    return {270: ascii_text(f'<?xml version="1.0"?><OME xmlns="x">{"".join(images)}</OME>')}


def subs(levels: list[np.ndarray]) -> list[RawImage]:
    return [coded_image(one, Coding(5), SQUARE, {254: longs(1)}) for one in levels]


def with_subs(image: RawImage, levels: list[np.ndarray]) -> RawImage:
    return RawImage(**{**image.__dict__, "sub_images": subs(levels)})


def test_of_several_images_in_one_ome_tiff_the_largest_is_the_slide(tmp_path):
    """Here the overview comes first, with levels of its own shape and µm/px of its own."""
    overview = np.full((160, 224, 3), (255, 0, 0), np.uint8)
    text = ome(pixels(224, 160, 4.0), pixels(448, 320, 0.5))
    images = [
        with_subs(coded_image(overview, Coding(8), SQUARE, text), [overview[::2, ::2]]),
        with_subs(coded_image(PICTURE, Coding(8), SQUARE), LEVELS[1:]),
    ]
    index = read_slide_index(str(write_images(tmp_path / "a.ome.tif", images)))
    assert (index.container, index.mpp, index.mpp_source) == ("ome-tiff", 0.5, "ome metadata")
    found = levels_of(index)
    assert len(found) == 3
    assert all((ours == level).all() for ours, level in zip(found, LEVELS, strict=True))


def test_tifffiles_own_ome_pyramid_is_read(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as writer:
        more = {"photometric": "rgb", "compression": "zlib", "predictor": True, "tile": (64, 64)}
        size = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        writer.write(PICTURE, subifds=2, metadata={"axes": "YXS", **size}, **more)
        for level in LEVELS[1:]:
            writer.write(level, subfiletype=1, **more)
        writer.write(np.full((160, 224, 3), 90, np.uint8), metadata={"axes": "YXS"}, **more)
    index = read_slide_index(str(path))
    assert index.mpp == 0.25 and index.codec == "deflate" and len(index.levels) == 3
    assert all((a == b).all() for a, b in zip(levels_of(index), LEVELS, strict=True))


@pytest.mark.parametrize(
    ("xml", "says", "code"),
    [
        (pixels(448, 320, inside='<TiffData><UUID FileName="a.ome.tif">u</UUID></TiffData>'
                '<TiffData><UUID FileName="b.ome.tif">v</UUID></TiffData>'), "one of the 2 files", "unsupported"),
        ('<BinaryOnly MetadataFile="Jane-Doe-1955.companion.ome" UUID="u"/>', "companion file", "unsupported"),
        (pixels(448, 320, more='SizeZ="5" SizeT="2"'), "a stack of 10 planes", "unsupported"),
    ],
)  # fmt: skip
def test_parts_of_ome_tiffs_are_refused_in_words(tmp_path, xml, says, code):
    images = [coded_image(PICTURE, Coding(8), SQUARE, ome(xml))]
    with pytest.raises(errors.UnsupportedSlideError, match=says) as caught:
        read_slide_index(str(write_images(tmp_path / "a.ome.tif", images)))
    assert caught.value.code == code and PERSON not in str(caught.value)


def test_one_file_that_was_renamed_is_not_taken_for_a_part(tmp_path):
    inside = '<TiffData><UUID FileName="as-exported.ome.tif">u</UUID></TiffData>'
    images = [coded_image(PICTURE, Coding(8), SQUARE, ome(pixels(448, 320, inside=inside)))]
    assert read_slide_index(str(write_images(tmp_path / "a.ome.tif", images))).mpp == 0.5


def test_channels_in_pages_or_metadata_are_multiplex(tmp_path):
    gray = [
        coded_image(PICTURE, Coding(8, 1, 1), SQUARE, tags)
        for tags in (ome(pixels(448, 320)), {}, {})
    ]
    for images in (gray, gray[:1]):
        with pytest.raises(
            errors.UnsupportedSlideError, match="fluorescence or multiplex"
        ) as caught:
            read_slide_index(str(write_images(tmp_path / "a.ome.tif", images)))
        assert caught.value.code == "multiplex"


def test_pages_of_an_ome_tiff_that_are_images_of_their_own_are_no_levels(tmp_path):
    text = ome(pixels(448, 320), pixels(224, 160))
    images = [
        coded_image(PICTURE, Coding(8), SQUARE, text),
        coded_image(LEVELS[1], Coding(8), SQUARE),
    ]
    assert len(read_slide_index(str(write_images(tmp_path / "a.ome.tif", images))).levels) == 1
    images[1] = coded_image(LEVELS[1], Coding(8), SQUARE, {254: longs(1)})
    assert len(read_slide_index(str(write_images(tmp_path / "b.ome.tif", images))).levels) == 2


# --- a single large level -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coding", "most"),
    [
        (Coding(7, 6, subsampling="4:2:0"), 2.5),
        (Coding(34712, level=0), 6.5),
        (Coding(8), 0.3),
    ],
    ids=["jpeg", "jpeg2000", "deflate"],
)
def test_a_thumbnail_of_a_lone_level_is_near_that_of_all_its_pixels(tmp_path, coding, most):
    """JPEG is decoded at an eighth for it, JPEG 2000 likewise: mean differences in grey levels."""
    image = coded_image(PICTURE, coding, SQUARE, resolution(0.5))
    index = read_slide_index(str(write_images(tmp_path / "a.tif", [image])))
    with Slide(index) as slide:
        small = slide.thumbnail(4.0)
        stored = slide.read_box(0, Box(0, 0, 448, 320))
    expected = resize(stored, (0, 0, 448, 320), (56, 40))
    assert np.abs(small.astype(int) - expected).mean() < most


_BIG = """
import resource, sys
from online_patching import open_slide
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_slide(sys.argv[1]) as slide:
    small = slide.thumbnail(8.0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(small.shape[0], small.shape[1], int(small.mean()), grown // 1024)
"""


@pytest.mark.slow
def test_a_thumbnail_of_a_huge_lone_level_takes_little_memory(tmp_path):
    """60,000 x 40,000 px of one level (7 GB of pixels): its tiles are one and the same."""
    tile = Coding(7, 6, tables=False).encode(PICTURE[:256, :256])
    count = -(-60_000 // 256) * -(-40_000 // 256)
    image = RawImage(
        (60_000, 40_000), [tile], (256, 256), photometric=6, tags=dict(resolution(0.25))
    )
    data = build_tiff([image])
    place = data.index(tile)
    tags = {**image.tags, 324: longs(*[place] * count), 325: longs(*[len(tile)] * count)}
    path = tmp_path / "a.tif"
    path.write_bytes(build_tiff([RawImage(**{**image.__dict__, "tags": tags})]))
    done = subprocess.run(
        [sys.executable, "-c", _BIG, str(path)], capture_output=True, text=True, check=True, timeout=120
    )  # fmt: skip
    assert done.stderr == ""  # no warning either
    height, width, mean, grown_mib = map(int, done.stdout.split())
    assert (height, width) == (1250, 1875)
    assert abs(mean - PICTURE[:256, :256].mean()) < 2
    assert grown_mib < 700


def test_a_palette_or_two_samples_are_refused_wherever_the_page_is(tmp_path):
    images = [coded_image(PICTURE, Coding(8), SQUARE, {**resolution(0.5), 262: shorts(3)})]
    with pytest.raises(errors.UnsupportedSlideError, match="palette"):
        read_slide_index(str(write_images(tmp_path / "a.tif", images)))
