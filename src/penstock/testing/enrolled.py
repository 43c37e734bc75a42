"""The policies that a conformance suite runs over."""

from __future__ import annotations

from typing import TypeVar

from penstock.core.errors import PenstockError
from penstock.policy import Policy, create, index


def enrolled(contract: str) -> dict[str, Policy]:
    """Every registered policy of ``contract`` by name, with its default options.

    An option without a default takes the first of its field's ``examples``, as in ``Field(examples=[...])``.

    Raises:
        PenstockError: a policy requires an option and gives no example of it.
    """
    policies = {}
    for entry in index().entries(contract):
        options = {}
        for name, field in entry.load().model_fields.items():
            if field.is_required():
                if not field.examples:
                    raise PenstockError(
                        f"{contract} {entry.name!r} requires {name!r}, and no example of it is known",
                        hint="Declare the option with Field(examples=[...]), so that the suites can build the policy.",
                    )
                options[name] = field.examples[0]
        policies[entry.name] = create(contract, entry.name, **options)
    return policies


P = TypeVar("P", bound=Policy)


def rebuilt(policy: P) -> P:
    """The policy made anew from its own description, as a run that is resumed makes it; it need not be registered."""
    options = policy.describe()
    assert options.pop("name") == policy.policy_name
    again = type(policy)(**options)
    assert again == policy, f"{policy!r} describes itself as {again!r}"
    return again
