"""The processes of a run, started by ``torchrun`` or alone."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.core.errors import PenstockError

#: How long processes wait for one that is busy elsewhere, with building a token store, say. One that has ended is
#: noticed at once.
PATIENCE = datetime.timedelta(hours=1)


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place: its ``rank`` among ``size``, and ``local_rank`` on its host.

    All processes call the methods that exchange something in the same order. Those raise :class:`PenstockError` where
    another process has failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> World:
        """Joins the process group that ``torchrun`` describes in the environment; alone when it describes none.

        Raises:
            PenstockError: the other processes cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                dist.init_process_group(backend, timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                raise PenstockError(
                    f"cannot join the {size} processes of the run: {str(error).splitlines()[0]}",
                    hint="Start them with torchrun, which tells each of them where the others are.",
                ) from error
        return cls(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def leave(self) -> None:
        """Leaves the process group when the work is done, all processes together. A process that fails just ends: that
        tells the others."""
        if self.size > 1 and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    def end(self) -> None:
        """Ends a process of several, successfully, when the work is done; alone, does nothing.

        The interpreter is not torn down: gloo's threads can abort a process that is (seen now and then with PyTorch
        2.13), which would turn a finished run into a failed one.
        """
        if self.size > 1:
            self.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over all processes, in place, in one exchange for each dtype.

        Every process ends with the same bits.
        """
        if self.size == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            members = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in members])
            with _explained():
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
        with _explained():
            work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)

        def answer() -> list[float]:
            with _explained():
                work.wait()
            return votes.tolist()

        return answer

    def barrier(self) -> None:
        """Waits for all processes."""
        self.largest(0.0)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise nothing narrower
        raise PenstockError(
            "another process of this run has failed, or does not answer",
            hint="The message of the process that failed first says why.",
        ) from error
