"""Training a model's own weights."""

from __future__ import annotations

from fnmatch import fnmatchcase

from penstock.core.errors import ConfigError
from penstock.models.decoder import Decoder
from penstock.policy import policy
from penstock.train.tuners.contract import Tuner


@policy("train.tuner", "full")
class Full(Tuner):
    """Trains the model's own weights, but for those that ``frozen`` names.

    ``frozen`` are patterns of parameter names, such as ``embedding.*`` or ``layers.[0-5].*``.
    """

    frozen: tuple[str, ...] = ()

    def attach(self, model: Decoder, seed: int) -> None:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for pattern in self.frozen:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"tuner.frozen names {pattern!r}, and no parameter is called so", hint=f"One is {names[0]!r}."
                )
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in self.frozen):
                model.get_parameter(name).requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("tuner.frozen leaves nothing to train")
