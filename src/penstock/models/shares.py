"""What each of several ranks has of a model that they divide among them.

Nothing here knows the names of weights. A rank's share of a model is a Decoder of another shape: with fewer heads,
narrower feed-forward blocks, a piece of the vocabulary. Beside the whole model, every weight tells by its own shape
whether it is divided, and along which of its dimensions: rows of the matrices that lead into heads and feed-forward
blocks, columns of those that lead out of them, whose products are parts of sums (the two rules of Redco, Tan et al.,
2023). Within an attention and within a feed-forward block nothing is exchanged then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from penstock.core.errors import ModelError, UsageError
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import placed
from penstock.models.formats.contract import Stored, Weights
from penstock.ops.quantized.contract import Packed, Parts
from penstock.policy import mechanism


@dataclasses.dataclass(frozen=True)
class Share:
    """That of ``rank`` among ``size``."""

    rank: int
    size: int

    def of(self, whole: int, part: int) -> tuple[int, int]:
        """Where a share of ``part`` of ``whole`` things begins and ends. Where there are fewer such pieces than ranks,
        neighbours have the same one; the last may have fewer."""
        pieces = -(-whole // part)
        start = self.rank * pieces // self.size * part
        return start, min(start + part, whole)


@dataclasses.dataclass(frozen=True)
class Portion:
    """What a decoder is that a rank has: its ``share`` of a model of the shape ``whole``."""

    whole: DecoderConfig
    share: Share


def portion_of(model: Decoder) -> Portion | None:
    """What ``model`` is of a larger one; None where it is whole. It is noted where shares are loaded."""
    found: Portion | None = vars(model).get("portion")
    return found


@mechanism("tensor_parallel", papers=[31])
def divided(config: DecoderConfig, size: int) -> DecoderConfig:
    """The shape of what each of ``size`` ranks has of a model. Heads of keys and values that are fewer than ranks are
    kept by several; the vocabulary is rounded up.

    From Redco [31]: two rules suffice, rows of the matrices that lead into heads and feed-forward blocks and columns of
    those that lead out of them. Ours: the wording of the rules, which the abstract does not give; that a weight tells
    by its shape beside the whole model's how it is divided; and the divided vocabulary. Not built: Redco's pipelines of
    three functions.

    Raises:
        UsageError: they cannot divide it.
    """
    _require(_obstacle, config, size, f"{size} ranks cannot divide this model", "tensor_parallel")
    moe = config.moe
    if moe is not None:
        moe = moe.model_copy(update={"ffn": moe.ffn // size, "shared_ffn": moe.shared_ffn // size})
    changes = {
        "heads": config.heads // size,
        "kv_heads": 1 if config.latent else max(config.kv_heads // size, 1),
        "ffn": config.ffn // size if _dense(config) else config.ffn,
        "moe": moe,
        "vocabulary": -(-config.vocabulary // size),
    }
    return config.model_copy(update=changes)


def fitting(config: DecoderConfig) -> list[int]:
    """Those numbers of ranks that can divide a model of this shape, by :func:`divided`."""
    return [count for count in range(2, config.heads + 1) if _obstacle(config, count) is None]


def _require(
    obstacle_of: Callable[[DecoderConfig, int], str | None], config: DecoderConfig, size: int, refused: str, option: str
) -> None:
    """Raises what is ``refused``, and why, if there is an obstacle to ``size``; names those to which there is none."""
    obstacle = obstacle_of(config, size)
    if obstacle is not None:
        fitting = [str(count) for count in range(2, config.heads + 1) if obstacle_of(config, count) is None]
        raise UsageError(
            f"{refused}: {obstacle}",
            hint=f"Set {option} to {' or '.join(fitting)}." if fitting else f"Leave {option} out.",
        )


def _obstacle(config: DecoderConfig, size: int) -> str | None:
    """Why ``size`` ranks cannot divide a model, if they cannot."""
    counts = {"attention heads": config.heads}
    if _dense(config):
        counts["numbers of a feed-forward block"] = config.ffn
    if config.moe is not None:
        counts |= {"numbers of an expert": config.moe.ffn, "numbers of the shared expert": config.moe.shared_ffn}
    for what, count in counts.items():
        if count % size:
            return f"it has {count:,} {what}"
    if config.latent is None and config.kv_heads % size and size % config.kv_heads:
        return f"it has {config.kv_heads:,} heads of keys and values"
    if config.vocabulary < size * size:
        return f"it has {config.vocabulary:,} tokens only"
    return None


def with_divided_layers(config: DecoderConfig, size: int) -> DecoderConfig:
    """The shape of what each of ``size`` ranks trains of a model: heads and feed-forward blocks are divided, each among
    all, and the vocabulary is not.

    Raises:
        UsageError: they cannot divide it.
    """
    refused = f"{size} processes cannot divide the layers of this model among them"
    _require(_obstacle_to_training, config, size, refused, "parallel.tensor")
    return divided(config, size).model_copy(update={"vocabulary": config.vocabulary})


def _obstacle_to_training(config: DecoderConfig, size: int) -> str | None:
    if config.moe is not None:
        return "it has experts"
    if config.latent is None and config.kv_heads % size:
        return f"it has {config.kv_heads:,} heads of keys and values"  # which several ranks would have to train alike
    return _obstacle(config, size)


def _dense(config: DecoderConfig) -> bool:
    """Whether a layer has an ordinary feed-forward block."""
    return not all(config.sparse(layer) for layer in range(config.layers))


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a rank takes of a weight: along the dimension ``axis``, which is counted from the end, the ``ranges`` one
    behind the other, and zeros behind them where they are fewer than ``size``. ``whole`` is the weight's shape."""

    whole: torch.Size
    axis: int
    ranges: tuple[tuple[int, int], ...]
    size: int

    def of(self, tensor: Tensor, axis: int | None = None) -> Tensor:
        """The share of ``tensor``, along another ``axis`` if one is given; a view where it is in one piece."""
        axis = self.axis if axis is None else axis
        pieces = [tensor.narrow(axis, start, stop - start) for start, stop in self.ranges]
        missing = self.size - sum(stop - start for start, stop in self.ranges)
        if missing:
            shape = list(tensor.shape)
            shape[axis] = missing
            pieces.append(tensor.new_zeros(shape))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def put(self, whole: Tensor, own: Tensor) -> None:
        """Writes the share ``own`` where it belongs in ``whole``."""
        offset = 0
        for start, stop in self.ranges:
            whole.narrow(self.axis, start, stop - start).copy_(own.narrow(self.axis, offset, stop - start))
            offset += stop - start

    def of_packed(self, name: str, packed: Packed) -> Packed:
        """The share of the matrix ``name`` as it is stored; of a stack of them [E, K, M], that of the rows [E * M, K].

        Raises:
            UsageError: a group of columns would be cut that has one scale.
        """
        parts: Parts
        if len(self.whole) == 3 and self.axis == -1:
            stacks = {part: stored.view(self.whole[0], -1, *stored.shape[1:]) for part, stored in packed.parts.items()}
            parts = {part: self.of(stored, 1).flatten(0, 1) for part, stored in stacks.items()}
        elif len(self.whole) == 2 and self.axis == -2:
            parts = {part: self.of(stored, 0) for part, stored in packed.parts.items()}
        else:
            ((start, stop),) = self.ranges
            try:
                parts = packed.format.columns(packed.parts, start, stop)
            except UsageError as error:
                ranks = self.whole[self.axis] // self.size
                raise UsageError(
                    f"{name} cannot be divided among {ranks} ranks as it is stored: {error.what}",
                    hint="Set tensor_parallel to fewer, or take a model that is not quantized.",
                ) from error
        # Copies: what the others take does not stay in memory with it.
        return Packed(packed.format, {part: stored.clone() for part, stored in parts.items()})


def cuts(whole: Decoder, part: Decoder, family: Family, share: Share) -> dict[str, Cut]:
    """What the rank of ``share``, whose model is ``part``, takes of the weights of ``whole``, by their names in folders
    of ``family``; what is not divided is left out. What is added to a sum over ranks is added by the first."""
    axes, stacks = _axes(whole, part), _stacks(whole, part)
    found: dict[str, Cut] = {}
    for (name, hub, view), (_, _, target) in zip(placed(whole, family), placed(part, family), strict=True):
        axis = _differing(view, target)
        if axis is not None:
            pairs = _pairs(stacks.get(name, []), view.shape[axis], target.shape[axis])
            found[hub] = Cut(view.shape, axis, tuple(_ranges(pairs, share)), target.shape[axis])
        elif share.rank and _in_sum(name, axes):
            found[hub] = Cut(view.shape, -1, (), view.shape[-1])
    if whole.config.tied:
        found[family.tensors["head.weight"][0]] = found[family.tensors["embedding.weight"][0]]
    return found


def parameter_cuts(whole: Decoder, part: Decoder, share: Share) -> dict[str, Cut]:
    """What the rank of ``share``, whose model is ``part``, takes of those parameters of ``whole`` that are divided."""
    stacks, found = _stacks(whole, part), dict[str, Cut]()
    for name, axis in _axes(whole, part).items():
        if axis is not None:
            shape, size = whole.get_parameter(name).shape, part.get_parameter(name).shape[axis]
            found[name] = Cut(shape, axis, tuple(_ranges(_pairs(stacks.get(name, []), shape[axis], size), share)), size)
    return found


def _pairs(stack: list[tuple[int, int]], whole: int, part: int) -> list[tuple[int, int]]:
    """The sizes of what stands one behind the other along a dimension, and of a share of each: a ``stack``, if it is
    that dimension's, or one thing."""
    return stack if whole == sum(own for own, _ in stack) else [(whole, part)]


def _ranges(pairs: Iterable[tuple[int, int]], share: Share) -> Iterator[tuple[int, int]]:
    """Where the share of each of some things lies that stand one behind the other: ``pairs`` of the size of a thing and
    that of a share of it."""
    offset = 0
    for whole, part in pairs:
        start, stop = share.of(whole, part)
        yield offset + start, offset + stop
        offset += whole


def _differing(one: Tensor, other: Tensor) -> int | None:
    """The dimension, counted from the end, in which two tensors differ; None where they are of one shape."""
    return next((axis for axis in range(-one.dim(), 0) if one.shape[axis] != other.shape[axis]), None)


def _axes(whole: Decoder, part: Decoder) -> dict[str, int | None]:
    """Along which of its dimensions each parameter is divided."""
    pairs = zip(whole.named_parameters(), part.parameters(), strict=True)
    return {name: _differing(one, other) for (name, one), other in pairs}


def _stacks(whole: Decoder, part: Decoder) -> dict[str, list[tuple[int, int]]]:
    """Of the parameters of modules that stack several matrices in one, the rows of each, and of a share of it."""
    parts = dict(part.named_modules())
    return {
        f"{prefix}.{name}": list(zip(module.stacked, parts[prefix].stacked, strict=True))
        for prefix, module in whole.named_modules()
        if hasattr(module, "stacked")
        for name, _ in module.named_parameters()
    }


def _in_sum(name: str, axes: Mapping[str, int | None]) -> bool:
    """Whether the parameter ``name`` is the bias of a matrix whose columns are divided."""
    if not name.endswith("bias"):
        return False
    matrix = f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else name.removesuffix("_bias")
    return axes.get(matrix) == -1


class Divided:
    """The weights of a folder as far as a rank takes them; see :class:`~penstock.models.formats.contract.Weights`.

    Safetensors are mapped into memory, of which what is not copied is not read.

    Args:
        weights: of the whole model.
        cuts: what the rank takes of those that are divided.
    """

    def __init__(self, weights: Weights, cuts: Mapping[str, Cut]) -> None:
        self._weights, self._cuts = weights, cuts
        self.headers: Mapping[str, Stored] = weights.headers
        self.dtypes, self.quantized = weights.dtypes, weights.quantized

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights.read(names):
            cut = self._cut(name, tensor.shape)
            yield name, tensor if cut is None else cut.of(tensor)

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        for name, packed in self._weights.packed(names):
            rows, columns = packed.shape
            cut = self._cuts.get(name)
            experts = cut.whole[0] if cut is not None and len(cut.whole) == 3 else None
            cut = self._cut(name, (rows, columns) if experts is None else (experts, columns, rows // experts))
            yield name, packed if cut is None else cut.of_packed(name, packed)

    def _cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        cut = self._cuts.get(name)
        if cut is not None and tuple(shape) != tuple(cut.whole):
            raise ModelError(f"{name} in {self.headers[name].path} is {list(shape)}, and should be {list(cut.whole)}")
        return cut
