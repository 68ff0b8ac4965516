"""The stores of a process: what goes where, listings, many reads at once, filesystems that hang."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from online_patching import errors
from online_patching.stores import (
    FsspecStore,
    HttpStore,
    Listed,
    RetryPolicy,
    Stores,
    any_fsspec,
    is_ranged,
    is_remote,
)
from tests.servers import Faults, FaultServer

QUICK = RetryPolicy(attempts=2, first_delay_s=0.01, timeout_s=0.3)


class HangingFileSystem(MemoryFileSystem):
    """A filesystem that does not answer until it is let go."""

    protocol = "hanging"
    released = threading.Event()

    def info(self, path: str, **_: object) -> dict[str, object]:
        self.released.wait(20)
        raise FileNotFoundError(path)


class SecretiveFileSystem(MemoryFileSystem):
    """One whose SDK shouts its credentials."""

    protocol = "secretive"

    def info(self, path: str, **_: object) -> dict[str, object]:
        raise RuntimeError("could not sign in with password hunter2")


@pytest.mark.parametrize(
    ("uri", "remote", "ranged"),
    [
        ("/a/b.svs", False, False),
        ("file:///a/b.svs", False, False),
        ("http://h/a", True, True),
        ("HTTPS://h/a", True, True),
        ("s3://b/a", True, True),
        ("s3a://b/a", True, True),
        ("gs://b/a", True, True),
        ("gcs://b/a", True, True),
        ("az://c/a", True, True),
        ("abfss://c@account.dfs.core.windows.net/a", True, True),
        ("memory://a", True, False),
        ("simplecache::https://h/a", True, False),
        ("sftp://h/a", True, False),
    ],
)
def test_each_scheme_has_its_store(uri: str, remote: bool, ranged: bool) -> None:
    stores = Stores()
    assert (is_remote(uri), is_ranged(uri)) == (remote, ranged)
    if remote:
        assert isinstance(stores.remote(uri), HttpStore if ranged else FsspecStore)
    if ranged:  # one client for all: its limits are the process's
        assert stores.remote(uri) is stores.http()
    stores.close()


def test_many_reads_are_answered_in_order_and_each_by_itself(
    fault_server: FaultServer, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 20
    for name in ("a", "b"):
        (fault_server.root / name).write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/m/one", data)
    wanted = [
        (f"{fault_server.url}/a", 5, 50, ""),
        (str(tmp_path / "b"), 7, 70, ""),
        (f"{fault_server.url}/none", 0, 9, ""),
        ("memory://m/one", 1, 9, ""),
        (str(tmp_path / "none"), 0, 9, ""),
        (f"{fault_server.url}/b", 0, None, '"one"'),
        (f"{fault_server.url}/b", 0, 10, '"other"'),
    ]
    stores = Stores(QUICK)
    found = stores.read_many(wanted)
    stores.close()
    assert found[0] == data[5:50]
    assert found[1] == data[7:70]
    assert isinstance(found[2], errors.ObjectNotFoundError)
    assert found[3] == data[1:9]
    assert isinstance(found[4], errors.ObjectNotFoundError)
    assert found[5] == data
    assert isinstance(found[6], errors.ObjectChangedError)
    fsspec.filesystem("memory").store.clear()


def test_many_remote_reads_wait_together(fault_server: FaultServer) -> None:
    (fault_server.root / "a").write_bytes(bytes(1000))
    fault_server.delay_s = 0.1
    stores = Stores()
    began = time.monotonic()
    found = stores.read_many([(f"{fault_server.url}/a", i, i + 9, "") for i in range(40)])
    stores.close()
    assert found == [bytes(9)] * 40
    assert time.monotonic() - began < 2  # one after another: 4 s
    assert fault_server.most_concurrent > 10


def test_the_limit_of_connections_holds_for_all_hosts_together(tmp_path: Path) -> None:
    with FaultServer(tmp_path, delay_s=0.02) as one, FaultServer(tmp_path, delay_s=0.02) as other:
        (tmp_path / "a").write_bytes(bytes(1000))
        stores = Stores(connections=3)
        wanted = [(f"{server.url}/a", i, i + 9, "") for i in range(20) for server in (one, other)]
        assert stores.read_many(wanted) == [bytes(9)] * 40
        stores.close()
        assert max(one.most_concurrent, other.most_concurrent) <= 3


def test_local_listings_do_not_follow_links_into_folders(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"1")
    (tmp_path / "in" / "b").write_bytes(b"22")
    (tmp_path / "in" / "sub" / "c").write_bytes(b"333")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "file-link").symlink_to(tmp_path / "out" / "x")
    (tmp_path / "in" / "nowhere").symlink_to(tmp_path / "gone")
    stores = Stores()
    found = stores.list(f"file://{tmp_path}/in")
    assert [
        (Path(item.uri).relative_to(tmp_path).as_posix(), item.size_bytes) for item in found
    ] == [
        ("in/b", 2),
        ("in/file-link", 1),
        ("in/sub/c", 3),
    ]
    assert all(stores.version(item.uri) == (item.size_bytes, item.token) for item in found)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.ObjectNotFoundError, match="nothing below it"):
        stores.list(str(tmp_path / "empty"))
    stores.close()


def test_http_says_what_to_do_instead_of_listing() -> None:
    stores = Stores()
    with pytest.raises(errors.StoreError, match="Give a table of URLs") as caught:
        stores.list("https://me:hunter2@h/folder/?sig=s3cret")
    assert "hunter2" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    stores.close()


def test_a_listed_object_is_a_value() -> None:
    one = Listed("s3://b/a", 3, '"e"')
    assert one == Listed("s3://b/a", 3, '"e"')
    assert min(Listed("b", 1, ""), Listed("a", 2, "")).uri == "a"
    with pytest.raises(AttributeError):
        one.uri = "other"  # type: ignore[misc]


def test_a_filesystem_that_hangs_ends_at_its_deadline_and_costs_no_other(monkeypatch) -> None:
    fsspec.register_implementation("hanging", HangingFileSystem, clobber=True)
    fsspec.filesystem("memory").pipe_file("/m/one", b"12345")

    async def ask() -> bytes:
        store = FsspecStore(QUICK)
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailableError, match=r"not finished within 0\.3 s"):
            await store.version("hanging://a")
        assert time.monotonic() - began < 3
        return await store.read("memory://m/one", 1, 3)

    try:
        assert asyncio.run(ask()) == b"23"
    finally:
        HangingFileSystem.released.set()
        fsspec.filesystem("memory").store.clear()


def test_a_filesystem_s_object_is_read_whole_only_if_it_is_no_larger_than_any_other_s(
    monkeypatch,
) -> None:
    monkeypatch.setattr(any_fsspec, "MAX_OBJECT_BYTES", 1000)
    memory = fsspec.filesystem("memory")
    for size in (1000, 1001):
        memory.pipe_file(f"/m/{size}", bytes(size))
    with closing(Stores(QUICK)) as stores:
        assert len(stores.read("memory://m/1000", 0, None)) == 1000
        for stop in (None, 1001):
            with pytest.raises(errors.StoreError, match="a read of 1,001 bytes"):
                stores.read("memory://m/1001", 0, stop)
    memory.store.clear()


@pytest.mark.parametrize("uri", ["reference://a/b", "reference::https://h/refs.json"])
def test_documents_with_templates_that_are_run_are_not_opened(uri: str) -> None:
    with (
        closing(Stores(QUICK)) as stores,
        pytest.raises(errors.StoreError, match="name the slide itself"),
    ):
        stores.version(uri)


def test_stores_that_were_used_before_a_fork_are_good_in_both_processes(
    fault_server: FaultServer,
) -> None:
    (fault_server.root / "a.bin").write_bytes(b"0123456789")
    key = f"{fault_server.url}/a.bin"
    with closing(Stores(QUICK)) as stores:
        assert stores.read(key, 0, 3) == b"012"
        pid = os.fork()
        if pid == 0:  # nothing of pytest's may run here
            signal.alarm(20)
            os._exit(0 if stores.read(key, 2, 5) == b"234" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert stores.read(key, 3, 6) == b"345"


def test_what_a_filesystem_says_is_not_repeated() -> None:
    fsspec.register_implementation("secretive", SecretiveFileSystem, clobber=True)
    stores = Stores(QUICK)
    with pytest.raises(errors.StoreError, match="RuntimeError from its filesystem") as caught:
        stores.version("secretive://a")
    assert "hunter2" not in str(caught.value) + repr(caught.value.__context__.__dict__)
    stores.close()


def test_a_first_byte_that_does_not_come_has_a_deadline_of_its_own(
    fault_server: FaultServer,
) -> None:
    """Also where aiohttp asks: the whole answer may take much longer than its first byte."""
    (fault_server.root / "a").write_bytes(bytes(1000))
    fault_server.faults = Faults("hang")
    policy = RetryPolicy(attempts=1, timeout_s=30, connect_timeout_s=0.2, first_byte_timeout_s=0.2)
    stores = Stores(policy)
    for ask in (stores.version, lambda uri: stores.read(uri, 0, 10)):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailableError, match="no answer within"):
            ask(f"{fault_server.url}/a")
        assert time.monotonic() - began < 3
    stores.close()
