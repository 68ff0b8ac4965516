"""Runs of `pathfm pretrain` in processes that a test may kill, each started in milliseconds.

`Nursery` is a process that has imported everything and forks a run when told: with imports of its own
each life would cost seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any


class Nursery:
    """Starts runs, and says how they ended. `modules` are imported once, for all of them."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules

    def __enter__(self) -> Nursery:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lives", *self._modules],
            env=environment,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)

    def start(self, yaml: Path, log: Path, environment: Mapping[str, str] | None = None) -> int:
        """The process id of a new run. With PATHFM_TEST_GRADIENTS it writes those of its first step."""
        asked = {"yaml": str(yaml), "log": str(log), "environment": dict(environment or {})}
        return int(self._ask(asked))

    def start_ranks(self, yaml: Path, logs: Sequence[Path], **environment: str) -> list[int]:
        """The process ids of the ranks of one run, one a log."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(logs)),
        }
        return [
            self.start(yaml, log, common | environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r, log in enumerate(logs)
        ]

    def ended(self, pid: int, timeout_s: float = 120.0) -> int:
        """How a run ended: its exit code, or minus the signal. AssertionError when it goes on."""
        answer = self._ask({"wait": pid, "timeout_s": timeout_s})
        assert answer != "running", f"run {pid} goes on after {timeout_s} s"
        return int(answer)

    def _ask(self, question: Mapping[str, object]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def _born(question: Mapping[str, object]) -> int:
    """Forks a run."""
    from pathfm.cli import main

    pid = os.fork()
    if pid:
        return pid
    log = os.open(str(question["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(question["environment"])  # type: ignore[call-overload]
    code = 70
    if "PATHFM_TEST_GRADIENTS" in os.environ:
        _keep_gradients(Path(os.environ["PATHFM_TEST_GRADIENTS"]))
    try:
        code = main(["pretrain", str(question["yaml"])])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _keep_gradients(path: Path) -> None:
    """Writes the gradients that the first optimizer step of this life is made from, by name."""
    from safetensors.torch import save_file

    from pathfm.pretrain import loop
    from pathfm.pretrain.parallel import whole

    true_update = loop.update

    def update(trainer: Any, given: Any, loss: Any) -> dict[str, float]:
        named = trainer.method.trained().named_parameters()
        grads = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
        if trainer.ranks.first and not path.exists():
            save_file(grads, path)
        return true_update(trainer, given, loss)

    loop.update = update


def _waited(wait: int, timeout_s: float) -> str:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        done, status = os.waitpid(wait, os.WNOHANG)
        if done:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    return "running"


def serve() -> None:
    """The nursery itself: answers a line with a line until its input ends."""
    import torch

    import pathfm.methods.dino
    import pathfm.pretrain.loop  # noqa: F401

    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    born: list[int] = []
    for line in sys.stdin:
        question = json.loads(line)
        waits = "wait" in question
        answer = _waited(**question) if waits else _born(question)
        if not waits:
            born.append(int(answer))
        print(answer, flush=True)
    for pid in born:  # whoever asked is gone: no run outlives its test
        with suppress(ChildProcessError):  # ended and asked about
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
