"""What became of each request: a bounded record of an engine's events, answered by id."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from penstock.core.events import Event
from penstock.serve.messages import Snapshot
from penstock.serve.observe.words import count, seconds, sentence

#: How many continuations are remembered.
KEPT = 10_000

#: How many events of each: the newest. What they add up to is remembered of all.
EACH = 32


class Course:
    """What became of one continuation. Times are in seconds since the epoch, None before they come.

    Attributes:
        prompt: which of its response's prompts it continues; ``index``: which of the continuations of that.
        state: ``waiting``, ``running``, ``preempted`` or ``finished``.
        arrived, admitted, first, finished: when it came, first got memory, had its first token, and ended.
        preemptions: how often it lost its memory.
        outside: seconds that it waited for memory after that, until it got some.
        drafted, accepted: tokens that were drafted for it, and those of them that it took.
        events: the newest but those of drafts, each with the seconds that were waited before it, where they matter.
        forgotten: events before those.
    """

    def __init__(self, prompt: int, event: Event) -> None:
        self.prompt, self.index = prompt, event.index
        self.state = "waiting"
        self.arrived = self._since = event.time
        self.admitted: float | None = None
        self.first: float | None = None
        self.finished: float | None = None
        self.preemptions = self.drafted = self.accepted = self.forgotten = 0
        self.outside = 0.0
        self.events: deque[tuple[Event, float | None]] = deque(maxlen=EACH)

    def take(self, event: Event) -> None:
        """The next thing that happened to it."""
        waited = None
        match event.kind:
            case "settled":
                self.drafted += int(event.detail["drafted"])
                self.accepted += int(event.detail["accepted"])
                return
            case "admitted":
                waited = event.time - self._since
                if self.state == "preempted":
                    self.outside += waited
                self.admitted = self.admitted or event.time
                self.state = "running"
            case "first":
                self.first = self.first or event.time
            case "preempted":
                self.preemptions += 1
                self.state, self._since = "preempted", event.time
            case "finished":
                if self.state == "preempted":
                    self.outside += event.time - self._since
                self.state, self.finished = "finished", event.time
        self.forgotten += len(self.events) == EACH
        self.events.append((event, waited))

    def preempted_seconds(self, now: float) -> float:
        """Seconds that it waited for memory after it was preempted, until ``now`` where it still does."""
        return self.outside + (max(0.0, now - self._since) if self.state == "preempted" else 0.0)

    def summary(self, now: float) -> str:
        """The answer, at ``now``, to: why did it take so long?"""
        if self.admitted is None:
            ended = " until it ended" if self.finished else ", and still does"
            return f"It waited for memory from its arrival on{ended}."
        said = [f"It queued {seconds(self.admitted - self.arrived)}"]
        if self.first is not None:
            said.append(f"its first token came {seconds(self.first - self.arrived)} after its arrival")
        if self.preemptions:
            times = count(self.preemptions, "time")
            waited = seconds(self.preempted_seconds(now))
            said.append(f"it was preempted {times} and waited {waited} for memory then")
        if self.drafted:
            said.append(f"{self.accepted} of {count(self.drafted, 'drafted token')} were accepted")
        said.append(
            f"it is {self.state}"
            if self.finished is None
            else f"it ended {seconds(self.finished - self.arrived)} after its arrival"
        )
        return "; ".join(said) + "."

    def story(self) -> list[str]:
        """What happened, in order, each with the seconds since its arrival."""
        told = [f"+{event.time - self.arrived:.3f} s  {sentence(event, waited)}" for event, waited in self.events]
        return [f"{self.forgotten} earlier events are not kept", *told] if self.forgotten else told

    def record(self, now: float) -> dict[str, Any]:
        """All of it at ``now``, for JSON."""

        def after(time: float | None) -> float | None:
            return None if time is None else round(time - self.arrived, 6)

        return {
            "prompt": self.prompt,
            "index": self.index,
            "state": self.state,
            "summary": self.summary(now),
            "story": self.story(),
            "arrived": self.arrived,
            "queue_seconds": after(self.admitted),
            "first_token_seconds": after(self.first),
            "seconds": after(self.finished),
            "preemptions": self.preemptions,
            "preempted_seconds": round(self.preempted_seconds(now), 6),
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "events": [{"time": each.time, "kind": each.kind, **each.detail} for each, _ in self.events],
            "events_forgotten": self.forgotten,
        }


class History:
    """The courses of the newest requests. The engine's ids are a response's id, a slash and the prompt's number; here
    they are asked for by the response's id, or by both.

    Args:
        kept: how many continuations are remembered; the oldest responses go first.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept, self._count = kept, 0
        self._responses: dict[str, dict[tuple[int, int], Course]] = {}

    def see(self, events: Iterable[Event], snapshot: Snapshot | None) -> None:
        """Takes in what happened."""
        for event in events:
            response, number = _parts(event.id)
            courses = self._responses.get(response)
            if event.kind == "arrived":
                courses = self._responses.setdefault(response, {})
                self._count += (number or 0, event.index) not in courses
                courses[number or 0, event.index] = Course(number or 0, event)
                while self._count > self._kept and len(self._responses) > 1:
                    self._count -= len(self._responses.pop(next(iter(self._responses))))
            if courses is not None and (course := courses.get((number or 0, event.index))) is not None:
                course.take(event)

    def of(self, id: str) -> list[Course]:
        """The courses of a response's continuations, by prompt and index, or of those of one of its prompts; none where
        nothing is known of it."""
        response, wanted = _parts(id)
        found = self._responses.get(response, {})
        return [course for (number, _), course in sorted(found.items()) if wanted in (None, number)]

    def newest(self, most: int) -> list[str]:
        """The ids of the newest responses, the newest first."""
        ids = reversed(self._responses)
        return [id for _, id in zip(range(most), ids, strict=False)]


def _parts(id: str) -> tuple[str, int | None]:
    """The response's id, and which of its prompts, or of the branches of its search, an engine's ``id`` is about."""
    response, slash, rest = id.partition("/")
    number = rest.removeprefix("0/search/")
    if not slash:
        return id, None
    return (response, int(number)) if number.isascii() and number.isdigit() and len(number) < 10 else (id, None)
