"""Pretraining: a run that is stopped, killed or damaged ends where the undisturbed one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from online_patching import Corpus, ForegroundMask, PatchLoader
from online_patching.errors import CorpusError
from pathfm.backbone import export_backbone, load_backbone
from pathfm.checkpoint import Computing, load_newest
from pathfm.methods.dino import Dino
from pathfm.pretrain import OptimConfig, PretrainConfig, ViewsConfig, run
from pathfm.pretrain.bookends import _last_words
from pathfm.pretrain.optim import parameter_groups, schedule, set_schedule
from pathfm.pretrain.records import choose_for_mosaic, print_shares, sampling_facts
from pathfm.pretrain.rows_log import read_rows
from pathfm.pretrain.trainer import build_trainer
from pathfm.runtime import PathfmError, save_config
from tests.pretraining import TINY, assert_same_run, config, losses


@pytest.fixture(scope="module")
def corpus(small_corpus: Path) -> Path:
    return small_corpus


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run(config(corpus, out)).finished
    return out


def test_a_run_leaves_everything_it_promises(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert [step for step, _ in losses(undisturbed)] == list(range(6))
    assert summary["steps"] == 6
    assert summary["patches_seen"] == 24
    assert summary["distinct_patches"] == 24
    assert summary["loss_first"] == losses(undisturbed)[0][1]
    assert summary["rankme_start"] > 1
    assert summary["rankme_end"] > 1
    assert summary["init"] == "random weights (seed 3)"
    assert sum(summary["slide_share"].values()) == pytest.approx(1)
    assert [row["draw"] for row in read_rows(undisturbed / "sampled.jsonl")] == list(range(24))
    for name in ("config.yaml", "pictures/mosaic.jpg", "pictures/views.jpg", "checkpoints/last"):
        assert (undisturbed / name).stat().st_size > 0
    saved = PretrainConfig(**yaml.safe_load((undisturbed / "config.yaml").read_text()))
    assert saved.optim.lr == 1e-3


def test_the_exported_backbone_is_the_teachers(undisturbed):
    checkpoint = load_newest(undisturbed / "checkpoints")
    assert checkpoint is not None
    exported = load_backbone("test_vit", str(undisturbed))
    prefix = "method.teacher.backbone.network."
    for name, tensor in exported.network.state_dict().items():
        assert torch.equal(tensor, checkpoint.tensors[prefix + name])
        student = checkpoint.tensors[prefix.replace("teacher", "student") + name]
        if name == "blocks.0.attn.qkv.weight":
            assert not torch.equal(tensor, student)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert exported.digest == summary["backbone_digest"]


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(corpus, tmp_path, undisturbed, stopped_after):
    out = tmp_path / "run"
    first = run(config(corpus, out, stop_after_steps=stopped_after))
    assert (first.finished, first.steps) == (False, stopped_after)
    assert not (out / "summary.json").exists()
    # reading with more threads changes no patch
    assert run(config(corpus, out, loader={"threads": 3, "prefetch": 4})).finished
    assert_same_run(out, undisturbed)


def test_rows_after_the_checkpoint_are_made_again(corpus, tmp_path, undisturbed):
    out = tmp_path / "run"
    run(config(corpus, out, stop_after_steps=4))
    for damaged in ("tensors.safetensors", "state.json"):
        path = out / "checkpoints" / "step_00000004" / damaged
        path.write_bytes(path.read_bytes()[:-9])
    assert run(config(corpus, out)).finished  # from step 2
    assert_same_run(out, undisturbed)


def test_a_finished_run_is_left_alone(corpus, undisturbed, capsys):
    before = (undisturbed / "summary.json").stat().st_mtime_ns
    assert run(config(corpus, undisturbed)).finished
    assert "up to date" in capsys.readouterr().out
    assert (undisturbed / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 7}, ["steps = 6", "7"]),
        ({"seed": 1}, ["seed = 0", "1"]),
        ({"optim": TINY["optim"] | {"lr": 2e-3}}, ["optim.lr = 0.001", "0.002"]),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(corpus, undisturbed, change, words):
    with pytest.raises(PathfmError) as caught:
        run(config(corpus, undisturbed, **change))
    for word in words:
        assert word in str(caught.value)


def test_another_start_or_corpus_in_the_same_folder_is_refused(
    corpus, small_indexes, undisturbed, tmp_path
):
    with pytest.raises(
        PathfmError, match=r"run from random:3 \(digest \w+\), asked for is random:4"
    ):
        run(config(corpus, undisturbed, weights="random:4"))
    export_backbone(load_backbone("test_vit", "random:3"), tmp_path / "moved")
    assert run(config(corpus, undisturbed, weights=str(tmp_path / "moved"))).finished
    other = tmp_path / "corpus"
    index = small_indexes[0]
    index.save(other / "slides" / f"{index.slide_id}.index")
    ForegroundMask.everything(index).save(other / "masks" / f"{index.slide_id}.png")
    Corpus.build(other)
    with pytest.raises(PathfmError, match=r"holds a run on the corpus \w+, .* is now"):
        run(config(other, undisturbed))


def test_more_sampled_rows_may_be_asked_for_on_resume(corpus, tmp_path):
    out = tmp_path / "run"
    run(config(corpus, out, stop_after_steps=2, max_sampled_rows=5))
    assert run(config(corpus, out, max_sampled_rows=100)).finished
    assert [row["draw"] for row in read_rows(out / "sampled.jsonl")] == [0, 1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    true_loss = Dino.loss

    def poisoned(self, micro):
        loss = true_loss(self, micro)
        return loss * float("nan") if micro.step == 3 else loss

    monkeypatch.setattr(Dino, "loss", poisoned)
    with pytest.raises(
        PathfmError,
        match=r"step 3: the loss is nan and the grad norm is nan; the weights were not touched",
    ):
        run(config(corpus, out))
    kept = json.loads((out / "nonfinite_step_3" / "rank_0.json").read_text())
    assert [row["draw"] for row in kept["batch"]] == [12, 13, 14, 15]
    assert [step for step, _ in losses(out)] == [0, 1, 2]
    checkpoint = load_newest(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2
    monkeypatch.undo()
    assert run(config(corpus, out)).finished


def test_a_missing_corpus_and_a_wrong_view_size_are_clear(corpus, tmp_path):
    with pytest.raises(CorpusError, match="no packed corpus"):
        run(config(tmp_path / "nowhere", tmp_path / "a"))
    with pytest.raises(PathfmError, match=r"local.size_px = 20 is no multiple of the 16 px"):
        run(config(corpus, tmp_path / "b", views=TINY["views"] | {"local": {"size_px": 20}}))


def _start(config: PretrainConfig, folder: Path) -> subprocess.Popen[bytes]:
    """`pathfm pretrain` in a process of its own."""
    path = save_config(config, folder, "given.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", "pathfm", "pretrain", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _wait_for_rows(process: subprocess.Popen[bytes], out: Path, rows: int) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(losses(out)) >= rows:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {rows} rows; {process.communicate()[1].decode()}")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_restarts_and_ends_with_the_same_losses(corpus, tmp_path, how):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    changes: dict[str, Any] = {"steps": 60, "checkpoint_every_steps": 7}
    run(config(corpus, whole, **changes))
    process = _start(config(corpus, out, **changes), tmp_path)
    _wait_for_rows(process, out, 12)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM, said
        saved = load_newest(out / "checkpoints")
        assert saved is not None
        assert saved.step == len(losses(out))  # it saved the step it was in
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert run(config(corpus, out, **changes)).finished
    assert_same_run(out, whole)


RECIPES = sorted(Path(__file__).parents[1].glob("configs/*_vits16.yaml"))


def recipe_of(path: Path) -> PretrainConfig:
    return PretrainConfig(**yaml.safe_load(path.read_text()))


def test_there_is_a_recipe_for_every_method():
    assert sorted(recipe_of(path).method for path in RECIPES) == [
        *("dino", "dinov2", "simclr", "supcon", "supervised"),
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_line_of_a_recipe_names_its_source_and_what_is_left_out_is_the_default(path):
    given = yaml.safe_load(path.read_text())
    recipe = recipe_of(path)
    assert recipe.out == Path("runs") / path.stem
    assert recipe.batch_size * recipe.steps == 25_600_000  # so that recipes can be compared
    said = {"corpus", "out", "method", "seed", "views", "optim", "labels", recipe.method}
    bare = [
        line
        for line in path.read_text().splitlines()
        if line.strip() and not line.startswith("#") and "#" not in line
    ]
    for line in bare:
        name = line.strip().partition(":")[0]
        assert name in {*said, "global_1", "global_2", "local", "n_local", "keep_checkpoints",
                        "checkpoint_every_steps"}, line  # fmt: skip
    assert set(given) <= set(PretrainConfig.model_fields)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_shrunken(corpus, tmp_path, path):
    recipe = recipe_of(path)
    own: dict[str, Any] = {}
    if recipe.labels.source:
        table = tmp_path / "classes.csv"
        table.write_text("slide_id,label\nycbcr,a\nrgb,b\nthird,a\n")
        own["labels"] = {"table": str(table)}
    head = getattr(recipe, recipe.method)
    if hasattr(head, "out_dim"):
        own[recipe.method] = head.model_copy(update={"out_dim": 64})
    small = recipe.model_copy(
        update={
            "corpus": corpus,
            "out": tmp_path / "run",
            "weights": "random",
            "steps": 2,
            "batch_size": 4,
            "micro_batch_size": 2 if recipe.micro_batch_size else None,
            "monitor_patches": 8,
            "optim": recipe.optim.model_copy(update={"warmup_steps": 1}),
            "loader": recipe.loader.model_copy(update={"workers": 0}),
            "tracking": recipe.tracking.model_copy(update={"enabled": False}),
        }
    )
    small = PretrainConfig(**(small.model_dump() | own))
    assert run(small).finished
    assert len(losses(small.out)) == 2


def test_the_loader_is_asked_for_the_stream_the_sampler_names(corpus, tmp_path, undisturbed):
    """The draws of a run are those of the sampler alone: no step, rank or worker in them."""
    from online_patching import PatchSampler

    sampler = PatchSampler(
        Corpus.open(corpus), size_px=64, mpp=[0.5, 1.0], min_foreground=0.0, seed=0
    )
    with PatchLoader(sampler, 24) as loader:
        refs = next(loader).refs
    rows = read_rows(undisturbed / "sampled.jsonl")
    assert [(r["slide_id"], r["x_px0"], r["mpp"]) for r in rows] == [
        (ref.slide_id, ref.x_px0, ref.mpp) for ref in refs
    ]


def test_schedules_start_peak_and_end_where_the_config_says():
    it = PretrainConfig(**(TINY | {"steps": 11, "optim": {"warmup_steps": 2, "lr": 1e-3}}))
    assert [schedule(it, step)[0] for step in (0, 1, 2)] == [0, 5e-4, 1e-3]
    assert list(schedule(it, 10)) == pytest.approx([1e-6, 0.4])
    assert schedule(it, 0)[1] == pytest.approx(0.04)


def test_biases_norms_and_frozen_parameters_do_not_decay(corpus, tmp_path):
    trainer = build_trainer(config(corpus, tmp_path), None)
    decaying, free = trainer.optimizer.param_groups
    assert (decaying["decays"], free["decays"]) == (True, False)
    assert min(p.ndim for p in decaying["params"]) == 2
    assert max(p.ndim for p in free["params"]) == 1
    student = trainer.method.trained()
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert any("patch_embed" in name for name in frozen)
    held = sum(p.numel() for group in (decaying, free) for p in group["params"])
    assert held == sum(p.numel() for p in student.parameters() if p.requires_grad)
    module = torch.nn.Linear(2, 3)
    assert [len(group["params"]) for group in parameter_groups(module, OptimConfig())] == [1, 1]


def test_a_size_in_the_yaml_keeps_the_rest_of_a_global_view():
    views = ViewsConfig.model_validate({"global_1": {"size_px": 112}, "global_2": {"size_px": 112}})
    assert (views.global_1.scale, views.global_1.blur) == ((0.4, 1.0), 1.0)
    assert (views.global_2.blur, views.global_2.solarize) == (0.1, 0.2)
    assert [spec.size_px for spec in views.specs] == [112, 112] + [96] * 8


@pytest.mark.parametrize(
    "bad",
    [
        {"mpp": [0.001]},
        {"steps": 1, "optim": {"warmup_steps": 2}},
        {"views": {"global_1": {"size_px": 96}}},
        {"batch_size": 0},
        {"optim": {"weight_decay": [-0.1, 0.4]}},
        {"optim": {"weight_decay": [0.1, float("inf")]}},
        {"dino": {"ema": [0.9, 1.1]}},
        {"nonsense": 1},
        {"method": "byol"},
        {"method": "simclr"},  # with the local crops that TINY asks for
        {"micro_batch_size": 5},
        {"micro_batch_size": 0},
        {"drop_path": 1.0},
        {"parallel": "tensor"},
        {"optim": {"layer_decay": 0}},
        {"optim": {"lr": 1e-6, "min_lr": 1e-5}},
        {"views": {"n_global": 1}},
    ],
)
def test_a_config_that_makes_no_sense_cannot_be_built(bad):
    with pytest.raises(
        ValueError,
        match=r"0\.05 to 8|exceeds|equal|greater|less|finite|not permitted|takes|should be",
    ):
        PretrainConfig(**(TINY | bad))


def test_shares_count_repeated_places_once():
    row = {"slide_id": "a", "x_px0": 1, "y_px0": 2, "mpp": 0.5}
    facts = sampling_facts([row, row, row | {"mpp": 1.0}, row | {"slide_id": "b"}])
    assert facts["distinct_patches"] == 3
    assert facts["slide_share"] == {"a": 0.75, "b": 0.25}
    assert facts["mpp_share"] == {"0.5": 0.75, "1.0": 0.25}


@pytest.mark.parametrize(
    ("wanted", "mpp", "says"),
    [
        ((0.25, 1.0), 1.0, {"1.0": "100.00", "0.25": "0.00"}),
        ((), 0.7, {"0.7": "100.00"}),
        ((), 0.0, {"not known": "100.00"}),
    ],
)
def test_the_magnifications_told_are_those_that_were_sampled(wanted, mpp, says, capsys):
    row = {"slide_id": "a", "x_px0": 0, "y_px0": 0, "mpp": mpp}
    print_shares(sampling_facts([row, row]), ["a"], wanted)
    table = capsys.readouterr().out.partition("magnifications")[2]
    told = re.findall(r"(not known|\d+\.\d+)\W+?(\d+\.\d+)", table)
    assert dict(told) == says


def test_the_last_words_tell_the_probe_s_start_and_end(tmp_path):
    trainer: Any = SimpleNamespace(
        config=SimpleNamespace(out=tmp_path),
        method=SimpleNamespace(exported=SimpleNamespace(name="v")),
    )
    names = "patches_seen distinct_patches patches_per_s patches_per_s_wall wait_share loss_first loss_highest"
    numbers = dict.fromkeys([*names.split(), "loss_highest_step", "loss_last"], 1)
    scores = {"probe_knn_start": 0.5, "probe_knn_end": 0.625}
    told = "\n".join(_last_words(trainer, numbers, scores))
    assert "probe, balanced accuracy on the validation part: kNN 50.0 -> 62.5 %" in told
    assert "probe," not in "\n".join(_last_words(trainer, numbers, {}))


def test_the_mosaic_has_a_column_a_slide_and_rows_by_magnification():
    class Ref:
        def __init__(self, slide_id: str, mpp: float) -> None:
            self.slide_id, self.mpp = slide_id, mpp

    refs: Any = [Ref("b", 1.0), Ref("a", 0.5), Ref("a", 1.0), Ref("a", 1.0), Ref("a", 1.0)]
    assert choose_for_mosaic(refs) == ([1, None, 2, 0, 3, None], 2)


@pytest.mark.parametrize(
    ("method", "n_views", "n_global", "scale", "blur"),
    [
        ("dino", 10, 2, (0.4, 1.0), 1.0),
        ("dinov2", 10, 2, (0.32, 1.0), 1.0),
        ("simclr", 2, 2, (0.2, 1.0), 0.5),
        ("supcon", 2, 2, (0.2, 1.0), 0.5),
        ("supervised", 1, 1, (0.2, 1.0), 0.5),
    ],
)
def test_each_method_has_views_of_its_own_under_those_that_are_given(
    method, n_views, n_global, scale, blur
):
    given = PretrainConfig(
        method=method, views={"global_1": {"size_px": 64}, "global_2": {"size_px": 64}}
    )
    assert (len(given.views.specs), given.views.n_global) == (n_views, n_global)
    first = given.views.specs[0]
    assert (first.size_px, first.scale, first.blur) == (64, scale, blur)
    again = PretrainConfig(**yaml.safe_load(yaml.safe_dump(given.model_dump(mode="json"))))
    assert again == given


def test_learning_rates_fall_towards_the_input_by_hand(corpus, tmp_path):
    """rate = lr x decay ^ (n + 1 - layer): the last norm and the head 1, embeddings decay ^ (n + 1)."""
    optim = TINY["optim"] | {"layer_decay": 0.5, "patch_embed_lr": 0.1}
    dino = TINY["dino"] | {"freeze_patch_embed": False}
    trainer = build_trainer(config(corpus, tmp_path, optim=optim, dino=dino), None)
    n = len(trainer.method.exported.blocks)
    factor = {
        id(p): group["lr_factor"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    found = {
        name: factor[id(p)]
        for name, p in trainer.method.trained().named_parameters()
        if id(p) in factor
    }
    prefix = "backbone.network."
    assert found[f"{prefix}patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5 ** (n + 1))
    assert found[f"{prefix}cls_token"] == pytest.approx(0.5 ** (n + 1))
    assert found[f"{prefix}blocks.0.attn.qkv.weight"] == pytest.approx(0.5**n)
    assert found[f"{prefix}blocks.{n - 1}.attn.qkv.bias"] == pytest.approx(0.5)
    assert found[f"{prefix}norm.weight"] == 1
    assert {found[name] for name in found if name.startswith("head.")} == {1}
    lr = set_schedule(trainer.optimizer.param_groups, trainer.config, 2)
    assert lr == 1e-3
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_factor"])
        assert (group["weight_decay"] > 0) == group["decays"]


def test_gradients_are_clipped_and_what_is_logged_is_the_norm_before(corpus, tmp_path, monkeypatch):
    seen = []
    true_step = torch.optim.AdamW.step

    def step(self, *given):
        grads = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        seen.append(float(torch.sqrt(sum(g.double().square().sum() for g in grads))))
        return true_step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    out = tmp_path / "run"
    run(config(corpus, out, steps=2, optim=TINY["optim"] | {"clip_grad_norm": 0.01}))
    logged = [
        json.loads(line)["grad_norm"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(logged) > 0.01
    assert seen == pytest.approx([0.01] * 2, rel=1e-3)


def test_threads_are_restored_and_another_machine_is_told_of(corpus, tmp_path, capsys):
    out, before = tmp_path / "run", torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(config(corpus, out, stop_after_steps=2))
        torch.set_num_threads(1)
        run(config(corpus, out, stop_after_steps=3))
        assert torch.get_num_threads() == 2
        assert "bit for bit" not in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
    saved = load_newest(out / "checkpoints")
    assert saved is not None
    facts = saved.state["computing"]
    assert facts["threads"] == 2
    assert facts["build"].startswith(torch.__version__)
    assert facts["cpu"]
    assert (facts["device"], facts["ranks"]) == ("cpu", 1)
    elsewhere = Computing(**(facts | {"cpu": "Another, AVX2", "threads": before}))
    (told,) = elsewhere.restore(1, torch.device("cpu"))
    assert told.startswith("cpu Another, AVX2, now ")
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # inside the compiler
def test_compiled_blocks_learn_the_same(corpus, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    run(config(corpus, plain, steps=2))
    run(config(corpus, compiled, steps=2, compile=True))
    for (_, ours), (_, theirs) in zip(losses(compiled), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = (load_newest(out / "checkpoints") for out in (plain, compiled))
    assert one is not None
    assert two is not None
    assert one.tensors.keys() == two.tensors.keys()


@pytest.mark.parametrize("n_classes", [None, 3, 5])
def test_a_classifier_has_an_output_for_every_class_of_the_labels(tmp_path, n_classes):
    given = _supervised(tmp_path, n_classes)
    method: Any = build_trainer(given, None, class_names=("a", "b", "c")).method
    assert method.student["head"].out_features == (n_classes or 3)


def test_fewer_outputs_than_classes_are_refused_with_both_numbers(tmp_path):
    names = tuple("abcdefghij")
    with pytest.raises(PathfmError, match=r"n_classes 9 .* 10 classes .*h, \.\.\.\)\. Give 10"):
        build_trainer(_supervised(tmp_path, 9), None, class_names=names)


def _supervised(folder, n_classes):
    changes = {"method": "supervised", "views": {"global_1": {"size_px": 32}}}
    return config(folder, folder, **changes, supervised={"n_classes": n_classes})
