"""Configs for kaiko-eva (checked against 0.4.5): frozen features, its own data, splits and heads.

They follow eva's own offline classification configs, task by task; only the model, its
normalisation and the width of the head are ours. `eva predict_fit --config eva/bach.yaml`, started
in the exported folder (or with MODEL_DIR naming it), downloads nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from pathfm.probing.protocol import EVA_BATCH, EVA_LEARNING_RATE, EVA_RUNS, EVA_STEPS, TASKS, Task

if TYPE_CHECKING:
    from pathfm.backbone import Backbone

_EVALUATED_PX = 224  # eva's protocol, whatever a model was trained at


def eva_configs(name: str, backbone: Backbone) -> dict[str, str]:
    """task -> YAML text. eva's own variables (DATA_ROOT, N_RUNS, ...) work as in its configs."""
    return {key: _text(key, task, name, backbone) for key, task in TASKS.items()}


def _text(key: str, task: Task, name: str, backbone: Backbone) -> str:
    about = (
        f"# Evaluates {name} on {task.dataset} with kaiko-eva:\n"
        f"#   cd THIS_MODEL && eva predict_fit --config eva/{key}.yaml   (or set MODEL_DIR)\n"
    )
    config = {
        "trainer": _trainer(key, task, name),
        "model": _head(task, backbone.dim),
        "data": _data(key, task, name, backbone),
    }
    config["trainer"]["init_args"]["callbacks"].append(_writer(key, task, name))
    return about + yaml.dump(config, sort_keys=False, Dumper=_Plain)


class _Plain(yaml.SafeDumper):
    """YAML without anchors: every value where it is used."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _env(variable: str, default: object) -> str:
    return f"${{oc.env:{variable}, {default}}}"


def _part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": init_args} if init_args else {})}


def _embeddings_root(key: str, name: str) -> str:
    return f"{_env('EMBEDDINGS_ROOT', './data/embeddings')}/{name}/{key}"


def _trainer(key: str, task: Task, name: str) -> dict[str, Any]:
    metric = "BinaryBalancedAccuracy" if task.n_classes == 2 else "MulticlassAccuracy"
    watched = {
        "monitor": _env("MONITOR_METRIC", f"val/{metric}"),
        "mode": _env("MONITOR_METRIC_MODE", "max"),
    }
    root = _env("OUTPUT_ROOT", f"logs/{name}/offline/{key}")
    return _part(
        "eva.Trainer",
        n_runs=_env("N_RUNS", EVA_RUNS),
        default_root_dir=root,
        max_steps=_env("MAX_STEPS", EVA_STEPS),
        checkpoint_type=_env("CHECKPOINT_TYPE", "best"),
        accelerator=_env("ACCELERATOR", "auto"),
        devices=_env("NUM_DEVICES", 1),
        callbacks=[
            _part("eva.callbacks.ConfigurationLogger"),
            _part(
                "lightning.pytorch.callbacks.TQDMProgressBar",
                refresh_rate=_env("TQDM_REFRESH_RATE", 1),
            ),
            _part("lightning.pytorch.callbacks.LearningRateMonitor", logging_interval="epoch"),
            _part(
                "lightning.pytorch.callbacks.ModelCheckpoint",
                filename="best",
                save_last=_env("SAVE_LAST", "false"),
                save_top_k=1,
                **watched,
            ),
            _part(
                "lightning.pytorch.callbacks.EarlyStopping",
                min_delta=0,
                patience=_env("PATIENCE", task.patience),
                **watched,
            ),
        ],
        logger=[_part("lightning.pytorch.loggers.TensorBoardLogger", save_dir=root, name="")],
    )


def _writer(key: str, task: Task, name: str) -> dict[str, Any]:
    model = _part(
        "eva.vision.models.TimmModel",
        model_name=f"local-dir:{_env('MODEL_DIR', '.')}",
        pretrained=True,
    )
    return _part(
        "eva.callbacks.ClassificationEmbeddingsWriter",
        output_dir=_embeddings_root(key, name),
        dataloader_idx_map=dict(enumerate(task.splits)),
        backbone=model,
        overwrite=False,
    )


def _head(task: Task, dim: int) -> dict[str, Any]:
    binary = task.n_classes == 2
    metrics = (
        _part("eva.metrics.BinaryClassificationMetrics")
        if binary
        else _part("eva.metrics.MulticlassClassificationMetrics", num_classes=task.n_classes)
    )
    return _part(
        "eva.HeadModule",
        head=_part(
            "torch.nn.Linear", in_features=dim, out_features=1 if binary else task.n_classes
        ),
        criterion="torch.nn.BCEWithLogitsLoss" if binary else "torch.nn.CrossEntropyLoss",
        optimizer=_part("torch.optim.AdamW", lr=_env("LR_VALUE", EVA_LEARNING_RATE)),
        metrics={"common": [_part("eva.metrics.AverageLoss"), metrics]},
    )


def _data(key: str, task: Task, name: str, backbone: Backbone) -> dict[str, Any]:
    stages = dict(zip(("train", "val", "test"), task.splits, strict=False))
    batch = {
        "batch_size": _env("BATCH_SIZE", EVA_BATCH),
        "num_workers": _env("N_DATA_WORKERS", 4),
    }
    loaders: dict[str, Mapping[str, Any]] = {"train": batch | {"shuffle": True}}
    loaders |= {stage: batch for stage in stages if stage != "train"}
    loaders["predict"] = batch | {"batch_size": _env("PREDICT_BATCH_SIZE", 64)}
    return _part(
        "eva.DataModule",
        datasets={
            **{stage: _embedded(key, task, name, split) for stage, split in stages.items()},
            "predict": [_pictures(key, task, split, backbone) for split in task.splits],
        },
        dataloaders=loaders,
    )


def _embedded(key: str, task: Task, name: str, split: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "root": _embeddings_root(key, name),
        "manifest_file": "manifest.csv",
        "split": split,
    }
    if task.n_classes == 2:  # its loss wants numbers, not classes
        told["target_transforms"] = _part(
            "torchvision.transforms.v2.ToDtype", dtype="torch.float32"
        )
    return _part("eva.datasets.EmbeddingsClassificationDataset", **told)


def _pictures(key: str, task: Task, split: str, backbone: Backbone) -> dict[str, Any]:
    size = _EVALUATED_PX
    if backbone.is_transformer:
        size = max(1, round(size / backbone.patch_size)) * backbone.patch_size
    folder = "arvaniti_gleason_patches" if key == "gleason_arvaniti" else key
    told: dict[str, Any] = {"root": _env("DATA_ROOT", f"./data/{folder}"), "split": split}
    if task.downloads:
        told["download"] = _env("DOWNLOAD_DATA", "false")
    told["transforms"] = _part(
        "eva.vision.data.transforms.common.ResizeAndCrop",
        size=_env("RESIZE_DIM", size),
        mean=list(backbone.mean),
        std=list(backbone.std),
    )
    return _part(f"eva.vision.datasets.{task.dataset}", **told)
