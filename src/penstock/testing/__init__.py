"""The laws of the contracts, and the oracles that they need, importable for tests of third-party policies.

:func:`check` runs the law of any policy. The law of a contract is the function ``check`` of the module named after it,
``train.schedule`` in :mod:`penstock.testing.train_schedule`; the module says which bugs its clauses are there to catch,
and holds a function for each clause. A law fails with an ``AssertionError`` that names the clause's complaint.

:mod:`penstock.testing.engine` plays any course of events on an engine, and :mod:`penstock.testing.reference` says what
should come out of it, by recomputing everything; :mod:`penstock.testing.house` knows which package may import which.
"""

from __future__ import annotations

import importlib
import importlib.util

from penstock.core.errors import PenstockError
from penstock.policy import Policy


def check(policy: Policy) -> None:
    """Runs the law of the policy's contract on it, which takes seconds.

    What the law needs to know about the policy, such as an example worked out by hand, the policy's own class says; its
    contract's class says how.

    Raises:
        AssertionError: the policy breaks the law.
        PenstockError: the policy does not give what its law is tested with, or there is no law of such contracts here.
    """
    name = f"penstock.testing.{policy.contract_name.replace('.', '_')}"
    module = importlib.import_module(name) if importlib.util.find_spec(name) else None
    law = getattr(module, "check", None)
    if law is None:
        raise PenstockError(f"penstock.testing has no function that checks the law of {policy.contract_name}")
    law(policy)
