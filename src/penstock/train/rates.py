"""Learning rates of their own for some of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from penstock.core.errors import ConfigError


class Rates:
    """Makes the steps of an optimizer, with those of some parameters scaled: what a learning rate of their own does in
    any optimizer whose steps are proportional to the rate. A copy of these parameters is taken for the time of a step.

    Args:
        parameters: by name.
        factors: of the rate, by patterns of names, such as ``embedding.*``; the first pattern that fits counts.

    Raises:
        ConfigError: a pattern fits no parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float]) -> None:
        for pattern in factors:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ConfigError(f"rates names {pattern!r}, and nothing that is trained is called so")
        self._scaled: list[tuple[nn.Parameter, float]] = []
        for name, parameter in parameters.items():
            factor = next((factor for pattern, factor in factors.items() if fnmatchcase(name, pattern)), 1.0)
            if factor != 1.0:
                self._scaled.append((parameter, factor))

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes a step of ``optimizer``."""
        before = [parameter.detach().clone() for parameter, _ in self._scaled]
        optimizer.step()
        for (parameter, factor), old in zip(self._scaled, before, strict=True):
            parameter.copy_(torch.lerp(old, parameter, factor))
