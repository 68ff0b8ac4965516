"""The launchers in configs/launch: understood by their readers, and what the Slurm script does with a fake Slurm."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from pathfm.ranks import LostRankError

LAUNCH = Path("configs/launch")
SLURM = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.fixture
def fake_slurm(tmp_path: Path) -> Path:
    """A folder with srun, scontrol and pathfm that write down how they were called."""
    made = {
        "srun": """
            for p in 0 1; do SLURM_PROCID=$p SLURM_LOCALID=$p "${@:2}" || code=$?; done
            exit ${code:-0}""",
        "scontrol": """
            if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> $LOG; fi""",
        "pathfm": """
            echo "$RANK/$WORLD_SIZE/$LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*" >> $LOG
            exit $PATHFM_EXIT""",
    }
    for name, text in made.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/bash\n" + "\n".join(line.strip() for line in text.splitlines()))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def start(folder: Path, code: int, *words: str) -> tuple[int, list[str]]:
    """The script's exit code and what the fakes wrote down."""
    log = folder / "log"
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, **SLURM, "PATH": path, "LOG": str(log), "PATHFM_EXIT": str(code)}
    script = LAUNCH.resolve() / "slurm.sbatch"
    done = subprocess.run(["bash", str(script), *words], env=env, capture_output=True, check=False)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_every_task_becomes_a_rank_with_its_words_as_they_were(fake_slurm: Path) -> None:
    code, log = start(fake_slurm, 0, "a config.yaml", "--out", "runs/my run")
    assert code == 0
    assert log == [
        "0/2/0 node1:24242 pretrain a config.yaml --out runs/my run",
        "1/2/1 node1:24242 pretrain a config.yaml --out runs/my run",
    ]


@pytest.mark.parametrize("told", [138, 137, LostRankError.exit_code])
def test_a_run_stopped_by_its_time_limit_or_a_lost_rank_is_queued_again(
    fake_slurm: Path, told: int
) -> None:
    code, log = start(fake_slurm, told, "c.yaml")
    assert code == 0
    assert log[-1] == "scontrol requeue 4242"


def test_ranks_lost_at_every_start_are_given_up_but_time_limits_never_are(
    fake_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "20")
    code, log = start(fake_slurm, 175, "c.yaml")
    assert code == 175
    assert not any("requeue" in line for line in log)
    assert start(fake_slurm, 138, "c.yaml")[0] == 0
    monkeypatch.setenv("PATHFM_MAX_RESTARTS", "21")
    assert start(fake_slurm, 175, "c.yaml")[0] == 0


@pytest.mark.parametrize("told", [1, 2, 143])
def test_mistakes_and_preemptions_are_not_queued_by_the_script(fake_slurm: Path, told: int) -> None:
    code, log = start(fake_slurm, told, "c.yaml")
    assert code == told
    assert not any("requeue" in line for line in log)


def test_a_forgotten_config_is_told(fake_slurm: Path) -> None:
    code, log = start(fake_slurm, 0)
    assert code == 2
    assert log == []


def test_the_job_asks_for_a_signal_early_enough_and_may_be_queued_again() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH --")
    )
    assert asked["signal"] == "USR1@180"
    assert "requeue" in asked
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]


def test_the_kubernetes_job_runs_a_shipped_config_as_ranks_of_one_gpu() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert roles["Master"]["replicas"] == 1
    for role in roles.values():
        assert role["restartPolicy"] == "ExitCode"
        pod = role["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert {"name": "LOCAL_RANK", "value": "0"} in container["env"]
        assert pod["terminationGracePeriodSeconds"] > 60
        verb, config, *options = container["args"]
        assert verb == "pretrain"
        assert Path(config).relative_to("/opt/pathfm").exists()
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert "/dev/shm" in mounted
        for option in ("--corpus", "--out"):
            assert options[options.index(option) + 1].startswith("/data/")


def test_the_kubernetes_jobs_ranks_divide_the_batch() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    ranks = sum(role["replicas"] for role in job["spec"]["pytorchReplicaSpecs"].values())
    recipe = yaml.safe_load(Path("configs/dino_vits16.yaml").read_text())
    assert recipe["batch_size"] % ranks == 0
