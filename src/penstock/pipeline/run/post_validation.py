"""The optimizer step that waits for nobody: optimistic on a partial norm, validated later, rolled back if it was wrong.

A step that clips by the global norm, or is skipped where a gradient is not finite, makes all stages wait for each other
just where a zero-bubble schedule has them staggered. Instead the sum of squared gradients is passed down the devices:
device d adds its own to what it got from device d-1, takes its step by that partial sum, and hands it on. The last one
knows the whole sum, which travels back while the others do the first forwards of the next iteration. Each then settles:
it keeps the step if the whole sum leads to the same one, else undoes it, takes the right one, and does these forwards
again. All decide alike: a partial sum below the limit may be followed by a whole one above it, never the other way.

From the zero-bubble paper, but for the rollback: it inverts the update's arithmetic in place, up to rounding; ours puts
back copies of parameters and optimizer state, bit for bit, which costs their memory until the step is settled.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import torch

from penstock.pipeline.ir.schedule import Kind, Schedule


def tentative(schedule: Schedule) -> list[int]:
    """For each device, how many tasks of its list it can do before the step is settled: forwards that wait for no task
    of the last device, which is the first to know. Of the last device none."""
    counts, made = [0] * schedule.devices, {-1}
    waiting = False
    while not waiting:
        waiting = True
        for device, order in enumerate(schedule.orders[:-1]):
            for task in order[counts[device] :]:
                if task.kind is not Kind.F or schedule.read_by(task) not in made:
                    break
                made.add(schedule.made_by(task))
                counts[device] += 1
                waiting = False
    return counts


class _Verdict(enum.Enum):
    PLAIN = "the gradients as they are"
    CLIPPED = "the gradients scaled down"
    NONE = "no step, as a gradient is not finite"


def squared_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of all gradients, a scalar in fp64; not finite exactly if a gradient is not.

    Sums of it over stages never fall, so a partial norm above the limit means a whole norm above it.
    """
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


class PendingStep:
    """A step of ``optimizer`` that was taken, or held back, by what was known then.

    Gradients and learning rates must stay as they are until it is settled.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, partial: torch.Tensor, max_norm: float | None) -> None:
        """Takes the step, unless ``partial`` (the sum of squares up to this stage) says that it would be wrong.

        Gradients are clipped to a norm of ``max_norm``, if that is given.
        """
        self._optimizer, self._max_norm = optimizer, max_norm
        self._before: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] | None = None
        if self._verdict(partial) is _Verdict.PLAIN:
            self._before = [
                (parameter, parameter.detach().clone(), _copied(optimizer.state.get(parameter, {})))
                for parameter in self._parameters()
            ]
            optimizer.step()

    def settle(self, whole: torch.Tensor) -> bool:
        """Makes the step that ``whole``, the sum of squares over all stages, asks for; whether it was that already.

        Parameters and optimizer state then equal those of a step that had waited for ``whole``, bit for bit.
        """
        verdict = self._verdict(whole)
        if self._before is not None and verdict is _Verdict.PLAIN:
            self._before = None
            return True
        if self._before is not None:
            self._roll_back(self._before)
            self._before = None
        if verdict is _Verdict.NONE:
            return False
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), self._max_norm, whole.sqrt())
        self._optimizer.step()
        return False

    def _verdict(self, squares: torch.Tensor) -> _Verdict:
        if not bool(squares.isfinite()):
            return _Verdict.NONE
        # PyTorch divides by the norm plus 1e-6: just below the limit, it clips already.
        if self._max_norm is not None and float(squares.sqrt()) + 1e-6 > self._max_norm:
            return _Verdict.CLIPPED
        return _Verdict.PLAIN

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def _roll_back(self, before: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]) -> None:
        for parameter, values, state in before:
            parameter.copy_(values)
            self._optimizer.state[parameter] = state


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one parameter: tensors and numbers."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
