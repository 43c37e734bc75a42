"""A decoder that is larger than memory: some of its layers stay on disk, and are read anew in each pass.

The first layers stay in memory, as many as there is room for, and so do the embedding and the head; the others take
turns in two buffers. Layers are wanted in the same order in each pass, for which no other choice of what stays would
read less (Belady's optimum evicts what is wanted last, which here is what was used last).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder, Layer
from penstock.models.formats.contract import Stored
from penstock.models.formats.safetensors import STORED
from penstock.models.formats.weight_file import WeightFile
from penstock.models.rotary import Turns

#: Layers on disk take turns in so many buffers: while one computes, the next is read.
BUFFERS = 2

#: Bytes at whose multiples parameters begin, as PyTorch's own memory does.
ALIGNED = 64


class Piece(NamedTuple):
    """A weight on disk, which is a part of a parameter.

    Attributes:
        file, begin: where its bytes are.
        dtype, shape: of the weight there.
        parameter: of the layer, by name.
        size, stride, offset: which of the parameter's numbers it is, as of :func:`torch.as_strided`.
    """

    file: WeightFile
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """How many bytes it has on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """A layer on disk.

    Attributes:
        pieces: its weights.
        shapes: of its parameters, by name.
        dtype: that they have in memory.
    """

    pieces: tuple[Piece, ...]
    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype

    @property
    def places(self) -> dict[str, int]:
        """Where in a buffer each parameter begins, in bytes."""
        return dict(zip(self.shapes, self._ends(), strict=False))

    @property
    def nbytes(self) -> int:
        """What its parameters take in a buffer."""
        return list(self._ends())[-1]

    @property
    def staging(self) -> int:
        """What the largest weight takes that cannot be read to where it belongs, since it is turned or of another
        dtype."""
        return max((each.nbytes for each in self.pieces if not self._direct(each)), default=0)

    def read(self, buffer: Tensor, staging: Tensor) -> dict[str, nn.Parameter]:
        """Reads it into ``buffer``, by way of ``staging`` where it has to; its parameters, which lie in the buffer.

        Args:
            buffer: uint8, of at least :attr:`nbytes`.
            staging: uint8, of at least :attr:`staging`.

        Raises:
            LostWeightsError: a file has changed, or is gone.
        """
        places, width = self.places, self.dtype.itemsize
        found = {
            name: buffer[places[name] : places[name] + width * shape.numel()].view(self.dtype).view(shape)
            for name, shape in self.shapes.items()
        }
        for piece in self.pieces:
            whole = found[piece.parameter]
            target = whole.as_strided(piece.size, piece.stride, whole.storage_offset() + piece.offset)
            if self._direct(piece):
                piece.file.read(piece.begin, target)
            else:
                staged = staging[: piece.nbytes]
                piece.file.read(piece.begin, staged)
                target.copy_(staged.view(piece.dtype).view(piece.shape))
        for file in {piece.file for piece in self.pieces}:
            file.check()
        return {name: nn.Parameter(each, requires_grad=False) for name, each in found.items()}

    def _ends(self) -> Iterable[int]:
        sizes = (-(-self.dtype.itemsize * shape.numel() // ALIGNED) * ALIGNED for shape in self.shapes.values())
        return itertools.accumulate(sizes, initial=0)

    def _direct(self, piece: Piece) -> bool:
        plain = torch.empty(piece.size, device="meta").stride()
        return piece.dtype == self.dtype and piece.size == piece.shape and piece.stride == plain


def stored_layers(
    decoder: Decoder, placed: Iterable[tuple[str, str, Tensor]], headers: Mapping[str, Stored], dtype: torch.dtype
) -> list[StoredLayer]:
    """The layers of ``decoder``, which has no memory, as they are on disk.

    Args:
        placed: as :func:`penstock.models.families.mapping.placed` gives it.
        headers: of the weights, by their names there.
        dtype: of the parameters in memory.
    """
    files: dict[Path, WeightFile] = {}
    pieces: list[list[Piece]] = [[] for _ in decoder.layers]
    for ours, there, view in placed:
        if not ours.startswith("layers."):
            continue
        _, number, name = ours.split(".", 2)
        stored = headers[there]
        assert stored.begin is not None, "this format does not say where numbers lie"
        file = files.get(stored.path) or files.setdefault(stored.path, WeightFile(stored.path))
        place = tuple(view.shape), tuple(view.stride()), int(view.storage_offset())
        pieces[int(number)].append(Piece(file, stored.begin, STORED[stored.dtype], stored.shape, name, *place))
    return [
        StoredLayer(tuple(own), {name: each.shape for name, each in layer.named_parameters()}, dtype)
        for own, layer in zip(pieces, decoder.layers, strict=True)
    ]


def needed(layers: Sequence[StoredLayer]) -> int:
    """Bytes of the buffers that take turns for ``layers``, and of what is read by way of."""
    return BUFFERS * max(each.nbytes for each in layers) + max(each.staging for each in layers)


def first_that_stay(layers: Sequence[StoredLayer], others: int, budget: int) -> int:
    """How many of the first ``layers`` stay in memory, where all that is no layer takes ``others`` bytes and there may
    be ``budget``; all of them where that is enough.

    Raises:
        UsageError: it is too little even where none stays.
    """
    sizes = [each.nbytes for each in layers]
    if others + sum(sizes) <= budget:
        return len(layers)
    least = others + needed(layers)
    if least > budget:
        raise UsageError(
            f"{budget:,} bytes are too few for the model's weights: its embedding and head take {others:,}, and the "
            f"buffers that its layers take turns in {least - others:,}",
            hint=f"Allow at least {least:,} bytes (resident_weights).",
        )
    fitting = range(len(layers))
    return max(stay for stay in fitting if others + sum(sizes[:stay]) + needed(layers[stay:]) <= budget)


class LayerStream:
    """Reads layers into buffers, one ahead of the one that computes: in a thread, since reading leaves the interpreter
    to others. One thread at a time may compute with them.

    Args:
        layers: those on disk, by their numbers in the model.
        lane: where they are read, one after the other; None takes a thread.

    Attributes:
        buffers: uint8, all the memory that there is for them: those that take turns, and one for what is read by way
            of it.
        read: how many bytes were read so far.
    """

    def __init__(self, layers: Mapping[int, StoredLayer], lane: Executor | None = None) -> None:
        self._layers = dict(sorted(layers.items()))
        order = list(self._layers)
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True))
        sizes = [max(each.nbytes for each in layers.values())] * BUFFERS + [
            max(each.staging for each in layers.values())
        ]
        self.buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.read = 0
        self._lane = lane or ThreadPoolExecutor(1, "layers")
        self._held: StreamedLayer | None = None
        self._spare = 0  # the buffer that the held layer is not in
        self._ahead: tuple[int, Future[dict[str, nn.Parameter]]] | None = None

    def hold(self, layer: StreamedLayer) -> None:
        """Waits until ``layer`` is in memory. It stays until another one is wanted; whichever comes next is read
        meanwhile.

        Raises:
            LostWeightsError: its file has changed, or is gone.
        """
        if layer is self._held:
            return
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != layer.number:
            if ahead is not None:
                ahead[1].exception()  # waits: two cannot be read into the same buffer
            ahead = layer.number, self._begun(layer.number)
        parameters = ahead[1].result()
        if self._held is not None:
            self._held.let_go()
        layer.take(parameters)
        self._held, self._spare = layer, 1 - self._spare
        following = self._next[layer.number]
        self._ahead = following, self._begun(following)

    def _begun(self, number: int) -> Future[dict[str, nn.Parameter]]:
        return self._lane.submit(self.fill, number, self.buffers[self._spare])

    def fill(self, number: int, buffer: Tensor) -> dict[str, nn.Parameter]:
        """Reads the layer ``number`` into ``buffer``; its parameters."""
        found = self._layers[number].read(buffer, self.buffers[-1])
        self.read += sum(piece.nbytes for piece in self._layers[number].pieces)
        return found


class StreamedLayer(Layer):
    """A layer on disk. It is in memory from when it computes until another one does.

    Args:
        layer: the same without memory.
        number: its place in the model.
        stream: reads it.
    """

    def __init__(self, layer: Layer, number: int, stream: LayerStream) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        self.number, self.stream = number, stream
        self._blank = dict(self.named_parameters())

    def attend(self, x: Tensor, rotary: Turns, context: AttentionContext) -> Tensor:
        self.stream.hold(self)
        return super().attend(x, rotary, context)

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        self.stream.hold(self)
        return super().finish(x, attended)

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """From now on it computes with ``parameters``."""
        for name, parameter in parameters.items():
            module, _, last = name.rpartition(".")
            setattr(self.get_submodule(module), last, parameter)

    def let_go(self) -> None:
        """Its memory is another's: it has none, so that nobody computes with what is there now."""
        self.take(self._blank)


def stream_of(model: nn.Module) -> LayerStream | None:
    """Who reads the layers of ``model`` that are on disk; None where all are in memory."""
    return next((each.stream for each in model.modules() if isinstance(each, StreamedLayer)), None)


def stream_layers(decoder: Decoder, layers: Sequence[Layer], stored: Sequence[StoredLayer]) -> None:
    """Gives ``decoder`` more ``layers``, which stay on disk as they are ``stored`` there."""
    first = len(decoder.layers)
    stream = LayerStream(dict(enumerate(stored, first)))
    decoder.layers.extend(StreamedLayer(layer, number, stream) for number, layer in enumerate(layers, first))
