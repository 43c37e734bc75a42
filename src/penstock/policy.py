"""The registry: a policy is one small file behind a contract.

A *contract* is a class decorated with :func:`contract`; it subclasses :class:`Policy`, documents the methods that a
policy gives, and states the law that every policy of it must obey. A *policy* is a subclass decorated with
:func:`policy`. Policies are immutable pydantic models: their fields are the options, validated and typed, and
whatever state they need at run time lives in the objects that their methods make::

    @policy("train.schedule", "linear", papers=[385])
    class LinearDecay(Schedule):
        warmup: float = Field(0.02, ge=0, lt=1)

        def factor(self, step: int, total: int) -> float: ...

Its docstring says what it takes from its papers, what is ours ("Ours: the order.", "our reading", "we stop where ...")
and what of them is missing ("Not built: the search."): ``penstock papers`` shows the sentences with these words. What
papers propose and nobody chooses is declared by :func:`mechanism`, at the function that does it.

Nothing else is edited: :func:`index` finds decorators by reading the source of the package, without importing it,
so listing policies costs milliseconds and needs no torch. Other distributions add theirs through the entry-point
group ``penstock.policies``, each entry naming a module or package to read in the same way.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from penstock.core.config import unset
from penstock.core.errors import ConfigError, PenstockError, UsageError, nearest

ENTRY_POINTS = "penstock.policies"

#: What mechanisms have in place of a contract.
MECHANISM = "mechanism"


class Policy(BaseModel):
    """Base of all policies: an immutable record of options. See the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, tree: Any) -> Any:
        return unset(cls, tree)

    contract_name: ClassVar[str]
    policy_name: ClassVar[str]
    papers: ClassVar[tuple[int, ...]]

    def describe(self) -> dict[str, Any]:
        """The policy as plain data: its name and options, as they stand in a configuration."""
        return {"name": self.policy_name, **self.model_dump(mode="json")}


P = TypeVar("P", bound=type[Policy])
F = TypeVar("F", bound=Callable[..., Any])


def unwritten(cls: type[Policy], method: str, what: str) -> PenstockError:
    """The error of a method that every policy of a contract must give for its law to be tested, where one does not.

    Args:
        cls: the policy.
        method: as it is called, such as ``example()``.
        what: what it must do, as an imperative clause.
    """
    name = getattr(cls, "policy_name", cls.__name__)
    return PenstockError(
        f"the {cls.contract_name} {name!r} has no {method}, and its law is tested with that",
        hint=f"Write the class method {cls.__name__}.{method}: {what}.",
    )


def contract(name: str, *, law: str, simulated: bool = False) -> Callable[[P], P]:
    """Declares a contract. ``law`` says, in a sentence, what the conformance suite checks for every policy of it.

    A contract is ``simulated`` while no trainer, server or planner takes its policies, only a simulator and pictures:
    a paper that such a policy names counts as simulated, not as implemented. Where some are taken, those that are not
    are simulated themselves.
    """
    if not law:
        raise ValueError(f"contract {name!r} states no law")

    def register(cls: P) -> P:
        cls.contract_name = name
        return cls

    return register


def policy(contract: str, name: str, *, papers: Sequence[int] = (), simulated: bool = False) -> Callable[[P], P]:
    """Registers a policy class under ``contract`` and ``name``. ``papers`` are ids of the catalogue, and ``simulated``
    is one that no trainer, server or planner takes, where the contract is none of that kind.

    All arguments must be literals, since :func:`index` reads them from the source.
    """

    def register(cls: P) -> P:
        fulfilled = getattr(cls, "contract_name", None)
        if fulfilled != contract:
            raise TypeError(f"{cls.__name__} is registered for {contract!r} but fulfils {fulfilled!r}")
        options: type[Policy] = cls
        if "name" in options.model_fields:
            raise TypeError(f"{cls.__name__} has an option called 'name', which in a configuration names the policy")
        cls.policy_name = name
        cls.papers = tuple(papers)
        return cls

    return register


def mechanism(name: str, *, papers: Sequence[int]) -> Callable[[F], F]:
    """Declares the function in which what ``papers`` propose is built as the one way there is, with nothing to choose:
    no policy, and tested where it stands. Its docstring says what is theirs, as that of a policy does.

    All arguments must be literals, as those of :func:`policy`.
    """

    def keep(function: F) -> F:
        return function

    return keep


@dataclasses.dataclass(frozen=True)
class Contract:
    """A contract as read from the source."""

    name: str
    law: str
    module: str
    qualname: str
    simulated: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """A policy, or a mechanism, as read from the source: everything but the class itself, which :meth:`load` imports.

    Attributes:
        summary: the first sentence of ``docstring``, which is the class's own.
        simulated: whether no trainer, server or planner takes it, though it takes others of the contract.
    """

    contract: str
    name: str
    papers: tuple[int, ...]
    summary: str
    module: str
    qualname: str
    path: Path
    docstring: str = ""
    simulated: bool = False

    def load(self) -> type[Policy]:
        """Imports the policy's module and returns its class."""
        cls: type[Policy] = getattr(importlib.import_module(self.module), self.qualname)
        return cls


@dataclasses.dataclass(frozen=True)
class Index:
    """All contracts, policies and mechanisms that the source of Penstock and of its plug-ins declares."""

    contracts: dict[str, Contract]
    policies: dict[tuple[str, str], Entry]
    mechanisms: tuple[Entry, ...] = ()

    def names(self, contract: str) -> list[str]:
        """The names of the policies of ``contract``, sorted."""
        return sorted(name for c, name in self.policies if c == contract)

    def entries(self, contract: str) -> list[Entry]:
        """The policies of ``contract``, sorted by name."""
        return [self.policies[contract, name] for name in self.names(contract)]

    def find(self, contract: str, name: str) -> Entry | None:
        """The policy ``name`` of ``contract``, None if there is none. Hyphens may stand for underscores: the papers
        write zb-h1 where we write zb_h1."""
        return self.policies.get((contract, name)) or self.policies.get((contract, name.replace("-", "_")))


def _roots() -> Iterator[tuple[str, Path]]:
    """(module prefix, source file or folder) of everything that may declare policies."""
    yield "penstock", Path(__file__).parent
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            spec = importlib.util.find_spec(entry.module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise PenstockError(
                f"the plug-in {entry.name!r} names the module {entry.module!r}, which is not there",
                hint="Reinstall or remove the distribution that declares it.",
            )
        origin = Path(spec.origin)
        yield entry.module, origin.parent if origin.name == "__init__.py" else origin


def _modules(prefix: str, root: Path) -> Iterator[tuple[str, Path]]:
    if root.is_file():
        yield prefix, root
        return
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join((prefix, *(p for p in parts if p != "__init__"))), path


def _declarations(module: str, path: Path) -> Iterator[Contract | Entry]:
    try:
        text = path.read_text(encoding="utf-8")
        if not any(f"\n@{name}(" in text for name in ("policy", "contract", MECHANISM)):
            return
        body = ast.parse(text, filename=str(path)).body
    except (SyntaxError, ValueError) as error:
        raise PenstockError(f"{path} is not valid Python: {error}") from error
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield from _mechanisms(node, module, path)
        elif isinstance(node, ast.ClassDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    if call.func.id == "contract":
                        given = _arguments(contract, call, path)
                        yield Contract(given["name"], given["law"], module, node.name, given["simulated"])
                    elif call.func.id == "policy":
                        given = _arguments(policy, call, path)
                        docstring = ast.get_docstring(node) or ""
                        yield Entry(
                            contract=given["contract"],
                            name=given["name"],
                            papers=tuple(given["papers"]),
                            summary=_first_sentence(docstring),
                            module=module,
                            qualname=node.name,
                            path=path,
                            docstring=docstring,
                            simulated=given["simulated"],
                        )


def _mechanisms(node: ast.FunctionDef, module: str, path: Path) -> Iterator[Entry]:
    """The mechanism that a function is declared to be."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == MECHANISM:
            given = _arguments(mechanism, call, path)
            text = ast.get_docstring(node) or ""
            papers = tuple(given["papers"])
            yield Entry(MECHANISM, given["name"], papers, _first_sentence(text), module, node.name, path, text)


def _first_sentence(text: str) -> str:
    return next(iter(sentences(text)), "")


def sentences(text: str) -> list[str]:
    """The sentences of a docstring, paragraph by paragraph, each in one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [
        part for each in paragraphs if each for part in re.split(r"(?<=\.)(?<!\bal\.) ", each)
    ]  # "et al." ends none


def _arguments(decorator: Callable[..., Any], call: ast.Call, path: Path) -> dict[str, Any]:
    """The arguments of a decorator's ``call`` by parameter name, read without running it."""
    try:
        positional = [ast.literal_eval(argument) for argument in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        bound = inspect.signature(decorator).bind(*positional, **keywords)
    except (TypeError, ValueError) as error:
        raise PenstockError(
            f"{path}:{call.lineno}: cannot read @{decorator.__name__}: {error}",
            hint="Its arguments must be literals, since the registry reads them without importing the file.",
        ) from error
    bound.apply_defaults()
    return bound.arguments


def read_index(roots: Iterable[tuple[str, Path]]) -> Index:
    """Reads the decorators below ``roots``, pairs of (module prefix, file or folder).

    Raises:
        PenstockError: a file or decorator cannot be read, or a name is taken twice; the message says where.
    """
    contracts: dict[str, Contract] = {}
    policies: dict[tuple[str, str], Entry] = {}
    mechanisms: dict[str, Entry] = {}
    for prefix, root in roots:
        for module, path in _modules(prefix, root):
            for found in _declarations(module, path):
                if isinstance(found, Contract):
                    twin: Contract | Entry = contracts.setdefault(found.name, found)
                    what = "contracts"
                elif found.contract == MECHANISM:
                    twin, what = mechanisms.setdefault(found.name, found), "mechanisms"
                else:
                    twin = policies.setdefault((found.contract, found.name), found)
                    what = f"policies of {found.contract!r}"
                if twin != found:  # the same file, reached through two entry points, is no conflict
                    raise PenstockError(
                        f"two {what} are called {found.name!r}: "
                        f"{twin.module}.{twin.qualname} and {found.module}.{found.qualname}"
                    )
    return Index(contracts, policies, tuple(mechanisms[name] for name in sorted(mechanisms)))


@functools.cache
def index() -> Index:
    """The index of this installation, read once a process."""
    return read_index(_roots())


def lookup(contract: str, name: str) -> type[Policy]:
    """The class of the policy that :meth:`Index.find` finds.

    Raises:
        UsageError: no such contract or policy; the message lists the nearest names.
    """
    found = index().find(contract, name)
    if found is not None:
        return found.load()
    if contract not in index().contracts:
        raise UsageError(f"there is no contract {contract!r}: {nearest(contract, index().contracts)}")
    raise UsageError(f"{contract} has no policy {name!r}: {nearest(name, index().names(contract))}")


def create(contract: str, name: str, /, **options: Any) -> Policy:
    """Builds the policy ``name`` of ``contract`` with ``options``.

    Raises:
        UsageError: the name is unknown.
        ConfigError: an option is unknown or out of range.
    """
    cls = lookup(contract, name)
    for key in options:
        if key not in cls.model_fields:
            raise ConfigError(f"{contract} {name!r} has no option {key!r}: {nearest(key, cls.model_fields)}")
    try:
        return cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing" and where in cls.model_fields:
            hint = (
                f"Give it beside the name: {{name = {name!r}, {where} = ...}}; on the command line with --set "
                f"SETTING.{where}=..., where SETTING is the one that has the name."
            )
            raise ConfigError(f"{contract} {name!r} needs {where!r}", hint=hint) from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{contract} {name!r}: {where}{': ' if where else ''}{message}") from error


@dataclasses.dataclass(frozen=True)
class Choice:
    """Marks a pydantic field that holds a policy of ``contract``.

    ``schedule: Annotated[Schedule, Choice("train.schedule")]`` accepts a policy, its name, or a table with ``name``
    and options, and serializes to such a table. A table without ``name`` means the policy ``default``, if there is one.
    """

    contract: str
    default: str | None = None

    def resolve(self, value: Any) -> Any:
        """A policy from a name or a table; anything else is left to pydantic's own check."""
        if isinstance(value, str):
            return create(self.contract, value)
        if isinstance(value, dict):
            options = dict(value)
            name = options.pop("name", self.default)
            if not isinstance(name, str):
                known = ", ".join(index().names(self.contract))
                raise ConfigError(f"{self.contract}: say which policy with 'name', one of {known}")
            return create(self.contract, name, **options)
        return value

    def __get_pydantic_core_schema__(self, source: type[Policy], _: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            self.resolve,
            core_schema.is_instance_schema(source),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda chosen: chosen.describe()),
        )
