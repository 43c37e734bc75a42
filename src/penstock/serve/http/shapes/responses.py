"""The answers of ``/v1/responses``: whole, and as events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.protocol.responses import Respond
from penstock.serve.http.service import Generation, Piece
from penstock.serve.http.shapes.blocks import Act, Block, Blocks, Kind
from penstock.serve.http.shapes.choices import shown, token_record, with_own
from penstock.serve.http.text import Tokens

#: What items are, and how their ids begin.
ITEMS = {Kind.TEXT: ("message", "msg_"), Kind.CALL: ("function_call", "fc_"), Kind.THOUGHT: ("reasoning", "rs_")}


class Responses:
    """The shape of one response.

    Args:
        tokens: of the model.
        body: of the request.
        blocks: of the answer.
        model: what it is called.
    """

    kind = "resp_"

    def __init__(self, tokens: Tokens, body: Respond, blocks: Blocks, model: str) -> None:
        self._tokens, self._body, self._blocks, self._model = tokens, body, blocks, model
        self._wanted = body.wants_logprobs
        self._output: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._count = 0

    def begin(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """The events before the answer."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.record(generation))

    def more(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events that tell of ``piece``."""
        told = self._told(shown(piece)) if self._wanted else []
        for act, block, text in self._blocks.take(piece):
            if act is Act.OPEN:
                yield from self._opened(block)
            elif act is Act.MORE:
                own, told = (told, []) if block.kind is Kind.TEXT else ([], told)
                self._logprobs += own
                yield self._written(block, text, own)
            else:
                yield from self._closed(block)

    def end(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """The events behind the answer."""
        record = self.record(generation)
        yield self._event(f"response.{record['status']}", response=record)

    def failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event that tells that the answer ends here, since of ``error``."""
        told = error["error"]
        return self._event("error", message=told["message"], code=told["code"] or told["type"], param=told["param"])

    def record(self, generation: Generation) -> dict[str, Any]:
        """The response as it stands."""
        body, finish = self._body, self._blocks.finish
        cut = {"reason": "max_output_tokens"} if finish == "length" else None
        return {
            "id": generation.id,
            "object": "response",
            "created_at": generation.created,
            "status": "in_progress" if finish is None else "incomplete" if cut else "completed",
            "model": self._model,
            "weights_version": generation.version,
            "output": self._output,
            "usage": None if finish is None else self._usage(generation),
            "error": None,
            "incomplete_details": cut,
            **body.echoed(),
        }

    def _usage(self, generation: Generation) -> dict[str, Any]:
        usage = generation.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": self._blocks.thinking},
            "total_tokens": usage.prompt + usage.completion,
        }

    # Items

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": name, "sequence_number": self._count - 1, **fields}

    def _of(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """An event of the newest item."""
        place = len(self._output) - 1
        return self._event(name, item_id=self._output[-1]["id"], output_index=place, **fields)

    def _opened(self, block: Block) -> Iterator[dict[str, Any]]:
        kind, prefix = ITEMS[block.kind]
        item: dict[str, Any] = {"id": prefix + uuid.uuid4().hex, "type": kind, "status": "in_progress"}
        if block.kind is Kind.CALL:
            item |= {"call_id": block.id, "name": block.name, "arguments": ""}
        elif block.kind is Kind.TEXT:
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": []}
        self._logprobs = []
        self._output = [*self._output, item]
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)
        if block.kind is not Kind.CALL:
            yield self._of("response.content_part.added", content_index=0, part=self._part(block))

    def _written(self, block: Block, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if block.kind is Kind.CALL:
            return self._of("response.function_call_arguments.delta", delta=text)
        if block.kind is Kind.THOUGHT:
            return self._of("response.reasoning_text.delta", content_index=0, delta=text)
        return self._of("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _closed(self, block: Block) -> Iterator[dict[str, Any]]:
        status = "incomplete" if self._blocks.finish == "length" else "completed"
        if block.kind is Kind.CALL:
            yield self._of("response.function_call_arguments.done", name=block.name, arguments=block.text)
            whole: dict[str, Any] = {"arguments": block.text}
        else:
            if block.kind is Kind.THOUGHT:
                yield self._of("response.reasoning_text.done", content_index=0, text=block.text)
            else:
                yield self._of("response.output_text.done", content_index=0, text=block.text, logprobs=self._logprobs)
            part = self._part(block)
            yield self._of("response.content_part.done", content_index=0, part=part)
            whole = {"content": [part]}
        self._output = [*self._output[:-1], self._output[-1] | whole | {"status": status}]
        place = len(self._output) - 1
        yield self._event("response.output_item.done", output_index=place, item=self._output[-1])

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind is Kind.THOUGHT:
            return {"type": "reasoning_text", "text": block.text}
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": self._logprobs}

    def _told(self, positions: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        return [
            token_record(self._tokens, position.token, position.logprob)
            | {"top_logprobs": [token_record(self._tokens, *each) for each in with_own(position)]}
            for position in positions
        ]
