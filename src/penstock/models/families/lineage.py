"""What the descendants of Llama share on disk: the keys of config.json and the names of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from penstock.core.errors import ModelError
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.families.contract import Family, HubConfig
from penstock.models.families.rope import rope_from_hub, rope_to_hub, turning_whole_heads
from penstock.models.routers.contract import Router

#: Our fields and their keys in config.json.
FIELDS: dict[str, str] = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "init_std": "initializer_range",
}

#: Fields that are whole numbers of 1 or more; and how many layers there are at most, for each of which something is
#: made before anybody looks for its weights.
COUNTS, MOST_LAYERS = {"vocabulary", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "context"}, 10_000

#: What transformers takes where a key is absent. Keys without a default here are required.
DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
}

#: The names of a layer, in ours and on disk.
LAYER, HUB_LAYER = "layers.{layer}", "model.layers.{layer}"
_PROJECTIONS = tuple(f"{HUB_LAYER}.self_attn.{name}_proj" for name in "qkv")

TENSORS: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    f"{LAYER}.attention_norm.weight": (f"{HUB_LAYER}.input_layernorm.weight",),
    f"{LAYER}.attention.qkv.weight": tuple(f"{name}.weight" for name in _PROJECTIONS),
    f"{LAYER}.attention.qkv.bias": tuple(f"{name}.bias" for name in _PROJECTIONS),
    f"{LAYER}.attention.query_norm.weight": (f"{HUB_LAYER}.self_attn.q_norm.weight",),
    f"{LAYER}.attention.key_norm.weight": (f"{HUB_LAYER}.self_attn.k_norm.weight",),
    f"{LAYER}.attention.output.weight": (f"{HUB_LAYER}.self_attn.o_proj.weight",),
    f"{LAYER}.attention.output.bias": (f"{HUB_LAYER}.self_attn.o_proj.bias",),
    f"{LAYER}.mlp_norm.weight": (f"{HUB_LAYER}.post_attention_layernorm.weight",),
    f"{LAYER}.mlp.gate_up.weight": (f"{HUB_LAYER}.mlp.gate_proj.weight", f"{HUB_LAYER}.mlp.up_proj.weight"),
    f"{LAYER}.mlp.gate_up.bias": (f"{HUB_LAYER}.mlp.gate_proj.bias", f"{HUB_LAYER}.mlp.up_proj.bias"),
    f"{LAYER}.mlp.down.weight": (f"{HUB_LAYER}.mlp.down_proj.weight",),
    f"{LAYER}.mlp.down.bias": (f"{HUB_LAYER}.mlp.down_proj.bias",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}


def norm_tensors(**names: str) -> dict[str, tuple[str, ...]]:
    """The tensors of a layer's norms, by what each is called on disk."""
    return {f"{LAYER}.{ours}.weight": (f"{HUB_LAYER}.{theirs}.weight",) for ours, theirs in names.items()}


def expert_tensors(block: str, *, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """The tensors of a sparse layer, whose modules are called ``block``, ``gate``, ``up`` and ``down`` on disk."""
    expert = f"{HUB_LAYER}.{block}.experts.{{expert}}"
    return {
        f"{LAYER}.mlp.router.weight": (f"{HUB_LAYER}.{block}.gate.weight",),
        f"{LAYER}.mlp.gate_up": (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
        f"{LAYER}.mlp.down": (f"{expert}.{down}.weight",),
    }


def shared_tensors(block: str) -> dict[str, tuple[str, ...]]:
    """The tensors of the expert that sees every token, whose module is called ``block`` on disk."""
    shared = f"{HUB_LAYER}.{block}"
    return {
        f"{LAYER}.mlp.shared.gate_up.weight": (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
        f"{LAYER}.mlp.shared.down.weight": (f"{shared}.down_proj.weight",),
    }


#: Our activations, and what config.json calls them, the usual name first.
ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
}


class Lineage(Family):
    """Reads and writes what all the families share; a family adds its ``fields``, what is ``fixed``, and the features
    that are neither.

    Attributes:
        architecture: transformers' class, which config.json names.
        fields: our fields and their keys; a key that stands for several of ours has one value.
        fixed: the fields of :class:`DecoderConfig` that are the same in all models of the family.
        rotation: the fields of :class:`RopeConfig` that are.
        partial: whether the family may turn a part of each head.
        activation: the key of config.json that names the activation.
        defaults: what transformers takes in this family for absent keys, beside :data:`DEFAULTS`.
    """

    tensors = TENSORS
    architecture: ClassVar[str]
    fields: ClassVar[Mapping[str, str]] = FIELDS
    fixed: ClassVar[Mapping[str, Any]] = {}
    rotation: ClassVar[Mapping[str, Any]] = {}
    partial: ClassVar[bool] = False
    activation: ClassVar[str] = "hidden_act"
    defaults: ClassVar[Mapping[str, Any]] = {}

    def features_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        """Fields of :class:`DecoderConfig` beyond the shared ones."""
        return {}

    def features_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        """Keys of config.json beyond the shared ones."""
        return {}

    def rope_from_hub(self, hub: HubConfig) -> dict[str, Any]:
        """The fields ``rope`` and ``local_rope``, where there are any."""
        found = rope_from_hub(hub)
        return {"rope": {**(found if self.partial else turning_whole_heads(found)), **self.rotation}}

    def rope_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        """Their keys."""
        return rope_to_hub(config.rope)

    def config_from_hub(self, hub: Mapping[str, Any]) -> DecoderConfig:
        keys = HubConfig({**DEFAULTS, **self.defaults, **hub})
        try:
            named = keys[self.activation]
            activation = next((ours for ours, theirs in ACTIVATIONS.items() if named in theirs), None)
            if activation is None:
                known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
                raise ModelError(f"{self.activation} {named!r} is not supported", hint=f"Supported: {known}.")
            if keys.get("num_key_value_heads", 0) is None:
                keys["num_key_value_heads"] = keys["num_attention_heads"]
            if "head_dim" in self.fields.values() and keys["head_dim"] is None:
                keys["head_dim"] = _count(keys, "hidden_size") // _count(keys, "num_attention_heads")
            counts = {ours: _count(keys, theirs) for ours, theirs in self.fields.items() if ours in COUNTS}
            if counts["layers"] > MOST_LAYERS:
                raise ModelError(f"{self.fields['layers']} is {counts['layers']:,}, more than {MOST_LAYERS:,}")
            shape = {ours: keys[theirs] for ours, theirs in self.fields.items()}
            features = {**self.rope_from_hub(keys), **self.fixed, **self.features_from_hub(keys)}
            return DecoderConfig(**{**shape, "activation": activation, **features})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(self.fields.get(str(part), str(part)) for part in first["loc"])
            raise ModelError(f"{where}: {first['msg']}" if where else first["msg"]) from error
        except (TypeError, ValueError, ZeroDivisionError, AttributeError, KeyError, OverflowError) as error:
            raise ModelError(f"config.json holds a value of the wrong type: {error}") from error

    def config_to_hub(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.policy_name,
            self.activation: self._activation_to_hub(config),
            **{theirs: getattr(config, ours) for ours, theirs in self.fields.items()},
            **self.rope_to_hub(config),
            **self.features_to_hub(config),
        }

    def _activation_to_hub(self, config: DecoderConfig) -> str:
        names, usual = ACTIVATIONS[config.activation], {**DEFAULTS, **self.defaults}[self.activation]
        return usual if usual in names else names[0]


def _count(hub: HubConfig, key: str) -> int:
    """What ``key`` counts.

    Raises:
        ModelError: nothing, or it is no whole number.
    """
    value = hub[key]
    if type(value) is not int or value < 1:
        raise ModelError(f"{key} is {value!r}, and has to be a whole number of 1 or more")
    return value


def own_layer(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor on disk is of no layer behind the last, such as those that predict more than the next token."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is None or int(layer[1]) < config.layers


def whole_heads(hub: HubConfig) -> None:
    """Refuses a width that is no multiple of the heads, where transformers does.

    Raises:
        ModelError: it is none.
    """
    if hub["hidden_size"] % hub["num_attention_heads"]:
        raise ModelError(
            f"hidden_size ({hub['hidden_size']}) is no multiple of num_attention_heads ({hub['num_attention_heads']})"
        )


R = TypeVar("R", bound=Router)


def mixture(config: DecoderConfig, kind: type[R]) -> tuple[MoEConfig, R]:
    """The experts of ``config`` and their router, for the families whose layers are sparse.

    Raises:
        ModelError: there are none, or they are routed in a way that these families do not know.
    """
    if config.moe is None:
        raise ModelError("no layer is a mixture of experts")
    if not isinstance(config.moe.router, kind):
        raise ModelError(f"moe.router = {config.moe.router.policy_name}")
    return config.moe, config.moe.router
