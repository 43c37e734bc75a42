"""Chats that are answered by a search."""

from __future__ import annotations

import json
from typing import Any

from penstock.core.errors import UsageError, nearest
from penstock.serve.http.errors import ApiError
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.guided import GUIDED
from penstock.serve.http.protocol.searches import SearchField
from penstock.serve.http.service import Generation, Piece, Service
from penstock.serve.http.shapes.chats import Chats
from penstock.serve.http.shapes.choices import head
from penstock.serve.link.wire import Errand

#: Where the engine's process finds who searches.
GUEST = "penstock.search.guest"

#: Fields that do not go with a search.
ALONE = ("stream", "logprobs", "contexts", "tools", "prompt_logprobs", "rule", "return_token_ids", *GUIDED)


async def searched(service: Service, generation: Generation, shapes: Chats, body: Chat) -> dict[str, Any]:
    """The response to a chat with the field ``search``: its only choice is what the search found, its usage counts all
    tokens that were spent, and ``search`` has the ledger.

    Raises:
        ApiError: what is asked for does not go together, is not offered, or the program failed.
    """
    assert body.search is not None
    service.check_alone(body.model, "searches")
    check(service, body, body.search)
    request, wanted = generation.requests[0], body.search
    work = {
        "program": {**wanted.options, "name": wanted.program},
        "scorer": wanted.scorer,
        "budget": wanted.budget,
        "unit": wanted.unit,
        "step": wanted.step,
        "problem": wanted.problem,
    }
    service.admit(1)
    service.live[generation.id] = generation
    try:
        record = json.loads(await service.engine.run(Errand(request, GUEST, json.dumps(work))))
        generation.outcome = "stop" if record["error"] is None else "error"
    except UsageError as error:
        raise ApiError(400, str(error), param="search") from error
    finally:
        del service.live[generation.id]
        service.metrics.outcomes.labels(generation.outcome).inc()
    if record["error"] is not None:
        raise ApiError(400, f"the program {wanted.program!r} failed: {record['error']}", param="search")
    whole = record["finished"] and len(record["tokens"]) < request.sampling.max_tokens
    ledger, usage = record["ledger"], generation.usage
    usage.prompt, usage.completion = ledger["prompt"], ledger["generated"]
    piece = Piece(0, record["text"], [], None, None, "stop" if whole else "length")
    return head(generation, shapes.whole) | {
        "choices": [shapes.choice(piece)],
        "usage": usage.record(),
        "search": {name: record[name] for name in ("answer", "score", "exhausted", "notes", "ledger")},
    }


def check(service: Service, body: Chat, wanted: SearchField) -> None:
    """Refuses a search that does not go with the rest of the request, or that the server does not offer.

    Raises:
        ApiError: it is refused.
    """
    if body.n > 1:
        raise ApiError(400, "a search has one answer: leave out n", param="n")
    for name in ALONE:
        if getattr(body, name):
            raise ApiError(400, f"a search is answered without {name}: leave it out", param=name)
    limits = service.limits
    if wanted.budget > limits.search:
        raise ApiError(400, f"a search may spend {limits.search:,} tokens here at most", param="search")
    if wanted.scorer is not None and wanted.scorer not in limits.scorers:
        what = f"the scorer {wanted.scorer!r} is not offered here: {nearest(wanted.scorer, limits.scorers)}"
        raise ApiError(400, what, param="search")
