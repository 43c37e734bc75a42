"""From a batch to a step: what sequences are becomes arrays."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Any, NamedTuple

import numpy as np
import torch

from penstock.core.randomness import derive, uniforms
from penstock.models.sampling import Sampling
from penstock.ops.paged.contexts import Contexts
from penstock.ops.paged.contract import PagedBatch
from penstock.ops.paged.watch import watched_places
from penstock.ops.paged.weighed import Weighed
from penstock.serve.choose.asked import OPTIONS, SLOT, Asked, Masked, Ruled, Scattered, depths_of, nodes_of
from penstock.serve.decode.contract import DecodeRule
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.memory.held import Held
from penstock.serve.engine.sequence import Sequence
from penstock.serve.run.copies import Copied
from penstock.serve.run.step import Part, Placed, Step, Superposed
from penstock.speculate.tree import depths as tree_depths


class Fields(NamedTuple):
    """The numbers of a batch's entries, one array int64 [E] each; ``counts`` are all rows, of which the last ones are
    ``probes``, ``drafted`` are tentative tokens, ``given`` those of the prompt, ``dropped`` those that are not in the
    cache any more, ``packed`` those that share the first places, and ``adapters`` are slots."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    probes: np.ndarray
    scored: np.ndarray
    prompt_logprobs_from: np.ndarray
    prompt_logprobs: np.ndarray
    drafted: np.ndarray
    given: np.ndarray
    dropped: np.ndarray
    packed: np.ndarray
    adapters: np.ndarray

    @classmethod
    def of(cls, entries: list[Entry]) -> Fields:
        rows = [
            (
                each.slot,
                each.start,
                each.count,
                sum(each.probes),
                each.scored,
                each.prompt_logprobs_from,
                each.prompt_logprobs,
                len(each.window),
                each.sequence.prompt,
                each.dropped,
                each.packed,
                each.sequence.adapter.slot,
            )
            for each in entries
        ]
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(cls._fields) * len(rows))
        found = cls(*np.ascontiguousarray(flat.reshape(-1, len(cls._fields)).T))
        np.add(found.counts, found.probes, out=found.counts)
        return found


class GoingOn(NamedTuple):
    """The first of some passes in which sequences go on: where their newest tokens belong, and the ``inputs`` int64
    [fields, E] of :meth:`~penstock.serve.run.runner.Runner.go_on`."""

    plan: PagedBatch
    inputs: np.ndarray


class Planner:
    """Makes steps of batches. What is the same for all tokens of a sequence is looked at once, when it takes a slot.

    Args:
        slots: most sequences at a time.
        block_size: tokens of a block of the cache.
        stream: of the numbers by which tokens are drawn.
        watched: how many of the last queries of a sequence are kept.
        selects: whether tokens behind the prompt read a part of the cache.
        windows: whether sequences have windows in full precision.
    """

    def __init__(
        self,
        slots: int,
        block_size: int,
        stream: str = "sample",
        watched: int = 0,
        selects: bool = False,
        windows: bool = False,
    ) -> None:
        self._size, self._stream, self._watched = block_size, stream, watched
        self._selects, self._windows = selects, windows
        self._table = np.zeros(slots, SLOT)
        self._held: list[Held | None] = [None] * slots
        self._biases: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._arithmetic: dict[int, DecodeRule] = {}
        self._noise: dict[int, tuple[np.ndarray, float]] = {}

    def plan(self, batch: Batch) -> Step:
        """The step that computes ``batch``."""
        batch = _singles_first(batch)
        fields = Fields.of(batch.entries)
        placed, asked = self.ask(batch.entries, fields)
        asking = [entry for entry in batch.entries if entry.prompt_logprobs]
        following = [_following(entry) for entry in asking]
        return Step(
            compactions=tuple(batch.compactions),
            copies=np.array(batch.copies, np.int64).reshape(-1, 2).T,
            placed=placed,
            parts=tuple(self._parts(batch, fields, asked)),
            lead=batch.lead,
            asked=asked,
            prompt_logprobs=np.array(list(itertools.chain(*following)), np.int64),
            probes=_first_probes(batch.entries) if np.count_nonzero(fields.probes) else None,
            alternatives=max((entry.sequence.sampling.prompt_logprobs or 0 for entry in asking), default=0),
            moves=tuple(batch.moves),
            keeps=tuple(batch.keeps),
        )

    def ask(self, entries: list[Entry], fields: Fields) -> tuple[tuple[Placed, ...], Asked]:
        """The sequences of ``entries``, whose numbers are ``fields``, that have taken their slots since the last call,
        as far as penalties have to be kept for them, and what the scored entries ask for."""
        return tuple(self._placed(entries)), self._asked(entries, fields)

    # Slots

    def forget(self, slot: int) -> None:
        """Whoever has ``slot`` in the next batch takes it anew."""
        self._held[slot] = None

    def _placed(self, entries: list[Entry]) -> Iterator[Placed]:
        for entry in entries:
            if self._held[entry.slot] is not entry.sequence.held:
                penalized = bool(self._table[entry.slot]["penalized"])
                self._place(entry.slot, entry.sequence)
                if penalized or entry.sequence.sampling.penalized:
                    own = entry.sequence.tokens if entry.sequence.sampling.penalized else []
                    yield Placed(entry.slot, np.array(own, np.int64), entry.sequence.prompt)

    def _place(self, slot: int, sequence: Sequence) -> None:
        """``sequence``, whose tokens are all known, has taken ``slot``."""
        sampling, row = sequence.sampling, self._table[slot]
        self._held[slot] = sequence.held
        _set_options(row, sampling)
        row["key"], row["prompt"] = derive(sampling.seed, self._stream), sequence.prompt
        row["charges"] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        row["least"] = sampling.min_tokens
        row["alternatives"] = -1 if sampling.alternatives is None else sampling.alternatives
        row["penalized"], row["biased"] = sampling.penalized, bool(sampling.logit_bias)
        row["grammar"], row["rule"] = sequence.matcher is not None, sampling.rule is not None
        row["restricted"] = sequence.restriction is not None
        row["led"], row["spread"] = sequence.leader is not None, sampling.spread
        row["special"] = row["grammar"] or row["rule"] or row["restricted"] or row["led"]
        changed = sampling.penalized or sampling.logit_bias or sampling.min_tokens or sampling.waits
        row["rescored"] = bool(changed) or bool(sequence.companions) or bool(row["restricted"])
        if sampling.logit_bias:
            tokens, added = zip(*sampling.logit_bias.items(), strict=True)
            self._biases[slot] = np.array(tokens, np.int64), np.array(added, np.float32)
        if sampling.rule is not None:
            self._arithmetic[slot] = sampling.rule.arithmetic
        if sampling.again is not None:
            keys = [derive(sampling.seed, "experts", number) for number in range(sampling.again.more)]
            self._noise[slot] = np.array(keys, np.uint64), sampling.again.noise

    def going_on(self, batch: Batch, left: np.ndarray, passes: int) -> GoingOn | None:
        """What the first of up to ``passes`` passes takes in which the entries of ``batch`` go on, ``left`` int64 [E]
        of them each; None where more than temperature and cuts changes from one to the next, or penalties have to be
        kept from now on or no longer, or there are others than such whose next token is wanted."""
        fresh = [entry for entry in batch.entries if self._held[entry.slot] is not entry.sequence.held]
        penalized = any(self._table[each.slot]["penalized"] or each.sequence.sampling.penalized for each in fresh)
        if penalized or not all(entry.scored for entry in batch.entries):
            return None
        fields = Fields.of(batch.entries)
        _, asked = self.ask(batch.entries, fields)
        if not asked.plain or np.count_nonzero(asked.rows["special"]) or asked.bans is not None:
            return None
        slots, lengths, every = fields.slots, fields.starts + 1, np.arange(len(left))
        plan = self.layout(batch.tables[slots], lengths, every + 1, every, fields.starts, ahead=int(left.max()) - 1)
        draws = uniforms(asked.rows["key"], lengths - fields.given + np.arange(passes)[:, None])
        draws[:, asked.draws[0] == 0] = 0
        known = np.full((passes, len(left)), -1)
        for place, entry in enumerate(batch.entries):
            own = entry.sequence.tokens[entry.start : entry.start + entry.count]
            known[: len(own), place] = own
        options = asked.draws[: len(OPTIONS)].view(np.int64)
        return GoingOn(plan, _stacked(slots + 1, fields.starts, left, *options, *draws.view(np.int64), *known))

    # What rows ask for

    def _asked(self, entries: list[Entry], fields: Fields) -> Asked:
        """What the scored ones of ``entries`` ask for."""
        # np.count_nonzero takes a fraction of the time of any() and all(), which is felt where few sequences decode.
        if np.count_nonzero(fields.scored) < len(entries):
            scored = fields.scored > 0
            entries, fields = [entry for entry in entries if entry.scored], Fields(*(each[scored] for each in fields))
        slots, widths = fields.slots, fields.scored
        counts = fields.starts + fields.counts - fields.probes - fields.drafted - fields.given
        first = widths.cumsum() - widths
        window, parents = _window(entries, int(fields.drafted.max()) if np.count_nonzero(fields.drafted) else 0)
        if window is not None:
            owners = np.repeat(np.arange(len(entries)), widths)
            depths = depths_of(owners, nodes_of(first, owners, window), parents)
            slots, counts = slots[owners], counts[owners] + depths
        rows = self._table[slots]
        asked = Asked(first, slots, counts, rows, uniforms(rows["key"], counts), window=window, parents=parents)
        if np.count_nonzero(rows["biased"]):
            asked = dataclasses.replace(asked, biases=self._scattered(slots, np.flatnonzero(rows["biased"])))
        if np.count_nonzero(rows["special"] | (counts < rows["least"])):
            asked = dataclasses.replace(asked, **self._special(asked, list(_rows(entries))))
        return asked

    def _special(self, asked: Asked, sources: list[tuple[Sequence, int]]) -> dict[str, Any]:
        """What is not in the slots' numbers, but in the sequences: for each row, its sequence and its number among the
        rows of that are in ``sources``. A rule's own options are written to the rows."""
        rows = asked.rows
        looked = np.flatnonzero(rows["rule"])
        banned = np.flatnonzero((asked.counts < rows["least"]) & ~rows["restricted"])
        for place in looked:
            sampling = sources[place][0].sampling
            if sampling.rule is not None:
                _set_options(rows[place], sampling.rule.options(sampling, int(asked.counts[place])))
        ruled = [int(place) for place in looked if sources[place][0].leader is None]
        places = {(id(sequence), number): place for place, (sequence, number) in enumerate(sources)}
        return {
            "bans": _bans(sources, banned),
            "masks": _masks(sources, np.flatnonzero(rows["grammar"] | rows["restricted"]), asked),
            "rules": tuple(self._ruled(asked, sources, ruled, places)),
            "followers": _followers(sources, np.flatnonzero(rows["led"]), places),
        }

    def _scattered(self, slots: np.ndarray, own: np.ndarray) -> Scattered:
        tokens, added = zip(*(self._biases[slot] for slot in slots[own]), strict=True)
        places = np.repeat(own, [len(each) for each in tokens])
        return Scattered(places, np.concatenate(tokens), np.concatenate(added))

    def _ruled(
        self,
        asked: Asked,
        sources: list[tuple[Sequence, int]],
        ruled: list[int],
        places: dict[tuple[int, int], int],
    ) -> Iterator[Ruled]:
        """The rows with a rule, those together whose rules are computed alike."""
        alike: dict[tuple[DecodeRule, int], list[int]] = {}
        for place in ruled:
            sequence, _ = sources[place]
            rule = self._arithmetic[int(asked.slots[place])]
            if rule.follows or sequence.companions:
                alike.setdefault((rule, len(sequence.members)), []).append(place)
        for (rule, _), own in alike.items():
            rows = [[places[id(each), sources[place][1]] for each in sources[place][0].members] for place in own]
            texts = [sources[place][0].tokens + asked.ahead(place) for place in own] if rule.follows else []
            yield Ruled(rule, np.array(rows, np.int64), rule.read(texts) if rule.follows else {})

    # Passes

    def _parts(self, batch: Batch, fields: Fields, asked: Asked) -> Iterator[Part]:
        """The passes that compute ``batch``, whose scored entries ``asked`` for their next tokens."""
        entries = batch.entries
        slots, starts, counts, scored = fields.slots, fields.starts, fields.counts, fields.scored
        ends, tokens = counts.cumsum(), counts - fields.probes
        # In most steps each entry is one token, for which np.repeat takes longer.
        rows = np.arange(len(entries)) if ends[-1] == len(entries) else np.repeat(np.arange(len(entries)), counts)
        offsets = np.arange(ends[-1]) - (ends - counts)[rows]
        positions = offsets + starts[rows]
        # Places before positions: in the cache, the tokens of a tree lie in a row; in the text, siblings are at the
        # same position, which `_branched` writes over these.
        places = positions - fields.dropped[rows]
        parents = _branched(entries, positions, offsets, ends)
        prompt_logprobs = np.zeros(ends[-1], bool)
        if np.count_nonzero(fields.prompt_logprobs):
            behind = offsets - fields.prompt_logprobs_from[rows]
            prompt_logprobs = (behind >= 0) & (behind < fields.prompt_logprobs[rows])
        wanted, probing = offsets >= (tokens - scored)[rows], None
        if np.count_nonzero(fields.probes):
            probing = offsets >= tokens[rows]
            wanted &= ~probing
        # What the device gets for each row is one array, and so one copy. Its floats go as their bits, and place 0 in
        # the list of newest tokens belongs to nobody.
        inputs = _stacked(*_tokens(batch, ends), _shifted(entries, positions, ends))
        # Numbers below 0 are probes, or stand for such rows.
        superposed = _superposed(entries, ends) if np.count_nonzero(inputs[0] < 0) else None
        if superposed is not None:
            inputs[0, superposed.rows] = 0  # which every model knows
        newest = asked.slots + 1 if asked.window is None else np.zeros_like(asked.slots)
        draws, drawn = _stacked(*asked.draws.view(np.int64), newest, asked.wanted), scored.cumsum()
        worn = np.repeat(fields.adapters, counts) if np.count_nonzero(fields.adapters) else None
        for first, last in itertools.pairwise(itertools.accumulate(batch.parts, initial=0)):
            begin, end = ends[first] - counts[first], ends[last - 1]
            own, all_own = slice(first, last), slice(begin, end)
            plan = self.layout(
                batch.tables[slots[own]],
                (starts + counts - fields.dropped)[own],
                ends[own] - begin,
                rows[all_own] - first,
                places[all_own],
            )
            if _some(entries[own], "beside"):
                plan = dataclasses.replace(plan, contexts=tuple(_contexts(entries[own])))
            if _some(entries[own], "weighed"):
                plan = dataclasses.replace(plan, weighed=tuple(_weighed(entries[own])))
            if np.count_nonzero(fields.packed[own]):
                plan = dataclasses.replace(plan, packed=torch.from_numpy(fields.packed[own].astype(np.int32)))
            if self._selects:
                plan = dataclasses.replace(plan, given=torch.from_numpy(fields.given[own].astype(np.int32)))
            if self._windows:
                since = torch.tensor([entry.since for entry in entries[own]], dtype=torch.int32)
                plan = dataclasses.replace(plan, rings=torch.from_numpy(slots[own].astype(np.int32)), since=since)
            if parents is not None:
                plan = dataclasses.replace(plan, parents=torch.from_numpy(parents[all_own].astype(np.int32)))
            if self._watched:
                ends_of = (starts + counts)[rows[all_own]]
                watched = watched_places(slots[rows[all_own]], positions[all_own], ends_of, self._watched)
                plan = dataclasses.replace(plan, watched=torch.from_numpy(watched))
            yield Part(
                *(inputs[:, all_own], plan, wanted[all_own].nonzero()[0], prompt_logprobs[all_own].nonzero()[0]),
                draws[:, drawn[first] - scored[first] : drawn[last - 1]],
                self._copied(entries[own], ends[own] - begin),
                worn[all_own] if worn is not None and worn[all_own].any() else None,
                np.flatnonzero(probing[all_own]) if probing is not None and probing[all_own].any() else None,
                None if superposed is None else superposed.within(begin, end),
            )

    def _copied(self, entries: list[Entry], ends: np.ndarray) -> Copied | None:
        """The copies of the last tokens of ``entries``, which end before the rows ``ends``."""
        if not _some(entries, "again"):
            return None
        counts = np.array([entry.again for entry in entries])
        noises = [self._noise[entry.slot] for entry in entries if entry.again]
        return Copied(
            rows=np.repeat(ends - 1, counts),
            numbers=np.concatenate([np.arange(count) for count in counts]),
            keys=np.concatenate([keys for keys, _ in noises]),
            scales=np.repeat([scale for _, scale in noises], counts[counts > 0]),
        )

    def layout(
        self,
        tables: np.ndarray,
        lengths: np.ndarray,
        ends: np.ndarray,
        rows: np.ndarray,
        places: np.ndarray,
        ahead: int = 0,
    ) -> PagedBatch:
        """Where new tokens of some sequences belong.

        Args:
            tables: the blocks of each.
            lengths: of each, with the new tokens.
            ends: of each, how many new tokens there are of all up to it.
            rows, places: of each new token its sequence, and its place in that.
            ahead: how many more tokens the tables are to be long enough for.
        """
        size = self._size
        tables = np.ascontiguousarray(tables[:, : -(-(int(lengths.max()) + ahead) // size)])
        starts = np.zeros(len(ends) + 1, np.int32)
        starts[1:] = ends
        return PagedBatch(
            starts=torch.from_numpy(starts),
            lengths=torch.from_numpy(lengths.astype(np.int32)),
            tables=torch.from_numpy(tables),
            slots=torch.from_numpy(tables[rows, places // size].astype(np.int64) * size + places % size),
        )


def _some(entries: list[Entry], *names: str) -> bool:
    """Whether any of ``entries`` has any of what is called so."""
    return any(any(map(operator.attrgetter(name), entries)) for name in names)


def _singles_first(batch: Batch) -> Batch:
    """``batch`` with the entries of one token first in each part, where windows came between them: kernels for one
    token a sequence are the fastest."""
    if not _some(batch.entries, "window", "probes"):
        return batch
    ordered: list[Entry] = []
    for first, last in itertools.pairwise(itertools.accumulate(batch.parts, initial=0)):
        ordered += sorted(batch.entries[first:last], key=lambda entry: entry.rows > 1)
    batch.entries[:] = ordered
    return batch


def _following(entry: Entry) -> list[int]:
    """The tokens of a prompt whose log-probabilities are wanted in ``entry``."""
    first = entry.start + entry.prompt_logprobs_from + 1
    return entry.sequence.tokens[first : first + entry.prompt_logprobs]


def _rows(entries: list[Entry]) -> Iterator[tuple[Sequence, int]]:
    """For each scored row, its sequence and its number among the rows of that."""
    for entry in entries:
        for number in range(entry.scored):
            yield entry.sequence, number


def _window(entries: list[Entry], width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Up to ``width`` tentative tokens of each of ``entries``, and their parents, where there are any, and trees."""
    if not width:
        return None, None
    window = np.full((len(entries), width), -1, np.int64)
    for row, entry in zip(window, entries, strict=True):
        row[: len(entry.window)] = entry.window
    if not any(entry.parents for entry in entries):
        return window, None
    parents = np.tile(np.arange(-1, width - 1), (len(entries), 1))
    for row, entry in zip(parents, entries, strict=True):
        row[: len(entry.parents)] = entry.parents
    return window, parents


def _branched(entries: list[Entry], positions: np.ndarray, offsets: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Where, among the new tokens of its own sequence, the one before each stands; their ``positions`` follow from
    that. None where all are in a row."""
    if not _some(entries, "parents", "probes"):
        return None
    parents: np.ndarray = offsets - 1
    for entry, end in zip(entries, ends.tolist(), strict=True):
        if entry.parents or entry.probes:
            way = with_probes(entry.parents or range(-1, len(entry.window) - 1), entry.probes)
            own, newest = slice(end - len(way), end), entry.count - len(entry.window) - 1
            parents[own] = np.array(way, np.int64) + newest + 1
            positions[own] = entry.start + newest + np.array(tree_depths(way), np.int64)
    return parents


def with_probes(parents: List[int], probes: List[int]) -> list[int]:
    """The ``parents`` of a tree's tokens, and behind them those of the ``probes``: behind the newest token of the text,
    and then behind each of the tree's, they are in a row."""
    way = list(parents)
    for node, count in enumerate(probes, -1):
        for number in range(count):
            way.append(len(way) - 1 if number else node)
    return way


def _first_probes(entries: list[Entry]) -> np.ndarray:
    """For each scored row, int64 [R], which of all probes is the first that stands behind it; -1 where none does."""
    found: list[int] = []
    first = 0
    for entry in entries:
        counts = entry.probes if entry.scored and entry.probes else (0,) * entry.scored
        for count in counts:
            found.append(first if count else -1)
            first += count
    return np.array(found, np.int64)


def _shifted(entries: list[Entry], places: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The positions of tokens at these ``places`` in their texts: those that see contexts stand behind the longest."""
    positions = places
    if not _some(entries, "beside"):
        return positions
    for entry, end in zip(entries, ends.tolist(), strict=True):
        if entry.beside is not None:
            if positions is places:
                positions = places.copy()
            first = max(0, entry.beside.after - entry.start)
            positions[end - entry.count + first : end] += entry.beside.shift
    return positions


def _contexts(entries: list[Entry]) -> Iterator[Contexts]:
    """What those of a part's ``entries`` see beside their own text."""
    for number, entry in enumerate(entries):
        if entry.beside is not None:
            yield Contexts(number, entry.beside.after, torch.from_numpy(entry.beside.slots), *entry.beside.weighing)


def _stacked(*rows: np.ndarray) -> np.ndarray:
    """int64 [n, N]: ``rows``, one below the other. For few tokens, np.stack takes longer."""
    stacked = np.empty((len(rows), len(rows[0])), np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[:] = row
    return stacked


def _weighed(entries: list[Entry]) -> Iterator[Weighed]:
    """Of which tokens of a part's ``entries`` it is asked what they look at."""
    for number, entry in enumerate(entries):
        for chunk in entry.weighed:
            first, last = chunk.within(entry.start, entry.start + entry.count)
            yield Weighed(number, first, last, chunk.bounds)


def _tokens(batch: Batch, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The batch's tokens, and where those stand in the list of newest ones that are not known here yet; 0 in place of
    the others. Probes are -1, -2 and so on, by how far they stand behind their token."""
    known: list[int] = []
    places = np.zeros(int(ends[-1]), np.int64)
    for entry, end in zip(batch.entries, ends.tolist(), strict=True):
        own = entry.sequence.tokens[entry.start : entry.start + entry.count]
        own += entry.window
        if len(own) < entry.count:
            places[end - 1 - sum(entry.probes)] = entry.slot + 1
            own.append(0)
        known += own
        for count in entry.probes:
            known += range(-1, -1 - count, -1)
    return np.array(known), places


def _superposed(entries: list[Entry], ends: np.ndarray) -> Superposed | None:
    """The rows of ``entries`` in which the continuations of a request are computed together."""
    rows: list[int] = []
    known: list[tuple[np.ndarray, np.ndarray]] = []
    for entry, end in zip(entries, ends.tolist(), strict=True):
        if entry.sequence.superposed is not None:
            behind = entry.start - len(entry.sequence.request.prompt)  # of the prompt
            own = entry.sequence.superposed.rows[max(0, behind) : max(0, behind + entry.count)]
            rows += range(end - len(own), end)
            known += own
    return Superposed.of(np.array(rows), known) if rows else None


def _bans(sources: list[tuple[Sequence, int]], own: np.ndarray) -> np.ndarray | None:
    """Tokens that would end a text too early."""
    ends = [np.fromiter(sources[place][0].stop, np.int64) for place in own]
    return np.stack([np.repeat(own, [len(each) for each in ends]), np.concatenate(ends)]) if ends else None


def _masks(sources: list[tuple[Sequence, int]], own: np.ndarray, asked: Asked) -> Masked | None:
    """What grammars and restrictions allow, also behind tentative tokens, which grammars allow themselves. Behind one
    that ends the text, nothing is forbidden: nobody will read it, and a grammar cannot go on from there."""
    if not own.size:
        return None
    sequences = [sources[place][0] for place in own]
    limits = [limit for each in sequences for limit in (each.matcher, each.restriction) if limit is not None]
    words = np.full((len(own), max(limit.words for limit in limits)), -1, np.int32)
    for row, place, sequence in zip(words, own, sequences, strict=True):
        ahead = asked.ahead(int(place))
        if sequence.stop.isdisjoint(ahead):
            _write_mask(row, sequence, int(asked.counts[place]), ahead)
    return Masked(own, words)


def _write_mask(row: np.ndarray, sequence: Sequence, generated: int, ahead: list[int]) -> None:
    if sequence.matcher is not None:
        for token in ahead:
            sequence.matcher.consume(token)
        sequence.matcher.write_mask(row)
        sequence.matcher.rollback(len(ahead))
    if sequence.restriction is not None:
        sequence.restriction.clear(row, generated, sequence.recent + ahead)
        if not row.any():
            row[:] = -1  # Scores have to be left for some token; it is refused when it comes, and ends the text.


def _followers(
    sources: list[tuple[Sequence, int]], own: np.ndarray, places: dict[tuple[int, int], int]
) -> np.ndarray | None:
    """Rows of companions, and those of their leaders, which are in the same step."""
    if not own.size:
        return None
    leaders = [places[id(sources[place][0].leader), sources[place][1]] for place in own]
    return np.stack([own, np.array(leaders, np.int64)])


def _set_options(row: np.void, sampling: Sampling) -> None:
    row["temperature"], row["top_k"] = sampling.temperature, sampling.top_k or 0
    row["top_p"], row["min_p"] = sampling.top_p, sampling.min_p
