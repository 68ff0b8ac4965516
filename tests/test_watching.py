"""A run sees itself: features, probe, collapse, pictures; and learns the same as when nobody looks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from pathfm.backbone import load_backbone
from pathfm.datasets import scan_folder, stratified_split
from pathfm.metrics import rankme
from pathfm.pretrain import ViewsConfig
from pathfm.pretrain.collapse import CollapseWatch, Expected, feature_std
from pathfm.pretrain.curves import Curves
from pathfm.pretrain.embedding import embed_patches, evaluating, share_of, whole_patch
from pathfm.pretrain.probing import choose_pictures, fit_and_score
from pathfm.pretrain.showing import save_classes
from pathfm.pretrain.watch_settings import CollapseConfig, WatchConfig
from pathfm.pretrain.watching import Watch, gpu_memory
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig, open_run, read_metrics
from pathfm.views.render import make_views
from tests.rank_threads import run_ranks


@dataclass
class Batch:
    pixels: NDArray[np.uint8]
    draws: NDArray[np.int64]
    refs: list[Any] = field(default_factory=list)


def batch(n: int, size_px: int = 48, seed: int = 0) -> Batch:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size_px, size_px, 3), np.uint8)
    refs = [SimpleNamespace(slide_id=f"slide{i % 3}", mpp=0.5 * (1 + i % 2)) for i in range(n)]
    return Batch(pixels, np.arange(n), refs)


def trainer(steps: int = 12, done: int = 0, **changes: Any) -> SimpleNamespace:
    """What the loop shows of itself, small."""
    backbone = load_backbone("vit_tiny_patch16_224", "random:1", embed_dim=24, depth=2, num_heads=2)
    small = {"global_1": {"size_px": 32}, "global_2": {"size_px": 32}, "local": {"size_px": 16}}
    config = SimpleNamespace(
        seed=5,
        steps=steps,
        method="dino",
        backbone="vit_tiny_patch16_224",
        batch_size=8,
        dino=SimpleNamespace(out_dim=64),
        views=ViewsConfig(**small, n_local=2),
        optim=SimpleNamespace(warmup_steps=0),
        tracking=TrackingConfig(enabled=False),
    )
    config.__dict__.update(changes)
    return SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        precision="fp32",
        method=SimpleNamespace(exported=backbone),
        done=SimpleNamespace(step=done),
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of pictures, 20, 26 and 32, told apart by their colour, with noise."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(3)
    rows = ["path,group"]
    for number, name in enumerate(("a", "b/?".replace("/?", "b"), "c")):
        (root / name).mkdir()
        for i in range(20 + 6 * number):
            pixels = rng.integers(0, 130, (32, 36, 3))
            pixels[..., number] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02}.png")
            rows.append(f"{name}/{i:02}.png,{name}{i // 2}")
    (root / "groups.csv").write_text("\n".join(rows))
    return root


def watch_config(labelled: Path | None = None, **changes: Any) -> WatchConfig:
    small = {"every_steps": 3, "pictures_every_steps": 6, "probe_every_steps": 4, "probe_px": 32}
    small["curves"] = False
    return WatchConfig(**(small | {"probe_folder": labelled, "batch_size": 5} | changes))


def numbers(step: int) -> dict[str, float]:
    return {"loss": 4.0 - 0.01 * step, "lr": 1e-3, "grad_norm": 1.0, "patches_per_s": 50.0}


def drive(
    watch: Watch, given: SimpleNamespace, run: Any, first: int, until: int
) -> dict[int, dict[str, float]]:
    """Steps as the loop does them; what the watch added to each."""
    added = {}
    for step in range(first, until):
        metrics = numbers(step)
        added[step] = watch.after_step(step, given, batch(8, seed=step), metrics)
        given.done.step = step + 1
        if run is not None:
            run.log(step, **metrics, **added[step])
    return added


def test_shares_of_all_ranks_hold_every_row_in_order_and_are_equally_long():
    for n in range(1, 40):
        for world in range(1, 9):
            shares = [share_of(n, Ranks(r, world, r)) for r in range(world)]
            assert len({len(share) for share in shares}) == 1
            assert np.concatenate(shares)[:n].tolist() == list(range(n))


def test_features_are_those_of_whole_patches_whatever_the_batch_and_the_ranks(monkeypatch):
    given, patches = trainer(), batch(11)
    backbone = given.method.exported
    (view,) = make_views(
        torch.from_numpy(patches.pixels),
        patches.draws,
        [whole_patch(32)],
        seed=9,  # of no consequence: nothing is drawn
        mean=backbone.mean,
        std=backbone.std,
    )
    with torch.no_grad():
        wanted = backbone.embed(view).numpy()
    for size in (1, 4, 11, 64):
        got = embed_patches(given, patches, Ranks(), size)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    for got in run_ranks(
        monkeypatch, 3, lambda r: embed_patches(given, patches, Ranks(r, 3, r), 2)
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_looking_leaves_modes_gradients_buffers_and_random_numbers_alone(labelled, tmp_path):
    given = trainer()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 3, 2), torch.nn.BatchNorm2d(24))
    pool = torch.nn.Sequential(net, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pool.train()
    net[1].eval()  # a part that its owner froze
    backbone = given.method.exported
    pool.embed = pool.forward  # type: ignore[assignment]
    pool.mean, pool.std = backbone.mean, backbone.std
    given.method.exported = pool
    before = {name: tensor.clone() for name, tensor in pool.state_dict().items()}
    torch.manual_seed(4)
    state, flags = torch.get_rng_state(), [part.training for part in pool.modules()]
    watch = Watch(watch_config(labelled), tmp_path, None, Ranks())
    watch.begin(given, batch(9))
    drive(watch, given, None, 0, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in pool.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in pool.parameters())


def test_modes_are_put_back_also_when_embedding_fails():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(3))
    module[1].eval()
    seen = []

    def look() -> None:
        with evaluating(module):
            seen.extend(part.training for part in module.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look()
    assert seen == [False] * 3
    assert [part.training for part in module.modules()] == [True, True, False]


def test_the_test_part_of_the_folder_is_never_opened(labelled, monkeypatch):
    from pathfm.datasets import folder as reading
    from pathfm.datasets import preparing
    from pathfm.pretrain.probing import InTrainingProbe

    folder = scan_folder(labelled)
    outer = stratified_split(folder.labels, 0.3, 0, 0, folder.groups)
    opened: list[Path] = []
    real: Callable[..., Any] = reading.read_picture
    monkeypatch.setattr(
        preparing, "read_picture", lambda path: (opened.append(path), real(path))[1]
    )
    config = watch_config(labelled, probe_max_per_class=1000)
    probe = InTrainingProbe(config, Ranks())
    names = {path.relative_to(labelled).as_posix() for path in opened}
    assert names == {folder.paths[i] for i in outer.train}
    assert probe.data.n_test == len(outer.test) > 0
    groups = probe.data.folder.groups
    assert not {groups[i] for i in probe.data.fit} & {groups[i] for i in probe.data.validation}


def test_the_split_is_bounded_by_class_and_repeats_itself(labelled):
    config = watch_config(labelled, probe_max_per_class=10)
    one, two = choose_pictures(config), choose_pictures(config)
    assert one.folder.paths == two.folder.paths
    assert one.digest == two.digest
    fit = np.bincount(one.folder.labels[one.fit])
    assert fit.tolist() == [7, 7, 7]
    assert (np.bincount(one.folder.labels[one.validation]) <= 3).all()
    other = choose_pictures(config.model_copy(update={"probe_seed": 1}))
    assert other.folder.paths != one.folder.paths


def test_scores_are_scikit_learns(labelled):
    data = choose_pictures(watch_config(labelled))
    rng = np.random.default_rng(0)
    labels = data.folder.labels
    features = rng.normal(size=(len(labels), 12)).astype(np.float32)
    features[:, 0] += labels  # some class in one direction, not all
    config = watch_config(labelled, probe_k=5, probe_c=0.05)
    got = fit_and_score(features, data, config)
    fit, validation = data.fit, data.validation
    near = KNeighborsClassifier(5, metric="cosine").fit(features[fit], labels[fit])
    truth = labels[validation]
    assert got.knn == pytest.approx(
        balanced_accuracy_score(truth, near.predict(features[validation]))
    )
    scale = StandardScaler().fit(features[fit].astype(np.float64))
    linear = LogisticRegression(C=0.05, max_iter=5000, tol=1e-8)
    linear.fit(scale.transform(features[fit]), labels[fit])
    decided = linear.predict(scale.transform(features[validation]))
    assert got.logistic == pytest.approx(balanced_accuracy_score(truth, decided))
    assert 0.2 < got.logistic < 1.0
    assert np.mean(got.recall) == pytest.approx(got.logistic)


def test_features_that_are_not_finite_score_nothing_and_are_a_collapse(labelled, tmp_path):
    given = trainer()
    with torch.no_grad():
        next(given.method.exported.parameters()).fill_(float("nan"))
    watch = Watch(watch_config(labelled), tmp_path, None, Ranks())
    watch._numbers["start"] = {"rankme": 9.0, "feature_std": 0.5}
    given.done.step = 3  # goes on
    watch.begin(given, batch(9))
    added = drive(watch, given, None, 3, 12)
    assert added[3]["probe_knn"] == 0.0
    assert math.isnan(added[5]["rankme"])
    assert watch.end(given)["collapsed_at_step"] == 6


def test_feature_std_is_one_on_a_sphere_and_zero_in_a_point():
    rng = np.random.default_rng(1)
    sphere = rng.normal(size=(20_000, 32)) * rng.uniform(
        0.1, 9, (20_000, 1)
    )  # lengths do not count
    assert feature_std(sphere) == pytest.approx(1.0, abs=0.01)
    assert feature_std(np.ones((50, 8)) * np.arange(1, 51)[:, None]) == pytest.approx(0, abs=1e-12)
    by_hand = np.array([[2.0, 0.0], [0.0, 5.0]])  # unit vectors e1, e2: sd 0.5 in both dimensions
    assert feature_std(by_hand) == pytest.approx(math.sqrt(2) * 0.5)


EXPECTED = Expected(log_k=math.log(64), chance=math.log(64), n_targets=16, warmup_steps=4)
HEALTHY = {
    "loss": 3.0,
    "rankme": 80.0,
    "feature_std": 0.5,
    "teacher_entropy": 1.5,
    "teacher_marginal_entropy": 3.0,
    "teacher_information": 1.5,
}
START = {"rankme": 100.0, "feature_std": 0.6}


@pytest.mark.parametrize(
    ("rule", "sick"),
    [
        ("rankme", {"rankme": 49.9}),
        ("feature_std", {"feature_std": 0.059}),
        ("one_target", {"teacher_marginal_entropy": 0.69, "teacher_entropy": 0.5}),
        ("no_information", {"teacher_information": 0.01}),
        ("flat_target", {"teacher_entropy": math.log(64) - 1e-3, "loss": 5.0}),
        ("chance", {"loss": math.log(64) + 0.04}),
    ],
)
def test_each_collapse_is_said_once_with_number_bound_and_remedy(rule, sick):
    watch = CollapseWatch(CollapseConfig(patience_steps=3))
    for done in range(1, 20):
        assert watch.see(done, HEALTHY, START, EXPECTED) == []
    found = [f for done in range(20, 40) for f in watch.see(done, HEALTHY | sick, START, EXPECTED)]
    (finding,) = found
    assert finding.rule == rule
    assert finding.step == watch.first_step == (20 if rule in START else 22)  # patience of 3 steps
    value = next(iter(sick.values()))
    assert f"{value:.4g}"[:4] in finding.line
    assert "To mend: " in finding.line
    assert "\n" not in finding.line


def test_sharp_targets_count_only_where_nobody_tells_their_mean():
    sick = {"loss": 1.0, "teacher_entropy": 1e-4}
    alone = CollapseWatch(CollapseConfig(patience_steps=1))
    assert [f.rule for f in alone.see(9, sick, {}, EXPECTED)] == ["sharp_target"]
    beside = CollapseWatch(CollapseConfig(patience_steps=1))
    # hard assignments, but to as many prototypes as the batch can reach: no collapse
    assert beside.see(9, sick | {"teacher_marginal_entropy": 2.7}, {}, EXPECTED) == []


def test_chance_and_flat_targets_are_no_news_during_the_warm_up():
    watch = CollapseWatch(CollapseConfig(patience_steps=1))
    at_chance = {"loss": math.log(64), "teacher_entropy": math.log(64), "teacher_information": 0.0}
    assert watch.see(4, at_chance, {}, EXPECTED) == []
    assert {f.rule for f in watch.see(5, at_chance, {}, EXPECTED)} == {
        *("chance", "flat_target", "no_information")
    }


def test_an_interruption_does_not_change_when_collapse_is_found():
    sick = HEALTHY | {"loss": math.log(64)}
    watch = CollapseWatch(CollapseConfig(patience_steps=5))
    found = []
    for done in range(8, 20):
        found += watch.see(done, sick, START, EXPECTED)
        watch = CollapseWatch(CollapseConfig(patience_steps=5), json.loads(json.dumps(watch.state)))
    assert [(f.rule, f.step) for f in found] == [("chance", 12)]


def test_what_is_expected_follows_from_the_config():
    assert Expected.of(trainer().config) == Expected(math.log(64), math.log(64), 16, 0)
    contrast = trainer(
        method="simclr", simclr=SimpleNamespace(), views=ViewsConfig(n_local=0)
    ).config
    assert Expected.of(contrast) == Expected(None, math.log(15), 16, 0)


def test_a_run_leaves_numbers_pictures_and_a_child_run(labelled, tmp_path):
    given = trainer()
    with open_run(given.config.tracking, tmp_path, {}) as run:
        watch = Watch(watch_config(labelled, curves=True), tmp_path, run, Ranks())
        with watch:
            watch.begin(given, batch(9))
            added = drive(watch, given, run, 0, 12)
            facts, summary = watch.facts(), watch.end(given)
    assert [step for step, row in added.items() if "rankme" in row] == [2, 5, 8, 11]
    assert [step for step, row in added.items() if "probe_knn" in row] == [3, 7, 11]
    features = embed_patches(given, batch(9), Ranks(), 5)
    assert added[2]["rankme"] == rankme(features) == summary["rankme_start"]
    child = read_metrics(tmp_path / "probe")
    assert [row["step"] for row in child] == [0, 4, 8, 12]
    assert {"recall/a", "recall/bb", "recall/c"} <= child[0].keys()
    assert summary["probe_knn_end"] == child[-1]["probe_knn"]
    assert summary["probe_logistic_best"] == max(row["probe_logistic"] for row in child)
    assert summary["collapsed_at_step"] is None
    assert facts["knn"] == f"{100 * child[-1]['probe_knn']:.1f}%"
    for name in ("mosaic.jpg", "views.jpg", "curves.png", "steps/mosaic_00000006.jpg"):
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert min(picture.size) > 60
    assert not (tmp_path / "pictures/steps/mosaic_00000003.jpg").exists()
    tasks = [
        json.loads(x) for x in (tmp_path / "probe/tracking_tasks.jsonl").read_text().splitlines()
    ]
    params = next(task["params"] for task in tasks if task["do"] == "params")
    assert params["probe_k"] == "20"
    state = json.loads((tmp_path / "probe/tracking.json").read_text())
    assert state["key"]


def test_a_resumed_run_measures_what_the_uninterrupted_one_did(labelled, tmp_path):
    def rows(folder: Path) -> list[list[tuple[Any, ...]]]:
        both = (read_metrics(folder), read_metrics(folder / "probe"))
        return [[tuple((k, v) for k, v in r.items() if k != "time_ms") for r in f] for f in both]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = trainer()
    run = open_run(given.config.tracking, whole, {})
    with Watch(watch_config(labelled), whole, run, Ranks()) as watch:
        watch.begin(given, batch(9))
        drive(watch, given, run, 0, 12)
        wanted = watch.end(given)
    state: dict[str, Any] | None = None
    run_id = None
    for first, saved, killed in ((0, 5, 9), (5, 8, 8), (8, 12, 12)):
        given = trainer(done=first)
        run = open_run(given.config.tracking, parts, {}, run_id=run_id)
        run.truncate(first - 1)
        watch = Watch(watch_config(labelled), parts, run, Ranks(), state)
        watch.begin(given, batch(9))
        drive(watch, given, run, first, saved)
        state, run_id = json.loads(json.dumps(watch.state)), run.run_id
        drive(watch, given, run, saved, killed)  # done, and lost: killed without a goodbye
    assert rows(parts) == rows(whole)
    assert watch.end(given) == wanted


def test_ranks_measure_the_same_as_one(labelled, tmp_path, monkeypatch):
    trainers = [trainer() for _ in range(4)]  # not in threads: weights come from a global generator

    def life(rank: int, world: int) -> list[dict[str, float]]:
        given = trainers[rank if world == 3 else 3]
        folder = tmp_path / f"{world}" / f"{rank}"
        run = open_run(given.config.tracking, folder, {}) if rank == 0 else None
        watch = Watch(watch_config(labelled), folder, run, Ranks(rank, world, rank))
        watch.begin(given, batch(9))
        return list(drive(watch, given, run, 0, 12).values())

    (alone,) = run_ranks(monkeypatch, 1, lambda r: life(r, 1))
    for together in run_ranks(monkeypatch, 3, lambda r: life(r, 3)):
        for ours, theirs in zip(together, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    assert not (tmp_path / "3" / "1").exists()  # the others write nothing


def test_another_probe_in_mid_run_is_a_new_series(labelled, tmp_path):
    given = trainer()
    run = open_run(given.config.tracking, tmp_path, {})
    watch = Watch(watch_config(labelled), tmp_path, run, Ranks())
    watch.begin(given, batch(9))
    drive(watch, given, run, 0, 4)
    state = json.loads(json.dumps(watch.state))
    other = watch_config(labelled, probe_seed=7)
    watch = Watch(other, tmp_path, run, Ranks(), state)
    watch.begin(given, batch(9))
    drive(watch, given, run, 4, 12)
    summary = watch.end(given)
    assert [row["step"] for row in read_metrics(tmp_path / "probe")] == [8, 12]
    assert "probe_knn_start" not in summary
    assert summary["rankme_start"] == state["start"]["rankme"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probe_folder": Path("/nowhere")}, "no such folder"),
        ({"probe_test_share": 0.99}, "too few"),
    ],
)
def test_a_probe_folder_that_cannot_be_used_is_refused_in_one_line(
    labelled, tmp_path, changes, said
):
    with pytest.raises(PathfmError, match=said) as caught:
        Watch(watch_config(labelled, **changes), tmp_path, None, Ranks())
    assert "\n" not in str(caught.value)


def test_a_disk_that_refuses_a_picture_costs_the_picture_only(
    labelled, tmp_path, capsys, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    given = trainer(steps=6)
    run = open_run(given.config.tracking, tmp_path, {})
    monkeypatch.setattr("pathfm.pretrain.showing.atomic_write_bytes", full)
    monkeypatch.setattr("pathfm.pretrain.curves.atomic_write_bytes", full)
    with Watch(watch_config(labelled, curves=True), tmp_path, run, Ranks()) as watch:
        watch.begin(given, batch(9))
        added = drive(watch, given, run, 0, 6)
        assert watch.end(given)["rankme_end"] == added[5]["rankme"]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 4  # views, two of step 6, curves
    assert all("No space left" in line for line in warnings)
    assert "mosaic_00000006" not in (tmp_path / "tracking_tasks.jsonl").read_text()


def test_curves_of_a_million_steps_stay_small_and_keep_what_is_seldom(tmp_path):
    curves = Curves()
    curves.add(-1, {"rankme": 99.0})
    for step in range(100_000):
        seldom = {"rankme": 90.0} if step % 10_000 == 9_999 else {}
        curves.add(step, {"loss": 1.0 + step, "ignored": 2.0, "grad_norm": math.nan, **seldom})
    steps, losses = curves.points("loss")
    assert len(steps) < 4100
    assert losses == [1.0 + step for step in steps]
    assert curves.points("rankme")[0] == [0, *range(10_000, 100_001, 10_000)]
    assert curves.points("grad_norm") == ([], [])
    curves.draw(tmp_path / "p" / "curves.png", "a", {"rankme": 500})
    with Image.open(tmp_path / "p" / "curves.png") as picture:
        assert picture.width > 300


def test_a_cpu_has_no_gpu_memory():
    assert gpu_memory(torch.device("cpu")) == {}


def test_the_mosaic_of_a_labelled_folder_has_a_row_for_every_class(tmp_path):
    refs = [SimpleNamespace(slide_id=f"c{i % 15:02d}/{i}.png", mpp=0.5) for i in range(60)]
    monitor: Any = SimpleNamespace(refs=refs, pixels=np.zeros((60, 32, 32, 3), np.uint8))
    save_classes(tmp_path / "mosaic.jpg", monitor)
    with Image.open(tmp_path / "mosaic.jpg") as picture:
        assert picture.size == (8 * 132 + 4, 15 * (132 + 26) + 4 + 16)
        grey = np.asarray(picture.convert("L"))
    tiles = [
        [grey[16 + 4 + 64 + 158 * r, 4 + 64 + 132 * c] < 128 for c in range(8)] for r in range(15)
    ]
    assert tiles == [[True] * 4 + [False] * 4] * 15


def test_curves_have_alignment_and_room_above_the_highest_point(tmp_path, monkeypatch):
    axes: list[Any] = []
    curves = Curves()
    for step in range(3):
        curves.add(step, {"patches_per_s": 50.0 + step, "alignment": 1.0, "uniformity": -2.0})
    true_panel = curves._panel

    def panel(axis: Any, *rest: Any, **named: Any) -> None:
        axes.append(axis)
        true_panel(axis, *rest, **named)

    monkeypatch.setattr(curves, "_panel", panel)
    curves.draw(tmp_path / "curves.png", "run", {})
    assert [axis.get_title() for axis in axes] == ["alignment, uniformity", "patches/s"]
    assert axes[1].get_ylim() == (0, pytest.approx(57.2))
    assert {axis.get_xlabel() for axis in axes} == {"optimizer steps"}
