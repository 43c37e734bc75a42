"""The passes of a model over its cache: as they come, compiled, recorded, or as graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.core.devices import choose_assembler
from penstock.core.errors import UsageError
from penstock.core.progress import Reporter, silent
from penstock.models.adapters.slots import AdapterSlots
from penstock.models.decoder import Decoder
from penstock.models.paged import PagedTokens
from penstock.models.pieces import CompiledPieces
from penstock.models.recorded import RecordedPieces, can_record
from penstock.ops.cuts import draw_cut
from penstock.ops.logprobs import wanted_table
from penstock.ops.paged.contract import PagedCache, StepShape
from penstock.serve.choose.asked import OPTIONS
from penstock.serve.choose.sampling import MOST_LOGPROBS
from penstock.serve.run.graphs import StepGraphs, with_prompts

#: Numbers of each sequence that goes on, beside those by which its tokens are drawn.
GOING = 3 + len(OPTIONS)


class PassGraphs(NamedTuple):
    """Graphs of passes with ``prompts``, of ``decodes``, of ``windows`` with a token chosen behind each row, and of
    decodes that go ``onward``."""

    prompts: StepGraphs
    decodes: StepGraphs
    windows: StepGraphs
    onward: StepGraphs


class Passes:
    """What tokens go through, whose keys and values are in ``cache``.

    Args:
        model: the decoder, on the cache's device.
        cache: the memory of keys and values. Its last block belongs to nobody.
        slots: most sequences at a time.
        pages: most blocks of a sequence.
        adapters: room for adapters of the model; None where tokens have none.
        keeps_hidden: whether hidden states of all tokens are kept.
        onward: how many passes :meth:`gone_on` makes at most, one behind the other.
        waits: whether steps with prompts are captured when there is such a batch: an engine opens sooner then.

    Attributes:
        newest: of the sequence in slot s, at s + 1, the token that it goes on with, int64. What stands at 0 is of no
            meaning. Graphs read it where it is.
        gone: the tokens of the last passes of those that go on, the latest in the last row.
        recorded: what of the passes is recorded, on a CPU.
        shapes: of steps that are graphs or will be, of each of the kinds in :class:`PassGraphs`.
        captured: the graphs, for steps without adapters and for those with some.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PagedCache,
        slots: int,
        pages: int,
        adapters: AdapterSlots | None = None,
        keeps_hidden: bool = False,
        onward: int = 0,
        waits: bool = True,
    ) -> None:
        self._model, self._cache, self._pages, self._adapters = model, cache, pages, adapters
        self._keeps_hidden, self._onward, self._waits = keeps_hidden, onward, waits
        device = cache.shape.device
        self.newest = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.gone = torch.zeros(onward, slots + 1, dtype=torch.int64, device=device)
        self.recorded = RecordedPieces()
        self._records = device.type == "cpu" and can_record(model)
        # With adapters, both also take the slots of the tokens' own, as ``owners``.
        self._trunk: Callable[..., tuple[Tensor, ...]] = self.through.trunk
        self.tip: Callable[..., Tensor] = self.through.tip
        if self._records:
            self._trunk = functools.partial(self._trunk, pieces=self.recorded)
        self.shapes: list[list[StepShape]] = [[] for _ in PassGraphs._fields]
        self.captured: dict[bool, PassGraphs] = {}
        self._place: tuple[Tensor, ...] = ()
        self._chosen: tuple[Tensor, ...] = ()

    @property
    def through(self) -> Decoder | AdapterSlots:
        """What tokens go through."""
        return self._model if self._adapters is None else self._adapters

    @property
    def _padding(self) -> int:
        """The block that belongs to nobody."""
        return self._cache.shape.blocks - 1

    # How they are computed

    def compile(self) -> None:
        """Has them compiled, once they run."""
        choose_assembler()
        self._trunk = functools.partial(self.through.trunk, pieces=CompiledPieces())
        self.tip = torch.compile(self.through.tip, dynamic=True)

    def choose(self, *shapes: List[StepShape]) -> None:
        """Steps of these ``shapes`` will be graphs, of each of the kinds in :class:`PassGraphs`.

        Raises:
            UsageError: the cache's plans cannot be replayed.
        """
        self.shapes = [[*own] for own in shapes]
        if not self._cache.fix([shape for own in shapes for shape in own], self._pages):
            raise UsageError(
                "this attention backend cannot be part of graphs",
                hint="Set engine.compile=false, or choose another engine.attention.",
            )

    def _graphs(self) -> dict[bool, PassGraphs]:
        """For steps without adapters and, where there can be some, with them; nothing is captured yet."""
        common: dict[str, Any] = {
            "pages": self._pages,
            "padding": self._padding,
            "pool": torch.cuda.graph_pool_handle(),
        }
        return {
            adapted: PassGraphs(
                StepGraphs(self._begun_in_place, 3 + adapted, self._cache, **common),
                StepGraphs(self._decoded, 10 + adapted, self._cache, **common),
                StepGraphs(self._decoded_in_place, 10 + adapted, self._cache, **common),
                StepGraphs(self.gone_on, GOING + 2 * self._onward, self._cache, **common),
            )
            for adapted in ((False,) if self._adapters is None else (False, True))
        }

    def try_graphs(self, free: Callable[[], int]) -> int:
        """About how many bytes :meth:`capture` will take; ``free`` says how many are free. Passes must be compiled, and
        the cache may still change its size."""
        taken = 0
        for graphs in self._graphs().values():
            taken += sum(each.try_out(own, free) for each, own in zip(graphs, self.shapes, strict=True))
        self._place = self._chosen = ()  # of those graphs, and counted with them
        return taken

    def capture(self, report: Reporter = silent) -> None:
        """Captures the chosen steps as graphs. The cache stays as it is from now on."""
        graphs, later = self._graphs(), [with_prompts(own) if self._waits else [] for own in self.shapes]
        count = sum(map(len, self.shapes)) - sum(map(len, later))
        with report("capturing", len(graphs) * count, "graph") as bar:
            for own in graphs.values():
                for each, shapes, waiting in zip(own, self.shapes, later, strict=True):
                    each.capture(shapes, bar, waiting)
        self.captured = graphs

    def release(self) -> None:
        """Weights and the cache are going to lie elsewhere: nothing is captured or recorded any more."""
        self.captured = {}
        self.recorded.forget()
        self._place = self._chosen = ()

    # What they compute

    def begun(self, inputs: Tensor, plainly: bool = False, **worn: Tensor) -> tuple[Tensor, ...]:
        """What the last layer needs to go on with any of the tokens with ``inputs`` int64 [3, N], as of a part; where
        some have adapters, their slots are ``worn``. It goes ``plainly`` without what was compiled."""
        known, places, positions = inputs
        tokens = torch.where(places > 0, self.newest[places], known)
        trunk: Callable[..., tuple[Tensor, ...]] = self.through.trunk if plainly else self._trunk
        return trunk(tokens, PagedTokens(positions, self._cache), **worn)

    def scores(self, *begun: Tensor, **worn: Tensor) -> Tensor:
        """The logits of tokens of which :meth:`begun` gave these; where some have adapters, their slots are
        ``worn``."""
        if self._records and not worn and self._cache.recorded is not None:
            return self.recorded.scores(self._model, *begun)
        return self._model.logits(self.tip(*begun, **worn))

    def kept(self, begun: tuple[Tensor, ...], hidden: Tensor | None = None, **worn: Tensor) -> Tensor:
        """The states that are kept of tokens, of which :meth:`begun` gave these: the last ``hidden`` ones, which may be
        there already."""
        return self.tip(*begun, **worn) if hidden is None else hidden

    def _begun_in_place(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`begun` gives, in the memory of the first time, which had the most rows: graphs have none of their
        own."""
        begun = self.begun(inputs[:3], **_worn(inputs[3:]))
        self._place = self._place or begun
        return _in_place(self._place, begun)

    def _decoded(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The logits, the tokens that are drawn from them, what is wanted of their log-probabilities, and, where they
        are kept, the hidden states of sequences that decode. ``inputs`` int64 [10, N] are a part's and its draws, and
        behind them the slots of adapters where some have one. The tokens are put where the next step finds them."""
        worn = _worn(inputs[10:])
        begun = self.begun(inputs[:3], **worn)
        hidden = self.tip(*begun, **worn)
        logits = self._model.logits(hidden)
        tokens = draw_cut(logits, inputs[3:8].view(torch.float64))
        self.newest.index_copy_(0, inputs[8], tokens)
        told = wanted_table(logits, tokens, inputs[9], MOST_LOGPROBS)
        kept = (self.kept(begun, hidden),) if self._keeps_hidden else ()
        return logits, tokens, told, *kept

    def _decoded_in_place(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`_decoded` gives, of windows, in the memory of the first time."""
        decoded = self._decoded(inputs)
        self._chosen = self._chosen or decoded
        return _in_place(self._chosen, decoded)

    def gone_on(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The tokens of the last passes of sequences that go on, with that of this one. ``inputs`` int64
        [GOING + 2 * passes, N] are made what the next pass takes: where the newest tokens are; the positions; how many
        passes are left for each sequence, with this one; temperature and cuts as float64; the numbers by which tokens
        are drawn in each pass, likewise; and the tokens that each pass takes, -1 for the newest one."""
        places, positions, left = inputs[:3]
        options, (draws, known) = inputs[3:GOING], inputs[GOING:].chunk(2)
        given = torch.where(known[0] < 0, self.newest[places], known[0])
        begun = self._trunk(given, PagedTokens(positions, self._cache))
        logits = self.scores(*begun)
        tokens = draw_cut(logits, torch.cat([options, draws[:1]]).view(torch.float64))
        self.newest.index_copy_(0, places, tokens)
        gone = self.gone[:, : inputs.shape[1]]
        gone.copy_(torch.cat([gone[1:], tokens.unsqueeze(0)]))
        more = left > 1
        positions += more
        left -= 1
        for each in (draws, known):
            each.copy_(each.roll(-1, 0))
        self._cache.advance(positions, more, self._padding * self._cache.shape.block_size)
        return (gone,)


class TappedPasses(Passes):
    """Those of a :class:`~penstock.models.tapped.TappedDecoder`, of which the states that it gives between its layers
    are kept."""

    def kept(self, begun: tuple[Tensor, ...], hidden: Tensor | None = None, **worn: Tensor) -> Tensor:
        return begun[2]


def _in_place(place: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies of what is ``new`` at the begin of the ``place`` for it."""
    return tuple(there[: len(own)].copy_(own) for there, own in zip(place, new, strict=True))


def _worn(rows: Tensor) -> dict[str, Any]:
    """What a pass is told of adapters, of inputs int64 [1, N], or [0, N] where there are none."""
    return {"owners": rows[0]} if len(rows) else {}
