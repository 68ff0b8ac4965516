"""docs/datasets.md: its table is what the code says, its commands and examples are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from pathfm.check_data import CheckDataConfig
from pathfm.cli import VERBS
from pathfm.config import load_config
from pathfm.datasets import DATASETS
from pathfm.datasets.benchmark import SPLITS

PAGE = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text()
ROWS = {
    row[0].split("`")[1]: row
    for row in (line.strip("| ").split(" | ") for line in PAGE.splitlines() if line[:3] == "| `")
    if row[0].split("`")[1] in DATASETS
}


def test_every_data_set_has_its_row_with_its_figures() -> None:
    assert set(ROWS) == set(DATASETS)
    for name, row in ROWS.items():
        if len(row) < 8 or "the same" in row[1]:
            continue
        facts = DATASETS[name].facts
        assert int(re.sub(r"\D", "", row[1])) == sum(facts.counts.values()), name
        assert float(row[2]) == facts.mpp, name
        assert int(row[3].split()[0]) == len(facts.classes), name
        told = [f"{facts.counts[split]:,}" for split in SPLITS if split in facts.counts]
        assert row[4].split(" / ") == told, name
        assert row[5] == ("val *" if facts.selects_on_reported else facts.reported), name
        assert facts.licence.lower().endswith(row[7].lower()), name


def test_the_commands_of_the_page_are_understood() -> None:
    commands = re.findall(r"^pathfm check-data([^#\n]*)", PAGE, re.MULTILINE)
    words = VERBS["check-data"].words
    found = [load_config(CheckDataConfig, None, shlex.split(one), words) for one in commands]
    assert [(one.data, one.read) for one in found] == [("", False), ("bach=/data/bach", True)]
