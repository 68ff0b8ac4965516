"""Claims of the sampler, each tested on 10^5 draws, and the same tests failing on broken samplers."""

from __future__ import annotations

import numpy as np
import pytest

from online_patching import PatchSampler, errors
from online_patching.corpus import Corpus
from online_patching.sampling import placing
from online_patching.sampling import sampler as sampler_module
from online_patching.sampling.draws import Draws, Sampler
from online_patching.sampling.weights import SlideShares
from tests.sampling import ALPHA, N, index, mask_of, p_of_counts, three_corpus, three_slides

COLUMNS = ("draw", "attempt", "slide", "mpp", "x_px0", "y_px0", "tries")


@pytest.fixture(scope="module")
def three() -> Corpus:
    return three_corpus()


def make(three: Corpus, **options) -> PatchSampler:
    return PatchSampler(three, **{"size_px": 128, "mpp": [0.25, 1.0], "seed": 11, **options})


def same(one: Draws, other: Draws) -> bool:
    return all((getattr(one, c) == getattr(other, c)).all() for c in COLUMNS)


VARIANTS = [
    {},
    {"patches_per_read": 4},
    {"patches_per_slide": 7},
    {"min_foreground": 0.9},
    {"context": (4.0,)},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_draw_is_a_pure_function_of_seed_and_number(three, options):
    one, other = make(three, **options), make(three, **options)
    batch = one.draw_batch(np.arange(300))
    backwards = other.draw_batch(np.arange(300)[::-1])
    assert same(batch, backwards.take(slice(None, None, -1)))
    for i in (0, 7, 255, 299):
        assert same(batch.take([i]), other.draw_batch([i]))
        assert one[i] == one.refs(batch)[i]
    assert make(three, seed=12, **options)[5] != one[5]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_redraw_is_another_patch_and_as_pure(three, options):
    sampler = make(three, **options)
    first, again = sampler.draw_batch(np.arange(200)), sampler.draw_batch(np.arange(200), 1)
    moved = (first.x_px0 != again.x_px0) | (first.slide != again.slide)
    assert moved.mean() > 0.8
    assert (again.attempt >= 1).all()
    mixed = sampler.draw_batch([6, 7, 8], attempt=[0, 1, 0])
    assert same(mixed.take([1]), again.take([7]))
    assert same(mixed.take([0, 2]), first.take([6, 8]))


# --- slides -------------------------------------------------------------------------------------


def p_slides(sampler: PatchSampler, shares) -> float:
    seen = np.bincount(sampler.draw_batch(np.arange(N)).slide, minlength=3)
    return p_of_counts(seen, shares)


@pytest.mark.parametrize("options", [{}, {"patches_per_slide": 10}])
def test_slides_come_up_as_weighted(three, options):
    assert p_slides(make(three, **options), [1, 1, 1]) > ALPHA
    assert p_slides(make(three, slide_weights=[1, 6, 0], **options), [1, 6, 0]) > ALPHA


def test_slides_of_groups_come_up_as_weighted(three):
    one = make(three, patches_per_read=4, slide_weights=[1, 6, 2])
    slides = one.draw_batch(np.arange(N)).slide
    # Draws of a group are not independent: its first one is.
    assert p_of_counts(np.bincount(slides[::4], minlength=3), [1, 6, 2]) > ALPHA


def test_that_test_fails_when_weights_are_ignored(three, monkeypatch):
    monkeypatch.setattr(sampler_module, "SlideShares", lambda w: SlideShares(np.ones_like(w)))
    assert p_slides(make(three, slide_weights=[1, 6, 0]), [1, 6, 0]) < ALPHA


def test_that_test_fails_when_a_refused_place_redraws_the_slide(three, monkeypatch):
    assert p_slides(make(three, min_foreground=0.8), [1, 1, 1]) > ALPHA
    monkeypatch.setattr(placing, "MAX_TRIES", 1)
    assert p_slides(make(three, min_foreground=0.8), [1, 1, 1]) < ALPHA


def p_mpp_of(sampler: PatchSampler, slide: int, shares: dict[float, float]) -> float:
    draws = sampler.draw_batch(np.arange(N))
    mpp = draws.mpp[draws.slide == slide]
    assert set(mpp) <= set(shares)
    return p_of_counts([(mpp == m).sum() for m in shares], list(shares.values()))


def test_listed_mpp_come_up_as_weighted_among_those_a_slide_serves(three):
    sampler = make(three, mpp_weights=[3, 1])
    assert sampler.servable == {"a": [0.25, 1.0], "b": [0.25, 1.0], "c": [1.0]}
    assert p_mpp_of(sampler, 0, {0.25: 3, 1.0: 1}) > ALPHA
    assert p_mpp_of(sampler, 1, {0.25: 3, 1.0: 1}) > ALPHA
    assert p_mpp_of(sampler, 2, {1.0: 1}) > ALPHA


# --- places -------------------------------------------------------------------------------------


def expected_origins(limit: int, side: int) -> np.ndarray:
    """Probability of each origin when centres are uniform over [0, limit): written out anew."""
    centers = (np.arange(limit * 8) + 0.5) / 8
    origins = np.floor(centers - side / 2 + 0.5).astype(int)
    return np.bincount(np.clip(origins, 0, limit - side), minlength=limit - side + 1) / len(centers)


def p_origins(sampler: PatchSampler, axis: str = "x", mpp: float = 0.25, n: int = N) -> float:
    """Origins on slide a, which is all tissue, against the stated density, ends by themselves."""
    draws = sampler.draw_batch(np.arange(n))
    on_a = (draws.slide == 0) & (draws.mpp == mpp)
    limit, side = {"x": 900, "y": 700}[axis], round(128 * mpp / 0.25)
    last = limit - side
    bins: list = [[0], *np.array_split(np.arange(1, last), 40), [last]]
    seen = np.bincount(np.clip(getattr(draws, f"{axis}_px0")[on_a], 0, last), minlength=last + 1)
    shares = expected_origins(limit, side)
    return p_of_counts([seen[b].sum() for b in bins], [shares[b].sum() for b in bins])


@pytest.mark.parametrize(("axis", "mpp"), [("x", 0.25), ("y", 0.25), ("x", 1.0), ("y", 1.0)])
def test_places_have_the_stated_density_and_reach_both_extreme_origins(three, axis, mpp):
    assert p_origins(make(three, slide_weights=[1, 0, 0]), axis, mpp) > ALPHA


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("the last origin is lost", lambda right, c, s, limit: right(c, s, limit - 2)),
        ("level-1 bounds", lambda right, c, s, limit: right(c, s, limit // 4 + s.astype(int))),
        (
            "the side in pixels of the patch",
            lambda right, c, s, limit: right(c, s * 0 + 128, limit),
        ),
        ("origins instead of centres", lambda right, c, s, limit: right(c + s / 2, s, limit)),
    ],
)
def test_that_test_fails_on_other_bounds(three, monkeypatch, what, broken):
    right = placing.origin_inside
    monkeypatch.setattr(placing, "origin_inside", lambda c, s, limit: broken(right, c, s, limit))
    assert p_origins(make(three, slide_weights=[1, 0, 0]), "x", 1.0) < ALPHA


def p_cells(sampler: PatchSampler) -> float:
    """Centres on slide b over its 1,140 tissue cells, in blocks of 5 x 5 cells."""
    draws = sampler.draw_batch(np.arange(N))
    width, height = sampler.box_px0(draws.slide, draws.mpp)
    column = ((draws.x_px0 + width / 2) / 50).astype(int) // 5
    row = ((draws.y_px0 + height / 2) / 50).astype(int) // 5
    seen = np.bincount(row * 20 + column, minlength=260)
    tissue = np.pad(three_slides()[1][1].bits, ((0, 3), (0, 0)))
    return p_of_counts(seen, tissue.reshape(13, 5, 20, 5).sum(axis=(1, 3)).ravel())


def test_centres_are_uniform_over_tissue(three):
    options = {"slide_weights": [0, 1, 0], "min_foreground": 0.0, "size_px": 1, "mpp": 0.26}
    assert p_cells(make(three, **options)) > ALPHA


def test_that_test_fails_when_rows_are_chosen_before_cells(three, monkeypatch):
    options = {"slide_weights": [0, 1, 0], "min_foreground": 0.0, "size_px": 1, "mpp": 0.26}

    def by_rows(corpus, slide, w):
        row = np.asarray([*range(5, 25), *range(40, 60)])[w[:, 0] % 40]
        column = np.where(row < 25, 8 + w[:, 3] % 22, 60 + w[:, 3] % 35)
        return column * 50.0 + w[:, 1] % 50, row * 50.0 + w[:, 2] % 50

    monkeypatch.setattr(placing, "tissue_centers", by_rows)
    assert p_cells(make(three, **options)) < ALPHA


@pytest.mark.parametrize("options", [{}, {"patches_per_read": 4}, {"patches_per_slide": 50}])
def test_kept_patches_have_the_foreground_asked_for(three, options):
    sampler = make(three, min_foreground=0.7, **options)
    draws = sampler.draw_batch(np.arange(2000))
    masks = three_slides()[1]
    for ref in sampler.refs(draws):
        box = ref.x_px0, ref.y_px0, ref.width_px0, ref.height_px0
        assert masks[ref.slide].fraction(*box) >= 0.7


def test_boxes_differ_by_axis_where_mpp_do(three):
    sampler = make(three, slide_weights=[0, 0, 1])
    ref = sampler[0]
    assert ref.width_px0 == pytest.approx(128 * 1.0 / 1.1)
    assert ref.height_px0 == pytest.approx(128 * 1.0 / 1.14)
    draws = sampler.draw_batch(np.arange(20_000))
    assert draws.x_px0.max() == np.floor(2000 - 128 / 1.1)
    assert draws.y_px0.max() == np.floor(2600 - 128 / 1.14)


def test_a_slide_smaller_than_the_patch_is_centred():
    tiny = index("tiny", 100, 90, 0.25)
    sampler = PatchSampler([tiny], [mask_of(tiny, np.ones((9, 10), bool))], size_px=128, mpp=0.25)
    assert (sampler[0].x_px0, sampler[0].y_px0) == (-14, -19)


# --- seeds --------------------------------------------------------------------------------------


def shared_between_neighbouring_seeds(three: Corpus) -> float:
    """The defect of `seed + i`: draw i of seed s would be draw i - 1 of seed s + 1."""
    one, following = make(three, seed=11), make(three, seed=12)
    a, b = one.draw_batch(np.arange(1, 2000)), following.draw_batch(np.arange(0, 1999))
    return float(((a.x_px0 == b.x_px0) & (a.y_px0 == b.y_px0) & (a.slide == b.slide)).mean())


def test_neighbouring_seeds_share_no_stream(three):
    assert shared_between_neighbouring_seeds(three) < 0.05


def test_that_test_fails_on_seed_plus_draw(three, monkeypatch):
    for module in (sampler_module, placing):
        right = module.words
        monkeypatch.setattr(
            module, "words",
            lambda seed, draws, *rest, right=right: right(0, seed + np.asarray(draws), *rest),
        )  # fmt: skip
    assert shared_between_neighbouring_seeds(three) > 0.99


# --- quarantine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"patches_per_read": 4}, {"patches_per_slide": 50}])
def test_a_barred_slide_is_left_from_its_first_barred_draw_on(three, options):
    sampler = make(three, **options)
    free, barred = sampler.draw_batch(np.arange(600)), {1: 200, 2: 10_000}
    got = sampler.draw_batch(np.arange(600), barred=barred)
    moved = (free.slide == 1) & (free.draw >= 200)
    assert moved.sum() > 80
    assert same(free.take(~moved), got.take(~moved))
    assert not (got.slide[200:] == 1).any()
    assert (got.attempt[moved] > free.attempt[moved]).all()
    redrawn = sampler.draw_batch(np.arange(600)[moved], free.attempt[moved] + 1, barred)
    assert (redrawn.x_px0 == got.x_px0[moved]).all()


def test_when_every_slide_is_barred_it_is_said(three):
    with pytest.raises(errors.SamplerError, match="3 slide"):
        make(three).draw_batch([5], barred={0: 0, 1: 0, 2: 0})


# --- few patches a slide ------------------------------------------------------------------------


def test_a_slide_yields_no_more_patches_than_allowed_and_all_equally_often(three):
    draws = make(three, patches_per_slide=20).draw_batch(np.arange(N))
    for slide in (1, 2):
        mine = draws.take(draws.slide == slide)
        places = np.stack([mine.x_px0, mine.y_px0, (mine.mpp * 100).astype(int)], axis=1)
        distinct, counts = np.unique(places, axis=0, return_counts=True)
        assert len(distinct) == 20
        assert p_of_counts(counts, np.ones(20)) > ALPHA


def test_the_few_patches_are_among_the_many(three):
    def patches(limit: int) -> set[tuple[int, ...]]:
        draws = make(three, patches_per_slide=limit).draw_batch(np.arange(3000))
        return set(
            zip(draws.slide.tolist(), draws.x_px0.tolist(), draws.y_px0.tolist(), strict=True)
        )

    assert patches(5) < patches(40)


# --- context ------------------------------------------------------------------------------------


def furthest_centre(sampler: PatchSampler) -> float:
    """How far, in level-0 pixels, a view's centre lies from its draw's."""
    draws = sampler.expand(sampler.draw_batch(np.arange(3000)))
    width, height = sampler.box_px0(draws.slide, draws.mpp)
    views = 1 + len(sampler.context)
    x = (draws.x_px0 + width / 2).reshape(-1, views)
    y = (draws.y_px0 + height / 2).reshape(-1, views)
    return float(max(abs(x - x[:, :1]).max(), abs(y - y[:, :1]).max()))


def test_context_views_have_the_centre_of_their_draw(three):
    sampler = make(three, context=(4.0, 0.5))
    draws = sampler.draw_batch(np.arange(50))
    all_views = sampler.expand(draws)
    assert len(all_views) == 150
    assert same(all_views.take(slice(0, None, 3)), draws)
    assert (all_views.mpp.reshape(50, 3) == draws.mpp[:, None] * [1, 4, 0.5]).all()
    assert furthest_centre(sampler) <= 0.5 + 1e-9
    assert [ref.mpp for ref in sampler.refs(all_views)][:3] == (
        draws.mpp[0] * np.asarray([1, 4, 0.5])
    ).tolist()
    assert same(make(three).expand(draws), draws)


@pytest.mark.parametrize("what", ["same origin", "pushed inside"])
def test_that_test_fails_when_context_is_not_centred(three, monkeypatch, what):
    right = Sampler.expand

    def broken(self, draws):
        out = right(self, draws)
        x = out.x_px0 if what == "pushed inside" else np.repeat(draws.x_px0, 3)
        return Draws(
            out.draw, out.attempt, out.slide, out.mpp, np.maximum(x, 0), out.y_px0, out.tries
        )

    monkeypatch.setattr(Sampler, "expand", broken)
    assert furthest_centre(make(three, context=(4.0, 0.5))) > 1


def test_a_finer_context_view_limits_what_a_slide_serves(three):
    assert make(three, mpp=[0.5, 1.0], context=(0.25,)).servable == {
        "a": [0.5, 1.0], "b": [1.0], "c": [],
    }  # fmt: skip


# --- refusals -----------------------------------------------------------------------------------


def test_a_needle_biopsy_drops_out_of_coarse_fields_of_view_only(three):
    needle = index("needle", 4000, 4000, 0.25)
    tissue = np.zeros((100, 100), bool)
    tissue[:, 48:52] = True  # 40 µm wide
    slides, masks = three_slides()
    sampler = PatchSampler(
        [*slides, needle], [*masks, mask_of(needle, tissue)], size_px=128, mpp=[0.25, 1.0]
    )
    assert sampler.servable["needle"] == [0.25]
    draws = sampler.draw_batch(np.arange(400))
    assert (draws.mpp[draws.slide == 3] == 0.25).all()
    assert (draws.slide == 3).sum() > 50


def test_nothing_to_draw_is_said_with_the_numbers():
    (a, *_), (m, *_) = three_slides()
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
        {"slide_weights": [1.0, 1.0]},
        {"slide_weights": [1.0, np.nan, 1.0]},
        {"slide_weights": [0, 0, 0]},
        {"patches_per_read": 0},
        {"patches_per_slide": 0},
        {"patches_per_slide": 3, "patches_per_read": 2},
        {"context": (0.0,)},
    ],
)
def test_senseless_settings_are_refused(three, bad):
    with pytest.raises(errors.SamplerError):
        make(three, **bad)


def test_senseless_draws_are_refused(three):
    with pytest.raises(errors.SamplerError):
        make(three).draw_batch([-1])


def test_every_option_is_in_the_digest(three):
    others = [
        {"seed": 12}, {"size_px": 96}, {"mpp": [0.25]}, {"mpp_weights": [1, 2]}, {"context": (4.0,)},
        {"min_foreground": 0.3}, {"patches_per_read": 2}, {"patches_per_slide": 5},
        {"slide_weights": [1, 1, 2]},
    ]  # fmt: skip
    digests = {make(three, **other).digest for other in [{}, *others]}
    assert len(digests) == 10
