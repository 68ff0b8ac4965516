from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from online_patching import Corpus, ForegroundMask, PatchSampler, SlideIndex, errors


@pytest.fixture
def folder(tmp_path: Path, small_indexes: list[SlideIndex]) -> Path:
    for index in small_indexes:
        index.save(tmp_path / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(tmp_path / "masks" / f"{index.slide_id}.png")
    return tmp_path


def test_what_is_mapped_is_what_was_packed(folder, small_indexes):
    corpus = Corpus.build(folder)
    assert sorted(corpus.slide_ids) == sorted(index.slide_id for index in small_indexes)
    by_id = {index.slide_id: index for index in small_indexes}
    for row in range(len(corpus)):
        index = corpus.index(row)
        assert index.digest == by_id[index.slide_id].digest
        assert corpus.mask(row).digest == ForegroundMask.everything(index).digest
        if index.levels[0].rows is not None:
            assert isinstance(index.levels[0].rows.base, np.memmap)  # views, not copies


def test_disk_and_memory_draw_the_same_patches(folder):
    on_disk = Corpus.build(folder)
    indexes = [on_disk.index(i) for i in range(len(on_disk))]
    in_memory = Corpus.from_slides(indexes, [on_disk.mask(i) for i in range(len(on_disk))])
    assert in_memory.digest == on_disk.digest
    a, b = (PatchSampler(c, size_px=64, mpp=[0.5]) for c in (on_disk, in_memory))
    assert [a[i] for i in range(50)] == [b[i] for i in range(50)]


def test_a_pickle_of_a_corpus_is_its_path(folder):
    corpus = Corpus.build(folder)
    packed = pickle.dumps(corpus)
    assert len(packed) < 600
    assert pickle.loads(packed).digest == corpus.digest


def test_unusable_slides_are_left_out_with_the_reason(folder, small_indexes):
    names = sorted(index.slide_id for index in small_indexes)
    by_id = {index.slide_id: index for index in small_indexes}
    first = by_id[names[0]]
    empty = np.zeros((20, 30), bool)
    ForegroundMask.from_array(empty, first.dimensions, (first.mpp_x, first.mpp_y)).save(
        folder / "masks" / f"{names[0]}.png"
    )
    (folder / "masks" / f"{names[1]}.png").unlink()
    corpus = Corpus.build(folder)
    reasons = dict(corpus.left_out)
    assert corpus.slide_ids == [names[2]]
    assert "empty" in reasons[names[0]]
    assert "not a readable mask" in reasons[names[1]]
    ForegroundMask.everything(first).save(folder / "masks" / f"{names[2]}.png")
    with pytest.raises(errors.CorpusError, match="no slide can be used"):
        Corpus.build(folder)


def test_a_mask_of_another_slide_or_mpp_is_refused(folder, small_indexes):
    index = small_indexes[0]
    other = index.with_mpp(0.5, 0.5, "override table")
    other.save(folder / "slides" / f"{index.slide_id}.index")
    assert "µm/px" in dict(Corpus.build(folder).left_out)[index.slide_id]


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "version"])
def test_a_damaged_corpus_is_refused(folder, damage):
    Corpus.build(folder)
    about = folder / "corpus.json"
    fields = json.loads(about.read_text())
    if damage == "missing":
        about.unlink()
    elif damage == "garbage":
        about.write_text("{")
    elif damage == "version":
        about.write_text(json.dumps({**fields, "version": 99}))
    else:
        tiles = folder / "packed" / fields["generation"] / "tiles.bin"
        tiles.write_bytes(tiles.read_bytes()[:-8])
    with pytest.raises(errors.CorpusError):
        Corpus.open(folder)


def test_a_rebuild_that_dies_half_way_leaves_the_old_corpus(folder, small_indexes, monkeypatch):
    before = Corpus.build(folder).digest
    (folder / "masks" / f"{small_indexes[0].slide_id}.png").unlink()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("online_patching.corpus.atomic_write_text", die)
    with pytest.raises(KeyboardInterrupt):
        Corpus.build(folder)
    assert Corpus.open(folder).digest == before
    # Slides that only moved have the same digest; the generation that is being read stays whole too.
    for path in (folder / "slides").glob("*.index"):
        index = SlideIndex.load(path)
        replace(index, uri="/elsewhere/" + "x" * 50, token="t").save(path)
    with pytest.raises(KeyboardInterrupt):
        Corpus.build(folder)
    assert Corpus.open(folder).index(0).uri != "/elsewhere/" + "x" * 50


def test_the_digest_depends_on_slides_masks_and_nothing_else(folder, small_indexes, tmp_path):
    before = Corpus.build(folder).digest
    assert Corpus.build(folder).digest == before
    index = small_indexes[0]
    tissue = np.ones((9, 9), bool)
    tissue[0] = False
    ForegroundMask.from_array(tissue, index.dimensions, (index.mpp_x, index.mpp_y)).save(
        folder / "masks" / f"{index.slide_id}.png"
    )
    assert Corpus.build(folder).digest != before
