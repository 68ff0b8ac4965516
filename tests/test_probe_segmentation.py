"""The verb `probe-segmentation`, and how it cuts and resizes pictures with their masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm import cli
from pathfm.backbone import export_backbone, load_backbone
from pathfm.leakage import PretrainedOn, Stage, digest_batch
from pathfm.models import load_model
from pathfm.models.maps import embed_maps, token_maps
from pathfm.probe_segmentation import ProbeSegmentationConfig, run
from pathfm.runtime import PathfmError
from pathfm.segmentation_probe.pictures import fit_mask, read_pictures, tiles
from pathfm.tracking import TrackingConfig
from tests.conftest import noise
from tests.datasets_mini import MAKERS


@pytest.mark.parametrize(
    ("height", "width", "size"), [(250, 250, 224), (37, 52, 32), (64, 30, 48), (20, 33, 20)]
)
def test_a_mask_is_resized_as_eva_s_transform_does(height: int, width: int, size: int) -> None:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    mask = np.random.default_rng(0).integers(0, 6, (height, width)).astype(np.uint8)
    theirs = v2.Compose([v2.Resize(size=size), v2.CenterCrop(size=size)])
    wanted = theirs(tv_tensors.Mask(torch.from_numpy(mask.astype(np.int64))))
    assert np.array_equal(fit_mask(mask, size), wanted.numpy())


def test_tiles_are_whole_squares_row_by_row_of_picture_and_mask_alike() -> None:
    mask = np.arange(7 * 11, dtype=np.uint8).reshape(7, 11)
    pixels = np.repeat(mask[..., None], 3, axis=2)
    found = list(tiles(pixels, mask, 3))
    assert [int(m[0, 0]) for _, m in found] == [0, 3, 6, 33, 36, 39]
    for part, m in found:
        assert np.array_equal(part[..., 1], m)
        assert m.shape == (3, 3)
    assert len(list(tiles(pixels, mask, 0))) == 1
    with pytest.raises(PathfmError, match="11 x 7 px holds no tile of 8 px"):
        next(tiles(pixels, mask, 8))
    with pytest.raises(PathfmError, match=r"a mask \(7, 10\) for a picture \(7, 11\)"):
        next(tiles(pixels, mask[:, :-1], 3))


def config(data: str, out: Path, **changes: object) -> ProbeSegmentationConfig:
    given = {
        "data": data,
        "weights": ["random"],
        "names": ["untrained"],
        "out": out,
        "n_runs": 2,
        "steps": 3,
        "batch": 4,
        "input_px": 32,
        "tile_px": 20,
        "partial": True,
        "device": "cpu",
        "tracking": TrackingConfig(enabled=False),
    }
    return ProbeSegmentationConfig(**given | changes)  # type: ignore[arg-type]


def test_consep_is_cut_into_tiles_and_reported_on_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["consep"](tmp_path / "consep")
    given = config(f"consep={tmp_path / 'consep'}", tmp_path / "out")
    result = run(given)
    said = capsys.readouterr().out
    assert "consep: 12 pictures of 32 px reported: val (it chose the epoch too)" in said
    assert [m.protocol for m in result.models] == ["conv", "mlp", "linear"]
    assert result.models[2].parameters == 192 * 5 + 5
    held = json.loads((tmp_path / "out" / "segmentation_probe.json").read_text())
    assert held["models"][0]["values"] == result.models[0].values
    assert set(held["models"][0]["per_class"]) == {*result.classes}
    eva = json.loads((tmp_path / "out" / "untrained.conv.results.json").read_text())["metrics"]
    assert eva["test"] == []
    assert eva["val"][0]["val/MonaiDiceScore"]["values"] == result.models[0].values
    run(given)
    assert "is up to date" in capsys.readouterr().out


def test_monusac_s_ambiguous_pixels_are_no_class_and_count_as_eva_counts_them(
    tmp_path: Path,
) -> None:
    MAKERS["monusac"](tmp_path / "monusac")
    data = f"monusac={tmp_path / 'monusac'}"
    changes = {"tile_px": 0, "heads": ("linear",), "n_runs": 1}
    as_eva = run(config(data, tmp_path / "a", **changes))
    strict = run(config(data, tmp_path / "b", eva_ignore=False, **changes))
    assert as_eva.classes[-1] == "Macrophage"
    assert len(as_eva.classes) == 5
    assert "Ambiguous" in as_eva.caveats[-1]
    assert strict.models[0].mean >= as_eva.models[0].mean


def test_pictures_and_masks_of_a_data_set_come_at_the_input_size(tmp_path: Path) -> None:
    from pathfm.datasets import open_dataset

    MAKERS["consep"](tmp_path)
    data = open_dataset(f"consep={tmp_path}", partial=True)
    whole = read_pictures(data, 40, 40)  # pictures of 60 x 40 hold one tile of 40
    assert whole.pixels.shape == (5, 40, 40, 3)
    assert whole.splits == data.splits
    for i in range(5):
        assert np.array_equal(whole.pixels[i], data.read(i)[:40, :40])
        assert np.array_equal(whole.masks[i], data.mask(i)[:40, :40])


def test_mistakes_are_one_line_and_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS["consep"](tmp_path / "consep")
    MAKERS["bach"](tmp_path / "bach")

    def told(data: str, *words: str) -> str:
        given = ["probe-segmentation", "--data", f"{data}={tmp_path / data}", "--weights", "random"]
        out = ["--out", str(tmp_path / "o"), "--tracking.enabled", "false"]
        code = cli.main([*given, *out, *words])
        error = capsys.readouterr().err.strip()
        assert code == 2
        assert "\n" not in error
        return error

    assert "consep" in told("consep")  # a copy with other counts than the published ones
    partial = ("--partial", "true")
    assert "a classification data set, it has no masks" in told("bach", *partial)
    assert "holds no tile of 250 px" in told("consep", *partial)
    assert "input_px = 40 is no multiple" in told("consep", *partial, "--input_px", "40")
    assert "give each one of its own" in told("consep", *partial, "--names", "a", "b")
    whole = (*partial, "--tile_px", "0", "--input_px", "32")
    assert "has 12 blocks, wants 1 to that many" in told("consep", *whole, "--last_blocks", "13")
    assert "gives one vector a picture, no patch tokens" in told(
        "consep", *whole, "--weights", "python:tests.test_probe_segmentation:one_vector"
    )
    assert "tokens of its last block only" in told(
        "consep",
        *whole,
        "--weights",
        "python:tests.test_probe_segmentation:tokens",
        "--last_blocks",
        "2",
    )


# --- models from elsewhere ------------------------------------------------------------------------


class Tokens(torch.nn.Module):
    """Each 8 px cell's mean colour and its place, behind a CLS token: tokens that can be worked out."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, patches: bool = True) -> None:
        super().__init__()
        self.patches = patches
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(x, 8) * self.weight
        flat = cells.flatten(2).transpose(1, 2)
        found = torch.cat([flat.mean(1, keepdim=True), flat], 1)
        return found if self.patches else found[:, 0]


def tokens() -> Tokens:
    return Tokens()


def one_vector() -> Tokens:
    return Tokens(patches=False)


def test_a_function_s_tokens_become_a_map_row_by_row() -> None:
    model = load_model("python:tests.test_probe_segmentation:tokens", input_px=32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    (found,) = embed_maps(model, [pixels], torch.device("cpu"))
    assert found.shape == (2, 3, 4, 4)
    wanted = pixels[1, 8:16, 24:32].reshape(-1, 3).mean(axis=0) / 255
    assert np.allclose(found[1, :, 1, 3], wanted, atol=1e-6)
    with pytest.raises(PathfmError, match=r"made tokens .*: no square map"):
        token_maps(model, torch.zeros(1, 3, 16, 24))


@pytest.mark.slow
def test_a_transformers_folder_gives_its_last_tokens_less_cls(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    theirs = transformers.ViTModel(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        wanted = theirs(pixel_values=x).last_hidden_state[:, 1:].reshape(2, 4, 4, 16)
    (found,) = embed_maps(load_model(f"hf:{tmp_path}"), [pixels], torch.device("cpu"))
    assert np.allclose(found, wanted.permute(0, 3, 1, 2).numpy(), atol=1e-5)


# --- a folder of one's own ------------------------------------------------------------------------


def painted(root: Path, names: str, seed: int = 0) -> None:
    """Pictures whose 8 px cells are bright where the mask is 1: what a linear head must find."""
    rng = np.random.default_rng(seed)
    for name in names:
        mask = np.kron(rng.integers(0, 2, (4, 4)), np.ones((8, 8), np.int64)).astype(np.uint8)
        pixels = (60 + 120 * mask[..., None] + rng.integers(0, 40, (32, 32, 3))).astype(np.uint8)
        for kind, values in (("images", pixels), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / kind / f"{name}.png")


OWN = {"partial": False, "tile_px": None, "heads": ("linear",), "steps": 40, "lr": 0.05}
PYTHON = "python:tests.test_probe_segmentation:tokens"


def test_a_folder_without_splits_is_folded_and_every_picture_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    painted(tmp_path / "d", "abcdef")
    result = run(config(str(tmp_path / "d"), tmp_path / "out", weights=[PYTHON], **OWN))
    said = capsys.readouterr().out
    assert "6 pictures of 32 px reported: 5 folds by patient (another fold chose the" in said
    assert result.models[0].mean > 0.85  # the linear head is upsampled over the cells' edges
    assert result.classes == ["background", "class 1"]
    assert len(result.models[0].values) == 2
    caveats = " ".join(result.caveats)
    assert "does not say whose its pictures are" in caveats
    assert "its last norm is in them" in caveats
    changes = OWN | {"weights": [PYTHON], "n_folds": 3, "steps": 2}
    three = run(config(str(tmp_path / "d"), tmp_path / "out", **changes))
    assert three.told.startswith("3 folds")


def test_a_folder_with_splits_is_reported_on_its_test_pictures(tmp_path: Path) -> None:
    for number, (split, names) in enumerate({"train": "abcd", "val": "ef", "test": "ghi"}.items()):
        painted(tmp_path / "d" / split, names, number)
    result = run(config(str(tmp_path / "d"), tmp_path / "out", weights=[PYTHON], **OWN))
    assert (result.n, result.told) == (3, "test (val chose the epoch)")
    both = {"weights": [PYTHON, "random"], "names": ["untrained", "vit"]}
    pair = run(config(str(tmp_path / "d"), tmp_path / "two", **OWN | both)).paired[0]
    held = json.loads((tmp_path / "two" / "segmentation_probe.json").read_text())
    means = [model["mean"] for model in held["models"]]
    assert (pair.baseline, pair.other) == ("untrained", "vit")
    assert pair.mean == pytest.approx(means[1] - means[0])
    assert pair.interval[0] <= pair.mean <= pair.interval[1]
    assert held["paired"][0]["interval"] == pair.interval
    eva = json.loads((tmp_path / "out" / "untrained.linear.results.json").read_text())["metrics"]
    assert eva["test"][0]["test/MonaiDiceScore"]["values"] == result.models[0].values


def test_pictures_of_background_alone_are_nothing_to_judge(tmp_path: Path) -> None:
    painted(tmp_path / "d" / "train", "abc")
    painted(tmp_path / "d" / "val", "de", 1)
    for name in "de":
        Image.new("L", (32, 32)).save(tmp_path / "d" / "val" / "masks" / f"{name}.png")
    with pytest.raises(PathfmError, match="none of 2 reported pictures holds a class beside 'back"):
        run(config(str(tmp_path / "d"), tmp_path / "out", weights=[PYTHON], **OWN))


# --- leaks ----------------------------------------------------------------------------------------


def test_a_reported_picture_that_the_model_had_seen_is_refused_or_marked(tmp_path: Path) -> None:
    for split, names in {"train": "abc", "val": "de", "test": "fg"}.items():
        root = tmp_path / "d" / split
        for name in names:
            (root / "images").mkdir(parents=True, exist_ok=True)
            (root / "masks").mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise((64, 64), ord(name))).save(root / "images" / f"{name}.png")
            Image.fromarray(np.eye(64, dtype=np.uint8)).save(root / "masks" / f"{name}.png")
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    model = load_backbone("vit_tiny_patch16_224", "random", 32, **size)
    given = OWN | {"tile_px": 32, "steps": 2, "n_runs": 1}

    def probed(seen: list[np.ndarray], leaks: str) -> list[str]:
        folder = tmp_path / "model"
        export_backbone(model, folder)
        stage = Stage("my corpus", "00" * 32, draws=1)
        digests = digest_batch(np.stack(seen))
        PretrainedOn((stage,), np.zeros((0, 16), np.uint8), (), digests).save(folder)
        changes = given | {"weights": [str(folder)], "leaks": leaks}
        return run(config(str(tmp_path / "d"), tmp_path / "out", **changes)).caveats

    only_learnt = [noise((64, 64), ord("a"))]
    marked = " ".join(probed(only_learnt, "refuse"))
    assert "pretraining data" not in marked
    whole = [noise((64, 64), ord("g"))[:, ::-1]]
    with pytest.raises(PathfmError, match=r"4 of 8 samples .*test/images/g\.png.*--leaks mark"):
        probed(whole, "refuse")
    tile = [noise((64, 64), ord("f"))[32:, :32]]
    marked = " ".join(probed(tile, "mark"))
    assert "untrained: 1 of 8 samples were in the pretraining data (my corpus)" in marked
