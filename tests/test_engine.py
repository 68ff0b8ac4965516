"""What the engine does around decoding: shared canvases, context views, pixel filters, replacements."""

from __future__ import annotations

import functools
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    native,
    open_slide,
    read_slide_index,
)
from online_patching.loading.batch import FILTERED
from online_patching.sampling.filters import HsvFilter
from online_patching.testing import SyntheticSlide, write_tiff

DECODERS = [
    pytest.param(True, marks=pytest.mark.skipif(not native.AVAILABLE, reason=native.ABOUT)),
    False,
]


@pytest.fixture(params=DECODERS, ids=lambda native_one: "native" if native_one else "portable")
def either_decoder(request, monkeypatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", request.param)


def everything(indexes):
    return [ForegroundMask.everything(index) for index in indexes]


def by_hand(index: SlideIndex, ref) -> np.ndarray:
    """The same patch through the other path: one slide, one patch, the portable decoder."""
    from online_patching.plan import plan_patch

    with open_slide(index) as slide:
        return slide.read_plan(plan_patch(index, ref))


@pytest.mark.parametrize("mpp", [0.2531, 0.6, 1.4])
def test_patches_that_share_a_read_are_the_patches_read_alone(either_decoder, small_indexes, mpp):
    sampler = PatchSampler(
        small_indexes, everything(small_indexes), size_px=80, mpp=mpp, patches_per_read=4, seed=5
    )
    with PatchLoader(sampler, 16) as loader:
        for _ in range(2):
            batch = next(loader)
            for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
                assert (pixels == by_hand(small_indexes[ref.slide], ref)).all()


def test_patches_that_share_a_read_touch_fewer_tiles(either_decoder, small_indexes):
    tiles = []
    for k in (1, 4):
        sampler = PatchSampler(
            small_indexes[:1],
            everything(small_indexes[:1]),
            size_px=80,
            mpp=0.2531,
            patches_per_read=k,
        )
        with PatchLoader(sampler, 64, prefetch=1) as loader:
            next(loader)
            tiles.append(loader.stats.tiles)
    assert tiles[1] < 0.6 * tiles[0]


def test_context_views_show_the_same_centre_further_away(either_decoder, small_indexes):
    sampler = PatchSampler(
        small_indexes,
        everything(small_indexes),
        size_px=64,
        mpp=[0.4, 0.8],
        context=(2.0, 4.0),
        seed=2,
    )
    with PatchLoader(sampler, 12) as loader:
        batch = next(loader)
    assert batch.pixels.shape == (12, 3, 64, 64, 3)
    views = sampler.refs(sampler.expand(batch.columns))
    for i, ref in enumerate(views):
        primary = batch.refs[i // 3]
        assert ref.mpp == primary.mpp * (1.0, 2.0, 4.0)[i % 3]
        assert abs(ref.x_px0 + ref.width_px0 / 2 - primary.x_px0 - primary.width_px0 / 2) <= 1
        assert (batch.pixels[i // 3, i % 3] == by_hand(small_indexes[ref.slide], ref)).all()


class OnlyDark:
    """Keeps patches darker than most; a filter of somebody's own."""

    name = "only dark"
    config: dict[str, float] = {"below": 190.0}  # noqa: RUF012

    def keep(self, pixels):
        return pixels.reshape(len(pixels), -1).mean(axis=1) < 190.0


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_filter_refuses_is_replaced_and_counted_apart(small_indexes, workers):
    options = {"size_px": 64, "mpp": 0.5, "seed": 4, "min_foreground": 0.0}
    masks = everything(small_indexes)
    plain = PatchSampler(small_indexes, masks, **options)
    chosen = PatchSampler(small_indexes, masks, **options, filters=(OnlyDark(),))
    with PatchLoader(plain, 32) as loader:
        before = next(loader)
    with PatchLoader(chosen, 32, workers=workers) as loader:
        after = next(loader)
        assert sum(loader.stats.filtered.values()) > 0
        assert not loader.stats.failures
    kept = OnlyDark().keep(before.pixels)
    assert 0 < kept.sum() < 32
    assert OnlyDark().keep(after.pixels).all()
    # A draw that passes is untouched; one that does not is the first later attempt that passes.
    assert (after.pixels[kept] == before.pixels[kept]).all()
    for i in np.flatnonzero(~kept):
        attempt = int(after.columns.attempt[i])
        refused = [f for f in after.failures if f.draw == i]
        assert [f.attempt for f in refused] == list(range(attempt))
        assert all(f.reason == f"{FILTERED}only dark" for f in refused)
        ref = plain.refs(plain.draw_batch([i], attempt))[0]
        assert (after.pixels[i] == by_hand(small_indexes[ref.slide], ref)).all()


def test_a_filter_that_keeps_nothing_stops_with_its_name(small_indexes):
    sampler = PatchSampler(
        small_indexes[:1],
        everything(small_indexes[:1]),
        size_px=32,
        mpp=0.5,
        filters=(HsvFilter(min_share=1.0, hue=(250, 255)),),
    )
    with PatchLoader(sampler, 2) as loader, pytest.raises(Exception, match="filter: ") as caught:
        next(loader)
    assert "attempts" in str(caught.value) or "times" in str(caught.value)


@pytest.fixture
def one_bad_tile(tmp_path: Path) -> SlideIndex:
    """A slide one tile of which holds zeros where its picture should be."""
    path = write_tiff(tmp_path / "bad.svs", SyntheticSlide(7, 1500, 1300, mpp=0.5), tile_px=240)
    index = read_slide_index(str(path))
    start, stop = index.levels[0].byte_range(9)
    with path.open("r+b") as file:
        file.seek(start + (stop - start) // 2)
        file.write(bytes((stop - start) // 2))
    return replace(read_slide_index(str(path)), slide_id="bad")


@pytest.mark.parametrize("k", [1, 4])
def test_only_patches_that_touch_the_damage_are_replaced(either_decoder, one_bad_tile, k):
    sampler = PatchSampler(
        [one_bad_tile], everything([one_bad_tile]), size_px=80, mpp=0.5, patches_per_read=k, seed=1
    )
    with PatchLoader(sampler, 128, max_failed_fraction=1.0) as loader:
        batch = next(loader)
    level, tile = one_bad_tile.levels[0], 9
    left, top = tile % level.columns * 240, tile // level.columns * 240
    drawn = sampler.draw_batch(np.arange(128))
    touches = (
        (drawn.x_px0 < left + 240) & (drawn.x_px0 + 80 > left)
        & (drawn.y_px0 < top + 240) & (drawn.y_px0 + 80 > top)
    )  # fmt: skip
    assert touches.any()
    replaced = {f.draw for f in batch.failures if f.attempt == 0}
    assert replaced <= set(np.flatnonzero(touches).tolist())
    # Flipped or missing bits below the last row that is wanted may pass; what reaches deep into it must not.
    deep = touches & (drawn.y_px0 + 80 >= top + 200)
    assert set(np.flatnonzero(deep & touches).tolist()) <= replaced
    for ref, pixels in zip(batch.refs, batch.pixels, strict=True):
        if ref.attempt == 0 and ref.draw not in np.flatnonzero(touches):
            assert (pixels == by_hand(one_bad_tile, ref)).all()


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, as any web server does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        body = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("k", [1, 2])
def test_remote_patches_are_the_local_ones(either_decoder, small_slides, k):
    folder = small_slides[0].parent
    handler = functools.partial(Ranges, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pixels = []
        for base in (str(folder), f"http://127.0.0.1:{server.server_port}"):
            indexes = [read_slide_index(f"{base}/{path.name}") for path in small_slides[:2]]
            sampler = PatchSampler(
                indexes,
                everything(indexes),
                size_px=72,
                mpp=[0.5, 0.9, 2.1],
                patches_per_read=k,
                context=(2.0,),
            )
            with PatchLoader(sampler, 16) as loader:
                pixels.append(next(loader).pixels)
        server.shutdown()
    assert (pixels[0] == pixels[1]).all()
