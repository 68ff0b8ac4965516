"""What a backbone was pretrained on: digests of pictures, the file that travels, the comparison."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from pathfm.cohorts import CohortOptions, Salt
from pathfm.leakage import (
    PRETRAINED_ON,
    Evidence,
    Leaks,
    PretrainedOn,
    Stage,
    check_pictures,
    check_slides,
    digest_batch,
    digest_picture,
    distances,
    leaks,
    patient_ids,
    refuse_or_mark,
    seen_by,
    slide_keys,
)
from pathfm.leakage.beside import check_beside, read_beside
from pathfm.leakage.digests import MOST_BITS, stacked, turned
from pathfm.leakage.seen import public_id
from pathfm.runtime import PathfmError
from tests.conftest import noise


def digests_of(pictures):
    return stacked(map(digest_picture, pictures))


def tissue(n=12, size=160, seed=0):
    """Different pictures with something to see."""
    return np.stack([noise((size, size), seed * 1000 + i) for i in range(n)])


def saved_as_jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def seen(patches=None, slides=(), patients=(), notes=()):
    stage = Stage("corpus", "ab" * 32, draws=640)
    patches = np.zeros((0, 32), np.uint8) if patches is None else patches
    return PretrainedOn((stage,), slide_keys(slides), tuple(patients), patches, tuple(notes))


def test_a_digest_is_the_signs_of_scipys_dct_of_the_centre_square():
    picture = tissue(1)[0][:, :120]
    luma = picture[20:140].astype(np.float64) @ [0.299, 0.587, 0.114]
    waves = scipy.fft.dctn(luma)[:16, :16]
    expected = (waves > 0).ravel()
    expected[0] = True
    assert np.array_equal(np.unpackbits(digest_picture(picture)).astype(bool), expected)


def test_a_batch_has_the_digests_of_its_pictures():
    pictures = tissue()
    one_by_one = np.stack([digest_picture(p) for p in pictures])
    assert np.array_equal(digest_batch(pictures), one_by_one)
    assert np.array_equal(digests_of(iter(pictures)), one_by_one)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turned_or_mirrored_picture_is_one_of_the_eight_of_its_digest(k, mirrored):
    picture = tissue(1, seed=3)[0]
    moved = np.rot90(picture[:, ::-1] if mirrored else picture, k)
    eight = turned(digest_picture(picture)[None])[:, 0]
    bits = np.unpackbits(eight ^ digest_picture(np.ascontiguousarray(moved)), axis=1).sum(axis=1)
    assert bits.min() <= 2  # float32 sums in another order
    assert np.partition(bits, 1)[1] > 60


@pytest.mark.parametrize(
    "change",
    [
        lambda p: saved_as_jpeg(p, 50),
        lambda p: np.asarray(Image.fromarray(p).resize((224, 224))),
        lambda p: np.asarray(Image.fromarray(p).resize((80, 80))),
        lambda p: np.ascontiguousarray(p[::-1]),
        lambda p: np.clip(p * 1.15, 0, 255).astype(np.uint8),
        lambda p: p[1:-1, 1:-1],
    ],
)
def test_copies_are_found_among_others_and_others_are_not(change):
    pictures = tissue(40)
    fewest, which = distances(digests_of([change(p) for p in pictures]), digest_batch(pictures))
    assert fewest.max() <= MOST_BITS
    assert np.array_equal(which, np.arange(40))
    others = digest_batch(tissue(40, seed=9))
    assert distances(others, digest_batch(pictures))[0].min() > MOST_BITS


def test_distances_are_the_bits_counted_one_by_one(monkeypatch):
    monkeypatch.setattr("pathfm.leakage.digests._BLOCK", 5)
    ours, known = digest_batch(tissue(7)), digest_batch(tissue(11, seed=2))
    fewest, which = distances(ours, known)
    for row, eight in enumerate(np.swapaxes(turned(ours), 0, 1)):
        bits = [[int.from_bytes((a ^ b).tobytes()).bit_count() for b in known] for a in eight]
        assert fewest[row] == np.min(bits)
        assert np.min(bits, axis=0)[which[row]] == fewest[row]


def test_plain_and_tiny_pictures_have_no_digest_and_match_nothing():
    glass = np.full((2, 64, 64, 3), 240, np.uint8)
    glass[1] += np.random.default_rng(0).integers(0, 3, glass[1].shape, np.uint8)
    plain = digest_batch(glass)
    assert not plain.any()
    assert not digest_batch(np.zeros((1, 8, 8, 3), np.uint8)).any()
    assert distances(plain, plain)[0].tolist() == [256, 256]
    assert distances(digest_batch(tissue(1)), plain[:0])[1].tolist() == [-1]
    assert not seen(plain).patches.size


def test_the_file_says_after_a_round_trip_what_was_put_in(tmp_path):
    one = seen(
        digest_batch(tissue()), ["0f" * 32, "01" * 32, "0f" * 32], ["m1 p2", "m1 p1"], ["so"]
    )
    path = one.save(tmp_path)
    assert path == tmp_path / PRETRAINED_ON
    again = PretrainedOn.load(tmp_path)
    assert again.stages == one.stages
    assert again.patients == ("m1 p1", "m1 p2")
    assert np.array_equal(again.slides, [[1] * 16, [15] * 16])
    assert np.array_equal(again.patches, one.patches)
    assert len(again.patches) == 12
    assert again.notes == ("so",)
    assert PretrainedOn.load(tmp_path / "elsewhere") is None


def test_a_second_stage_has_seen_what_the_first_had():
    first = seen(digest_batch(tissue(3)), ["01" * 32], ["m a"], ["old"])
    second = seen(digest_batch(tissue(2, seed=1)), ["02" * 32, "01" * 32], ["m b"])
    both = second.after(first)
    assert len(both.stages) == 2
    assert (len(both.patches), len(both.slides), both.patients) == (5, 2, ("m a", "m b"))
    assert both.notes == ("old",)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"format": "pathfm.pretrained_on.2"}',
        json.dumps({"format": "pathfm.pretrained_on.1", "stages": [{"x": 1}]}),
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_damaged_file_is_refused_in_a_line(tmp_path, text):
    (tmp_path / PRETRAINED_ON).write_text(text)
    with pytest.raises(PathfmError, match=r"pretrained_on\.json: not a list of what") as error:
        PretrainedOn.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("slides", "AAAA"), ("patches", "%%"), ("patients", 3), ("stages", None)]
)
def test_every_damaged_part_is_refused(tmp_path, key, value):
    facts = json.loads(seen().save(tmp_path).read_text())
    (tmp_path / PRETRAINED_ON).write_text(json.dumps(facts | {key: value}))
    with pytest.raises(PathfmError, match="not a list of what"):
        PretrainedOn.load(tmp_path)


def test_a_file_past_the_bound_is_not_read(tmp_path, monkeypatch):
    seen().save(tmp_path)
    monkeypatch.setattr("pathfm.leakage.seen._MAX_BYTES", 10)
    with pytest.raises(PathfmError, match="more than"):
        PretrainedOn.load(tmp_path)


def test_near_duplicates_are_found_and_named():
    pictures = tissue(10)
    known = seen(digest_batch(pictures[[2, 5]]))
    files = [f"c/{i}.png" for i in range(10)]
    read = [saved_as_jpeg(np.ascontiguousarray(p[::-1]), 70) for p in pictures]
    found = check_pictures(known, read.__getitem__, 10, names=files)
    assert found.rows == {"patch": (2, 5)}
    assert found.examples == ("c/2.png", "c/5.png")
    assert found.mask().tolist() == [i in (2, 5) for i in range(10)]
    assert (
        "2 of 10 samples were in the pretraining data (corpus) (2 by near-duplicate picture)"
        in found.told()
    )


def test_no_picture_is_read_where_no_patches_are_listed():
    def read(i):
        raise AssertionError

    assert check_pictures(seen(), read, 5).rows == {}
    assert not check_pictures(None, read, 5).known


def test_slides_are_found_by_what_they_are_not_by_their_names(
    small_slides, small_indexes, tmp_path
):
    known = seen(slides=[small_indexes[1].digest])
    copy = tmp_path / "another_name.svs"
    copy.write_bytes(small_slides[1].read_bytes())
    (tmp_path / "broken.svs").write_bytes(b"none")
    uris = [str(small_slides[0]), str(copy), str(tmp_path / "broken.svs")]
    found = check_slides(known, uris)
    assert found.rows == {"slide": (1,)}
    assert found.examples == ("another_name.svs",)
    assert found.notes == ("1 slides could not be read to be compared.",)
    assert check_slides(seen(), ["nowhere.svs"]).notes == ()


@pytest.fixture
def salt(tmp_path):
    (tmp_path / "a.salt").write_text("0123456789abcdef")
    return Salt(CohortOptions(salt_file=tmp_path / "a.salt"), tmp_path / "corpus")


def test_patients_are_found_under_the_salt_they_were_hidden_with(salt):
    known = seen(patients=[f"{salt.mark} {salt.id('patient', 'Patient 0815')}"])
    groups = ["Patient 0815", "Patient 0816", "", "Patient 0815"]
    assert leaks(Evidence(4, groups), known, salt).rows == {"patient": (0, 3)}
    blind = leaks(Evidence(4, groups), known)
    assert blind.rows == {"patient": ()}
    assert f"another salt ({salt.mark})" in blind.told()


def test_public_barcodes_are_found_without_a_salt():
    known = seen(patients=[public_id("TCGA-02-0001")])
    groups = ["TCGA-02-0001-01Z-00-DX1.f00d", "tcga-02-0001", "TCGA-02-00012", "TCGA-03-0001"]
    assert leaks(Evidence(4, groups), known).rows == {"patient": (0, 1)}


def test_names_that_every_study_has_are_no_evidence():
    known = seen(patients=[public_id("12")])
    found = leaks(Evidence(2, ["12", "3"]), known)
    assert found.rows == {"patient": ()}
    assert "2 samples have patient names too short" in found.told()
    assert patient_ids("") == patient_ids("12") == ()


def test_seen_samples_are_refused_unless_they_are_to_be_marked():
    found = leaks(Evidence(4, patches=digest_batch(tissue(4))), seen(digest_batch(tissue(2))))
    with pytest.raises(PathfmError) as error:
        refuse_or_mark(found)
    assert str(error.value).startswith("2 of 4 samples were in the pretraining data")
    assert "--leaks mark" in str(error.value)
    assert "\n" not in str(error.value)
    assert refuse_or_mark(found, "mark") == found.told()
    assert refuse_or_mark(found, rows=np.array([2, 3])) == ""
    with pytest.raises(PathfmError, match=r"^1 of 2 samples"):
        refuse_or_mark(found, rows=np.array([1, 2]))


def test_what_is_not_known_is_marked_and_never_refused():
    assert "is not known" in refuse_or_mark(leaks(Evidence(4), None))
    assert "made before it was recorded" in refuse_or_mark(Leaks.from_json(""))
    assert "compared: nothing" in refuse_or_mark(leaks(Evidence(4), seen()))
    assert (
        "old run"
        in refuse_or_mark(leaks(Evidence(4), seen(notes=["Of an old run."])), "mark").lower()
    )


def test_a_list_that_could_not_be_compared_whole_is_never_taken_for_clean():
    slide, other = "ab" * 32, "cd" * 32
    stage = Stage("corpus", "ab" * 32, draws=10_000_000, slides=1, patches=2, every=5_000_000)
    known = replace(
        seen(digest_batch(tissue(2)), [slide], ["mark p1"]), stages=(stage,)
    )  # of slides, whose patches are listed in part
    pictures = digest_batch(tissue(4, seed=7))
    line = refuse_or_mark(leaks(Evidence(4, patches=pictures), known))
    assert "0 of 4 samples" in line
    assert "nothing to compare its 1 slides and its 1 patient ids with" in line
    assert "Listed are 2 patches of 10,000,000 draws: others are not found." in line
    listed = replace(known, stages=(replace(stage, draws=3, every=1),))
    line = refuse_or_mark(leaks(Evidence(4, patches=pictures), listed))
    assert "2 patches of 3 draws: the others show too little to be recognised" in line
    by_slide = leaks(Evidence(4, slides=[other] * 4), known)
    assert "nothing to compare its 1 patient ids with" in refuse_or_mark(by_slide)
    assert "listed patches" not in refuse_or_mark(by_slide)  # their slides are in the list
    both = Evidence(4, ["Patient 1"] * 4, [other] * 4)
    assert refuse_or_mark(leaks(both, replace(known, patients=(public_id("Patient 2"),)))) == ""


def test_pictures_of_a_folder_are_clean_where_all_are_listed_and_marked_where_some_are():
    stage = Stage("folder", "ab" * 32, draws=2_000_000, patches=2, every=1)
    whole = replace(seen(digest_batch(tissue(2))), stages=(stage,))
    pictures = Evidence(4, patches=digest_batch(tissue(4, seed=7)))
    assert refuse_or_mark(leaks(pictures, whole)) == ""
    some = replace(whole, stages=(replace(stage, every=20),))
    assert "Listed are 2 patches of 2,000,000 draws" in refuse_or_mark(leaks(pictures, some))
    slides = leaks(
        Evidence(4, slides=["cd" * 32] * 4), replace(whole, slides=slide_keys(["ab" * 32]))
    )
    assert "nothing to compare its 2 listed patches with" in refuse_or_mark(slides)


def test_samples_of_no_known_patient_are_counted():
    known = seen(patients=[public_id("Patient 9")])
    found = leaks(Evidence(3, ["Patient 1", "", ""]), known)
    assert "2 of 3 samples are of no known patient" in refuse_or_mark(found)


def test_weights_that_have_seen_no_slides_need_no_remark(tmp_path):
    for weights in ("random", "random:7", "imagenet", "dinov2"):
        assert refuse_or_mark(leaks(Evidence(4), seen_by(weights))) == ""
    assert seen_by("somebody/elses.model") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert seen_by(str(tmp_path)) is None
    seen().save(tmp_path)
    assert seen_by(str(tmp_path)).stages == seen().stages


def test_a_result_is_the_same_after_it_was_written_into_a_header():
    found = leaks(Evidence(4, patches=digest_batch(tissue(4))), seen(digest_batch(tissue(2))))
    assert Leaks.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"n": 3}', '{"n": 1, "known": true, "rows": {"patch": [1]}}', "7"]
)
def test_a_damaged_result_is_refused(text):
    with pytest.raises(PathfmError, match="damaged record"):
        Leaks.from_json(text)


@pytest.fixture
def embedded(tmp_path):
    """A data set of six pictures, two of which the weights in `weights` have seen, and a place for features."""
    pictures = tissue(6)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")
    seen(digest_batch(pictures[:2])).save(weights)
    counted = SimpleNamespace(reads=0)

    class Pictures:
        paths = tuple(f"{i}.png" for i in range(6))
        groups = ("Patient 1", *paths[1:])

        def __len__(self):
            return 6

        def read(self, i):
            counted.reads += 1
            return pictures[i]

        def slide_digests(self):
            return ()

    return SimpleNamespace(
        at=tmp_path / "mine.safetensors", weights=str(weights), samples=Pictures(), counted=counted
    )


def test_leaks_lie_beside_the_features_and_are_looked_for_once(embedded):
    e = embedded
    found = check_beside(e.at, "key", e.weights, e.samples, threads=2)
    assert found.rows == {"patch": (0, 1)}
    assert read_beside(e.at, "key") == found
    assert check_beside(e.at, "key", e.weights, e.samples) == found
    assert e.counted.reads == 6
    seen(digest_batch(tissue(6)[:3])).save(Path(e.weights))  # another list
    assert check_beside(e.at, "key", e.weights, e.samples).rows == {"patch": (0, 1, 2)}


def test_a_check_without_the_salt_is_made_again_once_it_is_at_hand(embedded, salt):
    e = embedded
    named = [f"{salt.mark} {salt.id('patient', 'Patient 1')}"]
    seen(patients=named).save(Path(e.weights))
    assert check_beside(e.at, "key", e.weights, e.samples).rows == {"patient": ()}
    found = check_beside(e.at, "key", e.weights, e.samples, ids=salt)
    assert found.rows == {"patient": (0,)}
    assert read_beside(e.at, "key") == found


def test_a_record_of_the_first_form_is_looked_for_again_and_never_read_as_clean(embedded):
    e = embedded
    found = check_beside(e.at, "key", e.weights, e.samples)
    place = e.at.with_name("mine.leaks.json")
    facts = json.loads(place.read_text())
    for name in ("form", "salt"):
        del facts[name]
    place.write_text(json.dumps(facts))
    assert not read_beside(e.at, "key").known
    assert check_beside(e.at, "key", e.weights, e.samples) == found


def test_what_was_found_for_other_features_is_not_taken(embedded):
    check_beside(embedded.at, "key", embedded.weights, embedded.samples)
    assert not read_beside(embedded.at, "another key").known
    assert not read_beside(embedded.at.with_name("other.safetensors"), "key").known
    assert not check_beside(embedded.at, "key", "python:module:function", embedded.samples).known


def test_a_path_that_stands_for_a_group_is_no_patient(embedded):
    named = [public_id("1.png"), public_id("Patient 1")]
    seen(patients=named).save(Path(embedded.weights))
    found = check_beside(embedded.at, "key", embedded.weights, embedded.samples)
    assert found.rows == {"patient": (0,)}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"form": "2"}', '{"form": "2", "key": "key", "leaks": 3}']
)
def test_a_damaged_file_beside_features_is_refused(embedded, text):
    embedded.at.with_name("mine.leaks.json").write_text(text)
    with pytest.raises(PathfmError, match="damaged"):
        read_beside(embedded.at, "key")


def test_evidence_of_another_length_is_refused():
    with pytest.raises(PathfmError, match="3 groups for 4 samples"):
        Evidence(4, ["a", "b", "c"])


@pytest.mark.slow
def test_of_real_patches_copies_differ_by_less_and_others_by_more_than_the_bound(shared_data: Path):
    files = sorted((shared_data / "patches" / "colorectal5").glob("*/*"))
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files[::3]]
    known = digests_of(pictures)
    copies = digests_of(np.ascontiguousarray(saved_as_jpeg(p, 50)[2:-2, 2:-2]) for p in pictures)
    assert distances(copies[::4], known)[0].max() <= MOST_BITS
    apart = [
        distances(known[i : i + 1], np.delete(known, i, axis=0))[0][0]
        for i in range(0, len(known), 4)
    ]
    clear = [d for d in apart if d > 10]  # the rest are mirrored twins, 11 pairs of 2,813
    assert len(apart) - len(clear) <= 4
    assert min(clear) > 70


def test_patches_of_a_slide_cut_elsewhere_are_other_pictures():
    pixels = noise((900, 1600), 5)
    cut = [
        pixels[y : y + 224, x : x + 224] for y in range(0, 600, 224) for x in range(0, 1300, 224)
    ]
    digests = digests_of(np.ascontiguousarray(c) for c in cut)
    for row in range(len(digests)):
        rest = np.delete(digests, row, axis=0)
        assert distances(digests[row : row + 1], rest)[0][0] > MOST_BITS
