"""Penstock trains, serves and searches large generative models.

Every efficiency technique is a *policy*: one small file behind a contract with an exact law, see
:mod:`penstock.policy`. The command line (:mod:`penstock.cli`) and this package expose the same engine::

    from penstock import LLM, SamplingParams

    LLM("python-6m").generate("def fibonacci(", SamplingParams(max_tokens=64))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.search.llm import LLM
    from penstock.serve.choose.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "penstock.search.llm", "SamplingParams": "penstock.serve.choose.sampling"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, since ``import penstock`` shall not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
