"""Runs batches on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as List
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.core.choices import chosen, circumstances
from penstock.core.devices import upload
from penstock.core.errors import PenstockError, UsageError
from penstock.core.progress import Reporter, silent
from penstock.models import hub
from penstock.models.adapters.slots import AdapterSlots
from penstock.models.decoder import Decoder
from penstock.models.superposed import SuperposedRows, superposing
from penstock.ops.paged.contract import PagedCache, StepShape
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.logprobs import Logprobs
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Drawn, Sampled, Sampler
from penstock.serve.embed.pooled import decoder_states
from penstock.serve.engine.batch import Awaited, Batch
from penstock.serve.kv.compaction import Compactor
from penstock.serve.kv.moving import Mover
from penstock.serve.run.copies import Copied, shaken
from penstock.serve.run.graphs import (
    StepGraphs,
    decode_shapes,
    onward_shapes,
    prompt_shapes,
    rows_worth_replaying,
    seconds,
    window_shapes,
)
from penstock.serve.run.hidden import HiddenStates
from penstock.serve.run.passes import Passes
from penstock.serve.run.planner import GoingOn, Planner
from penstock.serve.run.step import Part, Step
from penstock.serve.run.weights import Weights

#: Prompt tokens whose log-probabilities are computed at a time: their scores are in memory together.
PROMPT_LOGPROBS = 256


@dataclasses.dataclass(frozen=True)
class Passed:
    """What came of a part: ``logits`` of its scored rows and hidden states of those with ``prompt_logprobs`` and of its
    ``probes``, None without such; and the next tokens, where they are ``drawn`` already."""

    logits: Tensor | None
    prompt_logprobs: Tensor | None = None
    drawn: Drawn | None = None
    probes: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Awake:
    """What a runner that sleeps has when it wakes: so many blocks, and graphs where they were captured."""

    blocks: int
    captured: bool


class Runner:
    """Computes steps with a model and its cache; see :class:`~penstock.serve.engine.executor.Executor`.

    Nothing here waits for the device: the token that a sequence goes on with is kept there, by slot, and what is
    published is copied from there as soon as it is known.

    Args:
        model: the decoder, on the cache's device.
        cache: the memory of keys and values. Its last block is the runner's own.
        slots: most sequences at a time.
        context: most tokens of a sequence.
        window: most tokens that are drafted for a sequence at a time.
        sampler: makes the one who chooses tokens, of the slots, the vocabulary and the device.
        planner: makes the one who makes steps of batches, of the slots and the size of a block.
        compactor: compresses caches, where some are.
        mover: moves contexts, where some are.
        keeps_hidden: whether hidden states of all tokens are kept, for a head that drafts from them.
        adapters: room for adapters of the model; without it, tokens that have one are computed as if they had none.
        probes: how many probes stand behind a token at most. The model knows them as the tokens -1, -2 and so on.
        trees: whether what is drafted for a sequence may be a tree.
        onward: how many passes :meth:`go_on` queues at most.
        passes: makes what computes the passes, of the model, the cache, the slots, the blocks of a sequence, the room
            for adapters, ``keeps_hidden`` and ``onward``.

    Attributes:
        context: most tokens of a sequence.
        onward: as given.
        passes: the model's passes over the cache.
        planner, sampler: make steps of batches, and choose tokens.
        hidden: the hidden states of the tokens in the cache; None where they are not kept.
        probed: of each slot, the hidden states of the probes behind the token that the newest one follows, [slots,
            ``probes``, hidden]: what is drafted behind the newest one comes from them. Those that were not there are of
            no meaning.
        memory: bytes of the device's memory by what they are for, as far as whoever made the runner knows.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PagedCache,
        slots: int,
        context: int,
        window: int = 0,
        sampler: Callable[[int, int, torch.device], Sampler] = Sampler,
        planner: Callable[[int, int], Planner] = Planner,
        compactor: Compactor | None = None,
        mover: Mover | None = None,
        keeps_hidden: bool = False,
        adapters: AdapterSlots | None = None,
        probes: int = 0,
        trees: bool = False,
        onward: int = 0,
        passes: Callable[..., Passes] = Passes,
    ) -> None:
        self.model, self.cache, self.weights = model, cache, Weights(model)
        self.device, self.shape = cache.shape.device, model.config
        self.blocks, self.block_size = cache.shape.blocks - 1, cache.shape.block_size
        self.context = context
        self._slots, self._pages = slots, -(-context // self.block_size)
        self._window, self._trees = window, trees
        self._kinds, self._compactor, self._mover = (planner, sampler), compactor, mover
        self.hidden = HiddenStates(cache.shape, self.shape.hidden) if keeps_hidden else None
        self.probed = torch.zeros(slots, probes, self.shape.hidden, dtype=cache.shape.dtype, device=self.device)
        self._adapters = adapters
        self.passes = passes(model, cache, slots, self._pages, adapters, keeps_hidden, onward)
        self.forget()
        self.onward = onward
        self.memory: dict[str, int] = {}
        self._awake: _Awake | None = None

    def forget(self) -> None:
        """No slot has a sequence any more, and nothing is kept for one."""
        planner, sampler = self._kinds
        self.planner = planner(self._slots, self.block_size)
        self.sampler = sampler(self._slots, self.shape.vocabulary, self.device)
        self.passes.newest.zero_()

    @functools.cached_property
    def _side(self) -> torch.cuda.Stream:
        """Where the part of a batch that leads is computed, beside the others."""
        return torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]

    @property
    def block_bytes(self) -> int:
        """Memory of a block: keys and values, and hidden states where they are kept."""
        shape = self.cache.shape
        kept = 0 if self.hidden is None else shape.block_size * self.shape.hidden * shape.dtype.itemsize
        return shape.block_bytes + kept

    def resize(self, blocks: int) -> None:
        """Sequences may use so many blocks of the cache from now on. Nothing of what there was is known any more."""
        self.cache.resize(blocks + 1)
        if self._compactor is not None:
            self._compactor.resize()
        if self.hidden is not None:
            self.hidden = HiddenStates(self.cache.shape, self.shape.hidden)
        self.blocks = blocks
        self.forget()

    def compile(self, tokens: int, report: Reporter = silent) -> None:
        """Compiles the pass, and chooses which steps will be graphs: those that decode, and those with up to ``tokens``
        tokens of prompts that are computed as fast as they are queued. Without it, everything runs eagerly.

        Raises:
            UsageError: the cache's plans cannot be replayed.
        """
        self.compile_pass()
        alone = decode_shapes(self._slots, fewest=1 if self.shape.moe else 2)
        with report("compiling", 1, "model") as bar:
            # Kernels are chosen for the first size that they meet.
            self.timed(alone[-1])
            bar.advance()
        beside = prompt_shapes(self._slots, tokens)
        most = chosen(
            "graphs",
            {
                **circumstances(self.device),
                "model": self.shape.model_dump(mode="json"),
                "dtype": str(self.cache.shape.dtype),
                "cache": type(self.cache).__name__,
                "steps": beside,
            },
            lambda: rows_worth_replaying(beside, self.timed),
        )
        beside = [shape for shape in beside if shape.rows <= most]
        windows = window_shapes(self._slots, self._window, tokens, self._trees)
        # With rows that are probes, of which states are wanted and no tokens, a step with windows is like one with
        # prompts.
        given = [beside + windows, alone, []] if self.probed.shape[1] else [beside, alone, windows]
        onward = onward_shapes(self._slots, self.onward)
        self.choose(*given, onward if self.cache.fix(onward, self._pages) else [])

    def compile_pass(self) -> None:
        """Compiles the pass, once it runs."""
        self.passes.compile()

    def timed(self, shape: StepShape) -> tuple[float, float]:
        """Seconds until a pass of ``shape`` is queued, and until it is computed; see :func:`graphs.seconds`."""
        return seconds(self.passes.begun, 3, self.cache, self.blocks, shape)

    def choose(self, *shapes: List[StepShape]) -> None:
        """As :meth:`Passes.choose`."""
        self.passes.choose(*shapes)

    def try_graphs(self, free: Callable[[], int]) -> int:
        """As :meth:`Passes.try_graphs`."""
        return self.passes.try_graphs(free)

    def capture(self, report: Reporter = silent) -> None:
        """As :meth:`Passes.capture`."""
        self.passes.capture(report)

    @torch.inference_mode()
    def states(self, texts: List[List[int]]) -> list[Tensor]:
        lengths = [len(text) for text in texts]
        flat = torch.tensor([token for text in texts for token in text], device=self.device)
        found = decoder_states(self.model)(flat, lengths).float().cpu()
        return [each.clone() for each in torch.split(found, lengths)]

    def launch(self, batch: Batch) -> Awaited | None:
        return self.execute(self.plan(batch), batch.proposals)

    def plan(self, batch: Batch) -> Step:
        """The step that computes ``batch``, as data."""
        return self.planner.plan(batch)

    def load(self, weights: Mapping[str, Tensor] | Path) -> None:
        if self.cache.shape.learned is not None:
            raise UsageError(
                "the codec of the cache has learned of the weights that are here",
                hint="Start a new engine, or serve with another engine.codec.",
            )
        self.weights.check()
        self.close()
        if isinstance(weights, Path):
            read = functools.partial(hub.weights_for, self.model, weights)
            self.weights.load(read())
            self.weights.source = read
        else:
            self.weights.load(weights)
            self.weights.source = None

    @property
    def compress_seconds(self) -> float:
        return 0.0 if self._compactor is None else self._compactor.seconds

    @property
    def adapter_bytes(self) -> int:
        """Memory of the room for adapters."""
        return 0 if self._adapters is None else self._adapters.nbytes

    @property
    def adapter_slots(self) -> int:
        return 0 if self._adapters is None else self._adapters.slots

    def load_adapter(self, slot: int, folder: Path) -> bytes:
        assert self._adapters is not None
        return self._adapters.load(slot, hub.resolve_adapter(folder))

    def sleep(self) -> None:
        self._awake = _Awake(self.blocks, bool(self.passes.captured))
        self.close()
        self.resize(0)
        self.weights.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        assert self._awake is not None
        try:
            self.weights.restore()
            self.resize(self._awake.blocks)
        except torch.OutOfMemoryError as error:
            raise PenstockError(
                f"the device has no room for what was there before: {str(error).splitlines()[0]}",
                hint="Free its memory, and wake the engine again.",
            ) from error
        if self._awake.captured:
            self.capture()
        self._awake = None

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # NCCL waits for the end of all graphs that it is a part of, before ranks leave it.
        self.passes.release()

    @property
    def goes_on(self) -> bool:
        """Whether there are graphs for :meth:`go_on`, or it needs none."""
        captured = False in self.passes.captured and bool(self.passes.captured[False].onward.shapes)
        return captured or (self.onward > 0 and self.cache.advances)

    @torch.inference_mode()
    def go_on(self, batch: Batch, left: np.ndarray) -> Tensor | None:
        """Queues ``left`` int64 [E] passes for each of the entries of ``batch``, which are its sequences' last tokens:
        one for each of these, and then one for each that was chosen in the pass before; the host says nothing between
        them.

        Returns:
            What was chosen in each pass, int64 [most of ``left``, E], on the device; what is behind those that are left
            for a sequence is of no meaning. None where passes have to be asked for one by one.
        """
        passes = int(left.max())
        going = self.planner.going_on(batch, left, self.onward) if passes <= self.onward else None
        if going is None:
            return None
        if not self.passes.captured:
            self._go_on_eagerly(going, passes)
        elif not self._replay_onward(going, passes):
            return None
        return self.passes.gone[-passes:, : len(left)]

    def _replay_onward(self, going: GoingOn, passes: int) -> bool:
        """Queues so many passes as graphs; False where there is none for them."""
        graphs = self.passes.captured[False].onward
        shape = graphs.shape_for(going.plan)
        if shape is None:
            return False
        graphs.replay(shape, going.inputs, going.plan)
        for _ in range(passes - 1):
            graphs.again(shape)
        return True

    def _go_on_eagerly(self, going: GoingOn, passes: int) -> None:
        self.cache.plan(going.plan)
        inputs = self._on_device(going.inputs)
        for _ in range(passes):
            self.passes.gone_on(inputs)

    @torch.inference_mode()
    def execute(self, step: Step, proposals: Proposals | None = None) -> Sampled | None:
        """Queues the forward passes and the sampling of ``step``, whose tentative tokens were drawn from ``proposals``
        where it matters; what is known then, once it was waited for."""
        if self._mover is not None:
            for moved in step.moves:
                self._mover.move(moved)
        if self._compactor is not None:
            self._compactor.compact(step.compactions)
        if step.copies.size:
            self.cache.copy(*step.copies.tolist())
            if self._compactor is not None:
                self._compactor.copy(*step.copies.tolist())
            if self.hidden is not None:
                self.hidden.copy(*step.copies.tolist())
        for placed in step.placed:
            self.sampler.place(placed.slot, placed.tokens, placed.prompt)
        passed = self._pass_all(step.parts, step.lead)
        if self._mover is not None:
            for kept in step.keeps:
                self._mover.move(kept)
        logits = _joined([each.logits for each in passed])
        prompt = self._prompt_logprobs(step, _joined([each.prompt_logprobs for each in passed]))
        weighed = tuple(each.sums for part in step.parts for each in part.plan.weighed if each.sums is not None)
        if logits is None:
            nothing = prompt is None and not weighed
            return None if nothing else Sampled(self.passes.newest[:0], prompt=prompt, weighed=weighed).to_host()
        # Only one part replays a graph: beside others, nothing has been drawn for all rows.
        drawn = passed[0].drawn if len(passed) == 1 else None
        asked = step.asked
        sampled, newest = self.sampler.sample(logits, asked, drawn, proposals)
        if drawn is None or asked.window is not None or sampled.tokens is not drawn.tokens:
            self.passes.newest.index_copy_(0, self._on_device(asked.slots[asked.first] + 1), newest)
        if step.probes is not None:
            self._keep_probed(asked, sampled, step.probes, _joined([each.probes for each in passed]))
        if sampled.order is not None:
            self._move_together(step, sampled.order)
        return dataclasses.replace(sampled, prompt=prompt, weighed=weighed).to_host()

    def _keep_probed(self, asked: Asked, sampled: Sampled, first: np.ndarray, states: Tensor | None) -> None:
        """Keeps, of the ``states`` [P, hidden] of a step's probes, those behind the last token of each sequence that
        was accepted, or behind its newest one; the ``first`` int64 [R] behind each row is given."""
        assert states is not None
        row = self._on_device(asked.first)
        if sampled.counts is not None:
            row = row + sampled.counts - 1
            row = row if sampled.order is None else sampled.order[row]
        reach = torch.arange(self.probed.shape[1], device=self.device)
        # Where there are fewer, those of another row are taken, of which nothing is read.
        places = (self._on_device(first)[row].unsqueeze(1) + reach).clamp(0, len(states) - 1)
        self.probed.index_copy_(0, self._on_device(asked.slots[asked.first]), states[places].to(self.probed.dtype))

    def _move_together(self, step: Step, order: Tensor) -> None:
        """Moves what was computed of the tokens that are settled to where it were had they been in a row: that of row
        ``order[i]`` [R] to where that of row i lies."""
        slots = self._on_device(np.concatenate([part.plan.slots.numpy()[part.scored] for part in step.parts]))
        sources, targets = slots[order], slots
        if self.device.type == "cpu":  # elsewhere, to find out which do move takes longer
            moved = sources != targets
            sources, targets = sources[moved], targets[moved]
        if len(targets):
            self.cache.move(sources, targets)
            if self.hidden is not None:
                self.hidden.move(sources, targets)

    def _prompt_logprobs(self, step: Step, hidden: Tensor | None) -> Logprobs | None:
        """The log-probabilities of those tokens of prompts for which they are wanted, given the ``hidden`` states
        [K, hidden] before them."""
        if hidden is None:
            return None
        following = self._on_device(step.prompt_logprobs)
        pairs = zip(torch.split(hidden, PROMPT_LOGPROBS), torch.split(following, PROMPT_LOGPROBS), strict=True)
        return Logprobs.joined(
            [Logprobs.of(self.model.logits(states), own, step.alternatives) for states, own in pairs]
        )

    def _pass_all(self, parts: List[Part], lead: int) -> list[Passed]:
        """Computes the ``parts``, at the same time where the device can."""
        if len(parts) == 1 or self.device.type != "cuda":
            return [self._pass(part) for part in parts]
        # Graphs share their memory, so only one part can replay one, and it has lane 0, where graphs are planned.
        replayed = next((index for index, part in enumerate(parts) if part.decoding), 0)
        others = (index for index in range(len(parts)) if index != replayed)
        lanes = {replayed: 0} | {index: lane for lane, index in enumerate(others, 1)}
        # What one stream allocates and the other uses cannot be dealt out again too early: the main stream's tensors
        # are held here until it has been told to wait for the side, and the side's are used by the main stream, which
        # the side waits for before it computes anything of the next batch.
        main, passed = torch.cuda.current_stream(self.device), {}
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            passed[lead] = self._pass(parts[lead], lanes[lead])
        for index, part in enumerate(parts):
            if index != lead:
                passed[index] = self._pass(part, lanes[index])
        main.wait_stream(self._side)
        return [passed[index] for index in range(len(parts))]

    def _pass(self, part: Part, lane: int = 0) -> Passed:
        if part.copied is not None:
            return self._pass_copies(part, part.copied, lane)
        count, owners = part.inputs.shape[1], self._owners(part)
        own = [] if owners is None else [owners[None]]
        # Beside rows that stand for several tokens, everything runs eagerly, as beside copies.
        graphs = self.passes.captured.get(owners is not None) if part.superposed is None else None
        windows = count <= (1 + self._window) * len(part.plan.lengths)
        if graphs is not None and part.chooses and windows:
            choosing = graphs.decodes if part.decoding else graphs.windows
            replayed = self._replayed(choosing, part, lane, part.draws_of_rows, *own)
            if replayed is not None:
                logits, tokens, told, *states = (each[:count] for each in replayed[0])
                if self.hidden is not None:
                    self._keep(self.hidden, part, states[0])
                if not part.all_scored:
                    index = self._on_device(part.scored)
                    logits, tokens, told = logits[index], tokens[index], told[index]
                return Passed(logits, drawn=Drawn(tokens, told))
        replayed = None if graphs is None else self._replayed(graphs.prompts, part, lane, *own)
        if replayed is None:
            self.cache.plan(part.plan, lane)
            eagerly = part.superposed is not None
            with superposing(self.model, self._superposed(part)):
                begun = self.passes.begun(self._on_device(part.inputs), eagerly, **self._worn(owners))
            replayed = begun, np.arange(count)
        begun, places = replayed

        def own_of(rows: np.ndarray) -> tuple[Tensor, ...]:
            index = self._on_device(places[rows])
            return tuple(each[index] for each in begun)

        def hidden(rows: np.ndarray) -> Tensor:
            return self.passes.tip(*own_of(rows), **self._worn(owners, rows))

        if self.hidden is not None:
            self._keep(self.hidden, part, self.passes.kept(own_of(np.arange(count)), **self._worn(owners)))
        logits = None
        if len(part.scored):
            logits = self.passes.scores(*own_of(part.scored), **self._worn(owners, part.scored))
        probes = None if part.probes is None else hidden(part.probes)
        return Passed(logits, hidden(part.prompt_logprobs) if len(part.prompt_logprobs) else None, probes=probes)

    def _pass_copies(self, part: Part, copied: Copied, lane: int) -> Passed:
        """Computes ``part`` and beside it what is ``copied`` of it, with noise in the routers. As this is of no shape
        that was captured, and compiled code would be compiled anew for the noise, it runs eagerly."""
        inputs, plan = copied.beside(part.inputs, part.plan, self.blocks, self.block_size)
        own, count, owners, tip = part.inputs.shape[1], inputs.shape[1], self._owners(part), self.passes.through.tip
        if owners is not None:
            owners = np.concatenate([owners, owners[copied.rows]])
        noise = self._on_device(copied.noise(self.shape, inputs[2, own:]))
        self.cache.plan(plan, lane)
        with shaken(self.model, noise), superposing(self.model, self._superposed(part)):
            begun = self.passes.begun(self._on_device(inputs), plainly=True, **self._worn(owners))

            def states(rows: np.ndarray) -> Tensor:
                index = self._on_device(rows)
                return tip(*(each[index] for each in begun), **self._worn(owners, rows))

            scores = self.model.logits(states(np.concatenate([part.scored, np.arange(own, count)])))
        if self.hidden is not None:
            mine = tuple(each[:own] for each in begun)
            self._keep(self.hidden, part, self.passes.kept(mine, states(np.arange(own))))
        more = (part.prompt_logprobs, part.probes)
        prompt, probes = (None if rows is None or not len(rows) else states(rows) for rows in more)
        return Passed(copied.averaged(scores, part.scored), prompt, probes=probes)

    def _superposed(self, part: Part) -> SuperposedRows | None:
        """The rows of ``part`` that stand for several tokens, on the device; None where none does."""
        rows = part.superposed
        if rows is None:
            return None
        return SuperposedRows(*(self._on_device(each) for each in (rows.rows, rows.tokens, rows.weights)))

    def _owners(self, part: Part) -> np.ndarray | None:
        """The slots of the adapters of the tokens of ``part``; None where none has one, or there is no room for any."""
        return None if self._adapters is None else part.adapters

    def _worn(self, owners: np.ndarray | None, rows: np.ndarray | slice = slice(None)) -> dict[str, Any]:
        """Of some ``rows``, what their pass is told of adapters."""
        return {} if owners is None else {"owners": self._on_device(owners[rows])}

    def _keep(self, kept: HiddenStates, part: Part, states: Tensor) -> None:
        """Keeps the hidden ``states`` [N, hidden] of the tokens of ``part``."""
        kept.write(self._on_device(part.plan.slots.numpy()), states)

    def _replayed(self, graphs: StepGraphs, part: Part, lane: int, *more: np.ndarray) -> tuple[Any, np.ndarray] | None:
        """What one of the ``graphs`` gives for ``part``, with the inputs and ``more`` rows of them, and the rows of its
        tokens; None where none is for it."""
        if lane or part.plan.open is not None or part.plan.contexts or part.plan.weighed:
            return None
        shape = graphs.shape_for(part.plan)
        if shape is None:
            return None
        return graphs.replay(shape, np.concatenate([part.inputs, *more]), part.plan)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return upload(values, self.device)


def _joined(pieces: Iterable[Tensor | None]) -> Tensor | None:
    """The rows of all ``pieces`` that are there; None where there is none."""
    found = [piece for piece in pieces if piece is not None]
    return torch.cat(found) if len(found) > 1 else next(iter(found), None)
