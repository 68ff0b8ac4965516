"""Bags, their heads and their splits, each against something that knows the answer otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.embeddings.bags import BagFacts, write_bag
from pathfm.heads.fit import shuffled
from pathfm.heads.folds import fold_of, grouped_folds, parts_of, told_of
from pathfm.probing.parts import Parts
from pathfm.runtime import PathfmError
from pathfm.slide_probe import Bags, bags_of
from pathfm.slide_probe.abmil import AbMil, MeanPool
from pathfm.slide_probe.fit import SlideProtocol, fit_run, loss_of, predict
from pathfm.slide_probe.table import read_bags


def some_bags(n: int = 36, n_classes: int = 3, dim: int = 12, signal: float = 2.0) -> Bags:
    """Slides of which a tenth of the patches tell the class; two slides a patient, of unequal sizes."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) // 2 % n_classes)
    features = []
    for label in labels:
        bag = rng.normal(size=(int(rng.integers(10, 40)), dim)).astype(np.float32)
        bag[: max(1, len(bag) // 10), label] += 5 * signal
        features.append(bag)
    patients = [f"P{i // 2}" for i in range(n)]
    return bags_of(features, labels, [f"class {c}" for c in range(n_classes)], patients=patients)


# --- heads ----------------------------------------------------------------------------------------


def test_a_bag_is_the_attention_weighted_mean_of_the_paper_s_equations() -> None:
    torch.manual_seed(3)
    head = AbMil(5, 3, projected=4, attention=6, hidden=(7,)).double()
    bag = torch.randn(9, 5, dtype=torch.float64)
    weights = {k: v.detach().numpy() for k, v in head.state_dict().items()}
    h = [weights["project.weight"] @ x + weights["project.bias"] for x in bag.numpy()]
    e = []
    for x in h:  # eq. 9: w^T (tanh(V h) * sigm(U h))
        value = np.tanh(weights["value.weight"] @ x + weights["value.bias"])
        gate = 1 / (1 + np.exp(-(weights["gate.weight"] @ x + weights["gate.bias"])))
        e.append((weights["score.weight"] @ (value * gate) + weights["score.bias"]).item())
    a = np.exp(e) / np.exp(e).sum()
    z = sum(w * x for w, x in zip(a, h, strict=True))  # eq. 7
    hidden = np.maximum(weights["classify.0.weight"] @ z + weights["classify.0.bias"], 0)
    logits = weights["classify.2.weight"] @ hidden + weights["classify.2.bias"]
    assert np.allclose(head(bag, [9]).detach().numpy()[0], logits, rtol=0, atol=1e-12)
    assert np.allclose(head.attention(bag, [9])[0].detach().numpy(), a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [AbMil, MeanPool])
def test_a_slide_s_logits_depend_neither_on_its_neighbours_nor_on_the_order_of_its_patches(
    kind: type[AbMil] | type[MeanPool],
) -> None:
    head = kind(6, 2).double()
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    together = head(torch.cat([a, b]), [4, 11])
    assert torch.allclose(head(a, [4])[0], together[0], rtol=0, atol=1e-12)
    assert torch.allclose(head(b.flip(0), [11])[0], together[1], rtol=0, atol=1e-12)


def test_sizes_that_are_not_the_rows_are_refused() -> None:
    features = torch.zeros(5, 6)
    for head in (AbMil(6, 2), MeanPool(6, 2)):
        for sizes in ([2, 2], [5, 0], []):
            with pytest.raises(PathfmError, match="5 features cannot be bags of"):
                head(features, sizes)


def test_the_loss_of_one_logit_is_that_of_two_whose_difference_it_is() -> None:
    logits, labels = torch.randn(7, 1, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    assert torch.allclose(loss_of(logits, labels), loss_of(two, labels), rtol=0, atol=1e-12)


# --- bags -----------------------------------------------------------------------------------------


def test_a_mean_is_each_slide_s_own() -> None:
    bags = some_bags(6)
    for i, mean in enumerate(bags.means()):
        assert np.allclose(mean, bags.read(i).astype(np.float64).mean(axis=0), atol=1e-6)


def test_bags_past_the_limit_are_read_each_time_and_are_the_same() -> None:
    bags, reads = some_bags(8), []

    def source(i: int) -> np.ndarray:
        reads.append(i)
        return bags.read(i)

    lazy = Bags(bags.slides, bags.labels, bags.classes, bags.dim, source)
    limit = bags.read(0).nbytes + bags.read(1).nbytes
    loaded = lazy.loaded(limit)
    assert reads == list(range(8))
    for i in range(8):
        assert np.array_equal(loaded.read(i), bags.read(i))
    assert reads[8:] == list(range(2, 8))


def test_a_thinned_bag_is_evenly_spaced_and_keeps_both_ends() -> None:
    features = np.arange(1000, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    bags = bags_of([features, features[:7]], [0, 1], ["a", "b"]).loaded(1 << 30, most_patches=10)
    assert bags.read(0)[:, 0].tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert bags.read(1)[:, 0].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": np.array([0, 3])}, "labels from 0 to 3 for 2 classes"),
        ({"labels": np.array([0])}, "2 slides and 1 labels"),
        ({"slides": ("x", "x")}, "slide 'x' is there twice"),
        ({"patients": ("p",)}, "2 slides and 1 patients"),
        ({"splits": ("train", "tset")}, "split 'tset': wants one of train, val, test"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    change: dict[str, object], told: str
) -> None:
    given: dict[str, object] = {
        "slides": ("x", "y"),
        "labels": np.array([0, 1]),
        "classes": ("a", "b"),
        "dim": 2,
        "source": lambda i: np.zeros((3, 2), np.float32),
    }
    Bags(**given)  # type: ignore[arg-type]
    with pytest.raises(PathfmError, match=told):
        Bags(**given | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (np.zeros((0, 4), np.float32), "at least one patch"),
        (np.zeros((3, 5), np.float32), r"features \(3, 5\), wants \(patches, 4\)"),
        (np.full((3, 4), np.nan, np.float32), "3 of 3 features hold NaN"),
    ],
)
def test_a_bad_bag_is_refused_by_the_slide_s_name(features: np.ndarray, told: str) -> None:
    bags = bags_of([np.ones((2, 4)), features], [0, 1], ["a", "b"], slides=["good", "bad"])
    bags.read(0)
    with pytest.raises(PathfmError, match=f"slide bad: .*{told}"):
        bags.read(1)


# --- a folder and its table -----------------------------------------------------------------------


def write_bags(folder: Path, bags: Bags) -> Path:
    for i, slide in enumerate(bags.slides):
        features = bags.read(i)
        facts = BagFacts(slide, "key", "tiny", "digest", 0.5, 0.25, 224, 0.0, 4000, 3000)
        write_bag(
            folder / "h5_files" / f"{slide}.h5",
            facts,
            features,
            np.zeros((len(features), 2), np.int64),
        )
    rows = ["slide,label,patient,split"]
    parts = ["train", "train", "val", "test"]
    for i, slide in enumerate(bags.slides):
        name = bags.classes[bags.labels[i]]
        rows.append(f"{slide},{name},{bags.patients[i]},{parts[i // 2 % 4]}")
    table = folder / "slides.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def test_a_folder_of_bags_and_a_table_are_the_bags_that_were_written(tmp_path: Path) -> None:
    bags = some_bags(8, 2)
    found = read_bags(tmp_path, write_bags(tmp_path, bags))
    assert found.slides == bags.slides
    assert found.classes == bags.classes
    assert found.patients == bags.patients
    assert found.splits[:8:2] == ("train", "train", "val", "test")
    assert np.array_equal(found.labels, bags.labels)
    for i in range(8):
        assert np.array_equal(found.read(i), bags.read(i))


def test_bags_of_two_models_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    bags = some_bags(4, 2)
    table = write_bags(tmp_path, bags)
    found = read_bags(tmp_path, table)
    assert found.encoder_digest == "digest"
    facts = BagFacts("2", "key", "tiny", "another", 0.5, 0.25, 224, 0.0, 4000, 3000)
    features = bags.read(2)
    places = np.zeros((len(features), 2), np.int64)
    write_bag(tmp_path / "h5_files" / "2.h5", facts, features, places)
    found.read(1)
    with pytest.raises(PathfmError, match=r"2\.h5 was made by another model than .*0\.h5"):
        found.read(2)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("slide,label\n0,a\nghost,b\n", "1 of 2 slides have no bag.*'ghost'"),
        ("slide,label\n../0,a\n", "1 of 1 slides have no bag"),
        ("name,label\n0,a\n", "wants slide and label"),
        ("slide,label\n", "no rows"),
        ("slide,label\n0,\n", "line 2: no slide or no label"),
        ("slide,label,split\n0,a,train\n1,b,\n", "slide '1' has no split and others do"),
        ("slide,label\n0,a\n0,a\n", "there twice"),
        (f"slide,label\n0,{'a' * 140_000}\n", r"line \d: no CSV"),
        ('slide,label\n0,"a" b\n', r"line \d: no CSV"),
    ],
)
def test_a_wrong_table_is_told_in_one_line(tmp_path: Path, table: str, told: str) -> None:
    path = write_bags(tmp_path, some_bags(4, 2))
    path.write_text(table)
    with pytest.raises(PathfmError, match=told) as caught:
        read_bags(tmp_path, path)
    assert "\n" not in str(caught.value)


def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = write_bags(tmp_path, some_bags(4, 2))
    path.write_text("slide_id,label\n0,10\n1,9\n2,0\n")
    found = read_bags(tmp_path, path)
    assert found.classes == ("0", "9", "10")
    assert found.labels.tolist() == [2, 1, 0]


# --- splits ---------------------------------------------------------------------------------------


def test_folds_keep_patients_together_and_spread_classes_as_well_as_scikit_learn() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    rng = np.random.default_rng(5)
    groups = [f"P{g}" for g in rng.integers(0, 40, 200)]
    labels = rng.choice(3, 200, p=[0.6, 0.3, 0.1])
    labels = labels[np.unique(groups, return_inverse=True)[1] * 5 % 200]  # patients of few classes

    def unevenness(fold: np.ndarray) -> float:
        shares = [
            np.bincount(labels[fold == k], minlength=3) / np.bincount(labels) for k in range(5)
        ]
        return float(np.std(shares, axis=0).mean())

    ours = fold_of(labels, groups, 5, seed=1)
    theirs = np.zeros(200, int)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for k, (_, test) in enumerate(splitter.split(labels, labels, groups)):
        theirs[test] = k
    for group in set(groups):
        assert len({ours[i] for i in range(200) if groups[i] == group}) == 1
    assert unevenness(ours) <= unevenness(theirs) * 1.05
    assert not np.array_equal(ours, fold_of(labels, groups, 5, seed=2))
    assert np.array_equal(ours, fold_of(labels, groups, 5, seed=1))


def test_every_slide_is_tested_once_and_never_chooses_for_itself() -> None:
    bags = some_bags(60)
    folds = grouped_folds(bags.groups, 4, bags.labels, bags.classes, seed=3)
    assert sorted(np.concatenate([f.test for f in folds]).tolist()) == list(range(60))
    for f in folds:
        sides = [{bags.groups[i] for i in rows} for rows in (f.train, f.val, f.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert len(f.train) + len(f.val) + len(f.test) == 60


def test_a_patient_on_two_sides_or_a_part_without_a_class_is_refused() -> None:
    labels, groups = np.array([0, 1, 0, 1]), ["patient A", "patient B", "patient A", "patient C"]
    with pytest.raises(PathfmError, match="patient A is in train and in val"):
        parts_of(["train", "train", "val", "val"], groups, labels, ["x", "y"])
    apart = ["slide 1", "slide 2", "slide 3", "slide 4"]
    with pytest.raises(PathfmError, match="val has 1 samples and none of class 'y'"):
        parts_of(["train", "train", "val", "train"], apart, labels, ["x", "y"])
    parts = parts_of(["train", "train", "val", "val"], apart, labels, ["x", "y"])
    assert parts.reported_on == "val"
    with pytest.raises(PathfmError, match="n_folds = 5 with 4 patients"):
        fold_of(labels, apart, 5)
    with pytest.raises(PathfmError, match="wants 3 or more"):
        grouped_folds(apart, 2, labels, ["x", "y"])


def test_a_table_of_train_and_test_chooses_on_patients_cut_out_of_train() -> None:
    bags = some_bags(48, 2)
    splits = ["test" if int(p[1:]) % 4 == 0 else "train" for p in bags.patients]
    parts = parts_of(splits, bags.groups, bags.labels, bags.classes)
    assert parts.test.tolist() == [i for i in range(48) if splits[i] == "test"]
    assert not {bags.groups[i] for i in parts.val} & {bags.groups[i] for i in parts.train}
    assert told_of(parts).startswith("test (a part of train, cut out")


# --- the protocol ---------------------------------------------------------------------------------


def test_attention_finds_the_few_patches_that_tell_the_class() -> None:
    bags = some_bags(45, signal=1.0)
    parts = grouped_folds(bags.groups, 3, bags.labels, bags.classes)[0]
    found = fit_run(bags, parts, SlideProtocol(max_epochs=20, batch=8, lr=3e-3))
    assert found.test is not None
    assert found.test > 0.8
    assert found.probabilities.shape == (len(parts.test), 3)
    assert np.allclose(found.probabilities.sum(1), 1, atol=1e-5)
    assert found.losses[-1] < found.losses[0] / 2


def test_a_run_is_a_function_of_its_seed_and_number() -> None:
    bags = some_bags(24, 2)
    parts = grouped_folds(bags.groups, 3, bags.labels, bags.classes)[0]
    protocol = SlideProtocol(max_epochs=3)
    first, again, other = (
        fit_run(bags, parts, protocol, seed=7, run=run).losses for run in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert not np.array_equal(
        shuffled(parts.train, 7, 0, 0, 405, 16), shuffled(parts.train, 7, 0, 1, 405, 16)
    )


def test_the_test_slides_have_no_say_in_anything_but_the_report() -> None:
    bags = some_bags(30, 2)
    parts = grouped_folds(bags.groups, 3, bags.labels, bags.classes)[0]
    shuffled_labels = bags.labels.copy()
    shuffled_labels[parts.test] = 1 - shuffled_labels[parts.test]
    lied = Bags(bags.slides, shuffled_labels, bags.classes, bags.dim, bags.source, bags.patients)
    protocol = SlideProtocol(max_epochs=6)
    a, b = fit_run(bags, parts, protocol), fit_run(lied, parts, protocol)
    assert a.losses == b.losses
    assert a.val == b.val
    assert np.array_equal(a.probabilities, b.probabilities)
    assert a.test is not None
    assert b.test == pytest.approx(1 - a.test)


def test_the_first_best_epoch_is_kept_and_patience_ends_the_run() -> None:
    bags = some_bags(24, 2, signal=0.0)
    parts = grouped_folds(bags.groups, 3, bags.labels, bags.classes)[0]
    protocol = SlideProtocol(max_epochs=40, patience_epochs=4)
    found = fit_run(bags, parts, protocol)
    assert found.epochs in (found.best_epoch + 5, 40)
    early = fit_run(bags, parts, SlideProtocol(max_epochs=found.best_epoch + 1))
    assert early.val == found.val
    assert np.array_equal(early.probabilities, found.probabilities)
    still = fit_run(bags, parts, SlideProtocol(lr=1e-12, patience_epochs=3))
    assert (still.best_epoch, still.epochs) == (0, 4)  # ties stay with the first epoch
    assert [protocol.rate(e) for e in (0, 4, 5)] == [1e-3 / 3, 1e-3 / 3, 1e-3]


def test_without_test_slides_validation_is_reported_and_said_to_be() -> None:
    bags = some_bags(24, 2)
    parts = grouped_folds(bags.groups, 3, bags.labels, bags.classes)[0]
    found = fit_run(
        bags, Parts(parts.train, parts.val, np.array([], np.int64)), SlideProtocol(max_epochs=2)
    )
    assert found.test is None
    assert found.rows.tolist() == parts.val.tolist()


def test_mean_pooling_is_logistic_regression_on_means() -> None:
    bags = some_bags(12, 2)
    head = MeanPool(bags.dim, 1)
    rows = np.arange(12)
    weight, bias = (p.detach().double().numpy() for p in head.parameters())
    positive = 1 / (1 + np.exp(-(bags.means() @ weight[0] + bias[0])))
    assert np.allclose(predict(head, bags, rows, batch=5)[:, 1], positive, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_remedy() -> None:
    bags = some_bags(24, 2)
    parts = grouped_folds(bags.groups, 3, bags.labels, bags.classes)[0]
    with pytest.raises(PathfmError, match=r"the loss is nan on slides such as .*: give a lower lr"):
        fit_run(bags, parts, SlideProtocol(max_epochs=9, lr=1e30))
