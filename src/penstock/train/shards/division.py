"""The share of a model's layers that a process trains, where several compute every layer together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.shares import Portion, Share, parameter_cuts, with_divided_layers
from penstock.parallel.shard import total_norm, whole
from penstock.parallel.tensor_gradients import found_in_parts, join_layers


class Division:
    """How the processes of ``group`` divide the layers of a model: rows and columns of its matrices, by heads and by
    numbers of the feed-forward blocks. What is not divided all have alike; embedding, last norm and head are not.

    PyTorch's ``parallelize_module`` is not used: queries, keys and values have one matrix, as have gate and up, and the
    share of such a matrix is some rows of each of its parts, which no placement of a DTensor says.

    Args:
        complete: the model, prepared and on the meta device.
        group: those that compute it together.

    Attributes:
        model: this process's share, on the meta device; it computes together with those of the others.
    """

    def __init__(self, complete: Decoder, group: dist.ProcessGroup) -> None:
        self._group, size = group, group.size()
        share = Share(group.rank(), size)
        with without_weights():
            self.model = Decoder(with_divided_layers(complete.config, size))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(complete.get_parameter(name).requires_grad)
        self._cuts = [parameter_cuts(complete, self.model, Share(rank, size)) for rank in range(size)]
        self._own = self._cuts[share.rank]
        join_layers(self.model, group)
        # To whoever asks what the model is.
        self.model.config = complete.config
        vars(self.model)["portion"] = Portion(complete.config, share)
        partial = found_in_parts(self.model)
        #: By what the sum over processes of the gradient of what they have alike is multiplied; in one order in all.
        self._factors = {
            name: 1.0 if name in partial else 1.0 / size
            for name, _ in self.model.named_parameters()
            if name.startswith("layers.") and name not in self._own
        }

    @staticmethod
    def check(config: DecoderConfig, size: int) -> None:
        """Refuses a shape that ``size`` processes cannot divide.

        Raises:
            UsageError: it is one.
        """
        with_divided_layers(config, size)

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """What this process has of a whole parameter, or of what is kept of one."""
        cut = self._own.get(name)
        return tensor if cut is None or not tensor.dim() else cut.of(tensor)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of a parameter, or of what is kept of one, of which each process has some. All call this."""
        own = whole(tensor)
        if name not in self._own or not own.dim():
            return own
        pieces = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in self._cuts]
        dist.all_gather(pieces, own.contiguous(), group=self._group)
        complete = own.new_empty(self._own[name].whole)
        for cuts, piece in zip(self._cuts, pieces, strict=True):
            cuts[name].put(complete, piece)
        return complete

    def settle(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes those gradients whole, in place, of what all have alike: where each process has found a part, by their
        sum. The others are the same up to rounding, and to the last bit after this. All call this."""
        alike = [(_here(gradients[name]), factor) for name, factor in self._factors.items() if name in gradients]
        if not alike:
            return
        flat = torch.cat([(gradient * factor).reshape(-1) for gradient, factor in alike])
        dist.all_reduce(flat, group=self._group)
        pieces = torch.split(flat, [gradient.numel() for gradient, _ in alike])
        for (gradient, _), settled in zip(alike, pieces, strict=True):
            gradient.copy_(settled.view(gradient.shape))

    def total_norm(self, tensors: Mapping[str, Tensor], order: float = 2.0) -> Tensor:
        """The norm of all parameters together, or of as many numbers for each, every one counted once; the same in all
        processes, which all call this."""
        divided = [tensor for name, tensor in tensors.items() if name in self._own]
        alike = [tensor for name, tensor in tensors.items() if name in self._factors]
        rest = [tensor for name, tensor in tensors.items() if not name.startswith("layers.")]
        norms = [total_norm(each, order) for each in (alike, rest) if each]
        if divided:
            own = total_norm(divided, order)
            pieces = [torch.empty_like(own) for _ in self._cuts]
            dist.all_gather(pieces, own, group=self._group)
            norms += pieces
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
        return norm


class OwnParts(Mapping[str, Tensor]):
    """What a process has of whole ``tensors`` that a checkpoint holds, each cut when it is asked for.

    Args:
        tensors: by the name of their parameter, perhaps with ``/key`` after it.
        division: of the parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor], division: Division) -> None:
        self._tensors, self._division = tensors, division

    def __getitem__(self, name: str) -> Tensor:
        return self._division.own(name.split("/")[0], self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
