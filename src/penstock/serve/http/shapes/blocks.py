"""An answer as a row of blocks: thoughts, texts and calls, each opened, written and closed before the next."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

from penstock.serve.dialogue.answer import Arguments, CallStart, Content, Event, Reasoning
from penstock.serve.http.chats import AnswerReader, Form
from penstock.serve.http.service import Piece
from penstock.serve.http.text import Tokens


class Kind(enum.Enum):
    """What a block is."""

    THOUGHT = enum.auto()
    TEXT = enum.auto()
    CALL = enum.auto()


class Act(enum.Enum):
    """What becomes of a block."""

    OPEN = enum.auto()
    MORE = enum.auto()
    CLOSE = enum.auto()


@dataclasses.dataclass
class Block:
    """A piece of an answer; ``text`` is that of the arguments of a call, whose function is ``name`` and which is known
    as ``id``."""

    kind: Kind
    name: str = ""
    id: str = ""
    text: str = ""


class Blocks:
    """Reads one answer into blocks.

    Args:
        form: how it is read.
        tokens: of the model.
        specials: whether special tokens are part of the text.

    Attributes:
        read: the blocks so far; the last may still be open.
        finish: why the answer ended, in OpenAI's word for chats; None before.
        stopped: the stop string or token that ended it.
        thinking: about how many tokens were thoughts.
    """

    def __init__(self, form: Form, tokens: Tokens, specials: bool) -> None:
        self._form, self._tokens, self._specials = form, tokens, specials
        self._reader, self._watch = AnswerReader(form), AnswerReader(form)
        self._open = False
        self.read: list[Block] = []
        self.finish: str | None = None
        self.stopped: str | int | None = None
        self.thinking = 0

    @property
    def shown(self) -> Mapping[int, str]:
        """Special tokens that are part of the text, and what they are written as."""
        if self._specials:
            return self._tokens.specials | self._tokens.marks
        return self._tokens.marks if self._form.marked else {}

    def over(self, piece: Piece) -> bool:
        """Whether the answer is at its end with ``piece``, of which the model knows nothing: one call is wanted, and it
        begins another."""
        self._watch.read(piece.text, False)
        return self._form.single and self._watch.beyond

    def take(self, piece: Piece) -> Iterator[tuple[Act, Block, str]]:
        """What ``piece`` does to which block, and the text that it adds."""
        for event in self._reader.events(piece.text, piece.finish is not None):
            yield from self._take(event)
        if self.read and self._open and self.read[-1].kind is Kind.THOUGHT:
            self.thinking += len(piece.tokens)
        if piece.finish is not None:
            self.finish, self.stopped = self._reader.reason(piece.finish), piece.stop_reason
            if not self.read:  # clients want something
                yield from self._begin(Block(Kind.TEXT))
            yield from self._close()

    def _take(self, event: Event) -> Iterator[tuple[Act, Block, str]]:
        match event:
            case CallStart(name, id):
                yield from self._begin(Block(Kind.CALL, name, id or self._form.dialogue.new_id()))
                return
            case Arguments(text):
                kind = Kind.CALL
            case Content(text):
                kind = Kind.TEXT
            case Reasoning(text):
                kind = Kind.THOUGHT
        if not self._open or self.read[-1].kind is not kind:
            yield from self._begin(Block(kind))
        self.read[-1].text += text
        yield Act.MORE, self.read[-1], text

    def _begin(self, block: Block) -> Iterator[tuple[Act, Block, str]]:
        yield from self._close()
        self.read.append(block)
        self._open = True
        yield Act.OPEN, block, ""

    def _close(self) -> Iterator[tuple[Act, Block, str]]:
        if self._open:
            self._open = False
            yield Act.CLOSE, self.read[-1], ""

    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat, for a conversation that goes on."""

        def joined(kind: Kind) -> str:
            return "".join(block.text for block in self.read if block.kind is kind)

        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
            for block in self.read
            if block.kind is Kind.CALL
        ]
        thought, said = joined(Kind.THOUGHT), joined(Kind.TEXT)
        message: dict[str, Any] = {"role": "assistant", "content": said or (None if calls else "")}
        return message | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
