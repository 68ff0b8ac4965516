"""What a run's backbone has seen is written beside it, at checkpoints and at the end, and stays with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from online_patching import Corpus, PatchLoader
from pathfm.checkpoint import file_sha256, load_newest
from pathfm.cohorts import CohortOptions, Salt
from pathfm.export import ExportConfig
from pathfm.export import run as export
from pathfm.leakage import (
    PRETRAINED_ON,
    Evidence,
    PretrainedOn,
    check_pictures,
    digest_batch,
    leaks,
    seen_by,
    slide_keys,
)
from pathfm.pretrain import run
from pathfm.pretrain.rows_log import read_rows
from pathfm.pretrain.sampler import sampler_of
from tests.conftest import noise
from tests.pretraining import config


@pytest.fixture(scope="module")
def whole(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("seen") / "whole"
    assert run(config(small_corpus, out)).finished
    return out


def test_a_run_lists_its_slides_and_the_digests_of_its_patches(whole, small_corpus, small_indexes):
    seen = PretrainedOn.load(whole / "backbone")
    assert (
        seen.slides.tolist()
        == np.unique(slide_keys([i.digest for i in small_indexes]), axis=0).tolist()
    )
    (stage,) = seen.stages
    assert (stage.name, stage.draws, stage.slides, stage.every) == (small_corpus.name, 24, 3, 1)
    assert stage.digest == Corpus.open(small_corpus).digest
    sampler = sampler_of(config(small_corpus, whole), Corpus.open(small_corpus))
    with PatchLoader(sampler, 24) as loader:
        pixels = loader.next_batch().pixels
    digests = digest_batch(pixels)
    digests = digests[digests.any(axis=1)]
    assert seen.patches.tolist() == np.unique(digests, axis=0).tolist()
    assert stage.patches == len(digests) == 19  # the others are too plain to be recognised
    found = check_pictures(seen_by(str(whole)), list(pixels).__getitem__, 24)
    assert len(found.rows["patch"]) == stage.patches
    assert seen.notes == ()


def test_a_checkpoint_lists_what_was_seen_until_then_under_its_checksums(whole):
    newest = load_newest(whole / "checkpoints")
    earlier = newest.path.parent / "step_00000004"
    assert PretrainedOn.load(earlier / "backbone").stages[0].draws == 16
    listed = [row for row in read_rows(whole / "seen.jsonl") if row["draw"] < 16]
    assert len(PretrainedOn.load(earlier / "backbone").patches) == len(listed) > 12
    assert f"backbone/{PRETRAINED_ON}" in json.loads((earlier / "checksums.json").read_text())
    assert seen_by(str(earlier)).stages == PretrainedOn.load(earlier / "backbone").stages


def test_a_run_that_was_stopped_lists_the_same(whole, small_corpus, tmp_path):
    out = tmp_path / "run"
    assert not run(config(small_corpus, out, stop_after_steps=3)).finished
    assert run(config(small_corpus, out)).finished
    for name in ("seen.jsonl", f"backbone/{PRETRAINED_ON}"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_second_run_lists_what_its_initial_weights_had_seen(whole, small_corpus, tmp_path):
    out = tmp_path / "second"
    again = config(
        small_corpus, out, weights=str(whole), seed=5, steps=2, optim={"warmup_steps": 1}
    )
    assert run(again).finished
    first, both = PretrainedOn.load(whole / "backbone"), PretrainedOn.load(out / "backbone")
    assert [stage.draws for stage in both.stages] == [24, 8]
    assert {row.tobytes() for row in first.patches} < {row.tobytes() for row in both.patches}
    stopped = tmp_path / "stopped"
    changed = {"weights": str(whole), "seed": 5, "steps": 2, "optim": {"warmup_steps": 1}}
    run(config(small_corpus, stopped, **changed, stop_after_steps=1))
    run(config(small_corpus, stopped, **changed))
    assert (stopped / "backbone" / PRETRAINED_ON).read_bytes() == (
        out / "backbone" / PRETRAINED_ON
    ).read_bytes()


@pytest.mark.slow
def test_weights_of_unknown_origin_are_told(whole, small_corpus, tmp_path):
    weights = tmp_path / "found.safetensors"
    weights.write_bytes((whole / "backbone" / "model.safetensors").read_bytes())
    out = tmp_path / "run"
    run(config(small_corpus, out, weights=str(weights), steps=1, optim={"warmup_steps": 1}))
    (note,) = PretrainedOn.load(out / "backbone").notes
    assert note == "It started from found.safetensors, of which it is not known what that had seen."


@pytest.mark.slow
def test_of_a_long_run_only_every_so_many_draws_are_kept(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("pathfm.pretrain.seen.MOST_OF_SLIDES", 7)
    out = tmp_path / "run"
    run(config(small_corpus, out))
    draws = [row["draw"] for row in read_rows(out / "seen.jsonl")]
    assert len(draws) > 3
    assert set(draws) <= {0, 4, 8, 12, 16, 20}
    assert PretrainedOn.load(out / "backbone").stages[0].every == 4


@pytest.mark.slow
def test_a_folder_of_pictures_is_found_again_in_a_data_set(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(8):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise((64, 64), number)).save(path)
    out = tmp_path / "run"
    run(config(tmp_path, out, labels={"patches": folder}, steps=4))
    seen = seen_by(str(out))
    assert (seen.stages[0].slides, len(seen.slides)) == (0, 0)
    others = [noise((64, 64), number) for number in (1, 100, 3, 101)]
    assert check_pictures(seen, others.__getitem__, 4).rows == {"patch": (0, 2)}


def test_patients_of_a_corpus_are_listed_as_its_journal_hides_them(small_corpus, tmp_path):
    salt_file = tmp_path / "s.salt"
    salt_file.write_text("0123456789abcdef")
    salt = Salt(CohortOptions(salt_file=salt_file), tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("corpus.json", "packed", "slides", "masks"):
        (corpus / name).symlink_to(small_corpus / name)
    ids = Corpus.open(small_corpus).slide_ids
    rows = [
        {"journal": 1},
        {
            "slide_id": ids[0],
            "digest": "ab" * 32,
            "patient": salt.id("patient", "Patient 7"),
            "salt": salt.mark,
        },
        {"slide_id": ids[1], "patient": "Patient 8", "salt": "plain"},
        {"slide_id": "gone", "patient": "p1", "salt": "m"},
    ]
    (corpus / "index.journal").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"torn'
    )
    out = tmp_path / "run"
    run(config(corpus, out, steps=1, optim={"warmup_steps": 1}))
    seen = PretrainedOn.load(out / "backbone")
    assert bytes([0xAB] * 16) in {row.tobytes() for row in seen.slides}
    assert len(seen.patients) == 2
    groups = ["Patient 7", "Patient 8", "Patient 9"]
    assert leaks(Evidence(3, groups), seen, salt).rows == {"patient": (0, 1)}
    assert "Patient" not in (out / "backbone" / PRETRAINED_ON).read_text()


def test_an_export_takes_the_list_with_it(whole, tmp_path):
    out = tmp_path / "model"
    assert not export(ExportConfig(run=whole, out=out)).skipped
    assert (out / PRETRAINED_ON).read_bytes() == (whole / "backbone" / PRETRAINED_ON).read_bytes()
    assert seen_by(str(out)).stages[0].draws == 24
    assert export(ExportConfig(run=whole, out=out)).skipped


@pytest.mark.slow
def test_a_run_of_before_goes_on_and_says_what_is_not_known(small_corpus, tmp_path):
    out = tmp_path / "run"
    run(config(small_corpus, out, stop_after_steps=4))
    newest = load_newest(out / "checkpoints").path
    (newest / "backbone" / PRETRAINED_ON).unlink()
    sums = json.loads((newest / "checksums.json").read_text())
    del sums[f"backbone/{PRETRAINED_ON}"]
    (newest / "checksums.json").write_text(json.dumps(sums))
    state = json.loads((newest / "state.json").read_text())
    del state["seen_rows"]
    (newest / "state.json").write_text(json.dumps(state))
    rewritten = json.loads((newest / "checksums.json").read_text())
    path = newest / "state.json"
    rewritten["state.json"] = [path.stat().st_size, file_sha256(path)]
    (newest / "checksums.json").write_text(json.dumps(rewritten))
    assert run(config(small_corpus, out)).finished
    seen = PretrainedOn.load(out / "backbone")
    assert seen.notes == ("The run began before this was recorded.",)
    assert len(seen.patches) == len(read_rows(out / "seen.jsonl"))
    assert min(row["draw"] for row in read_rows(out / "seen.jsonl")) >= 16
