"""The examples of docs/sampling.md run, in order, on a corpus folder."""

from __future__ import annotations

import re
from pathlib import Path

from online_patching.corpus import Corpus
from tests.sampling import three_slides

PAGE = Path(__file__).parent.parent / "docs" / "sampling.md"


def test_the_examples_run(tmp_path, monkeypatch):
    folder = tmp_path / "my_corpus"
    for ix, mask in zip(*three_slides(), strict=True):
        (folder / "slides").mkdir(parents=True, exist_ok=True)
        ix.save(folder / "slides" / f"{ix.slide_id}.index")
        mask.save(folder / "masks" / f"{ix.slide_id}.png")
    Corpus.build(folder)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 8
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)  # our own page
