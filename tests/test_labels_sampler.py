"""BalancedSampler: every class exactly as often as promised, whatever splits the stream."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_patching import BalancedSampler, Corpus, CorpusView, PatchLoader, PatchSampler, errors
from online_patching.philox import words
from online_patching.sampling.class_order import ClassOrder
from tests.ranks import World
from tests.sampling import ALPHA, islands, mask_of, p_of_counts, three_corpus, three_slides

COMMON = {"size_px": 128, "mpp": [0.25, 1.0], "seed": 0x123456789ABCDEF0}


def balanced(labels=(0, 1, 1), names=("x", "y"), **options) -> BalancedSampler:
    return BalancedSampler(three_corpus(), list(labels), names, **(COMMON | options))


def two_islands() -> CorpusView:
    """Slide b twice: its upper left island, and its lower right one; and slide c."""
    corpus, (_, b, _), masks = three_corpus(), *three_slides()
    upper, lower = islands(), islands()
    upper[30:], lower[:30] = False, False
    return CorpusView(corpus, [1, 1, 2], [mask_of(b, upper), mask_of(b, lower), masks[2]])


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**50),
)
def test_every_block_holds_each_class_exactly_its_weight(weights, seed, first):
    order = ClassOrder(weights, seed)
    start = first // order.block_draws * order.block_draws
    found = order.classes(np.arange(start, start + 3 * order.block_draws))
    for block in found.reshape(3, -1):
        assert np.bincount(block, minlength=len(weights)).tolist() == weights


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=8),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_classes_do_not_depend_on_which_draws_are_asked_for_together(weights, parts):
    order, n = ClassOrder(weights, 5), sum(parts)
    whole = order.classes(np.arange(n))
    cut = np.split(np.arange(n), np.cumsum(parts)[:-1])
    assert np.concatenate([order.classes(part) for part in cut]).tolist() == whole.tolist()
    backwards = order.classes(np.arange(n)[::-1])
    assert backwards.tolist() == whole[::-1].tolist()


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.integers(1, 6), min_size=1, max_size=10), blocks=st.integers(1, 9))
def test_ordinals_number_the_draws_of_each_class_without_gap_or_repeat(weights, blocks):
    order = ClassOrder(weights, 9)
    which, ordinal = order.ordinals(np.arange(blocks * order.block_draws))
    for c, weight in enumerate(weights):
        assert sorted(ordinal[which == c].tolist()) == list(range(blocks * weight))


def test_the_order_of_a_block_is_the_sort_of_the_words_of_its_number():
    """The definition, word by word."""
    order = ClassOrder([1, 2, 1], seed=77)
    classes = [0, 1, 1, 2]
    for block in (0, 1, 2**33):
        drawn = words(77, [block], 0, (1 << 18) + 8192, 4)[0].tolist()
        wanted = [classes[place] for place in sorted(range(4), key=lambda k: drawn[k])]
        assert order.classes(np.arange(4 * block, 4 * block + 4)).tolist() == wanted


def test_all_orders_of_a_block_are_equally_likely():
    found = ClassOrder([1, 1, 1, 1], seed=3).classes(np.arange(4 * 24_000)).reshape(-1, 4)
    seen = Counter(map(tuple, found.tolist()))
    counts = [seen[one] for one in permutations(range(4))]
    assert p_of_counts(counts, [1] * 24) > ALPHA


def test_the_class_order_stays_what_it_was():
    """Golden: another order would change every labelled run that is resumed."""
    start = np.concatenate([np.arange(15), 2**40 + np.arange(10)])
    assert "".join(map(str, ClassOrder([1] * 5, 11).classes(start).tolist())) == GOLDEN_CLASSES
    assert "".join(map(str, ClassOrder([1, 3], 11).classes(start).tolist())) == GOLDEN_WEIGHTED


GOLDEN_CLASSES = "2134003241023143412410324"
GOLDEN_WEIGHTED = "1110011101111111101101111"


def test_the_balanced_stream_stays_what_it_was():
    d = balanced().draw_batch(np.arange(8))
    found = list(zip(*(c.tolist() for c in (d.slide, d.mpp, d.x_px0, d.y_px0)), strict=True))
    assert found == GOLDEN_DRAWS


GOLDEN_DRAWS = [
    (0, 1.0, 191, 188),
    (1, 0.25, 3675, 2166),
    (0, 1.0, 388, 0),
    (2, 1.0, 1073, 2219),
    (1, 0.25, 3448, 2632),
    (0, 1.0, 118, 188),
    (0, 0.25, 713, 435),
    (1, 0.25, 782, 461),
]


def test_a_draw_lies_on_a_slide_of_its_class():
    sampler, of = balanced(), np.asarray([0, 1, 1])
    draws = np.arange(3000)
    assert of[sampler.draw_batch(draws).slide].tolist() == sampler.labels(draws).tolist()


def test_within_a_class_slides_keep_their_weights():
    sampler = balanced(labels=(0, 1, 1), slide_weights=[5.0, 1.0, 3.0])
    slide = sampler.draw_batch(np.arange(4000)).slide
    counts = np.bincount(slide, minlength=3)
    assert counts[0] == 2000
    assert p_of_counts(counts[1:], [1, 3]) > ALPHA


def test_places_follow_the_same_law_as_without_classes():
    """A class of one slide is drawn as a PatchSampler of that slide draws it: the same words."""
    one, other = balanced(labels=(1, 0, 1)), PatchSampler(three_corpus(), **COMMON)
    draws = np.flatnonzero(one.labels(np.arange(400)) == 0)
    mine, theirs = one.draw_batch(draws), other.draw_batch(draws)
    same = theirs.slide == 1
    assert same.sum() > 20
    for name in ("mpp", "x_px0", "y_px0", "tries"):
        assert getattr(mine, name)[same].tolist() == getattr(theirs, name)[same].tolist()


def test_a_redraw_keeps_its_class():
    sampler, of = balanced(labels=(0, 1, 0)), np.asarray([0, 1, 0])
    draws = np.arange(500)
    for attempt in (1, 2, 9):
        slides = sampler.draw_batch(draws, attempt).slide
        assert of[slides].tolist() == sampler.labels(draws).tolist()


def test_slides_in_quarantine_are_replaced_within_their_class():
    sampler = balanced(labels=(0, 1, 0))
    d = sampler.draw_batch(np.arange(600), 0, {2: 100})
    assert 2 in d.slide[:100]
    assert 2 not in d.slide[100:]
    of = np.asarray([0, 1, 0])
    assert of[d.slide].tolist() == sampler.labels(np.arange(600)).tolist()


def test_a_class_whose_slides_are_all_in_quarantine_stops_with_its_name():
    with pytest.raises(errors.SamplerError, match=r"class 'y', found no patch in 256 attempts"):
        balanced(labels=(0, 1, 0)).draw_batch(np.arange(2), 0, {1: 0})


def test_unlabelled_slides_get_their_draws_of_each_block_and_no_label():
    sampler = balanced(labels=(0, 1, -1), unlabelled=2)
    labels = sampler.labels(np.arange(400)).reshape(-1, 4)
    assert (np.sort(labels, axis=1) == [-1, -1, 0, 1]).all()
    slide = sampler.draw_batch(np.arange(400)).slide
    assert ((slide == 2) == (labels.ravel() == -1)).all()


def test_without_unlabelled_draws_such_slides_never_come():
    assert 2 not in balanced(labels=(0, 1, -1)).draw_batch(np.arange(2000)).slide


def test_draws_that_share_a_read_share_a_class():
    sampler = balanced(patches_per_read=4)
    labels = sampler.labels(np.arange(800)).reshape(-1, 4)
    assert (labels == labels[:, :1]).all()
    assert (np.sort(labels[:, 0].reshape(-1, 2), axis=1) == [0, 1]).all()
    d = sampler.draw_batch(np.arange(800))
    assert (np.asarray([0, 1, 1])[d.slide] == labels.ravel()).all()
    assert (d.slide.reshape(-1, 4) == d.slide.reshape(-1, 4)[:, :1]).all()


def test_regions_of_one_slide_are_told_apart_and_named_by_the_slide_that_is_read():
    view = two_islands()
    sampler = BalancedSampler(view, [0, 1, 1], ["upper", "lower"], **COMMON)
    draws = np.arange(2000)
    d, label = sampler.draw_batch(draws), sampler.labels(draws)
    assert sampler.corpus is view.base
    assert set(d.slide[label == 0].tolist()) == {1}
    assert set(d.slide[label == 1].tolist()) == {1, 2}
    # island rows 5-25 and 40-60 of 62 cells over 3,100 px; a patch keeps its centre on its island
    _, height = sampler.box_px0(d.slide, d.mpp)
    middle = d.y_px0 + height / 2
    assert (middle[label == 0] < 1550).all()
    assert (middle[(label == 1) & (d.slide == 1)] > 1550).all()


def test_at_least_the_threshold_of_a_patch_lies_in_its_region():
    """Counted cell by cell in float64, on the region's own mask."""
    view = two_islands()
    sampler = BalancedSampler(view, [0, 1, 1], ["a", "b"], **(COMMON | {"min_foreground": 0.5}))
    d = sampler.draw_batch(np.arange(200))
    width, height = sampler.box_px0(d.slide, d.mpp)
    upper = islands()
    upper[30:] = False
    sx, sy = 5000 / 100, 3100 / 62
    rows, columns = np.arange(62), np.arange(100)
    for k in np.flatnonzero(sampler.labels(np.arange(200)) == 0).tolist():
        x, y, w, h = d.x_px0[k], d.y_px0[k], width[k], height[k]
        across = np.clip(
            np.minimum((columns + 1) * sx, x + w) - np.maximum(columns * sx, x), 0, None
        )
        down = np.clip(np.minimum((rows + 1) * sy, y + h) - np.maximum(rows * sy, y), 0, None)
        assert (down @ upper @ across) / (w * h) >= 0.5 - 1e-9


def test_a_view_shares_tiles_and_levels_with_its_corpus():
    view = two_islands()
    assert np.shares_memory(view.levels, view.base.levels)
    assert view.slide_ids == ["b", "b", "c"]
    assert view.mask(0).tissue_cells == 440  # 20 x 22 cells
    assert view.digest != view.base.digest


def test_another_region_is_another_view_and_another_stream():
    corpus, (_, b, _) = three_corpus(), three_slides()[0]
    shapes = islands(), islands()
    shapes[1][5, 8] = False  # one cell of 880
    views = [CorpusView(corpus, [1], [mask_of(b, tissue)]) for tissue in shapes]
    assert views[0].digest != views[1].digest
    one, other = (BalancedSampler(view, [0], ["a"], **COMMON).digest for view in views)
    assert one != other


def test_what_a_region_can_serve_follows_from_the_region_not_from_its_slide():
    """A spot of 4 x 4 cells, 52 µm across: room for 32 µm of tissue in a patch, not for 128 µm."""
    corpus, (_, b, _) = three_corpus(), three_slides()[0]
    spot = np.zeros((62, 100), bool)
    spot[10:14, 10:14] = True
    view = CorpusView(corpus, [1, 1], [mask_of(b, spot), mask_of(b, islands())])
    sampler = BalancedSampler(view, [0, 1], ["spot", "all"], size_px=128, mpp=[0.25, 1.0], seed=1)
    draws = np.arange(400)
    mpp, label = sampler.draw_batch(draws).mpp, sampler.labels(draws)
    assert set(mpp[label == 0].tolist()) == {0.25}
    assert set(mpp[label == 1].tolist()) == {0.25, 1.0}
    with pytest.raises(
        errors.SamplerError, match=r"class 'spot': 0 of 1 row\(s\), 0.0027 mm² together"
    ):
        BalancedSampler(view, [0, 1], ["spot", "all"], size_px=128, mpp=1.0)


def test_quarantine_of_a_slide_holds_for_all_its_regions():
    sampler = BalancedSampler(two_islands(), [0, 1, 0], ["a", "b"], **COMMON)
    with pytest.raises(errors.SamplerError, match="class 'b'"):
        sampler.draw_batch(np.arange(2), 0, {1: 0})
    draws = np.flatnonzero(sampler.labels(np.arange(50)) == 0)
    assert set(sampler.draw_batch(draws, 0, {1: 0}).slide.tolist()) == {2}


@pytest.mark.parametrize("slides", [three_corpus, two_islands])
def test_a_sampler_that_went_to_another_process_draws_the_same(slides):
    sampler = BalancedSampler(slides(), [0, 1, 1], ["a", "b"], **COMMON)
    there = pickle.loads(pickle.dumps(sampler))
    assert there.digest == sampler.digest
    here, other = sampler.draw_batch(np.arange(50)), there.draw_batch(np.arange(50))
    assert here.x_px0.tolist() == other.x_px0.tolist()


def test_a_class_that_can_serve_nothing_is_refused_with_the_numbers():
    with pytest.raises(errors.SamplerError) as caught:
        balanced(labels=(0, 1, 2), names=("x", "y", "z"), mpp=0.25, size_px=128)
    told = str(caught.value)
    assert "1 of 3 classes can serve no patch of 128 px at [0.25] µm/px with 40% tissue" in told
    assert "class 'z': 0 of 1 row(s), " in told  # c has 1.1 µm/px


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": (0, 1)}, "3 rows need as many class numbers"),
        ({"labels": (0, 1, 2)}, "labels run from 0 to 2"),
        ({"labels": (0, 1, -2)}, "labels run from -2 to 1"),
        ({"labels": (0.0, 1.0, 1.0)}, "not float64"),
        ({"class_weights": [1]}, "2 classes, 1 class_weights"),
        ({"class_weights": [1, 0]}, "whole numbers of at least 1"),
        ({"class_weights": [1, 1024]}, "blocks of 1,025 draws; at most 1,024"),
        ({"unlabelled": -1}, "number of draws >= 0"),
        ({"seed": -1}, "64-bit"),
    ],
)
def test_what_makes_no_sense_is_refused(change, told):
    with pytest.raises(errors.SamplerError, match=told.replace("(", r"\(").replace(")", r"\)")):
        balanced(**change)


def test_what_decides_the_stream_is_in_its_digest():
    changes = [
        {}, {"labels": (1, 0, 0)}, {"names": ("x", "z")}, {"class_weights": [1, 2]}, {"seed": 1},
        {"labels": (0, 1, -1), "unlabelled": 1}, {"slide_weights": [1, 1, 2]}, {"size_px": 96},
    ]  # fmt: skip
    digests = {balanced(**change).digest for change in changes}
    assert len(digests) == len(changes)
    assert balanced().digest == balanced().digest


def real_corpus(indexes) -> Corpus:
    from online_patching import ForegroundMask

    return Corpus.from_slides(indexes, [ForegroundMask.everything(i) for i in indexes])


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 3), (3, 2)])
def test_loaders_of_any_number_of_ranks_deliver_the_same_balanced_batches(
    small_indexes, world_size, batch_size
):
    options = {"size_px": 32, "mpp": 0.5, "seed": 4}
    sampler = BalancedSampler(real_corpus(small_indexes), [0, 1, 2], list("abc"), **options)

    def work(rank, gather):
        shares = {"rank": rank, "world_size": world_size, "gather": gather}
        with PatchLoader(sampler, batch_size, threads=1, **shares) as loader:
            return [next(loader) for _ in range(3)]

    parts = World(world_size).run(work)
    for step in range(3):
        draws = np.concatenate([part[step].draws for part in parts])
        assert draws.tolist() == list(range(6 * step, 6 * step + 6))
        assert np.bincount(sampler.labels(draws)).tolist() == [2, 2, 2]
        wanted = sampler.draw_batch(draws)
        assert (
            np.concatenate([p[step].columns.x_px0 for p in parts]).tolist() == wanted.x_px0.tolist()
        )


def test_two_loader_processes_deliver_what_threads_do(small_indexes):
    view = CorpusView(
        corpus := real_corpus(small_indexes), [0, 1, 2, 0], [corpus.mask(k) for k in (0, 1, 2, 0)]
    )
    sampler = BalancedSampler(view, [0, 1, 1, 1], ["a", "b"], size_px=32, mpp=0.5, seed=4)
    streams = []
    for workers in (0, 2):
        with PatchLoader(sampler, 4, workers=workers, threads=1, start_method="fork") as loader:
            streams.append([next(loader).pixels for _ in range(3)])
    assert all(np.array_equal(a, b) for a, b in zip(*streams, strict=True))
