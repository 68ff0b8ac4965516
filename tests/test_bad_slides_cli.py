"""What a person sees when slides or their server misbehave: one line on stderr and exit code 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from online_patching import stores
from online_patching.stores import RetryPolicy
from online_patching.testing import SyntheticSlide, write_tiff
from pathfm.cli import main
from tests.servers import Faults, FaultServer


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same policy with shorter waits."""
    quick = RetryPolicy(attempts=3, first_delay_s=0.01, timeout_s=0.5, connect_timeout_s=0.5)
    monkeypatch.setattr(stores, "RetryPolicy", lambda: quick)


def one_line_of_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    told = [line for line in lines if line.startswith("error:")]
    assert len(told) == 1
    assert "Traceback" not in "".join(lines)
    return told[0]


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (Faults("500"), "failed 3 times, last with: HTTP 500"),
        (Faults("ignore-range"), "ignores byte ranges"),
        (Faults("hang"), "not finished within 0.5 s"),
        (Faults("403"), "access refused"),
    ],
)
def test_a_server_that_misbehaves(
    fault_server: FaultServer, small_slides, tmp_path, capsys, faults, words
):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    fault_server.faults = faults
    line = one_line_of_error(
        capsys, "index", f"{fault_server.url}/a.svs", "--out", str(tmp_path / "c")
    )
    assert words in line
    assert not (tmp_path / "c" / "slides.csv").exists()


def test_a_missing_object_and_a_server_that_fails_once(
    fault_server, small_slides, tmp_path, capsys
):
    url, out = fault_server.url, str(tmp_path / "c")
    assert "HTTP 404" in one_line_of_error(capsys, "index", f"{url}/none.svs", "--out", out)
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    fault_server.faults = Faults("500", 1)
    assert main(["index", f"{url}/a.svs", "--out", out]) == 0
    assert fault_server.seen["500"] == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("text", "no reader opens it"),
        ("truncated", "truncated"),
        ("no mpp", "carries no µm/px"),
        ("absurd mpp", "outside 0.05 to 8"),
    ],
)
def test_a_slide_that_cannot_be_used(tmp_path: Path, capsys, kind, words):
    path = tmp_path / "a.svs"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        write_tiff(path, SyntheticSlide(5, 600, 400))
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "no mpp":
        write_tiff(path, SyntheticSlide(5, 600, 400), with_mpp=False)
    elif kind == "absurd mpp":
        write_tiff(path, SyntheticSlide(5, 48, 32, mpp=42.0), flavour="generic")
    line = one_line_of_error(capsys, "index", str(path), "--out", str(tmp_path / "c"))
    assert words in line
