"""The contract ``model.family``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig
from penstock.policy import Policy, contract


class HubConfig(dict[str, Any]):
    """The contents of a config.json, in which a key that is needed but absent is an error of the folder."""

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"config.json lacks {key!r}")


@contract(
    "model.family",
    law="logits, at once and step by step, and gradients equal those of transformers' model of the same folder, and so "
    "do the tokens that the engine says; a folder comes back byte for byte; what a family cannot hold it refuses",
)
class Family(Policy):
    """One family of models in Hugging Face folders; its name is their ``model_type``.

    Attributes:
        tensors: for each of our parameters (``{layer}`` stands for the layer's number) the tensors on disk that are
            stacked by rows to make it. ``{expert}`` in their names: one set of them for each index of our first
            dimension. Queries, keys and values have their own row counts; other tensors of a stack have equal ones.
        transposed: those of our parameters whose matrices stand on disk with inputs as rows.
        rank: of the families that can hold a model which comes from no folder, the one with the highest writes it.
        example: keys of a config.json in which everything that the family has makes a difference, for its law; beside
            those of :data:`~penstock.testing.transformers_peer.SHAPE`.
    """

    tensors: ClassVar[Mapping[str, tuple[str, ...]]]
    transposed: ClassVar[frozenset[str]] = frozenset()
    rank: ClassVar[int] = 0
    example: ClassVar[Mapping[str, Any]] = {}

    def config_from_hub(self, hub: Mapping[str, Any]) -> DecoderConfig:
        """The shape that the contents of a config.json describe.

        Raises:
            ModelError: a key is missing or out of range, or asks for something that the Decoder does not do.
        """
        raise NotImplementedError

    def config_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        """The contents of a config.json for ``config``, token ids and dtype aside.

        Only meaningful where nothing of it is among the family's :meth:`losses`.

        Raises:
            ModelError: the family has no place for something in ``config``.
        """
        raise NotImplementedError

    def weight(self, name: str, config: DecoderConfig) -> str | None:
        """What a tensor of a folder is called in :attr:`tensors`; None where the model has no use for it."""
        return name

    def losses(self, config: DecoderConfig) -> list[str]:
        """The parts of ``config`` that do not survive the way to disk and back; none where a folder can hold it."""
        try:
            back = effective(self.config_from_hub(self.config_to_hub(config)))
        except ModelError as error:
            return [error.what]
        return [key for key, value in effective(config).items() if key not in back or back[key] != value]


def effective(config: DecoderConfig) -> dict[str, Any]:
    """``config`` as plain data in which models that compute the same look the same.

    Windows, rotation and sparsity stand layer by layer, and the dense width is left out where no layer is dense.
    """
    data = config.model_dump(exclude={"windowed_layers", "unrotated_layers", "rope", "local_rope", "moe"})
    data["window"] = [config.window_of(layer) for layer in range(config.layers)]
    ropes = [config.rope_of(layer) for layer in range(config.layers)]
    data["rope"] = ropes[0] if len(set(ropes)) == 1 else ropes
    data["chunked"] &= any(data["window"])
    if config.latent:
        del data["kv_heads"], data["head_dim"]
    data["sparse"] = [config.sparse(layer) for layer in range(config.layers)]
    if config.moe and any(data["sparse"]):
        moe = config.moe.model_dump(exclude={"dense_layers"})
        data |= {f"moe.{key}": value for key, value in moe.items()}
    if all(data["sparse"]):
        del data["ffn"]
    return data
