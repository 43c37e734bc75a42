"""The law of ``train.average``.

Bugs that its clauses are there to catch:

- the example: another rule than the paper's, such as a copy of the last weights; a count that is off by one; a filter
  that lets through what it should keep.
- mixture: shares that do not sum to 1, or differ between tensors; negative ones; an update of the weights themselves.
- averaging: one that never moves, or is a copy of the last weights, whatever its example says.
- constant: rounding that moves an average of equal numbers, as a sum of shares in bf16 does.
- resume: memory in the policy, which a checkpoint does not hold.
- shards: a norm of the rows that a process has, taken for that of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from penstock.core.randomness import torch_generator
from penstock.testing.enrolled import rebuilt
from penstock.testing.sharded import on_shards
from penstock.train.averages.contract import Average


def check(average: Average, updates: int = 30) -> None:
    """Asserts the law of ``train.average`` on its example and on random walks."""
    check_example(average)
    check_mixture(average, updates)
    check_averaging(average, updates)
    check_constant(average)
    check_resume(average, updates)
    check_shards(average)


def check_example(average: Average) -> None:
    """Along one run the averages are those that the policy gives."""
    example, weights, expected = average.example()
    assert len(weights) == len(expected) + 1 >= 4, "an example has three updates or more, and one weight before them"
    (first, *later) = (torch.tensor([weight], dtype=torch.float64) for weight in weights)
    running = [first.clone()]
    for count, (weight, wanted) in enumerate(zip(later, expected, strict=True), 1):
        example.update(running, [weight], count)
        found = running[0].item()
        assert math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12), (
            f"after update {count} the average is {found}, and {wanted} in the example"
        )


def check_mixture(average: Average, updates: int) -> None:
    """The average is a mixture of the initial weights and the iterates, the same in all tensors, and changes no weight.

    One of the tensors has iterate i = unit vector i, so its average shows the mixture's coefficients.
    """
    iterates = _told_apart(updates)
    averages = [x.clone() for x in iterates[0]]
    for count, weights in enumerate(iterates[1:], 1):
        before = [x.clone() for x in weights]
        average.update(averages, weights, count)
        assert all(map(torch.equal, weights, before)), "the update changed the weights"
        shares = averages[0]
        assert shares.min() >= 0, f"after {count} updates an iterate has the share {shares.min()}"
        torch.testing.assert_close(shares.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
        for index in range(1, len(averages)):
            mixed = torch.einsum("i,i...->...", shares, torch.stack([iterate[index] for iterate in iterates]))
            torch.testing.assert_close(averages[index], mixed, rtol=0, atol=1e-12)


def check_averaging(average: Average, updates: int) -> None:
    """In the end the weights after two updates or more have a share in the average."""
    first, *later = _told_apart(updates)
    averages = [x.clone() for x in first]
    for count, weights in enumerate(later, 1):
        average.update(averages, weights, count)
    among = int((averages[0][1:] > 0).sum())
    assert among >= 2, f"after {updates} updates the weights of {among} of them are in the average: it averages nothing"


def check_constant(average: Average) -> None:
    """Weights that stay are their own average, bit for bit, in every precision."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = [x.to(dtype) for x in _walk(0)[0]]
        averages = [x.clone() for x in weights]
        for count in range(1, 6):
            average.update(averages, weights, count)
        assert all(map(torch.equal, averages, weights))


def check_resume(average: Average, updates: int) -> None:
    """An update depends on averages, weights and count alone: a policy made anew half-way continues bit for bit."""
    iterates = _walk(updates)
    straight, resumed = ([x.clone() for x in iterates[0]] for _ in range(2))
    for count, weights in enumerate(iterates[1:], 1):
        average.update(straight, weights, count)
        rebuilt(average).update(resumed, weights, count)
    assert all(map(torch.equal, straight, resumed))


def check_shards(average: Average, updates: int = 6) -> None:
    """Averages of weights of which two processes have some rows each are those of the whole weights."""
    iterates = _walk(updates)
    for weights in iterates[1:]:
        for weight, first in zip(weights, iterates[0], strict=True):
            half = -(-len(weight) // 2)
            weight[:half].lerp_(first[:half], 0.999)  # what one of the processes has hardly moves
    alone = [x.clone() for x in iterates[0]]
    for count, weights in enumerate(iterates[1:], 1):
        average.update(alone, weights, count)

    def work(divided: Callable[[Tensor], DTensor]) -> list[str]:
        averages = [divided(x.clone()) for x in iterates[0]]
        for count, weights in enumerate(iterates[1:], 1):
            average.update(averages, [divided(x) for x in weights], count)
        pairs = zip(averages, alone, strict=True)
        same = all(torch.allclose(ours.full_tensor(), theirs, rtol=0, atol=1e-12) for ours, theirs in pairs)
        return [] if same else ["averages of weights in shards are others than those of whole weights"]

    complaints = on_shards(work)
    assert not complaints, "; ".join(complaints)


def _told_apart(updates: int) -> list[list[Tensor]]:
    """A walk with one tensor more, which is unit vector i after i updates: its average is the share of each of them."""
    units = torch.eye(updates + 1, dtype=torch.float64)
    return [[unit, *weights] for unit, weights in zip(units, _walk(updates), strict=True)]


def _walk(updates: int) -> list[list[Tensor]]:
    """The weights, of several shapes, before and after each of ``updates`` random steps."""
    generator = torch_generator(0, "testing/average")
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (5,), (2, 3, 2))]
    iterates = [weights]
    for _ in range(updates):
        weights = [w + 0.1 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
        iterates.append(weights)
    return iterates
