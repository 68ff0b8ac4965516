"""Every shipped config is run, shrunken; the demo twice, because a rerun must skip what is done."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pathfm import runtime
from pathfm.cli import main
from pathfm.config import load_config
from pathfm.demo import DemoConfig
from pathfm.demo.inputs import find_inputs
from pathfm.demo.stages import run_stages
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig, read_runs

CONFIGS = Path(__file__).parent.parent / "configs"

VIEWS = (
    "--{0}views.global_1.size_px 32 --{0}views.global_2.size_px 32 --{0}views.local.size_px 16 "
    "--{0}views.n_local 1 --{0}dino.out_dim 32 --{0}dino.hidden_dim 32 --{0}optim.warmup_steps 1 "
    "--{0}steps 3 --{0}batch_size 4 --{0}patch_px 64 --{0}monitor_patches 8 --{0}device cpu "
)
SHRUNKEN = {
    "demo.yaml": (
        "demo",
        "--n_slides 2 --per_class 30 --n_seeds 2 --input_px 48 --pretrain.mpp 1 2 "
        + VIEWS.format("pretrain."),
    ),
    "dino_vits16.yaml": (
        "pretrain",
        "--weights random --mpp 1 2 --backbone vit_tiny_patch16_224 " + VIEWS.format(""),
    ),
    "dino_vitt16_cpu.yaml": ("pretrain", "--weights random --mpp 1 2 " + VIEWS.format("")),
    **{
        f"foreground_{model}.yaml": (
            "foreground-train",
            (
                "--synthetic 2 --synthetic_px 96 --crop_px 64 --batch_size 2 --steps 2 --device cpu "
                "--validation_synthetic 1 "
            ),
        )
        for model in ("unet", "unet_again", "segformer_b0")
    },
}


def command(name: str, *more: str) -> list[str]:
    verb, words = SHRUNKEN[name]
    return [verb, str(CONFIGS / name), *words.split(), *more]


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a shrunken demo that ran to its end."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(command("demo.yaml", "--out", str(out))) == 0
    return out


def test_every_shipped_config_is_run_by_a_test() -> None:
    recipes = {
        path.name for path in CONFIGS.glob("*_vits16.yaml")
    }  # in test_pretrain.py, all of them
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(SHRUNKEN) | recipes


@pytest.mark.slow
def test_the_demo_leaves_a_page_features_and_a_tree_of_runs(demo_out: Path) -> None:
    page = (demo_out / "report.html").read_text()
    assert "synthetic-0000" in page
    assert "pretrained" in page
    compared = (demo_out / "compare" / "compare.html").read_text()
    assert "Leaderboard: logistic regression" in compared
    assert "95 % interval" in compared
    assert "data:image/png;base64," in compared
    for name in ("init", "pretrained"):
        assert (demo_out / "embeddings" / f"{name}.safetensors").exists()
    runs = read_runs(f"sqlite:///{demo_out / 'mlflow.db'}", "pathfm-demo")
    (parent,) = [run for run in runs if run.name == "demo"]
    children = {run.name for run in runs if run.parent_id == parent.run_id}
    stages = {"index", "foreground", "pretrain", "embed init", "embed pretrained", "probe"}
    assert children == stages
    assert {run.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_the_same_command_again_skips_what_is_done(
    demo_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [demo_out / "runs" / "pretrain" / "backbone" / "model.safetensors"]
    kept += sorted((demo_out / "slides").iterdir()) + sorted((demo_out / "embeddings").glob("*.s*"))
    before = [path.stat().st_mtime_ns for path in kept]
    capsys.readouterr()
    assert main(command("demo.yaml", "--out", str(demo_out))) == 0
    shown = capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert shown.count("is up to date") == 4  # pretraining, two embeddings, probe
    runs = read_runs(f"sqlite:///{demo_out / 'mlflow.db'}", "pathfm-demo")
    assert [run.name for run in runs].count("demo") == 1


@pytest.mark.slow
def test_a_demo_stopped_in_pretraining_says_so_and_goes_on(
    demo_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo_out, out, ignore=shutil.ignore_patterns("runs", "mlflow.db*", "stages"))
    stopped = command("demo.yaml", "--out", str(out), "--pretrain.stop_after_steps", "2")
    assert main(stopped) == 2
    assert "stopped after 2 of 3 steps" in capsys.readouterr().err
    assert main(command("demo.yaml", "--out", str(out))) == 0
    assert "goes on after step 2 of 3" in capsys.readouterr().out
    (parent,) = read_runs(f"sqlite:///{out / 'mlflow.db'}", "pathfm-demo")[:1]
    assert (parent.name, parent.status) == ("demo", "FINISHED")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino_vits16.yaml", "dino_vitt16_cpu.yaml"])
def test_a_shipped_config_of_pretraining_runs(name: str, demo_out: Path, tmp_path: Path) -> None:
    corpus, out = str(demo_out / "corpus"), str(tmp_path / "run")
    assert main(command(name, "--corpus", corpus, "--out", out)) == 0
    assert (tmp_path / "run" / "backbone").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SHRUNKEN if n.startswith("foreground")])
def test_a_shipped_config_of_the_mask_model_runs(name: str, tmp_path: Path) -> None:
    assert main(command(name, "--out", str(tmp_path / "run"))) == 0
    assert (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize("name", SHRUNKEN)
def test_a_shipped_config_is_valid_as_it_stands(name: str) -> None:
    from pathfm.cli import config_model

    config = load_config(config_model(SHRUNKEN[name][0]), CONFIGS / name)
    assert config is not None


def test_the_shipped_file_says_what_the_demo_does_without_it() -> None:
    assert load_config(DemoConfig, CONFIGS / "demo.yaml") == DemoConfig()


def test_one_option_of_a_stage_leaves_the_demo_s_others() -> None:
    config = load_config(DemoConfig, None, ["--pretrain.views.n_local", "2"])
    assert config.pretrain.views.n_local == 2
    assert config.pretrain.views.local.size_px == 48
    assert config.pretrain.steps == 128


def test_a_path_the_demo_sets_itself_is_refused() -> None:
    with pytest.raises(PathfmError, match="slides"):
        load_config(DemoConfig, None, ["--slides"])
    with pytest.raises(PathfmError, match=r"pretrain\.corpus follows from the demo's own options"):
        load_config(DemoConfig, None, ["--pretrain.corpus", "elsewhere"])


def test_the_words_of_the_issue_are_understood() -> None:
    words = "--slides a/wsi --mpp-overrides a/mpp.csv --weights w.safetensors --patches p".split()
    config = load_config(DemoConfig, CONFIGS / "demo.yaml", words)
    assert config.slides == ("a/wsi",)
    assert (config.mpp_overrides, config.patches) == (Path("a/mpp.csv"), Path("p"))
    assert config.weights == "w.safetensors"


def test_the_saved_config_of_a_demo_can_be_run_again(tmp_path: Path) -> None:
    config = DemoConfig(pretrain={"steps": 20}, foreground={"mpp": 16})
    (tmp_path / "slides").mkdir()  # it is saved before anything is read
    with pytest.raises(PathfmError, match="no slides found"):
        run_stages(
            config.model_copy(update={"out": tmp_path, "slides": (str(tmp_path / "slides"),)})
        )
    saved = load_config(DemoConfig, tmp_path / "demo.yaml")
    assert saved.pretrain == config.pretrain
    assert saved.foreground == config.foreground


def test_what_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    given = {"slides": ("/none/a", "s3://b/c"), "patches": tmp_path / "p", "out": tmp_path / "out"}
    wanted = rf"--patches {tmp_path}/p, --slides /none/a: not there"
    with pytest.raises(PathfmError, match=wanted):
        run_stages(DemoConfig(**given))
    assert not (tmp_path / "out").exists()


def test_slides_drawn_are_counted_to_a_hundred_per_cent_and_one_is_no_slides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathfm.demo import inputs

    seen: list[tuple[int, int]] = []

    class Bar(runtime.Progress):
        def advance(self, n: int = 1, **facts: float | str) -> None:
            super().advance(n, **facts)
            seen.append((self.done, self.total))

    def draw(folder: Path, n: int, seed: int, tell: Any) -> list[Any]:
        for number in range(n):
            for share in (0.0, 0.5, 1.0):
                tell(number, share)
        return [SimpleNamespace(path=folder / f"{number}.svs") for number in range(n)]

    monkeypatch.setattr(inputs, "progress", Bar)
    monkeypatch.setattr(inputs, "write_demo_slides", draw)
    for n in (3, 1):
        find_inputs(DemoConfig(out=tmp_path, n_slides=n, patches=tmp_path))
    assert seen == [(d, 100) for d in (0, 16, 33, 33, 50, 66, 66, 83, 100, 0, 50, 100)]
    assert [line.partition(" in ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "3 synthetic slides",
        "1 synthetic slide",
    ]


def test_a_folder_of_the_user_s_where_the_demo_s_patches_go_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "patches" / "tumour" / "a.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    with pytest.raises(PathfmError, match=r"was not made by the demo.*--patches"):
        find_inputs(DemoConfig(out=tmp_path, slides=("a",)))
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backbone": "swin_tiny_patch4_window7_224"}, "vision transformer"),
        ({"input_px": 100}, "input_px = 100 is no multiple of the 16 px patches"),
    ],
)
def test_a_backbone_that_cannot_work_is_refused_before_anything_is_made(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PathfmError, match=reason):
        run_stages(DemoConfig(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_pretraining_ends_the_demo_as_ctrl_c_elsewhere(tmp_path, monkeypatch):
    from pathfm import pretrain
    from pathfm.demo import stages

    result = pretrain.PretrainResult(tmp_path, 3, finished=False, exit_code=130)
    monkeypatch.setattr(pretrain, "run", lambda config: result)
    demo = SimpleNamespace(
        config=DemoConfig(out=tmp_path),
        folder=tmp_path.joinpath,
        init="random:0",
        tracking=lambda stage: TrackingConfig(enabled=False),
    )
    with pytest.raises(KeyboardInterrupt):
        stages._pretrain(demo)
