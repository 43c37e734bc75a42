"""Several speculative runs at a time, in the stages of a pipeline."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.drafters.ngram import Ngram


@policy("speculate.drafter", "pipelined", papers=[10])
class Pipelined(Ngram):
    """Prompt look-up whose drafts are verified in several runs, one behind the other in a pipeline (PipeInfer).

    For one request, or few, with ``pipeline_parallel``: a token takes its way through all stages, and those that have
    done their part have nothing to do. From the paper: the newest token goes through the pipeline in a run of its own,
    as fast as without speculation; speculative runs follow it closely, each in another stage; and as soon as a token
    turns out not to be what was drafted, what is behind it is cancelled, and stages that have not begun with it skip
    it. Ours: drafts come out of the text, and there are as many speculative runs as there are stages beside the one
    that the newest token is in, so that the first stage is free again when that token is known: where nothing is
    accepted, nothing is lost, as long as a run of several tokens takes a stage no longer than one of one token. Not
    built: a draft model on a node of its own, and runs that go on behind those of a step before it is settled. On one
    device, all that is drafted is verified in one run, as that of ``ngram`` is.

    Attributes:
        run: how many drafted tokens a speculative run has; more, where more are drafted than fit into the runs.
    """

    run: Annotated[int, Field(ge=1, le=64)] = 4

    @property
    def branches(self) -> bool:
        return False

    @property
    def tokens_of_run(self) -> int | None:
        return self.run
