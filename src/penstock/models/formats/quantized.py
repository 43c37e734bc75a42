"""Quantized weights in safetensors: a matrix lies there in several tensors, which begin with its module's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.awq import Awq
from penstock.models.formats.bitsandbytes import BitsAndBytes
from penstock.models.formats.compressed_tensors import CompressedTensors
from penstock.models.formats.contract import Stored
from penstock.models.formats.fp8 import Float8
from penstock.models.formats.gptq import Gptq
from penstock.models.formats.safetensors import Safetensors
from penstock.ops.quantized.contract import Packed

#: What engines add for activations and caches, and a model without them has no place for.
ACTIVATIONS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "output_scale",
    "activation_scale",
)


class Layout(Protocol):
    """How a quantization method stores a matrix.

    Attributes:
        markers: the suffixes of which a quantized module has one, and others have none.
        suffixes: of the other tensors that a module may have in place of its matrix.
    """

    @property
    def markers(self) -> Collection[str]: ...

    @property
    def suffixes(self) -> Collection[str]: ...

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        """The rows and columns of the matrix, from the ``headers`` of its tensors by suffix; (-1, -1) where they do not
        tell."""
        ...

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        """The matrix of ``module``, from its ``tensors`` by suffix.

        Raises:
            ModelError: one is missing, or of the wrong shape.
        """
        ...


def layout_of(config: Any) -> Layout:
    """The layout that the ``quantization_config`` of a config.json describes.

    Raises:
        ModelError: it is of a method that is not supported, or asks for what is not.
    """
    methods: dict[str, type] = {
        "compressed-tensors": CompressedTensors,
        "fp8": Float8,
        "awq": Awq,
        "gptq": Gptq,
        "bitsandbytes": BitsAndBytes,
    }
    name = config.get("quant_method") if isinstance(config, dict) else config
    if name not in methods:
        raise ModelError(
            f"the weights are quantized by {name!r}, which is not supported",
            hint=f"Methods: {', '.join(methods)}, mxfp4 (gpt-oss). A checkpoint in bf16, where there is one, works.",
        )
    try:
        layout: Layout = methods[name](config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"the quantization_config of {name} lacks something or is malformed: {error}") from error
    return layout


class Quantized:
    """The weights of a folder with a ``quantization_config``; see
    :class:`~penstock.models.formats.contract.Weights`."""

    def __init__(self, stored: Safetensors, layout: Layout) -> None:
        self._stored, self._layout = stored, layout
        headers = {name: header for name, header in stored.headers.items() if not name.endswith(ACTIVATIONS)}
        ends = [name.removesuffix(end) for end in layout.markers for name in headers if name.endswith(f".{end}")]
        if not ends:
            raise ModelError(
                f"the weights are quantized, it says, but none has a {' or '.join(layout.markers)}",
                hint="Where they are not quantized, remove quantization_config.",
            )
        self._modules = {
            module: {
                part: f"{module}{part}" for part in (*layout.markers, *layout.suffixes) if f"{module}{part}" in headers
            }
            for module in ends
        }
        owned = {name for parts in self._modules.values() for name in parts.values()}
        self.headers = {name: header for name, header in headers.items() if name not in owned}
        self._require_markers()
        for module, parts in self._modules.items():
            first = headers[next(iter(parts.values()))]
            try:
                shape = layout.shape({part: headers[name] for part, name in parts.items()})
            except ValueError as error:
                raise ModelError(f"the tensors of {module}weight in {first.path} are of no matrix") from error
            self.headers[f"{module}weight"] = Stored(first.path, shape, "quantized")
        self.dtypes = (*stored.dtypes, "quantized")
        self.quantized = {f"{module}weight" for module in self._modules}

    def _require_markers(self) -> None:
        """Refuses a module that has other tensors of a quantized matrix, and not the one that tells that it is.

        Raises:
            ModelError: there is one.
        """
        for name, header in self.headers.items():
            module, _, end = name.rpartition(".")
            if end in self._layout.suffixes and (end != "weight" or header.dtype not in self._stored.dtypes):
                raise ModelError(
                    f"{module} in {header.path} has a {end} and lacks {' or '.join(self._layout.markers)}",
                    hint="Is the checkpoint complete?",
                )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        yield from self._stored.read([name for name in names if name not in self.quantized])
        for name, packed in self.packed(names):
            yield name, packed.dequantize()

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        owners = {
            stored: (module, part)
            for module in (name.removesuffix("weight") for name in names if name in self.quantized)
            for part, stored in self._modules[module].items()
        }
        found: dict[str, dict[str, Tensor]] = {}
        for stored, tensor in self._stored.read(owners.keys()):  # a file is opened once, not for each matrix
            module, part = owners[stored]
            found.setdefault(module, {})[part] = tensor
            if len(found[module]) == len(self._modules[module]):
                yield f"{module}weight", self._layout.pack(module.rstrip("."), found.pop(module))
