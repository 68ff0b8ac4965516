import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import pathfm.cli as cli
from online_patching.errors import NotASlideError
from pathfm.runtime import PathfmError


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
        check=False,
    )


HEAVY = "torch torchvision timm lightly mlflow sklearn matplotlib pandas zarr tifffile".split()


def test_help_imports_nothing_heavy() -> None:
    done = python(
        "import sys; from pathfm.cli import main; main(['--help']); "
        f"print('heavy:', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    assert done.stderr == ""
    assert "heavy: []" in done.stdout
    for verb in cli.VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_describes_every_option(verb: str) -> None:
    from pathfm.config import fields

    model = cli.config_model(verb)
    text = cli.verb_help(verb, model)
    for name, _ in fields(model):
        assert f"--{name}" in text
    undescribed = [name for name, field in model.model_fields.items() if not field.description]
    assert undescribed == []


def seeds_of(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if name.endswith("seed"):
            yield f"{model.__name__}.{name}", field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from seeds_of(part)


def test_no_verb_takes_a_seed_whose_low_bits_are_another_seed() -> None:
    found = {name: field for verb in cli.VERBS for name, field in seeds_of(cli.config_model(verb))}
    assert len(found) >= 10
    for name, field in found.items():
        bounds = {type(each).__name__: each for each in field.metadata}
        assert bounds["Ge"].ge >= 0, name
        assert bounds["Lt"].lt <= 2**64, name


def test_the_help_of_a_verb_with_a_file_shows_the_file_s_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "i.yaml").write_text("slides: here\nthreads: 77\n")
    assert cli.main(["index", str(tmp_path / "i.yaml"), "--help"]) == 0
    assert "(default: 77)" in capsys.readouterr().out


@pytest.mark.slow
def test_no_verb_pays_for_torch_or_mlflow_to_show_its_help() -> None:
    done = python(
        "import sys\nfrom pathfm.cli import main, VERBS\n"
        "for verb in VERBS: main([verb, '--help'])\n"
        "print('heavy:', sorted({'torch', 'timm', 'lightly', 'mlflow', 'sklearn', 'matplotlib'}"
        " & set(sys.modules)))"
    )
    assert "heavy: []" in done.stdout, done.stdout[-200:] + done.stderr


def test_an_unknown_verb_names_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: no verb 'pretrian': did you mean 'pretrain'?\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (PathfmError("the folder\nis gone"), 2, "error: the folder is gone\n"),
        (NotASlideError("a.txt", "not a slide"), 2, "error: a.txt: not a slide\n"),
        (ValueError("odd"), 2, "error: ValueError: odd (PATHFM_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    ],
)
def test_every_failure_is_one_line_and_a_code(
    raised: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(words: list[str]) -> int:
        raise raised

    monkeypatch.delenv("PATHFM_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["index"]) == code
    assert capsys.readouterr().err == said


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHFM_DEBUG", "1")
    with pytest.raises(PathfmError):
        cli.main(["index", "--slidez", "x"])


def test_a_config_mistake_ends_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["index", "somewhere", "--outt", str(tmp_path / "c")]) == 2
    assert "did you mean 'out'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
