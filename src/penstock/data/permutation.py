"""A pseudo-random permutation of [0, n) that needs no memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.core.randomness import derive

#: Four rounds make a Feistel network a strong pseudo-random permutation (Luby and Rackoff, 1988) of large domains;
#: small ones, whose halves are a few bits, need more.
ROUNDS = 8

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Permutation:
    """A keyed bijection on [0, n): ``permutation(i)`` is where ``i`` goes, in constant time and memory.

    A Feistel network permutes the smallest power of two not below ``n``. Values that fall outside [0, n) are sent
    through again until they fall inside, which takes fewer than two passes on average (cycle walking: Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002). The round function is a 64-bit mixer, keyed by ``seed``,
    ``epoch`` and the round: good statistics, no cryptographic strength.

    Raises:
        ValueError: ``n`` is not in [1, 2^62].
    """

    def __init__(self, n: int, seed: int, epoch: int = 0) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} elements: must be from 1 to 2^62")
        self.n = n
        bits = (n - 1).bit_length()
        self._low = np.uint64(bits // 2)
        self._masks = (np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1))
        self._keys = [np.uint64(derive(seed, "data/permutation", epoch, turn)) for turn in range(ROUNDS)]

    def __call__(self, index: npt.ArrayLike) -> Indices:
        """Images of ``index``, integers in [0, n) of any shape; int64 of that shape."""
        given = np.asarray(index, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.n):
            raise IndexError(f"an index outside [0, {self.n})")
        values = given.ravel().astype(np.uint64)
        outside = np.arange(values.size)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64).reshape(given.shape)

    def _network(self, values: Words) -> Words:
        """Even rounds change the low bits by the high ones, odd rounds the other way: each can be undone."""
        halves = [values & self._masks[0], values >> self._low]
        for turn in range(ROUNDS):
            side = turn % 2
            halves[side] = halves[side] ^ (_mix(halves[1 - side], self._keys[turn]) & self._masks[side])
        return halves[0] | halves[1] << self._low


def _mix(x: Words, key: np.uint64) -> Words:
    """SplitMix64's output function (Steele, Lea and Flood, 2014) of ``x`` times an odd constant, plus ``key``."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
