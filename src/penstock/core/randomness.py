"""Randomness is an input: every draw is a function of (seed, stream, step, sample).

There is no hidden state to save, so replay, resume and a change of the number of workers need nothing but the
same four integers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


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
    with np.errstate(over="ignore"):
        mixed = np.asarray(keys, np.uint64) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    values: np.ndarray = (mixed >> np.uint64(11)) * 2.0**-53
    return values
