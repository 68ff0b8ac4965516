"""The planner of a batch against plan.plan_patch, draw by draw; and what sharing a canvas may not change."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_patching import Corpus, ForegroundMask, SlideIndex, errors
from online_patching.batch_plan import WHOLE, can_plan, plan_batch
from online_patching.batch_plan.chunk_spec import native_spec
from online_patching.fetch import pieces_of
from online_patching.geometry import PatchRef
from online_patching.plan import plan_patch
from online_patching.sampling.sampler import Draws
from online_patching.slide_index import ChunkKeys, Codec, Level, SlideObject, pack_rows

SIZE = 56


def slide(
    name, w, h, tiles, mpp, downsamples=(1.0,), huge=False, kind="jpeg", reductions=0, objects=0,
    parts=0,
) -> SlideIndex:  # fmt: skip
    """`objects`: how many the tiles lie in; `parts`: chunks a tile, of a name each (0: byte ranges)."""
    levels, offset = [], 0 if objects else 1000
    edges = [0]
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
            kind, "rgb" if number else "ycbcr", b"\xff\xd8tables\xff\xd9" if number else b"",
            reductions=reductions,
        )  # fmt: skip
        ends = np.cumsum(lengths) + int(starts[0])
        edges += ends[np.linspace(0, n - 1, max(1, objects) + 1).astype(int)[1:]].tolist()
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
                None if parts else rows,
                () if parts else overflow,
                ChunkKeys(f"{number}/", "/", "cyx") if parts else None,
                max(1, parts),
            )
        )
    items = tuple(
        SlideObject(f"{name}/{k}.dcm", b - a, f"{b - a}-{k + 1}")
        for k, (a, b) in enumerate(pairwise(edges))
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
        objects=items if objects else (),
    )


SLIDES = [
    slide("a", 3000, 2111, [(256, 256)], (0.25, 0.2552), (1.0, 3.9995, 16.01)),
    slide("b", 1777, 2500, [(240, 240), (128, 96)], (0.5, 0.497), (1.0, 4.0)),
    slide("huge", 900, 700, [(512, 512)], (0.37, 0.37), (1.0,), huge=True),
    slide("odd", 801, 803, [(100, 36)], (0.3, 0.3), (1.0, 2.0)),
    slide(
        "waves", 1500, 2100, [(256, 192)], (0.25, 0.25), (1.0, 4.0), kind="jpeg2000", reductions=4
    ),
    slide("few waves", 1500, 900, [(128, 128)], (0.25, 0.25), kind="jpeg2000", reductions=1),
    slide("packed", 900, 700, [(256, 256)], (0.5, 0.5), kind="deflate"),
    slide("several", 1900, 1700, [(256, 256)], (0.26, 0.26), (1.0, 4.0), objects=5),
    slide("chunks", 1000, 1300, [(200, 100)], (0.25, 0.25), (1.0, 2.0), kind="chunk", parts=1),
    slide("planes", 1000, 1300, [(200, 100)], (0.25, 0.25), (1.0, 2.0), kind="chunk", parts=3),
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
        its = plan.tiles_of(canvas)
        for t, number in zip(plan.tiles[its], plan.number[its], strict=True):
            tiles[int(number), int(t["channel"])] = t
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
            for piece in pieces_of(index, expected):
                tile = piece.tile
                seen = tiles[tile.number, piece.part]
                if piece.start == piece.stop:
                    assert seen["length"] == 0
                else:
                    assert plan.keys[seen["file"]] == piece.key
                    assert plan.tokens[seen["file"]] == piece.token
                    assert seen["start"] == piece.start
                    stop = None if seen["length"] == WHOLE else seen["start"] + seen["length"]
                    assert stop == piece.stop
                left = tile.left + int(seen["left"]) - int(seen["x"])
                top = tile.top + int(seen["top"]) - int(seen["y"])
                assert tuple(output[n] for n in ("left", "top", "right", "bottom")) == window
                assert output["x"] + left == expected.box.left
                assert output["y"] + top == expected.box.top
                if per_read == 1:
                    assert (left, top) == (expected.box.left, expected.box.top)
            if per_read == 1:
                assert (c["width"], c["height"]) == (expected.box.width, expected.box.height)
                assert set(tiles) == {(p.tile.number, p.part) for p in pieces_of(index, expected)}
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


def test_all_is_planned_but_what_another_library_reads():
    other = replace(
        SLIDES[0], container="openslide", levels=(replace(SLIDES[0].levels[0], rows=None),)
    )
    indexes = [SLIDES[0], other, SLIDES[-1], SLIDES[-3]]
    corpus = Corpus.from_slides(indexes, [ForegroundMask.everything(s) for s in indexes])
    assert can_plan(corpus, np.arange(4)).tolist() == [True, False, True, True]


def test_files_are_what_was_indexed_and_begin_where_their_addresses_do():
    number = next(i for i, one in enumerate(SLIDES) if one.slide_id == "several")
    index = SLIDES[number]
    plan = plan_batch(
        CORPUS, draws([(number, 0.26, x, 300) for x in range(0, 1900, 90)]), SIZE, np.arange(22)
    )
    used = np.unique(plan.tiles["file"][plan.tiles["length"] > 0])
    assert len(used) > 1
    for file in used.tolist():
        item = next(o for o in index.objects if plan.keys[file].endswith(o.name))
        k = index.objects.index(item)
        record = plan.files[file]
        assert record["base"] == sum(o.size_bytes for o in index.objects[:k])
        assert (record["size_bytes"], record["mtime_ns"]) == (item.size_bytes, k + 1)


def test_a_tile_that_lies_in_no_object_is_refused():
    whole = next(one for one in SLIDES if one.slide_id == "several")
    short = replace(whole, objects=whole.objects[:1])
    corpus = Corpus.from_slides([short], [ForegroundMask.everything(short)])
    with pytest.raises(errors.CorpusError, match="lies in no object"):
        plan_batch(corpus, draws([(0, 0.26, 1500, 1400)]), SIZE, np.arange(1))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.98, 1.9, 2.0, 3.95, 8.0])
def test_the_dct_scale_leaves_at_most_two_percent_too_coarse(mpp):
    plan = plan_batch(CORPUS, draws([(2, mpp, 0, 0)]), SIZE, np.arange(1))
    scale = int(plan.canvases["scale"][0])
    assert scale * 0.37 <= max(mpp * 1.02, 0.37)
    assert scale == 8 or 2 * scale * 0.37 > mpp * 1.02


def test_plain_packed_tiles_are_what_chunks_are_and_others_are_decoded_portably():
    for kind, compressor in (("raw", 0), ("zstd", 2), ("deflate", 4)):
        spec = native_spec(Codec(kind))
        assert spec is not None
        assert (spec[:3], spec[4], int.from_bytes(spec[8:], "little")) == (b"yxc", compressor, 3)
    odd: list[dict[str, Any]] = [{"predictor": 2}, {"samples": 4}, {"samples": 1}, {"planar": True}]
    odd.append({"colour": "ycbcr"})
    assert [native_spec(Codec("raw", **fields)) for fields in odd] == [None] * 5
    assert native_spec(Codec("lzw")) is None
