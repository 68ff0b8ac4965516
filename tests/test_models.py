"""Any model behind one face: the features are the library's own, and nothing unsafe is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pathfm.backbone import export_backbone, load_backbone
from pathfm.models import POOLINGS, Embedder, load_model
from pathfm.models.loading import of_backbone
from pathfm.models.naming import names_its_architecture
from pathfm.runtime import PathfmError
from tests.eva_folder import run_eva

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
HALF = (0.5, 0.5, 0.5)


def pixels(n: int = 3, side: int = 32) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (n, side, side, 3), np.uint8)


def normalised(x: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    scaled = (x.astype(np.float64) / 255 - np.asarray(mean)) / np.asarray(std)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).float()


def test_a_backbone_of_ours_gives_its_own_features() -> None:
    backbone = load_backbone("vit_tiny_patch16_224", "random:3", 32, **TINY)
    model = load_model("random:3", input_px=32, **TINY)
    x = normalised(pixels(), backbone.mean, backbone.std)
    with torch.inference_mode():
        tokens = backbone(x).double().numpy()  # CLS, then patches, after the last norm
    mean = np.stack([sum(picture[1:]) / len(picture[1:]) for picture in tokens])
    wanted = {"cls": tokens[:, 0], "mean": mean, "cls+mean": np.hstack([tokens[:, 0], mean])}
    for pooling in POOLINGS:
        got = model.embed_pixels(pixels(), pooling)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted[pooling], atol=1e-5)
    assert (model.digest, model.name) == (backbone.digest, backbone.name)


def test_a_convnet_pools_its_map_and_has_one() -> None:
    model = of_backbone(load_backbone("resnet10t", "random"))
    cls, both = (model.embed_pixels(pixels(2, 64), pooling) for pooling in ("cls", "cls+mean"))
    np.testing.assert_allclose(both[:, : cls.shape[1]], cls, atol=1e-5)
    np.testing.assert_allclose(both[:, cls.shape[1] :], cls, atol=1e-5)  # it is a mean itself


def test_an_exported_folder_and_other_normalisations_are_read(tmp_path: Path) -> None:
    backbone = load_backbone("vit_tiny_patch16_224", "random", 32, **TINY)
    export_backbone(backbone, tmp_path / "b")
    model = load_model(str(tmp_path / "b"), "", 32)
    np.testing.assert_array_equal(
        model.embed_pixels(pixels()), of_backbone(backbone).embed_pixels(pixels())
    )
    other = load_model(str(tmp_path / "b"), "", 32, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert other.mean == (0.1, 0.2, 0.3)
    assert other.digest == model.digest  # the transform tells them apart
    assert not np.allclose(other.embed_pixels(pixels()), model.embed_pixels(pixels()))


def transformers_folder(
    path: Path, kind: str, note: dict[str, Any] | None = None, **change: Any
) -> Any:
    import transformers

    size: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind in ("ResNet", "ConvNext"):
        size = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "embedding_size": 8}
        size |= {"layer_type": "basic"} if kind == "ResNet" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(size | change))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(path)
    note = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]} if note is None else note
    (path / "preprocessor_config.json").write_text(json.dumps(note))
    return model


@pytest.mark.parametrize(
    ("kind", "prefix"), [("ViT", 1), ("Dinov2", 1), ("Dinov2WithRegisters", 5), ("DINOv3ViT", 1)]
)
def test_a_hugging_face_folder_gives_what_transformers_gives(
    tmp_path: Path, kind: str, prefix: int
) -> None:
    theirs = transformers_folder(tmp_path, kind)
    model = load_model(str(tmp_path), input_px=32)
    x = normalised(pixels(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    with torch.inference_mode():
        last = theirs(pixel_values=x).last_hidden_state.numpy()
    assert last.shape[1] == prefix + 16
    np.testing.assert_allclose(model.embed_pixels(pixels()), last[:, 0], atol=1e-5)
    mean = last[:, prefix:].mean(axis=1)
    np.testing.assert_allclose(model.embed_pixels(pixels(), "mean"), mean, atol=1e-5)
    assert model.embed_pixels(pixels(2, 64)).shape == (2, 24)  # positions are resampled
    with pytest.raises(PathfmError, match="input_px = 30 is no multiple of the 8 px"):
        load_model(f"hf:{tmp_path}", input_px=30)


@pytest.mark.parametrize("kind", ["ResNet", "ConvNext"])
def test_a_hugging_face_convnet_is_pooled_over_its_map(tmp_path: Path, kind: str) -> None:
    theirs = transformers_folder(tmp_path, kind)
    model = load_model(str(tmp_path))
    x = normalised(pixels(2, 64), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    with torch.inference_mode():
        told = theirs(pixel_values=x)
    cls = told.pooler_output.flatten(1).numpy()
    np.testing.assert_allclose(model.embed_pixels(pixels(2, 64)), cls, atol=1e-5)
    mean = told.last_hidden_state.mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(model.embed_pixels(pixels(2, 64), "mean"), mean, atol=1e-5)


def _pickle(root: Path) -> None:
    (root / "model.safetensors").rename(root / "pytorch_model.bin")


def _code(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.M"}}))


def _unknown(root: Path) -> None:
    (root / "config.json").write_text(json.dumps({"model_type": "whisper"}))


def _missing(root: Path) -> None:
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 24)}, root / "model.safetensors")


def _cut(root: Path) -> None:
    data = (root / "model.safetensors").read_bytes()
    (root / "model.safetensors").write_bytes(data[: len(data) // 2])


def _outside(root: Path) -> None:
    (root / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../other.safetensors"}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))


def _unscaled(root: Path) -> None:
    (root / "preprocessor_config.json").unlink()


def _zero_sd(root: Path) -> None:
    note = {"image_mean": [0, 0, 0], "image_std": [1, 0, 1]}
    (root / "preprocessor_config.json").write_text(json.dumps(note))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "vit"
    transformers_folder(folder, "ViT")
    return folder


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_pickle, "Pickles"),
        (_code, "brings its own code"),
        (_unknown, "of type 'whisper'"),
        (_missing, "would be random"),
        (_cut, "cannot load it"),
        (_outside, "lies outside the folder"),
        (_unscaled, "Set mean and std"),
        (_zero_sd, "three numbers each"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused(
    tmp_path: Path, vit_folder: Path, spoil: Callable[[Path], None], words: str
) -> None:
    root = tmp_path / "m"
    shutil.copytree(vit_folder, root)
    spoil(root)
    with pytest.raises(PathfmError, match=words) as caught:
        load_model(f"hf:{root}")
    assert "\n" not in str(caught.value)


def test_the_digest_follows_tensors_and_config(tmp_path: Path) -> None:
    transformers_folder(tmp_path / "a", "ViT")
    transformers_folder(tmp_path / "b", "ViT", num_attention_heads=3)  # the very same tensors
    a, b = (load_model(str(tmp_path / name)) for name in "ab")
    assert a.digest != b.digest
    (tmp_path / "a").rename(tmp_path / "c")
    assert load_model(str(tmp_path / "c")).digest == a.digest


CODE = """
import torch
from torch import nn

class Summing(nn.Module):
    mean, std, num_prefix_tokens = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 2
    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
    def forward(self, x):
        summed = x.sum(dim=(2, 3))
        return torch.stack([summed, 0 * summed, summed + 1, summed + 3], 1) if self.tokens else summed

def vectors(): return Summing(False)
def tokens(): return Summing(True)
def naked(): return nn.Flatten()
def broken(): raise RuntimeError("no\\nluck")
def number(): return 3
constant = 4
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models_under_test.py").write_text(CODE)
    monkeypatch.delitem(__import__("sys").modules, "my_models_under_test", raising=False)
    return tmp_path


def test_a_python_function_is_a_model(code: Path) -> None:
    vectors = load_model("python:my_models_under_test:vectors", input_px=32)
    x = (pixels().astype(np.float64) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(
        vectors.embed_pixels(pixels()), x.sum(axis=(1, 2)), rtol=1e-4, atol=0.01
    )
    with pytest.raises(PathfmError, match="set pooling to cls"):
        vectors.embed_pixels(pixels(), "mean")
    tokens = load_model("python:my_models_under_test:tokens")
    got = tokens.embed_pixels(pixels(), "cls+mean")
    np.testing.assert_allclose(got[:, 3:] - got[:, :3], 2, atol=0.01)  # mean of +1 and +3
    assert tokens.digest != vectors.digest
    naked = load_model("python:my_models_under_test:naked", mean=HALF, std=HALF)
    assert naked.embed_pixels(pixels(2, 4)).shape == (2, 48)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vectors", "wants python:MODULE:FUNCTION"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("my_models_under_test:nothing", "AttributeError"),
        ("my_models_under_test:broken", "RuntimeError: no luck"),
        ("my_models_under_test:number", "gave a int"),
        ("my_models_under_test:constant", "cannot be called"),
        ("my_models_under_test:naked", "says no `mean`"),
    ],
)
def test_a_function_that_is_no_model_is_told(code: Path, spec: str, words: str) -> None:
    with pytest.raises(PathfmError, match=words) as caught:
        load_model(f"python:{spec}")
    assert "\n" not in str(caught.value)


def test_a_network_that_makes_something_else_is_told() -> None:
    odd = Embedder(
        torch.nn.Identity(),
        lambda x, _: (x, None),
        name="odd",
        weights_note="",
        digest="",
        mean=HALF,
        std=HALF,
    )
    with pytest.raises(PathfmError, match="wanted one vector each"):
        odd.embed_pixels(pixels())


def test_who_names_an_architecture_is_known(vit_folder: Path) -> None:
    assert names_its_architecture(f"hf:{vit_folder}")
    assert names_its_architecture(str(vit_folder))
    assert names_its_architecture("timm:resnet18")
    assert not names_its_architecture("random:3")


def test_without_eva_its_names_are_told() -> None:
    with pytest.raises(PathfmError, match="need kaiko-eva"):
        load_model("eva:pathology/kaiko_vits16")


EVA = """
import sys, numpy as np, torch
from pathfm.models import load_model
from pathfm.runtime import PathfmError
from eva.vision.models.networks.backbones import backbone_registry
name = "universal/vit_small_patch16_224_random"
half = (0.5, 0.5, 0.5)
assert name in backbone_registry.entries()
torch.manual_seed(0)
theirs = backbone_registry.get(name)().eval()
torch.manual_seed(0)
ours = load_model("eva:" + name, mean=half, std=half)
pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
x = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
with torch.inference_mode():
    wanted = theirs(x).numpy()
assert wanted.shape == (2, 384)
np.testing.assert_allclose(ours.embed_pixels(pixels), wanted, atol=1e-4)
for spec, words in (("eva:pathology/kaiko_vits61", "kaiko_vits16"), ("eva:" + name, "mean and std")):
    try:
        load_model(spec)
    except PathfmError as error:
        assert words in str(error), error
    else:
        raise AssertionError(spec)
print("as eva's")
"""


@pytest.mark.slow
def test_a_name_of_eva_s_registry_is_eva_s_model() -> None:
    assert "as eva's" in run_eva(EVA).stdout
