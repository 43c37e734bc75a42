"""Models from folders: to train, for inference, as reward models, or their weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import ModelError, UsageError
from penstock.models.adapters import peft, routed_folder
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import effective
from penstock.models.families.mapping import general, views_on
from penstock.models.formats.contract import Weights
from penstock.models.hub.description import Description, describe, read_config
from penstock.models.hub.family import remember
from penstock.models.hub.filling import TO_ADD, TO_INFER, Kept, allocate, fill, keep_packed, kept_stacks
from penstock.models.hub.folders import resolve
from penstock.models.hub.weights import check_weights, in_few_bits, routed_adapter, stated_dtype, weights_of
from penstock.models.shares import Divided, Portion, Share, cuts, divided, fitting


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
    return _load(source, torch.device(device), dtype)


def load_to_add(source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Loads a model as :func:`load` does, to train what is added to the matrices of its layers: quantized ones stay as
    they are stored, and gradients go through products with them; but not those of GGUF files on a GPU, nor those to
    which the model is an adapter already. ``dtype`` is that of the others.

    Raises:
        UsageError, ModelError: as :func:`load`.
    """
    return _load(source, torch.device(device), dtype, TO_ADD)


def load_for_inference(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    share: Share | None = None,
    part: Callable[[DecoderConfig], Decoder] | None = None,
) -> Decoder:
    """Loads a model as :func:`load` does, with two differences: it has no gradients, and quantized matrices of its
    layers, their experts too, of its embedding and of its head stay as they are stored, where products on the device
    read them; on a CPU, what an adapter adds to those of linear layers is not merged, but computed beside them.
    ``dtype`` is that of the others. With a ``share`` it is that of a rank, of which nothing else is read;
    :mod:`penstock.parallel.tensor` makes ranks compute together. ``part`` makes, of the shape of the model, a decoder
    that has some of its layers, under their names in the whole; it is filled, and nothing else is read. An adapter is
    merged in these two.

    Raises:
        UsageError: as :func:`load`; or that many ranks cannot divide the model.
        ModelError: as :func:`load`.
    """
    return _load(source, torch.device(device), dtype, TO_INFER, share, part)


def check_divisible(source: str | Path, size: int) -> None:
    """Checks that :func:`load_for_inference` can load the shares of ``size`` ranks of a model. Where it is quantized, a
    few of its matrices are read.

    Raises:
        UsageError, ModelError: as that does.
    """
    described = describe(resolve(source))
    adapter = routed_adapter(described.folder)
    if adapter is not None:
        raise _undivided(adapter)
    divided(described.config, size)
    weights = weights_of(described)
    if not weights.quantized:
        return
    obstacle = _obstacle_to_ranks(described, weights, size)
    if obstacle is not None:
        fewer = [count for count in fitting(described.config) if count < size]
        counts = [str(count) for count in fewer if _obstacle_to_ranks(described, weights, count) is None]
        what = f"Set tensor_parallel to {' or '.join(counts)}" if counts else "Leave tensor_parallel out"
        raise UsageError(obstacle.what, hint=f"{what}, or take a model that is not quantized.") from obstacle


def _obstacle_to_ranks(described: Description, weights: Weights, size: int) -> UsageError | None:
    """Why ``size`` ranks cannot divide ``weights`` as they are stored, if they cannot. Of those of one type that stand
    in the same place of their layers, the first and the last are looked at."""
    family = described.family
    with without_weights():
        whole, part = Decoder(described.config), Decoder(divided(described.config, size))
    check_weights(described, weights, views_on(whole, family))
    first = Divided(weights, cuts(whole, part, family, Share(0, size)))
    alike: dict[tuple[str, str], list[str]] = {}
    for name, stack, _ in kept_stacks(part, family, first, TO_INFER):
        one = next(iter(stack))
        alike.setdefault((general(name), weights.headers[one].dtype), []).append(one)
    try:
        for _ in first.packed({name for names in alike.values() for name in (names[0], names[-1])}):
            pass  # it is divided as it comes
    except UsageError as error:
        return error
    return None


def _undivided(adapter: Path) -> UsageError:
    return UsageError(
        f"{adapter} adds something else for each token, and is not divided among devices",
        hint="Leave out tensor_parallel and pipeline_parallel.",
    )


def _load(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    kept: Kept | None = None,
    share: Share | None = None,
    part: Callable[[DecoderConfig], Decoder] | None = None,
) -> Decoder:
    folder = resolve(source)
    described = describe(folder)
    family, config = described.family, described.config
    adapter = routed_adapter(folder)
    if adapter is not None and (share is not None or part is not None):
        raise _undivided(adapter)
    weights = weights_of(described)
    with without_weights():
        decoder = whole = Decoder(config)
        if share is not None:
            decoder = Decoder(divided(config, share.size))
        if part is not None:
            decoder = part(config)
    check_weights(described, weights, views_on(whole, family))
    if share is not None:
        weights = Divided(weights, cuts(whole, decoder, family, share))
    dtype = dtype or stated_dtype(described, weights)
    beside: dict[str, peft.Addition] = {}
    apart = kept is not None and device.type in kept.apart and share is None and part is None
    if kept is not None and apart and isinstance(weights, peft.Adapted):
        keep_packed(decoder, family, weights, device, dtype, kept, weights.base)
        weights, beside = weights.apart(peft.beside_packed(decoder, family))
    elif kept is not None and (apart or adapter is None):
        keep_packed(decoder, family, weights, device, dtype, kept)
    allocate(decoder, device, dtype)
    fill(decoder, family, weights)
    if adapter is not None:
        routed_folder.wear(decoder, family, adapter)
    if beside:  # of a whole model
        peft.wear(decoder, family, beside)
    remember(decoder, described)
    if share is not None:
        vars(decoder)["portion"] = Portion(config, share)
    return decoder


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
    described = describe(resolve(source))
    return stated_dtype(described, weights_of(described))


def is_quantized(source: str | Path) -> bool:
    """Whether some weights of a model folder are not stored as plain numbers; ``source`` as in :func:`resolve`."""
    return in_few_bits(weights_of(describe(resolve(source))))


def import_state(decoder: Decoder, folder: Path) -> None:
    """Copies the weights in ``folder`` into a decoder of the same shape, in place, in its own device and dtype.

    Raises:
        ModelError: the folder is damaged or incomplete, or of another model. The decoder is untouched then, unless
            the damage is to the bytes of a tensor.
    """
    described = describe(folder)
    _same_model(folder, described.config, decoder)
    weights = weights_of(described)
    check_weights(described, weights, views_on(decoder, described.family))
    fill(decoder, described.family, weights)


def weights_for(decoder: Decoder, folder: Path) -> dict[str, Tensor]:
    """The weights in ``folder`` by the names of ``decoder.state_dict()``, for a decoder of the same shape, in its dtype
    and in the host's memory.

    Raises:
        UsageError, ModelError: the folder is damaged or incomplete, or of another model.
    """
    _same_model(folder, read_config(folder), decoder)
    return load(folder, dtype=decoder.like.dtype).state_dict()


def _same_model(folder: Path, config: DecoderConfig, decoder: Decoder) -> None:
    there, here = effective(config), effective(decoder.config)
    if there != here:
        differing = ", ".join(sorted(key for key in {*there, *here} if there.get(key) != here.get(key)))
        raise ModelError(f"{folder} holds another model than this one: they differ in {differing}")
