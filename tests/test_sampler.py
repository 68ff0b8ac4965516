"""Statistical claims of the sampler, and the same tests failing on samplers broken on purpose."""

from __future__ import annotations

import numpy as np
import pytest

from online_patching import ForegroundMask, PatchSampler, SlideIndex, errors
from online_patching import sampler as sampler_module
from online_patching.slide_index import Codec, Level


def index(name: str, w: int, h: int, mpp: float) -> SlideIndex:
    levels = tuple(
        Level(w // d, h // d, 256, 256, float(d), float(d), mpp * d, mpp * d, Codec("raw"))
        for d in (1, 4)
    )
    return SlideIndex(
        name, f"/nowhere/{name}", "openslide", "test", mpp, mpp, "override table", levels
    )


def mask_of(ix: SlideIndex, tissue: np.ndarray) -> ForegroundMask:
    return ForegroundMask.from_array(tissue, ix.dimensions, (ix.mpp_x, ix.mpp_y))


@pytest.fixture(scope="module")
def three() -> tuple[list[SlideIndex], list[ForegroundMask]]:
    """Three unequal slides: all tissue; two separate islands; coarse with an L of tissue."""
    a, b, c = index("a", 900, 700, 0.25), index("b", 5000, 3100, 0.26), index("c", 2000, 2600, 1.1)
    islands = np.zeros((62, 100), bool)
    islands[5:25, 8:30] = True
    islands[40:60, 60:95] = True
    ell = np.zeros((52, 40), bool)
    ell[:, :12] = True
    ell[40:, :] = True
    return [a, b, c], [mask_of(a, np.ones((7, 9), bool)), mask_of(b, islands), mask_of(c, ell)]


def make(three, **options) -> PatchSampler:
    return PatchSampler(
        three[0], three[1], **{"size_px": 128, "mpp": [0.25, 1.0], "seed": 11, **options}
    )


def test_a_draw_is_a_pure_function_of_seed_and_number(three):
    one, other = make(three), make(three)
    batch = one.refs(one.draw_batch(np.arange(300)))
    assert [other[i] for i in reversed(range(300))] == batch[::-1]
    assert make(three, seed=12)[5] != one[5]


def test_slides_come_up_equally_often_and_only_at_mpp_they_serve(three):
    sampler = make(three)
    assert sampler.servable == {"a": [0.25, 1.0], "b": [0.25, 1.0], "c": [1.0]}
    n = 100_000
    slides, choice = sampler._slide_and_mpp(np.arange(n), np.zeros(n, np.int64))
    counts = np.bincount(slides, minlength=3)
    assert abs(counts - n / 3).max() < 5 * np.sqrt(n / 3)
    assert set(choice[slides == 2]) == {1}
    fine = (choice[slides == 0] == 0).mean()
    assert abs(fine - 0.5) < 5 * 0.5 / np.sqrt(counts[0])


def test_weights_of_slides_and_mpp_are_realised(three):
    sampler = make(three, slide_weights=[1, 6, 0], mpp_weights=[3, 1])
    n = 100_000
    slides, choice = sampler._slide_and_mpp(np.arange(n), np.zeros(n, np.int64))
    counts = np.bincount(slides, minlength=3)
    assert counts[2] == 0
    assert abs(counts[1] / n - 6 / 7) < 0.006
    assert abs((choice == 0).mean() - 0.75) < 0.007


def test_kept_patches_have_the_foreground_asked_for(three):
    sampler = make(three, min_foreground=0.7)
    for ref in sampler.refs(sampler.draw_batch(np.arange(500))):
        box = ref.x_px0, ref.y_px0, ref.width_px0, ref.height_px0
        assert three[1][ref.slide].fraction(*box) >= 0.7


def chi_square_of_positions(sampler: PatchSampler, n: int = 20_000) -> float:
    """Per degree of freedom: x origins of full-tissue slide a (772 + 1 of them) against the stated density."""
    draws = sampler.draw_batch(np.arange(n))
    x = draws.x_px0[(draws.slide == 0) & (draws.mpp == 0.25)]
    last = 900 - 128
    expected = np.full(last + 1, 1 / 900)
    expected[0] += 64 / 900 - 0.5 / 900  # centres closer to the edge than half a patch
    expected[last] += 64 / 900 - 0.5 / 900
    expected /= expected.sum()
    groups = np.array_split(np.arange(1, last), 50)
    bins = [np.array([0]), *groups, np.array([last])]
    seen = np.array([np.isin(x, b).sum() for b in bins])
    want = np.array([expected[b].sum() for b in bins]) * len(x)
    return float(((seen - want) ** 2 / want).sum() / (len(bins) - 1))


def test_positions_have_the_stated_density_and_reach_both_extreme_origins(three):
    sampler = make(three)
    assert chi_square_of_positions(sampler) < 1.6
    draws = sampler.draw_batch(np.arange(3000))
    on_a = (draws.slide == 0) & (draws.mpp == 0.25)
    assert {0, 900 - 128} <= set(draws.x_px0[on_a])
    assert {0, 700 - 128} <= set(draws.y_px0[on_a])


def test_that_test_fails_when_the_last_origin_is_lost(three, monkeypatch):
    right = sampler_module.origin_inside
    monkeypatch.setattr(sampler_module, "origin_inside", lambda c, s, limit: right(c, s, limit - 2))
    assert chi_square_of_positions(make(three)) > 3


def test_that_test_fails_when_boxes_are_bounded_by_another_level(three, monkeypatch):
    right = sampler_module.origin_inside
    monkeypatch.setattr(
        sampler_module, "origin_inside", lambda c, s, limit: right(c, s, limit // 2)
    )
    assert chi_square_of_positions(make(three)) > 3


def test_neighbouring_seeds_share_no_stream(three):
    """The defect of `seed + i`: draw i of seed s would be draw i - 1 of seed s + 1."""
    one, next_seed = make(three, seed=11), make(three, seed=12)
    a, b = one.draw_batch(np.arange(1, 200)), next_seed.draw_batch(np.arange(0, 199))
    assert ((a.x_px0 == b.x_px0) & (a.y_px0 == b.y_px0)).mean() < 0.05


def test_a_redraw_is_another_patch_and_also_pure(three):
    sampler = make(three)
    again = sampler.refs(sampler.draw_batch([7], attempt=1))[0]
    assert again != sampler[7]
    assert again.attempt >= 1
    assert sampler.refs(sampler.draw_batch([6, 7, 8], attempt=[0, 1, 0]))[1] == again


def test_a_needle_biopsy_drops_out_of_coarse_fields_of_view_only(three):
    needle = index("needle", 4000, 4000, 0.25)
    tissue = np.zeros((100, 100), bool)
    tissue[:, 48:52] = True  # 40 µm wide
    sampler = PatchSampler(
        [*three[0], needle],
        [*three[1], mask_of(needle, tissue)],
        size_px=128,
        mpp=[0.25, 1.0],
        min_foreground=0.4,
    )
    assert sampler.servable["needle"] == [0.25]
    draws = sampler.draw_batch(np.arange(400))
    assert (draws.mpp[draws.slide == 3] == 0.25).all()


def test_nothing_to_draw_is_said_with_the_numbers(three):
    (a, *_), (m, *_) = three
    with pytest.raises(
        errors.SamplerError, match=r"no slide can serve \[0\.05\] µm/px: the finest has 0\.25"
    ):
        PatchSampler([a], [m], mpp=0.05)
    speck = np.zeros((70, 90), bool)
    speck[3, 4] = True
    with pytest.raises(errors.SamplerError, match="40% tissue"):
        PatchSampler([a], [mask_of(a, speck)], size_px=256, mpp=0.25)


@pytest.mark.parametrize(
    "bad",
    [
        {"mpp": []},
        {"mpp": [0.001]},
        {"min_foreground": 1.5},
        {"seed": -1},
        {"size_px": 0},
        {"mpp_weights": [1.0]},
    ],
)
def test_senseless_settings_are_refused(three, bad):
    with pytest.raises(errors.SamplerError):
        make(three, **bad)


def test_a_slide_smaller_than_the_patch_is_centred(three):
    tiny = index("tiny", 100, 90, 0.25)
    sampler = PatchSampler([tiny], [mask_of(tiny, np.ones((9, 10), bool))], size_px=128, mpp=0.25)
    ref = sampler[0]
    assert (ref.x_px0, ref.y_px0) == (-14, -19)


def test_alias_table_reproduces_its_weights():
    weights = np.asarray([0.0, 1.0, 5.0, 0.25, 0.0, 3.0])
    accept, alias = sampler_module.alias_table(weights)
    share = accept / 6
    np.add.at(share, alias, (1 - accept) / 6)
    assert share == pytest.approx(weights / weights.sum())
