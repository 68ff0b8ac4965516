"""Labels of patches, from three places, and batches balanced by them: docs/labels.md.

settings here     LabelsConfig: `--labels.*` of `pathfm pretrain`
tables.py         a class a slide: a column of the corpus's table, or of another
regions.py        a class a region: annotations drawn in QuPath
rows.py           what both give: rows of a corpus, each of a class or none; their sampler
pictures.py       a class a patch: a folder of pictures, in balanced or plain order
reading.py        one picture -> a patch of the size wanted
picture_feed.py   such patches as a stream: read ahead, resumable, split between ranks
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

__all__ = ["LEARNS_FROM_LABELS", "LabelsConfig"]

LEARNS_FROM_LABELS = ("supcon", "supervised")
"""Methods that need labels; the others may have them, for balanced batches."""

SOURCES = ("column", "table", "regions", "patches")


class LabelsConfig(BaseModel, frozen=True, extra="forbid"):
    """Where labels come from: one of column, table, regions and patches; none: no labels."""

    column: str | None = Field(
        None,
        min_length=1,
        description="column of the corpus's slides.parquet that holds each slide's class, such as label; "
        "with --labels.table the column of that table (label)",
    )
    table: Path | None = Field(
        None, description="CSV, TSV or Parquet table with the columns slide_id and label"
    )
    regions: Path | None = Field(
        None,
        description="folder of <slide_id>.geojson: annotations with QuPath's classes, level-0 px",
    )
    patches: Path | None = Field(
        None,
        description="folder of pictures in a subfolder a class, read instead of the corpus; without "
        "classes (--labels.balanced false) pictures may lie anywhere below it",
    )
    classes: tuple[str, ...] = Field(
        (), description="classes used, in this order; unset: all there are, by name"
    )
    class_weights: tuple[str, ...] = Field(
        (), description="draws that a class gets of each block, 1 where not said: NAME=3 OTHER=2"
    )
    balanced: bool | None = Field(
        None,
        description="every class equally often; unset: yes, but a self-supervised method reads a folder "
        "of patches without its classes",
    )
    unlabelled: int = Field(
        0, ge=0, le=256, description="further draws of each block, from slides without a class"
    )
    splits: tuple[str, ...] = Field(
        ("train",), description="splits of the table that may be drawn, where it has any"
    )
    min_region: float = Field(
        0.5,
        gt=0,
        le=1,
        description="least share of a patch that is tissue of its region; in place of min_foreground",
    )
    patches_mpp: float | None = Field(
        None, ge=0.05, le=8, description="µm/px of the folder's pictures, where known"
    )
    fit: Literal["resize", "crop"] = Field(
        "resize",
        description="how a picture becomes a patch: resize: its shorter side to patch_px; crop: cut out at "
        "its own scale (enlarged only if it is smaller); where, follows from seed and draw",
    )

    @property
    def source(self) -> str | None:
        """Which of SOURCES is given; a table goes before its column. None without labels."""
        given = [name for name in SOURCES[1:] if getattr(self, name) is not None]
        return given[0] if given else "column" if self.column else None

    @property
    def weights(self) -> dict[str, int]:
        """Class -> draws of each block, of the classes that `class_weights` names."""
        pairs = (item.rpartition("=") for item in self.class_weights)
        return {name: int(weight) for name, _, weight in pairs}

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError("a class is named twice")
        if not all(classes):
            raise ValueError("a class has an empty name")
        return classes

    @field_validator("class_weights", mode="before")
    @classmethod
    def _a_mapping_is_a_list_too(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return tuple(f"{name}={weight}" for name, weight in value.items())
        return (value,) if isinstance(value, str) else value

    @field_validator("class_weights")
    @classmethod
    def _weights_are_counts(cls, items: tuple[str, ...]) -> tuple[str, ...]:
        for item in items:
            name, _, weight = item.rpartition("=")
            if not name or not weight.isdecimal() or not 1 <= int(weight[:5]) <= 1024:
                raise ValueError(f"{item!r} is not NAME=N, N a whole number from 1 to 1024")
        if len({item.rpartition("=")[0] for item in items}) < len(items):
            raise ValueError("a class is named twice")
        return items

    @model_validator(mode="after")
    def _one_source(self) -> LabelsConfig:
        given = [name for name in SOURCES[1:] if getattr(self, name) is not None]
        if len(given) > 1 or (self.column and given and given != ["table"]):
            named = [*(["column"] if self.column else []), *given]
            raise ValueError(f"labels come from one place, not from {' and '.join(named)}")
        if self.unlabelled and self.source in (None, "patches"):
            raise ValueError("unlabelled is of slides; give column, table or regions with it")
        if self.balanced is False and self.source in ("column", "table", "regions"):
            raise ValueError("balanced false is for a folder of patches; set class_weights instead")
        return self
