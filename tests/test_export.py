"""A run goes out as a folder that timm loads, with a card that tells no more than the run knew."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import yaml

from pathfm.backbone import export_backbone, load_backbone
from pathfm.checkpoint import save_checkpoint
from pathfm.cli import main
from pathfm.export import ExportConfig, run, without_places
from pathfm.runtime import PathfmError
from tests.exporting import NAME, backbone, finished_run, probe_file

FILES = "README.md config.json export.json model.safetensors recipe.yaml".split()


@pytest.fixture
def finished(tmp_path) -> Path:
    return finished_run(tmp_path / "runs" / "mine")


def test_timm_loads_the_folder_and_computes_the_same(finished, tmp_path):
    out = tmp_path / "release"
    assert not run(ExportConfig(run=finished, out=out)).skipped
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "eva"])
    theirs: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(x), backbone().embed(x))
        assert theirs(torch.zeros(1, 3, 224, 224)).shape == (1, 24)  # other sizes too
    data = cast(Any, timm.data).resolve_model_data_config(theirs)
    assert tuple(data["mean"]) == (0.7, 0.6, 0.5)
    assert tuple(data["std"]) == (0.1, 0.2, 0.3)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert list((tmp_path).glob(".unfinished*")) == []


def test_the_card_tells_data_recipe_and_facts(finished, tmp_path):
    run(ExportConfig(run=finished, out=tmp_path / "x", name="tiny-one", licence="apache-2.0"))
    card = (tmp_path / "x" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "timm"
    for row in (
        "# tiny-one",
        "| method | dino |",
        "| optimizer steps | 1,200 |",
        "| patches seen | 9,600 |",
        "| slides seen | 3 |",
        "| initial weights | weights from first, 30 of 30 tensors |",
        "| µm/px drawn from | 0.5, 1.0 |",
        f"| data digest | {'c0ffee' * 10} |",
        f"| backbone digest | {backbone().digest} |",
        "| RankMe, start and end | 10 → 12.5 |",
        "mean 0.7, 0.6, 0.5 and standard deviation 0.1, 0.2, 0.3",
        "No probe was run",
    ):
        assert row in card, row
    recipe = yaml.safe_load((tmp_path / "x" / "recipe.yaml").read_text())
    assert recipe["dino"] == {"out_dim": 64}
    assert recipe["weights"] == "first.safetensors"
    assert "dinov2" not in recipe  # its settings did nothing


def test_the_card_says_which_views_it_was_trained_on_and_what_it_takes(finished, tmp_path):
    path = finished / "config.yaml"
    views = {"global_1": {"size_px": 48}, "global_2": {"size_px": 48}, "local": {"size_px": 16}}
    path.write_text(path.read_text() + yaml.safe_dump({"views": views}))
    run(ExportConfig(run=finished, out=tmp_path / "x"))
    card = (tmp_path / "x" / "README.md").read_text()
    assert (
        "trained on global views of 48 px, takes 32 px, or sides that are multiples of 16" in card
    )


def test_no_place_and_no_slide_gets_out(finished, tmp_path):
    probe = probe_file(tmp_path / "probe.json", backbone().digest)
    run(ExportConfig(run=finished, out=tmp_path / "x", probes=[probe]))
    texts = [
        p.read_text()
        for p in (tmp_path / "x").rglob("*")
        if p.suffix != ".safetensors" and p.is_file()
    ]
    for word in ("secret", "PATIENT", "mlflow", str(tmp_path)):
        assert not any(word in text for text in texts), word


def test_an_owner_who_states_no_licence_is_reminded(finished, tmp_path, capsys):
    run(ExportConfig(run=finished, out=tmp_path / "x"))
    card = (tmp_path / "x" / "README.md").read_text()
    assert "license: unknown" in card
    assert "not stated by the owner yet" in card
    assert "--licence" in capsys.readouterr().out


def test_probes_of_this_model_are_in_the_card(finished, tmp_path):
    probe = probe_file(tmp_path / "probe.json", backbone().digest)
    run(ExportConfig(run=finished, out=tmp_path / "x", probes=[probe]))
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| init | 78.9 ± 1.1 | 78.9 ± 1.1 | 11.1 |" in card
    assert r"| **mine\|&lt;b>** (this model) | 85.1 ± 1.1 | 85.1 ± 1.1 | 11.1 |" in card
    assert "- No slide ids." in card
    assert "colorectal5 (digest d1d1d1d1d1d1): 200 pictures, 2 classes, input 32 px" in card


def test_a_card_says_whose_split_it_was_every_probe_and_its_interval(finished, tmp_path):
    digest = backbone().digest
    path = probe_file(tmp_path / "probe.json", digest)
    rows = json.loads(path.read_text())["backbones"]
    rows[1]["probes"]["eva"] = rows[1]["probes"]["logistic"] | {"interval": [0.8, 0.9]}
    own = {"own_splits": True, "n_val": 30, "n_test": 30, "reported_on": "val"}
    probe_file(path, digest, backbones=rows, **own)
    run(ExportConfig(run=finished, out=tmp_path / "x", probes=[path]))
    card = (tmp_path / "x" / "README.md").read_text()
    assert "140 train / 30 val, val reported. Balanced accuracy, %, mean ± sd over runs [95" in card
    assert "| features | logistic | kNN, k = 20 | kaiko-eva's head | RankMe |" in card
    assert "| init | 78.9 ± 1.1 | 78.9 ± 1.1 | – | 11.1 |" in card
    assert "85.1 ± 1.1 [80.0, 90.0] | 11.1 |" in card


def test_a_probe_at_another_input_size_is_known_by_the_resampled_backbone(finished, tmp_path):
    at_64 = load_backbone(NAME, str(finished), 64).digest
    assert at_64 != backbone().digest
    probe = probe_file(tmp_path / "probe.json", at_64, input_px=64)
    run(ExportConfig(run=finished, out=tmp_path / "x", probes=[probe]))
    assert "(this model)" in (tmp_path / "x" / "README.md").read_text()


def test_the_same_export_again_is_skipped_and_another_is_refused(finished, tmp_path):
    config = ExportConfig(run=finished, out=tmp_path / "x")
    assert not run(config).skipped
    assert run(config).skipped
    before = (tmp_path / "x" / "README.md").read_bytes()
    with pytest.raises(PathfmError, match="exists and is not this export"):
        run(config.model_copy(update={"licence": "mit"}))
    assert (tmp_path / "x" / "README.md").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(PathfmError, match="exists and is not this export"):
        run(config.model_copy(update={"out": tmp_path / "notes"}))
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_an_empty_folder_is_filled(finished, tmp_path):
    (tmp_path / "x").mkdir()
    run(ExportConfig(run=finished, out=tmp_path / "x"))
    assert (tmp_path / "x" / "model.safetensors").is_file()


def test_an_export_cut_short_leaves_nothing(finished, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathfm.export._sync", full)
    with pytest.raises(PathfmError, match="No space left"):
        run(ExportConfig(run=finished, out=tmp_path / "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    monkeypatch.undo()
    (tmp_path / ".unfinished-x").mkdir()  # as a kill leaves it
    (tmp_path / ".unfinished-x" / "README.md").write_text("half")
    run(ExportConfig(run=finished, out=tmp_path / "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "x"]


def no_run(folder):
    shutil.rmtree(folder)


def no_settings(folder):
    (folder / "config.yaml").unlink()


def other_tensors(folder):
    shutil.rmtree(folder / "backbone")
    export_backbone(backbone(2), folder / "backbone")


def torn_settings(folder):
    (folder / "config.yaml").write_text("a: [1")


def torn_summary(folder):
    path = folder / "summary.json"
    path.write_text(path.read_text()[:-9])


def torn_weights(folder):
    path = folder / "backbone" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def unfinished(folder):
    (folder / "summary.json").unlink()


def no_steps(folder):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": "many"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_run, "is no run of pretrain"),
        (no_settings, "is no run of pretrain"),
        (torn_settings, r"config\.yaml: damaged"),
        (other_tensors, "not what the run ended with"),
        (torn_summary, r"summary\.json: damaged"),
        (torn_weights, "not a whole .safetensors file"),
        (unfinished, "0 of 1200 steps are saved.*no checkpoint"),
        (no_steps, "it tells no steps"),
    ],
)
def test_a_run_that_is_none_or_damaged_is_one_clear_line(finished, tmp_path, damage, words):
    damage(finished)
    with pytest.raises(PathfmError, match=words) as caught:
        run(ExportConfig(run=finished, out=tmp_path / "x"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_the_command_line_says_so_with_exit_code_2(finished, tmp_path, capsys):
    unfinished(finished)
    assert main(["export", str(finished), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_checkpoint_of_an_unfinished_run_goes_out_when_asked_for(finished, tmp_path):
    unfinished(finished)
    shutil.rmtree(finished / "backbone")
    for step, seed in ((300, 3), (600, 4)):
        save_checkpoint(
            finished / "checkpoints",
            step,
            {"x": torch.zeros(1)},
            {},
            keep_last=2,
            write_more=lambda folder, seed=seed: export_backbone(
                backbone(seed), folder / "backbone"
            ),
        )
    config = ExportConfig(run=finished, out=tmp_path / "x")
    with pytest.raises(PathfmError, match=r"600 of 1200 steps.*--unfinished true"):
        run(config)
    run(config.model_copy(update={"unfinished": True}))
    assert load_backbone("", str(tmp_path / "x")).digest == backbone(4).digest
    card = (tmp_path / "x" / "README.md").read_text()
    assert "600 of 1200: the run had not finished" in card


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: probe_file(p, "f" * 64), "measures other backbones"),
        (lambda p: p.write_text("{}"), "no probe.json of pathfm"),
        (lambda p: None, "cannot be read"),
    ],
)
def test_a_probe_that_does_not_belong_is_refused(finished, tmp_path, make, words):
    make(tmp_path / "probe.json")
    with pytest.raises(PathfmError, match=words):
        run(ExportConfig(run=finished, out=tmp_path / "x", probes=[tmp_path / "probe.json"]))
    assert not (tmp_path / "x").exists()


def test_places_are_cut_to_their_last_part():
    given = {
        "a": ["/x y/z.csv", "s3://bucket/key/", "../up/there", "~/mine"],
        "b": 3,
        "c": "from /x/run, 30 of 30",
        "d": "/",
        "e": 0.5,
    }
    assert without_places(given) == {
        "a": ["z.csv", "key", "there", "mine"],
        "b": 3,
        "c": "from run, 30 of 30",
        "d": "",
        "e": 0.5,
    }
