"""Bugs that are planted in the package, one at a time, to see whether the law of a contract finds them.

``CONTRACT.toml`` beside this file lists those of a contract::

    [[mutant]]
    bug = "the rate rises with the run"   # what is wrong, in words
    policy = "linear"                     # whose law must find it
    file = "train/schedules/linear.py"    # below src/penstock; a kernel's C++ does as well
    old = "1 - step / total"              # occurs there exactly once
    new = "step / total"

Nothing is copied: in a forked process, which has not imported the package yet, the one module is compiled from the
changed text. So is a native kernel, with little optimisation, into a folder that is thrown away. As a script: plants
the mutants of the given contracts, and prints a JSON object for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "src" / "penstock"

#: Letters of a complaint that are passed on.
LONGEST = 2000

#: Seconds, of a processor and by the clock, after which a law has not found its mutant.
EFFORT, PATIENCE = 180, 900.0


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    contract: str
    bug: str
    policy: str
    file: str
    old: str
    new: str

    @property
    def native(self) -> bool:
        """Whether it is in C++."""
        return self.file.endswith(".cpp")

    @property
    def module(self) -> str:
        return ".".join(("penstock", *Path(self.file).with_suffix("").parts))

    def planted(self) -> str:
        """The text of the module with the bug in it.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        text = (PACKAGE / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.contract}, {self.bug!r}: {self.file} has its old text {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


def mutants(contract: str) -> list[Mutant]:
    """Those of a contract."""
    path = HERE / f"{contract}.toml"
    listed = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"] if path.exists() else []
    return [Mutant(contract, **entry) for entry in listed]


class Planter(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from another text."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.module, str(PACKAGE / mutant.file))
        self._text = mutant.planted()

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = importlib.machinery.PathFinder.find_spec(name, path) if name == self.name else None
        if found is not None:
            found.loader = self
        return found

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._text, self.path, "exec")


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[Callable[[], bool]]:
    """From now on whoever imports the module, or loads the kernel, has the bug; yields the question whether any has."""
    if not mutant.native:
        sys.meta_path.insert(0, Planter(mutant))
        yield lambda: mutant.module in sys.modules
        return
    from penstock.ops import native

    with tempfile.TemporaryDirectory() as folder:
        text, usual, users = Path(folder, Path(mutant.file).name), native.load, []
        text.write_text(mutant.planted(), encoding="utf-8")
        os.environ["XDG_CACHE_HOME"] = folder
        native.FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in native.FLAGS)
        native.load(text)  # a text that cannot be compiled is not a bug that was found

        def load(source: Path) -> ctypes.CDLL:
            users.append(source)
            return usual(text if source == PACKAGE / mutant.file else source)

        native.load = load
        yield lambda: PACKAGE / mutant.file in users


def verdict(mutant: Mutant) -> str:
    """What the law says of the policy with the bug in it, nothing where it finds none. Ends whatever the law does."""
    assert not any(name.startswith("penstock") for name in sys.modules)
    with planted(mutant) as used:
        said = complaint(mutant)
        assert used(), f"the law of {mutant.contract} does not use {mutant.file}"
    return said


def complaint(mutant: Mutant) -> str:
    """The same, where the bug is planted already."""
    from penstock.core.errors import PenstockError
    from penstock.testing import check
    from penstock.testing.enrolled import enrolled

    policy = enrolled(mutant.contract)[mutant.policy]
    try:
        check(policy)
    except (NameError, SyntaxError, ImportError):
        raise  # the mutant itself is no program
    except (AssertionError, PenstockError, LookupError, ValueError, RuntimeError) as error:
        return str(error).strip() or type(error).__name__
    return ""


def tried(mutant: Mutant) -> dict[str, Any]:
    """``mutant`` planted in a process of its own: how the law found it, or why it did not."""
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (EFFORT, EFFORT))
        try:
            said = verdict(mutant)[:LONGEST]
            result = {"found": said} if said else {"missed": "the law finds nothing"}
        except BaseException as error:
            result = {"missed": f"{type(error).__name__}: {error}"[:LONGEST]}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    answered, _, _ = select.select([reader], [], [], PATIENCE)
    if not answered:
        os.killpg(child, signal.SIGKILL)
    payload = os.read(reader, 1 << 16)
    os.close(reader)
    os.waitpid(child, 0)
    result = json.loads(payload) if payload else {"missed": "the law does not end, or its process does"}
    return {"contract": mutant.contract, "bug": mutant.bug, **result, "seconds": round(time.monotonic() - began, 2)}


def warm() -> None:
    """Imports what all laws import and no mutant changes, once for all processes."""
    import pyarrow.parquet
    import pydantic
    import safetensors.torch
    import torch._dynamo
    import torch.distributed
    import transformers

    assert all((pyarrow.parquet, pydantic, safetensors.torch, transformers.AutoModelForCausalLM))
    torch.set_num_threads(1)


if __name__ == "__main__":
    warm()
    for contract in sys.argv[1:]:
        for mutant in mutants(contract):
            print(json.dumps(tried(mutant)), flush=True)
