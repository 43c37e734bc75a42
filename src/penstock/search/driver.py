"""Runs the plays of many problems over one engine: all their branches share one continuous batch."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.models.text import TextStream
from penstock.search.branch import Anchor, Branch
from penstock.search.play import Piece, Play
from penstock.search.scorers.contract import Candidate, Scoring, Verdict, verdicts
from penstock.search.search import Judge, States, Work
from penstock.serve.choose.logprobs import LogprobRows
from penstock.serve.choose.sampling import MOST_LOGPROBS, SamplingParams
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.executor import Readable
from penstock.serve.messages import Delta, Finish, Request

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

#: Tokens of a branch that are taken in together where none of them decides how it goes on.
BUNDLE = 32

#: Scorings, and other errands of programs, at a time.
ERRANDS = 4


class TokenizedTexts:
    """Between tokens and text, by a model's tokenizer. See :class:`~penstock.search.search.Texts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that stands behind another: without what begins a text."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones too."""
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def stream(self, before: Sequence[int]) -> TextStream:
        """Reads what comes behind the tokens ``before``."""
        return TextStream(self._tokenizer.backend_tokenizer, before)


@dataclasses.dataclass
class _Run:
    """A piece that the engine computes: for whom, its request, and what was told of it; ``news`` is what its play does
    not know yet."""

    play: Play
    piece: Piece
    request: Request
    leads: list[Branch]
    told: int = 0
    cached: int = 0
    begun: bool = False
    news: list[Delta] = dataclasses.field(default_factory=list)

    @property
    def watched(self) -> bool:
        """Whether a token of it may end it, or others."""
        return self.piece.stream is not None or self.piece.race is not None


class Driver:
    """Runs plays to their end.

    Args:
        engine: computes.
        sampling: how tokens are chosen; length and seed are the branches' own.
        scoring: the scorers by name; the one without a name is that of programs that name none.
        seconds: for each text, after which its scoring has failed.
        others: computes the texts of further models, by name.
        like: the request that the plays are for, if there is one: theirs have its id before their own, and its key and
            priority.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        scoring: Mapping[str, Scoring],
        seconds: float = 60.0,
        others: Mapping[str, Engine] | None = None,
        like: Request | None = None,
    ) -> None:
        self._like = like or Request("", [], sampling)
        self._prefix = "search/" if like is None else f"{like.id}/search/"
        self._sampling = sampling.model_copy(update={"spread": True, "n": 1, "best_of": None})
        self._scoring, self._seconds = scoring, seconds
        self._engines = {"": engine, **(others or {})}
        self._distinct = list({id(each): each for each in self._engines.values()}.values())
        self._plays: dict[Play, set[str]] = {}
        self._runs: dict[str, _Run] = {}
        self._leaders: dict[Branch, list[tuple[Play, Piece]]] = {}
        self._back: queue.SimpleQueue[tuple[Play, Callable[[], None]]] = queue.SimpleQueue()
        self._errands: deque[tuple[Play, Judge | Work]] = deque()
        self._out = 0
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether there are plays."""
        return bool(self._plays)

    @property
    def room(self) -> bool:
        """Whether the engine could take on more branches than it has."""
        return len(self._runs) < self._engines[""].limits.sequences

    def add(self, play: Play) -> None:
        """Takes on a play."""
        self._plays[play] = set()
        self._begin(play)

    def step(self) -> list[Play]:
        """Does a step of each engine, and what follows from it; gives the plays that ended."""
        for engine in self._busy:
            self.take(engine.step())
        return self.ended(self._seconds + 1)

    def take(self, deltas: Sequence[Delta]) -> None:
        """Takes in what a step of an engine made known; of others' requests, it takes no notice."""
        for delta in deltas:
            self._take(delta)

    def ended(self, patience: float) -> list[Play]:
        """The plays that ended; where nothing but errands are done, one of them is waited for, so many seconds."""
        self._hear(patience if not self._busy and self._out else 0.0)
        ended = [play for play in self._plays if play.done]
        for play in ended:
            self._end(play)
        return ended

    def drop(self, play: Play) -> None:
        """Ends ``play`` with the best of what it has, and leaves nothing of it in the engine."""
        for run in self._runs.values():
            if run.play is play:
                self._tell(run)
        play.cut()
        self._end(play)

    def abandon(self) -> None:
        """Ends all plays, and leaves nothing of them in the engine."""
        for play in list(self._plays):
            play.close()
            self._end(play)
        self._errands.clear()
        while self._busy:
            for engine in self._busy:
                engine.step()

    @property
    def _busy(self) -> list[Engine]:
        """The engines that have something to do."""
        return [engine for engine in self._distinct if engine.busy]

    def released(self, anchor: Anchor) -> None:
        """Nobody goes on from ``anchor``."""
        self._engines[anchor.model].forget(anchor.id)

    # Pieces

    def _begin(self, play: Play) -> None:
        """Begins what a play asks for."""
        while play.pieces:
            self._start(play, play.pieces.pop(0))
        while play.errands:
            asked = play.errands.pop(0)
            if isinstance(asked, States):
                self._states(asked)
                play.search.ledger.computed += sum(len(each.tokens) for each in asked.branches)
                self._back.put((play, functools.partial(play.worked, asked)))
                self._out += 1
            else:
                self._errands.append((play, asked))
        self._send()

    def _start(self, play: Play, piece: Piece) -> None:
        """Has the engine compute ``piece``, or lets it wait for one that computes what both begin with."""
        branch, leads = piece.branch, []
        for each in branch.ancestors:
            if each.anchored < len(each.tokens) - 1:
                if each in self._leaders:
                    self._leaders[each].append((play, piece))
                    return
                leads.append(each)
        self._count += 1
        asked: dict[str, Any] = {"max_tokens": piece.most, "seed": branch.seed, "logprobs": piece.top}
        if branch.temperature is not None:
            asked["temperature"] = branch.temperature
        line, engine = branch.line, self._engines[branch.model]
        if engine is not self._engines[""]:  # these name tokens of the search's own model
            asked |= {"stop_tokens": (), "logit_bias": {}}
        elif piece.top:  # those that are never drawn may be among the most probable ones
            asked["logprobs"] = min(MOST_LOGPROBS, piece.top + len(_banned(self._sampling)))
        request = dataclasses.replace(
            self._like,
            id=f"{self._prefix}{self._count}",
            prompt=list(branch.tokens),
            sampling=self._sampling.model_copy(update=asked),
            keep=True,
            given=line[0].start,
            deadline=None,
        )
        held = dict(zip(line, [*(each.start for each in line[1:]), len(branch.tokens)], strict=True))
        source = max(line, key=lambda each: min(each.anchored, held[each]) if each.anchor is not None else -1)
        if branch.beside:
            request = _beside(request, branch)
        run = _Run(play, piece, request, leads)
        try:
            if branch.beside:
                engine.add(request, [None if each.anchor is None else each.anchor.id for each, *_ in branch.beside])
            elif source.anchor is None:
                engine.add(request)
            else:
                engine.fork(source.anchor.id, request)
        except UsageError:  # the text has come to the end of the model's context
            play.ended(piece, "length", 0)
            self._begin(play)
            return
        for each in leads:
            self._leaders[each] = []
        self._runs[request.id] = run
        self._plays[play].add(request.id)

    def _take(self, delta: Delta) -> None:
        """What the engine told of a piece."""
        run = self._runs.get(delta.id)
        if run is None:  # the last word on one that was aborted
            return
        run.news.append(delta)
        if not run.begun and (delta.tokens or delta.finish is not None):
            run.begun, run.cached = True, delta.cached
            self._led(run)
        if delta.finish is None and len(run.news) < BUNDLE and not run.watched:
            return  # to take in each token by itself would take a good part of the time of a step
        early = self._tell(run)
        if delta.finish is not None or early:
            if delta.finish is None:
                self._engines[run.piece.branch.model].abort(delta.id)
            self._finish(run, delta.finish)

    def _tell(self, run: _Run) -> bool:
        """Tells its play the news of ``run``, and whether the piece is at its end."""
        news, run.news = run.news, []
        tokens = [token for delta in news for token in delta.tokens]
        rows = LogprobRows.joined([delta.logprobs for delta in news if delta.logprobs is not None])
        run.told += len(tokens)
        most = run.piece.top
        banned = _banned(run.request.sampling) if most else set()
        tops = [[each for each in row.top if each[0] not in banned][:most] for row in rows] if most else ()
        return run.play.told(run.piece, tokens, rows.spreads, tops)

    def _led(self, run: _Run) -> None:
        """The prompt of ``run`` is computed: others can go on from it."""
        if run.request.keep:
            anchor = Anchor(run.request.id, 0, run.piece.branch.model)
            for branch in [*run.leads, run.piece.branch]:
                self._anchor(branch, anchor, len(branch.tokens) - 1)
        for play, piece in [each for branch in run.leads for each in self._leaders.pop(branch)]:
            self._start(play, piece)

    def _anchor(self, branch: Branch, anchor: Anchor, count: int) -> None:
        if branch.anchor is not None:
            branch.search.released(branch.anchor)
        branch.anchor, branch.anchored = anchor, count
        anchor.users += 1

    def _finish(self, run: _Run, finish: Finish | None) -> None:
        """The engine has computed a piece."""
        play, piece, request = run.play, run.piece, run.request
        del self._runs[request.id]
        piece.branch.anchored = max(0, len(piece.branch.tokens) - 1)
        ledger = play.search.ledger
        ledger.cached += run.cached
        ledger.computed += request.length - run.cached + max(0, run.told - 1)
        why = None
        if finish is Finish.STOP:
            why = "stop"
        elif finish is Finish.LENGTH and run.told < piece.most:
            why = "length"
        elif finish not in (None, Finish.LENGTH):
            why = "error"
        if not any(other.play is play for other in self._runs.values()):  # until then, nothing that is held is let go
            ledger.blocks = max(ledger.blocks, self._blocks(play))
        play.ended(piece, why, run.told)
        self._begin(play)

    def _blocks(self, play: Play) -> int:
        """How many blocks the branches of ``play`` hold, each counted once."""
        anchors: dict[str, set[str]] = {}
        for branch in play.search.branches:
            if branch.anchor is not None:
                anchors.setdefault(branch.model, set()).add(branch.anchor.id)
        return sum(self._engines[model].requests.kept_blocks(ids) for model, ids in anchors.items())

    def _end(self, play: Play) -> None:
        """Frees what a play holds."""
        for id in self._plays.pop(play):
            self._runs.pop(id, None)
            for engine in self._distinct:
                engine.abort(id)
                engine.forget(id)
        for branch in play.search.branches:
            self._leaders.pop(branch, None)

    # Errands

    def _send(self) -> None:
        """Begins as many scorings, and what else programs have done elsewhere, as may run at a time."""
        while self._errands and self._out < ERRANDS:
            play, asked = self._errands.popleft()
            self._out += 1
            work = self._works(play, asked) if isinstance(asked, Work) else self._scores(play, asked)
            threading.Thread(target=work, daemon=True).start()

    def _works(self, play: Play, work: Work) -> Callable[[], None]:
        def run() -> None:
            work.run()
            self._back.put((play, functools.partial(play.worked, work)))

        return run

    def _scores(self, play: Play, judge: Judge) -> Callable[[], None]:
        candidates = [_candidate(each) for each in judge.branches]

        def run() -> None:
            found = self._verdicts(judge, candidates)
            self._back.put((play, functools.partial(play.judged, judge, found)))

        return run

    def _verdicts(self, judge: Judge, candidates: list[Candidate]) -> list[Verdict]:
        scoring = self._scoring.get(judge.scorer)
        if scoring is None:
            known = ", ".join(filter(None, self._scoring)) or "none"
            what = f"no scorer {judge.scorer!r} was given; known: {known}" if judge.scorer else "no scorer was given"
            return [Verdict.failure(what)] * len(candidates)
        return verdicts(scoring, judge.problem, candidates, self._seconds)

    def _states(self, asked: States) -> None:
        """Hidden states are computed here, by the thread that drives the model."""
        try:
            for name in {branch.model for branch in asked.branches}:
                own = [branch for branch in asked.branches if branch.model == name]
                found = _hidden_states(self._engines[name], [branch.tokens for branch in own])
                for branch, states in zip(own, found, strict=True):
                    branch.hidden = states
            asked.outcome = asked.branches
        except UsageError as error:
            asked.outcome = error

    def _hear(self, patience: float) -> None:
        """What has come back meanwhile; waits so many seconds for the first of it."""
        while True:
            try:
                play, tell = self._back.get(timeout=patience) if patience else self._back.get_nowait()
            except queue.Empty:
                return
            patience = 0.0
            self._out -= 1
            if play in self._plays:
                tell()
                self._begin(play)
            self._send()


def _banned(sampling: SamplingParams) -> set[int]:
    """Tokens that are never drawn."""
    return {token for token, bias in sampling.logit_bias.items() if bias <= -100}


def _beside(request: Request, branch: Branch) -> Request:
    """The ``request`` of a branch that reads texts where they are in the cache, which are no part of its prompt."""
    prompt, shared, end = request.prompt, branch.beside[0][1], branch.beside[-1][2]
    contexts = [prompt[first:last] for _, first, last in branch.beside]
    own = [*prompt[:shared], *prompt[end:]]
    return dataclasses.replace(request, prompt=own, contexts=contexts, shared=shared, keep=False, given=None)


def _candidate(branch: Branch) -> Candidate:
    return Candidate(branch.text, branch.answer, branch.finished, branch.logprob, branch.certainty)


def run(driver: Driver, plays: Iterator[Play], stopped: Callable[[], bool]) -> Iterator[Play]:
    """Takes on ``plays`` while there is room for more branches, and gives them as they end, until it is ``stopped``."""
    more = True
    while not stopped():
        while more and (driver.room or not driver.busy):
            play = next(plays, None)
            more = play is not None
            if play is not None:
                driver.add(play)
        if not driver.busy:
            return
        yield from driver.step()


def _hidden_states(engine: Engine, texts: list[list[int]]) -> list[Tensor]:
    """Of all tokens of ``texts``, see :meth:`~penstock.serve.engine.executor.Readable.states`.

    Raises:
        UsageError: the model is not here as a whole, or asleep.
    """
    if not isinstance(engine.executor, Readable):
        raise UsageError("hidden states can be had of a model that one process has as a whole, and records no steps")
    if engine.control.asleep:
        raise UsageError("the engine is asleep", hint="Wake it before it computes hidden states.")
    return engine.executor.states(texts)
