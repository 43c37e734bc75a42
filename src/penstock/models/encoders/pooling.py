"""From a text's hidden states to one vector, as the folders of sentence-transformers say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.config import Config
from penstock.core.errors import ModelError
from penstock.core.files import read_json

#: The file that lists the modules of such a folder.
MODULES = "modules.json"

Way = Literal["cls", "mean", "max", "mean_sqrt", "last"]

#: Keys of a pooling's config.json before it had the key ``pooling_mode``, and the ways that they stand for.
FORMERLY: dict[str, Way] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_lasttoken": "last",
}
NAMES: dict[str, Way] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "lasttoken": "last",
}


class Pooling(Config):
    """How the vector of a text is made.

    Attributes:
        way: the hidden state of the first token (``cls``) or of the ``last``; the ``mean`` of all, their sum over the
            root of their number (``mean_sqrt``), or the largest of each number (``max``).
        normalize: vectors have the length 1.
    """

    way: Way = "mean"
    normalize: bool = True

    def __call__(self, hidden: Tensor) -> Tensor:
        """The vector [hidden] of a text with these hidden states [T, hidden]."""
        match self.way:
            case "cls":
                vector = hidden[0]
            case "last":
                vector = hidden[-1]
            case "max":
                vector = hidden.amax(0)
            case "mean":
                vector = hidden.mean(0)
            case "mean_sqrt":
                vector = hidden.sum(0) / len(hidden) ** 0.5
        return normalized(vector) if self.normalize else vector


def normalized(vectors: Tensor) -> Tensor:
    """``vectors`` [*N, D] with the length 1; what is 0 stays so."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def pooling_of(folder: Path, usual: Pooling) -> Pooling:
    """The pooling that a folder of sentence-transformers asks for; ``usual`` where it says nothing.

    Raises:
        ModelError: it has modules that are not supported.
    """
    path = folder / MODULES
    if not path.is_file():
        return usual
    way, normalize = usual.way, False
    for module in _list(read_json(path), path):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            way = _way(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "LogitScore"):  # the latter makes rankings, of no vectors
            raise ModelError(
                f"{path} has a module of the type {kind!r}", hint="Transformer, Pooling and Normalize are supported."
            )
    return Pooling(way=way, normalize=normalize)


def cuts_of(folder: Path, size: int) -> Sequence[int]:
    """How many of the first numbers of a vector of ``size`` are vectors too: what the folder's config.json lists as
    ``matryoshka_dimensions``, or any number where ``is_matryoshka`` says so alone; else none."""
    path = folder / "config.json"
    told = read_json(path) if path.is_file() else {}
    listed = told.get("matryoshka_dimensions") if isinstance(told, dict) else None
    if isinstance(listed, list):
        return sorted({each for each in listed if isinstance(each, int) and 0 < each <= size})
    return range(1, size + 1) if isinstance(told, dict) and told.get("is_matryoshka") is True else ()


def _list(value: Any, path: Path) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ModelError(f"{path} is no list of modules")
    return value


def _way(path: Path) -> Way:
    told = read_json(path)
    if not isinstance(told, dict):
        raise ModelError(f"{path} is no table")
    named = told.get("pooling_mode")
    if named is not None:
        found = [NAMES[named]] if named in NAMES else []
    else:
        found = [way for key, way in FORMERLY.items() if told.get(key)]
    if len(found) != 1:
        raise ModelError(f"{path} asks for a pooling that is not supported", hint=f"One of {', '.join(get_args(Way))}.")
    return found[0]
