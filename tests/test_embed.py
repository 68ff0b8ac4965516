"""Frozen features: geometry of the input, written once, the same however they are batched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pathfm.datasets import scan_folder
from pathfm.embed import EmbedConfig, prepare, read_batches, run, running
from pathfm.embed.computing import lowest_cosine
from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from tests.test_datasets_folder import make_folder

QUIET = TrackingConfig(enabled=False)
INFO = EmbeddingsInfo("a", "vit", "b" * 64, "random", "d", "c" * 64, 224)


@pytest.mark.parametrize("size", [(300, 500), (640, 227), (224, 224), (100, 80), (225, 224)])
def test_pictures_are_cut_as_torchvision_cuts_them(tmp_path: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(7).normal(128, 60, (*size[::-1], 1)).clip(0, 255)
    image = Image.fromarray(np.repeat(noise.astype(np.uint8), 3, 2))
    image.save(tmp_path / "a.png")
    bilinear = v2.InterpolationMode.BILINEAR
    oracle = v2.Compose([v2.Resize(224, bilinear, antialias=True), v2.CenterCrop(224)])
    expected = oracle(torch.from_numpy(np.array(image)).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    off = np.abs(prepare(tmp_path / "a.png", 224).astype(int) - expected)
    assert off.max() <= 1  # the two round differently


def test_batches_keep_the_order_and_a_bad_picture_is_named(tmp_path: Path) -> None:
    files = []
    for i in range(11):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (20, 20), (i, i, i)).save(files[-1])
    batches = list(read_batches(files, 16, 3, threads=4))
    assert [len(batch) for batch in batches] == [3, 3, 3, 2]
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == list(range(11))
    files[7].write_bytes(b"broken")
    with pytest.raises(PathfmError, match=r"7\.png"):
        list(read_batches(files, 16, 3, threads=4))


def test_embeddings_come_back_as_they_were(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels, paths = np.array([0, 1, 0, 1, 1]), tuple("vwxyz")
    before = Embeddings(features, labels, ("p", "q"), paths, ("g",) * 5, INFO)
    before.save(tmp_path / "e.safetensors")
    after = Embeddings.load(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(after.features, features)
    assert (after.info, after.classes, after.paths) == (INFO, ("p", "q"), paths)
    assert stored_key(tmp_path / "e.safetensors") == INFO.key


@pytest.mark.parametrize(
    "change",
    [{"backbone_digest": "x"}, {"data_digest": "x"}, {"input_px": 112}, {"precision": "bf16"}],
)
def test_the_key_follows_what_features_depend_on(change: dict[str, object]) -> None:
    assert replace(INFO, **change).key != INFO.key  # type: ignore[arg-type]
    assert replace(INFO, name="b", weights_note="n").key == INFO.key


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_foreign_file_is_refused_and_never_trusted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "e.safetensors"
    path.write_bytes(content)
    assert stored_key(path) is None
    with pytest.raises(PathfmError, match="not an embeddings file"):
        Embeddings.load(path)


def test_features_that_are_not_finite_are_refused() -> None:
    features = np.array([[1.0, np.inf], [0.0, 0.0]], np.float32)
    with pytest.raises(PathfmError, match="1 of 2 rows are not finite"):
        Embeddings(features, np.array([0, 1]), ("a", "b"), ("x", "y"), (), INFO)


def test_the_lowest_cosine_is_that_of_the_worst_row() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    assert lowest_cosine(a, np.array([[2.0, 0.0], [0.0, 1.0]], np.float32)) == pytest.approx(
        0.5**0.5
    )


@pytest.mark.slow
def test_a_rerun_skips_and_a_change_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", {"a": 5, "b": 4}, size=(50, 40))
    config = EmbedConfig(
        data=data,
        weights="random:1",
        name="init",
        out=tmp_path / "out",
        input_px=32,
        batch_size=4,
        precision="fp32",
        tracking=QUIET,
    )
    first = run(config)
    assert not first.skipped
    assert Embeddings.load(first.path).features.shape == (9, 192)
    with monkeypatch.context() as patched:
        patched.setattr(running, "compute_parts", None)  # would raise if it were called
        assert run(config).skipped
    before = Embeddings.load(first.path).features
    other = config.model_copy(update={"batch_size": 9, "threads": 1, "out": tmp_path / "again"})
    np.testing.assert_allclose(Embeddings.load(run(other).path).features, before, atol=1e-4)
    assert not run(config.model_copy(update={"weights": "random:2"})).skipped
    Image.new("RGB", (50, 40)).save(data / "a" / "00.png")
    assert not run(config).skipped
    assert "pictures/s" in capsys.readouterr().out


@pytest.mark.slow
def test_bf16_that_changes_the_features_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", {"a": 2, "b": 2})
    config = EmbedConfig(
        data=data, weights="random", input_px=32, out=tmp_path / "out", tracking=QUIET
    )
    monkeypatch.setattr(running, "plan_precision", lambda *_: "bf16")
    monkeypatch.setattr("pathfm.embed.computing.MIN_COSINE", 1.1)
    path = run(config).path
    assert Embeddings.load(path).info.precision == "fp32"
    assert "fp32, for bf16 agrees" in capsys.readouterr().out
    assert run(config).skipped


@pytest.mark.slow
def test_real_features_are_timms_own(shared_data: Path, tmp_path: Path) -> None:
    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    weights = shared_data / "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    data = shared_data / "patches/colorectal5"
    config = EmbedConfig(
        data=data,
        weights=str(weights),
        per_class=2,
        out=tmp_path,
        precision="fp32",
        tracking=QUIET,
    )
    got = Embeddings.load(run(config).path)
    overlay = {"file": str(weights)}
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    transform = create_transform(
        **resolve_data_config({"crop_pct": 1.0, "interpolation": "bilinear"}, model=vit)
    )
    images = [Image.open(data / path).convert("RGB") for path in got.paths]
    with torch.inference_mode():
        batch = torch.stack([transform(i) for i in images])
        tokens = vit.eval().forward_features(batch)  # type: ignore[operator]
    np.testing.assert_allclose(got.features, tokens[:, 0].numpy(), atol=2e-4)
    assert scan_folder(data).subset(2).paths == got.paths


def test_equal_pictures_in_two_splits_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "d" / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "d" / "test", {"b": 2, "a": 1})  # the same numbers drawn: a's become b's
    config = EmbedConfig(
        data=tmp_path / "d", weights="random", input_px=32, out=tmp_path / "out", tracking=QUIET
    )
    run(config)
    told = capsys.readouterr().out
    assert "WARNING 3 of 7 samples have the very bytes of a sample in another split" in told
