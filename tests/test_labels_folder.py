"""A folder of patches as a feed: which picture draw i is, what becomes of it, and what splits the stream."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from online_patching.errors import FailureBudgetError, StateMismatchError
from pathfm.datasets.folder import read_picture
from pathfm.labels import LabelsConfig, pictures
from pathfm.labels.picture_feed import PictureFeed
from pathfm.labels.pictures import PictureSampler, open_patches
from pathfm.labels.reading import Cut, UnreadablePictureError, cut_of, read_patch, read_rgb
from pathfm.runtime import PathfmError
from tests.conftest import noise
from tests.ranks import World

COUNTS = {"a": 5, "b": 3, "c": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three unequal classes of pictures of many sizes and kinds; class x has one picture only."""
    root = tmp_path_factory.mktemp("patches")
    for c, (name, n) in enumerate({**COUNTS, "x": 1}.items()):
        (root / name).mkdir()
        for k in range(n):
            picture = Image.fromarray(noise((40 + 3 * k, 56 - 2 * k, 3), 100 * c + k))
            suffix = ("png", "jpg", "tif")[k % 3]
            picture.save(
                root / name / f"{k}.{suffix}", **({"quality": 90} if suffix == "jpg" else {})
            )
    (root / ".hidden").mkdir()
    Image.fromarray(noise((20, 20, 3))).save(root / ".hidden" / "no.png")
    (root / "a" / "notes.txt").write_text("no picture")
    return root


def sampler(folder: Path, seed: int = 3, balanced: bool = True, **options) -> PictureSampler:
    config = LabelsConfig(patches=folder, **({"classes": tuple(COUNTS)} | options))
    return PictureSampler(open_patches(config, with_classes=balanced), config, seed, balanced)


def feed(folder: Path, batch_size: int = 6, **options) -> PictureFeed:
    with_sampler = options.pop("sampler", None) or sampler(folder)
    return PictureFeed(with_sampler, batch_size, **({"size_px": 32} | options))


def take(of: PictureFeed, n: int):
    return [of.next_batch() for _ in range(n)]


def assert_same(batches, others) -> None:
    for one, other in zip(batches, others, strict=True):
        assert one.draws.tolist() == other.draws.tolist()
        assert np.array_equal(one.pixels, other.pixels)
        assert one.labels.tolist() == other.labels.tolist()
        assert one.refs == other.refs
        assert one.failures == other.failures


# --- which picture ---


def test_every_picture_of_a_class_comes_once_before_any_comes_twice(folder):
    picked = sampler(folder).pick(np.arange(3 * 240))
    for label, n in enumerate(COUNTS.values()):
        mine = picked.picture[picked.label == label]
        assert len(mine) == 240
        for epoch in mine[: 240 // n * n].reshape(-1, n):  # in the order of draws
            assert len(set(epoch.tolist())) == n


def test_weighted_classes_also_go_through_all_their_pictures(folder):
    picked = sampler(folder, class_weights={"c": 3}).pick(np.arange(5 * 80))
    mine = picked.picture[picked.label == 2]
    # within a block the three draws of c are shuffled, so epochs are told by counts at whole epochs
    assert set(Counter(mine.tolist()).values()) == {240 // 8}
    assert np.bincount(picked.label).tolist() == [80, 80, 240]


def test_epochs_of_a_class_and_classes_of_one_size_have_orders_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for k in range(50):
            (tmp_path / name / f"{k:02}.png").touch()
    picked = sampler(tmp_path, classes=()).pick(np.arange(200))
    orders = [
        [int(p) % 50 for p in picked.picture[picked.label == c][e * 50 : e * 50 + 50]]
        for c in (0, 1)
        for e in (0, 1)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_orders_that_are_not_kept_are_the_same(folder, monkeypatch):
    asked = [np.arange(k, k + 4) for k in range(0, 60, 4)]
    one = sampler(folder)
    kept = [one.pick(draws).picture.tolist() for draws in asked]
    monkeypatch.setattr(pictures, "ORDERS_KEPT_BELOW", 0)
    other = sampler(folder)
    assert [other.pick(draws).picture.tolist() for draws in asked] == kept
    assert one.pick(np.arange(60)).picture.tolist() == [p for part in kept for p in part]


def test_unlabelled_every_picture_comes_once_an_epoch(folder):
    picked = sampler(folder, balanced=False).pick(np.arange(17 * 4))
    for epoch in picked.picture.reshape(4, 17):
        assert sorted(epoch.tolist()) == list(range(17))
    assert (picked.label == -1).all()


def test_another_attempt_is_of_the_same_class(folder):
    one = sampler(folder)
    first, again = one.pick(np.arange(300)), one.pick(np.arange(300), 1)
    assert again.label.tolist() == first.label.tolist()
    assert again.picture.tolist() != first.picture.tolist()


def test_which_picture_a_draw_is_stays_what_it_was(folder):
    """Golden: another order would change every run on a folder that is resumed."""
    draws = np.concatenate([np.arange(12), 2**40 + np.arange(4)])
    assert sampler(folder, seed=7).pick(draws).picture.tolist() == GOLDEN_BALANCED
    assert sampler(folder, seed=7, balanced=False).pick(draws).picture.tolist() == GOLDEN_PLAIN


GOLDEN_BALANCED = [15, 5, 1, 2, 9, 7, 3, 6, 10, 4, 8, 5, 12, 5, 2, 6]
GOLDEN_PLAIN = [3, 14, 12, 16, 8, 5, 1, 9, 4, 7, 15, 13, 14, 5, 11, 10]


# --- what becomes of it ---


def test_where_a_picture_is_cut():
    assert cut_of(300, 200, 128, "resize", 0.0, 0.999) == Cut(0, 0, 200)
    assert cut_of(300, 200, 128, "resize", 0.999, 0.0) == Cut(100, 0, 200)
    assert cut_of(300, 200, 128, "crop", 0.999, 0.999) == Cut(172, 72, 128)
    assert cut_of(300, 100, 128, "crop", 0.5, 0.5) == Cut(100, 0, 100)
    assert cut_of(128, 128, 128, "resize", 0.7, 0.7) == cut_of(128, 128, 128, "crop", 0.1, 0.1)


def test_every_place_of_a_cut_is_equally_likely():
    u = (np.arange(10_100) + 0.5) / 10_100
    counts = np.bincount([cut_of(228, 128, 128, "crop", x, 0.0).x_px for x in u])
    assert counts.tolist() == [100] * 101


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_picture_of_the_right_size_is_what_pillow_reads(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise((48, 48, 3), 5)).save(path)
    pixels, cut = read_patch(path, 48, "resize", 0.3, 0.9)
    assert np.array_equal(pixels, np.asarray(read_picture(path)))
    assert cut == Cut(0, 0, 48)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")]
)
def test_other_colours_become_rgb_as_pillow_makes_them(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise((40, 50, 3), 6)).convert(mode).save(path)
    assert np.array_equal(read_rgb(path), np.asarray(read_picture(path)))


def test_colours_without_one_meaning_in_rgb_are_refused(tmp_path):
    Image.fromarray(noise((40, 50, 3), 6)).convert("CMYK").save(tmp_path / "a.jpg")
    Image.fromarray(np.full((40, 50, 4), 200, np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(UnreadablePictureError, match="CMYK pixels"):
        read_rgb(tmp_path / "a.jpg")
    with pytest.raises(UnreadablePictureError, match="are transparent"):
        read_rgb(tmp_path / "b.png")


@pytest.mark.parametrize(("shape", "size"), [((90, 60), 32), ((40, 70), 64), ((64, 64), 48)])
def test_a_resized_patch_is_pillows_triangle_filter_of_the_square(tmp_path, shape, size):
    Image.fromarray(noise((*shape, 3), 7)).save(tmp_path / "a.png")
    pixels, cut = read_patch(tmp_path / "a.png", size, "resize", 0.9, 0.9)
    whole = Image.fromarray(read_rgb(tmp_path / "a.png"))
    box = (cut.x_px, cut.y_px, cut.x_px + cut.side_px, cut.y_px + cut.side_px)
    wanted = np.asarray(whole.crop(box).resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(pixels.astype(int) - wanted.astype(int)).max() <= 1  # rounded twice, down first
    assert cut.side_px == min(shape)


def test_a_crop_keeps_pixels_as_they_are(tmp_path):
    picture = noise((90, 60, 3), 8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    pixels, cut = read_patch(tmp_path / "a.png", 32, "crop", 0.4, 0.7)
    assert (cut.x_px, cut.y_px) == (int(0.4 * 29), int(0.7 * 59))
    assert np.array_equal(pixels, picture[cut.y_px : cut.y_px + 32, cut.x_px : cut.x_px + 32])


def test_refs_tell_file_cut_and_magnification(folder):
    with feed(folder, mpp=0.5, fit="resize") as one:
        for ref in one.next_batch().refs:
            height, width = read_rgb(folder / ref.slide_id).shape[:2]
            side = min(width, height)
            assert ref.width_px0 == ref.height_px0 == side
            assert 0 <= ref.x_px0 <= width - side
            assert 0 <= ref.y_px0 <= height - side
            assert ref.mpp == pytest.approx(0.5 * side / 32)  # a larger picture is seen coarser
    with feed(folder) as one:
        assert {ref.mpp for ref in one.next_batch().refs} == {0.0}  # not known


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "of no kind that Pillow knows"),
        (b"\xff\xd8\xff\xe0 no more", "."),
        (b"<svg/>", "of no kind that Pillow knows"),
    ],
)
def test_files_that_are_no_pictures_are_told(tmp_path, content, told):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadablePictureError, match=rf"a\.png: not a readable picture \({told}"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_torn_file_is_an_error_never_a_grey_patch(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise((80, 80, 3), 9)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UnreadablePictureError):
        read_rgb(path)


def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path):
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UnreadablePictureError, match=r"9,000 x 9,000 px is no patch"):
        read_rgb(tmp_path / "a.png")


# --- the stream ---


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 9])
def test_a_resumed_feed_continues_the_very_same_batches(folder, stopped_after):
    with feed(folder) as one:
        whole = take(one, 12)
    with feed(folder) as one:
        take(one, stopped_after)  # more are in flight
        saved = json.dumps(one.state_dict())
    with feed(folder, threads=1, prefetch=5) as other:
        other.load_state_dict(json.loads(saved))
        assert_same(take(other, 12 - stopped_after), whole[stopped_after:])


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 6), (3, 4), (4, 3)])
def test_ranks_share_each_step_in_the_order_of_draws(folder, world_size, batch_size):
    with feed(folder, 12) as one:
        whole = take(one, 3)

    def work(rank, gather):
        shares = {"rank": rank, "world_size": world_size, "gather": gather}
        with feed(folder, batch_size, **shares) as part:
            batches = take(part, 3)
            return batches, part.state_dict()

    parts = World(world_size).run(work)
    for step in range(3):
        pixels = np.concatenate([batches[step].pixels for batches, _ in parts])
        assert np.array_equal(pixels, whole[step].pixels)
    assert all(state == parts[0][1] for _, state in parts)
    assert parts[0][1]["next_draw"] == 36


def test_a_stream_goes_on_with_another_batch_size(folder):
    with feed(folder, 4) as one:
        take(one, 3)
        state = one.state_dict()
    with feed(folder, 5) as other, feed(folder, 1) as single:
        other.load_state_dict(state)
        batch = other.next_batch()
        assert batch.draws.tolist() == [12, 13, 14, 15, 16]
        assert np.array_equal(
            batch.pixels, np.concatenate([b.pixels for b in take(single, 17)[12:]])
        )


def test_the_first_draws_can_be_looked_at_without_moving_the_stream(folder):
    with feed(folder) as one:
        take(one, 2)
        first = one.first(8)
        assert first.draws.tolist() == list(range(8))
        assert one.next_batch().draws[0] == 12


def test_a_damaged_picture_is_replaced_within_its_class_counted_and_listed(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "b" / "1.jpg").write_bytes(b"torn")
    with feed(root) as one:
        batches = take(one, 10)
        failures = [failure for batch in batches for failure in batch.failures]
        assert {failure.slide_id for failure in failures} == {"b/1.jpg"}
        assert len([f for f in failures if f.attempt == 0]) in (
            6,
            7,
        )  # one of b's three, in 20 draws
        assert one.stats.failures == {"UnreadablePictureError": len(failures)}
        assert one.stats.told() == f"read 60 pictures, {len(failures)} replaced"
        assert one.state_dict()["failed"] == {"b/1.jpg": len(failures)}
        for batch in batches:
            assert np.bincount(batch.labels).tolist() == [2, 2, 2]
            assert batch.failures == sorted(batch.failures)  # whichever thread met them first
            assert all(ref.slide_id != "b/1.jpg" for ref in batch.refs)
    with feed(root, threads=1) as other:
        assert_same(take(other, 4), batches[:4])
        state = other.state_dict()
    with feed(root) as resumed:
        resumed.load_state_dict(state)
        assert_same(take(resumed, 6), batches[4:])
        assert resumed.state_dict()["failed"] == {"b/1.jpg": len(failures)}  # of both lives


def test_too_many_damaged_pictures_stop_the_stream_with_a_list(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "b" / "1.jpg").write_bytes(b"torn")
    with (
        feed(root, max_failed_fraction=0.005) as one,
        pytest.raises(FailureBudgetError, match=r"6 pictures of 1,000 draws .*b/1\.jpg \(6 x\)"),
    ):
        take(one, 100)


def test_a_folder_that_is_gone_stops_the_stream_at_once(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "copy")
    with feed(root) as one:
        take(one, 1)
        one.close()  # what was read ahead is let go
        shutil.rmtree(root)
        with pytest.raises(FailureBudgetError, match="no readable picture in 16 attempts"):
            take(one, 1)


def test_a_machine_that_cannot_read_stops_the_stream_and_replaces_nothing(folder, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    with feed(folder) as one:
        take(one, 1)
        one.close()
        monkeypatch.setattr(Path, "open", broken)
        with pytest.raises(PathfmError, match=r"Input/output error\. The run can go on"):
            take(one, 1)
        assert one.next_draw == 6
        monkeypatch.undo()
        assert one.next_batch().draws[0] == 6


@pytest.mark.parametrize("change", ["folder", "seed", "size", "classes", "fit", "slides"])
def test_a_state_of_another_stream_is_refused_with_both(folder, tmp_path, change):
    with feed(folder) as one:
        state = one.state_dict()
    root = folder
    if change == "folder":
        root = shutil.copytree(folder, tmp_path / "copy")
        (root / "a" / "new.png").touch()
    options = {"size": {"size_px": 16}, "fit": {"fit": "crop"}}.get(change, {})
    of = sampler(
        root,
        4 if change == "seed" else 3,
        classes=("b", "a", "c") if change == "classes" else tuple(COUNTS),
    )
    if change == "slides":
        state = {"version": 2, "next_draw": 0, "quarantined": []}
    with (
        feed(root, sampler=of, **options) as other,
        pytest.raises(StateMismatchError, match="saved"),
    ):
        other.load_state_dict(state)


def test_a_copy_of_a_folder_elsewhere_goes_on(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "copy")
    with feed(folder) as one:
        whole = take(one, 3)
        one.close()
    with feed(folder) as one, feed(root) as other:
        take(one, 1)
        other.load_state_dict(one.state_dict())
        assert_same(take(other, 2), whole[1:])


# --- the folder ---


def test_classes_are_the_first_folders_and_pictures_may_lie_deeper(tmp_path):
    for name in ("n/s1/1.png", "n/s2/1.PNG", "t/1.jpeg", "t/x/y/2.tiff", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = open_patches(LabelsConfig(patches=tmp_path), with_classes=True)
    assert found.paths == ("n/s1/1.png", "n/s2/1.PNG", "t/1.jpeg", "t/x/y/2.tiff")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.class_names == ("n", "t")
    plain = open_patches(LabelsConfig(patches=tmp_path), with_classes=False)
    assert len(plain) == 5
    assert plain.class_names == ()


def test_links_that_lead_round_in_circles_or_out_are_not_followed(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "c").symlink_to("/")
    assert len(open_patches(LabelsConfig(patches=tmp_path / "root"), with_classes=True)) == 4


@pytest.mark.parametrize(
    ("files", "options", "told"),
    [
        ([], {}, r"no picture \(.png"),
        (["a/1.png", "a/2.png"], {}, "only the class 'a'; labels need at least two classes"),
        (["1.png", "2.png"], {}, "no class"),
        (["a/1.png", "a/2.png", "b/1.png"], {}, r"class 'b' has 1 picture\(s\); a class needs at least two"),
        (["a/1.png", "a/2.png", "b/1.png"], {"classes": ("a", "z")}, "no 'z' in subfolders of"),
    ],
)  # fmt: skip
def test_useless_folders_are_told_in_one_line(tmp_path, files, options, told):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(PathfmError, match=told) as caught:
        open_patches(LabelsConfig(patches=tmp_path, **options), with_classes=True)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(PathfmError, match=r"nowhere: no such folder; wanted .*/nowhere/<class>"):
        open_patches(LabelsConfig(patches=tmp_path / "nowhere"), with_classes=True)


def test_real_patches_come_balanced_and_pixel_for_pixel(shared_data):
    root = shared_data / "patches" / "colorectal5"
    config = LabelsConfig(patches=root, patches_mpp=0.5)
    of = PictureSampler(open_patches(config, with_classes=True), config, 0, balanced=True)
    with PictureFeed(of, 40, size_px=224, mpp=0.5) as one:
        batch = one.next_batch()
    assert of.class_names == ("AC", "H", "S", "T", "V")
    assert np.bincount(batch.labels).tolist() == [8] * 5
    for pixels, ref, label in zip(batch.pixels, batch.refs, batch.labels.tolist(), strict=True):
        assert ref.slide_id.startswith(f"{of.class_names[label]}/")
        assert np.array_equal(pixels, np.asarray(read_picture(root / ref.slide_id)))
        assert ref.mpp == 0.5
