"""docs/views.md: every field is told with its default, its YAML is a config, its example runs."""

import re
from pathlib import Path

import numpy as np
import torch
import yaml

from pathfm.pretrain.settings import ViewsConfig
from pathfm.views import HED_LIGHT, ViewSpec
from pathfm.views.render import make_views
from pathfm.views.stain import HED

TEXT = (Path(__file__).parent.parent / "docs" / "views.md").read_text()


def test_every_field_is_told_with_its_default():
    for name, field in ViewSpec.model_fields.items():
        assert f"`{name}`" in TEXT, name
        if isinstance(field.default, bool | str):
            assert f"`{name}` {str(field.default).lower()}" in TEXT, name
        elif isinstance(field.default, int | float):
            assert f"`{name}` {field.default:g}" in TEXT or f"`{name}` {field.default}" in TEXT, (
                name
            )


def test_the_stain_matrix_told_is_the_one_used():
    rows = re.findall(r"^\| (?:haematoxylin|eosin|DAB) \| ([\d.| ]+) \|$", TEXT, re.MULTILINE)
    assert [[float(v) for v in row.split("|")] for row in rows] == HED.tolist()


def test_its_yaml_is_a_config_of_light_stain_jitter():
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    views = ViewsConfig(**yaml.safe_load(block)["views"])
    assert [spec.hed for spec in views.specs] == [HED_LIGHT] * 10


def test_its_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {
        "pixels": torch.zeros(2, 256, 256, 3, dtype=torch.uint8),
        "draws": np.arange(2), "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }  # fmt: skip
    exec(block, names)
    assert len(names["views"]) == 10
    assert names["views"][0].shape == (2, 3, 224, 224)
    assert make_views.__name__ in block
