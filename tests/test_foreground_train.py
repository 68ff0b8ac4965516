"""`pathfm foreground-train`: a run that resumes, says what it made, and refuses what it must."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pathfm.cli as cli
from pathfm import foreground_train
from pathfm.foreground_train import ForegroundTrainConfig
from pathfm.runtime import PathfmError
from pathfm.segmentation import train, training_data
from pathfm.segmentation.models import load_model
from pathfm.segmentation.truth import DrawnPicture, Truth


def config(out: Path, **changes: object) -> ForegroundTrainConfig:
    small = {
        "synthetic": 3, "synthetic_px": 96, "crop_px": 32, "batch_size": 2, "steps": 6,
        "warmup_steps": 2, "validation_synthetic": 1, "validate_every_steps": 3,
        "checkpoint_every_steps": 2, "tracking": {"enabled": False},
    }  # fmt: skip
    return ForegroundTrainConfig.model_validate({"out": out} | small | changes)


def drawn(name: str, licence: str = "MIT", split: str = "training") -> DrawnPicture:
    rgb = np.full((60, 80, 3), 240, np.uint8)
    rgb[10:50, 20:60] = (190, 90, 140)
    tissue = np.zeros((60, 80), np.bool_)
    tissue[10:50, 20:60] = True
    nothing = np.zeros_like(tissue)
    truth = Truth(tissue, nothing, dict.fromkeys(("fat", "pale", "pen", "bubble", "edge"), nothing))
    return DrawnPicture(name, rgb, truth, split, "H&E", "H&E", licence, "a repository", name)


def test_a_run_writes_weights_that_load_with_what_they_were_made_from(tmp_path: Path) -> None:
    result = foreground_train.run(config(tmp_path))
    model, facts = load_model(result.weights)
    assert facts["settings"]["steps"] == 6
    assert set(facts["validation"]) == {"synthetic_dice", "synthetic_iou"}
    assert model(torch.zeros(1, 3, 20, 30)).shape == (1, 20, 30)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 5
    with Image.open(tmp_path / "crops.jpg") as crops:
        assert np.asarray(crops).std() > 5  # a picture of something


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", [1, 2, 5])
def test_a_stopped_run_ends_with_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    whole = foreground_train.run(config(tmp_path / "whole"))
    one = train.Trainer._one

    def stops(self, *batch):
        if self.step == stopped_after:
            raise KeyboardInterrupt
        return one(self, *batch)

    monkeypatch.setattr(train.Trainer, "_one", stops)
    with pytest.raises(KeyboardInterrupt):
        foreground_train.run(config(tmp_path / "cut"))
    monkeypatch.undo()
    cut = foreground_train.run(config(tmp_path / "cut"))
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_stopped_run_goes_on_though_the_folder_has_later_checkpoints_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreground_train.run(config(tmp_path))  # leaves steps 4 and 6
    one, begun = train.Trainer._one, []

    def stops(self, *batch):
        begun.append(self.step)
        if begun == [0, 1, 2]:
            raise KeyboardInterrupt
        return one(self, *batch)

    monkeypatch.setattr(train.Trainer, "_one", stops)
    with pytest.raises(KeyboardInterrupt):
        foreground_train.run(config(tmp_path, lr=1e-4))
    foreground_train.run(config(tmp_path, lr=1e-4))
    assert begun == [0, 1, 2, 2, 3, 4, 5]


def test_a_finished_run_is_left_alone_until_its_settings_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = foreground_train.run(config(tmp_path))
    before = first.weights.stat().st_mtime_ns
    foreground_train.run(config(tmp_path))
    assert "up to date" in capsys.readouterr().out
    assert first.weights.stat().st_mtime_ns == before
    foreground_train.run(config(tmp_path, lr=1e-4))
    assert first.weights.stat().st_mtime_ns != before


def test_drawn_pictures_get_their_share_and_are_named_with_their_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(roots, split):
        return [drawn(f"{split} {k}", split=split) for k in range(2)]

    monkeypatch.setattr(training_data, "read_pictures", read)
    result = foreground_train.run(config(tmp_path, pictures=[tmp_path], real_share=0.25))
    assert [row["licence"] for row in result.facts["trained_on"]] == ["MIT", "MIT"]
    assert set(result.facts["validation"]) >= {"drawn_dice", "synthetic_dice"}
    trainer = train.Trainer(
        config(tmp_path / "b", real_share=0.25), training_data.gather([tmp_path]), "key"
    )
    pictures = trainer._pictures()
    weight = {p.name: p.weight for p in pictures}
    assert sum(w for name, w in weight.items() if name.startswith("training")) == pytest.approx(
        0.25
    )
    assert sum(weight.values()) == pytest.approx(1)


def test_a_picture_without_a_permitted_licence_is_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training_data, "read_pictures", lambda roots, split: [drawn("x", "none stated")]
    )
    with pytest.raises(PathfmError, match=r"picture x: its licence is 'none stated'"):
        foreground_train.run(config(tmp_path, pictures=[tmp_path]))
    assert not (tmp_path / foreground_train.WEIGHTS).exists()


def test_a_run_may_begin_with_weights_and_is_another_run_then(tmp_path: Path) -> None:
    first = foreground_train.run(config(tmp_path / "first"))
    began = config(tmp_path / "next", start=first.weights, lr=1e-12, steps=1, warmup_steps=0)
    trainer = train.Trainer(began, training_data.DrawnData(), "key")
    want = load_model(first.weights)[0].state_dict()
    assert all(torch.equal(v, want[k]) for k, v in trainer.model.state_dict().items())
    later = foreground_train.run(began)
    assert len(later.facts["started_from_sha256"]) == 64
    other = config(tmp_path / "other", start=later.weights, lr=1e-12, steps=1, warmup_steps=0)
    assert foreground_train.run(other).facts["key"] != later.facts["key"]


def test_weights_of_another_network_are_no_start(tmp_path: Path) -> None:
    first = foreground_train.run(config(tmp_path / "first"))
    with pytest.raises(PathfmError, match="holds another network than a unet_stem4"):
        foreground_train.run(config(tmp_path / "next", start=first.weights, model="unet_stem4"))
    with pytest.raises(PathfmError, match="nowhere: cannot be read"):
        foreground_train.run(config(tmp_path / "next", start=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("licence", "may"),
    [
        *((yes, True) for yes in ("CC0", "CC0 1.0", "CC0-1.0", "MIT", "Apache-2.0", "CC BY")),
        *((yes, True) for yes in ("CC BY 4.0", "CC-BY-4.0", "BSD-3-Clause", "BSD-3-Clause-Clear")),
        *((no, False) for no in ("CC BY-NC 4.0", "CC BY-ND 4.0", "CC BY-SA 4.0", "CC-BY-NC-4.0")),
        *((no, False) for no in ("CC BY NC", "none stated", "", "MITRE", "MIT, not for models")),
        *((no, False) for no in ("GPL-2.0", "CC BYNC", "Apache-2.0 WITH\nCommons Clause")),
    ],
)
def test_licences_that_only_begin_like_a_permitted_one_are_not(licence: str, may: bool) -> None:
    assert training_data.permitted(licence) == may


def test_weights_made_from_other_kinds_than_those_drawn_now_are_not_up_to_date() -> None:
    """Crops look for rare kinds, so where fat is drawn decides what is learnt."""
    before = drawn("a")
    fat = before.tissue & (np.arange(80) < 30)
    truth = Truth(before.tissue, before.ignore, {**before.kinds, "fat": fat})
    after = dataclasses.replace(before, truth=truth)
    digests = {training_data.DrawnData((p,)).digest for p in (before, after)}
    assert len(digests) == 2


def test_a_loss_that_is_no_number_stops_the_run_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train.Trainer(config(tmp_path), training_data.DrawnData(), "key")
    monkeypatch.setattr(trainer, "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    before = [p.clone() for p in trainer.model.parameters()]
    rgb, truth = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    with pytest.raises(PathfmError, match=r"the loss is nan at step 0: lower --lr \(0.003\)"):
        trainer._one(rgb, truth, truth)
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--synthetic", "0"], "nothing to learn from: give --pictures FOLDER or --synthetic > 0"),
        (["--loss", "dise"], "loss"),
        (["--model", "resnet"], "model"),
        (["--pictures", "no/such/folder"], "no/such/folder: no such folder"),
        (["--crop_px", "600"], "crop_px 600 is more than synthetic_px 512"),
        (["--rare_share", "0.8"], "border_share 0.3 and rare_share 0.8 are 1.1 together"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert cli.main(["foreground-train", "--out", str(tmp_path / "o"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert error.count("\n") == 0


def test_losses_can_be_named_on_the_command_line() -> None:
    from pathfm.config import load_config

    made = load_config(ForegroundTrainConfig, None, ["--loss", "bce", "mcc"])
    assert [term.name for term in made.loss] == ["bce", "mcc"]


@pytest.mark.parametrize(
    "name", ["foreground_unet", "foreground_unet_again", "foreground_segformer_b0"]
)
def test_the_shipped_configs_are_understood(name: str) -> None:
    from pathfm.config import load_config

    made = load_config(ForegroundTrainConfig, Path("configs") / f"{name}.yaml")
    assert made.model.startswith(name.removeprefix("foreground_").removesuffix("_again"))


def test_the_help_shows_losses_as_the_command_line_takes_them() -> None:
    from pathfm.cli import verb_help

    text = verb_help("foreground-train", ForegroundTrainConfig)
    assert "--loss [STR" in text
    assert "(default: bce dice)" in " ".join(text.split())
    assert "--loss.0" not in text
