"""Pictures of results: what is drawn where, by reading the drawing back; maps against scikit-learn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from sklearn.decomposition import PCA

from pathfm.compare import CompareConfig, drawing, maps, matrices, run
from pathfm.compare.ablation import ablations
from pathfm.compare.curves import Curve, Point
from pathfm.compare.gathering import from_files, gather
from pathfm.compare.maps import draw_rows, embedding_files, embedding_maps, pca
from pathfm.compare.matrices import shares
from pathfm.compare.records import Confusion, Task
from pathfm.compare.tables import leaderboards, protocols
from pathfm.embeddings import Embeddings, EmbeddingsInfo
from pathfm.runtime import PathfmError
from tests.comparing import backbone, corrupted, paired, probe, robustness, scores, write

TASK = Task("logistic regression", "balanced accuracy", "mini", "", 40, "")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, to be asked what they show."""
    seen: list[Any] = []

    def keep(figure: Any) -> bytes:
        seen.append(figure)
        return b""

    for module in (drawing, matrices, maps):
        monkeypatch.setattr(module, "save", keep)
    return seen


def lines_of(panel: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]


def test_bars_begin_at_the_baseline_and_are_coloured_where_the_difference_is_sure(
    figures: list[Any], tmp_path: Path
) -> None:
    models = [backbone(name, logistic=scores(0.8)) for name in ("init", "up", "down", "unsure")]
    pairs = [
        paired("init", "up", 0.05, [0.01, 0.09]),
        paired("init", "down", -0.03, [-0.05, -0.01]),
        paired("init", "unsure", 0.01, [-0.02, 0.04]),
    ]
    write(tmp_path / "probe.json", probe(models, paired=pairs))
    gathered = gather(from_files([tmp_path]))
    (one,) = ablations(gathered.found, gathered.params, None)
    drawing.draw_ablation(one)
    (panel,) = figures[0].axes
    bars = sorted(panel.patches, key=lambda bar: -bar.get_y())
    assert [bar.get_width() for bar in bars] == pytest.approx([5, -3, 1])
    colours = [to_hex(bar.get_facecolor()) for bar in bars]
    assert colours == ["#009e73", "#d55e00", "#8a8a8a"]  # better green, worse red, unsure grey
    assert ([1.0, 9.0], [2, 2]) in lines_of(panel)
    low, high = panel.get_xlim()
    assert low == -high  # one scale to both sides


def test_rows_of_a_leaderboard_are_in_the_order_of_its_table(
    figures: list[Any], tmp_path: Path
) -> None:
    high, low = backbone("high", logistic=scores(0.9)), backbone("low", logistic=scores(0.8))
    write(tmp_path / "a" / "probe.json", probe([low, high]))
    elsewhere = backbone("low", logistic=scores(0.99))  # best of all, on the second data set
    write(tmp_path / "b" / "probe.json", probe([elsewhere], data="other", data_digest="f" * 64))
    found = gather(from_files([tmp_path])).found
    (table,) = leaderboards(found)
    tasks = protocols(found.scores)["logistic regression"]
    drawing.draw_leaderboard([(score.model, score) for score in found.scores], [], tasks)
    first, second = figures[0].axes
    names = [text.get_text() for text in first.get_yticklabels()][::-1]
    assert names == [row[0] for row in table.rows] == ["high", "low"]
    assert figures[0].get_suptitle() == "logistic regression"
    assert ([99.0], [0]) in [([round(x, 9) for x in xs], ys) for xs, ys in lines_of(second)]


def test_a_curve_has_points_in_order_and_its_intervals(figures: list[Any]) -> None:
    points = (Point(10, 0.5, (0.4, 0.6), "a"), Point(1000, 0.7, None, "b"))
    drawing.draw_curves([Curve(TASK, "steps", {"": points}, "")])
    (panel,) = figures[0].axes
    assert lines_of(panel) == [([10, 1000], [50, 70]), ([10, 10], [40, 60])]
    assert panel.get_xscale() == "log"
    assert [text.get_text() for text in panel.get_xticklabels()] == ["10", "1,000"]
    assert panel.get_xlabel() == "steps"


def test_ce_is_drawn_beside_the_reference_at_100_and_the_plain_errors(
    figures: list[Any], tmp_path: Path
) -> None:
    content = robustness([corrupted("init", [100.0, None]), corrupted("long", [80.0, None])])
    write(tmp_path / "robustness.json", content)
    (one,) = gather(from_files([tmp_path])).found.robustness
    drawing.draw_corruptions(one)
    left, right = figures[0].axes
    assert ([90.0, 80.0], [2, 1]) in lines_of(left)  # mCE, jpeg; defocus was left out
    assert ([100, 100], [0, 1]) in lines_of(left)
    assert ([30.0, 20.0, 20.0], [2, 1, 0]) in [
        ([round(x, 9) for x in xs], list(ys)) for xs, ys in lines_of(right)
    ]
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names == ["defocus", "jpeg", "mCE"]


def test_shares_of_a_confusion_are_of_the_true_class() -> None:
    counts = ((8, 2, 0), (1, 3, 0), (0, 0, 0))
    table = shares(Confusion(TASK, "m", ("a", "b", "c"), counts))
    np.testing.assert_allclose(table[:2], [[0.8, 0.2, 0], [0.25, 0.75, 0]])
    assert np.isnan(table[2]).all()


# --- maps -------------------------------------------------------------------------------------------


def embeddings(
    name: str, n: int = 30, dim: int = 6, mpp: float = 0.0, groups: bool = True, digest: str = "1"
) -> Embeddings:
    rng = np.random.default_rng(n + dim)
    labels = np.arange(n) % 3
    features = rng.normal(size=(n, dim)) + 4 * labels[:, None] * (np.arange(dim) == 2)
    info = EmbeddingsInfo(name, "vit", digest, "", "mini", "e", 32, mpp=mpp)
    return Embeddings(
        features.astype(np.float32),
        labels,
        ("a", "b", "c"),
        tuple(f"{i}.png" for i in range(n)),
        tuple(f"slide {i % 4}" for i in range(n)) if groups else (),
        info,
    )


def test_pca_is_scikit_learns_up_to_signs() -> None:
    x = np.random.default_rng(0).normal(size=(40, 7)) * np.arange(1, 8)
    points, axes = pca(x)
    oracle = PCA(2, svd_solver="full").fit(x)
    theirs = oracle.transform(x)
    np.testing.assert_allclose(np.abs(points), np.abs(theirs), atol=1e-10)
    told = [
        f"PC {i} ({100 * share:.0f} %)"
        for i, share in enumerate(oracle.explained_variance_ratio_, 1)
    ]
    assert list(axes) == told
    assert pca(np.full((5, 3), 2.0))[0].tolist() == [[0.0, 0.0]] * 5  # nothing varies
    assert pca(np.arange(5.0)[:, None])[0][:, 1].tolist() == [0.0] * 5  # one dimension


def test_files_of_one_model_are_one_map_with_its_magnifications(tmp_path: Path) -> None:
    embeddings("m", mpp=0.5).save(tmp_path / "half.safetensors")
    embeddings("m", n=20, mpp=1.0).save(tmp_path / "one.safetensors")
    embeddings("other", dim=5, groups=False, digest="2").save(tmp_path / "other.safetensors")
    first, second = embedding_maps(embedding_files([tmp_path]), "pca", 1000, 0)
    assert (first.model, first.n, first.points.shape) == ("m", 50, (50, 2))
    assert list(first.aspects) == ["class", "slide", "µm/px"]
    assert first.aspects["µm/px"] == ("0.5",) * 30 + ("1",) * 20
    assert first.aspects["class"][:4] == ("a", "b", "c", "a")
    assert list(second.aspects) == ["class"]  # no slides, one unknown magnification


def test_what_was_probed_is_mapped_while_it_is_there_and_still_that_model_s(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    embeddings("m", digest="1").save(path)
    (tmp_path / "text.safetensors").write_text("no features")
    there = maps.still_there(
        [
            (str(path), "1"),
            (str(path), "1"),
            (str(path), "2"),  # made again with another model meanwhile
            (str(tmp_path / "gone.safetensors"), "1"),
            (str(tmp_path / "text.safetensors"), "1"),
            ("/etc/passwd", "1"),
        ]
    )
    assert there == [path]
    content = probe([backbone("m", logistic=scores(0.8)) | {"backbone_digest": "1"}])
    write(tmp_path / "probe.json", content | {"embeddings": [str(path)]})
    result = run(CompareConfig(results=[tmp_path / "probe.json"], out=tmp_path / "out"))
    assert (tmp_path / "out" / "map_1.png") in result.written


def test_the_rows_drawn_depend_on_the_seed_alone_and_all_are_equally_likely() -> None:
    assert draw_rows(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    a = draw_rows(1000, 100, 3)
    assert a.tolist() == draw_rows(1000, 100, 3).tolist()
    assert len(set(a.tolist())) == 100
    assert (np.diff(a) > 0).all()
    counts = np.sum([np.bincount(draw_rows(20, 5, s), minlength=20) for s in range(800)], axis=0)
    # 800 draws of a quarter: 200 each, sd 12.2
    assert np.abs(counts - 200).max() < 5 * 12.2


def test_a_map_too_small_or_of_nothing_is_refused(tmp_path: Path) -> None:
    embeddings("m", n=2).save(tmp_path / "m.safetensors")
    with pytest.raises(PathfmError, match="needs three rows or more, it has 2"):
        embedding_maps([tmp_path / "m.safetensors"], "pca", 100, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PathfmError, match=r"no \*\.safetensors in"):
        embedding_files([tmp_path / "empty"])
    with pytest.raises(PathfmError, match="no embeddings at"):
        embedding_maps([tmp_path / "gone.safetensors"], "pca", 100, 0)


def test_without_umap_learn_its_install_command_is_told_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(PathfmError, match=r"pip install -c constraints\.txt umap-learn"):
        embedding_maps([Path("gone.safetensors")], "umap", 100, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_umap_keeps_neighbours_together_and_repeats_for_a_seed() -> None:
    labels = np.arange(90) % 3
    rng = np.random.default_rng(0)
    centres = np.eye(12)[:3] * 10
    x = centres[labels] + rng.normal(size=(90, 12)) * 0.3
    points = maps.umap(x, 5)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (labels[apart.argmin(axis=1)] == labels).all()
    assert np.array_equal(points, maps.umap(x, 5))


def test_every_class_has_a_colour_of_its_own_and_rare_slides_are_grey(figures: list[Any]) -> None:
    many = tuple(f"s{i % 12}" if i < 120 else f"rare {i}" for i in range(125))
    points = np.random.default_rng(0).normal(size=(125, 2))
    one = maps.EmbeddingMap("m", "d", 125, points, {"slide": many}, ("PC 1", "PC 2"))
    maps.draw_map(one)
    (panel,) = figures[0].axes
    told = [c.get_label() for c in panel.collections]
    assert told[0] == "7 others"
    assert len(told) == 11
    drawn = np.concatenate([c.get_offsets() for c in panel.collections])
    assert len(drawn) == 125
    assert len({tuple(c.get_facecolor()[0]) for c in panel.collections}) == 11


def test_pictures_are_light_and_have_something_on_them(tmp_path: Path) -> None:
    models = [
        backbone("init", logistic=scores(0.8, (0.7, 0.9))),
        backbone("$x_{", logistic=scores(0.9)),
    ]
    curve = {"shots": [1, 4], "mean": [0.5, 0.7], "sd": [0.1, 0.05]}
    for model in models:
        model["few_shot"] = {"logistic": curve}
    write(tmp_path / "in" / "probe.json", probe(models, paired=[paired("init", "$x_{", 0.1, [])]))
    write(tmp_path / "in" / "robustness.json", robustness([corrupted("init", [100.0, 99.0])]))
    embeddings("m").save(tmp_path / "m.safetensors")
    config = CompareConfig(
        results=[tmp_path / "in"], out=tmp_path / "out", maps=[tmp_path / "m.safetensors"]
    )
    result = run(config)
    pictures = [path for path in result.written if path.suffix == ".png"]
    names = sorted(path.stem for path in pictures)
    assert names == [
        "ablation_1",
        "confusion_1",
        "corruptions_1",
        "few_shot_1",
        "leaderboard_1",
        "map_1",
    ]
    for path in pictures:
        grey = np.asarray(Image.open(path).convert("L"))
        assert np.mean(grey > 240) > 0.3, path
        assert np.mean(grey < 200) > 0.002, path
    first = {path: path.read_bytes() for path in pictures}
    run(config)
    assert all(path.read_bytes() == first[path] for path in pictures)
