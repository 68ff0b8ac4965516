"""Pixels that may not change in silence: committed digests, and readers people trust beside them.

For each generated kind of JPEG slide and each real one: µm/px, levels, and patches at fixed places
(through open_slide and through PatchLoader, which must agree) against tests/golden/*.json, and level
by level against OpenSlide, or tifffile where OpenSlide does not open it. After a change that is meant:

    python -m tests.test_golden        # writes the digests anew; look at the difference
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import PIL
import pytest
import tifffile
from numpy.typing import ArrayLike

from online_patching import (
    Corpus,
    ForegroundMask,
    PatchLoader,
    Slide,
    SlideIndex,
    read_slide_index,
)
from online_patching.geometry import Box
from online_patching.sampling.draws import Draws, Sampler
from online_patching.testing import Storage, SyntheticSlide, write_ome_zarr
from online_patching.testing.odd_slides import (
    ODD_SLIDES,
    OddSlide,
    odd_picture,
    write_odd_slide,
)
from tests.conftest import SHARED_DATA
from tests.test_reader import area_average

GOLDEN = Path(__file__).parent / "golden"
ENCODER = f"Pillow {PIL.__version__}"
REAL = [  # every JPEG SVS and TIFF at hand, and its µm/px where the file carries none that is sane
    ("vendor/CMU-1-Small-Region.svs", None),
    ("vendor/openslide_small.svs", None),
    ("converted/gallery-01_colon_serrated_adenoma_crop6144.svs", None),
    ("converted/molluscum_skin_HE.tif", 0.5),
    ("converted/hpylori_stomach_HE_half.svs", 0.72),
    ("converted/hpylori_stomach_giemsa_quarter.tif", 1.44),
    ("converted/hpylori_stomach_warthinstarry_quarter.svs", 1.44),
    ("converted/hpylori_stomach_IHC_quarter.ome.tif", 1.44),
    ("converted/metastatic_sarcoma_liver_HE_crop4096.svs", 0.7),
]
COLOURFUL_BOUND = 8.0
"""Grey levels off an exact area average, in the mean: these blocks are harder than any tissue."""
PLACES = [  # µm/px in level 0's; upper left corner as shares of the slide
    (1.0, 0.0, 0.0), (1.0, 0.31, 0.47), (1.0, 0.72, 0.11), (1.015, 0.4, 0.3), (1.37, 0.23, 0.61),
    (2.0, 0.1, 0.2), (2.6, 0.45, 0.05), (3.0, 0.2, 0.3), (4.0, 0.05, 0.1), (5.3, 0.0, 0.25), (0.6, 0.5, 0.5),
    (1.0, 0.93, 0.9), (7.9, -0.1, -0.2),
]  # fmt: skip


class FixedPlaces(Sampler):
    """PLACES, round and round, on the one slide of a corpus: no random word decides these pixels."""

    def __init__(self, corpus: Any, size_px: int) -> None:
        super().__init__(corpus, size_px, 0.0, 0)
        index = corpus.index(0)
        self.mpp = np.asarray([min(8.0, times * index.mpp) for times, _, _ in PLACES])
        # Whole pixels of every reduced size: halfway between two, µm and pixels may round apart.
        step = [1 if times == 1 else 8 for times, _, _ in PLACES]
        width, height = index.dimensions
        self.x = np.asarray([int(p[1] * width) // k * k for p, k in zip(PLACES, step, strict=True)])
        self.y = np.asarray(
            [int(p[2] * height) // k * k for p, k in zip(PLACES, step, strict=True)]
        )

    def draw_batch(self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Any = None) -> Draws:
        draw = np.atleast_1d(np.asarray(draws, np.int64))
        k, none = draw % len(PLACES), np.zeros(len(draw), np.int64)
        return Draws(
            draw, none + np.asarray(attempt), none, self.mpp[k], self.x[k], self.y[k], none
        )


def through_loader(index: SlideIndex, size_px: int) -> np.ndarray:
    corpus = Corpus.from_slides([index], [ForegroundMask.everything(index)])
    with PatchLoader(FixedPlaces(corpus, size_px), len(PLACES), max_failed_fraction=0) as loader:
        batch = loader.next_batch()
        assert not batch.failures
        return np.array(batch.pixels)


def by_hand(index: SlideIndex, size_px: int) -> np.ndarray:
    places = FixedPlaces(_Alone(index), size_px)
    with Slide(index) as slide:
        return np.stack(
            [
                slide.read_patch(x_um=x * index.mpp_x, y_um=y * index.mpp_y, mpp=m, size_px=size_px)
                for m, x, y in zip(
                    places.mpp.tolist(), places.x.tolist(), places.y.tolist(), strict=True
                )
            ]
        )


class _Alone:
    def __init__(self, index: SlideIndex) -> None:
        self.index = lambda _: index


def short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def found(index: SlideIndex, size_px: int, file: bytes) -> dict[str, Any]:
    """What is committed of a slide."""
    return {
        "file": short(file),
        "container": index.container,
        "codec": index.codec,
        "mpp": [round(index.mpp_x, 9), round(index.mpp_y, 9)],
        "levels": [[level.width_px, level.height_px] for level in index.levels],
        "patches": [short(patch.tobytes()) for patch in by_hand(index, size_px)],
    }


@cache
def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


# --- generated ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ODD_SLIDES)
def odd(request, tmp_path_factory) -> tuple[str, OddSlide, SlideIndex]:
    path = tmp_path_factory.mktemp("odd") / f"{request.param}.tif"
    write_odd_slide(path, ODD_SLIDES[request.param])
    return request.param, ODD_SLIDES[request.param], read_slide_index(str(path))


def whole_levels(index: SlideIndex) -> list[np.ndarray]:
    with Slide(index) as slide:
        return [
            slide.read_box(number, Box(0, 0, level.width_px, level.height_px))
            for number, level in enumerate(index.levels)
        ]


def test_generated_slides_have_their_golden_pixels(odd):
    name, _, index = odd
    known, now = golden("odd_slides"), found(index, 96, Path(index.uri).read_bytes())
    if now["file"] != known[name]["file"]:
        assert known["encoder"] != ENCODER, (
            "the same encoder wrote another file: the recipe changed"
        )
        pytest.skip(
            f"{ENCODER} encodes otherwise than {known['encoder']}: the oracles below remain"
        )
    assert now == known[name]


def test_a_loader_delivers_what_a_person_reads_by_hand(odd):
    index = odd[2]
    patches = through_loader(index, 96)
    for number, (ours, theirs) in enumerate(zip(patches, by_hand(index, 96), strict=True)):
        assert (ours == theirs).all(), PLACES[number]


def empty_pixels(slide: OddSlide) -> np.ndarray:
    """Where level 0 was stored with length 0."""
    width, height = slide.size_px
    columns = -(-width // slide.tile_px)
    out = np.zeros((height, width), bool)
    for tile in slide.empty:
        top, left = tile // columns * slide.tile_px, tile % columns * slide.tile_px
        out[top : top + slide.tile_px, left : left + slide.tile_px] = True
    return out


def test_every_level_is_that_of_the_readers_people_trust(odd):
    name, recipe, index = odd
    ours, compared = whole_levels(index), 0
    blank = empty_pixels(recipe)
    assert (ours[0][blank] == 255).all()
    for level, picture in enumerate(ours):
        stored = ~blank if level == 0 else np.ones(picture.shape[:2], bool)
        oracles = [tifffile_level(name, index, level)]
        if not (level and recipe.empty):  # OpenSlide makes such levels up from the others
            oracles.append(openslide_level(index, level))
        for theirs in oracles:
            if theirs is not None:
                assert (picture[stored] == theirs[stored]).all()
                compared += 1
    assert compared >= len(ours)


def openslide_level(index: SlideIndex, level: int) -> np.ndarray | None:
    """A whole level, where OpenSlide opens the slide (no big-endian ones) and has a level of that size."""
    try:
        with openslide.OpenSlide(index.uri) as slide:
            size = (index.levels[level].width_px, index.levels[level].height_px)
            if size not in slide.level_dimensions:
                return None
            return np.asarray(slide.read_region((0, 0), slide.level_dimensions.index(size), size))[
                ..., :3
            ]
    except openslide.OpenSlideError:
        return None


def tifffile_level(name: str, index: SlideIndex, level: int) -> np.ndarray | None:
    if name == "ycbcr_ids_of_rgb":
        return None  # imagecodecs believes the ids: another picture. OpenSlide opens this one
    size = (index.levels[level].height_px, index.levels[level].width_px)
    with tifffile.TiffFile(index.uri) as file:
        pages = [page.aspage() for page in file.pages]
        pages += list(pages[0].pages or ())
        return next(
            p.asarray() for p in pages if p.is_tiled and (p.imagelength, p.imagewidth) == size
        )


def test_the_picture_is_the_one_that_was_drawn(odd):
    _, recipe, index = odd
    off = np.abs(whole_levels(index)[0].astype(int) - odd_picture(*recipe.size_px))[
        ~empty_pixels(recipe)
    ]
    assert off.mean() < 4
    assert (index.mpp_x, index.mpp_y) == pytest.approx((0.2743, 0.2743), rel=1e-6)


def test_associated_images_are_never_levels(odd):
    _, recipe, index = odd
    assert len(index.levels) == 1 + len(recipe.downsamples)
    with Slide(index) as slide:
        overview = slide.thumbnail(index.levels[-1].mpp)
    for picture in (*whole_levels(index), overview):
        red = (picture[..., 0] > 250) & (picture[..., 1:] < 5).all(axis=2)
        assert red.mean() < 1e-3


def test_resampled_patches_lie_close_to_an_area_average(odd):
    _, recipe, index = odd
    if recipe.empty or index.dimensions[0] < 300:
        return
    level0 = whole_levels(index)[0]
    for times in (1.37, 2.0):
        with Slide(index) as slide:
            ours = slide.read_patch(
                x_um=30 * index.mpp_x, y_um=18 * index.mpp_y, mpp=times * index.mpp, size_px=96
            )
        truth = area_average(level0, (30, 18, 30 + 96 * times, 18 + 96 * times), 96)
        assert np.abs(ours - truth).mean() < COLOURFUL_BOUND


def zarr_found(folder: Path) -> dict[str, Any]:
    """What is committed of a sharded store. Its chunks are stored as they are: no encoder decides where they lie."""
    storage = Storage(3, 64, compressor="none", axes="yxc", shard_px=128, crc32c=True)
    path = write_ome_zarr(
        folder / "golden.zarr",
        SyntheticSlide(1, 331, 237, mpp=0.2743),
        version="0.5",
        level0=odd_picture(331, 237),
        downsamples=(2.0,),
        storage=storage,
    )
    index = read_slide_index(str(path))
    now = found(index, 96, b"")
    del now["file"]
    loaded = [short(patch.tobytes()) for patch in through_loader(index, 96)]
    assert loaded == now["patches"]
    return {**now, "index": index.digest}


def test_a_generated_zarr_store_has_its_golden_pixels_and_index(tmp_path):
    assert zarr_found(tmp_path) == golden("zarr_store")["sharded"]


# --- real -----------------------------------------------------------------------------------------


def real_index(name: str, mpp: float | None) -> SlideIndex:
    return read_slide_index(str(SHARED_DATA / "wsi" / name), mpp=mpp)


def test_the_list_holds_every_real_jpeg_slide(real_slides):
    jpegs = {
        i.uri
        for i in real_slides.values()
        if not (i.fallback or i.container == "dicom") and i.levels[0].codec.kind == "jpeg"
    }
    listed = {str((SHARED_DATA / "wsi" / name).absolute()) for name, _ in REAL}
    assert {uri for uri in jpegs if "unreadable" not in uri} == listed


@pytest.mark.parametrize(("name", "mpp"), REAL)
def test_real_slides_have_their_golden_pixels(shared_data, name, mpp):
    index = real_index(name, mpp)
    now = found(index, 160, Path(index.uri).read_bytes())
    assert now == golden("real_slides")[name]
    for k, (ours, digest) in enumerate(
        zip(through_loader(index, 160), now["patches"], strict=True)
    ):
        assert short(ours.tobytes()) == digest, PLACES[k]


@pytest.mark.parametrize(("name", "mpp"), REAL)
def test_real_slides_have_the_pixels_of_readers_people_trust(shared_data, name, mpp):
    index = real_index(name, mpp)
    places = FixedPlaces(_Alone(index), 160)
    with Slide(index) as slide, openslide.OpenSlide(index.uri) as oracle:
        for times, x, y in zip(
            places.mpp / index.mpp, places.x.tolist(), places.y.tolist(), strict=True
        ):
            if times == 1.0:
                patch = slide.read_patch(
                    x_um=x * index.mpp_x, y_um=y * index.mpp_y, mpp=index.mpp, size_px=160
                )
                theirs = np.asarray(oracle.read_region((x, y), 0, (160, 160)))
                inside = theirs[..., 3] == 255
                assert (patch[inside] == theirs[..., :3][inside]).all()
                assert (patch[~inside] == 255).all()
        for number, level in enumerate(index.levels):
            size = (min(level.width_px, 700), min(level.height_px, 500))
            known = [
                k
                for k, d in enumerate(oracle.level_dimensions)
                if d == (level.width_px, level.height_px)
            ]
            ours = slide.read_box(number, Box(0, 0, *size))
            if known:
                theirs = np.asarray(oracle.read_region((0, 0), known[0], size))[..., :3]
            else:
                with tifffile.TiffFile(index.uri) as file:
                    theirs = file.pages[0].pages[number - 1].asarray()[: size[1], : size[0]]
            assert (ours == theirs).all()


def write_golden() -> None:
    """Make tests/golden/*.json from what is read now."""
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        odds: dict[str, Any] = {"encoder": ENCODER}
        for name, recipe in ODD_SLIDES.items():
            path = write_odd_slide(Path(folder) / f"{name}.tif", recipe)
            odds[name] = found(read_slide_index(str(path)), 96, path.read_bytes())
        stores = {"sharded": zarr_found(Path(folder))}
    _write("odd_slides", odds)
    _write("zarr_store", stores)
    if SHARED_DATA.is_dir():
        real = {}
        for name, mpp in REAL:
            index = real_index(name, mpp)
            real[name] = found(index, 160, Path(index.uri).read_bytes())
        _write("real_slides", real)


def _write(name: str, content: dict[str, Any]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_golden()
