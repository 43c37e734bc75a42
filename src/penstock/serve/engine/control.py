"""What an operator does with an engine: pauses it, lets it sleep, gives it other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.serve.engine.executor import Changeable, Executor
from penstock.serve.engine.steps import EngineSteps
from penstock.serve.kv.tiers import Tiers

if TYPE_CHECKING:
    from torch import Tensor


class EngineControl:
    """An engine's switches, used between its steps.

    Args:
        executor: computes.
        steps: say which version of the weights has computed a token.
        settle: called so that nothing is on its way any more.
        void: called with the reason when what the cache holds has become worthless.
        tiers: where blocks go that leave the cache.

    Attributes:
        paused, asleep: whether it was told to be: requests wait then.
    """

    def __init__(
        self,
        executor: Executor,
        steps: EngineSteps,
        settle: Callable[[], None],
        void: Callable[[str], None],
        tiers: Tiers | None = None,
    ) -> None:
        self._executor, self._steps, self._tiers = executor, steps, tiers
        self._settle, self._void = settle, void
        self.paused = self.asleep = False

    @property
    def stopped(self) -> bool:
        """Whether requests wait for the engine to go on: it is paused, or asleep."""
        return self.paused or self.asleep

    @property
    def version(self) -> int:
        """Of the weights: 0 are those that the engine was opened with."""
        return self._steps.version

    def pause(self) -> None:
        """Lets requests wait, those under way with all that they have; others may come. Their deadlines pass."""
        self._settle()
        self.paused = True

    def resume(self) -> None:
        """Lets requests go on, with the same tokens as if there had been no pause."""
        self.paused = False

    def sleep(self) -> None:
        """Lets requests wait, and frees the memory of the model and of its cache: on CUDA the host keeps the weights,
        on a CPU they are read again, unless they came from a program and not from a folder. Of a model that drafts, all
        stays.

        Raises:
            UsageError: it records its steps.
        """
        executor = self._changeable()
        if not self.asleep:
            self._void("sleep")
            executor.sleep()
            self.asleep = True

    def wake(self) -> None:
        """Brings back what :meth:`sleep` freed. Requests that were under way are computed again up to where they were,
        and go on, unless it is paused besides.

        Raises:
            PenstockError: the memory is not there any more, or the weights cannot be read again; it sleeps on.
        """
        if self.asleep:
            self._changeable().wake()
            self.asleep = False

    def load(self, weights: Mapping[str, Tensor] | str | Path, version: int | None = None) -> int:
        """Puts other weights in the place of the model's, between steps: those of a folder, or tensors by the names of
        ``Decoder.state_dict``, such as a trainer's. What was computed with the old ones is forgotten: every request
        that comes is answered as by a new engine, and those under way go on with the new weights behind the tokens that
        they have. Adapters stay, on the new weights.

        Args:
            version: what they are called from now on, in every delta; one more than before if not given.

        Returns:
            The version.

        Raises:
            UsageError, ModelError: they are not weights of such a model, or this engine cannot take any. Nothing has
                changed then.
        """
        executor = self._changeable()
        if self.asleep:
            raise UsageError("the engine is asleep", hint="Wake it before it is given weights.")
        if version is not None and version < 0:
            raise UsageError(f"a version is a number from 0 on, not {version}")
        self._settle()
        executor.load(Path(weights) if isinstance(weights, str) else weights)
        self._void("load")
        if self._tiers is not None:
            self._tiers.forget()
        self._steps.version = self.version + 1 if version is None else version
        return self.version

    def _changeable(self) -> Changeable:
        if not isinstance(self._executor, Changeable):
            raise UsageError(
                "an engine that records its steps has the same weights all the time", hint="Leave out `record`."
            )
        return self._executor
