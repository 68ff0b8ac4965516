"""Remembered entropy-decoder states: the pixels and errors of tiles decoded from them, beside plain ones."""

import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from online_patching import ForegroundMask, PatchLoader, PatchSampler, native
from online_patching.batch_plan import CANVAS, FILE, OUTPUT, TILE, slide_keys
from online_patching.decode import decode_tile
from online_patching.slide_index import Codec
from online_patching.testing.writers import split_tables
from tests.conftest import noise
from tests.test_native import HEIGHT, PICTURE, STREAMS, WIDTH, jpeg

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=native.ABOUT)

KEYS = count(1)
"""A key for each example: tests of one module share the process's table."""

CODEC = Codec("jpeg", "ycbcr")
WHOLE = (0, 0, WIDTH, HEIGHT)
COVERED = dict(STREAMS)


@pytest.fixture(autouse=True)
def remembering() -> Iterator[None]:
    native.remember(0)
    native.remember(2**24)
    yield
    native.remember(0)


def read(body, part, key=1, start=0, codec=CODEC, scale=1, tile=(WIDTH, HEIGHT)):
    """A part (left, top, right, bottom) of one tile: its pixels, its status, its message."""
    left, top, right, bottom = part
    w, h = right - left, bottom - top
    canvas, tiles, output = np.zeros(1, CANVAS), np.zeros(1, TILE), np.zeros(1, OUTPUT)
    for name, value in {
        "n_tiles": 1, "n_outputs": 1, "width": w, "height": h, "tile_width": tile[0],
        "tile_height": tile[1], "scale": scale, "tables": 0 if codec.tables else -1, "key": key,
        "colour": ("rgb", "ycbcr", "gray").index(codec.colour),
    }.items():  # fmt: skip
        canvas[name] = value
    tiles[0] = (start, len(body), -1, 0, left, top, w, h, 0, 0, 0, 0)
    output[0] = (0, 0, w, h, 0, w, h, 0, 0, w, h, 1, 0)
    out = np.full((h, w, 3), 7, np.uint8)
    native.read(canvas, tiles, output, np.zeros(0, FILE), (codec.tables,), (body,), out, 0, 1)
    return out, int(canvas[0]["status"]), bytes(canvas[0]["message"])


def gained(before: dict[str, int]) -> dict[str, int]:
    """What was counted since."""
    now = native.remembered()
    return {name: now[name] - before[name] for name in now if now[name] != before[name]}


@st.composite
def parts(draw, width=WIDTH, height=HEIGHT):
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("step_px", [8, 32, 48, 4096])
@given(st.lists(parts(), min_size=5, max_size=30))
@example(
    [
        WHOLE,
        (WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT),
        (0, HEIGHT - 1, 1, HEIGHT),
        (WIDTH - 1, 0, WIDTH, 1),
    ]
)
@settings(max_examples=15, deadline=None)
def test_parts_from_states_are_the_whole_tile_cut(name, step_px, several):
    native.remember(2**24, step_px)
    body, key = STREAMS[name], next(KEYS)
    whole = decode_tile(CODEC, body, WIDTH, HEIGHT)
    for left, top, right, bottom in several:
        got, status, message = read(body, (left, top, right, bottom), key)
        assert status == native.OK, message
        assert (got == whole[top:bottom, left:right]).all()
    assert native.remembered()["failed"] == 0


@pytest.mark.parametrize("name", COVERED)
def test_every_kind_that_is_covered_is_decoded_from_states(name):
    side = 32 * 7  # whole MCUs of every kind
    picture = noise((side, side, 3), 3)
    encode = {"gray": lambda: jpeg(picture=picture[..., 0])}
    body = encode.get(name, lambda: simplejpeg.encode_jpeg(picture, colorsubsampling=name))()
    whole = decode_tile(CODEC, body, side, side)
    parts = [
        (x, y, min(x + w, side), min(y + h, side))
        for x in range(0, side, 17)
        for y in range(60, side, 13)
        for w, h in [(1, 1), (40, 50)]
    ]
    read(body, (0, 0, 1, 1), tile=(side, side))
    before = native.remembered()
    for left, top, right, bottom in parts:
        got, status, _ = read(body, (left, top, right, bottom), tile=(side, side))
        assert status == native.OK
        assert (got == whole[top:bottom, left:right]).all()
    assert gained(before) == {"hits": len(parts)}  # and none failed


def test_states_at_stuffed_bytes_are_right_too():
    native.remember(2**24, 8)
    random = np.random.default_rng(2)
    for key in range(1, 13):  # one state in several hundred begins in a byte of ones
        body = jpeg(quality=98, picture=random.integers(0, 256, (HEIGHT, WIDTH), np.uint8))
        whole = decode_tile(CODEC, body, WIDTH, HEIGHT)
        read(body, (0, 0, 1, 1), key)
        for x in range(4, WIDTH, 8):  # so start at each
            got, status, _ = read(body, (x, 0, x + 1, HEIGHT), key)
            assert status == native.OK
            assert (got == whole[:, x : x + 1]).all()
    assert native.remembered()["failed"] == 0


def test_what_is_not_covered_is_looked_at_once_and_read_as_ever():
    odd = simplejpeg.encode_jpeg(np.ascontiguousarray(PICTURE[:171, :205]), colorsubsampling="420")
    restarts = bytearray(STREAMS["420"])
    at = restarts.index(b"\xff\xda")
    restarts[at:at] = b"\xff\xdd\x00\x04\x00\x00"  # an interval, though of 0: none
    for body, w, h in [
        (STREAMS["411"], WIDTH, HEIGHT),
        (odd, 205, 171),
        (bytes(restarts), WIDTH, HEIGHT),
    ]:
        key, before = next(KEYS), native.remembered()
        whole = decode_tile(CODEC, body, w, h)
        for _ in range(4):
            got, status, _ = read(body, (90, 100, 120, 130), key, tile=(w, h))
            assert status == native.OK
            assert (got == whole[100:130, 90:120]).all()
        now = gained(before)
        assert (now.pop("refused"), now.pop("misses"), now.pop("bytes") < 200) == (1, 1, True)
        assert not now


def test_reduced_tiles_and_slides_without_a_key_are_not_remembered():
    before = native.remembered()
    for _ in range(3):
        read(STREAMS["420"], (50, 60, 80, 80), key=0)
        read(STREAMS["420"], (50, 60, 80, 80), scale=2)
    assert gained(before) == {}
    read(STREAMS["420"], (150, 160, 180, 170))
    read(STREAMS["420"], (50, 60, 80, 80), scale=2)
    assert gained(before) == {
        "tiles": 1,
        "misses": 1,
        "bytes": native.remembered()["bytes"] - before["bytes"],
    }


def test_large_parts_go_the_plain_way():
    read(STREAMS["420"], WHOLE)
    before = native.remembered()
    read(STREAMS["420"], WHOLE)
    read(STREAMS["420"], (0, 0, WIDTH, 20))
    assert gained(before) == {}
    read(STREAMS["420"], (100, 100, 120, 120))
    assert gained(before) == {"hits": 1}


def test_abbreviated_streams_start_from_states_with_the_right_tables():
    bodies = {}
    for quality in (40, 95):
        for sampling in ("420", "444"):
            tables, body = split_tables(jpeg(sampling, quality))
            bodies[quality, sampling] = Codec("jpeg", "ycbcr", tables), body
    for _ in range(3):
        for number, (codec, body) in enumerate(bodies.values()):
            whole = decode_tile(codec, body, WIDTH, HEIGHT)
            got, status, _ = read(body, (100, 130, 140, 170), start=number, codec=codec)
            assert status == native.OK
            assert (got == whole[130:170, 100:140]).all()
    assert native.remembered()["hits"] == 2 * len(bodies)
    # Without its tables it is as broken as before, and with others it is another picture.
    _, body = bodies[40, "420"]
    assert read(body, (100, 130, 140, 170))[1] == native.BAD_TILE
    good, _ = bodies[40, "420"]
    swapped = bytearray(good.tables)  # the codes for DC differences of 3 and of 4 bits
    at = swapped.index(bytes(range(12)))
    swapped[at + 3 : at + 5] = b"\x04\x03"
    for other in (bodies[95, "420"][0], Codec("jpeg", "ycbcr", bytes(swapped))):
        for part in ((100, 130, 140, 150), (100, 130, 140, 170), (0, 80, 30, 90)):
            got, status, message = read(body, part, codec=other)
            plain, plain_status, plain_message = read(body, part, codec=other, key=0)
            assert (status, message) == (plain_status, plain_message)
            assert status != native.OK or (got == plain).all()


def test_tables_made_for_the_tile_do_where_they_have_the_codes():
    smooth = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[..., None] % 256 + np.zeros(3)
    for picture in (PICTURE, smooth.astype(np.uint8), np.full_like(PICTURE, 250)):
        body, key = optimised(picture), next(KEYS)
        whole = decode_tile(CODEC, body, WIDTH, HEIGHT)
        for y in range(0, HEIGHT - 20, 11):
            got, status, _ = read(body, (120, y, 150, y + 20), key)
            assert status == native.OK
            assert (got == whole[y : y + 20, 120:150]).all()


def optimised(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def test_slides_and_offsets_keep_their_own_states():
    native.remember(0)
    native.remember(2**14, 4096)  # few buckets, so that many share one
    bodies = [jpeg(picture=noise((HEIGHT, WIDTH, 3), seed)) for seed in range(6)]
    wholes = [decode_tile(CODEC, body, WIDTH, HEIGHT) for body in bodies]
    for _ in range(3):
        for i in range(48):
            got, status, _ = read(
                bodies[i % 6], (150, 120, 170, 140), key=1 + i % 16, start=i // 16
            )
            assert status == native.OK
            assert (got == wholes[i % 6][120:140, 150:170]).all()
    counted = native.remembered()
    assert (counted["tiles"], counted["hits"], counted["misses"]) == (48, 96, 48)


def test_other_bytes_under_the_same_name_are_read_as_ever():
    first, second = STREAMS["420"], jpeg(picture=noise((HEIGHT, WIDTH, 3), 8))
    same_size = bytearray(first)
    dqt = same_size.index(b"\xff\xdb")
    same_size[dqt + 40] += 1
    read(first, WHOLE)
    for body in (second, bytes(same_size), first):
        whole = decode_tile(CODEC, body, WIDTH, HEIGHT)
        got, status, _ = read(body, (150, 120, 170, 140))
        assert status == native.OK
        assert (got == whole[120:140, 150:170]).all()
    counted = native.remembered()
    assert (counted["hits"], counted["misses"], counted["tiles"]) == (1, 3, 1)


def test_a_full_table_keeps_what_it_has():
    body = STREAMS["420"]
    native.remember(0)
    native.remember(20_000)
    for start in range(100):
        read(body, (100, 100, 120, 120), start=start)
    counted = native.remembered()
    assert 10 < counted["tiles"] < 90
    assert 18_000 < counted["bytes"] <= 20_000
    whole = decode_tile(CODEC, body, WIDTH, HEIGHT)
    for start in range(100):
        got, _, _ = read(body, (100, 100, 120, 120), start=start)
        assert (got == whole[100:120, 100:120]).all()
    assert native.remembered() == counted | {
        "hits": counted["tiles"], "misses": 200 - counted["tiles"]
    }  # fmt: skip
    native.remember(10**6)  # more room: the rest is remembered, and found again among more buckets
    for _ in range(2):
        for start in range(100):
            read(body, (100, 100, 120, 120), start=start)
    now = native.remembered()
    assert now["tiles"] == 100
    assert now["hits"] == counted["tiles"] + counted["tiles"] + 100


def test_nothing_is_remembered_unless_asked_for_and_all_is_forgotten_at_0():
    read(STREAMS["420"], WHOLE)
    assert native.remembered()["tiles"] == 1
    native.remember(0)
    assert set(native.remembered().values()) == {0}
    for _ in range(3):
        read(STREAMS["420"], WHOLE)
    assert set(native.remembered().values()) == {0}
    with pytest.raises(ValueError, match="cannot be remembered"):
        native.remember(-1)
    with pytest.raises(ValueError, match="every 0 px"):
        native.remember(1, 0)


def test_a_new_process_remembers_nothing():
    code = "from online_patching import native; print(set(native.remembered().values()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{0}"


def test_threads_share_the_table_while_it_is_switched_off_and_on():
    bodies = [
        jpeg(name, picture=noise((HEIGHT, WIDTH, 3), seed))
        for seed in range(4)
        for name in ("420", "444")
    ]
    wholes = [decode_tile(CODEC, body, WIDTH, HEIGHT) for body in bodies]
    corners = np.random.default_rng(1).integers(0, [WIDTH - 30, HEIGHT - 30], (4, 300, 2)).tolist()

    def work(thread: int) -> int:
        wrong = 0
        for i, (x, y) in enumerate(corners[thread]):
            if thread == 0 and i % 50 == 20:
                native.remember((0, 30_000, 2**22)[i // 50 % 3])
            which = (i + thread) % len(bodies)
            got, status, _ = read(
                bodies[which], (x, y, x + 30, y + 30), key=5 + which % 2, start=which
            )
            wrong += status != native.OK or bool(
                (got != wholes[which][y : y + 30, x : x + 30]).any()
            )
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == 0
    assert native.remembered()["failed"] == 0


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_damaged_tiles_fail_or_decode_just_as_without_states(data):
    name = data.draw(st.sampled_from(sorted(STREAMS)))
    body, key = bytearray(STREAMS[name]), next(KEYS)
    scan = body.index(b"\xff\xda")
    for _ in range(data.draw(st.integers(1, 4))):
        low = data.draw(st.sampled_from([2, 2, scan]))
        at = data.draw(st.integers(low, scan + 14 if low == 2 else len(body) - 1))
        kind = data.draw(st.sampled_from(["set", "set", "flip", "cut", "add"]))
        if kind == "set":
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            body[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del body[at : at + data.draw(st.integers(1, 3))]
        else:
            body[at:at] = data.draw(st.binary(min_size=1, max_size=3))
    same_as_plain(bytes(body), data.draw(st.lists(parts(), min_size=2, max_size=5)), key)


def same_as_plain(body: bytes, several: list[tuple[int, int, int, int]], key: int) -> None:
    """First and later touches of these bytes give the status, message and pixels of plain reads."""
    for part in several:
        got, status, message = read(body, part, key)
        plain, plain_status, plain_message = read(body, part, key=0)
        assert (status, message) == (plain_status, plain_message)
        if status == native.OK:
            assert (got == plain).all()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_tile_that_is_damaged_after_its_first_touch_is_read_as_without_states(data):
    body, key = STREAMS[data.draw(st.sampled_from(sorted(STREAMS)))], next(KEYS)
    read(body, (50, 50, 90, 80), key)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(2, len(body) - 1))] = data.draw(st.integers(0, 255))
    same_as_plain(bytes(damaged), data.draw(st.lists(parts(), min_size=1, max_size=3)), key)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-2] + b"\x00\xff\xd9",  # a byte to spare before the end
        lambda b: b[:-2] + bytes(40) + b"\xff\xd9",  # more than libjpeg's bit buffer swallows
        lambda b: b[:-2] + b"\xff\xd0\xff\xd9",  # a restart marker that nobody announced
        lambda b: b[:-3] + b"\xff\xd9",  # a byte short
        lambda b: b.replace(
            b"\xff\xda", b"\xff\xdd\x00\x04\x00\x07\xff\xda", 1
        ),  # restarts announced, none there
        lambda b: b[: b.index(b"\xff\xda") + 4] + b"\x02" + b[b.index(b"\xff\xda") + 5 :],
        lambda b: b + b"anything",
    ],
)
@pytest.mark.parametrize("name", ["420", "444", "gray"])
def test_streams_that_end_or_begin_badly(name, change):
    body = change(STREAMS[name])
    several = [(100, 10, 130, 40), (0, HEIGHT - 9, 9, HEIGHT), (180, 150, WIDTH, HEIGHT), WHOLE] * 2
    same_as_plain(body, several, next(KEYS))


def test_keys_tell_slides_and_corpora_apart():
    rows = np.arange(100_000)
    one, two = slide_keys("ab" * 32, rows), slide_keys("ba" * 32, rows)
    assert len(set(one.tolist()) | set(two.tolist())) == 200_000
    assert (slide_keys("ab" * 32, rows[77:99]) == one[77:99]).all()
    assert one.dtype == np.uint64
    assert 0 not in slide_keys("ffffffffffffffff", np.asarray([-1, 0]))
    bits = np.unpackbits(one[:4096].view(np.uint8)).mean()
    assert 0.49 < bits < 0.51


def test_the_loader_delivers_the_same_patches_from_states(small_indexes):
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    sampler = PatchSampler(
        small_indexes, masks, size_px=96, mpp=(0.26, 0.5), seed=3, min_foreground=0.0
    )
    off, cold, warm = three_passes(sampler, 4)
    assert (off == cold).all()
    assert (off == warm).all()
    counted = native.remembered()
    assert counted["hits"] > 0
    assert counted["failed"] == 0


def three_passes(sampler: PatchSampler, batches: int) -> list[np.ndarray]:
    """The same draws without states, while they are made, and from them."""
    out = []
    for limit in (0, 2**26, 2**26):
        native.remember(limit)
        with PatchLoader(sampler, 32) as loader:
            out.append(np.concatenate([next(loader).pixels.copy() for _ in range(batches)]))
    return out


@pytest.mark.slow
def test_every_real_slide_gives_the_same_patches_from_states(real_slides):
    slides = [
        index
        for name, index in real_slides.items()
        if index.codec.startswith("jpeg ") and name != "openslide_unreadable"  # damaged on purpose
    ]
    assert len(slides) >= 8
    hits = misses = 0
    for index in slides:
        masks = [ForegroundMask.everything(index)]
        sampler = PatchSampler(
            [index], masks, size_px=224, mpp=index.mpp, seed=5, min_foreground=0.0
        )
        off, cold, warm = three_passes(sampler, 3)
        assert (off == cold).all()
        assert (off == warm).all()
        counted = native.remembered()
        hits, misses = hits + counted["hits"], misses + counted["misses"]
        assert (counted["refused"], counted["failed"]) == (0, 0)
    assert hits > misses / 4 > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_remembers_where_it_is_told_to(small_indexes, workers):
    masks = [ForegroundMask.everything(index) for index in small_indexes]
    sampler = PatchSampler(small_indexes, masks, size_px=64, mpp=0.26, seed=3, min_foreground=0.0)
    native.remember(0)
    for limit in (0, 2**24):
        with PatchLoader(sampler, 64, workers=workers, remember_bytes=limit) as loader:
            for _ in range(8):
                next(loader)
            assert (loader.stats.from_states > 0) == bool(limit)
        assert native.remembered()["limit"] == (0 if workers else limit)
