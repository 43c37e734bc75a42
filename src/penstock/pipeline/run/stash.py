"""Weight stashing: the backward of a microbatch sees the weights that its forward saw, whatever came between."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Stash:
    """The version of some parameters that forward passes see, kept for their backward passes.

    Inside :meth:`recording`, what autograd saves of a parameter is a copy of it, one for all forward passes of a
    version. It lives as long as one of their graphs, so the versions that are held are those that microbatches under
    way need. The parameters may be updated in place meanwhile.

    Args:
        parameters: of one stage.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._copies: dict[int, Tensor] = {}

    def recording(self) -> saved_tensors_hooks:
        """The context of a forward pass."""
        return saved_tensors_hooks(self._keep, lambda kept: kept)

    def updated(self) -> None:
        """A new version begins."""
        self._copies = {}

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            return tensor
        if storage.data_ptr() not in self._copies:
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            self._copies[storage.data_ptr()] = whole.clone()
        return self._copies[storage.data_ptr()].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
