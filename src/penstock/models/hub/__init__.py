"""Hugging Face folders in and out: config.json and safetensors, a tensor at a time, never unpickled.

The ``model_type`` in a folder's config.json names the policy of ``model.family`` that reads and writes it.

From what a user names to a model: :mod:`~penstock.models.hub.folders` finds the folder,
:mod:`~penstock.models.hub.description` reads its config.json, :mod:`~penstock.models.hub.stored` opens its files in
whichever format, :mod:`~penstock.models.hub.weights` checks what they hold, and :mod:`~penstock.models.hub.filling`
copies it into a decoder. These are the steps of :mod:`~penstock.models.hub.loading` (all at once),
:mod:`~penstock.models.hub.streaming` (from disk as it is needed) and :mod:`~penstock.models.hub.parts` (by several
processes). Back to a folder goes :mod:`~penstock.models.hub.saving`.
"""

from penstock.models.hub.description import read_config
from penstock.models.hub.family import family_of
from penstock.models.hub.folders import ADAPTER, BOXED, PACKAGED, boxed_models, name_of, resolve, resolve_adapter
from penstock.models.hub.loading import (
    check_divisible,
    dtype_of,
    import_state,
    is_quantized,
    load,
    load_for_inference,
    load_reward,
    load_to_add,
    weights_for,
)
from penstock.models.hub.parts import blank, read_weights, save_part, save_rest
from penstock.models.hub.saving import save
from penstock.models.hub.streaming import load_streamed
from penstock.models.hub.tokens import config_end_tokens, end_tokens, load_tokenizer

__all__ = [
    "ADAPTER",
    "BOXED",
    "PACKAGED",
    "blank",
    "boxed_models",
    "check_divisible",
    "config_end_tokens",
    "dtype_of",
    "end_tokens",
    "family_of",
    "import_state",
    "is_quantized",
    "load",
    "load_for_inference",
    "load_reward",
    "load_streamed",
    "load_to_add",
    "load_tokenizer",
    "name_of",
    "read_config",
    "read_weights",
    "resolve",
    "resolve_adapter",
    "save",
    "save_part",
    "save_rest",
    "weights_for",
]
