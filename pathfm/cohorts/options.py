"""How a cohort is found and what is kept of it: the `--cohort.*` options of `pathfm index`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, field_validator

GDC_ENDPOINT = "https://api.gdc.cancer.gov/data"
ROLES = (
    "uri",
    "patient",
    "case",
    "stain",
    "site",
    "label",
    "split",
    "name",
    "mpp",
    "mpp_x",
    "mpp_y",
)
"""What a table's columns may be: see `columns.py` for what people call them."""
_FROM_NAMES = ("patient", "case", "stain", "site", "label", "split")


class CohortOptions(BaseModel, frozen=True, extra="forbid"):
    """Which slides of the sources are meant, who they are of, and what may be written of that."""

    columns: tuple[str, ...] = Field(
        (),
        description="columns of a table that are called otherwise, as role=name: uri=s3_path "
        "label=diagnosis (roles: uri patient case stain site label split name mpp mpp_x mpp_y)",
    )
    case_pattern: str = Field(
        "",
        description="regular expression searched in each file's name; its named groups (case, stain, "
        "patient, site, label, split) fill what no table says: '(?P<case>B\\d+)_(?P<stain>[A-Z]+)'",
    )
    include: str = Field(
        "", description="regular expression: only slides whose URI or name it matches"
    )
    exclude: str = Field(
        "", description="regular expression: no slides whose URI or name it matches"
    )
    gdc_endpoint: str = Field(
        GDC_ENDPOINT, description="where files of a GDC manifest are read, by id"
    )
    gdc_token_file: Path | None = Field(
        None, description="file with the GDC's token, for controlled access; only its path is kept"
    )
    ids: Literal["salted", "plain"] = Field(
        "salted",
        description="patients and cases in what is written: salted hashes, or as tables say",
    )
    salt_file: Path | None = Field(
        None,
        description="file with the salt (default: PATHFM_SALT, else made once beside the corpus folder)",
    )
    salt_names: bool = Field(
        False,
        description="hide the files' names too, behind links beside the corpus (local slides)",
    )
    fingerprints: bool = Field(
        True,
        description="look for the same image in several files (reads each slide's coarsest level)",
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("columns")
    @classmethod
    def _known_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            role, mark, name = item.partition("=")
            if role not in ROLES or not mark or not name:
                raise ValueError(f"{item!r} is not role=column, with a role of {', '.join(ROLES)}")
        return value

    @field_validator("case_pattern", "include", "exclude")
    @classmethod
    def _a_regular_expression(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        unknown = [name for name in groups if name not in _FROM_NAMES]
        if unknown:
            raise ValueError(
                f"no group {unknown[0]!r} is known; there are {', '.join(_FROM_NAMES)}"
            )
        return value

    @field_validator("case_pattern")
    @classmethod
    def _names_something(cls, value: str) -> str:
        if value and not re.compile(value).groupindex:
            raise ValueError("wants named groups, such as (?P<case>...)")
        return value

    @field_validator("gdc_endpoint")
    @classmethod
    def _an_endpoint(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#@]+[^\s?#@]*", value):
            raise ValueError("should be a URL such as https://api.gdc.cancer.gov/data")
        return value.rstrip("/")
