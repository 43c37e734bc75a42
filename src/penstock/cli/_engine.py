"""What commands that open an engine say of it: every option is declared here, once for all of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from penstock.core.errors import UsageError

if TYPE_CHECKING:
    from penstock.serve.config import EngineConfig


@dataclasses.dataclass(frozen=True)
class Flag:
    """An option of the command line that sets one of the engine's.

    Attributes:
        key: the engine's, as ``--set`` would name it.
        option: as typer takes it.
        kind: of its value.
    """

    key: str
    option: Any
    kind: Any = str | None

    @property
    def name(self) -> str:
        """As a user writes it."""
        return str(self.option.param_decls[0])


#: By the name of the parameter. Words in braces stand for the names of a contract's policies.
FLAGS = {
    "draft": Flag(
        "draft.name",
        typer.Option(
            None,
            "--draft",
            metavar="DRAFTER",
            help="Draft tokens and check them together: a drafter ({speculate.drafter}), a smaller model, or the "
            "folder of a head, such as --draft ngram or --draft python-1m; more of it by --set draft.tokens=4.",
        ),
    ),
    "draft_tree": Flag(
        "draft_tree",
        typer.Option(
            None,
            "--draft-tree",
            metavar="N,N,...",
            help="How many drafts each place has, by depth, such as 3,2: a tree.",
        ),
    ),
    "controller": Flag(
        "controller.name",
        typer.Option(
            None,
            "--controller",
            metavar="POLICY",
            help="How many tokens are drafted: {speculate.controller}; else measured. Such as --draft ngram "
            "--controller bass.",
        ),
    ),
    "verifier": Flag(
        "verifier.name",
        typer.Option(
            None,
            "--verifier",
            metavar="POLICY",
            help="Which drafted tokens stay: {speculate.verifier}; else exact_match. Such as --draft python-1m "
            "--verifier accept_residual.",
        ),
    ),
    "kv": Flag(
        "kv.name",
        typer.Option(
            None,
            "--kv",
            metavar="POLICY",
            help="What the cache of a sequence keeps: {kv.policy}; else full. Such as --kv snapkv --kv-budget 0.25.",
        ),
    ),
    "kv_budget": Flag(
        "kv.budget",
        typer.Option(None, "--kv-budget", metavar="X", help="How much of it: a share such as 0.25, or a number."),
        float | None,
    ),
    "kv_when": Flag(
        "kv.when",
        typer.Option(
            None,
            "--kv-when",
            metavar="WHEN",
            help="When it gives up the rest: due, at once; or pressure, once blocks are short.",
        ),
    ),
    "kv_eviction": Flag(
        "eviction.name",
        typer.Option(
            None,
            "--kv-eviction",
            metavar="POLICY",
            help="Which prefixes leave the cache first: {kv.eviction}; else lru.",
        ),
    ),
    "kv_host": Flag(
        "kv_host",
        typer.Option(
            None, "--kv-host", metavar="BYTES", help="Host memory for prefixes that leave the cache, such as 8GB."
        ),
    ),
    "kv_disk": Flag(
        "kv_disk",
        typer.Option(
            None,
            "--kv-disk",
            metavar="FOLDER",
            help="Where they go besides, and are found after a restart, such as --kv-host 2GB --kv-disk cache.",
        ),
        Path | None,
    ),
    "kv_codec": Flag(
        "codec.name",
        typer.Option(
            None,
            "--kv-codec",
            metavar="CODEC",
            help="How the cache holds keys and values: {kv.codec}; else plain. Such as --kv-codec int8.",
        ),
    ),
    "kv_residual": Flag(
        "codec.residual",
        typer.Option(
            None,
            "--kv-residual",
            metavar="N",
            min=0,
            help="The newest tokens of each sequence, up to so many, in full precision: --kv-codec int4 "
            "--kv-residual 128.",
        ),
        int | None,
    ),
    "kv_reuse": Flag(
        "kv_reuse.name",
        typer.Option(
            None,
            "--kv-reuse",
            metavar="POLICY",
            help="How contexts are encoded that requests name: {kv.reuse}; else prefix, in a row.",
        ),
    ),
    "kv_recompute": Flag(
        "kv_reuse.recompute",
        typer.Option(
            None,
            "--kv-recompute",
            metavar="X",
            help="The share of a moved context that is computed again: --kv-reuse cache_craft --kv-recompute 0.3.",
        ),
        float | None,
    ),
    "tensor_parallel": Flag(
        "tensor_parallel",
        typer.Option(
            None,
            "--tensor-parallel",
            metavar="N",
            min=1,
            help="Divide the model among N devices of this host, or on the CPU among N processes.",
        ),
        int | None,
    ),
    "pipeline_parallel": Flag(
        "pipeline_parallel",
        typer.Option(
            None,
            "--pipeline-parallel",
            metavar="N",
            min=1,
            help="Give each of N devices of this host, or on the CPU of N processes, some of the layers.",
        ),
        int | None,
    ),
    "resident_weights": Flag(
        "resident_weights",
        typer.Option(
            None,
            "--resident-weights",
            metavar="BYTES",
            help="Most memory for weights, such as 8GB: layers that do not fit are read from disk in each pass. On a "
            "CPU.",
        ),
    ),
    "deterministic": Flag(
        "deterministic",
        typer.Option(
            None,
            "--deterministic",
            help="The same bits for a request alone and in any batch, at the price of the fastest kernels.",
        ),
        bool | None,
    ),
    "record": Flag(
        "record",
        typer.Option(
            None,
            "--record",
            metavar="FILE",
            help="Write all steps there, for `penstock replay`: prompts and answers too.",
        ),
        Path | None,
    ),
    "adapter": Flag(
        "adapters",
        typer.Option(
            [],
            "--adapter",
            metavar="NAME=FOLDER",
            help="A LoRA adapter, by its name. May be given again.",
        ),
        list[str],
    ),
}

OVERRIDES = typer.Option(
    [],
    "--set",
    metavar="KEY=VALUE",
    help="Set any option of the engine, such as batching=orca ({serve.batching}) or sequences=64. May be given again.",
)

#: What must be named beside what is said of it, and by which option.
NAMED = {
    "kv": "--kv, such as h2o, snapkv or sink_window",
    "codec": "--kv-codec, such as int4",
    "kv_reuse": "--kv-reuse, such as cache_craft",
}

#: What these options say, in words.
SAYING = {
    "kv_budget": "says how much is kept, and not what",
    "kv_when": "says when a cache is compressed, and not what is kept of it",
    "kv_residual": "says how many tokens are not coded, and not how the others are",
    "kv_recompute": "says how much of contexts is computed again that are moved, and not how they are",
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command line says of an engine.

    Attributes:
        given: the values of :data:`FLAGS` that were given, by the names of their parameters.
        overrides: of ``--set``.
    """

    given: Mapping[str, Any]
    overrides: Sequence[str]

    def config(self, base: Mapping[str, Any] | None = None, called: str = "") -> EngineConfig:
        """The engine's options.

        Args:
            base: what they are where nothing is said.
            called: what requests call the model.

        Raises:
            UsageError: they are not valid, contradict each other, or would not be heeded.
        """
        from penstock.core.config import build
        from penstock.serve.config import EngineConfig

        values = {name: value if name == "adapter" else _plain(value) for name, value in self.given.items()}
        if "adapter" in values:
            values["adapter"] = _folders(values["adapter"], called)
        flags = {FLAGS[name].key: (FLAGS[name].name, value) for name, value in values.items()}
        tree = merged(base or {}, flags, self.overrides)
        for name, saying in SAYING.items():
            section = FLAGS[name].key.partition(".")[0]
            if name in values and isinstance(tree[section], Mapping) and "name" not in tree[section]:
                raise UsageError(f"{FLAGS[name].name} {values[name]} {saying}", hint=f"Name it with {NAMED[section]}.")
        return build(EngineConfig, tree, "the engine's options")


def merged(
    base: Mapping[str, Any], flags: Mapping[str, tuple[str, Any]], overrides: Sequence[str], word: str = "--set"
) -> dict[str, Any]:
    """``base`` with ``flags`` and ``overrides``.

    Args:
        flags: by the key that each sets: what a user calls it, and its value.
        overrides: KEY=VALUE each, which a user has given by the option ``word``.

    Raises:
        UsageError: a flag and an override say different things of one key.
    """
    from penstock.core.config import apply_overrides, parse_value, path_of

    tree = apply_overrides(base, [])
    for key, (_, value) in flags.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    told = [_named(override, flags) for override in overrides]
    for override, (path, text) in zip(overrides, map(path_of, told), strict=True):
        for key, (flag, value) in flags.items():
            own = key.split(".")
            if own[: len(path)] == path and _below(parse_value(text), own[len(path) :]) != _comparable(value):
                raise UsageError(
                    f"{_written(flag, value)} and {word} {override} say different things of {'.'.join(path)}",
                    hint="Give one of them.",
                )
    return apply_overrides(tree, told)


def _written(flag: str, value: Any) -> str:
    """``flag`` with its ``value``, as a user writes it."""
    if value is True:
        return flag
    return f"{flag} " + (
        " ".join(f"{one}={other}" for one, other in value.items()) if isinstance(value, dict) else str(value)
    )


def _named(override: str, flags: Iterable[str]) -> str:
    """The same, in long form where a policy is named of which ``flags`` say more."""
    from penstock.core.config import parse_value, path_of

    path, text = path_of(override)
    section = "".join(f"{part}." for part in path)
    short = isinstance(parse_value(text), str) and any(key.startswith(section) for key in flags)
    return f"{section}name={text}" if short else override


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _below(value: Any, keys: Sequence[str]) -> Any:
    """What ``value`` says at ``keys``, where it is a table."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return _comparable(value)


def _comparable(value: Any) -> Any:
    """The same for what a user may write in two ways."""
    from penstock.core.config import parse_value

    return parse_value(value) if isinstance(value, str) else value


def _folders(given: Sequence[str], model: str) -> dict[str, str]:
    """The folders of ``--adapter``, by name. ``model`` is what requests call the model.

    Raises:
        UsageError: one has no name or another's, or there is none in its folder.
    """
    from penstock.models import hub

    found: dict[str, str] = {}
    for each in given:
        name, separator, folder = each.partition("=")
        if not (separator and name and folder):
            raise UsageError(f"cannot read --adapter {each!r}", hint="Write --adapter NAME=FOLDER.")
        if name == model or name in found:
            raise UsageError(f"two models are called {name!r}", hint="Choose another name for the adapter.")
        found[name] = str(hub.resolve_adapter(folder))
    return found


#: Nothing at all: what the parameter of a command is by default.
ASKED = Asked({}, ())


def opens_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Gives ``command`` all of :data:`FLAGS` and ``--set`` in the place of its parameter ``engine``, which gets what
    they say as :class:`Asked`."""

    @functools.wraps(command)
    def called(**arguments: Any) -> None:
        flags = {name: arguments.pop(name) for name in FLAGS}
        overrides = arguments.pop("overrides")
        given = {name: value for name, value in flags.items() if value is not None and value != []}
        command(**arguments, engine=Asked(given, overrides))

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != "engine":
            parameters.append(parameter)
            continue
        flags = {name: (flag.kind, flag.option) for name, flag in FLAGS.items()}
        for name, (kind, option) in {"overrides": (list[str], OVERRIDES), **flags}.items():
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option, annotation=kind)
            )
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
