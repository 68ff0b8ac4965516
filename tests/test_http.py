"""The HTTP store and remote slides against a real server that misbehaves."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    errors,
    open_slide,
    read_slide_index,
)
from online_patching.loading import remote
from online_patching.stores import RetryPolicy, Stores, redact
from online_patching.testing import SyntheticSlide, write_tiff
from tests.servers import Faults

QUICK = RetryPolicy(attempts=3, first_delay_s=0.01, timeout_s=0.5, connect_timeout_s=0.5)


@pytest.fixture
def stores():
    made = Stores(QUICK)
    yield made
    made.close()


def take(loader: PatchLoader, n: int) -> list[np.ndarray]:
    return [loader.next_batch().pixels for _ in range(n)]


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region", "gallery-01_colon_serrated_adenoma_crop6144"]
)
def test_a_real_slide_over_http_has_the_same_pixels(fault_server, real_slides, name):
    local = real_slides[name]
    shutil.copy(local.uri, fault_server.root / "a.svs")
    remote = read_slide_index(f"{fault_server.url}/a.svs")
    assert remote.digest == local.digest
    headers = sum(stop - start for _, start, stop in fault_server.ranges)
    assert headers < 0.25 * local.size_bytes  # headers only
    everything = [ForegroundMask.everything(local)]
    options = {"size_px": 96, "mpp": [local.mpp, 2 * local.mpp], "seed": 3}
    with (
        PatchLoader(PatchSampler([local], everything, **options), 8) as a,
        PatchLoader(PatchSampler([remote], everything, **options), 8, gap_bytes=0) as b,
    ):
        for x, y in zip(take(a, 4), take(b, 4), strict=True):
            assert (x == y).all()
        assert b.stats.bytes_read == b.stats.bytes_wanted
        assert b.stats.retries == 0


def test_an_ome_zarr_over_http_has_the_same_pixels(fault_server, small_slides, small_indexes):
    shutil.copytree(small_slides[2], fault_server.root / "z.ome.zarr")
    with (
        open_slide(f"{fault_server.url}/z.ome.zarr") as remote,
        open_slide(small_indexes[2]) as local,
    ):
        assert remote.index.digest == local.index.digest
        place = {"x_um": 50.0, "y_um": 80.0, "mpp": 0.5, "size_px": 200}
        assert (remote.read_patch(**place) == local.read_patch(**place)).all()


def test_with_merging_the_excess_is_counted(fault_server, small_slides, small_indexes):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    remote = read_slide_index(f"{fault_server.url}/a.svs")
    sampler = PatchSampler([remote], [ForegroundMask.everything(remote)], size_px=300, mpp=[0.2531])
    with (
        PatchLoader(sampler, 4, gap_bytes=0) as exact,
        PatchLoader(sampler, 4, gap_bytes=10**6) as merged,
    ):
        assert (take(exact, 2)[1] == take(merged, 2)[1]).all()
        exact.close(), merged.close()  # also finishes what was read ahead
        assert merged.stats.bytes_wanted < merged.stats.bytes_read
        # by what was wanted, since the two may have read ahead by different amounts
        each = [loader.stats.requests / loader.stats.bytes_wanted for loader in (merged, exact)]
        assert each[0] < each[1]
        assert "(+0.0% beyond" in exact.stats.told()
        excess = merged.stats.bytes_read / merged.stats.bytes_wanted - 1
        assert f"(+{excess:.1%} beyond" in merged.stats.told()


def test_one_500_is_retried(fault_server, stores, small_slides):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    fault_server.faults = Faults("500", 1)
    read_slide_index(f"{fault_server.url}/a.svs", stores=stores)
    assert fault_server.seen["500"] == 1
    assert stores.retries == 1


@pytest.mark.parametrize(
    ("faults", "error", "words"),
    [
        (Faults("500"), errors.StoreUnavailableError, "failed 3 times, last with: HTTP 500"),
        (Faults("403"), errors.StoreError, "HTTP 403: access refused"),
        (Faults("ignore-range"), errors.RangeIgnoredError, "ignores byte ranges"),
        (Faults("wrong-range"), errors.RangeIgnoredError, "asked for bytes 0-0, got 1-1"),
        (Faults("hang"), errors.StoreUnavailableError, "not finished within 0.5 s"),
        (Faults("truncate", only_data=True), errors.StoreUnavailableError, "failed 3 times"),
    ],
)
def test_each_misbehaviour_is_one_clear_error(
    fault_server, stores, small_slides, faults, error, words
):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    fault_server.faults = faults
    with pytest.raises(error, match=words) as caught:
        read_slide_index(f"{fault_server.url}/a.svs?sig=SECRET", stores=stores)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_missing_object_and_a_dead_server(fault_server, stores):
    with pytest.raises(errors.ObjectNotFoundError, match="HTTP 404"):
        read_slide_index(f"{fault_server.url}/none.svs", stores=stores)
    with pytest.raises(errors.StoreUnavailableError, match="failed 3 times"):
        read_slide_index("http://127.0.0.1:9/a.svs", stores=stores)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "[::1]:9", "[::1"])
def test_a_host_that_cannot_be_asked_ends_a_loader_with_one_error(small_indexes, host):
    """An error that gets lost on the way hangs it."""
    index = dataclasses.replace(small_indexes[0], uri=f"http://{host}/a.svs")
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=64, mpp=[0.5])
    told: list[Exception] = []

    def ask() -> None:
        try:
            loader.next_batch()
        except Exception as error:
            told.append(error)

    with PatchLoader(sampler, 4, retry=QUICK) as loader:
        asker = threading.Thread(target=ask, daemon=True)
        asker.start()
        asker.join(20)
    assert [isinstance(error, errors.StoreError) for error in told] == [True]


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "[::1]:9", "[::1"])
def test_a_host_that_cannot_be_asked_is_a_store_error_everywhere(stores, host):
    for ask in (stores.version, lambda uri: stores.read(uri, 0, 9)):
        with pytest.raises(errors.StoreError):
            ask(f"http://{host}/a.svs")
    assert not stores.remote("http://").active


def test_a_slide_replaced_in_mid_run_is_noticed_and_never_mixed(
    fault_server, small_slides, small_indexes
):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    remote = read_slide_index(f"{fault_server.url}/a.svs")
    local = small_indexes[1]
    masks = [ForegroundMask.everything(remote), ForegroundMask.everything(local)]
    sampler = PatchSampler([remote, local], masks, size_px=64, mpp=[0.5])
    with PatchLoader(sampler, 8, max_failed_fraction=1.0, prefetch=1, retry=QUICK) as loader:
        first = loader.next_batch()
        assert {ref.slide for ref in first.refs} == {0, 1}
        fault_server.etag = '"two"'
        batches = [loader.next_batch() for _ in range(4)]
    assert any("ObjectChangedError" in reason for b in batches for *_, reason in b.failures)
    assert all(ref.slide == 1 for ref in batches[-1].refs)


def test_a_store_that_goes_away_stops_the_stream_at_a_place_to_resume(fault_server, small_slides):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    remote = read_slide_index(f"{fault_server.url}/a.svs")
    sampler = PatchSampler([remote], [ForegroundMask.everything(remote)], size_px=64, mpp=[0.5])
    with PatchLoader(sampler, 4, retry=QUICK) as loader:
        whole = take(loader, 6)
    with PatchLoader(sampler, 4, retry=QUICK, prefetch=1) as loader:
        take(loader, 2)
        fault_server.faults = Faults("500")
        with pytest.raises(errors.StoreUnavailableError):
            take(loader, 4)
        state = loader.state_dict()
    fault_server.faults = Faults()
    with PatchLoader(sampler, 4, retry=QUICK) as loader:
        loader.load_state_dict(state)
        done = state["next_draw"] // 4
        for a, b in zip(take(loader, 6 - done), whole[done:], strict=True):
            assert (a == b).all()


def most_held(loader: PatchLoader) -> int:
    """The most bytes that were granted at once."""
    return loader._engine.remote.peak


def test_remote_reads_overlap_and_stay_within_the_budget(fault_server, small_slides):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    remote = read_slide_index(f"{fault_server.url}/a.svs")
    fault_server.delay_s = 0.02
    sampler = PatchSampler([remote], [ForegroundMask.everything(remote)], size_px=64, mpp=[0.5])
    with PatchLoader(sampler, 16, bytes_in_flight=200_000) as loader:
        take(loader, 2)
        peak = most_held(loader)
    assert fault_server.most_concurrent > 1
    assert 0 < peak <= 200_000


def test_local_damage_replaced_by_a_remote_slide_does_not_hang(
    fault_server, tmp_path, small_slides
):
    """A decode thread that waited for the loop would wait for ever: the loop waits for that thread."""
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    bad = write_tiff(tmp_path / "bad.svs", SyntheticSlide(8, 900, 700, mpp=0.25))
    indexes = [read_slide_index(str(bad)), read_slide_index(f"{fault_server.url}/a.svs")]
    bad.unlink()
    masks = [ForegroundMask.everything(index) for index in indexes]
    sampler = PatchSampler(indexes, masks, size_px=64, mpp=[0.25])
    with PatchLoader(sampler, 16, threads=1, max_failed_fraction=1.0) as loader:
        batch = loader.next_batch()
    assert {ref.slide for ref in batch.refs} == {1}
    assert batch.failures


def test_what_is_held_stays_within_the_budget_until_it_is_decoded(
    fault_server, small_slides, monkeypatch
):
    """While no decode ends, the server is asked for no more than the budget."""
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    far = read_slide_index(f"{fault_server.url}/a.svs")
    gate = threading.Event()
    right = remote.read_bodies  # type: ignore[attr-defined]

    def gated(*args):
        assert gate.wait(30)
        return right(*args)

    monkeypatch.setattr(remote, "read_bodies", gated)
    sampler = PatchSampler([far], [ForegroundMask.everything(far)], size_px=64, mpp=[0.5])
    fault_server.ranges.clear()
    with PatchLoader(sampler, 64, bytes_in_flight=100_000, prefetch=1) as loader:
        reader = threading.Thread(target=take, args=(loader, 1))
        reader.start()
        asked = -1
        while asked != len(fault_server.ranges) or asked == 0:  # until no more comes
            asked = len(fault_server.ranges)
            time.sleep(0.3)
        held = sum(stop - start for _, start, stop in fault_server.ranges)
        gate.set()
        reader.join()
    assert 50_000 < held <= 100_000
    assert sum(stop - start for _, start, stop in fault_server.ranges) > 200_000


def test_a_signed_url_reads_and_is_never_shown_or_stored(fault_server, small_slides, tmp_path):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    signed = f"{fault_server.url}/a.svs?sig=SECRET"
    index = read_slide_index(signed)
    index.save(tmp_path / "i.index")
    assert b"SECRET" not in (tmp_path / "i.index").read_bytes()
    assert "SECRET" not in repr(index)
    assert "SECRET" not in str(errors.TileDecodeError(signed, 0, 1, "x"))
    sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=64, mpp=[0.5])
    fault_server.ranges.clear()
    with PatchLoader(sampler, 4) as loader:
        take(loader, 1)
    assert all(
        "sig=SECRET" in path for path, _, _ in fault_server.ranges
    )  # it still signs its reads


def test_a_server_that_sends_more_than_asked_is_cut_off(fault_server, stores, small_slides):
    shutil.copy(small_slides[0], fault_server.root / "a.svs")
    fault_server.faults = Faults("flood")
    with pytest.raises(errors.RangeIgnoredError, match="more than the 16 bytes"):
        stores.read(f"{fault_server.url}/a.svs", 0, 16)


def test_secrets_do_not_survive_redaction():
    assert redact("https://user:pw@host/a.svs?X-Amz-Signature=abc#f") == "https://host/a.svs"
    assert (
        redact("simplecache::https://user:pw@host/a.svs?s=1") == "simplecache::https://host/a.svs"
    )
    assert redact("s3://bucket/a#1.svs?x") == "s3://bucket/a#1.svs?x"  # a name, in an object store


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:pw@[::1]:9/a.svs?s=1", "http://[::1]:9/a.svs"),
        ("http://[fe80::1%25eth0]:80/x", "http://[fe80::1%25eth0]:80/x"),
        ("zip://a.svs::https://u:p@h/a.zip?sig=SECRET", "zip://a.svs::https://h/a.zip"),
        ("a::b::s3://k:secret@bucket/x", "a::b::s3://bucket/x"),
        ("HTTPS://u:p@h/a?sig=SECRET", "HTTPS://h/a"),
        ("https://u:p@h?sig=SECRET", "https://h"),
        ("http://u:p@[::1/x?s", "http://[::1/x"),  # no URL, but a message must be made about it
    ],
)
def test_redaction_knows_ipv6_chains_and_what_is_no_url(uri, shown):
    assert redact(uri) == shown


@given(st.text(st.sampled_from("htps:/@[]?#%.a1\n") | st.characters(), max_size=60))
def test_redaction_of_anything_is_no_error(rest):
    for uri in (rest, f"http://{rest}", f"https://u:SECRET@h/{rest}"):
        assert "SECRET" not in redact(uri)


def test_any_fsspec_filesystem_serves_a_slide(small_slides, small_indexes):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.svs", small_slides[0].read_bytes())
    with open_slide("memory://bucket/a.svs") as remote, open_slide(small_indexes[0]) as local:
        assert remote.index.digest == local.index.digest
        assert (
            remote.read_region((99, 50), 0, (300, 300))
            == local.read_region((99, 50), 0, (300, 300))
        ).all()
    with pytest.raises(errors.ObjectNotFoundError):
        read_slide_index("memory://bucket/none.svs")


def test_a_scheme_that_nobody_knows_is_refused():
    with pytest.raises(errors.StoreError, match="no reader knows the scheme"):
        read_slide_index("gopher://bucket/a.svs")
