"""OpenAI's batch files: a request a line in, a response a line out.

An output line is written once, when its request has finished, and its ``id`` holds the number of the input line. So the
output itself says what is done: a run that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from penstock.core.config import build
from penstock.core.errors import PenstockError, UsageError
from penstock.core.files import claim, explain_os_errors, fsync_directory
from penstock.core.progress import Bar, Reporter, silent
from penstock.core.randomness import derive
from penstock.core.signals import StopRequest
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.http.chats import ask
from penstock.serve.http.errors import ApiError, content
from penstock.serve.http.protocol.body import Body, unknown
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.completions import Completion
from penstock.serve.http.protocol.vectors import Embeddings
from penstock.serve.http.service import Piece, Usage
from penstock.serve.http.shapes.chats import Chats
from penstock.serve.http.shapes.completions import Completions
from penstock.serve.http.text import Tokens
from penstock.serve.messages import Finish, Request
from penstock.serve.offline.gather import CompletionOutput, Gatherer, RequestOutput
from penstock.serve.offline.vectors import LineVectors

log = logging.getLogger(__name__)

#: What every output line begins with.
HEAD = '{"id": "batch_req_'

#: Seconds after which finished lines are made durable.
EVERY = 1.0


class Line(Body):
    """A line of the input."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    body: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a batch file: lines that were done before, and now; of the latter, those that are refused, and why
    the first of them is; and whether lines are left, since the run was asked to stop."""

    before: int
    done: int
    refused: int
    stopped: bool
    reason: str = ""


class Ledger:
    """The output file: which of the input's ``lines`` it answers, and room for more.

    Raises:
        PenstockError: the file cannot be read or written, or something else than this program wrote it.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        #: For each line that is answered, 1 more than a checksum of its custom_id.
        self._done = array("Q", bytes(8 * lines))
        self.count = 0
        with explain_os_errors(f"cannot open {path}"):
            self._file = path.open("a+b")
        try:
            self._read()
            fsync_directory(path.parent)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def _read(self) -> None:
        """Notes the lines that are there. A last one that a killed run left unfinished is cut off."""
        whole = number = 0
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                if not raw.startswith(HEAD.encode()[: len(raw)]):
                    raise self._foreign(number)
                self._file.truncate(whole)
                return
            try:
                record = json.loads(raw)
                place, custom_id = int(record["id"].removeprefix("batch_req_")), record["custom_id"]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise self._foreign(number) from error
            if not 0 <= place < len(self._done):
                raise self._other(place)
            self._done[place] = _mark(custom_id)
            self.count += 1
            whole += len(raw)

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"{self._path} is there already, and its line {number} is none of a batch's output",
            hint="Name another file, or move this one away.",
        )

    def _other(self, place: int) -> UsageError:
        return UsageError(
            f"{self._path} answers another input than this: what stands in line {place + 1} differs",
            hint="Name another output, or the input that it was begun with.",
        )

    def has(self, place: int, custom_id: str | None) -> bool:
        """Whether the input's line ``place``, counted from 0, is answered.

        Raises:
            UsageError: it is, but was another line when that happened.
        """
        if self._done[place] not in (0, _mark(custom_id)):
            raise self._other(place)
        return self._done[place] != 0

    def write(self, records: list[dict[str, Any]]) -> None:
        """Appends lines; now and then makes all of them durable."""
        if records:
            text = "".join(json.dumps(record) + "\n" for record in records)
            with explain_os_errors(f"cannot write {self._path}"):
                self._file.write(text.encode())
                self._file.flush()
                if time.monotonic() - self._synced > EVERY:
                    self.sync()

    def sync(self) -> None:
        """Makes all lines durable."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Makes all lines durable, and lets go of the file."""
        with explain_os_errors(f"cannot write {self._path}"):
            try:
                self.sync()
            finally:
                self._file.close()


def _mark(custom_id: str | None) -> int:
    return 1 + zlib.crc32(json.dumps(custom_id).encode())


@dataclasses.dataclass
class _Task:
    """A line under way: the model or the adapter that it names, the shapes of its response, whether its answer is to
    have no tokens, and the results of its prompts as far as they are known."""

    place: int
    custom_id: str
    model: str
    shapes: Completions | Chats
    nothing: bool
    results: dict[str, RequestOutput | None]


class BatchRun:
    """Answers the lines of a batch file.

    Args:
        gatherer: submits to the engine.
        tokens: the model's tokenizer.
        name: what the lines call the model.
        window: most lines under way at a time; what is planned together, and what memory is needed for.
        vectors: answers lines that ask for vectors; None refuses them.
    """

    def __init__(
        self, gatherer: Gatherer, tokens: Tokens, name: str, window: int, vectors: LineVectors | None = None
    ) -> None:
        self._vectors = vectors
        self._gatherer, self._tokens, self._name, self._window = gatherer, tokens, name, window
        self._tasks: dict[int, _Task] = {}

    def run(self, source: Path, target: Path, progress: Reporter = silent) -> Summary:
        """Answers the lines of ``source`` that ``target`` does not answer yet. A line that cannot be served is
        answered with an error.

        Raises:
            PenstockError: a file cannot be read or written, or the output belongs to another input.
        """
        with explain_os_errors(f"cannot read {source}"), source.open("rb") as file:
            filled = [bool(raw.strip()) for raw in file]
            file.seek(0)
            with explain_os_errors(f"cannot write {target}"):
                target.touch()
            with claim(target):
                ledger = Ledger(target, len(filled))
                try:
                    with StopRequest() as stop, progress("answering", sum(filled), "line") as bar:
                        bar.advance(ledger.count)
                        return self._answer(file, ledger, stop, bar)
                finally:
                    self._tasks.clear()
                    self._gatherer.abandon()
                    ledger.close()

    def _answer(self, file: IO[bytes], ledger: Ledger, stop: StopRequest, bar: Bar) -> Summary:
        before, done, refused, reason = ledger.count, 0, 0, ""
        lines = _unanswered(file, ledger)
        more = True
        while (more or self._tasks) and not stop.wanted:
            records: list[dict[str, Any]] = []
            while more and len(self._tasks) + len(records) < self._window and not stop.wanted:
                place, raw = next(lines, (-1, b""))
                more = place >= 0
                if more and (refusal := self._begin(place, raw)) is not None:
                    records.append(refusal)
            for result in self._gatherer.step():
                records += self._end(result)
            ledger.write(records)
            done += len(records)
            reasons = [_reason(record) for record in records if record["error"] or _status(record) != 200]
            refused += len(reasons)
            reason = reason or next(iter(reasons), "")
            bar.advance(len(records))
        return Summary(before, done, refused, more or bool(self._tasks), reason)

    def _begin(self, place: int, raw: bytes) -> dict[str, Any] | None:
        """Submits a line; the answer of one that has it at once: it is refused, or asks for vectors."""
        try:
            line = _known(build(Line, _parsed(raw), "the line"))
        except (UsageError, ValueError) as error:
            fault = {"code": "invalid_line", "message": str(error)}
            return _record(place, _custom_id(raw), None, fault)
        try:
            if line.url == "/v1/embeddings":
                return _record(place, line.custom_id, _response(place, 200, self._embedded(place, line)), None)
            self._submit(place, line)
        except Exception as error:
            return _failure(place, line.custom_id, error)
        return None

    def _submit(self, place: int, line: Line) -> None:
        body: Completion | Chat
        if line.url == "/v1/completions":
            body = _known(build(Completion, line.body, "the body"))
            prompts, shared, extra, shapes = self._completion(body)
        else:
            body = _known(build(Chat, line.body, "the body"))
            prompts, shared, extra, shapes = self._chat(body)
        adapter = "" if body.model in (None, self._name) else str(body.model)
        if adapter and adapter not in self._gatherer.engine.adapters.names:
            what = f"there is no model {body.model!r} here; this is {self._name!r}"
            raise ApiError(404, what, param="model", code="model_not_found")
        if body.stream:
            raise ApiError(400, "a line of a batch is answered as a whole: nothing to stream", param="stream")
        seed = derive(0, "batch", place) >> 1
        options = {"seed": seed} | body.options() | extra
        sampling = build(SamplingParams, options, "the request").tokenized(self._tokens.encode, self._tokens.bare)
        contexts = self._tokens.contexts(body.contexts)
        task = _Task(place, line.custom_id, adapter or self._name, shapes, body.wanted == 0, {})
        try:
            for number, prompt in enumerate(prompts):
                id = f"{place}/{number}"
                request = Request(
                    *(id, prompt, sampling, body.priority), contexts=contexts, shared=shared, adapter=adapter
                )
                self._gatherer.submit(request, shown=shapes.shown)
                task.results[request.id] = None
        except Exception:
            for id in task.results:
                self._gatherer.cancel(id)
            raise
        self._tasks[place] = task

    def _embedded(self, place: int, line: Line) -> dict[str, Any]:
        """The body of the response to a line that asks for vectors, which are computed here."""
        body = _known(build(Embeddings, line.body, "the body"))
        if body.model not in (None, self._name):
            what = f"there is no model {body.model!r} here that makes vectors; this is {self._name!r}"
            raise ApiError(404, what, param="model", code="model_not_found")
        if self._vectors is None:
            raise ApiError(400, "no vectors are made here")
        return self._vectors.answer(place, self._name, body)

    def _completion(self, body: Completion) -> tuple[list[list[int]], int, dict[str, Any], Completions | Chats]:
        """Prompts, how many of their tokens stand before contexts, further sampling options, and the shapes of the
        response."""
        before = self._tokens.encode(body.contexts_prefix, body.add_special_tokens) if body.contexts else []
        prompts = [
            self._tokens.encode(prompt, body.special) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        prompts = [before + body.truncated(prompt, self._gatherer.engine.limits.context) for prompt in prompts]
        return prompts, len(before), {}, Completions(self._tokens, prompts, body)

    def _chat(self, body: Chat) -> tuple[list[list[int]], int, dict[str, Any], Completions | Chats]:
        """The same for a chat."""
        prompt, extra, form = ask(body, self._tokens, self._gatherer.engine.limits.context)
        return [prompt.tokens], prompt.shared, extra, Chats(self._tokens, prompt.tokens, body, form)

    def _end(self, result: RequestOutput) -> Iterator[dict[str, Any]]:
        """Takes a prompt's result; yields the answer of a line whose prompts all have theirs."""
        place = int(result.request_id.partition("/")[0])
        task = self._tasks[place]
        task.results[result.request_id] = result
        results = [each for each in task.results.values() if each is not None]
        if len(results) == len(task.results):
            del self._tasks[place]
            try:
                yield _record(place, task.custom_id, _response(place, 200, self._body(task, results)), None)
            except Exception as error:
                yield _failure(place, task.custom_id, error)

    def _body(self, task: _Task, results: list[RequestOutput]) -> dict[str, Any]:
        error = next((result.error for result in results if result.error is not None), None)
        if error is not None:
            raise ApiError(500, f"the request failed: {error}")
        outputs = [(result, output) for result in results for output in result.outputs]
        usage = Usage(
            prompt=sum(len(result.prompt_token_ids) + result.num_context_tokens for result in results),
            cached=sum(result.num_cached_tokens for result in results),
            completion=0 if task.nothing else sum(len(output.token_ids) for _, output in outputs),
            drafted=sum(result.num_drafted_tokens for result in results),
            accepted=sum(result.num_accepted_tokens for result in results),
        )
        pieces = [_piece(choice, *pair) for choice, pair in enumerate(outputs)]
        pieces = [piece.emptied() for piece in pieces] if task.nothing else pieces
        return {
            "id": f"{task.shapes.kind}-{task.place}",
            "object": task.shapes.whole,
            "created": int(time.time()),
            "model": task.model,
            "choices": [task.shapes.choice(piece) for piece in pieces],
            "usage": usage.record(),
            **task.shapes.about(pieces),
        }


B = TypeVar("B", bound=Body)


def _known(body: B) -> B:
    """``body``, if all of its fields are known: nobody reads a warning in the midst of a file.

    Raises:
        UsageError: one is not.
    """
    name, near = next(unknown(body), ("", ""))
    if name:
        raise UsageError(f"unknown field {name[:50]!r}; {near}")
    return body


def _unanswered(file: IO[bytes], ledger: Ledger) -> Iterator[tuple[int, bytes]]:
    """The lines that are still to be answered, with their places."""
    for place, raw in enumerate(file):
        if raw.strip() and not ledger.has(place, _custom_id(raw) if ledger.count else None):
            yield place, raw


def _parsed(raw: bytes) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        ValueError: there is none.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        found = json.loads(raw, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("the line is not a JSON object")
    return found


def _custom_id(raw: bytes) -> str | None:
    """The custom_id of a line, as far as it has one."""
    try:
        found = _parsed(raw).get("custom_id")
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _piece(choice: int, result: RequestOutput, output: CompletionOutput) -> Piece:
    """A continuation as the shapes of responses want it."""
    stopped = output.finish_reason == Finish.STOP.value
    # Of a stop string the text knows; a stop token is left out here.
    shown = output.token_ids[:-1] if stopped and not isinstance(output.stop_reason, str) else output.token_ids
    return Piece(
        choice,
        output.text,
        shown,
        None if output.logprobs is None else output.logprobs.rows,
        output.text_offsets,
        "stop" if stopped else "length",
        None if result.prompt_logprobs is None else result.prompt_logprobs.rows,
        output.stop_reason,
        output.token_ids[len(shown) :],
    )


def _response(place: int, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{place}", "body": body}


def _record(
    place: int, custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    """A line of the output."""
    return {"id": f"batch_req_{place}", "custom_id": custom_id, "response": response, "error": error}


def _failure(place: int, custom_id: str, error: Exception) -> dict[str, Any]:
    """The output's line of a request that ``error`` ended. One that nobody foresaw ends no more than its line."""
    if not isinstance(error, PenstockError):
        log.error("line %d failed", place + 1, exc_info=error)
        error = ApiError(500, f"the request failed: {type(error).__name__}: {error}")
    status, body = content(error)
    return _record(place, custom_id, _response(place, status, body), None)


def _status(record: dict[str, Any]) -> int:
    status: int = record["response"]["status_code"]
    return status


def _reason(record: dict[str, Any]) -> str:
    """Why a line was refused, by the output's line."""
    error: dict[str, str] = record["error"] or record["response"]["body"]["error"]
    return error["message"]
