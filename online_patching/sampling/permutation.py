"""The numbers 0 .. n-1 in a random order that is computed, not stored: a keyed permutation.

A Feistel network on pairs: number = left * b + right, with a * b >= n as small as a square allows.
Each round adds a random function (Philox) of one half to the other, modulo its size, so it can be
undone, so the whole is one to one on 0 .. a*b-1. A result outside 0 .. n-1 is put in again
("cycle walking", Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), which
keeps it one to one on 0 .. n-1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.philox import fine_uniform, words

ROUNDS, ROUNDS_BELOW_1000 = 6, 24
"""Six rounds are told from a random permutation by no test of ours from n = 1,000 on. Functions
of very few values are poor, so small n get more: at 8 rounds the pairs of n = 6 were uneven."""
PERMUTATION_STREAM = 4096


def permuted(places: ArrayLike, n: int, seed: int, turn: ArrayLike = 0) -> NDArray[np.int64]:
    """Where each of `places` (in 0 .. n-1) goes in order number `turn` of `seed`; one to one.

    `turn` is a number or one a place (< 2^32): an epoch. 1 <= n <= 2^62.
    """
    here = np.atleast_1d(np.asarray(places, np.int64)).copy()
    turns = np.broadcast_to(np.asarray(turn, np.int64), here.shape)
    if not 1 <= n <= 2**62:
        raise ValueError(f"{n} numbers cannot be permuted; 1 to 2^62 can.")
    if here.size and not 0 <= int(here.min()) <= int(here.max()) < n:
        raise ValueError(f"places lie in 0 to {n - 1}.")
    b = math.isqrt(n - 1) + 1
    a = -(-n // b)
    todo = np.arange(len(here))
    while len(todo):
        here[todo] = _once(here[todo], a, b, seed, turns[todo])
        todo = todo[here[todo] >= n]
    return here


def _once(
    here: NDArray[np.int64], a: int, b: int, seed: int, turn: NDArray[np.int64]
) -> NDArray[np.int64]:
    """One pass through the network: one to one on 0 .. a*b-1."""
    left, right = np.divmod(here, b)
    for round_ in range(0, ROUNDS if a * b >= 1000 else ROUNDS_BELOW_1000, 2):
        left = (left + _mixed(right, a, seed, turn, round_)) % a
        right = (right + _mixed(left, b, seed, turn, round_ + 1)) % b
    return np.asarray(left * b + right)


def _mixed(
    half: NDArray[np.int64], size: int, seed: int, turn: NDArray[np.int64], round_: int
) -> NDArray[np.int64]:
    w = words(seed, half, turn, PERMUTATION_STREAM + round_, 2)
    return (fine_uniform(w[:, 0], w[:, 1]) * size).astype(np.int64)
