import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from pathfm import doctor
from pathfm.doctor import DoctorConfig, Finding


def test_a_package_that_is_there_and_one_that_is_not() -> None:
    assert doctor._package("numpy", "numpy", "arrays").state == "ok"
    gone = doctor._package("no-such-thing", "no_such_thing", "nothing")
    assert (gone.state, gone.value) == ("missing", "not installed (nothing)")
    assert "pip install" in gone.remedy


def test_a_package_that_does_not_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(name: str) -> None:
        raise RuntimeError("built against another numpy")

    monkeypatch.setattr(importlib, "import_module", explode)
    found = doctor._package("numpy", "numpy", "arrays")
    assert found.state == "missing"
    assert "built against another numpy" in found.value


def test_a_missing_extra_names_the_install_that_mends_it() -> None:
    found = doctor._extra("s3", "no_such_filesystem", "s3:// slides")
    assert found.state == "note"
    assert "pip install 'pathfm[s3]'" in found.remedy


def test_every_extra_of_pyproject_is_looked_at_by_a_distribution_of_its_own() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert [extra for extra, _, _ in doctor._EXTRAS] == list(extras)
    for extra, distribution, _ in doctor._EXTRAS:
        names = [re.split(r"[\[<>=;~! ]", line)[0] for line in extras[extra]]
        assert distribution in names, extra


def test_a_look_that_fails_is_a_note() -> None:
    def look() -> Finding:
        raise OSError("the library is broken")

    assert doctor._guarded("GPU", look).value == "cannot be looked at: the library is broken"


def test_a_store_that_is_down_is_told_without_its_password() -> None:
    config = DoctorConfig(tracking_uri="http://me:secret@127.0.0.1:9")
    found = doctor._store(config)
    assert found.state == "note"
    assert "secret" not in found.value


def test_the_exit_code_follows_what_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", (("s3", "no_such_filesystem", "s3"),))
    monkeypatch.setattr(doctor, "_gpu", lambda: Finding("GPU", "note", "none"))
    monkeypatch.setattr(doctor, "_REQUIRED", (("numpy", "numpy", "arrays"),))
    assert doctor.run(DoctorConfig(out=tmp_path)).exit_code == 0
    assert "pathfm[s3]" in capsys.readouterr().out  # not eaten as markup
    monkeypatch.setattr(doctor, "_REQUIRED", (("gone", "no_such_thing", "nothing"),))
    assert doctor.run(DoctorConfig(out=tmp_path)).exit_code == 2
    assert "not usable: gone" in capsys.readouterr().out


def test_a_missing_package_of_the_command_line_itself_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathfm import cli

    monkeypatch.setitem(sys.modules, "pathfm.doctor", None)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("error: import of pathfm.doctor")


def test_too_little_memory_and_disk_are_told_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from online_patching.loading import ring

    assert doctor._memory().value == f"{ring.memory_bytes() / 2**30:,.1f} GiB"
    monkeypatch.setattr(ring, "memory_bytes", lambda: 3 * 2**29)
    assert (doctor._memory().state, doctor._memory().value) == ("note", "1.5 GiB")
    assert doctor._disk("temporary files", tmp_path / "not" / "yet").state == "ok"
    monkeypatch.setattr(doctor, "_MIN_FREE_BYTES", 2**60)
    found = doctor._disk("temporary files", tmp_path)
    assert (found.what, found.state) == ("temporary files", "note")
    assert f"GiB at {tmp_path}" in found.value
