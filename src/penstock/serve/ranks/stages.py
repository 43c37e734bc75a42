"""Pipeline parallelism: ranks that have neighbouring layers of a model each, one behind the other.

The first rank, where the engine is and tokens are drawn, has the last stage; the rank after it the first. So a step
goes through ranks 1, 2 and so on and ends at rank 0, and its hidden states are all that is exchanged: one message from
each stage to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Layer
from penstock.models.rotary import Turns
from penstock.models.shares import Share
from penstock.parallel.tensor import exchanging
from penstock.pipeline.run.stages import Part, Stage


def stages(layers: int, count: int) -> list[range]:
    """Which of so many ``layers`` each of ``count`` stages has: as many as the others, or one more towards the last. So
    none takes more memory for a token than the last one, which decides for how many there is room.

    Raises:
        UsageError: there are fewer layers than stages.
    """
    if count > layers:
        raise UsageError(
            f"{count} stages cannot divide this model: it has {layers} layers",
            hint=f"Set pipeline_parallel to {layers} or fewer." if layers > 1 else "Leave pipeline_parallel out.",
        )
    return [range(layers * stage // count, layers * (stage + 1) // count) for stage in range(count)]


class StageDecoder(Part):
    """The stage of a model that a rank has. What an earlier stage sends takes the place of embeddings.

    Args:
        config: of the whole model.
        share: which rank among how many.

    Attributes:
        held: the numbers of its layers in the whole model.
        ends: whether it is the last stage, which is run as a whole model is; the others :meth:`hand_on`.
    """

    def __init__(self, config: DecoderConfig, share: Share) -> None:
        number = (share.rank - 1) % share.size
        stage = Stage(stages(config.layers, share.size)[number], number == 0, share.rank == 0)
        super().__init__(config, [stage])
        self.held, self._begins, self.ends = stage.layers, stage.begins, stage.ends
        for place, layer in enumerate(self.present):
            layer.attention.layer = place  # in the cache, which has the stage's own layers alone
        self._before, self._after = (share.rank - 1) % share.size, (share.rank + 1) % share.size
        self._given: Tensor | None = None
        #: What is on its way to the next stage; it has to stay in memory until it is there.
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self._begins:
            return super().embed(tokens, positions)
        x, self._given = self._given, None
        return self._received(len(tokens)) if x is None else x

    def hand_on(self, tokens: Tensor, context: AttentionContext) -> None:
        """Computes the layers of a stage that is not the last for ``tokens`` [N], and sends what comes out to the next
        one; that it has arrived is not waited for.

        Raises:
            ExchangeError: a rank is lost.
        """
        self._send(self.through(self.layers, tokens, context)[0].contiguous())

    def arrives(self, tokens: int) -> bool:
        """Whether the stage before this one has computed a speculative run of so many ``tokens``; what it sent is taken
        in then, and goes on with the next pass.

        Raises:
            ExchangeError: a rank is lost.
        """
        if self._begins:
            return True
        told = torch.zeros(1, dtype=torch.int64)
        with exchanging():
            dist.recv(told, self._before)
        self._given = self._received(tokens) if told else None
        return self._given is not None

    def announce(self, computed: bool) -> None:
        """Tells the next stage whether a speculative run will be sent, or is skipped; one that has arrived is dropped
        then.

        Raises:
            ExchangeError: a rank is lost.
        """
        if not computed:
            self._given = None
        if not self.ends:
            self._send(torch.tensor([int(computed)]))

    def _received(self, tokens: int) -> Tensor:
        like = next(self.parameters())
        x = torch.empty(tokens, self.config.hidden, dtype=like.dtype, device=like.device)
        with exchanging():
            dist.recv(x, self._before)
        return x

    def _send(self, x: Tensor) -> None:
        with exchanging():
            while self._sent and self._sent[0][0].is_completed():
                self._sent.popleft()
            work = dist.isend(x, self._after)
        assert work is not None
        self._sent.append((work, x))

    def through(
        self, layers: Iterable[nn.Module], tokens: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Turns, Tensor | None]:
        own = (layer for layer in layers if isinstance(layer, Layer))
        return super().through(own, tokens, context)
