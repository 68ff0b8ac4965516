import numpy as np
import pytest

from online_patching.philox import integers, philox4x32, uniform, words

# Random123's kat_vectors, philox4x32 10 rounds: counter, key, output (Salmon et al., SC 2011).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

GOLDEN = [
    [3965934933, 2007025060, 3194019110],
    [2239443882, 3142514118, 2364456076],
    [2363895656, 1643492503, 4220089821],
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_published_vectors_come_out(counter, key, expected):
    out = philox4x32(np.asarray([counter], np.uint32), key)
    assert tuple(int(v) for v in out[0]) == expected


def test_our_own_stream_stays_what_it_was():
    """Golden: a change here changes every resumed run."""
    got = words(
        seed=0x123456789ABCDEF0, draws=[0, 1, 2**40 + 7], attempt=[0, 0, 3], stream=16, count=3
    )
    assert got.tolist() == GOLDEN


def test_words_do_not_depend_on_the_company_they_are_drawn_in():
    alone = [words(7, [d], 2, 5, 9)[0].tolist() for d in range(20)]
    assert words(7, np.arange(20), 2, 5, 9).tolist() == alone


def test_every_argument_matters():
    base = words(1, [5], 0, 1, 4).tolist()
    others = [
        words(2, [5], 0, 1, 4),
        words(1, [6], 0, 1, 4),
        words(1, [5], 1, 1, 4),
        words(1, [5], 0, 2, 4),
    ]
    assert all(other.tolist() != base for other in others)
    assert words(1, [6], 0, 1, 4).tolist() != words(2, [5], 0, 1, 4).tolist()  # not seed + draw


@pytest.mark.parametrize("seed", [-1, 2**64, 2**64 + 7])
def test_a_seed_that_is_no_key_is_refused_instead_of_taken_for_another(seed):
    with pytest.raises(ValueError, match=r"outside 0\.\.2\*\*64-1"):
        words(seed, [0], 0, 0, 1)
    assert words(2**64 - 1, [0], 0, 0, 1)[0, 0] != words(0, [0], 0, 0, 1)[0, 0]


def test_integers_cover_their_range_evenly():
    got = integers(words(3, np.arange(60_000), 0, 0, 1)[:, 0], 6)
    counts = np.bincount(got, minlength=6)
    assert got.min() == 0
    assert got.max() == 5
    assert abs(counts - 10_000).max() < 5 * np.sqrt(10_000)


def test_the_extreme_words_stay_inside():
    extreme = np.asarray([0, 2**32 - 1], np.uint32)
    assert integers(extreme, 1000).tolist() == [0, 999]
    assert uniform(extreme)[1] < 1.0
