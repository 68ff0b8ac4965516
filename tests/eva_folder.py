"""kaiko-eva in a folder of its own, to be asked by a process of its own.

It never enters our environment: it pins old packages, needs a process of its own anyway (it sets how
processes start), and with its own torch would take 6 GB. Here it is installed without dependencies and
borrows the interpreter, torch, torchmetrics, timm and pandas of ours.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENTS = Path(__file__).with_name("eva_requirements.txt")


def eva_folder() -> Path:
    """The folder to put first on PYTHONPATH, filled by pip where it was missing or other."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    home = ROOT / ".eva"
    folder = home / f"{digest}-{sys.version_info[0]}.{sys.version_info[1]}"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes fill it once
        if not folder.is_dir():
            filling = home / "filling"
            shutil.rmtree(filling, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            told = ["--no-deps", "--target", str(filling), "-r", str(REQUIREMENTS)]
            subprocess.run([*pip, *told], check=True, timeout=600)
            filling.rename(folder)
            for other in home.glob(f"*-{sys.version_info[0]}.{sys.version_info[1]}"):
                if other != folder:  # of other requirements
                    shutil.rmtree(other, ignore_errors=True)
    return folder


def run_eva(
    script: str, *arguments: str, timeout_s: float = 280.0, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs the text of a Python script that may `import eva`; raises with its stderr if it fails."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(eva_folder()), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=env,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"kaiko-eva's process ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return done
