"""`robustness` of models pretrained on what they are tested on: refused, or said in the table's notes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from online_patching import read_slide_index
from pathfm.cohorts import CohortOptions, Salt
from pathfm.datasets import open_dataset
from pathfm.leakage import PretrainedOn, slide_keys
from pathfm.robustness import RobustnessConfig, run
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from pathfm.uncertainty import Options
from tests.conftest import noise
from tests.datasets_mini import small_slide
from tests.test_leakage_verbs import listed
from tests.test_robustness import cells


@pytest.fixture(autouse=True)
def _small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathfm.models.load_model", lambda *_: cells(2))


def model(folder: Path, seen: PretrainedOn | None) -> str:
    """A folder that says what its weights have seen; the weights are made up."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    if seen is not None:
        seen.save(folder)
    return str(folder)


def measured(tmp_path: Path, data: Path, *models: str, **changes: object):
    options = {
        "data": str(data),
        "models": list(models),
        "out": tmp_path / "out",
        "corruptions": ["jpeg"],
        "severities": [1],
        "noise_shares": [],
        "input_px": 32,
        "n_splits": 1,
        "c_values": (0.1,),
        "intervals": Options(n_resamples=100),
        "tracking": TrackingConfig(enabled=False),
    }
    return run(RobustnessConfig(**{**options, **changes}))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twenty pictures, two a patient: 0 to 9 train, 10 to 13 val, the rest test."""
    table, rows = tmp_path / "own.csv", []
    for i in range(20):
        name = f"{'ab'[i % 2]}/{i}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise((48, 48), i)).save(tmp_path / name)
        split = "train" if i < 10 else "val" if i < 14 else "test"
        rows.append(f"{name},{'ab'[i % 2]},{split},Patient {i // 2}")
    table.write_text("path,label,split,group\n" + "\n".join(rows) + "\n")
    return table


def test_a_tested_picture_that_was_seen_is_refused_before_features_are_made_or_marked(
    tmp_path, table, capsys
):
    mine = model(tmp_path / "mine", listed([noise((48, 48), 15)[::-1], noise((48, 48), 3)]))
    clean = model(tmp_path / "clean", listed([noise((48, 48), 400)]))
    with pytest.raises(PathfmError, match=r"1 of 6 samples .*Among them b/15\.png\..*--leaks mark"):
        measured(tmp_path, table, f"ref={clean}", f"mine={mine}")
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    result = measured(tmp_path, table, f"ref={clean}", f"mine={mine}", leaks="mark")
    (line,) = [caveat for caveat in result.caveats if "pretraining data" in caveat]
    assert line.startswith("mine: 1 of 6 samples were in the pretraining data (my corpus)")
    assert line in capsys.readouterr().out
    assert line in json.loads((tmp_path / "out" / "robustness.json").read_text())["caveats"]


def test_the_reference_is_held_to_the_same(tmp_path, table):
    seen = model(tmp_path / "seen", listed([noise((48, 48), 19)]))
    other = model(tmp_path / "other", listed([noise((48, 48), 400)]))
    with pytest.raises(PathfmError, match="1 of 6 samples"):
        measured(tmp_path, table, f"ref={seen}", f"other={other}")


def test_what_was_seen_of_training_pictures_alone_is_no_leak(tmp_path, table):
    mine = model(tmp_path / "mine", listed([noise((48, 48), 3)]))
    result = measured(tmp_path, table, f"mine={mine}")
    assert not any("pretrain" in caveat for caveat in result.caveats)


def test_a_model_of_unknown_pretraining_is_marked_and_never_refused(tmp_path, table):
    result = measured(tmp_path, table, f"found={model(tmp_path / 'found', None)}")
    assert "found: What the backbone was pretrained on is not known" in result.caveats[-1]


def test_patients_are_compared_under_the_salt_at_hand(tmp_path, table, monkeypatch):
    monkeypatch.setenv("PATHFM_SALT", "0123456789abcdef")
    salt = Salt(CohortOptions(), tmp_path)
    seen = listed(patients=[f"{salt.mark} {salt.id('patient', 'Patient 8')}"])
    with pytest.raises(PathfmError, match=r"2 of 6 samples .*2 by patient.*a/16\.png, b/17\.png"):
        measured(tmp_path, table, f"mine={model(tmp_path / 'm', seen)}")


def test_places_in_a_slide_that_was_seen_are_found_by_the_slide(tmp_path):
    rows = []
    for number in range(4):
        small_slide(tmp_path / f"{number}.tif", number)
        rows += [f"{number}.tif,{x},200,{'ab'[x > 200]},s{number}" for x in (100, 300)]
    table = tmp_path / "places.csv"
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    rows = [f"{row},{split},1.0" for row, split in zip(rows, splits, strict=True)]
    table.write_text("slide,x_px0,y_px0,label,group,split,mpp\n" + "\n".join(rows) + "\n")
    index = read_slide_index(str(tmp_path / "3.tif"))
    assert open_dataset(table).slide_digests()[-2:] == (index.digest,) * 2
    mine = model(tmp_path / "mine", replace(listed(), slides=slide_keys([index.digest])))
    with pytest.raises(PathfmError, match=r"2 of 2 samples .*\(2 by slide\)"):
        measured(tmp_path, table, f"mine={mine}")


def test_pictures_are_of_no_slide(table):
    assert open_dataset(table).slide_digests() == ()
