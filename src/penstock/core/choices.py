"""Choices that were measured, and are kept: the next start on such a machine makes the same, and does not measure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from penstock.core.errors import PenstockError
from penstock.core.files import cache_folder, read_json, write_json
from penstock.core.processor import kind

log = logging.getLogger(__name__)

#: What decides how fast a model computes, besides the machine.
PACKAGES = ("penstock", "torch", "triton", "flashinfer-python")


def circumstances(device: torch.device) -> dict[str, Any]:
    """What any measurement on ``device`` depends on: the hardware, and the packages' versions."""
    found: dict[str, Any] = {"processor": kind(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def chosen(name: str, about: Mapping[str, Any], measure: Callable[[], int]) -> int:
    """The choice ``name`` under the circumstances ``about`` (JSON): the one that is kept, else what ``measure`` gives,
    which is kept from now on. Where nothing can be kept, each start measures."""
    about = json.loads(json.dumps(about))
    identity = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()
    found = None
    try:
        path = cache_folder("choices") / f"{name}-{identity}.json"
        found = _kept(path, about)
        if found is None:
            found = measure()
            write_json(path, {"about": about, "choice": found})
    except PenstockError as error:
        log.warning("the choice of %s is measured at each start, as it cannot be kept: %s", name, error)
    return measure() if found is None else found


def _kept(path: Path, about: Mapping[str, Any]) -> int | None:
    """What is kept at ``path``; None where that is nothing, or of no use."""
    with contextlib.suppress(PenstockError):
        kept = read_json(path)
        if isinstance(kept, dict) and kept.get("about") == about and isinstance(kept.get("choice"), int):
            found: int = kept["choice"]
            return found
    return None
