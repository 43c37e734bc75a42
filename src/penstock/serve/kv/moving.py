"""Moves keys and values of single tokens on the device, to other positions of a text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.models.config import DecoderConfig
from penstock.models.rotary import Rotaries
from penstock.ops.paged.contract import PagedCache
from penstock.ops.rotary import rotate


class Move(NamedTuple):
    """Tokens that are moved, as data.

    Attributes:
        sources, targets: int64 [n], the places in the memory that they come from and go to, see
            :attr:`PagedBatch.slots`; no target comes twice.
        before, after: int64 [n], their positions there.
    """

    sources: np.ndarray
    targets: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Mover:
    """Moves tokens in the cache of a model. Their values stay as they are, and their keys are turned on by as much as
    the positions differ: keys that were turned by one angle, and then by another, are turned by the sum of both.

    What is turned is computed in float32 (float64 for such), and rounded once, as the codec does.

    Args:
        cache: the memory.
        config: of the model.
        rotary: by which it turns keys.
    """

    def __init__(self, cache: PagedCache, config: DecoderConfig, rotary: Rotaries) -> None:
        self._cache, self._rotary = cache, rotary
        # Of each layer, which of them it is; None where nothing is turned.
        self._ropes = [None if (rope := config.rope_of(layer)) is None else config.ropes.index(rope)
                       for layer in range(config.layers)]  # fmt: skip
        self._interleaved = [rope.interleaved for rope in config.ropes]
        #: Where in a key the numbers begin that are turned.
        self._first = config.latent.rank if config.latent else 0

    @staticmethod
    def refuses(config: DecoderConfig) -> str | None:
        """Why keys of a model cannot be moved, as a clause; None where they can."""
        if config.learned_positions:
            return "its positions are added to the embedding, and are in its keys and values as a whole"
        return None

    def move(self, work: Move) -> None:
        """Moves tokens. All that they have is read before anything is written."""
        device, shape = self._cache.shape.device, self._cache.shape
        sources, targets = (torch.from_numpy(each).to(device) for each in (work.sources, work.targets))
        codes = self._cache.codes(sources)
        if (work.before != work.after).any():
            positions = (torch.from_numpy(each).to(device) for each in (work.before, work.after))
            turned = self.turned(self._cache.read(sources)[0], *positions)
            codes[0] = self._cache.encoded(turned.to(shape.dtype), 0)
        self._cache.put(targets, codes)

    def turned(self, keys: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """``keys`` [layers, K, n, D] of tokens at the positions ``before`` [n], as they are at those ``after``, in
        float32 or float64."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        pairs = zip(self._rotary(before, torch.float64), self._rotary(after, torch.float64), strict=True)
        turns = [_difference(*pair) for pair in pairs]
        found = []
        for rope, own in zip(self._ropes, keys.to(wide), strict=True):
            if rope is None:
                found.append(own)
                continue
            kept, tail = own.transpose(0, 1).split((self._first, own.shape[-1] - self._first), -1)
            cos, sin = (each.to(wide) for each in turns[rope])
            tail = rotate(tail, cos, sin, self._interleaved[rope])
            found.append(torch.cat([kept, tail], -1).transpose(0, 1))
        return torch.stack(found)


def _difference(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The cosine and sine of the angles by which those ``after`` are larger. They are taken of the model's own, so that
    its rounding of large angles is undone too; what it multiplies both with cancels out."""
    (cos, sin), (new_cos, new_sin) = before, after
    size = cos.square() + sin.square()
    return (new_cos * cos + new_sin * sin) / size, (new_sin * cos - new_cos * sin) / size
