"""The kaiko-eva configs of an export name what eva has, and load what was exported."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from pathfm.export import ExportConfig, run
from pathfm.probing.protocol import TASKS
from tests.exporting import backbone, finished_run


@pytest.fixture
def eva_folder(tmp_path) -> Path:
    run(ExportConfig(run=finished_run(tmp_path / "mine"), out=tmp_path / "tiny"))
    return tmp_path / "tiny" / "eva"


def class_paths(part: Any) -> set[str]:
    if isinstance(part, dict):
        own = {part["class_path"]} if "class_path" in part else set()
        return own.union(*(class_paths(value) for value in part.values()))
    return set().union(*map(class_paths, part)) if isinstance(part, list) else set()


def test_there_is_a_config_for_each_task_of_the_protocol(eva_folder):
    assert sorted(p.stem for p in eva_folder.iterdir()) == sorted(TASKS)
    for task, known in TASKS.items():
        config = yaml.safe_load((eva_folder / f"{task}.yaml").read_text())
        head = config["model"]["init_args"]["head"]["init_args"]
        assert head == {
            "in_features": 24,
            "out_features": 1 if known.n_classes == 2 else known.n_classes,
        }
        predict = config["data"]["init_args"]["datasets"]["predict"]
        assert [part["init_args"]["split"] for part in predict] == list(known.splits)
        transforms = predict[0]["init_args"]["transforms"]["init_args"]
        assert transforms["mean"] == [0.7, 0.6, 0.5]
        assert transforms["size"] == "${oc.env:RESIZE_DIM, 224}"
        writer = config["trainer"]["init_args"]["callbacks"][-1]["init_args"]
        assert writer["dataloader_idx_map"] == dict(enumerate(known.splits))
        assert writer["backbone"]["init_args"]["model_name"] == "local-dir:${oc.env:MODEL_DIR, .}"


EVA_PATHS = set(
    """eva.DataModule eva.HeadModule eva.Trainer eva.callbacks.ClassificationEmbeddingsWriter
    eva.callbacks.ConfigurationLogger eva.datasets.EmbeddingsClassificationDataset
    eva.metrics.AverageLoss eva.metrics.BinaryClassificationMetrics
    eva.metrics.MulticlassClassificationMetrics eva.vision.data.transforms.common.ResizeAndCrop
    eva.vision.datasets.BACH eva.vision.datasets.BRACS eva.vision.datasets.BreaKHis
    eva.vision.datasets.CRC eva.vision.datasets.GleasonArvaniti eva.vision.datasets.MHIST
    eva.vision.datasets.PatchCamelyon eva.vision.datasets.UniToPatho eva.vision.models.TimmModel""".split()
)
"""Every one was imported from kaiko-eva 0.4.5."""


def test_the_class_paths_are_those_that_eva_has(eva_folder):
    found = set().union(*(class_paths(yaml.safe_load(p.read_text())) for p in eva_folder.iterdir()))
    assert {path for path in found if path.startswith("eva.")} == EVA_PATHS
    others = {path for path in found if not path.startswith(("eva.", "lightning."))}
    assert others == {"torch.nn.Linear", "torch.optim.AdamW", "torchvision.transforms.v2.ToDtype"}


def test_the_backbone_part_loads_what_was_exported(eva_folder):
    """As eva's TimmModel calls timm: from inside the folder, with its own empty settings."""
    config = yaml.safe_load((eva_folder / "bach.yaml").read_text())
    told = config["trainer"]["init_args"]["callbacks"][-1]["init_args"]["backbone"]["init_args"]
    name = told["model_name"].replace("${oc.env:MODEL_DIR, .}", str(eva_folder.parent))
    model: Any = timm.create_model(
        model_name=name,
        pretrained=told["pretrained"],
        pretrained_cfg={},
        out_indices=None,
        features_only=False,
    )
    x = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), backbone().embed(x))
