"""Tokens that are computed again with other experts, beside the pass that fills the cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.core.randomness import uniforms
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, MixtureOfExperts
from penstock.ops.paged.contract import PagedBatch


@dataclasses.dataclass(frozen=True)
class Copied:
    """Copies of some tokens of a part.

    A copy reads what the token itself sees in the cache, its own key and value included, which are those of the pass
    without noise; what the copy's are goes to a block that nobody reads.

    Attributes:
        rows: int64 [C], the part's row that each is a copy of, in order.
        numbers: int64 [C], which copy of that row it is, from 0.
        keys: uint64 [C], of the noise: with the position they decide it.
        scales: float64 [C], of the noise.
    """

    rows: np.ndarray
    numbers: np.ndarray
    keys: np.ndarray
    scales: np.ndarray

    def beside(self, inputs: np.ndarray, plan: PagedBatch, block: int, size: int) -> tuple[np.ndarray, PagedBatch]:
        """``inputs`` int64 [3, N] and ``plan`` of a part, with the copies behind them as sequences of one token, whose
        keys and values go to ``block``, of ``size`` tokens."""
        starts, lengths = plan.starts.numpy(), plan.lengths.numpy()
        owners = np.searchsorted(starts, self.rows, side="right") - 1
        behind = starts[owners + 1] - 1 - self.rows
        count = len(self.rows)

        def more(values: Tensor, added: np.ndarray) -> Tensor:
            return torch.cat([values, torch.from_numpy(added).to(values.dtype)])

        wide = dataclasses.replace(
            plan,
            starts=more(plan.starts, starts[-1] + 1 + np.arange(count)),
            lengths=more(plan.lengths, lengths[owners] - behind),
            tables=more(plan.tables, plan.tables.numpy()[owners]),
            slots=more(plan.slots, block * size + np.arange(count) % size),
            parents=None if plan.parents is None else more(plan.parents, np.full(count, -1)),
            watched=None if plan.watched is None else more(plan.watched, np.zeros(count)),
            packed=None if plan.packed is None else more(plan.packed, plan.packed.numpy()[owners]),
            given=None if plan.given is None else more(plan.given, plan.given.numpy()[owners]),
        )
        return np.concatenate([inputs, inputs[:, self.rows]], 1), wide

    def noise(self, model: DecoderConfig, positions: np.ndarray) -> np.ndarray:
        """What is added to the routers' logits, float32 [layers, C, experts], for copies at ``positions`` int64 [C]:
        Gumbel noise, -log(-log(u))."""
        assert model.moe is not None
        width = model.layers * model.moe.experts
        counters = positions[:, None] * width + np.arange(width)
        uniform = np.maximum(uniforms(self.keys[:, None], counters), 2.0**-53)
        noise: np.ndarray = -self.scales[:, None] * np.log(-np.log(uniform))
        return noise.astype(np.float32).reshape(len(positions), model.layers, -1).swapaxes(0, 1)

    def averaged(self, logits: Tensor, scored: np.ndarray) -> Tensor:
        """The logits [S, vocabulary] of the part's ``scored`` rows, where those with copies are the logarithm of the
        mean of their own distribution and the copies', given the logits [S + C, vocabulary] of them and of the
        copies."""
        total = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        own, copies = total[: len(scored)], total[len(scored) :]
        owners = np.searchsorted(scored, self.rows)
        for number in range(int(self.numbers.max()) + 1):  # one copy of a row at a time, in order
            at = np.flatnonzero(self.numbers == number)
            rows = upload(owners[at], logits.device)
            own[rows] = torch.logaddexp(own[rows], copies[upload(at, logits.device)])
        counts = 1 + np.bincount(owners, minlength=len(scored))
        shared = upload(np.log(counts), logits.device).to(own.dtype).unsqueeze(-1)
        copied = upload(counts > 1, logits.device).unsqueeze(-1)
        return torch.where(copied, (own - shared).to(logits.dtype), logits[: len(scored)])


@contextlib.contextmanager
def shaken(model: Decoder, noise: Tensor) -> Iterator[None]:
    """Within it, ``noise`` [layers, C, experts] is added to the routers' logits of the last C tokens of each pass."""
    blocks = (getattr(layer, "mlp", None) for layer in model.layers)  # in a stage, some layers are none
    sparse = [(mlp, own) for mlp, own in zip(blocks, noise, strict=True) if isinstance(mlp, MixtureOfExperts)]
    try:
        for experts, own in sparse:
            experts.noise = own
        yield
    finally:
        for experts, _ in sparse:
            experts.noise = None
