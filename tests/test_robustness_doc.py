"""docs/robustness.md: its severities are those of the code, its command parses, its example runs."""

import re
import shlex
from pathlib import Path

import numpy as np

from pathfm.cli import VERBS
from pathfm.config import load_config
from pathfm.corruptions import CORRUPTIONS
from pathfm.robustness import RobustnessConfig

TEXT = (Path(__file__).parent.parent / "docs" / "robustness.md").read_text()


def test_the_table_has_every_corruption_with_its_severities() -> None:
    told = {}
    for names, levels in re.findall(
        r"^\| ([a-z, ]+) \|[^|]*\| ([\d., ()]+) \|", TEXT, re.MULTILINE
    ):
        for name in names.split(", "):
            told[name] = tuple(eval(f"[{levels}]"))
    assert told == {name: kind.levels for name, kind in CORRUPTIONS.items()}


def test_its_command_parses() -> None:
    (line,) = re.findall(r"^    pathfm robustness (.*?) +#", TEXT, re.MULTILINE)
    config = load_config(RobustnessConfig, None, shlex.split(line), VERBS["robustness"].words)
    assert list(config.named_models()) == ["imagenet", "mine"]
    words = ["--data", "x", "--models", "a=random", "--noise_shares"]
    assert load_config(RobustnessConfig, None, words).noise_shares == []


def test_its_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    pixels = np.full((2, 224, 224, 3), 200, np.uint8)
    exec(block, {"pixels": pixels, "paths": ["a/0.png", "b/1.png"]})
