"""docs/labels.md: its commands are commands, its options exist, its example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from online_patching import Corpus
from pathfm.cli import VERBS
from pathfm.config import load_config
from pathfm.labels import LabelsConfig
from pathfm.pretrain import PretrainConfig
from tests.sampling import three_slides

PAGE = (Path(__file__).parent.parent / "docs" / "labels.md").read_text()


def test_the_commands_of_the_page_are_understood():
    commands = re.findall(r"^pathfm pretrain (.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    words = VERBS["pretrain"].words
    found = [load_config(PretrainConfig, None, shlex.split(one), words) for one in commands]
    assert [one.labels.source for one in found] == ["column", "regions", "patches"]
    assert found[1].labels.weights == {"Stroma": 2}
    assert found[2].labels.patches_mpp == 0.5


def test_every_option_is_in_the_table_and_each_option_named_exists():
    table = PAGE.partition("## Options")[2]
    assert set(re.findall(r"--labels\.(\w+)", table)) == set(LabelsConfig.model_fields)
    assert set(re.findall(r"--labels\.(\w+)", PAGE)) == set(LabelsConfig.model_fields)


def test_the_example_runs(tmp_path, monkeypatch):
    folder = tmp_path / "my_corpus"
    for ix, mask in zip(*three_slides(), strict=True):
        ix.save(folder / "slides" / f"{ix.slide_id}.index")
        mask.save(folder / "masks" / f"{ix.slide_id}.png")
    Corpus.build(folder)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)  # our own page
    labels = names["sampler"].labels(names["np"].arange(8))
    assert sorted(labels.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
