"""The planner of a batch against plan.plan_patch, draw by draw; and what sharing a canvas may not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_patching import Corpus, ForegroundMask, SlideIndex
from online_patching.batch_plan import can_plan, plan_batch
from online_patching.geometry import PatchRef
from online_patching.plan import plan_patch
from online_patching.sampling.sampler import Draws
from online_patching.slide_index import Codec, Level, pack_rows

SIZE = 56


def slide(name, w, h, tiles, mpp, downsamples=(1.0,), huge=False, kind="jpeg") -> SlideIndex:
    levels, offset = [], 1000
    for number, ds in enumerate(downsamples):
        lw, lh = max(1, int(w / ds)), max(1, int(h / ds))
        tw, th = tiles[number % len(tiles)]
        n = -(-lw // tw) * -(-lh // th)
        lengths = np.arange(n) % 97 * 10  # some are 0: not stored
        if huge:
            lengths = lengths + (np.arange(n) % 3 == 0) * 2**24
        starts = offset + np.cumsum(lengths) - lengths
        offset += int(lengths.sum())
        rows, overflow = pack_rows(starts, lengths)
        codec = Codec(
            kind, "rgb" if number else "ycbcr", b"\xff\xd8tables\xff\xd9" if number else b""
        )
        levels.append(
            Level(
                lw,
                lh,
                tw,
                th,
                w / lw,
                h / lh,
                mpp[0] * w / lw,
                mpp[1] * h / lh,
                codec,
                rows,
                overflow,
            )
        )
    return SlideIndex(
        name,
        f"/slides/{name}",
        "svs",
        "x",
        mpp[0],
        mpp[1],
        "test",
        tuple(levels),
        offset,
        f"{offset}-77",
    )


SLIDES = [
    slide("a", 3000, 2111, [(256, 256)], (0.25, 0.2552), (1.0, 3.9995, 16.01)),
    slide("b", 1777, 2500, [(240, 240), (128, 96)], (0.5, 0.497), (1.0, 4.0)),
    slide("huge", 900, 700, [(512, 512)], (0.37, 0.37), (1.0,), huge=True),
    slide("odd", 801, 803, [(100, 36)], (0.3, 0.3), (1.0, 2.0)),
]
CORPUS = Corpus.from_slides(SLIDES, [ForegroundMask.everything(s) for s in SLIDES])


def draws(rows) -> Draws:
    number, mpp, x, y = (np.asarray(column) for column in zip(*rows, strict=True))
    n = np.arange(len(rows))
    zero = np.zeros(len(rows), np.int64)
    return Draws(
        n,
        zero,
        number.astype(np.int64),
        mpp.astype(float),
        x.astype(np.int64),
        y.astype(np.int64),
        zero,
    )


one_draw = st.tuples(
    st.integers(0, len(SLIDES) - 1),
    st.floats(0.26, 9.0),
    st.integers(-900, 3300),
    st.integers(-900, 3300),
)


@given(st.lists(one_draw, min_size=1, max_size=12), st.sampled_from([1, 2, 5]))
@settings(max_examples=300, deadline=None)
def test_a_batch_is_planned_as_its_patches_are_one_by_one(rows, per_read):
    columns = draws(rows)
    places = np.arange(len(rows))[::-1].copy()
    plan = plan_batch(CORPUS, columns, SIZE, places, per_read)
    assert sorted(plan.row) == list(range(len(rows)))
    for canvas in range(len(plan)):
        c = plan.canvases[canvas]
        outputs = plan.outputs_of(canvas)
        assert per_read > 1 or outputs.stop - outputs.start == 1
        tiles = {}
        for t, number in zip(
            plan.tiles[plan.tiles_of(canvas)], plan.number[plan.tiles_of(canvas)], strict=True
        ):
            tiles[int(number)] = t
        for output, row in zip(plan.outputs[outputs], plan.row[outputs], strict=True):
            number, mpp, x, y = rows[row]
            index = SLIDES[number]
            w, h = SIZE * mpp / index.mpp_x, SIZE * mpp / index.mpp_y
            expected = plan_patch(index, PatchRef(row, 0, number, "", x, y, w, h, mpp, SIZE))
            level = index.levels[expected.level].reduced(expected.scale)
            assert plan.slide[canvas] == number
            assert plan.level[canvas] - CORPUS.records["first_level"][number] == expected.level
            assert c["scale"] == expected.scale
            assert (c["tile_width"], c["tile_height"]) == (
                level.tile_width_px * expected.scale, level.tile_height_px * expected.scale
            )  # fmt: skip
            assert output["target"] == places[row] * SIZE * SIZE * 3
            assert bool(output["exact"]) == (expected.window is None)
            # Where the canvas lies on the level follows from any of its tiles.
            window = expected.window or (0, 0, SIZE, SIZE)
            assert (output["box_width"], output["box_height"]) == (
                expected.box.width,
                expected.box.height,
            )
            for tile in expected.tiles:
                seen = tiles[tile.number]
                assert (seen["start"], seen["start"] + seen["length"]) == index.levels[
                    expected.level
                ].byte_range(tile.number)
                left = tile.left + int(seen["left"]) - int(seen["x"])
                top = tile.top + int(seen["top"]) - int(seen["y"])
                assert tuple(output[n] for n in ("left", "top", "right", "bottom")) == window
                assert output["x"] + left == expected.box.left
                assert output["y"] + top == expected.box.top
                if per_read == 1:
                    assert (left, top) == (expected.box.left, expected.box.top)
            if per_read == 1:
                assert (c["width"], c["height"]) == (expected.box.width, expected.box.height)
                assert set(tiles) == {tile.number for tile in expected.tiles}
            assert 0 <= output["x"] <= c["width"] - output["box_width"]
            assert 0 <= output["y"] <= c["height"] - output["box_height"]
    # What is seen of a tile stays inside the tile, the level and the canvas.
    owner = np.repeat(np.arange(len(plan)), plan.canvases["n_tiles"])
    for t, c in zip(plan.tiles, plan.canvases[owner], strict=True):
        assert t["left"] >= 0
        assert t["left"] + t["width"] <= c["tile_width"] // c["scale"]
        assert 0 <= t["x"] <= c["width"] - t["width"]
        assert 0 <= t["y"] <= c["height"] - t["height"]


def test_neighbours_share_a_canvas_and_its_tiles():
    columns = draws([(0, 0.25, 100, 100), (0, 0.25, 140, 120), (0, 0.25, 2500, 2000)])
    together = plan_batch(CORPUS, columns, SIZE, np.arange(3), 3)
    apart = plan_batch(CORPUS, columns, SIZE, np.arange(3), 1)
    assert len(apart) == 3
    # The third is far off: a canvas over all three would be mostly waste.
    assert len(together) in (2, 3)
    near = plan_batch(
        CORPUS, draws([(0, 0.25, 100, 100), (0, 0.25, 140, 120)]), SIZE, np.arange(2), 2
    )
    assert len(near) == 1
    assert len(near.tiles) == 1


def test_only_jpeg_in_one_object_is_planned():
    other = slide("deflate", 900, 700, [(256, 256)], (0.5, 0.5), kind="deflate")
    corpus = Corpus.from_slides(
        [SLIDES[0], other], [ForegroundMask.everything(s) for s in (SLIDES[0], other)]
    )
    assert can_plan(corpus, np.asarray([0, 1, 0])).tolist() == [True, False, True]


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.98, 1.9, 2.0, 3.95, 8.0])
def test_the_dct_scale_leaves_at_most_two_percent_too_coarse(mpp):
    plan = plan_batch(CORPUS, draws([(2, mpp, 0, 0)]), SIZE, np.arange(1))
    scale = int(plan.canvases["scale"][0])
    assert scale * 0.37 <= max(mpp * 1.02, 0.37)
    assert scale == 8 or 2 * scale * 0.37 > mpp * 1.02
