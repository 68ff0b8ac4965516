"""A model pretrained on some of the pictures it is tested on: embed says so, probe refuses or marks it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from online_patching import Corpus
from pathfm.backbone import export_backbone, load_backbone
from pathfm.cohorts import CohortOptions, Salt
from pathfm.embed import EmbedConfig
from pathfm.embed import run as embed
from pathfm.leakage import (
    PretrainedOn,
    Stage,
    check_bags,
    check_corpus,
    digest_batch,
    mark_of_bags,
    slide_keys,
)
from pathfm.leakage.corpora import Listed
from pathfm.leakage.seen import public_id
from pathfm.probe import ProbeConfig
from pathfm.probe import run as probe
from pathfm.probe_slides import ProbeSlidesConfig
from pathfm.probe_slides import run as probe_slides
from pathfm.runtime import PathfmError
from tests.conftest import noise


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Two classes of ten pictures, of five patients each."""
    root = tmp_path / "patches"
    rows = []
    for number in range(20):
        name = f"{'ab'[number % 2]}/{number}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise((48, 48), number)).save(root / name)
        rows.append((name, f"Patient {number // 2}"))
    with (root / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "group"), *rows])
    return root


def weights(tmp_path: Path, seen: PretrainedOn | None) -> str:
    """A small backbone in a folder, with what it has seen."""
    folder = tmp_path / "model"
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    export_backbone(load_backbone("vit_tiny_patch16_224", "random", 32, **size), folder)
    if seen is not None:
        seen.save(folder)
    return str(folder)


def listed(patches=(), patients=()):
    digests = digest_batch(np.stack(patches)) if len(patches) else np.zeros((0, 32), np.uint8)
    stage = Stage("my corpus", "00" * 32, draws=1)
    return PretrainedOn((stage,), np.zeros((0, 16), np.uint8), tuple(patients), digests)


def embedded(tmp_path, patches, weights, name="mine"):
    out = tmp_path / "embeddings"
    tracking = {"enabled": False}
    return embed(
        EmbedConfig(
            data=patches, weights=weights, name=name, out=out, input_px=32, tracking=tracking
        )
    ).path


def probed(tmp_path, files, **options):
    config = ProbeConfig(
        embeddings=files, out=tmp_path / "probe", n_seeds=2, tracking={"enabled": False}, **options
    )
    return probe(config)


def test_a_near_duplicate_of_a_pretraining_picture_is_refused_and_can_be_marked(
    tmp_path, patches, capsys
):
    seen = listed([noise((48, 48), 3)[:, ::-1], noise((48, 48), 6)])
    file = embedded(tmp_path, patches, weights(tmp_path, seen))
    assert (
        "WARNING 2 of 20 samples were in the pretraining data (my corpus)"
        in capsys.readouterr().out
    )
    with pytest.raises(PathfmError, match=r"2 of 20 samples .* a/6\.png, b/3\.png.*--leaks mark"):
        probed(tmp_path, [file])
    assert not (tmp_path / "probe").exists()
    result = probed(tmp_path, [file], leaks="mark")
    assert result.caveats[-1].startswith("mine: 2 of 20 samples were in the pretraining data")
    assert "2 of 20 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["caveats"] == result.caveats


def test_a_model_that_has_seen_none_of_it_needs_no_mark(tmp_path, patches):
    seen = listed([noise((48, 48), 300)])
    file = embedded(tmp_path, patches, weights(tmp_path, seen))
    start = embedded(tmp_path, patches, weights(tmp_path / "other", None), "found")
    clean = probed(tmp_path, [file])
    assert not any("pretrain" in caveat for caveat in clean.caveats)
    unknown = probed(tmp_path, [start])
    assert "found: What the backbone was pretrained on is not known" in unknown.caveats[-1]


def test_patients_are_compared_where_the_salt_is_at_hand(tmp_path, patches, monkeypatch):
    monkeypatch.setenv("PATHFM_SALT", "0123456789abcdef")
    salt = Salt(CohortOptions(), tmp_path)
    seen = listed(patients=[f"{salt.mark} {salt.id('patient', 'Patient 4')}"])
    model = weights(tmp_path, seen)
    with pytest.raises(PathfmError, match=r"2 of 20 samples .*2 by patient"):
        probed(tmp_path, [embedded(tmp_path, patches, model)])
    monkeypatch.delenv("PATHFM_SALT")
    blind = probed(tmp_path, [embedded(tmp_path / "blind", patches, model)])
    assert "could not be compared by name" in blind.caveats[-1]


def test_a_result_is_not_up_to_date_once_more_is_known_of_the_model(tmp_path, patches):
    model = weights(tmp_path, listed([noise((48, 48), 300)]))
    file = embedded(tmp_path, patches, model)
    assert "pretraining data" not in " ".join(probed(tmp_path, [file]).caveats)
    listed([noise((48, 48), 5)]).save(Path(model))
    embedded(tmp_path, patches, model)
    with pytest.raises(PathfmError, match="1 of 20 samples"):
        probed(tmp_path, [file])


def test_slides_of_a_corpus_are_found_among_those_a_backbone_has_seen(
    small_corpus, small_indexes, tmp_path
):
    second = small_indexes[1]
    seen = replace(listed(), slides=slide_keys([second.digest]))
    model = weights(tmp_path, seen)
    bags = tmp_path / "bags"
    bags.mkdir()
    found = check_bags(bags, model, small_corpus)
    place = Corpus.open(small_corpus).slide_ids.index(second.slide_id)
    assert found.rows == {"slide": (place,)}
    slides = [index.slide_id for index in small_indexes]
    with pytest.raises(PathfmError, match=f"1 of 3 samples .*Among them {second.slide_id}"):
        mark_of_bags("mine", bags, slides, "refuse")
    line = mark_of_bags("mine", bags / "h5_files", [*slides, "other"], "mark")
    assert line.startswith(
        "mine: 1 of 3 samples were in the pretraining data (my corpus) (1 by slide)"
    )
    assert line.endswith("1 slides are not in its list.")
    assert mark_of_bags("mine", bags, [s for s in slides if s != second.slide_id], "refuse") == ""
    assert "come without leaks.json" in mark_of_bags("theirs", tmp_path, slides, "refuse")
    check_bags(bags, "python:module:function", small_corpus)
    assert "is not known" in mark_of_bags("mine", bags, slides, "refuse")
    (bags / "leaks.json").write_text('{"leaks": 3}')
    with pytest.raises(PathfmError, match="damaged"):
        mark_of_bags("mine", bags, slides, "mark")


def test_slides_of_a_patient_are_found_by_salted_id_and_by_barcode(small_indexes):
    digest = small_indexes[0].digest
    slides = [
        Listed("a", digest, ("m1 p1",)),
        Listed("b", digest, ("m1 p2",)),
        Listed("TCGA-02-0001-DX1", digest, (public_id("TCGA-02-0001"),)),
    ]
    found = check_corpus(listed(patients=["m1 p2", public_id("TCGA-02-0001")]), slides)
    assert found.rows == {"patient": (1, 2)}
    apart = check_corpus(listed(patients=["m2 p2"]), slides)
    assert apart.rows == {"patient": ()}
    assert "another salt" in apart.told()
    assert not check_corpus(None, slides).known


def test_embedding_a_corpus_says_which_slides_were_seen(
    small_corpus, small_indexes, tmp_path, capsys
):
    seen = replace(listed(), slides=slide_keys([index.digest for index in small_indexes]))
    model = weights(tmp_path, seen)
    settings = {"mpp": 1.0, "input_px": 32, "slides": {"patches_per_slide": 2}}
    out = tmp_path / "out"
    config = EmbedConfig(
        data=small_corpus,
        weights=model,
        name="mine",
        out=out,
        tracking={"enabled": False},
        **settings,
    )
    embed(config)
    assert "WARNING 3 of 3 samples were in the pretraining data" in capsys.readouterr().out
    table = tmp_path / "labels.csv"
    splits = ("train", "val", "test")
    rows = [f"{i.slide_id},{'ab'[n % 2]},{splits[n]}" for n, i in enumerate(small_indexes)]
    table.write_text("slide,label,split\n" + "\n".join(rows) + "\n")
    with pytest.raises(PathfmError, match=r"1 of 1 samples .*--leaks mark"):
        probe_slides(
            ProbeSlidesConfig(
                bags=[out / "mine"],
                labels=str(table),
                out=tmp_path / "p",
                tracking={"enabled": False},
            )
        )
