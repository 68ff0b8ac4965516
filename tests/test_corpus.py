from __future__ import annotations

import json
import pickle
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from online_patching import Corpus, ForegroundMask, PatchSampler, SlideIndex, errors
from online_patching.corpus.records import KINDS


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
            assert np.shares_memory(index.levels[0].rows, corpus.tiles[:])  # views, not copies
            assert not index.levels[0].rows.flags.owndata


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


@pytest.mark.parametrize(
    "damage", ["missing", "short", "garbage", "version", "path", "count", "types"]
)
def test_a_damaged_corpus_is_refused(folder, damage):
    Corpus.build(folder)
    about = folder / "corpus.json"
    fields = json.loads(about.read_text())
    if damage == "missing":
        about.unlink()
    elif damage == "garbage":
        about.write_text("{")
    elif damage == "path":
        about.write_text(json.dumps({**fields, "generation": f"../packed/{fields['generation']}"}))
    elif damage == "count":
        about.write_text(json.dumps({**fields, "slides": 4}))
    elif damage == "types":
        about.write_text(
            json.dumps({**fields, "bytes": [1, 2], "generation": fields["generation"]})
        )
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

    monkeypatch.setattr("online_patching.corpus.packing.atomic_write_text", die)
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


def test_records_hold_what_indexes_and_masks_hold(folder, small_indexes):
    corpus = Corpus.build(folder)
    for row in range(len(corpus)):
        index, record = (
            SlideIndex.load(folder / "slides" / f"{corpus.slide_id(row)}.index"),
            corpus.records[row],
        )
        assert (corpus.uri(row), corpus.token(row)) == (index.uri, index.token)
        assert corpus.index(row).__dict__.items() >= {
            "container": index.container, "levels": index.levels, "mpp_source": index.mpp_source,
            "vendor": index.vendor, "size_bytes": index.size_bytes, "content_hash": index.content_hash,
        }.items()  # fmt: skip
        zarr = index.container == "ome-zarr"
        assert record["reader"] == int(zarr)
        assert record["mtime_ns"] == (0 if zarr else Path(index.uri).stat().st_mtime_ns)
        assert record["n_levels"] == len(index.levels)
        for k, level in enumerate(index.levels):
            packed = corpus.levels[record["first_level"] + k]
            for name in ("width_px", "height_px", "tile_width_px", "tile_height_px", "columns", "parts",
                         "downsample_x", "downsample_y", "mpp_x", "mpp_y", "mpp"):  # fmt: skip
                assert packed[name] == getattr(level, name)
            assert corpus.codecs[int(packed["codec"])] == level.codec
            assert corpus.index(row).levels[k].keys == level.keys
            if zarr:
                assert (packed["first_tile"], packed["n_rows"]) == (-1, 0)
            else:
                start = packed["first_tile"]
                assert (corpus.tiles[start : start + packed["n_rows"]] == level.rows).all()


def test_slides_share_their_codecs(small_indexes):
    slides = [replace(small_indexes[0], slide_id=f"s{k}") for k in range(5)]
    corpus = Corpus.from_slides(slides, [ForegroundMask.everything(s) for s in slides])
    assert len(corpus.codecs) == len({repr(level.codec) for level in slides[0].levels})
    assert corpus.codecs[-1] in list(corpus.codecs)
    assert corpus.codecs[:1] == (corpus.codecs[0],)
    with pytest.raises(IndexError):
        corpus.codecs[len(corpus.codecs)]


def test_secrets_and_odd_names_stay_in_memory_and_never_reach_a_packed_file(
    tmp_path, small_indexes
):
    uri = "https://bob:s3cret@host/a\udcff ü.svs?X-Amz-Signature=SIG"
    index = replace(small_indexes[0], uri=uri, slide_id="ü\udcff", token='"etag"')
    mask = ForegroundMask.everything(index)
    in_memory = pickle.loads(pickle.dumps(Corpus.from_slides([index], [mask])))
    assert (in_memory.uri(0), in_memory.slide_id(0), in_memory.token(0)) == (
        uri,
        index.slide_id,
        '"etag"',
    )
    assert in_memory.index(0).uri == uri
    assert in_memory.records["mtime_ns"][0] == 0
    (tmp_path / "slides").mkdir()
    header, rows = index.to_bytes(keep_secrets=True)  # as no index of ours is saved
    length = len(header).to_bytes(8, "little")
    (tmp_path / "slides" / "a.index").write_bytes(b"PFMINDX2" + length + header + rows.tobytes())
    mask.save(tmp_path / "masks" / "a.png")
    on_disk = Corpus.build(tmp_path)
    assert on_disk.uri(0) == on_disk.index(0).uri == "https://host/a\udcff ü.svs"
    for path in [tmp_path / "corpus.json", *(tmp_path / "packed").rglob("*.*")]:
        assert path.is_dir() or not {b"s3cret", b"SIG"} & set(
            re.findall(rb"s3cret|SIG", path.read_bytes())
        )


def test_building_holds_one_slide_at_a_time(tmp_path, small_indexes):
    level = replace(small_indexes[0].levels[0], width_px=64_000, height_px=64_000)
    rows = np.arange(level.n_tiles, dtype=np.uint64)
    for k in range(24):
        levels = (replace(level, rows=rows + np.uint64(k)),)
        index = replace(small_indexes[0], slide_id=f"s{k}", levels=levels)
        index.save(tmp_path / "slides" / f"s{k}.index")
        ForegroundMask.from_array(
            np.ones((9, 7), bool), index.dimensions, (index.mpp_x, index.mpp_y)
        ).save(tmp_path / "masks" / f"s{k}.png")
    tracemalloc.start()
    corpus = Corpus.build(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.tiles[:].nbytes == 24 * rows.nbytes
    assert peak < 8 * rows.nbytes


def test_blocks_are_the_records_and_hold_no_more_than_asked(folder):
    corpus = Corpus.build(folder)
    in_memory = Corpus.from_slides(
        *zip(*((corpus.index(i), corpus.mask(i)) for i in range(3)), strict=True)
    )
    for rows in (1, 2, 3, 50):
        for made in (corpus, in_memory):
            seen = [
                (start, len(block), block["mpp_x"].tolist()) for start, block in made.blocks(rows)
            ]
            assert max(length for _, length, _ in seen) <= rows
            assert [start for start, _, _ in seen] == list(range(0, 3, rows))
            assert [v for *_, mpp in seen for v in mpp] == corpus.records["mpp_x"].tolist()


def test_a_slide_that_does_not_fit_the_layout_is_left_out(folder, small_indexes):
    index = next(i for i in small_indexes if i.levels[0].rows is not None)
    short = replace(index.levels[0], rows=index.levels[0].rows[:-1])
    replace(index, levels=(short, *index.levels[1:])).save(
        folder / "slides" / f"{index.slide_id}.index"
    )
    corpus = Corpus.build(folder)
    assert "tiles cannot be right" in dict(corpus.left_out)[index.slide_id]
    assert len(corpus) == 2
    huge = replace(index, size_bytes=2**70)
    with pytest.raises(errors.CorpusError, match="too large"):
        Corpus.from_slides([huge], [ForegroundMask.everything(huge)])


EXTREMES = (-1, 0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))


def use_everything(corpus: Corpus) -> None:
    """What a run does with a corpus, for every row."""
    rows = np.arange(len(corpus))
    for row in rows.tolist():
        corpus.index(row).digest  # noqa: B018
        corpus.mask(row).digest  # noqa: B018
        corpus.uri(row), corpus.token(row), corpus.slide_id(row)
    record = corpus.records[rows]
    box = (
        np.zeros(len(rows)),
        np.zeros(len(rows)),
        record["width_px0"] / 2,
        record["height_px0"] / 2,
    )
    corpus.tissue_fractions(rows, *box)
    corpus.tissue_points(rows, record["tissue_cells"] // 2, [0.5] * len(rows), [0.5] * len(rows))


@pytest.mark.parametrize("array", ["slides", "levels", "codecs", "text", "masks"])
def test_a_hostile_corpus_is_one_clear_error_or_harmless(folder, array):
    corpus = Corpus.build(folder)
    path = next((folder / "packed").glob(f"*/{array}.bin"))
    good, kind, refused = path.read_bytes(), KINDS[array], 0
    rng = np.random.default_rng(7)
    trials = [(name, value) for name in kind.names or ("",) for value in (*EXTREMES, float("nan"))]
    for name, value in trials * (1 if kind.names else 6):
        damaged = np.frombuffer(good, kind).copy()
        at = int(rng.integers(len(damaged)))
        if not name:
            damaged[at] = rng.integers(256)
        elif damaged[name].dtype.kind == "f":
            damaged[name][at] = value
        elif value == value:
            damaged[name][at] = np.int64(value).astype(damaged[name].dtype)
        path.write_bytes(damaged.tobytes())
        try:
            use_everything(Corpus.open(folder))
        except errors.CorpusError:
            refused += 1
    assert refused or not kind.names
    path.write_bytes(good)
    use_everything(Corpus.open(folder))
    assert len(corpus) == 3


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_a_row_that_is_not_there_is_one_clear_error(folder, row):
    corpus = Corpus.build(folder)
    for look_up in (
        corpus.index,
        corpus.mask,
        corpus.uri,
        lambda r: corpus.tissue_points([r], [0], [0], [0]),
    ):
        with pytest.raises(errors.CorpusError, match="rows 0 to 2"):
            look_up(row)
