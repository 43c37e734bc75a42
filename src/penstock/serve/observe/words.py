"""Events in plain sentences."""

from __future__ import annotations

from penstock.core.events import Event

#: What an engine was told to do that makes its cache void.
VOIDING = {"load": "was given other weights", "sleep": "was put to sleep"}


def sentence(event: Event, waited: float | None = None) -> str:
    """What ``event`` says, in a sentence without a subject; ``waited`` seconds passed before it, where that matters."""
    told = event.detail
    match event.kind:
        case "arrived":
            where = f" at replica {told['replica']}" if "replica" in told else ""
            return f"arrived{where} with {count(told['tokens'], 'token')}; {count(told['waiting'], 'other')} waited"
        case "admitted":
            after = "" if waited is None else f" after waiting {seconds(waited)}"
            found = f"{told['cached']} of its {count(told['tokens'], 'token')} were in the cache"
            shared = f", shared with {told['forked']}" if "forked" in told else ""
            return f"got memory{after}: {found}{shared}"
        case "first":
            return "its first token came"
        case "preempted":
            lost = f"the memory of its {count(told['computed'], 'computed token')} is taken"
            if "why" in told:
                return f"preempted, since the engine {VOIDING[str(told['why'])]}; {lost}"
            missing = count(told["missing"], "more block")
            if (told["by"], told["by_index"]) == (event.id, event.index):
                return f"preempted: it needed {missing}, and nobody behind it had any to give; {lost}"
            return f"preempted by {called(told['by'], told['by_index'])}, which needed {missing}; {lost}"
        case "settled":
            return f"{count(told['drafted'], 'token')} drafted, {told['accepted']} accepted"
        case "compressed":
            done = f"its cache was compressed from {count(told['tokens'], 'token')} to {told['kept']}"
            if "by" not in told:
                return done
            return f"{done}, since {called(told['by'], told['by_index'])} needed {count(told['missing'], 'more block')}"
        case "truncated":
            return f"cut back by {count(told['tokens'], 'token')}, to {told['left']}"
        case "fed":
            return f"was fed {count(told['tokens'], 'token')}"
        case "forked":
            return f"forked into {told['into']}"
        case "finished":
            return f"ended after {count(told['generated'], 'token')}: {told['reason']}"
    return event.kind


def called(id: int | float | str, index: int | float | str) -> str:
    """What a continuation is called: the first by the request's id alone."""
    return f"{id} (continuation {index})" if index else str(id)


def count(number: int | float | str, of: str) -> str:
    """``number`` of something: 1 token, 2 tokens."""
    return f"{number} {of}{'' if number == 1 else 's'}"


def seconds(duration: float) -> str:
    """A duration as people read it."""
    return f"{1000 * duration:.1f} ms" if duration < 1 else f"{duration:.2f} s"
