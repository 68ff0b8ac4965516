"""The house itself: imports stay cheap, hooks really refuse, shipped files are what they claim."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent  # not resolved: the tools lie beside the venv's own python


def tool(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
        check=False,
    )


def modules() -> list[str]:
    names = []
    for package in ("online_patching", "pathfm"):
        found = importlib.import_module(package)
        names += [package]
        names += [m.name for m in pkgutil.walk_packages(found.__path__, f"{package}.")]
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
def test_what_a_module_lists_is_all_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say what it is"
    listed = getattr(module, "__all__", None)
    if listed is None:
        return
    assert sorted(set(listed)) == sorted(listed)
    for public in listed:
        assert hasattr(module, public)
    if name == "online_patching":  # the public face: whatever it imports by name, it lists
        offered = {n for n, v in vars(module).items() if isinstance(v, type) or callable(v)}
        assert {n for n in offered if not n.startswith("_")} <= set(listed)


# --- metadata -------------------------------------------------------------------------------------


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_every_dependency_and_bound_has_a_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    start = text.index("\ndependencies = [")
    block = text[start : text.index("\n[project.scripts]")]
    lines = [line for line in block.splitlines() if re.match(r'\s+"[a-zA-Z]', line)]
    assert len(lines) > 20
    bare = [line.strip() for line in lines if "#" not in line and '"pathfm[' not in line]
    assert bare == []


def test_the_constraints_are_versions_of_everything_we_ask_for() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)] == []
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in pins}
    told = project()
    asked = list(told["dependencies"])  # type: ignore[call-overload]
    extras: dict[str, list[str]] = told["optional-dependencies"]  # type: ignore[assignment]
    asked += extras["test"] + extras["notebooks"] + extras["dev"]
    for text in asked:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "pathfm":
            assert requirement.specifier.contains(pinned[name]), text


def test_no_file_names_a_place_on_somebody_s_machine() -> None:
    done = tool("git", "grep", "-nIE", r"(/home/|/Users/|/root/)", "--", ".", ":!tests")
    assert done.stdout == ""


def test_the_dockerfiles_are_clean() -> None:
    files = sorted(str(path) for path in (ROOT / "docker").glob("Dockerfile.*"))
    assert len(files) == 2
    done = tool("hadolint", *files)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "docker").glob("Dockerfile.*")))
def test_a_dockerfile_pins_its_base_and_does_not_run_as_root(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+", text, re.MULTILINE)
    assert re.search(r"^USER (?!root|0)", text, re.MULTILINE)
    assert "-c constraints.txt" in text
    assert "COPY pyproject.toml setup.py" in text  # it builds the native decoder


# --- hooks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, in a repository of their own."""
    listed = tool("git", "ls-files", "-z")
    if listed.returncode != 0:
        pytest.skip("not a git repository: the hooks look at tracked files")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    tool("git", "init", "-q", cwd=folder)
    tool("git", "add", "-A", cwd=folder)
    return folder


def notebook_with_output() -> str:
    path = next((ROOT / "notebooks").glob("*.ipynb"))
    book = json.loads(path.read_text())
    cell = next(cell for cell in book["cells"] if cell["cell_type"] == "code")
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["a name"]}]
    return json.dumps(book)


BREAKAGES = {
    "trailing-whitespace": ("docs/broken.md", "words \n"),
    "end-of-file": ("docs/broken.md", "words"),
    "check-yaml": ("configs/broken.yaml", "a: [1\n"),
    "check-toml": ("broken.toml", "a = [1\n"),
    "merge-conflict": ("docs/broken.md", f"{'<' * 7} HEAD\n"),
    "private-key": ("docs/broken.md", f"-----BEGIN RSA {'PRIVATE'} KEY-----\n"),
    "large-files": ("docs/broken.bin", "x" * 600_000),
    "notebook-outputs": ("notebooks/broken.ipynb", notebook_with_output()),
    "codespell": ("docs/broken.md", "re" + "cieve\n"),  # codespell reads this file too
    "ruff": ("pathfm/broken.py", '"""Broken."""\n\nprint(eval("1"))\n'),
    "ruff-format": ("pathfm/broken.py", '"""Broken."""\n\nx = {  "a":1 }\n'),
    "mypy": ("pathfm/broken.py", '"""Broken."""\n\nx: int = "one"\n'),
    "import-contracts": (
        "online_patching/broken.py",
        '"""Broken."""\n\nimport pathfm.runtime\n\nprint(pathfm.runtime)\n',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("hook", BREAKAGES)
def test_a_hook_refuses_a_broken_file(hook: str, clone: Path, tmp_path: Path) -> None:
    name, text = BREAKAGES[hook]
    path = clone / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    tool("git", "add", "-f", name, cwd=clone)
    if hook == "mypy":  # one file: the whole tree is checked by `make test` anyway
        config = clone / ".pre-commit-config.yaml"
        config.write_text(config.read_text().replace("entry: mypy", f"entry: mypy {name}"))
        tool("git", "add", config.name, cwd=clone)
    try:
        done = tool(
            "pre-commit", "run", hook, "--files", name, cwd=clone, PRE_COMMIT_HOME=str(tmp_path)
        )
    finally:
        tool("git", "rm", "-qf", name, cwd=clone)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken" in done.stdout or "1 file reformatted" in done.stdout


def test_every_hook_has_a_test_that_breaks_it() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == set(BREAKAGES)
