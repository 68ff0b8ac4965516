"""What ``pathfm compare`` wants to know."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field


class CompareConfig(BaseModel, frozen=True, extra="forbid"):
    """Which runs to show, and how."""

    uri: str | None = Field(
        None,
        description="MLflow store, or the .db file of one; unset: $MLFLOW_TRACKING_URI, else the "
        "newest mlflow.db found here or up to two folders below",
    )
    experiment: str = Field("pathfm", min_length=1, description="name of the experiment")
    runs: list[str] = Field(
        [],
        description="runs to take, with their children: ids or names, * and ? stand for anything; unset: all",
    )
    results: list[Path] = Field(
        [],
        description="result files (probe.json, robustness.json, ...) or folders of them, beside the store; "
        "without --uri, --experiment or --runs they are all there is, and no store is looked for",
    )
    out: Path | None = Field(
        None,
        description="folder for compare.html, compare.md, scores.csv and the pictures; unset: print only",
    )
    params: list[str] = Field([], description="params to show; unset: those that differ")
    metrics: list[str] = Field([], description="metrics to show; unset: all")
    newest: int = Field(6, ge=1, le=100, description="runs shown side by side of each stage")
    baseline: str | None = Field(
        None,
        description="model that ablations are compared with; unset: the first of each result file",
    )
    axes: list[str] = Field(
        [],
        description="x axes of scaling curves: params or figures of pretraining (patches_seen, slides_seen, "
        "optim.lr ...), dim or input_px; unset: numbers that differ, three values or more",
    )
    published: bool = Field(
        True,
        description="rows of the public eva leaderboard beside heads trained by eva's protocol",
    )
    maps: list[Path] = Field(
        [],
        description="embeddings to draw maps of (files or folders of embed); unset: those that were probed, where they "
        "still are. Files of one model are one map, such as of several µm/px",
    )
    map_method: Literal["pca", "umap"] = Field(
        "pca", description="pca, or umap: wants `pip install umap-learn` (the extra `maps`)"
    )
    map_points: int = Field(
        3000, ge=10, le=50_000, description="at most so many rows a map, drawn by seed"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="key of the rows drawn for maps, and of UMAP")
    replay: Path | None = Field(
        None, description="folder of a run whose rows did not reach the store: ship them first"
    )
