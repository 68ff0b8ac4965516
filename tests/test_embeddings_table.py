"""Features on disk: every bit comes back, whatever lies in the file, and a million rows are no trouble."""

from __future__ import annotations

import json
import os
import resource
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.embeddings.container import from_bf16, pack_text, read_places, to_bf16, unpack_text
from pathfm.embeddings.info import describe_transform
from pathfm.embeddings.table import check_finite, save_streamed
from pathfm.runtime import PathfmError

INFO = EmbeddingsInfo("a", "vit", "b" * 64, "random", "d", "c" * 64, 224)


def made(n: int = 7, d: int = 5, **change: object) -> Embeddings:
    rng = np.random.default_rng(n)
    told: dict[str, object] = {
        "features": rng.normal(size=(n, d)).astype(np.float32),
        "labels": np.arange(n, dtype=np.int64) % 2,
        "classes": ("p", "q"),
        "paths": tuple(f"p/ü{i}.png" for i in range(n)),
        "groups": tuple(f"g{i // 3}" for i in range(n)),
        "info": INFO,
        "splits": tuple(("train", "val", "test")[i % 3] for i in range(n)),
    }
    return Embeddings(**(told | change))


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    e = made()
    e.save(tmp_path / "a.safetensors")
    theirs = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(theirs["features"], e.features)
    np.testing.assert_array_equal(theirs["labels"], e.labels)
    halved = replace(e, info=replace(INFO, storage="bf16"))
    halved.save(tmp_path / "b.safetensors")
    half = safetensors.torch.load_file(tmp_path / "b.safetensors")["features"]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, torch.from_numpy(e.features).to(torch.bfloat16))
    got = Embeddings.load(tmp_path / "b.safetensors").features
    np.testing.assert_array_equal(got, half.float().numpy())


@pytest.mark.parametrize("mmap", [False, True])
def test_everything_comes_back(tmp_path: Path, mmap: bool) -> None:
    e = made(paths=("a\udcff.png", *(f"ü/{i}" for i in range(6))))
    e.save(tmp_path / "e.safetensors")
    got = Embeddings.load(tmp_path / "e.safetensors", mmap=mmap)
    assert isinstance(got.features, np.memmap) == mmap
    np.testing.assert_array_equal(got.features, e.features)
    assert (got.paths, got.groups, got.splits) == (e.paths, e.groups, e.splits)
    assert (got.classes, got.info) == (e.classes, e.info)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits = np.concatenate([bits, np.arange(2**16, dtype=np.uint32) << 8, [0x3F808000, 0x3F818000]])
    values = bits.astype(np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(to_bf16(values), expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(from_bf16(to_bf16(values)), expected.float().numpy())


def test_files_of_the_first_form_are_still_read(tmp_path: Path) -> None:
    e, told = made(), {k: v for k, v in vars(INFO).items() if k not in {"pooling", "transform"}}
    header = {
        "format": "pathfm.embeddings.1",
        "key": "k" * 64,
        "info": json.dumps({k: v for k, v in told.items() if k not in {"storage", "mpp"}}),
        "classes": json.dumps(e.classes),
        "paths": json.dumps(e.paths),
        "groups": json.dumps(e.groups),
    }
    tensors = {"features": e.features, "labels": e.labels}
    (tmp_path / "e.safetensors").write_bytes(safetensors.numpy.save(tensors, header))
    got = Embeddings.load(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(got.features, e.features)
    assert (got.paths, got.groups, got.splits, got.info) == (e.paths, e.groups, (), INFO)
    assert stored_key(tmp_path / "e.safetensors") == "k" * 64


def test_a_file_without_a_name_is_called_as_its_file(tmp_path: Path) -> None:
    made(info=replace(INFO, name="")).save(tmp_path / "vits.safetensors")
    assert Embeddings.load(tmp_path / "vits.safetensors").info.name == "vits"


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "vit_quickgelu"},
        {"pooling": "mean"},
        {"transform": "t"},
        {"storage": "bf16"},
        {"input_px": 112},
    ],
)
def test_the_key_follows_the_way_from_picture_to_number(change: dict[str, object]) -> None:
    assert replace(INFO, **change).key != INFO.key
    assert replace(INFO, name="z", weights_note="w", data="y", mpp=0.5).key == INFO.key


def test_another_normalisation_is_another_transform() -> None:
    a = describe_transform("crop", 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert a != describe_transform("crop", 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.4))
    assert a == describe_transform("crop", 224, np.array([0.5] * 3), [0.5] * 3)


def test_a_header_nested_without_end_is_refused_in_one_line(tmp_path: Path) -> None:
    path, text = tmp_path / "e.safetensors", b"[" * 300_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert stored_key(path) is None
    with pytest.raises(PathfmError, match="nested too deep") as caught:
        Embeddings.load(path)
    assert "\n" not in str(caught.value)
    made().save(path)
    meta, _ = read_places(path)
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, meta | {"classes": text.decode()})
    with pytest.raises(PathfmError, match="damaged embeddings"):
        Embeddings.load(path)


@pytest.mark.parametrize(
    "labels", [np.arange(7, dtype=np.float32), np.arange(7).reshape(7, 1), np.arange(7, dtype="u1")]
)
def test_labels_that_are_no_whole_numbers_one_a_row_are_refused(
    tmp_path: Path, labels: np.ndarray
) -> None:
    path = tmp_path / "e.safetensors"
    made().save(path)
    meta, _ = read_places(path)
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors | {"labels": labels}, path, meta)
    with pytest.raises(PathfmError, match=r"labels \(7.* of kind .*, wanted \(n,\) of I64"):
        Embeddings.load(path)


@pytest.mark.parametrize("cut", [1, 9, 200, -1, -40])
def test_a_file_cut_short_is_refused_and_counts_as_absent(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "e.safetensors"
    made(200, 3).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    assert stored_key(path) is None
    with pytest.raises(PathfmError, match="not an embeddings file"):
        Embeddings.load(path)


@pytest.mark.parametrize(
    "told",
    [
        {"dtype": "F32", "shape": [2**40, 5], "data_offsets": [0, 140]},
        {"dtype": "F32", "shape": [-7, -5], "data_offsets": [0, 140]},
        {"dtype": "F32", "shape": [7, 5], "data_offsets": [-140, 0]},
        {"dtype": "F64", "shape": [7, 5], "data_offsets": [0, 280]},
        {"dtype": "F32", "shape": [7] + [1] * 20 + [5], "data_offsets": [0, 140]},
        {"dtype": "I64", "shape": [7, 2], "data_offsets": [0, 112]},
        "features",
    ],
)
def test_a_lying_header_is_an_error_and_allocates_nothing(tmp_path: Path, told: object) -> None:
    path = tmp_path / "e.safetensors"
    made().save(path)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["features"] = told
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(PathfmError, match=r"e\.safetensors"):
        Embeddings.load(path)


def test_ends_of_texts_that_make_no_sense_are_refused() -> None:
    packed, ends = pack_text(["ab", "", "ç"])
    assert unpack_text(packed, ends) == ("ab", "", "ç")
    assert unpack_text(*pack_text([])) == ()
    for wrong in ([2, 1, 4], [-1, 2, 4], [2, 2, 5], [2, 2, 3]):
        with pytest.raises(ValueError, match="texts that end"):
            unpack_text(packed, np.array(wrong))


def test_rows_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match="3 splits for 7 rows"):
        made(splits=("train", "val", "test"))
    with pytest.raises(PathfmError, match="split 'dev' is none of"):
        made(splits=("dev",) * 7)
    with pytest.raises(PathfmError, match="label outside"):
        made(labels=np.full(7, 2))
    with pytest.raises(PathfmError, match="wants 140"):
        save_streamed(tmp_path / "e", made(), INFO, (7, 5), [np.zeros((6, 5), np.float32)])
    assert list(tmp_path.iterdir()) == []


def test_the_first_bad_row_is_named_wherever_it_is() -> None:
    features = np.zeros((200_000, 2), np.float32)
    features[[131_072, 199_999], 1] = np.nan
    with pytest.raises(PathfmError, match=r"2 of 200,000 rows .* row 131,082"):
        check_finite(features, "a", first_row=10)


def test_blocks_are_streamed_and_all_columns_lie_aligned(tmp_path: Path) -> None:
    e = made(9, 3)
    save_streamed(tmp_path / "e", e, INFO, (9, 3), (e.features[i : i + 2] for i in range(0, 9, 2)))
    _, places = read_places(tmp_path / "e")
    assert all(places[k].start_byte % 8 == 0 for k in ("labels", "paths_ends"))
    assert places["features"].start_byte % 4 == 0
    np.testing.assert_array_equal(Embeddings.load(tmp_path / "e").features, e.features)


def test_what_a_killed_writer_left_is_deleted_once_it_is_old(tmp_path: Path) -> None:
    old, new = (tmp_path / f".e.safetensors.{name}.tmp" for name in ("old", "new"))
    other = tmp_path / ".f.safetensors.old.tmp"
    for left in (old, new, other):
        left.write_bytes(b"half")
    for left in (old, other):
        os.utime(left, (0, 0))
    made().save(tmp_path / "e.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {new.name, other.name, "e.safetensors"}


@pytest.mark.slow
def test_a_million_rows_are_written_and_mapped_in_little_memory(tmp_path: Path) -> None:
    n, d, step = 1_000_000, 64, 50_000

    class Rows:
        labels = np.zeros(n, np.int64)
        classes = ("a", "b")
        paths = tuple(f"class/picture_{i:07d}.png" for i in range(n))
        groups: tuple[str, ...] = ()
        splits: tuple[str, ...] = ()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = (np.full((step, d), at, np.float32) for at in range(0, n, step))
    save_streamed(tmp_path / "e", Rows, INFO, (n, d), blocks)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 244  # 244 MB are the features alone
    got = Embeddings.load(tmp_path / "e", mmap=True)
    assert got.paths[-1] == Rows.paths[-1]
    assert got.features[[0, 499_999, 999_999], 3].tolist() == [0, 450_000, 950_000]
