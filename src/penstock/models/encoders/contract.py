"""The contract ``model.encoder``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from penstock.core.errors import ModelError
from penstock.models.encoders.classifier import HeadConfig
from penstock.models.encoders.config import EncoderConfig
from penstock.models.families.contract import HubConfig
from penstock.policy import Policy, contract

#: What stands for the number of a layer in the names of tensors.
LAYER = "layers.{layer}"

#: transformers' names of activations, and ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@contract(
    "model.encoder",
    law="the hidden states of a text, and the number that a folder with a head for it makes of a pair of texts, equal "
    "those of transformers' model of the same folder, whatever texts are beside them; each weight of a folder has its "
    "place, and what an encoder cannot hold it refuses",
)
class EncoderFamily(Policy):
    """One family of encoders in Hugging Face folders; its name is their ``model_type``.

    Attributes:
        tensors: for each of our parameters (``{layer}`` stands for the layer's number) the tensors on disk that are
            stacked by rows to make it.
        prefix: what stands before the names of a folder that holds more than the encoder.
        unused: beginnings of the names of tensors that an embedding does not need: heads for other tasks.
        head_tensors: what the modules of a :class:`~penstock.models.encoders.classifier.Classifier`'s head are called
            in a folder that has one.
        example: keys of a config.json in which everything that the family has makes a difference, for its law; beside
            those of :data:`~penstock.testing.transformers_peer.SHAPE`.
    """

    tensors: ClassVar[Mapping[str, tuple[str, ...]]]
    prefix: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()
    head_tensors: ClassVar[Mapping[str, str]] = {}
    example: ClassVar[Mapping[str, Any]] = {}

    def config_from_hub(self, hub: HubConfig) -> EncoderConfig:
        """The shape that the contents of a config.json describe.

        Raises:
            ModelError: a key is missing, or asks for something that the Encoder does not do.
        """
        raise NotImplementedError

    def head_from_hub(self, hub: HubConfig) -> HeadConfig:
        """The head of a classifier that the contents of a config.json describe.

        Raises:
            ModelError: a key asks for something that the Classifier does not do.
        """
        return HeadConfig()

    def head_weight(self, name: str) -> str | None:
        """As :meth:`weight`, of a folder whose head is read too."""
        bare = name.removeprefix(self.prefix)
        mine = any(bare.startswith(f"{each}.") for each in self.head_tensors.values())
        return bare if mine else self.weight(name)

    def weight(self, name: str) -> str | None:
        """What a tensor of a folder is called in :attr:`tensors`; None where an embedding has no use for it."""
        name = name.removeprefix(self.prefix)
        return None if name.startswith(self.unused) or name.endswith("position_ids") else name


def activation_of(name: Any) -> str:
    """Our name of an activation.

    Raises:
        ModelError: it is not among them.
    """
    if name not in ACTIVATIONS:
        raise ModelError(f"the activation {name!r} is not supported", hint=f"Supported: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def refuse(hub: Mapping[str, Any], **wanted: Any) -> None:
    """Asserts that keys of a config.json have the value that is ``wanted``, where they are there.

    Raises:
        ModelError: one has another.
    """
    for key, value in wanted.items():
        if hub.get(key, value) != value:
            raise ModelError(f"{key} {hub[key]!r} is not supported; encoders have {value!r}")
