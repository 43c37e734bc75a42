"""The processes of a run, started by ``torchrun`` or alone."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.core.errors import PenstockError
from penstock.parallel.watch import LossError, Watch

#: How long processes wait for one that is busy elsewhere, with building a token store, say. One that has ended is
#: noticed at once.
PATIENCE = datetime.timedelta(hours=1)

#: Seconds in which it is known that a process has ended whose end others have run into.
NOTICED = 2.0


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place: its ``rank`` among ``size``, and ``local_rank`` on its host.

    All processes call the methods that exchange something in the same order. Those raise
    :class:`~penstock.parallel.watch.LossError` where another process has failed; it names that one.

    Attributes:
        watch: knows who was lost; None where there is one process, or where the others were not joined.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    watch: Watch | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def join(cls) -> World:
        """Joins the process group that ``torchrun`` describes in the environment; alone when it describes none.

        Raises:
            PenstockError: the other processes cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        try:
            if not dist.is_initialized():
                dist.init_process_group(_backend(), timeout=PATIENCE)
            rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
            return cls(rank, size, local_rank, _watch(rank, size, local_rank))
        except (RuntimeError, ValueError, OSError) as error:
            raise PenstockError(
                f"cannot join the {size} processes of the run: {str(error).splitlines()[0]}",
                hint="Start them with torchrun, which tells each of them where the others are.",
            ) from error

    @classmethod
    def meet(
        cls,
        rank: int,
        size: int,
        store: dist.TCPStore,  # type: ignore[name-defined]
        patience: datetime.timedelta,
    ) -> World:
        """Joins the process group of ``size`` processes of this host that have a ``store`` in common, and wait
        ``patience`` for each other.

        Raises:
            PenstockError: the other processes cannot be reached.
        """
        try:
            dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=patience)
            return cls(rank, size, rank, Watch(rank, size, rank, "127.0.0.1"))
        except (RuntimeError, ValueError, OSError) as error:
            raise PenstockError(
                f"rank {rank} cannot join the {size} processes: {str(error).splitlines()[0]}"
            ) from error

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def leave(self) -> None:
        """Leaves the process group when the work is done, all processes together. A process that fails just ends: that
        tells the others."""
        if self.size > 1 and dist.is_initialized():
            self.barrier()
            if self.watch is not None:
                self.watch.leave()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def together(self, tell: Callable[[PenstockError], None]) -> Iterator[None]:
        """Within the block, all processes of several end when one fails or is lost, and one on each host tells why.

        Which one was the first is what counts: not who noticed it, and not what failed for want of it. An exception
        that is no :class:`PenstockError` keeps its traceback. Alone, the block does nothing.

        Args:
            tell: prints an error.
        """
        if self.watch is None:
            yield
            return
        self.watch.end_too(tell)
        try:
            yield
        except Exception as error:
            loss = error.loss if isinstance(error, LossError) else self.watch.failed(error)
            if self.watch.tells(loss):
                if loss.rank == self.rank and not isinstance(error, PenstockError):
                    print(f"rank {self.rank} has failed:", file=sys.stderr)
                    traceback.print_exception(error)
                else:
                    tell(LossError(loss))
            self._exit(loss.code)

    def require_all(self) -> None:
        """Checks that no process has been lost so far.

        Raises:
            LossError: one has been.
        """
        if self.watch is not None and self.watch.loss is not None:
            raise LossError(self.watch.loss)

    def end(self) -> None:
        """Ends a process of several, successfully, when the work is done; alone, does nothing.

        The interpreter is not torn down: gloo's threads can abort a process that is (seen now and then with PyTorch
        2.13), which would turn a finished run into a failed one.
        """
        if self.size > 1:
            self.leave()
            self._exit(0)

    def _exit(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over all processes, in place, in one exchange for each dtype.

        Every process ends with the same bits.
        """
        if self.size == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            members = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in members])
            with self.explained("an exchange of all processes"):
                dist.all_reduce(flat)
            parts = torch.split(flat, [t.numel() for t in members])
            torch._foreach_copy_(members, [part.view(t.shape) for part, t in zip(parts, members, strict=True)])

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes. On the CPU: no device waits for it."""
        return self.begin_largest(*values)()

    def begin_largest(self, *values: float) -> Callable[[], list[float]]:
        """Begins to ask for the largest of each value; what it returns waits for the answer."""
        if self.size == 1:
            return lambda: list(values)
        votes = torch.tensor(values, dtype=torch.float64)
        with self.explained("an exchange of all processes"):
            work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)

        def answer() -> list[float]:
            with self.explained("an exchange of all processes"):
                work.wait()
            return votes.tolist()

        return answer

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Turns a failure inside the block that comes of a lost process into an error that names that one. Others stay
        what they are."""
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL raise nothing narrower
            deadline = time.monotonic() + NOTICED
            while self.watch is not None and self.watch.loss is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if self.watch is None or self.watch.loss is None:
                raise
            raise LossError(self.watch.loss) from error

    def barrier(self) -> None:
        """Waits for all processes."""
        self.largest(0.0)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turns the failure of ``what``, which all processes do together, into an error that names the lost one."""
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL raise nothing narrower
            assert self.watch is not None
            raise self.watch.waited(None, what, patience=2.0) from error


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@functools.cache
def _watch(rank: int, size: int, local_rank: int) -> Watch:
    """This process's only one."""
    return Watch(rank, size, local_rank, os.environ["MASTER_ADDR"])
