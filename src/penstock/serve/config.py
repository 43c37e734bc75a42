"""The settings of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ByteSize, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from penstock.core.config import Config
from penstock.core.errors import ConfigError, UsageError, nearest
from penstock.models import hub
from penstock.models.acceptance import folder as acceptance
from penstock.models.heads import folder as heads
from penstock.ops.paged.codecs.contract import Codec, LearnedCodec
from penstock.ops.paged.codecs.plain import Plain as PlainCodec
from penstock.ops.paged.contract import PagedAttention
from penstock.ops.paged.residual import Residual
from penstock.policy import Choice, index, lookup
from penstock.serve.batching.contract import Batching
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.engine.loops.contract import Loop
from penstock.serve.engine.loops.overlapped import Overlapped
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.evictions.lru import LeastRecentlyUsed
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.kv.reuse.contract import Reuse
from penstock.serve.kv.reuse.prefix import PrefixReuse
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Controller
from penstock.speculate.controllers.measured import Measured
from penstock.speculate.drafting import Drafting
from penstock.speculate.tree import MOST, depths, full
from penstock.speculate.verifiers.contract import Verifier
from penstock.speculate.verifiers.exact_match import ExactMatch


class EngineConfig(Config):
    """How an engine works.

    Attributes:
        batching: forms the batch of each step.
        loop: in which order scheduling, computing and publishing follow each other.
        attention: attention over the cache; None picks the best that serves the device.
        codec: how keys and values lie in the cache's blocks; in fewer bits, the same memory holds more tokens.
        resident_weights: most bytes of weights in memory, such as ``8GB``, for a model that is larger: layers that do
            not fit are read from disk in each pass, on a CPU. None has the whole model in memory.
        dtype: of weights, and of a plain cache; ``auto`` is bf16 on CUDA devices that have units for it, else fp32.
        tokens: the token budget of a step, at least ``sequences``, so that all of them can go on in one; None is 8,192
            on CUDA, which such a step keeps busy, and 2,048 on the CPU.
        sequences: most sequences that run at a time.
        block_size: tokens of a block of the cache.
        eviction: the order in which blocks of the cache go that hold the prefix of a text and that no sequence holds.
        kv_host: bytes of the host's memory for blocks that leave the cache, such as ``8GB``; they come back from there
            when they are wanted again.
        kv_disk: a folder for them, which is used again after a restart; what comes from disk goes through ``kv_host``.
        kv_disk_size: most bytes of that folder.
        cache_tokens: tokens for which the cache has room; None sizes it by ``memory``.
        memory: share of the device's memory that may be in use, by weights, cache, graphs, the largest steps, and
            whoever else is there; on the CPU, half as large a share of what is free is for the cache.
        context: most tokens of a sequence; None takes the model's own limit.
        draft: drafts tokens ahead, which one pass then checks together: a drafter such as ``ngram``, a smaller model (a
            folder, a boxed model, a hub name), or the folder of a head; None computes one token a sequence a step.
        draft_tree: how many drafts each place has, by depth, one behind the last: 3, 2 drafts three tokens behind the
            newest one, two behind each of these, and one behind each of those. Nothing is a chain.
        verifier: says which drafted tokens stay.
        controller: decides how many are drafted.
        kv: what the cache of a sequence keeps.
        kv_reuse: how contexts are encoded that requests name beside their prompts, and what of them is reused.
        compile: on CUDA, compile the model and capture steps as graphs at the start, those that decode and those whose
            prompts the device computes as fast as the host queues them: tens of seconds that make every step shorter.
        deterministic: compute each request with the same bits whatever else is in the batch, however its prompt is cut
            and shared, and also after a preemption. It costs the choice of the fastest kernel for each batch, and on
            CUDA the compiled pass and its graphs.
        record: a file for all steps, for bug reports and benchmarks; it holds the tokens of all requests. See
            :mod:`penstock.serve.run.record`.
        tensor_parallel: how many ranks divide the model among them, each a process with a device of its own (on the
            CPU, with its share of the cores). They compute every step together; what each has of weights and cache is
            its share.
        pipeline_parallel: how many ranks have neighbouring layers of the model each, with their part of the cache. As
            many steps are under way at a time, each of other sequences.
        adapters: folders of LoRA adapters that PEFT has written, by the names that requests choose them by.
        adapter_slots: room for so many adapters at a time, with those that are loaded later; for those of ``adapters``
            there is room in any case.
        adapter_rank: the highest rank of an adapter; None takes the highest of ``adapters``, or 16 without any.
        adapter_targets: the matrices that adapters may add to, as their names end, such as ``q_proj``; nothing takes
            those that ``adapters`` add to, or all of attention and of dense feed-forward blocks without any.
        check: compare the cache's books with the sequences after every step.
    """

    batching: Annotated[Batching, Choice("serve.batching")] = Sarathi()
    loop: Annotated[Loop, Choice("serve.loop")] = Overlapped()
    attention: Annotated[PagedAttention, Choice("attention.paged")] | None = None
    codec: Annotated[Codec, Choice("kv.codec")] = PlainCodec()
    resident_weights: ByteSize | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    tokens: PositiveInt | None = None
    sequences: PositiveInt = 256
    block_size: PositiveInt = 16
    eviction: Annotated[Eviction, Choice("kv.eviction")] = LeastRecentlyUsed()
    kv_host: ByteSize | None = None
    kv_disk: Path | None = None
    kv_disk_size: ByteSize = ByteSize(64 * 10**9)
    cache_tokens: PositiveInt | None = None
    memory: Annotated[float, Field(gt=0, le=1)] = 0.85
    context: PositiveInt | None = None
    draft: Annotated[Drafter, Choice("speculate.drafter")] | None = None
    draft_tree: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(max_length=16)] = ()
    verifier: Annotated[Verifier, Choice("speculate.verifier")] = ExactMatch()
    controller: Annotated[Controller, Choice("speculate.controller", "measured")] = Measured()
    kv: Annotated[CachePolicy, Choice("kv.policy")] = Full()
    kv_reuse: Annotated[Reuse, Choice("kv.reuse")] = PrefixReuse()
    compile: bool = True
    deterministic: bool = False
    record: Path | None = None
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    adapters: dict[str, Path] = Field(default_factory=dict)
    adapter_slots: NonNegativeInt = 0
    adapter_rank: PositiveInt | None = None
    adapter_targets: tuple[str, ...] = ()
    check: bool = False

    @field_validator("draft", mode="before")
    @classmethod
    def _model_that_drafts(cls, draft: Any) -> Any:
        """What is no drafter is a head's folder, or a model; of a table, the ``name`` may be one."""
        table = {"name": draft} if isinstance(draft, str | Path) else draft
        name = table.get("name") if isinstance(table, Mapping) else None
        if not isinstance(name, str | Path):
            return draft
        if index().find("speculate.drafter", str(name)) is not None:
            source = lookup("speculate.drafter", str(name)).model_fields.get("source")
            if source is not None and source.is_required() and "source" not in table:
                raise ConfigError(
                    f"the drafter {str(name)!r} drafts with a model or a head, and none is named",
                    hint="Name that itself, as in --draft FOLDER or draft='FOLDER'; or beside the drafter, as in "
                    f"--draft {name} --set draft.source=FOLDER.",
                )
            return draft
        if table.get("source", str(name)) != str(name):
            raise UsageError(
                f"two models or heads are to draft, {str(name)!r} and {str(table['source'])!r}",
                hint="Name a drafter, such as model, and its source; or the model alone.",
            )
        return {**table, **_drafting(name)}

    @field_validator("draft_tree", mode="before")
    @classmethod
    def _as_text(cls, tree: Any) -> Any:
        """On the command line it is text: ``3,2``."""
        if not isinstance(tree, str):
            return tree
        return tree.split(",") if tree.strip() else []

    @field_validator("draft_tree")
    @classmethod
    def _no_more_than_it_says(cls, tree: tuple[int, ...]) -> tuple[int, ...]:
        """One draft for a place is what there is without saying so."""
        while tree[-1:] == (1,):
            tree = tree[:-1]
        return tree

    @model_validator(mode="before")
    @classmethod
    def _one_engine(cls, tree: Any) -> Any:
        """What is said of several engines is no option of one."""
        for option in ("replicas", "routing", "restarts"):
            if isinstance(tree, Mapping) and option in tree:
                raise ValueError(
                    f"{option} is for several engines behind one address, and these are the options of one: serve them "
                    "with penstock serve MODEL --replicas N, and send requests there"
                )
        return tree

    @model_validator(mode="after")
    def _of_use(self) -> EngineConfig:
        """Options that say more of another one, without which nobody would heed them."""
        drafts, adapts = self.draft is not None, bool(self.room_for_adapters)
        heeded = {
            "controller": (drafts, "draft", "says how many tokens are drafted, and nothing drafts: set draft=ngram"),
            "verifier": (drafts, "draft", "says which drafted tokens stay, and nothing drafts: set draft=ngram"),
            "kv_disk_size": (self.kv_disk is not None, "kv_disk", "is of a folder that is not named: set kv_disk"),
            "adapter_rank": (adapts, "adapters", "is of adapters, and there is no room for any: set adapter_slots"),
            "adapter_targets": (adapts, "adapters", "is of adapters, and there is no room for any: set adapter_slots"),
        }
        for option, (use, other, reason) in heeded.items():
            # A program that tells all options to another one, tells those too that nobody chose.
            chosen = option in self.model_fields_set and other not in self.model_fields_set
            if not use and (chosen or getattr(self, option) != type(self).model_fields[option].default):
                raise ValueError(f"{option} {reason}, or leave it out")
        return self

    @model_validator(mode="after")
    def _all_can_go_on(self) -> EngineConfig:
        if self.tokens is not None and self.tokens < self.sequences:
            raise ValueError(f"a budget of {self.tokens} tokens a step cannot serve {self.sequences} sequences")
        return self

    @model_validator(mode="after")
    def _invariant(self) -> EngineConfig:
        if self.deterministic and self.attention is not None and self.attention.policy_name != "invariant":
            raise ValueError(f"deterministic needs the attention 'invariant', not {self.attention.policy_name!r}")
        return self

    @model_validator(mode="after")
    def _tiers(self) -> EngineConfig:
        if self.kv_disk is not None and not self.kv_host:
            raise ValueError("kv_disk needs kv_host: what comes from disk goes through the host's memory")
        if self.kv_host and self.record is not None:
            raise ValueError(
                "record needs an engine without kv_host: a recording has no blocks that come back from there"
            )
        return self

    @model_validator(mode="after")
    def _verifiable(self) -> EngineConfig:
        verifier, most = self.verifier, max(self.draft_tree, default=1)
        if verifier.matches or (self.draft is not None and self.draft.widths):
            return self
        if self.draft is not None and self.draft.superposes:
            raise ValueError(
                f"{self.draft.policy_name!r} drafts the likeliest texts, and {verifier.policy_name!r} is for drafts "
                "that are drawn: leave the verifier out"
            )
        if verifier.most != 1 and most == 1:
            raise ValueError(
                f"one token is drafted for a place, and {verifier.policy_name!r} is for several: set draft_tree, "
                "such as 3,2"
            )
        if verifier.most is not None and verifier.most < most:
            raise ValueError(
                f"draft_tree drafts {most} tokens for a place, and {verifier.policy_name!r} is for {verifier.most}"
            )
        for option in ("deterministic", "record"):
            if getattr(self, option):
                raise ValueError(f"{option} needs the verifier 'exact_match', by which tokens do not depend on drafts")
        return self

    @model_validator(mode="after")
    def _drafted_from_whole_texts(self) -> EngineConfig:
        drafts = self.draft is not None and (self.draft.model or self.draft.head) is not None
        if drafts and not self.kv.dense:
            raise ValueError(
                f"a model or head that drafts reads what the cache has in every place, and {self.kv.policy_name!r} "
                "keeps or reads a part, by what the model attends to: draft with 'ngram', or serve with the full cache"
            )
        return self

    @model_validator(mode="after")
    def _controllable(self) -> EngineConfig:
        reason = None if self.draft is None else self.controller.refuses(self.draft, bool(self.draft_tree))
        if reason is not None:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _contexts_apart(self) -> EngineConfig:
        if self.kv_reuse.plain:
            return self
        if not self.kv.dense:
            raise ValueError(
                f"kv_reuse = {self.kv_reuse.policy_name} takes what contexts have in the cache, and kv = "
                f"{self.kv.policy_name} does not keep it as it is, or does not read it whole: choose one of them"
            )
        if self.record is not None:
            raise ValueError(
                "record needs kv_reuse = prefix: a recording has no contexts that are encoded apart, or moved"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> EngineConfig:
        """What one rank would do by itself, or in an order of its own, or has only a share of what it needs for."""
        drafts = self.draft is not None and (self.draft.model or self.draft.head) is not None
        alone = {
            "draft by a model or head": drafts,
            "deterministic": self.deterministic,
            "kv_host": bool(self.kv_host),
            "record": self.record is not None,
            f"kv = {self.kv.policy_name}": not self.kv.dense,
            f"kv_reuse = {self.kv_reuse.policy_name}": not self.kv_reuse.plain,
            f"codec = {self.codec.policy_name}": isinstance(self.codec, LearnedCodec),
        }
        for option, wanted in alone.items():
            if wanted and self.ranks > 1:
                way = "tensor_parallel" if self.tensor_parallel > 1 else "pipeline_parallel"
                raise ValueError(f"{option} is for a model on one device: leave it out, or {way}")
        return self

    @model_validator(mode="after")
    def _in_stages(self) -> EngineConfig:
        """What stages do not go together with."""
        if self.pipeline_parallel == 1:
            return self
        if self.tensor_parallel > 1:
            raise ValueError(
                "tensor_parallel divides each layer among all ranks, and pipeline_parallel gives each rank its own "
                "layers: choose one of them"
            )
        if self.room_for_adapters:
            raise ValueError(
                "a stage has room for adapters of its own layers alone, for which they are not cut: leave out "
                "pipeline_parallel, or merge the adapter"
            )
        return self

    @model_validator(mode="after")
    def _adapted(self) -> EngineConfig:
        reasons = {
            "deterministic": "what adapters add is computed for all rows of an adapter together",
            "record": "a recording has no adapters to compute its steps with",
        }
        for option, reason in reasons.items():
            if getattr(self, option) and self.room_for_adapters:
                raise ValueError(f"{option} needs an engine without adapters: {reason}")
        return self

    @model_validator(mode="after")
    def _streamable(self) -> EngineConfig:
        whole = {
            "tensor_parallel": self.tensor_parallel > 1,
            "pipeline_parallel": self.pipeline_parallel > 1,
            "adapters": bool(self.room_for_adapters),
            "kv_disk": self.kv_disk is not None,
        }
        for option, wanted in whole.items():
            if wanted and self.resident_weights is not None:
                raise ValueError(f"{option} needs all weights in memory: leave it out, or resident_weights")
        return self

    @model_validator(mode="after")
    def _branching(self) -> EngineConfig:
        if not self.draft_tree:
            return self
        if self.draft is None:
            raise ValueError("draft_tree says how a drafter branches, and there is none: set draft, such as ngram")
        if not self.draft.branches:
            kind = "shapes its trees itself" if self.draft.widths or self.draft.superposes else "drafts chains"
            raise ValueError(f"the drafter {self.draft.policy_name!r} {kind}: leave draft_tree out")
        ahead = self.draft.most
        if max(depths(full(self.draft_tree, ahead, MOST)), default=0) < ahead:
            raise ValueError(
                f"draft_tree comes to more than the {MOST} tokens that a tree may have, where {ahead} are drafted "
                "ahead: draft fewer ahead, or fewer for each place"
            )
        for reason in self._against_trees():
            raise ValueError(f"{reason}: leave draft_tree out")
        return self

    @model_validator(mode="after")
    def _superposing(self) -> EngineConfig:
        """What a drafter of several texts does not go together with."""
        if self.draft is not None and self.draft.superposes > 1:
            for reason in self._against_trees():
                raise ValueError(f"{reason}: set draft.drafts=1, or draft with another drafter")
        return self

    def _against_trees(self) -> Iterator[str]:
        """Why steps with masks cannot be had with these settings."""
        reasons = {
            "deterministic needs tokens in a row": self.deterministic,
            "a model divided among ranks verifies chains": self.ranks > 1,
            "trees need the cache's codec 'plain'": not isinstance(self.codec, PlainCodec),
            f"{self.kv.policy_name!r} compresses the cache": self.kv.compresses,
            f"{self.kv.policy_name!r} reads blocks of tokens in a row": self.kv.selection is not None,
        }
        yield from (reason for reason, holds in reasons.items() if holds)

    @model_validator(mode="after")
    def _probing(self) -> EngineConfig:
        """What a drafter that probes, and shapes its trees itself, does not go together with."""
        if self.draft is None or not self.draft.widths:
            return self
        name, most, verifier = self.draft.policy_name, max(self.draft.widths), self.verifier
        for reason in self._against_trees():
            raise ValueError(f"{reason}: draft with another drafter than {name!r}")
        if self.record is not None:
            raise ValueError(f"record needs another drafter than {name!r}: a recording has no probes")
        if not verifier.matches and most > 1 and verifier.most is not None and verifier.most < most:
            raise ValueError(
                f"{name!r} drafts up to {most} tokens for a place, and {verifier.policy_name!r} is for "
                f"{verifier.most}: set draft.drafts={verifier.most}"
            )
        if verifier.drafting is Drafting.GREEDY and not verifier.matches and most > 1:
            raise ValueError(
                f"{name!r} drafts fewer tokens for a place where more do not pay, and {verifier.policy_name!r} needs "
                "all of them: take another verifier, such as recursive_distinct"
            )
        return self

    @model_validator(mode="after")
    def _windows(self) -> EngineConfig:
        """What windows in full precision do not go together with."""
        if not self.codec.residual:
            return self
        reasons = {
            "the codec 'plain' has all tokens in full precision": isinstance(self.codec, PlainCodec),
            "deterministic engines have no attention for it": self.deterministic,
            "a model divided among ranks has none": self.ranks > 1,
            "trees need the cache's codec 'plain'": bool(self.draft_tree),
            "what drafts here has a cache of its own, or probes": self.draft is not None
            and bool(self.draft.model or self.draft.head or self.draft.widths),
            f"kv_reuse = {self.kv_reuse.policy_name} takes tokens without their windows": not self.kv_reuse.plain,
            f"kv = {self.kv.policy_name} reads blocks by keys that stay as they are": self.kv.selection is not None,
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            raise ValueError(f"codec.residual keeps the newest tokens in full precision, and {reason}: leave it out")
        return self

    @property
    def residual(self) -> Residual | None:
        """The windows in full precision, in whole blocks."""
        if not self.codec.residual:
            return None
        tokens, tentative = (
            -(-each // self.block_size) * self.block_size for each in (self.codec.residual, self.rows - 1)
        )
        return Residual(tokens, self.sequences, tentative)

    @property
    def ranks(self) -> int:
        """How many processes compute together."""
        return max(self.tensor_parallel, self.pipeline_parallel)

    @property
    def tree(self) -> tuple[int, ...]:
        """How many drafts each place has, by depth, one behind the last; none where a chain is drafted, or the drafter
        shapes trees that it probes for."""
        drafts = 0 if self.draft is None else self.draft.superposes
        return (drafts,) if drafts > 1 else self.draft_tree

    @property
    def rows(self) -> int:
        """The most rows of a sequence that goes on in a step: its newest token, what is drafted, and probes."""
        if self.draft is None:
            return 1
        return 1 + (self.draft.rows or len(full(self.tree, self.draft.most, MOST)))

    @property
    def room_for_adapters(self) -> int:
        """How many there may be at a time."""
        return max(self.adapter_slots, len(self.adapters))

    def budget(self, device: torch.device) -> int:
        """``tokens``, or what it is on ``device`` where it is not set."""
        return self.tokens or max(8192 if device.type == "cuda" else 2048, self.sequences)


def _drafting(name: str | Path) -> dict[str, Any]:
    """The drafter that drafts with the head or the model ``name``.

    Raises:
        UsageError: there is none.
    """
    here = {*hub.boxed_models(), *hub.PACKAGED}
    if heads.find(name) is not None:
        return {"name": heads.drafter_of(name), "source": str(name)}
    if acceptance.find(name) is not None:
        raise UsageError(
            f"{str(name)!r} is an acceptance head, which drafts nothing: it says how long a model's drafts are to be",
            hint=f"Draft with a model: --draft MODEL --controller specdec_pp --set controller.head={name}",
        )
    if str(name) in here or "/" in str(name) or Path(name).exists():
        return {"name": "model", "source": str(name)}
    known = {*here, *index().names("speculate.drafter")} - {"model", "head"}
    raise UsageError(
        f"nothing drafts that is called {str(name)!r}: {nearest(str(name), known)}",
        hint="Name a drafter such as ngram, a smaller model (a folder, a boxed model, org/name), or a head.",
    )
