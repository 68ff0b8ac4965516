"""A second stage at a larger input, from the first one's run folder to an exported model."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from pathfm.backbone import find_backbone_folder, load_backbone
from pathfm.checkpoint import load_newest
from pathfm.export import ExportConfig
from pathfm.export import run as export
from pathfm.pretrain import run
from tests.pretraining import assert_same_run, config

LARGER: dict[str, Any] = {
    "input_px": 64,
    "patch_px": 96,
    "steps": 3,
    "checkpoint_every_steps": 1,
    "drop_path": 0.2,
    "optim": {"warmup_steps": 0, "lr": 1e-3},
    "views": {
        "global_1": {"size_px": 64},
        "global_2": {"size_px": 64},
        "local": {"size_px": 32},
        "n_local": 1,
    },
}


@pytest.fixture(scope="module")
def stages(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a run at 32 px and of the one at 64 px that goes on from it."""
    folder = tmp_path_factory.mktemp("stages")
    assert run(config(small_corpus, folder / "first", steps=2, input_px=32)).finished
    larger = config(small_corpus, folder / "second", **LARGER, weights=str(folder / "first"))
    assert run(larger).finished
    return folder / "first", folder / "second"


@pytest.mark.slow
def test_a_second_stage_begins_where_the_first_ended_with_its_places_resampled(stages):
    first, second = stages
    summary = json.loads((second / "summary.json").read_text())
    assert "pos_embed resampled to 64 px" in summary["init"]
    before = load_backbone("test_vit", str(first)).network.state_dict()
    start = load_backbone("test_vit", str(first), 64)
    prefix = before["pos_embed"].shape[1] - 2 * 2
    wanted = resample_abs_pos_embed(before["pos_embed"], (4, 4), (2, 2), num_prefix_tokens=prefix)
    torch.testing.assert_close(start.network.state_dict()["pos_embed"], wanted)
    checkpoint = load_newest(second / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["done"]["init_digest"] == start.digest
    assert load_backbone("test_vit", str(second)).input_px == 64


@pytest.mark.slow
def test_a_second_stage_that_is_stopped_is_not_resampled_again(stages, small_corpus, tmp_path):
    first, second = stages
    told = LARGER | {"weights": str(first)}
    assert not run(config(small_corpus, tmp_path / "run", **told, stop_after_steps=1)).finished
    folder = find_backbone_folder(tmp_path / "run")
    assert folder is not None
    assert load_backbone("", str(folder)).network.state_dict()["pos_embed"].shape[1] >= 16
    assert run(config(small_corpus, tmp_path / "run", **told)).finished
    assert_same_run(tmp_path / "run", second)


@pytest.mark.slow
def test_what_a_real_run_leaves_is_exported(stages, tmp_path):
    _, second = stages
    export(ExportConfig(run=second, out=tmp_path / "model"))
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(x), load_backbone("test_vit", str(second)).embed(x))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| optimizer steps | 3 |" in card
    assert "| initial weights | weights from first" in card
    texts = [p.read_text() for p in (tmp_path / "model").rglob("*.*") if p.suffix != ".safetensors"]
    assert not any(str(second.parent) in text for text in texts)
