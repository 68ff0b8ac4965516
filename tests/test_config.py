from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, model_validator

from pathfm.config import fields, load_config, merge, read_yaml
from pathfm.runtime import PathfmError, as_dict, save_config


class Optim(BaseModel, frozen=True, extra="forbid"):
    lr: float = Field(5e-4, gt=0, le=1, description="peak learning rate")
    steps: int = Field(100, ge=1, description="optimizer steps")


class Settings(BaseModel, frozen=True, extra="forbid"):
    slides: str = Field(description="where the slides lie")
    mpp: tuple[float, ...] = Field((0.5,), description="µm/px to draw at")
    input_px: int | tuple[int, int] = Field(224, description="input size, px")
    weights: Path | None = Field(None, description="a file")
    method: Literal["dino", "simclr"] = Field("dino", description="which")
    resume: bool = Field(True, description="go on where it stopped")
    optim: Optim = Field(default_factory=Optim, description="the optimizer")

    @model_validator(mode="after")
    def _sane(self) -> "Settings":
        if self.slides == "nowhere":
            raise ValueError("slides cannot be nowhere")
        return self


def load(*words: str, yaml: Path | None = None) -> Settings:
    return load_config(Settings, yaml, words, ("slides",))


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    yaml = tmp_path / "a.yaml"
    yaml.write_text("slides: here\nmpp: [0.25, 1.0]\noptim: {lr: 1e-3, steps: 7}\n")
    config = load("--optim.lr", "2e-4", "--no-resume", "--method=simclr", yaml=yaml)
    assert (config.slides, config.mpp) == ("here", (0.25, 1.0))
    assert config.optim == Optim(lr=2e-4, steps=7)
    assert (config.resume, config.method) == (False, "simclr")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["s", "--mpp", "0.25", "2"], "mpp", (0.25, 2.0)),
        (["s", "--mpp", "2"], "mpp", (2.0,)),
        (["--mpp", "1", "--slides", "s"], "slides", "s"),
        (["s", "--input-px", "112"], "input_px", 112),
        (["s", "--input_px", "112", "96"], "input_px", (112, 96)),
        (["s", "--weights", "a/b"], "weights", Path("a/b")),
        (["s", "--weights", "none"], "weights", None),
        (["s", "--resume", "false"], "resume", False),
        (["--resume", "s"], "slides", "s"),
        (["1e5"], "slides", "1e5"),
    ],
)
def test_words_become_values_of_the_field_s_type(
    words: list[str], field: str, value: object
) -> None:
    assert getattr(load(*words), field) == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["s", "--optim.lrr", "1"], "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
        (["s", "--lr", "1"], "unknown key 'lr': did you mean 'optim.lr'?"),
        (["s", "--optim.lr", "2"], "optim.lr = '2': should be less than or equal to 1"),
        (["s", "--optim.steps", "ten"], "optim.steps = 'ten': should be a valid integer"),
        (["s", "--method", "dyno"], "method = 'dyno': should be 'dino' or 'simclr'"),
        (["s", "--input_px", "x"], "input_px = 'x': should be a valid integer"),
        (["s", "--weights"], "--weights wants a value"),
        (["s", "t"], "'t' is not expected here"),
        ([], "slides is required: give --slides VALUE"),
        (["nowhere"], "slides cannot be nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(PathfmError) as caught:
        load(*words)
    assert str(caught.value).startswith(says), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slides: s\noptim: {stepz: 3}", "unknown key 'optim.stepz': did you mean 'optim.steps'?"),
        ("slides: s\noptim: {steps: 0}", "optim.steps = 0: should be greater than or equal to 1"),
        ("slides: s\noptim: {steps: ten}", "optim.steps = 'ten': should be a valid integer"),
        ("slides: 7", "slides = 7: should be a valid string"),
        ("slides: [", "config "),
        ("- a\n- b", "config "),
        ("slides: s\noptim: {steps: 1, steps: 2}", "config "),
        ("slides: s\noptim: 3", "optim = 3: should be a valid dictionary"),
    ],
)
def test_a_mistake_in_the_file_names_it(tmp_path: Path, text: str, says: str) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(text)
    with pytest.raises(PathfmError) as caught:
        load(yaml=yaml)
    assert str(caught.value).startswith(says), str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_a_key_said_twice_is_refused_with_its_line_and_merged_ones_are_not(tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("slides: s\noptim:\n  steps: 1\nslides: t\n")
    with pytest.raises(PathfmError, match=r"mine.yaml, line 4: .*'slides' is there twice"):
        load(yaml=yaml)
    yaml.write_text("slides: s\noptim: &o {steps: 3}\n")
    assert load(yaml=yaml).optim.steps == 3
    assert read_yaml(yaml)["optim"] == {"steps": 3}
    yaml.write_text("a: &o {steps: 3}\nb: &p {steps: 4}\nc: {<<: *o, <<: *p}\n")
    assert read_yaml(yaml)["c"] == {"steps": 4}
    nested = "base: &b {s: 1}\nouter: {derived: &d {<<: *b, s: 2}}\nthird: {<<: *d, x: 1, 1: 2, '1': 3}\n"
    yaml.write_text(nested)
    assert read_yaml(yaml)["third"] == {"s": 2, "x": 1, 1: 2, "1": 3}
    for text in ("slides: {{ x }}", "? [a, b]\n: 1", "{a: 1}: 2"):
        yaml.write_text(text)
        with pytest.raises(PathfmError, match=r"mine.yaml, line 1: not valid YAML"):
            read_yaml(yaml)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match=r"gone\.yaml: No such file"):
        load(yaml=tmp_path / "gone.yaml")


def test_a_saved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load("s", "--mpp", "0.25", "--optim.lr", "3e-5", "--weights", "w")
    assert load(yaml=save_config(config, tmp_path / "run")) == config


def test_every_leaf_has_one_dotted_name() -> None:
    assert [name for name, _ in fields(Settings)] == list(as_dict(load("s")))


names = st.sampled_from(["a", "b", "c"])
trees = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3))


@given(st.dictionaries(names, trees), st.dictionaries(names, trees))
def test_merging_twice_is_merging_once(base: dict[str, object], over: dict[str, object]) -> None:
    merge(base, over)
    once = repr(base)
    merge(base, over)
    assert repr(base) == once


class Pair(BaseModel, frozen=True, extra="forbid"):
    decay: tuple[float, float] = Field((0.04, 0.4), description="at the start and at the end")
    scale: tuple[float, float] | None = Field(None, description="from, to")

    @model_validator(mode="after")
    def _rises(self) -> "Pair":
        if self.decay[0] > self.decay[1]:
            raise ValueError("decay must not fall")
        return self


class Grouped(BaseModel, frozen=True, extra="forbid"):
    optim: Pair = Field(Pair(), description="the optimizer")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.decay", "0.1"], "optim.decay = 0.1: wants 2 values, 1 given"),
        (["--optim.decay", "1", "2", "3"], "optim.decay = 1, 2, 3: wants 2 values, 3 given"),
        (["--optim.scale", "0.4"], "optim.scale = 0.4: wants 2 values, 1 given"),
        (["--optim.decay", "0.4", "0.1"], "optim: decay must not fall"),
    ],
)
def test_a_pair_says_how_many_it_wants_and_a_group_is_not_printed_whole(
    words: list[str], says: str
) -> None:
    with pytest.raises(PathfmError) as told:
        load_config(Grouped, None, words)
    assert str(told.value) == says
