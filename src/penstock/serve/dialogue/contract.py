"""The contract ``serve.dialogue``: a family's way to write thoughts and calls of functions."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Iterator
from typing import ClassVar

from penstock.core.errors import UsageError
from penstock.policy import Policy, contract, unwritten
from penstock.serve.dialogue.answer import Answer, Content, Event, Function, Functions, Reasoning, merged
from penstock.serve.dialogue.scanner import Reading, Scanner

#: Writes a text of the format in Lark's notation: its markers as tokens, where the tokenizer has them.
Spell = Callable[[str], str]


class Thinking(enum.StrEnum):
    """What an answer may begin with."""

    NOT = "not"  #: the model does not think aloud, or the prompt says that it is not to
    MAY = "may"  #: a thought may come first
    BEGUN = "begun"  #: the prompt has begun a thought


@contract(
    "serve.dialogue",
    law="reading inverts writing, however the text is cut; no word of any text is lost, none fails, and one without "
    "markers is content as it stands; what the grammar of calls allows is read as calls that fit their schemas, and it "
    "allows what is written; the policy's example, worked out by hand, is written and read as it stands",
)
class Dialogue(Policy):
    """A chat format: how models of a family write what they think, what they say, and which functions they call.

    The model's chat template writes the conversation up to an answer; a format reads the answer. A policy gives
    :meth:`write`, :meth:`calls`, :meth:`rules` and :meth:`example`.

    White space around calls and thoughts is layout: an answer with calls or thoughts has none around its content.

    Attributes:
        signs: texts in a chat template that tell of the format: the one of which most are there, and none is missing,
            is that of the model.
        markers: texts that are no words: where the tokenizer has a token for one, it is no part of any other text.
        tags: what a thought stands between.
        ends: markers that end an answer: the model's end-of-text tokens, which are no part of what a grammar governs.
    """

    signs: ClassVar[tuple[str, ...]] = ()
    markers: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, str]] = ("<think>", "</think>")
    ends: ClassVar[tuple[str, ...]] = ()

    def write(self, answer: Answer) -> str:
        """The text of ``answer``, as a model of the family writes it."""
        raise NotImplementedError

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        """Reads what follows a thought to its end: content, and calls of ``functions``, of which there is at least
        one."""
        raise NotImplementedError

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        """A grammar in Lark's notation of an answer that is a call of one of ``functions``, or, with ``several``, one
        call or more."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        """An answer with content and calls of EXAMPLES' functions, and its text."""
        raise unwritten(cls, "example()", "return an Answer and the text that a model of the family writes for it")

    def new_id(self) -> str:
        """A name for a call: random."""
        return f"call_{secrets.token_hex(12)}"

    # Thoughts

    def thinking(self, template: str, prompt: str) -> Thinking:
        """What an answer to ``prompt``, which ``template`` wrote, may begin with."""
        begin, end = self.tags
        if prompt.rstrip().endswith(begin):
            return Thinking.BEGUN
        thinks = begin in template or end in template
        return Thinking.MAY if thinks and not prompt.rstrip().endswith(end) else Thinking.NOT

    def read(self, scan: Scanner, functions: Functions, begun: bool) -> Reading[None]:
        """Reads an answer; calls are read where there are functions. With ``begun``, the prompt began a thought."""
        begin, end = self.tags
        start = scan.place
        yield from scan.space()
        if (yield from scan.take(begin)) or begun:
            scan.trim()
            yield from scan.say(Reasoning, end)
            scan.trim()
        else:
            scan.place = start
        if functions:
            yield from self.calls(scan, functions)

    def thought(self, reasoning: str) -> str:
        """The text of a thought, and what stands between it and the rest; empty where nothing is thought."""
        begin, end = self.tags
        return f"{begin}\n{reasoning}\n{end}\n\n" if reasoning else ""

    def lead(self, thinking: Thinking, budget: int | None, spell: Spell, called: bool) -> str:
        """Rules in Lark's notation, the first of which is ``lead``: what stands before an answer that a grammar
        governs, its content or, where it is ``called`` for, its calls. A thought is free, of ``budget`` tokens at most.
        Empty where nothing can stand there.

        Raises:
            UsageError: a thought's length is limited, and its end is no token of the model's.
        """
        if thinking is Thinking.NOT:
            return ""
        begin, end = map(spell, self.tags)
        return lead("" if thinking is Thinking.BEGUN else begin, end, budget, thinking is Thinking.MAY)

    def free(self, thinking: Thinking, spell: Spell) -> str:
        """A grammar in Lark's notation of any text and any token, but for a thought's beginning where one may come
        first: what :meth:`lead` limits is not to come behind it.

        Raises:
            UsageError: a thought cannot be told from the rest so.
        """
        begin = spell(self.tags[0])
        if thinking is Thinking.MAY and not begin.startswith("<["):
            raise UsageError("the model begins its thoughts with ordinary text, so their tokens cannot be limited")
        others = f"<[^{begin[2:-2]}]>" if thinking is Thinking.MAY else "<[*]>"
        return f"start: (/(?s:.+)/ | {others})*\n"


def lead(begin: str, end: str, budget: int | None, optional: bool, behind: str = "", opening: str = "") -> str:
    """The rules of a thought between the terminals ``begin`` and ``end``, with ``behind`` after it where it is there;
    ``opening`` follows in any case."""
    is_token = end.startswith("<")
    if budget is not None and not is_token:
        raise UsageError("the model ends its thoughts with ordinary text, so their tokens cannot be limited")
    if budget == 0:
        thought, body = end, ""
    elif is_token:
        limit = "" if budget is None else f"[max_tokens={budget}]"
        thought, body = f"thought {end}", f"thought{limit}: /(?s:.*)/\n"
    else:
        thought, body = "thought", f"thought[suffix={end}]: /(?s:.*)/\n"
    whole = f"{begin} {thought} {behind} LAYOUT?"
    return f"lead: {f'({whole})?' if optional else whole} {opening}\n{body}LAYOUT: /[ \\n\\r\\t]{{1,8}}/\n"


class Reader:
    """Reads an answer in ``dialogue``'s format, in chunks.

    Args:
        functions: those that may be called; with none, what looks like a call is content.
        begun: the prompt began a thought.
    """

    def __init__(self, dialogue: Dialogue, functions: Functions, begun: bool = False) -> None:
        self._scan = Scanner()
        self._work = self._all(dialogue, functions, begun)

    def read(self, text: str) -> list[Event]:
        """What ``text`` adds to the answer."""
        self._scan.feed(text)
        return merged(self._news())

    def end(self) -> list[Event]:
        """The rest."""
        self._scan.feed("", ended=True)
        return merged(self._news())

    def _all(self, dialogue: Dialogue, functions: Functions, begun: bool) -> Iterator[Event | None]:
        yield from dialogue.read(self._scan, functions, begun)
        yield from self._scan.say(Content)

    def _news(self) -> Iterator[Event]:
        while (event := next(self._work, None)) is not None:
            yield event


#: Functions with parameters of every kind, for examples and laws.
EXAMPLES: Functions = {
    each.name: each
    for each in (
        Function(
            "get_weather",
            "The weather of a city.",
            {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where."},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        ),
        Function(
            "book",
            "Books a table.",
            {
                "type": "object",
                "properties": {
                    "guests": {"type": "array", "items": {"type": "string"}},
                    "window": {"type": "boolean"},
                    "note": {"type": ["string", "null"]},
                    "at": {
                        "type": "object",
                        "properties": {"hour": {"type": "number"}, "late": {"type": "boolean"}},
                        "required": ["hour"],
                        "additionalProperties": False,
                    },
                },
                "required": ["guests", "window"],
                "additionalProperties": False,
            },
        ),
        Function("now", "The time."),
    )
}
