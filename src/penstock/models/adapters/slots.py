"""Several adapters at once in one model: to each token's products is added what the token's own adapter says."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from penstock.core.errors import ModelError, UsageError
from penstock.models.adapters import peft
from penstock.models.adapters.low_rank import chosen, linears
from penstock.models.adapters.peft import Addition
from penstock.models.attention import AttentionContext
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import general, placed
from penstock.models.pieces import EAGER, Pieces
from penstock.models.recorded import MOST
from penstock.models.shares import Cut, Portion, cuts, divided, portion_of
from penstock.ops.low_rank import LowRank, Wearing, takes, wearing

#: What an adapter may add to, in words.
PLACES = "the matrices of attention and of dense feed-forward blocks"


class AdapterSlots:
    """Room for the adapters of a model. Its layers and weights stay what they are: what is added is added behind them,
    and where no row has an adapter, nothing is computed.

    Args:
        model: the decoder.
        family: that of ``model``, by which folders name its matrices.
        slots: how many adapters there may be, numbered from 1. 0 is none.
        rank: the most columns of their B.
        targets: the matrices that they may add to, by the ends of their names, such as ``q_proj``; empty: all.
        known: what :func:`read` has said of folders already; each is not read again when it is loaded first.

    Attributes:
        slots, rank: as given.

    Raises:
        ConfigError: the model has no matrix of such a name.
    """

    def __init__(
        self,
        model: Decoder,
        family: Family,
        slots: int,
        rank: int,
        targets: Sequence[str] = (),
        known: Mapping[Path, dict[str, Addition]] = MappingProxyType({}),
    ) -> None:
        self._known = dict(known)
        self._model, self._family, self.slots, self.rank = model, family, slots, rank
        self._wearing: Wearing | None = None
        self._begun: Tensor | None = None
        #: Of passes on a CPU, by their number of tokens.
        self._owners: dict[int, Tensor] = {}
        portion = portion_of(model)
        blank = _blank(model.config if portion is None else divided(portion.whole, portion.share.size))
        #: Of each matrix on disk that ranks divide, what this one has, and of which of the two: A or B.
        self._cuts = {} if portion is None else _cuts(portion, blank, family)
        weight = model.like
        self._natively = takes(weight)
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        # Matrix units want rows of whole 16 bytes.
        width = -(-rank // 8) * 8 if weight.is_cuda else rank
        self._matrices: dict[str, LowRank] = {}
        #: Of each matrix on disk, the layer that it is part of, and how many of the layer's pieces come before it.
        self._places: dict[str, tuple[str, int]] = {}
        self._shapes = matrices(model, family)
        for name, (pieces, own) in chosen(blank, family, targets).items():
            layer = blank.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            ends = torch.tensor([piece.rows for piece in pieces]).cumsum(0).tolist()
            self._matrices[name] = room = LowRank(
                torch.zeros(len(own), slots, width, layer.in_features, **options),
                [torch.zeros(slots, width, pieces[place].rows, **options) for place in own],
                [(ends[place] - pieces[place].rows, ends[place]) for place in own],
            )
            self._places |= {pieces[place].module: (name, number) for number, place in enumerate(own)}
            ours = model.get_submodule(name)
            ours.register_forward_pre_hook(functools.partial(self._begin, room))
            # Before what sums a layer's output over ranks: what is added to it is a part of that sum, too.
            hook_first(ours, functools.partial(self._added, room))

    @property
    def nbytes(self) -> int:
        """Memory of all slots."""
        return sum(each.nbytes for room in self._matrices.values() for each in (room.a, *room.b))

    def _begin(self, room: LowRank, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        """The hook before ``layer``."""
        if self._wearing is not None:
            self._begun = self._wearing.begin(inputs[0], room)

    def _added(self, room: LowRank, layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        """The hook behind ``layer``."""
        if self._wearing is None:
            return out
        begun, self._begun = self._begun, None
        return self._wearing.add(out, inputs[0], room, begun)

    def trunk(
        self, tokens: Tensor, context: AttentionContext, pieces: Pieces = EAGER, owners: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """:meth:`Decoder.trunk` of ``tokens`` [N] whose adapters are in the slots ``owners`` int64 [N]."""
        self._wearing = None if owners is None else wearing(self._lasting(owners), self.slots, self._natively)
        try:
            return self._model.trunk(tokens, context, pieces if self._wearing is None else pieces.adapted())
        finally:
            self._wearing = None

    def _lasting(self, owners: Tensor) -> Tensor:
        """The same, where a pass of as many tokens that was recorded looks for them."""
        if owners.is_cuda or len(owners) > MOST:
            return owners
        return self._owners.setdefault(len(owners), torch.empty_like(owners)).copy_(owners)

    def tip(self, *begun: Tensor, owners: Tensor | None = None) -> Tensor:
        """:meth:`Decoder.tip`, likewise."""
        self._wearing = None if owners is None else wearing(owners, self.slots, self._natively)
        try:
            return self._model.tip(*begun)
        finally:
            self._wearing = None

    def load(self, slot: int, folder: Path) -> bytes:
        """Puts the adapter of ``folder`` into ``slot``, in the place of what was there.

        Returns:
            A name for what it computes: those of two adapters that are not equal differ.

        Raises:
            ModelError, UsageError: it does not fit the model, or the room for it. Nothing has changed then.
        """
        names = self._known.pop(folder, None) or read(folder, self._family, self._model)
        for name, addition in names.items():
            self._check(folder, name.removesuffix(".weight"), addition)
        for room in self._matrices.values():
            room.a[:, slot - 1].zero_()
            for b in room.b:
                b[slot - 1].zero_()
        for name, (a, b, scale, _) in names.items():
            layer, piece = self._places[name.removesuffix(".weight")]
            room = self._matrices[layer]
            if name in self._cuts:
                cut, of_a = self._cuts[name]
                a, b = (cut.of(a, 1), b) if of_a else (a, cut.of(b, 0))
            room.a[piece, slot - 1, : len(a)].copy_(a)
            room.b[piece][slot - 1, : len(a)].copy_((b.float() * scale).T)
        return digest(names)

    def _check(self, folder: Path, module: str, addition: Addition) -> None:
        shape, rank = (addition.b.shape[0], addition.a.shape[1]), len(addition.a)
        if module not in self._shapes:
            raise ModelError(
                f"the adapter {folder} adds to {module}, which is none of {PLACES} of this model",
                hint="It is of another base, or of experts, routers, embeddings or a head: what adds to those can only "
                "be merged, which opening its folder as a model does.",
            )
        if shape != self._shapes[module]:
            raise ModelError(
                f"the adapter {folder} adds {list(shape)} to {module}, which is {list(self._shapes[module])} here: it "
                "is of another base"
            )
        if module not in self._places:
            end = module.rpartition(".")[2]
            raise UsageError(
                f"the adapter {folder} adds to {module}, for which no room is kept",
                hint=f"Start the engine with {end} among its adapter_targets, or with an adapter that has it.",
            )
        if rank > self.rank:
            raise UsageError(
                f"the adapter {folder} has the rank {rank}, and there is room for {self.rank}",
                hint=f"Start the engine with adapter_rank={rank}.",
            )


def matrices(model: Decoder, family: Family) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices of ``model`` on disk that adapters may add to, also where it has them quantized, or has
    a rank's share of them."""
    blank, shapes = _blank(_whole(model)), dict[str, tuple[int, int]]()
    for name, pieces in linears(blank, family).items():
        layer = blank.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        shapes |= {piece.module: (piece.rows, layer.in_features) for piece in pieces}
    return shapes


def hook_first(layer: nn.Module, hook: Callable[..., Tensor]) -> None:
    """Has ``hook`` called behind ``layer``, before all others that are."""
    layer.register_forward_hook(hook, prepend=True)
    # To compile a layer, PyTorch 2.11 finds hooks by their places in the dict that the ordered one is made of, where
    # this one would still be the last: it would take one for another.
    hooks = [*layer._forward_hooks.items()]
    layer._forward_hooks.clear()
    layer._forward_hooks.update(hooks)


def read(folder: Path, family: Family, model: Decoder) -> dict[str, Addition]:
    """What the adapter in ``folder`` adds to ``model``, by the names of its ``family``.

    Raises:
        ModelError: the folder is damaged, or the adapter is of a kind that is not supported.
    """
    found = peft.named(peft.read(folder), lambda name: family.weight(name, _whole(model)))
    if not found:
        raise ModelError(f"the adapter {folder} adds nothing")
    return found


def digest(additions: Mapping[str, Addition]) -> bytes:
    """16 bytes that tell ``additions`` from others."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, (a, b, scale, _) in sorted(additions.items()):
        hashed.update(f"{name} {tuple(a.shape)} {a.dtype} {tuple(b.shape)} {b.dtype} {scale!r}".encode())
        for matrix in (a, b):
            hashed.update(matrix.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.digest()


def _whole(model: Decoder) -> DecoderConfig:
    """The shape of ``model``, or of that of which it is a rank's share."""
    portion = portion_of(model)
    return model.config if portion is None else portion.whole


def _blank(shape: DecoderConfig) -> Decoder:
    """A decoder of the ``shape``, whose matrices are none but plain ones."""
    with without_weights():
        return Decoder(shape)


def _cuts(portion: Portion, part: Decoder, family: Family) -> dict[str, tuple[Cut, bool]]:
    """What a rank, which has the shape of ``part``, takes of additions to matrices on disk, and whether it takes it of
    A or of B.

    The two rules are those of the matrices themselves: where a rank has rows of W it has the same rows of B, and its
    product with all of A; where it has columns of W it has the same columns of A, and what all of B makes of that is a
    part of the sum that the ranks add up.
    """
    whole = _blank(portion.whole)
    transposed = {there: general(ours) in family.transposed for ours, there, _ in placed(whole, family)}
    found = cuts(whole, part, family, portion.share)
    return {name: (cut, (cut.axis == -1) != transposed[name]) for name, cut in found.items() if name in transposed}
