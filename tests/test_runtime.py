import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from pathfm import runtime
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig


class Inner(BaseModel):
    lr: float = 0.1
    names: tuple[str, ...] = ("a", "b")


class Outer(BaseModel):
    out: Path = Path("x")
    inner: Inner = Inner()


def test_a_config_is_flattened_to_the_names_of_the_command_line() -> None:
    assert runtime.as_dict(Outer()) == {"out": "x", "inner.lr": 0.1, "inner.names": ["a", "b"]}


def test_provenance_tells_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://me:secret@bucket/a.svs?X-Amz-Signature=abc"
    monkeypatch.setattr(sys, "argv", ["/home/somebody/bin/pathfm", "index", url])
    facts = runtime.provenance()
    assert facts["command"] == "pathfm index s3://bucket/a.svs"
    assert facts["version.numpy"].count(".") == 2
    assert not any("somebody" in value for value in facts.values())


def test_the_commit_of_a_copy_outside_git_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    runtime.git_commit.cache_clear()
    assert runtime.git_commit() == "unknown"
    runtime.git_commit.cache_clear()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PathfmError, match="cannot make the folder"):
        runtime.make_folder(tmp_path / "file" / "inner")


def test_progress_says_a_line_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "_QUIET_INTERVAL_S", 0.0)
    with runtime.progress(10, "steps", "train", done=4) as bar:
        bar.advance(2, loss=6.93147, wait="3 %")
    line = capsys.readouterr().err
    assert line.startswith("train: 6/10 steps, ")
    assert "loss 6.931 wait 3 %" in line
    assert line.endswith("s left\n")


@pytest.mark.slow
def test_one_of_a_thing_is_told_without_an_s() -> None:
    told = [runtime.counted(n, "slide") for n in (0, 1, 2, 12_000)]
    assert told == ["0 slides", "1 slide", "2 slides", "12,000 slides"]


def test_devices_and_dtypes() -> None:
    import torch

    assert runtime.pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(PathfmError, match=name):
            runtime.pick_device(name)
    cpu = torch.device("cpu")
    assert runtime.plan_precision("fp32", cpu) == "fp32"
    assert runtime.plan_precision("bf16", cpu) == "bf16"
    assert runtime.plan_precision("auto", cpu) in ("fp32", "bf16")
    with runtime.autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_generator_is_a_function_of_seed_draw_and_stream() -> None:
    import torch

    def first(*key: int) -> float:
        return float(torch.rand(1, generator=runtime.torch_generator(*key)))

    assert first(1, 2, 3) == first(1, 2, 3)
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]
    assert len({first(*key) for key in keys}) == len(keys)


def test_saved_configs_hold_no_secrets(tmp_path: Path) -> None:
    uris = ("http://bob:s3cret@h/a b.svs?X-Amz-Signature=SIG", "s3://b/what?.svs", "plain?a=b")
    config = Outer(inner=Inner(names=uris))
    clean = ["http://h/a b.svs", "s3://b/what?.svs", "plain?a=b"]
    assert runtime.as_dict(config)["inner.names"] == clean
    text = runtime.save_config(config, tmp_path).read_text()
    assert "s3cret" not in text
    assert "SIG" not in text
    tracking = TrackingConfig(uri="postgresql://me:s3cret@db/x?sslpassword=s3cret")
    assert "s3cret" not in runtime.save_config(tracking, tmp_path).read_text()


def test_a_title_longer_than_its_table_stays_on_its_line(capsys):
    table = runtime.titled("a title of many more words than the table is wide", "a")
    table.add_row("1")
    for _ in range(2):  # printing spends nothing
        runtime.console().print(table)
        told = capsys.readouterr().out.splitlines()
        assert told[0].rstrip() == "a title of many more words than the table is wide"
        assert len(told) == 6
