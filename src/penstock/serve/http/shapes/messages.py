"""The answers of ``/v1/messages``, as Anthropic's clients know them: whole, and as events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from penstock.serve.http.errors import as_anthropic
from penstock.serve.http.service import Generation, Piece
from penstock.serve.http.shapes.blocks import Act, Block, Blocks, Kind

#: Anthropic's words for why an answer ended.
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages:
    """The shape of one message.

    Args:
        blocks: of the answer.
        model: what it is called.
    """

    kind = "msg_"

    def __init__(self, blocks: Blocks, model: str) -> None:
        self._blocks, self._model = blocks, model

    def begin(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """The events before the answer."""
        yield {"type": "message_start", "message": self.record(generation)}

    def more(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events that tell of ``piece``."""
        for act, block, text in self._blocks.take(piece):
            place = len(self._blocks.read) - 1
            if act is Act.OPEN:
                yield {"type": "content_block_start", "index": place, "content_block": _content(block)}
            elif act is Act.MORE:
                yield {"type": "content_block_delta", "index": place, "delta": _delta(block, text)}
            else:
                yield {"type": "content_block_stop", "index": place}

    def end(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """The events behind the answer."""
        yield {"type": "message_delta", "delta": self._ending(), "usage": _usage(generation)}
        yield {"type": "message_stop"}

    def failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event that tells that the answer ends here, since of ``error``."""
        return as_anthropic(error)

    def record(self, generation: Generation) -> dict[str, Any]:
        """The message as it stands."""
        return {
            "id": generation.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "weights_version": generation.version,
            "content": [_content(block) for block in self._blocks.read],
            **self._ending(),
            "usage": _usage(generation),
        }

    def _ending(self) -> dict[str, Any]:
        finish, stopped = self._blocks.finish, self._blocks.stopped
        if finish == "stop" and isinstance(stopped, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
        return {"stop_reason": None if finish is None else REASONS[finish], "stop_sequence": None}


def _content(block: Block) -> dict[str, Any]:
    if block.kind is Kind.CALL:
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": _arguments(block.text)}
    if block.kind is Kind.THOUGHT:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; of one that was cut off, what there is."""
    try:
        arguments = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind is Kind.CALL:
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind is Kind.THOUGHT:
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }
