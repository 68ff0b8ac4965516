"""What a probing leaves beside `probe.json`: eva's results.json, and every prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.embeddings import Embeddings
from pathfm.probing.measuring import Measured
from pathfm.probing.scores import statistics_of
from pathfm.runtime import PathfmError
from pathfm.uncertainty import Predictions

_FORMAT = "pathfm.predictions.1"


def write_eva_results(path: Path, measured: Measured, reported_on: str) -> None:
    """`results.json` with eva's keys: metrics -> val, test -> a data set's metrics -> mean, stdev, values.

    One run a value, at the chosen learning rate. Without a test split "test" is empty, as in eva's file.
    """
    test = [statistics_of(measured.eva, "test")] if reported_on == "test" else []
    metrics = {"val": [statistics_of(measured.eva_val, "val")], "test": test}
    atomic_write_text(path, json.dumps({"metrics": metrics}, indent=2, sort_keys=True) + "\n")


def write_predictions(path: Path, data: Embeddings, measured: Measured) -> None:
    """One safetensors file: `truth` (n,), and per probe (repeats, n) classes, -1 where not judged."""
    tensors: dict[str, NDArray[Any]] = {"truth": data.labels}
    # int16 holds any class: fifty runs over PatchCamelyon are 33 MB a probe instead of 131
    tensors |= {name: m.predicted.astype(np.int16) for name, m in measured.predictions.items()}
    about = {
        "format": _FORMAT,
        "features": data.info.key,
        "data_digest": data.info.data_digest,
        "classes": json.dumps(data.classes),
        "groups": json.dumps(data.groups),
        "name": data.info.name,
    }
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    atomic_write_bytes(path, safetensors.numpy.save(whole, about))


def read_predictions(path: Path) -> dict[str, Predictions]:
    """Probe -> what it predicted, out of a file that `write_predictions` wrote; else `PathfmError`."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"format {about.get('format')!r}, wanted {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        n_classes, groups = len(json.loads(about["classes"])), tuple(json.loads(about["groups"]))
        truth = tensors.pop("truth")
        return {
            name: Predictions(truth, table.astype(np.int64), n_classes, groups, about["name"])
            for name, table in tensors.items()
        }
    except FileNotFoundError:
        raise PathfmError(f"no predictions at {path}: make them with `pathfm probe`") from None
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise PathfmError(f"{path}: no predictions of pathfm ({error})") from None
