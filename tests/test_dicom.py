"""DICOM whole-slide images: pixels against wsidicom and OpenSlide, layouts, stores, refusals, privacy."""

from __future__ import annotations

import io
import shutil
import struct
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import openslide
import pytest
from PIL import Image

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    SlideIndex,
    find_slides,
    open_slide,
    read_slide_index,
)
from online_patching.errors import (
    DamagedSlideError,
    MppError,
    NotASlideError,
    ObjectChangedError,
    ShortReadError,
    SlideError,
    StoreUnavailableError,
    TileDecodeError,
    UnsupportedSlideError,
)
from online_patching.formats import dicom, dicom_walk
from online_patching.formats.dicom_attributes import StoredOtherwiseError
from online_patching.formats.dicom_frames import frame_ranges
from online_patching.formats.dicom_tags import Source, read_attributes
from online_patching.plan import plan_patch
from online_patching.stores import Stores
from online_patching.testing import SyntheticSlide
from online_patching.testing import dicom as written
from online_patching.testing.dicom import SYNTAXES, Written, instance, text, write_dicom
from online_patching.testing.writers import encode_jpeg, shrink
from tests.servers import FaultServer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pydicom
    from pydicom.pixels.utils import pixel_array
    from wsidicom import WsiDicom

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pydicom", "ignore::UserWarning:wsidicom"
)

SIZE = (300, 205)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return SyntheticSlide(seed=3, width_px0=SIZE[0], height_px0=SIZE[1], mpp=0.5).render(
        0, 0, *SIZE
    )


@pytest.fixture
def levels(picture: np.ndarray) -> list[np.ndarray]:
    return [picture, shrink(picture, 2)]


def ours(uri: Path | str, level: int = 0) -> np.ndarray:
    with open_slide(str(uri)) as slide:
        return slide.read_region(
            (0, 0), level, (slide.levels[level].width_px, slide.levels[level].height_px)
        )


def batch_of(folder: Path) -> bytes:
    """Patches of two magnifications through the loader."""
    index = read_slide_index(str(folder))
    everything = ForegroundMask.everything(index)
    sampler = PatchSampler([index], [everything], size_px=32, mpp=[0.5, 1.1], seed=5)
    with PatchLoader(sampler, 16, threads=2) as loader:
        batch = loader.next_batch()
        assert not batch.failures
        return batch.pixels.tobytes()


def of_wsidicom(folder: Path, level: int = 0) -> np.ndarray:
    with WsiDicom.open(folder) as slide:
        chosen = slide.levels[level]
        size = (chosen.size.width, chosen.size.height)
        return np.asarray(slide.read_region((0, 0), chosen.level, size).convert("RGB"))


def of_openslide(file: Path, level: int = 0) -> np.ndarray:
    with openslide.OpenSlide(file) as slide:
        found = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    return np.where(found[..., 3:] == 0, 255, found[..., :3]).astype(np.uint8)


def marked(kind: str, subsampling: int) -> Any:
    """JPEG with the markers that Pillow writes: JFIF for YCbCr, Adobe for RGB."""

    def encode(tile: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(tile).save(
            out, "JPEG", quality=90, subsampling=subsampling, keep_rgb=kind == "rgb"
        )
        return out.getvalue()

    return encode


def bare(kind: str, **options: Any) -> Any:
    return lambda tile: encode_jpeg(tile, kind, **options)


SPARSE = Written(organization="TILED_SPARSE")
BOTH = {
    "jpeg": Written(),
    "extended offset table": Written(table="extended"),
    "no table": Written(table="none"),
    "lengths undefined": Written(undefined=True),
    "sparse": SPARSE,
    "sparse, tiles missing": replace(SPARSE, missing=frozenset({(0, 1, 1), (0, 4, 4), (1, 0, 0)})),
    "sparse, lengths undefined": replace(SPARSE, undefined=True, missing=frozenset({(0, 2, 3)})),
    "no organization, full": Written(organization=""),
    "rgb, bare": Written(photometric="RGB", jpeg=bare("rgb")),
    "rgb, bare, ids 1 2 3": Written(photometric="RGB", jpeg=bare("rgb", component_ids=(1, 2, 3))),
    "ybr, bare, ids 0 1 2": Written(jpeg=bare("ycbcr", component_ids=(0, 1, 2))),
    "ybr 4:4:4": Written(jpeg=bare("ycbcr", subsampling="4:4:4")),
    "jfif": Written(jpeg=marked("ycbcr", 2)),
    "jfif 4:4:4 declared rgb": Written(photometric="RGB", jpeg=marked("ycbcr", 0)),
    "native": Written(syntax="explicit"),
    "jpeg 2000": Written(syntax="jpeg2000"),
    "jpeg 2000 lossless": Written(syntax="jpeg2000_lossless"),
    "jpeg 2000 rgb": Written(syntax="jpeg2000_lossless", photometric="RGB"),
    "jpeg 2000 rgb, transformed": Written(syntax="jpeg2000", photometric="RGB", transform=True),
    "jpeg 2000 ict, not transformed": Written(syntax="jpeg2000", transform=False),
    "label, overview, thumbnail": Written(label=True),
}  # fmt: skip


@pytest.mark.parametrize("how", BOTH.values(), ids=list(BOTH))
def test_pixels_are_those_of_wsidicom_and_openslide(how: Written, levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, how)
    index = read_slide_index(str(folder))
    assert [(lv.width_px, lv.height_px) for lv in index.levels] == [SIZE, (150, 102)]
    assert (index.container, index.mpp_source) == ("dicom", "dicom pixel spacing")
    assert index.mpp == pytest.approx(0.5)
    for level in (0, 1):
        mine = ours(folder, level)
        assert np.array_equal(mine, of_wsidicom(folder, level))
        assert np.array_equal(mine, of_openslide(folder / "level-0.dcm", level))
    for level, row, column in how.missing:
        width, height = how.tile_px
        assert (ours(folder, level)[row * height :, column * width :][:height, :width] == 255).all()


def test_a_concatenation_is_one_level_as_openslide_reads_it(levels, tmp_path: Path) -> None:
    whole = write_dicom(tmp_path / "whole", levels)
    for how in (Written(parts=3), replace(SPARSE, parts=4)):
        folder = write_dicom(tmp_path / f"parts-{how.parts}", levels, how)
        index = read_slide_index(str(folder))
        assert len(index.levels) == 2 and len(index.objects) == how.parts + 1
        assert np.array_equal(ours(folder), ours(whole))
        assert np.array_equal(ours(folder), of_openslide(folder / "level-0-0.dcm"))
        (folder / "level-0-1.dcm").unlink()
        with pytest.raises(DamagedSlideError, match="a part is missing"):
            read_slide_index(str(folder))


WSIDICOM_ONLY = {
    "jpeg extended": Written(syntax="jpeg_extended"),
    "rle": Written(syntax="rle"),
    "implicit": Written(syntax="implicit"),
    "implicit, lengths undefined, sparse": replace(SPARSE, syntax="implicit", undefined=True),
    "high-throughput jpeg 2000": Written(syntax="htj2k"),
    "full-range ybr": Written(photometric="YBR_FULL"),
    "adobe rgb declared ybr": Written(jpeg=marked("rgb", 0)),
    "two focal planes": replace(SPARSE, planes=2),
    "three focal planes, sparse": replace(SPARSE, planes=3),
    "gray in bright field": Written(syntax="explicit", gray=True),
}


@pytest.mark.parametrize("how", WSIDICOM_ONLY.values(), ids=list(WSIDICOM_ONLY))
def test_what_openslide_refuses_is_read_as_wsidicom_reads_it(
    how: Written, levels, tmp_path: Path
) -> None:
    folder = write_dicom(tmp_path / "slide", levels, how)
    for level in (0, 1):
        assert np.array_equal(ours(folder, level), of_wsidicom(folder, level))


@pytest.mark.parametrize(
    "how",
    [Written(fragments=3), replace(SPARSE, fragments=2, syntax="jpeg2000", missing=frozenset({(0, 1, 1)})),
     Written(fragments=2, parts=2, syntax="rle")],
    ids=["jpeg", "jpeg 2000, sparse", "rle, in parts"],
)  # fmt: skip
def test_frames_in_several_fragments_are_joined(how: Written, levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "split", levels, how)
    whole = write_dicom(tmp_path / "whole", levels, replace(how, fragments=1))
    assert all(level.codec.fragments for level in read_slide_index(str(folder)).levels)
    assert not any(level.codec.fragments for level in read_slide_index(str(whole)).levels)
    for level in range(2):
        assert np.array_equal(ours(folder, level), ours(whole, level))
    assert batch_of(folder) == batch_of(whole)


def test_fragments_are_noticed_where_only_the_longest_frames_are_split(
    levels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers with a largest fragment split few frames: read as they lie, those would be damage at best."""
    sizes = [len(encode_jpeg(tile)) for _, tile in written._frames(levels[0], 0, Written())]
    most = max(sizes) - 1
    assert max(sizes) not in (sizes[0], sizes[len(sizes) // 2], sizes[-2], sizes[-1])
    monkeypatch.setattr(
        written,
        "_pieces",
        lambda frame, _: [frame[:most], *([frame[most:]] if frame[most:] else [])],
    )
    folder = write_dicom(tmp_path / "split", levels[:1], Written(fragments=2))
    monkeypatch.undo()
    whole = write_dicom(tmp_path / "whole", levels[:1], Written())
    assert np.array_equal(ours(folder), ours(whole))
    (level,) = read_slide_index(str(folder)).levels
    first, stop = level.byte_range(0)
    data = bytearray((folder / "level-0.dcm").read_bytes())
    assert data[first : first + 4] == b"\xfe\xff\x00\xe0"
    data[first + 4 : first + 8] = struct.pack("<I", stop - first)  # past the frame's end
    (folder / "level-0.dcm").write_bytes(data)
    with pytest.raises(SlideError):
        ours(folder)


@pytest.mark.parametrize(
    "how", [Written(syntax="explicit", planar=True), Written(syntax="rle"), Written(syntax="implicit")],
    ids=["planes apart", "run lengths", "implicit"],
)  # fmt: skip
def test_samples_stored_without_loss_come_back_as_they_were(
    how: Written, levels, tmp_path: Path
) -> None:
    folder = write_dicom(tmp_path / "slide", levels, how)
    assert np.array_equal(ours(folder), levels[0])
    with pydicom.dcmread(folder / "level-0.dcm") as found:
        first = pixel_array(found, index=0)
    assert np.array_equal(ours(folder)[:48, :64], first)


@pytest.mark.parametrize("syntax", ["explicit", "rle"])
def test_samples_kept_as_ybr_full_are_turned_into_rgb_as_pydicom_does(
    syntax: str, levels, tmp_path: Path
) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(syntax=syntax, photometric="YBR_FULL"))
    with pydicom.dcmread(folder / "level-0.dcm") as found:
        first = pixel_array(found, index=0)
    assert np.abs(ours(folder)[:48, :64].astype(int) - first).max() <= 1  # it rounds otherwise


def test_what_a_stream_says_of_its_colours_is_believed(levels, tmp_path: Path) -> None:
    """Where declaration and stream contradict each other the true picture is the stream's."""
    rgb = bare("rgb", component_ids=(82, 71, 66))
    for number, how in enumerate((
        Written(photometric="RGB", jpeg=marked("ycbcr", 2)),  # pathml_small_dicom.dcm
        Written(photometric="YBR_FULL", jpeg=marked("rgb", 0)),  # CMU-1-Small-Region
        Written(photometric="YBR_FULL_422", jpeg=rgb),
    )):  # fmt: skip
        folder = write_dicom(tmp_path / str(number), levels, how)
        assert np.abs(ours(folder).astype(int) - levels[0]).mean() < 3


def test_focal_planes_of_a_full_slide_give_the_middle_one(levels, tmp_path: Path) -> None:
    how = Written(planes=3, syntax="explicit")
    folder = write_dicom(tmp_path / "slide", levels, how)
    assert np.array_equal(ours(folder), np.clip(levels[0].astype(int) + 10, 0, 255))


def test_coarser_patches_of_jpeg_2000_come_from_fewer_resolutions(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels[:1], Written(syntax="jpeg2000"))
    index = read_slide_index(str(folder))
    assert index.levels[0].codec.reductions == 2
    with open_slide(index) as slide:
        patch = slide.read_patch(x_um=0, y_um=0, mpp=1.0, size_px=100)
    assert np.abs(patch.astype(int) - levels[1][:100, :100]).mean() < 4


def test_the_imaged_volume_gives_what_pixel_spacing_does_not(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(shared_spacing=False))
    index = read_slide_index(str(folder))
    assert index.mpp == pytest.approx(0.5, rel=1e-6)
    assert index.mpp_source == "dicom volume size"
    none: dict[int, Any] = {tag: (tag, "", b"") for tag in (0x00480001, 0x00480002)}
    folder = write_dicom(tmp_path / "none", levels, Written(shared_spacing=False, values=none))
    with pytest.raises(MppError, match="carries no µm/px"):
        read_slide_index(str(folder))
    assert read_slide_index(str(folder), mpp=0.25).mpp == 0.25


def test_each_file_of_a_series_names_the_slide(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(label=True))
    whole = read_slide_index(str(folder))
    assert [item.name for item in whole.objects] == ["level-0.dcm", "level-1.dcm"]
    for name in ("level-0.dcm", "level-1.dcm", "label.dcm"):
        index = read_slide_index(str(folder / name))
        assert index.digest == whole.digest and index.content_hash == whole.content_hash
        assert np.array_equal(ours(folder / name), ours(folder))
    index.save(tmp_path / "saved")
    assert SlideIndex.load(tmp_path / "saved").locate(200, 210)[0] == str(folder / "level-0.dcm")
    alone = tmp_path / "alone" / "level-0.dcm"
    alone.parent.mkdir()
    shutil.copy(folder / "level-0.dcm", alone)
    index = read_slide_index(str(alone))
    assert index.objects == () and index.token and np.array_equal(ours(alone), ours(folder))


def test_series_that_share_a_folder_are_slides_of_their_own(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "all", levels, Written(label=True))
    other = write_dicom(tmp_path / "other", [levels[1]], Written(series="8"))
    shutil.move(other / "level-0.dcm", folder / "z.dcm")
    other.rmdir()
    (folder / "notes.txt").write_text("nothing to see")
    with pytest.raises(
        UnsupportedSlideError, match=r"2 slides \(level-0.dcm, z.dcm\): name one file"
    ):
        read_slide_index(str(folder))
    found = find_slides(str(tmp_path))
    assert found == [str(folder / "level-0.dcm"), str(folder / "z.dcm")]
    assert [len(read_slide_index(uri).levels) for uri in found] == [2, 1]
    shutil.move(folder / "z.dcm", other.with_suffix(".dcm"))
    assert find_slides(str(tmp_path)) == [str(folder), str(other.with_suffix(".dcm"))]


def test_pyramids_of_one_series_are_slides_of_their_own(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "all", levels, Written(pyramid="1"))
    other = write_dicom(tmp_path / "other", [levels[0][:150]], Written(pyramid="2"))
    shutil.move(other / "level-0.dcm", folder / "z.dcm")
    assert [len(read_slide_index(uri).levels) for uri in find_slides(str(folder))] == [2, 1]


def test_files_named_by_uids_without_a_suffix_are_found(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"1.2.826.0.1.{number}12345")
    assert find_slides(str(tmp_path)) == [str(folder)]
    assert np.abs(ours(folder).astype(int) - levels[0]).mean() < 3
    named = folder.rename(tmp_path / "1.2.826.0.1.77")
    assert read_slide_index(str(named)).slide_id == "1.2.826.0.1.77"


def test_a_prefix_is_read_as_a_folder_is(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(label=True))
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/series/one/{file.name}", file.read_bytes())
        memory.pipe(f"/series/one/deeper/{file.name}", b"not of this slide")
    try:
        for uri in (
            "memory://series/one",
            "memory://series/one/",
            "memory://series/one/level-1.dcm",
        ):
            assert np.array_equal(ours(uri), ours(folder))
    finally:
        memory.rm("/series", recursive=True)


def test_a_file_over_http_is_read_alone_in_few_requests(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(table="none"))
    with FaultServer(folder) as server:
        mine = ours(f"{server.url}/level-0.dcm")
        assert np.array_equal(mine, ours(folder))
        with open_slide(f"{server.url}/level-0.dcm") as slide:
            before = server.seen["requests"]
            read_slide_index(slide.index.uri)
            assert server.seen["requests"] - before <= 6


@pytest.mark.parametrize("fails", ["list", "read_many"])
def test_levels_are_not_lost_to_a_store_that_fails_for_a_while(
    fails: str, levels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read without its siblings, a file would be a slide of one level, for good."""
    folder = write_dicom(tmp_path / "slide", levels)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/lost/slide", recursive=True)
    uri, failed = "memory://lost/slide/level-0.dcm", StoreUnavailableError("memory://lost", "busy.")

    class Busy(Stores):
        def list(self, *about: Any) -> Any:
            if fails == "list":
                raise failed
            return super().list(*about)

        def read_many(self, requests: Any) -> Any:
            found = super().read_many(requests)
            busy = [fails == "read_many" and "level-1" in request[0] for request in requests]
            return [failed if bad else data for bad, data in zip(busy, found, strict=True)]

    stores = Busy()
    try:
        assert len(read_slide_index(uri).levels) == 2
        with pytest.raises(StoreUnavailableError):
            read_slide_index(uri, stores=stores)
    finally:
        memory.rm("/lost", recursive=True)
        stores.close()


class SlowStores(Stores):
    """Stores whose every answer takes a while; counts how many wait at a time."""

    waiting = most = 0

    def read_many(self, requests: Any) -> Any:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        time.sleep(0.02)
        try:
            return super().read_many(requests)
        finally:
            self.waiting -= 1


@pytest.mark.parametrize("how", [SPARSE, Written(table="extended", label=True)])
def test_far_files_of_a_series_are_read_several_at_a_time(
    how: Written, picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom, "_FIRST_BYTES", 1400)  # as far as it takes to want more
    levels = [picture, *(shrink(picture, k) for k in (2, 3, 4))]
    folder = write_dicom(tmp_path / "slide", levels, how)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/far/slide", recursive=True)
    stores = SlowStores()
    try:
        far = read_slide_index("memory://far/slide", stores=stores)
    finally:
        memory.rm("/far", recursive=True)
        stores.close()
    near = read_slide_index(str(folder))
    assert [item.name for item in far.objects] == [item.name for item in near.objects]
    for ours, theirs in zip(far.levels, near.levels, strict=True):
        assert np.array_equal(ours.rows, theirs.rows)
    assert 2 < stores.most <= 4


def test_items_without_a_table_are_walked_from_many_places_at_once(
    levels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise holds what looks like items; guesses that are wrong must not count."""
    monkeypatch.setattr(dicom_walk, "_ONE_REQUEST_BYTES", 0)
    noise = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    trap = b"\xfe\xff\x00\xe0\x20\x00\x00\x00" + bytes(32)
    noise.reshape(-1)[: 40 * len(trap)] = np.frombuffer(trap * 40, np.uint8)
    how = Written(tile_px=(16, 16), table="none", jpeg=lambda tile: tile.tobytes() + b"\xff\xd9")
    for picture in (levels[0], np.tile(noise, (5, 5, 1))):
        data = instance(picture, 0, 1.0, how, 0, 1)
        frames = -(-picture.shape[0] // 16) * -(-picture.shape[1] // 16)
        spans: list[int] = []

        def fetch(
            ranges: list[tuple[int, int]], data: bytes = data, spans: list[int] = spans
        ) -> list[bytes]:
            spans.append(len(ranges))
            return [data[start:stop] for start, stop in ranges]

        found = []
        for remote in (False, True):
            spans.clear()
            source = Source(fetch, len(data), data[:4096], remote=remote)
            attributes = read_attributes(source, lambda _: True)
            found.append(frame_ranges(source, attributes, frames, 768))
            assert len(spans) >= frames if not remote else len(spans) < frames and max(spans) > 10
        assert all(map(np.array_equal, found[0], found[1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = pydicom.dcmread(io.BytesIO(data)).PixelData
            fragments = list(pydicom.encaps.generate_fragments(theirs))[1:]
        starts, lengths, _ = found[0]
        assert [data[a : a + n] for a, n in zip(starts, lengths, strict=True)] == fragments


def test_items_are_not_asked_for_one_by_one_without_end(levels) -> None:
    data = instance(levels[0], 0, 1.0, Written(table="none"), 0, 1)
    source = Source(lambda _: pytest.fail("nothing need be read"), 2**40, data, remote=True)
    with pytest.raises(StoredOtherwiseError, match="400,000 frames lie"):
        dicom_walk.walk_items(source, 1000, 400_000)


def test_the_whole_loader_delivers_what_a_slide_reads(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, replace(SPARSE, parts=3))
    index = read_slide_index(str(folder / "level-1.dcm"))
    assert index.beside  # which must survive the corpus that the loader makes
    tissue = ForegroundMask.from_array(np.ones((20, 30), bool), SIZE, (0.5, 0.5))
    sampler = PatchSampler([index], [tissue], size_px=32, mpp=0.6, seed=2)
    refs = sampler.refs(sampler.draw_batch(np.arange(24)))
    with PatchLoader(sampler, 24, threads=2) as loader, open_slide(index) as slide:
        batch = loader.next_batch()
        assert not batch.failures
        for ref, pixels in zip(refs, batch.pixels, strict=True):
            assert np.array_equal(pixels, slide.read_plan(plan_patch(index, ref)))


def test_a_changed_instance_is_noticed(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels)
    index = read_slide_index(str(folder))
    with (folder / "level-1.dcm").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ObjectChangedError, match=r"level-1\.dcm"):
        open_slide(index)


def test_pixels_of_labels_and_overviews_are_not_even_touched(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(label=True))
    for kind in ("label", "overview", "thumbnail"):
        (folder / f"{kind}.dcm").chmod(0o644)
        data = (folder / f"{kind}.dcm").read_bytes()
        (folder / f"{kind}.dcm").write_bytes(data[: data.index(b"\xe0\x7f\x10\x00") + 4])
    index = read_slide_index(str(folder))
    assert {item.name for item in index.objects} == {"level-0.dcm", "level-1.dcm"}
    for file in folder.glob("level*"):
        file.unlink()
    with pytest.raises(UnsupportedSlideError, match="only LABEL, OVERVIEW, THUMBNAIL"):
        read_slide_index(str(folder))


PATIENT = "DOE^JANE-9f8e7d"


def test_nothing_of_a_patient_is_kept_or_told(levels, tmp_path: Path) -> None:
    names = (0x00080050, 0x00080080, 0x00080090, 0x00081030, 0x00100010, 0x00100020, 0x00100030, 0x00104000,
             0x00181000, 0x00200010, 0x00400512, 0x00400551)  # fmt: skip
    planted = [text(tag, "LO", PATIENT) for tag in names]
    sequence: Any = (
        0x00400560,
        "SQ",
        [[text(0x00400551, "LO", PATIENT), (0x00080100, "SQ", [[*planted]])]],
    )
    how = Written(extra=[*planted, sequence], label=True)
    folder = write_dicom(tmp_path / "slide", levels, how)
    assert PATIENT.encode() in (folder / "level-0.dcm").read_bytes()
    index = read_slide_index(str(folder))
    index.save(tmp_path / "index")
    kept = (tmp_path / "index").read_bytes() + repr(index).encode()
    data = bytearray((folder / "level-0.dcm").read_bytes())
    told = []
    for at in range(132, data.index(b"\xe0\x7f\x10\x00"), 7):  # each a lie of its own
        lie = data.copy()
        lie[at] ^= 0xFF
        (folder / "level-0.dcm").write_bytes(lie)
        try:
            read_slide_index(str(folder))
        except SlideError as error:
            told.append(str(error))
    assert len(told) > 40
    everything = kept + "\n".join(told).encode()
    for secret in (PATIENT, "DOE", "9f8e7d", "1.2.826.0.1.3680043.8.498.7"):
        assert secret.encode() not in everything


def value(tag: int, kind: str, data: bytes | str) -> dict[int, Any]:
    return {tag: text(tag, kind, data) if isinstance(data, str) else (tag, kind, data)}


def us(tag: int, number: int) -> dict[int, Any]:
    return value(tag, "US", struct.pack("<H", number))


def ul(tag: int, number: int) -> dict[int, Any]:
    return value(tag, "UL", struct.pack("<L", number))


LIGHT = {
    0x00480105: (0x00480105, "SQ", [[(0x00220016, "SQ", [[text(0x00080100, "SH", "111743")]])]])
}
TWO_PATHS = {0x00480105: (0x00480105, "SQ", [[text(0x00480106, "SH", n)] for n in "12"])}
REFUSED: dict[str, tuple[Written, type[SlideError], str, str]] = {
    "epifluorescence": (Written(values=LIGHT), UnsupportedSlideError, "fluorescence", "not a stained"),
    "gray of unknown light": (
        Written(gray=True, syntax="explicit", values={0x00480105: (0x00480105, "", b"")}),
        UnsupportedSlideError, "fluorescence", "gray and not said to be brightfield"),
    "two optical paths": (Written(values=TWO_PATHS), UnsupportedSlideError, "multiplex", "2 optical paths"),
    "two optical paths by number": (
        Written(values=ul(0x00480302, 5)), UnsupportedSlideError, "multiplex", "5 optical paths"),
    "16 bits": (Written(values=us(0x00280100, 16)), UnsupportedSlideError, "unsupported", "not 8-bit RGB"),
    "12 of 16 bits": (
        Written(values=us(0x00280100, 16) | us(0x00280101, 12)), UnsupportedSlideError, "unsupported",
        "3 sample.s. of 12 bits"),
    "label in the picture": (
        Written(values=value(0x00480010, "CS", "YES")), UnsupportedSlideError, "unsupported", "label is said"),
    "jpeg-ls": (Written(syntax="jpegls"), UnsupportedSlideError, "unsupported", "JPEG-LS"),
    "palette": (
        Written(values=value(0x00280004, "CS", "PALETTE COLOR")), UnsupportedSlideError, "unsupported",
        "'PALETTE COLOR' is not read"),
    "subsampled samples that are not compressed": (
        Written(syntax="explicit", photometric="YBR_FULL_422"), UnsupportedSlideError, "unsupported",
        "not compressed"),
    "fragments, no table": (
        Written(fragments=2, table="none"), UnsupportedSlideError, "unsupported", "no table of which"),
    "fragments, extended table": (
        Written(fragments=2, table="extended"), UnsupportedSlideError, "unsupported", "several fragments"),
    "a CT": (
        Written(values=value(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1.2")), NotASlideError, "not_a_slide",
        "of no whole-slide image"),
    "frames that lack": (
        Written(values=value(0x00280008, "IS", "24")), SlideError, "damaged", "24 frames"),
    "a side of nothing": (Written(values=ul(0x00480006, 0)), DamagedSlideError, "damaged", "claims 0 x"),
    "a huge side": (Written(values=ul(0x00480006, 2**31)), DamagedSlideError, "damaged", "2,147,483,648"),
    "frames of nothing": (Written(values=us(0x00280010, 0)), DamagedSlideError, "damaged", "64 x 0"),
    "huge frames": (
        Written(values=us(0x00280010, 65535) | us(0x00280011, 65535)), UnsupportedSlideError,
        "unsupported", "too large to read"),
    "words for a number": (
        Written(values=value(0x00280008, "IS", "many")), DamagedSlideError, "damaged", "'many'"),
    "sparse, places lacking": (
        Written(values=value(0x00209311, "CS", "TILED_SPARSE")), DamagedSlideError, "damaged", "places 0 of"),
    "sparse, off the grid": (
        replace(SPARSE, values=us(0x00280011, 60)), SlideError, "unsupported", "do not lie on a grid"),
    "spacing of no scanner": (Written(mpp=90.0), MppError, "bad_mpp", "outside"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused_is_refused_with_words_and_a_code(case, levels, tmp_path: Path) -> None:
    how, kind, code, words = case
    folder = write_dicom(tmp_path / "slide", levels[:1], how)
    with pytest.raises(kind, match=words) as caught:
        read_slide_index(str(folder))
    assert caught.value.code == code and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uid", "words"),
    [("1.2.840.10008.1.2.1.99", "deflated"), ("1.2.840.10008.1.2.2", "big-endian"),
     ("1.2.840.10008.1.2.4.70", "lossless JPEG"), ("1.2.840.10008.1.2.4.100", "video"),
     ("1.2.840.10008.1.2.8.1", "is not read")],
)  # fmt: skip
def test_other_transfer_syntaxes_are_named(
    uid: str, words: str, levels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SYNTAXES, "explicit", uid)
    folder = write_dicom(tmp_path / "slide", levels[:1], Written(syntax="explicit"))
    with pytest.raises(UnsupportedSlideError, match=words):
        read_slide_index(str(folder))


def test_two_volumes_of_one_size_are_told_apart_by_what_they_are(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels)
    shutil.copy(
        folder / "level-0.dcm", folder / "copy.dcm"
    )  # the same instance twice: one is enough
    assert len(read_slide_index(str(folder)).levels) == 2
    write_dicom(tmp_path / "b", [levels[0]], Written(values=value(0x00080018, "UI", "1.2.3.4")))
    shutil.copy(tmp_path / "b" / "level-0.dcm", folder / "copy.dcm")
    with pytest.raises(UnsupportedSlideError, match="both 300 x 205 px") as caught:
        read_slide_index(str(folder))
    assert caught.value.code == "unsupported"
    other = {0x00480105: (0x00480105, "SQ", [[text(0x00480106, "SH", "DAPI")]])}
    write_dicom(
        tmp_path / "c", [levels[0]], Written(values=value(0x00080018, "UI", "1.2.3.4") | other)
    )
    shutil.copy(tmp_path / "c" / "level-0.dcm", folder / "copy.dcm")
    with pytest.raises(UnsupportedSlideError, match="both 300 x 205 px") as caught:
        read_slide_index(str(folder))
    assert caught.value.code == "multiplex"


def test_a_folder_of_too_many_files_is_refused_rather_than_half_read(
    levels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dicom(tmp_path / "slide", levels, Written(parts=4))
    monkeypatch.setattr(dicom, "MAX_FILES", 3)
    for uri in (folder, folder / "level-1.dcm"):
        with pytest.raises(UnsupportedSlideError, match="more than 3 files lie in one folder"):
            read_slide_index(str(uri))


def test_volumes_of_other_shapes_are_no_pyramid(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", [levels[0], levels[0][:100]])
    with pytest.raises(UnsupportedSlideError, match="are no pyramid"):
        read_slide_index(str(folder))


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
@pytest.mark.parametrize("syntax", ["jpeg", "explicit"])
def test_a_file_cut_anywhere_is_an_error_of_ours(
    table: Any, syntax: str, levels, tmp_path: Path
) -> None:
    folder = write_dicom(tmp_path / "slide", levels[:1], Written(table=table, syntax=syntax))
    file = folder / "level-0.dcm"
    whole = file.read_bytes()
    for cut in [*range(140, 2600, 61), len(whole) // 2, len(whole) - 20]:
        file.write_bytes(whole[:cut])
        with pytest.raises(SlideError) as caught:
            read_slide_index(str(folder))
        assert isinstance(caught.value, ShortReadError | DamagedSlideError)


def test_a_damaged_frame_is_named_when_it_is_read(levels, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "slide", levels)
    index = read_slide_index(str(folder))
    _, start, *_ = index.locate(*index.levels[0].byte_range(7))
    file = folder / "level-0.dcm"
    data = bytearray(file.read_bytes())
    data[start : start + 60] = bytes(60)
    file.write_bytes(data)
    with pytest.raises(TileDecodeError, match="level 0 tile 7"):
        ours(folder)


def test_an_instance_without_an_image_type_is_a_volume_when_it_is_tiled(shared_data: Path) -> None:
    uri = str(shared_data / "wsi" / "vendor" / "pathml_small_dicom.dcm")
    with pytest.raises(MppError, match="differ by axis"):
        read_slide_index(uri)
    with open_slide(uri, mpp=0.5) as slide, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert slide.index.objects == () and slide.dimensions == (3236, 2638)
        with pydicom.dcmread(uri) as found:
            frame = next(pydicom.encaps.generate_frames(found.PixelData, number_of_frames=42))
        first = np.asarray(
            Image.open(io.BytesIO(frame))
        )  # JFIF, subsampled: RGB is what it is declared
        assert np.array_equal(slide.read_region((0, 0), 0, (500, 500)), first)


def test_real_slides_have_the_pixels_of_wsidicom_openslide_and_their_svs(shared_data: Path) -> None:
    wsi = shared_data / "wsi"
    region = wsi / "vendor" / "wsic_dicom_CMU-1-Small-Region"
    box = ((500, 700), 0, (600, 500))
    with (
        open_slide(str(region)) as slide,
        open_slide(str(wsi / "vendor" / "CMU-1-Small-Region.svs")) as svs,
    ):
        mine = slide.read_region(*box)
        assert np.array_equal(mine, svs.read_region(*box))
    with WsiDicom.open(region) as theirs:
        assert np.array_equal(mine, np.asarray(theirs.read_region(*box))[..., :3])
    gallery = wsi / "converted" / "gallery-06_oral_scc_dicom"
    largest = max(gallery.iterdir(), key=lambda file: file.stat().st_size)
    with open_slide(str(gallery)) as slide, openslide.OpenSlide(largest) as theirs:
        assert [(lv.width_px, lv.height_px) for lv in slide.levels] == list(theirs.level_dimensions)
        assert slide.mpp == pytest.approx(float(theirs.properties["openslide.mpp-x"]))
        for level, corner in ((0, (3003, 2001)), (1, (4 * 777, 4 * 901)), (2, (16 * 33, 16 * 40))):
            mine = slide.read_region(corner, level, (400, 300))
            assert np.array_equal(
                mine, np.asarray(theirs.read_region(corner, level, (400, 300)))[..., :3]
            )
    boxes = [str(wsi / "vendor" / f"openslide_boxes_{number}.dcm") for number in (0, 1)]
    assert [uri for uri in find_slides(str(wsi / "vendor")) if "boxes_" in uri] == boxes[:1]
    assert np.array_equal(ours(boxes[1]), of_openslide(Path(boxes[0])))
