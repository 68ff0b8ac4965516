"""What a run's record is configured with, and how a store's URI is read and shown."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from pydantic import BaseModel, Field, field_validator

from pathfm.runtime import without_secrets

PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below another
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


class TrackingConfig(BaseModel, frozen=True, extra="forbid"):
    """Where a run is recorded."""

    enabled: bool = Field(True, description="ship to MLflow; metrics.jsonl is written regardless")
    uri: str | None = Field(
        None,
        description="MLflow store: sqlite:///FILE or http(s)://...; unset: $MLFLOW_TRACKING_URI, "
        "else mlflow.db in the run's folder",
    )
    experiment: str = Field("pathfm", min_length=1, description="name of the MLflow experiment")
    run_name: str | None = Field(None, description="name of the run; unset: its folder's name")
    parent_run_id: str | None = Field(None, description="id of the run this one is a child of")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str | None) -> str | None:
        if uri and uri.split(":")[0].split("+")[0] not in _SCHEMES:
            raise ValueError(
                f"{without_secrets(uri)!r} is no store MLflow 3 can write to: "
                f"use sqlite:///FILE.db or http(s)://HOST:PORT"
            )
        return uri

    def store(self, folder: Path) -> str:
        """The store's URI for a run in `folder`."""
        default = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or default

    def filled(self, folder: Path, run_name: str) -> TrackingConfig:
        """The same with its store settled for `folder`, and this name where none is given."""
        return self.model_copy(
            update={"uri": self.store(folder), "run_name": self.run_name or run_name}
        )


def ui_command(uri: str) -> str:
    """What to type to look at a store in a browser."""
    if uri.startswith(("http://", "https://")):
        return f"open {shlex.quote(without_secrets(uri))}"
    return f"mlflow ui --backend-store-uri {shlex.quote(without_secrets(uri))}"


def sqlite_file(uri: str) -> Path | None:
    """The file behind a sqlite URI, else None. `#` is part of a path; `?` ends it, as for MLflow."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def absolute(uri: str) -> str:
    """The same store, whatever the working directory."""
    file = sqlite_file(uri)
    return uri if file is None else uri.replace(str(file), str(file.resolve()), 1)
