"""What a run is fed: from slides or a folder, labelled or not, one face and one promise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from online_patching import Corpus, ForegroundMask, PatchLoader, PatchSampler, SlideIndex, errors
from pathfm.geojson import Polygon, write_geojson
from pathfm.pretrain import PretrainConfig, run
from pathfm.pretrain.feed import Feed, FeedBatch, check_labels, open_feed
from pathfm.pretrain.sampler import sampler_of
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError
from tests.conftest import noise
from tests.rank_threads import run_ranks

KINDS = ("none", "column", "table", "regions", "patches", "pictures")
CLASSES = {"none": (), "regions": ("N", "T"), "patches": ("p", "q", "r"), "pictures": ()}


@pytest.fixture(scope="module")
def data(small_indexes: list[SlideIndex], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three slides with labels of every kind, and a folder of patches."""
    root = tmp_path_factory.mktemp("labelled")
    corpus, grades, half = root / "corpus", ("x", "y", "x"), {}
    (root / "regions").mkdir()
    for index in small_indexes:
        index.save(corpus / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(corpus / "masks" / f"{index.slide_id}.png")
        half[index.slide_id] = index.dimensions[0] / 2
    packed = Corpus.build(corpus)
    for slide_id in packed.slide_ids[:2]:
        width, height = half[slide_id] * 2, 5000.0
        left = np.array([[0, 0], [half[slide_id], 0], [half[slide_id], height], [0, height]])
        right = left + np.array([half[slide_id], 0])
        regions = [Polygon((left,), "T"), Polygon((np.minimum(right, [width, height]),), "N")]
        write_geojson(root / "regions" / f"{slide_id}.geojson", regions)
    table = {"slide_id": packed.slide_ids, "label": list(grades)}
    pq.write_table(pa.table(table), corpus / "slides.parquet")
    rows = "".join(f"{name},{'ab'[k % 2]}\n" for k, name in enumerate(packed.slide_ids))
    (root / "table.csv").write_text("slide_id,label\n" + rows)
    for c, name in enumerate("pqr"):
        (root / "patches" / name).mkdir(parents=True)
        for k in range(4):
            picture = Image.fromarray(noise((40, 36 + 2 * k, 3), 10 * c + k))
            picture.save(root / "patches" / name / f"{k}.png")
    return root


def config(data: Path, kind: str, **changes: Any) -> PretrainConfig:
    labels: dict[str, dict[str, Any]] = {
        "none": {},
        "column": {"column": "label"},
        "table": {"table": data / "table.csv"},
        "regions": {"regions": data / "regions"},
        "patches": {"patches": data / "patches"},
        "pictures": {"patches": data / "patches"},  # without their classes
    }
    plain = {"method": "dino" if kind in ("none", "pictures") else "supcon", "labels": labels[kind]}
    if "labels" in changes:
        plain["labels"] |= changes.pop("labels")
    fixed = {
        "corpus": data / "corpus", "patch_px": 32, "mpp": [0.5], "batch_size": 6, "seed": 5,
        "loader": {"threads": 1, "prefetch": 2},
    }  # fmt: skip
    return PretrainConfig(**(fixed | plain | changes))


@contextmanager
def opened(given: PretrainConfig, *more: Any) -> Iterator[Feed]:
    with closing(open_feed(given, *(more or (Ranks(),)))) as feed:
        yield feed


def take(feed: Feed, n: int) -> list[FeedBatch]:
    return [feed.next_batch() for _ in range(n)]


def joined(batches: list[FeedBatch]) -> tuple[np.ndarray, list[int], list[int] | None]:
    labels = [b.labels for b in batches]
    return (
        np.concatenate([b.pixels for b in batches]),
        np.concatenate([b.draws for b in batches]).tolist(),
        None if labels[0] is None else np.concatenate(labels).tolist(),
    )


def assert_same(one: list[FeedBatch], other: list[FeedBatch]) -> None:
    for mine, theirs in zip(joined(one), joined(other), strict=True):
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_is_what_it_says(data, kind):
    given = config(data, kind)
    with opened(given) as feed:
        classes = CLASSES.get(kind, {"column": ("x", "y"), "table": ("a", "b")}.get(kind))
        assert feed.class_names == classes
        batches = take(feed, 3)
        assert [b.draws.tolist() for b in batches] == [
            list(range(6 * k, 6 * k + 6)) for k in range(3)
        ]
        for batch in batches:
            assert batch.pixels.shape == (6, 32, 32, 3)
            assert batch.pixels.dtype == np.uint8
            assert [ref.draw for ref in batch.refs] == batch.draws.tolist()
            if classes:
                assert np.bincount(batch.labels).tolist() == [6 // len(classes)] * len(classes)
            else:
                assert batch.labels is None
        assert {feed.group_of(ref.slide_id) for b in batches for ref in b.refs} <= set(feed.groups)
        assert feed.next_draw == 18
        assert feed.stats.patches == 18
        assert feed.quarantined == {}
        assert all("\n" not in note for note in feed.notes)


def test_without_labels_the_patches_are_those_of_a_patch_sampler(data):
    corpus = Corpus.open(data / "corpus")
    sampler = PatchSampler(corpus, size_px=32, mpp=[0.5], min_foreground=0.4, seed=5)
    with opened(config(data, "none")) as feed, PatchLoader(sampler, 6) as loader:
        for batch in take(feed, 2):
            assert np.array_equal(batch.pixels, next(loader).pixels)


def test_labels_are_those_of_the_slides(data):
    of = dict(zip(Corpus.open(data / "corpus").slide_ids, ("x", "y", "x"), strict=True))
    with opened(config(data, "column")) as feed:
        for batch in take(feed, 4):
            wanted = [feed.class_names.index(of[ref.slide_id]) for ref in batch.refs]
            assert batch.labels.tolist() == wanted


def test_labels_are_those_of_the_regions(data):
    """T is the left half of a slide: at least half of a patch with that label lies there."""
    corpus = Corpus.open(data / "corpus")
    widths = {name: corpus.index(row).dimensions[0] for row, name in enumerate(corpus.slide_ids)}
    with opened(config(data, "regions")) as feed:
        seen = [(b.labels[k], ref) for b in take(feed, 10) for k, ref in enumerate(b.refs)]
    cell_px0 = 40  # half a mask's cell may be cut either way
    for label, ref in seen:
        middle = ref.x_px0 + ref.width_px0 / 2
        side = middle - widths[ref.slide_id] / 2
        assert side <= cell_px0 if feed.class_names[label] == "T" else side >= -cell_px0
    assert {ref.slide_id for _, ref in seen} == set(corpus.slide_ids[:2])


def test_labels_are_those_of_the_folders_and_pixels_those_of_the_files(data):
    with opened(config(data, "patches")) as feed:
        (batch,) = take(feed, 1)
    for pixels, label, ref in zip(batch.pixels, batch.labels, batch.refs, strict=True):
        assert ref.slide_id.startswith(f"{feed.class_names[label]}/")
        with Image.open(data / "patches" / ref.slide_id) as picture:
            side = ref.width_px0
            box = (ref.x_px0, ref.y_px0, ref.x_px0 + side, ref.y_px0 + side)
            wanted = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR, box=box), int)
        assert np.abs(pixels.astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped_after", [0, 3])
def test_a_resumed_feed_continues_the_very_same_batches(data, kind, stopped_after):
    given = config(data, kind)
    with opened(given) as feed:
        whole = take(feed, 5)
    with opened(given) as feed:
        take(feed, stopped_after)
        state = json.loads(json.dumps(feed.state_dict()))
    with opened(given, Ranks(), state) as feed:
        assert_same(take(feed, 5 - stopped_after), whole[stopped_after:])


@pytest.mark.parametrize("kind", ["none", "column", "regions", "patches"])
def test_two_ranks_get_the_halves_of_each_step_and_one_goes_on_from_their_state(
    data, kind, monkeypatch
):
    given = config(data, kind)
    with opened(given) as feed:
        whole = take(feed, 4)

    def work(rank: int) -> tuple[list[FeedBatch], dict[str, Any]]:
        with opened(given, Ranks(rank, 2, rank)) as feed:
            return take(feed, 2), feed.state_dict()

    (first, state), (second, other) = run_ranks(monkeypatch, 2, work)
    assert state == other
    both = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert_same(both, whole[:2])
    with opened(given, Ranks(), state) as feed:
        assert_same(take(feed, 2), whole[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_draws_can_be_looked_at_apart(data, kind):
    with opened(config(data, kind)) as feed:
        take(feed, 1)
        first = feed.first(10)
        assert first.draws.tolist() == list(range(10))
        assert feed.next_batch().draws[0] == 6


def test_the_dry_runs_sampler_is_the_feeds(data):
    corpus = Corpus.open(data / "corpus")
    for kind in ("none", "column", "regions"):
        given = config(data, kind)
        with opened(given) as feed:
            assert feed.state_dict()["sampler"] == sampler_of(given, corpus).digest
    with pytest.raises(PathfmError, match="reads no slides"):
        sampler_of(config(data, "patches"), corpus)


def test_min_region_takes_the_place_of_min_foreground(data):
    corpus, given = (
        Corpus.open(data / "corpus"),
        config(data, "regions", labels={"min_region": 0.9}),
    )
    assert sampler_of(given, corpus).min_foreground == 0.9
    assert sampler_of(config(data, "column"), corpus).min_foreground == 0.4


@pytest.mark.parametrize("method", ["supcon", "supervised"])
def test_methods_that_learn_from_labels_want_some(data, method):
    given = config(data, "none", method=method)
    for refuse in (check_labels, lambda one: open_feed(one, Ranks())):
        with pytest.raises(
            PathfmError, match=rf"method {method} learns from labels and none are given: --l"
        ):
            refuse(given)


def test_a_self_supervised_method_may_have_balanced_batches(data):
    with opened(config(data, "column", method="dino")) as feed:
        assert np.bincount(feed.next_batch().labels).tolist() == [3, 3]
    with opened(config(data, "patches", method="dino", labels={"balanced": True})) as feed:
        assert np.bincount(feed.next_batch().labels).tolist() == [2, 2, 2]


def test_a_method_may_learn_from_a_folder_as_it_is(data, tmp_path):
    root = shutil.copytree(data / "patches", tmp_path / "patches")
    for k in range(8):
        shutil.copy(root / "p" / "0.png", root / "p" / f"more{k}.png")
    given = config(data, "patches", labels={"patches": root, "balanced": False}, batch_size=20)
    with opened(given) as feed:
        assert np.bincount(feed.next_batch().labels).tolist() == [12, 4, 4]


@pytest.mark.parametrize("kind", ["column", "regions", "patches"])
def test_other_classes_are_refused_when_a_run_goes_on(data, kind):
    given = config(data, kind)
    with opened(given) as feed:
        state, names = feed.state_dict(), feed.class_names
    turned = config(data, kind, labels={"classes": names[::-1]})
    told = f"begun with the classes {', '.join(names)}; now there are {', '.join(names[::-1])}"
    with pytest.raises(errors.StateMismatchError, match=told):
        open_feed(turned, Ranks(), state)


@pytest.mark.parametrize(
    ("saved", "now"), [("patches", "column"), ("none", "pictures"), ("pictures", "none")]
)
def test_a_state_of_another_kind_is_refused(data, saved, now):
    with opened(config(data, saved)) as feed:
        state = feed.state_dict()
    with pytest.raises(errors.StateMismatchError):
        open_feed(config(data, now), Ranks(), state)


def test_other_labels_of_the_same_classes_are_refused_when_a_run_goes_on(data, tmp_path):
    given = config(data, "table")
    with opened(given) as feed:
        state = feed.state_dict()
    table = tmp_path / "table.csv"
    table.write_text(
        (data / "table.csv").read_text().replace(",b", ",q").replace(",a", ",b").replace(",q", ",a")
    )
    with pytest.raises(errors.StateMismatchError, match="another sampler"):
        open_feed(config(data, "table", labels={"table": table}), Ranks(), state)


def test_a_batch_that_ranks_cannot_share_is_refused(data):
    with pytest.raises(PathfmError, match="batch_size 6 cannot be divided among 4 ranks"):
        open_feed(config(data, "none"), Ranks(0, 4, 0))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supcon", "supervised"])
def test_a_run_on_labelled_patches_goes_on_bit_for_bit_and_keeps_its_classes(
    data, tmp_path, method
):
    tiny = {
        "method": method, "backbone": "test_vit", "weights": "random:3", "steps": 4, "precision": "fp32",
        "monitor_patches": 8, "checkpoint_every_steps": 2, "tracking": {"enabled": False},
        "views": {"global_1": {"size_px": 32}, "global_2": {"size_px": 32}},
    }  # fmt: skip
    if method == "supervised":
        tiny["views"] = {"global_1": {"size_px": 32}}
    whole, parts = (
        config(data, "patches", out=tmp_path / name, **tiny) for name in ("whole", "parts")
    )
    assert run(whole).finished
    run(parts.model_copy(update={"stop_after_steps": 2}))
    moved = shutil.copytree(data / "patches", tmp_path / "moved")
    labels = parts.labels.model_copy(update={"patches": moved})
    assert run(parts.model_copy(update={"labels": labels})).finished
    summaries = [
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "parts")
    ]
    assert summaries[0]["class_names"] == ["p", "q", "r"]
    assert summaries[0]["loss_last"] == summaries[1]["loss_last"]
    assert summaries[0]["backbone_digest"] == summaries[1]["backbone_digest"]
    (moved / "q").rename(moved / "z")
    with pytest.raises(errors.StateMismatchError, match="classes p, q, r; now there are p, r, z"):
        run(parts.model_copy(update={"labels": labels, "steps": 4, "stop_after_steps": None}))


def test_ranks_agree_on_failures_and_one_alone_asks_nobody(data):
    for ranks, asks in ((Ranks(0, 2, 0), True), (Ranks(), False)):
        for kind, inner, gather in (
            ("none", "_loader", "gather"),
            ("patches", "_pictures", "_gather"),
        ):
            with opened(config(data, kind), ranks) as feed:
                assert (getattr(getattr(feed, inner), gather) is not None) == asks
