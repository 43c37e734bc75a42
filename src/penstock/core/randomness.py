"""Randomness is an input: every draw is a function of (seed, stream, step, sample).

There is no hidden state to save, so replay, resume and a change of the number of workers need nothing but the
same four integers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

#: The numbers of SplitMix64's finalizer, and how many bits of 64 a float64 in [0, 1) has no room for.
_ONE, _GOLDEN, _SPARE = np.uint64(1), np.uint64(0x9E3779B97F4A7C15), np.uint64(11)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def derive(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed for the ``stream`` (a name such as ``"init"`` or ``"dropout"``) at the given counters."""
    # The numbers hold no slash, so everything after the second one is the stream: no two inputs share a text.
    text = f"{seed}/{','.join(map(str, counters))}/{stream}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, stream: str, *counters: int, device: str = "cpu") -> torch.Generator:
    """A torch generator on ``device``, seeded by :func:`derive`."""
    return torch.Generator(device).manual_seed(derive(seed, stream, *counters))


def numpy_generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """A NumPy Philox generator seeded by :func:`derive`."""
    return np.random.Generator(np.random.Philox(derive(seed, stream, *counters)))


def uniforms(keys: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) for each pair of a key (uint64) and a counter (int64), for many at once.

    A key is one of :func:`derive`; the pair is mixed by the finalizer of SplitMix64 (Steele et al. 2014).
    """
    mixed: np.ndarray = np.asarray(keys, np.uint64) + (counters.astype(np.uint64) + _ONE) * _GOLDEN
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    values: np.ndarray = (mixed >> _SPARE) * 2.0**-53
    return values
