"""Ranks: alone everything is the identity; two processes of gloo compute what one would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from pathfm import cli, ranks
from pathfm.runtime import PathfmError


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.ones(2, 3, requires_grad=True)
    with ranks.open_ranks("cpu") as us:
        assert (us, us.first) == (ranks.Ranks(0, 1, 0), True)
        assert ranks.gather_rows(rows, grad=True) is rows
        assert not ranks.gather_rows(rows).requires_grad
        assert torch.equal(ranks.sum_over_ranks(rows), rows)
        assert ranks.gather_objects({"a": 1}) == [{"a": 1}]
        assert ranks.agree([3, 0]) == [3, 0]
        with pytest.raises(KeyError), ranks.together():
            raise KeyError


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_variables_that_make_no_sense_are_told(monkeypatch, variables, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PathfmError, match=words), ranks.open_ranks("cpu"):
        pass


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def alone_among_two(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """As a launcher would start us beside another rank; there is none."""
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "PATHFM_RANKS_TIMEOUT_S": "1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_nobody_says_so_and_asks_to_be_started_again(monkeypatch, capsys, rank):
    alone_among_two(monkeypatch, rank)

    def dispatch(words: list[str]) -> int:
        with ranks.open_ranks("cpu"):
            return 0

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    assert cli.main([]) == 175
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"error: rank {rank} of 2 did not meet the others at 127.0.0.1:")
    assert line.endswith("Start all ranks again")


def test_a_missing_address_is_a_mistake_and_no_lost_rank(monkeypatch):
    alone_among_two(monkeypatch, 0)
    monkeypatch.delenv("MASTER_ADDR")
    told = pytest.raises(PathfmError, match=r"rank 0 of 2 .*MASTER_ADDR")
    with told as caught, ranks.open_ranks("cpu"):
        pass
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/a/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("[/a/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3ms"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (torch.distributed.DistNetworkError("recvValue failed on SocketImpl(fd=3)"), True),
        (torch.distributed.DistStoreError("wait timeout after 1000ms"), True),
        (RuntimeError("cannot restore the stored weights"), False),
        (RuntimeError("Connection pool is full"), False),
        (RuntimeError("Timed out compiling a kernel"), False),
    ],
)
def test_only_what_torch_says_of_other_ranks_is_taken_for_a_lost_one(error, lost):
    assert ranks._is_loss(error) is lost


SCRIPT = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
import torch
from pathfm import ranks

with ranks.open_ranks("cpu") as us:
    everything = torch.arange(12.0, dtype=torch.float64).reshape(4, 3) / 7
    weights = torch.linspace(-1, 2, 16, dtype=torch.float64).reshape(4, 4)

    def objective(rows):  # every pair of rows matters
        return ((rows @ rows.T) * weights).square().sum()

    ours = everything[2 * us.rank : 2 * us.rank + 2].clone().requires_grad_()
    everybody = ranks.gather_rows(ours, grad=True)
    assert torch.equal(everybody, everything)
    # each rank's loss is the whole objective: their mean is it too, and so must the mean gradient be
    objective(everybody).backward()
    whole = everything.clone().requires_grad_()
    objective(whole).backward()
    torch.testing.assert_close(ours.grad / 2, whole.grad[2 * us.rank : 2 * us.rank + 2])

    uneven = ranks.gather_rows(everything[: us.rank + 1])
    assert torch.equal(uneven, torch.cat([everything[:1], everything[:2]]))
    assert torch.equal(ranks.sum_over_ranks(torch.tensor([1.0, us.rank])), torch.tensor([2.0, 1.0]))
    assert ranks.gather_objects(us.rank * 10) == [0, 10]
    assert ranks.agree([us.rank, 5 - us.rank]) == [1, 5]
    with ranks.together():
        pass
    try:
        with ranks.together():
            if us.rank == 1:
                raise ValueError("no such slide")
    except ranks.PeerError as error:
        assert us.rank == 0 and "rank 1 failed: no such slide" in str(error), error
    except ValueError:
        assert us.rank == 1
    else:
        raise AssertionError("both must fail")
    assert ranks.gather_objects(us.rank) == [0, 1]  # and still in step
    print("fine")
"""


@pytest.mark.slow
def test_two_processes_gather_sum_agree_and_fail_together():
    for process in two_processes(SCRIPT):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "fine\n"), err


def test_ranks_that_start_again_meet_among_themselves():
    """torchrun's store lives on: what the last life wrote is there, and rank 0 may be there first."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def joined(rank: int) -> int:
        time.sleep(0.1 * rank)
        client = TCPStore("127.0.0.1", server.port, wait_for_workers=False)
        store = ranks._of_this_life(client, rank, 3, 30)
        return store.add("came", 1)

    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):  # a room of their own, each time a new one
            assert sorted(threads.map(joined, range(3))) == [1, 2, 3]
    with pytest.raises(torch.distributed.DistStoreError, match="0 of 2 other ranks came"):
        ranks._of_this_life(server, 0, 3, 0.2)


SECOND_LIFE = """
import os, sys, time
from pathfm import ranks

if os.environ["RANK"] == "1":
    time.sleep(2)  # rank 0 finds what the last life left
with ranks.open_ranks("cpu") as us:
    assert ranks.gather_objects(us.rank) == [0, 1]
    print("fine", flush=True)
    os._exit(9)  # killed: nobody tidies up
"""


@pytest.mark.slow
def test_a_life_after_a_kill_does_not_wait_for_the_dead():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        kept = {"TORCHELASTIC_USE_AGENT_STORE": "True", "PATHFM_RANKS_TIMEOUT_S": "20"}
        for process in two_processes(SECOND_LIFE, MASTER_PORT=str(server.port), **kept):
            out, err = process.communicate(timeout=60)
            assert out == "fine\n", err


LEAVING = """
import sys, time
from pathfm import ranks

with ranks.open_ranks("cpu") as us:
    ranks.agree([0])
    if us.first:
        time.sleep(2)
        print(time.time())
        sys.exit(3 if "{how}" == "failing" else 0)
print(time.time())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["well", "failing"])
def test_the_others_leave_after_rank_0_has_brought_its_records_home(how):
    """What leaves first with another code than 0 has srun kill the rest."""
    first, second = two_processes(LEAVING.replace("{how}", how))
    times_s = [float(process.communicate(timeout=120)[0]) for process in (first, second)]
    assert times_s[1] >= times_s[0]
    assert (first.returncode, second.returncode) == (3 if how == "failing" else 0, 0)


def two_processes(script: str, **variables: str) -> list[subprocess.Popen[str]]:
    """The script as rank 0 and 1 of 2."""
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=common | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
