"""Embedding that is killed, shared among ranks, or asked for again: the same features, made once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.datasets import open_dataset
from pathfm.datasets.preparing import in_batches
from pathfm.embed import EmbedConfig, SlideOptions, run, running
from pathfm.embed.parts import Parts
from pathfm.embed.samples import Rows, make_input, scales_to, some_of
from pathfm.embeddings import Embeddings
from pathfm.embeddings.container import from_bf16, to_bf16
from pathfm.models import load_model
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from tests.datasets_mini import MAKERS
from tests.test_datasets_folder import make_folder

QUIET = TrackingConfig(enabled=False)
MODEL = """
import os, time
import torch
from torch import nn

class Slow(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    def forward(self, x):
        with open(os.environ["COUNTED"], "a") as file:
            file.write(f"{os.environ.get('RANK', '0')} {len(x)}\\n")
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        return torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, :, 3, 5]], dim=1)

def make(): return Slow()
"""
DRIVER = """
import sys
import pathfm.embed.parts as parts
parts.ROWS = 8
from pathfm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Bench:
    """A folder with data, a slow model and a driver whose parts are small."""

    root: Path

    @property
    def counted(self) -> list[tuple[int, int]]:
        """(rank, pictures) of each forward pass so far."""
        if not (self.root / "counted").exists():
            return []
        lines = (self.root / "counted").read_text().splitlines()
        return [(int(a), int(b)) for a, b in (line.split() for line in lines)]

    def forget(self) -> None:
        (self.root / "counted").unlink(missing_ok=True)

    def start(self, out: str, *words: str, ranks: int = 1, slow_s: float = 0) -> subprocess.Popen:
        program = [sys.executable]
        if ranks > 1:
            program += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            program += ["--master-port", str(29_500 + os.getpid() % 400)]
        told = ["--data", "data", "--weights", "python:slow_model:make", "--out", out]
        told += ["--precision", "fp32", "--tracking.enabled", "false", "--batch_size", "4"]
        env = {**os.environ, "COUNTED": "counted", "SLOW_S": str(slow_s), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*program, "driver.py", "embed", *told, *words],
            cwd=self.root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *given: str, **named: object) -> str:
        process = self.start(*given, **named)
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said
        return said

    def features(self, out: str) -> Embeddings:
        return Embeddings.load(self.root / out / "backbone.safetensors")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    make_folder(tmp_path / "data", {"a": 31, "b": 22}, size=(40, 32))
    (tmp_path / "slow_model.py").write_text(MODEL)
    (tmp_path / "driver.py").write_text(DRIVER)
    return Bench(tmp_path)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_features_of_one_that_was_not(
    bench: Bench,
) -> None:
    bench.finish("whole", "--input_px", "32")
    whole = bench.features("whole")
    assert sum(n for _, n in bench.counted) == 53
    bench.forget()
    for more in (2, 3):
        process = bench.start("killed", "--input_px", "32", slow_s=0.2)
        before = len(list(bench.root.glob("killed/store/*.parts/part-*.npy")))
        deadline = time.monotonic() + 240
        while len(list(bench.root.glob("killed/store/*.parts/part-*.npy"))) < before + more:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (bench.root / "killed" / "backbone.safetensors").exists()
    bench.forget()
    bench.finish("killed", "--input_px", "32")
    assert 0 < sum(n for _, n in bench.counted) <= 53 - 5 * 8  # five parts were kept
    after = bench.features("killed")
    np.testing.assert_array_equal(after.features, whole.features)
    assert (after.paths, after.info.key) == (whole.paths, whole.info.key)
    left = [p.name for p in (bench.root / "killed" / "store").iterdir()]
    assert left == [f"{whole.info.key}.safetensors"]


@pytest.mark.slow
def test_two_ranks_share_the_work_and_write_what_one_would(bench: Bench) -> None:
    bench.finish("alone", "--input_px", "32")
    bench.forget()
    said = bench.finish("shared", "--input_px", "32", ranks=2)
    made = bench.counted
    assert sum(n for _, n in made) == 53  # nothing twice
    assert {rank for rank, _ in made} == {0, 1}
    assert said.count("-> shared/backbone.safetensors") == 1
    np.testing.assert_array_equal(
        bench.features("shared").features, bench.features("alone").features
    )
    bench.forget()
    assert "up to date" in bench.finish("shared", "--input_px", "32", ranks=2)
    assert bench.counted == []


@pytest.mark.slow
def test_what_fails_on_one_rank_ends_both_on_one_line(bench: Bench) -> None:
    (bench.root / "data" / "b" / "21.png").write_bytes(b"broken")
    process = bench.start("bad", "--input_px", "32", ranks=2)
    said, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert said.count("21.png: not a readable picture") >= 1


def config(tmp_path: Path, data: Path, **change: object) -> EmbedConfig:
    told = {
        "data": data,
        "weights": "random:1",
        "out": tmp_path / "out",
        "input_px": 32,
        "precision": "fp32",
        "tracking": QUIET,
    }
    return EmbedConfig(**(told | change))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones of a few thousand weights."""
    tiny = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(running, "load_model", lambda *given: load_model(*given, **tiny))


def test_features_of_the_same_key_are_computed_once_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_folder(tmp_path / "d", {"a": 4, "b": 3})
    first = run(config(tmp_path, data, name="one"))
    with monkeypatch.context() as patched:
        patched.setattr(running, "compute_parts", None)
        again = run(config(tmp_path, data, name="two"))
        shared = {"out": tmp_path / "other", "store": tmp_path / "out" / "store"}
        third = run(config(tmp_path, data, name="three", **shared))
    assert again.skipped and third.skipped and not first.skipped
    assert first.path.samefile(again.path) and first.path.samefile(third.path)
    assert Embeddings.load(again.path).info.name == "two"
    assert Embeddings.load(third.path).info.name == "three"
    for change in ({"pooling": "cls+mean"}, {"mean": (0.1, 0.2, 0.3)}, {"storage": "bf16"}):
        other = run(config(tmp_path, data, name="one", **change))
        assert not other.skipped
    assert len(list((tmp_path / "out" / "store").iterdir())) == 4


def test_a_store_on_a_disk_without_links_is_copied_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    result = run(config(tmp_path, make_folder(tmp_path / "d", {"a": 4, "b": 3})))
    assert len(Embeddings.load(result.path).labels) == 7


def test_half_precision_on_disk_is_the_full_one_rounded(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "d", {"a": 4, "b": 3})
    full, half = (
        Embeddings.load(run(config(tmp_path, data, name=s, storage=s)).path)
        for s in ("fp32", "bf16")
    )
    np.testing.assert_array_equal(half.features, from_bf16(to_bf16(full.features)))
    sizes = [(tmp_path / "out" / f"{s}.safetensors").stat().st_size for s in ("fp32", "bf16")]
    assert sizes[0] - sizes[1] == pytest.approx(7 * 24 * 2, abs=16)


def test_a_public_data_set_keeps_its_splits_and_patients(tmp_path: Path) -> None:
    root = MAKERS["bach"](tmp_path / "bach")
    result = run(config(tmp_path, Path(f"bach={root}"), per_class=3))
    got, whole = Embeddings.load(result.path), open_dataset(f"bach={root}")
    assert got.classes == whole.classes
    assert sorted(set(got.splits)) == ["train", "val"]
    assert len(got.labels) == 4 * 2 * 3
    at = [whole.paths.index(path) for path in got.paths]
    assert got.splits == tuple(whole.splits[i] for i in at)
    np.testing.assert_array_equal(got.labels, whole.labels[at])


def test_a_table_of_pictures_with_groups_is_read(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "d", {"a": 2, "b": 2})
    rows = ["path,label,group", "a/00.png,x,p1", "a/01.png,x,", "b/00.png,y,p2", "b/01.png,y,p1"]
    (data / "table.csv").write_text("\n".join(rows) + "\n")
    got = Embeddings.load(run(config(tmp_path, data / "table.csv")).path)
    assert got.groups == ("p1", "a/01.png", "p2", "p1")  # who is unknown is alone
    assert (got.classes, got.splits) == (("x", "y"), ())
    assert Rows.of(open_dataset(data)).groups == ()


def test_parts_that_are_torn_or_foreign_are_made_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "p", 2500, "fp32")
    assert (len(parts), parts.missing(), list(parts.rows(2))) == (
        3,
        [0, 1, 2],
        [*range(2048, 2500)],
    )
    table = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)
    for number in range(3):
        parts.write(number, table[parts.rows(number).start : parts.rows(number).stop])
    assert (parts.missing(), parts.shape()) == ([], (2500, 3))
    np.testing.assert_array_equal(np.concatenate([*parts.blocks()]), table)
    parts.path(0).write_bytes(parts.path(0).read_bytes()[:5000])
    parts.path(1).write_bytes(b"")
    np.save(parts.path(2), table[:452].astype(np.float64))
    assert parts.missing() == [0, 1, 2]
    np.save(parts.path(2), np.array([{}], object), allow_pickle=True)
    assert parts.missing() == [0, 1, 2]  # and nothing was unpickled
    for number, width in ((0, 3), (1, 2), (2, 3)):
        rows = parts.rows(number)
        parts.write(number, np.zeros((len(rows), width), np.float32))
    with pytest.raises(PathfmError, match="widths 2, 3"):
        parts.shape()
    parts.remove()
    assert not parts.folder.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"weights": "timm:resnet18", "backbone": "resnet18"},
            "backbone = 'resnet18' has no effect",
        ),
        ({"slides": SlideOptions(min_foreground=0.1)}, "is no corpus"),
        ({"mpp": 1.0}, "Set data_mpp"),
        ({"mpp": 0.5, "data_mpp": 2.0}, "enlarge pictures of 2 µm/px 4 times"),
        ({"mpp": 1.0, "data_mpp": 0.5}, "less than input_px = 32. Set input_px to 10"),
        ({"input_px": 40}, "no multiple of the 16 px"),
        ({"data": Path("no/such")}, "neither a folder"),
    ],
)
def test_settings_that_make_no_sense_are_told(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    data = make_folder(tmp_path / "d", {"a": 2, "b": 2})
    with pytest.raises(PathfmError, match=words) as caught:
        run(config(tmp_path, **({"data": data} | change)))
    assert "\n" not in str(caught.value)


def test_slides_and_masks_are_not_taken_for_pictures(tmp_path: Path) -> None:
    root = MAKERS["consep"](tmp_path / "consep")
    with pytest.raises(PathfmError, match="segmentation data set is not embedded"):
        # a miniature copy has fewer pictures than the published set: opened as a table's peer would
        running._refuse_other_tasks(open_dataset("consep", root, partial=True))


@pytest.mark.parametrize(("own", "asked"), [(0.5, 1.0), (0.5, 0.5), (0.42, 0.3)])
def test_a_picture_at_another_mpp_is_pil_s_resize_and_the_centre(
    tmp_path: Path, own: float, asked: float
) -> None:
    data = make_folder(tmp_path / "d", {"a": 1, "b": 1}, size=(83, 70))
    samples = open_dataset(data)
    scales = scales_to(samples, asked, own)
    assert scales is not None
    got = make_input(samples, 0, 32, float(scales[0]))
    image = Image.open(data / "a" / "00.png")
    width, height = round(83 * own / asked), round(70 * own / asked)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    np.testing.assert_array_equal(got, resized[top : top + 32, left : left + 32])


def test_the_same_pictures_at_two_mpp_are_two_keys_and_one_set_of_rows(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "d", {"a": 3, "b": 3}, size=(83, 70))
    got = [
        Embeddings.load(run(config(tmp_path, data, name=f"m{m:g}", mpp=m, data_mpp=0.5)).path)
        for m in (0.5, 1.0)
    ]
    assert got[0].paths == got[1].paths
    assert got[0].info.key != got[1].info.key
    assert [e.info.mpp for e in got] == [0.5, 1.0]


def test_all_unreadable_pictures_are_counted_and_some_named() -> None:
    def make(i: int) -> np.ndarray:
        if i % 3 == 2:
            raise PathfmError(f"{i}.png: broken")
        return np.full((2, 2, 3), i, np.uint8)

    batches = [range(at, min(at + 4, 18)) for at in range(0, 18, 4)]
    with pytest.raises(
        PathfmError, match=r"6 of 18 pictures .* 2\.png: broken \| 5\.png"
    ) as caught:
        list(in_batches(make, batches, 2))
    assert str(caught.value).endswith("and 3 more")
    only = [range(3, 5), range(5, 7)]
    with pytest.raises(PathfmError, match=r"^5\.png: broken$"):
        list(in_batches(make, only, 2))
    good = list(in_batches(lambda i: np.full((1, 1, 3), i, np.uint8), [[0, 1], [2]], 2))
    assert [len(batch) for batch in good] == [2, 1]
    assert list(in_batches(make, [], 2)) == []


def test_some_of_each_class_and_split_by_seed(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for split, n in (("train", 6), ("val", 4)):
        make_folder(root / split, {"a": n, "b": n})
    samples = open_dataset(root)
    some = some_of(samples, 3, seed=0)
    cells = sorted(zip(some.splits, some.labels.tolist(), strict=True))
    assert cells == [(s, c) for s in ("train", "val") for c in (0, 1) for _ in range(3)]
    assert some_of(samples, 3, seed=0).paths == some.paths
    assert some_of(samples, 3, seed=1).paths != some.paths
    shutil.rmtree(root / "val")


@pytest.mark.parametrize("broken", [1, 2])
def test_damaged_pictures_point_to_the_verb_that_names_all(tmp_path: Path, broken: int) -> None:
    data = make_folder(tmp_path / "d", {"a": 3, "b": 3})
    for file in sorted((data / "b").iterdir())[:broken]:
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(PathfmError, match="not a readable picture") as caught:
        run(config(tmp_path, data))
    assert str(caught.value).endswith(f"`pathfm check-data {data} --read True` names all")
