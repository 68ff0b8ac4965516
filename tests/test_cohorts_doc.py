"""docs/cohorts.md: its commands are commands, its tables list what there is, its recipes work."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pathfm.cli import VERBS
from pathfm.cohorts import CohortOptions, Salt
from pathfm.cohorts.columns import COLUMNS
from pathfm.config import load_config
from pathfm.index import IndexConfig

PAGE = (Path(__file__).parent.parent / "docs" / "cohorts.md").read_text()
COMMANDS = re.findall(r"^(?:\w+=\w+ )?pathfm index (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command: str) -> None:
    config = load_config(IndexConfig, None, shlex.split(command), VERBS["index"].words)
    assert config.slides


def test_the_page_has_a_command_for_each_kind_of_source() -> None:
    words = " ".join(COMMANDS)
    for source in (
        "slides/",
        "*.svs",
        "cohort.csv",
        ".parquet",
        "gdc_manifest",
        ".s5cmd",
        "idc-open-data",
    ):
        assert source in words


def test_every_option_is_in_the_table_and_each_option_named_exists() -> None:
    named = set(re.findall(r"--cohort\.(\w+)", PAGE))
    assert named == set(CohortOptions.model_fields)


def test_the_columns_looked_for_are_those_of_the_table() -> None:
    told = dict(re.findall(r"^\| (\w+) \| ([\w, ]+) \|$", PAGE, re.MULTILINE))
    for role, names in COLUMNS.items():
        if role != "twin_of":  # what an index run writes itself
            assert told[role] == ", ".join(names)


@pytest.mark.parametrize("name", ["NAME", "TCGA-AA-0001", "0123", "1%sA"])
def test_openssl_finds_a_patient_again(name: str, tmp_path: Path) -> None:
    (recipe,) = re.findall(r"`(printf .*? openssl .*?)` begins", PAGE)
    told = Salt(CohortOptions(), tmp_path / "corpus").id("patient", name)
    done = subprocess.run(
        ["bash", "-c", recipe.replace("NAME", name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("= ")[1].startswith(told[1:])
