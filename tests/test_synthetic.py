"""Synthetic thumbnails: the same for ever, true to their conventions, and of every kind."""

import numpy as np
import pytest
from scipy import ndimage

from pathfm.segmentation.synthetic import TISSUE_KINDS, Kind, draw_thumbnail
from pathfm.segmentation.synthetic.artefacts import _bubble
from pathfm.segmentation.synthetic.canvas import Canvas, f32
from pathfm.segmentation.synthetic.frames import _strip
from pathfm.segmentation.synthetic.pen import OPAQUE, _ink
from pathfm.segmentation.synthetic.stains import Stain
from pathfm.segmentation.synthetic.textures import cell_walls
from pathfm.segmentation.synthetic.tissue import WIDE_HOLE_PX, _crumbs, _wide, lay_tissue


def canvas(size: int = 96, seed: int = 0) -> Canvas:
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    white = np.full((size, size, 3), 240, np.float32)
    return Canvas(rng, size, white, np.zeros((size, size), np.uint8))


def test_a_thumbnail_is_a_pure_function_of_seed_and_draw():
    drawn = [draw_thumbnail(s, d, 96) for s, d in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert all(t.rgb.shape == (96, 96, 3) and t.kinds.shape == (96, 96) for t in drawn)
    assert all(t.rgb.dtype == np.uint8 and t.kinds.dtype == np.uint8 for t in drawn)
    assert np.array_equal(drawn[0].rgb, drawn[3].rgb)
    assert np.array_equal(drawn[0].kinds, drawn[3].kinds)
    assert (drawn[0].stain, drawn[0].mpp) == (drawn[3].stain, drawn[3].mpp)
    assert not np.array_equal(drawn[0].rgb, drawn[1].rgb)
    assert not np.array_equal(drawn[0].rgb, drawn[2].rgb)


def test_sixty_thumbnails_hold_every_kind_many_stains_and_frames_without_glass_or_tissue():
    drawn = [draw_thumbnail(0, d, 96) for d in range(60)]
    seen = {k for t in drawn for k in np.unique(t.kinds).tolist()}
    assert seen == {int(k) for k in Kind}
    assert len({t.stain for t in drawn if t.stain}) >= 6
    shares = [t.tissue.mean() for t in drawn]
    assert min(shares) == 0
    assert max(shares) > 0.98
    assert 0.15 < np.mean(shares) < 0.6
    assert all((t.stain == "") == (not t.tissue.any()) for t in drawn)
    assert all(4 <= t.mpp < 24 for t in drawn)


def test_tissue_is_the_union_of_its_three_kinds():
    t = draw_thumbnail(0, 3, 128)
    assert np.array_equal(t.tissue, np.isin(t.kinds, [int(k) for k in TISSUE_KINDS]))


@pytest.mark.slow
def test_tissue_of_every_picture_can_be_told_from_its_glass():
    faint = []
    for d in range(80):
        t = draw_thumbnail(7, d, 160)
        solid, glass = t.tissue, t.kinds == Kind.GLASS
        if solid.sum() < 400 or glass.sum() < 400:
            continue
        away = np.abs(t.rgb[solid].mean(axis=0) - np.median(t.rgb[glass], axis=0)).max()
        faint.append(away)
    assert min(faint) > 2  # grey levels
    assert np.median(faint) > 25


def test_the_palest_stain_still_shows():
    nothing = Stain("H&E", f32([1, 1, 1]), f32([1, 1, 1]), f32([1, 1, 1]), 0.0, 1e-5)
    for seed in range(5):
        c = canvas(128, seed)
        lay_tissue(c, np.full((128, 128), 99, np.float32), "full", nothing, 0.1)
        assert -np.log(c.rgb / 240).mean() > 0.02


def test_wide_holes_are_glass_and_narrow_ones_are_not():
    white = np.zeros((120, 160), bool)
    white[30:50, 30:50] = True  # wide
    white[30:50, 80:86] = True  # a slit 6 px wide
    white[90:96, 100:106] = True  # a small hole
    wide = _wide(white)
    assert wide[32:48, 32:48].all()
    assert not wide[:, 70:].any()
    assert not (wide & ~white).any()


@pytest.mark.parametrize("width", [8, 10, 16, 20])
def test_a_slit_is_glass_from_the_stated_width_on(width):
    white = np.zeros((96, 120), bool)
    white[:, 50 : 50 + width] = True
    assert _wide(white)[48, 50 + width // 2] == (width > WIDE_HOLE_PX)


def test_wide_parts_agree_with_a_morphological_opening_by_a_disc():
    field = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((128, 160)), 7)
    white = field > 0
    y, x = np.mgrid[-6:7, -6:7]
    padded = np.pad(white, 16, mode="edge")
    opened = ndimage.binary_opening(padded, x * x + y * y <= 36)[16:-16, 16:-16]
    found = _wide(white)
    both, either = (opened & found).sum(), (opened | found).sum()
    assert both / either > 0.93  # half size costs a pixel at corners


def test_pictures_all_white_or_all_covered_stay_so():
    assert _wide(np.ones((9, 9), bool)).all()
    assert not _wide(np.zeros((9, 9), bool)).any()


def test_crumbs_are_pieces_too_small_to_be_drawn():
    tissue = np.zeros((40, 50), bool)
    tissue[5:25, 5:25] = True
    tissue[30:35, 30:35] = True
    crumbs = _crumbs(tissue)
    assert crumbs[30:35, 30:35].all()
    assert crumbs.sum() == 25
    assert not _crumbs(tissue[:28]).any()


def test_opaque_ink_hides_tissue_and_thin_ink_does_not():
    line = np.stack([np.full(40, 48.0), np.linspace(10, 86, 40)], 1)
    seen = set()
    for seed in range(30):
        c = canvas(seed=seed)
        c.kinds[:, :] = Kind.TISSUE
        c.rgb[:] = (200, 120, 170)
        before = c.rgb.copy()
        _ink(c, f32([20, 30, 160]), line, 12)
        hidden = c.kinds == Kind.PEN
        seen.add(bool(hidden.any()))
        changed = np.abs(c.rgb - before).max(axis=2)
        if hidden.any():
            assert changed[hidden].mean() > 60
        assert not hidden[changed < 3].any()
    assert seen == {True, False}
    assert 0.2 < OPAQUE < 0.9


def test_ink_on_glass_is_pen_however_thin():
    line = np.stack([np.full(40, 48.0), np.linspace(10, 86, 40)], 1)
    for seed in range(12):
        c = canvas(seed=seed)
        _ink(c, f32([20, 130, 95]), line, 12)
        dark = np.abs(c.rgb - 240).max(axis=2) > 40
        assert dark.any()
        assert (c.kinds[dark] == Kind.PEN).mean() > 0.95


def test_a_bubble_over_tissue_leaves_tissue_and_on_glass_is_a_bubble():
    c = canvas()
    c.kinds[:, :48] = Kind.TISSUE
    y, x = np.mgrid[0:96, 0:96]
    _bubble(c, f32(30 - np.hypot(x - 48, y - 48)), 0.8)
    assert (c.kinds[:, :48] == Kind.TISSUE).all()
    assert c.kinds[48, 60] == Kind.BUBBLE
    assert c.kinds[48, 48 + 40] == Kind.GLASS


def test_walls_of_cells_agree_with_a_search_over_all_seats():
    c = canvas(40, seed=3)
    walls = cell_walls(c, 9.0)
    again = canvas(40, seed=3)
    n = int(40 / 9.0) + 4
    seats = again.rng.random((n, n, 2), np.float32) * 0.8 + 0.1
    i, j = np.mgrid[0:n, 0:n]
    at = np.stack([(i + seats[..., 0]), (j + seats[..., 1])], -1).reshape(-1, 2)
    for y, x in ((0, 0), (7, 31), (20, 20), (39, 12)):
        gaps = np.sort(np.hypot(at[:, 0] - (y / 9 + 1), at[:, 1] - (x / 9 + 1)))
        assert walls[y, x] == pytest.approx((gaps[1] - gaps[0]) * 4.5, abs=1e-3)


def test_noise_has_mean_0_sd_1_and_the_scale_asked_for():
    c = canvas(256)
    for scale, stretch in ((4.0, 1.0), (24.0, 1.0), (6.0, 4.0)):
        field = c.noise(scale, 2, stretch)
        assert field.shape == (256, 256)
        assert abs(float(field.mean())) < 1e-3
        assert float(field.std()) == pytest.approx(1, abs=1e-3)
    steps = [float(np.abs(np.diff(c.noise(s, 1), axis=1)).mean()) for s in (2.0, 8.0, 32.0)]
    assert steps[0] > 2 * steps[1] > 4 * steps[2]


def test_stretched_noise_runs_along_one_way():
    rough = canvas(192, seed=2).noise(4.0, 1, stretch=8.0)
    gy, gx = np.gradient(rough)
    tensor = np.array([[np.mean(gx * gx), np.mean(gx * gy)], [np.mean(gx * gy), np.mean(gy * gy)]])
    small, large = np.linalg.eigvalsh(tensor)
    assert large > 4 * small


@pytest.mark.parametrize("depth", [0, 3])
def test_a_strip_has_the_depth_asked_for_on_every_side(depth):
    for side in range(4):
        ones = np.zeros((10, 10))
        ones[_strip(side, depth)] = 1
        assert ones.sum() == 10 * depth
