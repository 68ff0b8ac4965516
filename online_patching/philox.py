"""Random words that depend on (seed, draw, attempt, stream) and on nothing else.

Philox4x32-10 from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Written
out here because numpy's Generator promises no stable stream between versions, and a stream that
changes under a resumed run is worse than a slow one. The reference vectors of the paper's own
library (Random123 `kat_vectors`) are in the tests.

Key:      the 64-bit seed.
Counter:  word 0, 1 the draw number (low, high), word 2 the attempt, word 3 the stream and, in its
          low byte, the block: a stream yields up to 1,024 words a draw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10

MAX_BLOCKS = 256


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 on counters of shape (n, 4) under one key; returns (n, 4)."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words(
    seed: int, draws: ArrayLike, attempt: ArrayLike, stream: ArrayLike, count: int
) -> NDArray[np.uint32]:
    """`count` random 32-bit words for each draw: shape (n, count), uint32.

    `draws` are non-negative 64-bit numbers, `attempt` a number or one per draw (< 2**32),
    `stream` names the purpose (< 2**24; a number or one per draw). Equal arguments give equal words
    on every machine. Raises ValueError for a seed, stream or count out of bounds.
    """
    if not 0 <= seed < 2**64:  # its low bits alone would be another seed's words
        raise ValueError(f"seed {seed} is outside 0..2**64-1")
    draw = np.atleast_1d(np.asarray(draws)).astype(np.uint64)
    streams = np.asarray(stream, np.int64)
    if streams.size and (streams.min() < 0 or streams.max() >= 2**24):
        raise ValueError(f"stream {streams.tolist()} is outside 0..{2**24 - 1}")
    if not 0 < count <= 4 * MAX_BLOCKS:
        raise ValueError(f"count {count} is outside 1..{4 * MAX_BLOCKS}")
    blocks = -(-count // 4)
    counter = np.empty((len(draw), blocks, 4), np.uint32)
    counter[:, :, 0] = (draw & _LOW)[:, None]
    counter[:, :, 1] = (draw >> _SHIFT)[:, None]
    counter[:, :, 2] = np.broadcast_to(np.asarray(attempt, np.uint32), draw.shape)[:, None]
    first_block = np.broadcast_to(streams.astype(np.uint32) << np.uint32(8), draw.shape)
    counter[:, :, 3] = first_block[:, None] + np.arange(blocks, dtype=np.uint32)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    out = philox4x32(counter.reshape(-1, 4), key)
    return out.reshape(len(draw), 4 * blocks)[:, :count]


def uniform(random_words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Words as float64 in [0, 1): word / 2**32, exactly representable."""
    return random_words.astype(np.float64) / 4294967296.0


def integers(random_words: NDArray[np.uint32], bound: ArrayLike) -> NDArray[np.int64]:
    """Words as integers in [0, bound): floor(word * bound / 2**32), bound <= 2**31.

    The multiply-shift map (Lemire 2019, without rejection): the bias is below bound / 2**32.
    """
    limit = np.asarray(bound, dtype=np.uint64)
    return ((random_words.astype(np.uint64) * limit) >> _SHIFT).astype(np.int64)


def fine_uniform(high: NDArray[np.uint32], low: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Two words as float64 in [0, 1) with 53 random bits: for choices among very many."""
    bits = (high >> np.uint32(5)).astype(np.float64) * 67108864.0 + (low >> np.uint32(6))
    return np.asarray(bits / 9007199254740992.0)
