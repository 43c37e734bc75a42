"""Who drafts for a model that is served, and how what is drafted is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any

import torch

from penstock.core.errors import UsageError
from penstock.models.acceptance import folder as acceptance
from penstock.models.acceptance.head import AcceptanceHead
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Continues, HeadModule, Prompts
from penstock.serve.choose.confidence import ConfidentBranchingSampler, ConfidentProposingSampler, ConfidentSampler
from penstock.serve.choose.proposals import BranchingSampler, ProposingSampler
from penstock.serve.choose.sampler import Sampler
from penstock.serve.config import EngineConfig
from penstock.serve.run.cascade import CascadeDraft, spare_blocks
from penstock.serve.run.chains import Chains
from penstock.serve.run.draft import ConfidentDraft, Drafting, DraftModel, DraftPlanner, PredictingDraft
from penstock.serve.run.heads import ContinuingDraft, ContinuingRunner, draft_with
from penstock.serve.run.runner import Runner
from penstock.serve.run.superposed import SuperposedModel, SuperposedSampler
from penstock.serve.run.trees import Trees
from penstock.speculate.contract import Drafter


def check_drafting(
    config: EngineConfig, draft: Decoder | HeadModule | None, predictor: AcceptanceHead | None, device: torch.device
) -> None:
    """Refuses a ``draft`` that does not draft on ``device`` as ``config`` has it.

    Raises:
        UsageError: the head drafts otherwise, what predicts is not there, or the drafter is for another device.
    """
    if config.draft_tree and isinstance(draft, Continues):
        raise UsageError(
            "this head goes on from its own hidden states and drafts a chain, no tree",
            hint="Leave draft_tree out, or draft with a model, a head of another kind, or ngram.",
        )
    if config.draft is None:
        return
    if isinstance(draft, HeadModule):
        _check_head(config.draft, draft)
    drafts = isinstance(draft, Decoder) and config.draft.model is not None
    if config.controller.predicts and drafts and predictor is None:
        raise UsageError(
            f"the controller {config.controller.policy_name!r} needs a head that predicts what is accepted",
            hint=f"Train one: {acceptance.command()}",
        )
    if config.draft.meanwhile and device.type == "cuda":
        raise UsageError(
            f"{config.draft.policy_name!r} drafts while layers are read from disk, which is for a CPU",
            hint="Draft with the same model, by its name, or serve with --device cpu.",
        )


def _check_head(drafter: Drafter, head: HeadModule) -> None:
    """Refuses a ``drafter`` that does not draft with this ``head``."""
    prompts = head.reach if isinstance(head, Prompts) else 0
    if bool(prompts) != bool(drafter.widths):
        raise UsageError(
            f"the drafter {drafter.policy_name!r} does not draft with a head of this kind",
            hint="Name the head's folder alone as the drafter, and the one that drafts with it is taken.",
        )
    if prompts < len(drafter.widths):
        raise UsageError(
            f"the head has {prompts} prompt tokens, and {len(drafter.widths)} tokens are to be drafted ahead",
            hint=f"Set draft.tokens={prompts}, or train a head with more: --set head.tokens={len(drafter.widths)}",
        )


def drafting_of(
    runners: List[Runner], config: EngineConfig, head: HeadModule | None, predictor: AcceptanceHead | None
) -> Drafting | None:
    """Who drafts: the second of ``runners``, with the ``predictor`` of what is accepted, or the ``head`` of the first;
    None where there is neither."""
    if runners[1:] and isinstance(runners[1], ContinuingRunner):
        return ContinuingDraft(runners[1], runners[0], config.verifier, config.budget(runners[1].device))
    if predictor is not None:
        return PredictingDraft(runners[1], config.verifier, config.budget(runners[1].device), predictor)
    if config.draft is not None and config.draft.superposes:
        return SuperposedModel(runners[1], config.verifier, config.budget(runners[1].device), config.draft.superposes)
    growth = Trees() if config.draft_tree else Chains()
    if head is not None:
        return draft_with(head, runners[0], config.verifier, growth, config.sequences, **drafting_kind(config))
    if not runners[1:]:
        return None
    given = runners[1], config.verifier, growth, config.budget(runners[1].device)
    if config.draft is not None and config.draft.meanwhile:
        return CascadeDraft(*given, slots=config.sequences, rows=config.rows)
    return (ConfidentDraft if config.controller.by_confidence else DraftModel)(*given)


def drafting_kind(config: EngineConfig) -> dict[str, Any]:
    """How what a model or head drafts is chosen."""
    # By the draws of the target, where what is drafted has to be what it chooses; else by others, since a verifier
    # takes drafts for independent of its own draws.
    stream = "sample" if config.verifier.matches else "draft"
    told = config.controller.weighs or not config.verifier.matches
    planner = functools.partial(DraftPlanner, stream=stream)
    sure = config.controller.by_confidence
    sampler: Callable[..., Sampler] = ConfidentSampler if sure else Sampler
    if told:
        sampler = ConfidentProposingSampler if sure else ProposingSampler
    if config.draft is not None and config.draft.superposes:
        sampler = functools.partial(SuperposedSampler, drafts=config.draft.superposes)
    branches = config.draft_tree or (config.draft.widths if config.draft is not None else ())
    if branches:
        kind = ConfidentBranchingSampler if sure else BranchingSampler
        sampler = functools.partial(kind, branches=branches, verifier=config.verifier)
    return {"sampler": sampler, "planner": planner}


def spare(config: EngineConfig) -> int:
    """How many blocks the model that drafts has for each slot beside those of sequences."""
    meanwhile = config.draft is not None and config.draft.meanwhile
    return spare_blocks(config.rows, config.block_size) if meanwhile else 0


def tokens_of_run(config: EngineConfig) -> int | None:
    """How many drafted tokens of a sequence go through a pipeline in a run of their own; None where there are none."""
    return None if config.draft is None else config.draft.tokens_of_run
