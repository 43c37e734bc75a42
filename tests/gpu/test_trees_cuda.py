"""Trees of drafts on a GPU: the text is that of plain decoding, and what was accepted lies where it belongs."""

from __future__ import annotations

import copy

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.medusa import Medusa
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.speculate.drafters.head import Head
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.serve_model import draft_of, head_of

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)


def model() -> Decoder:
    with torch.device("cuda"):
        made = Decoder(SHAPE)
    return made.initialize(0).to("cuda", torch.bfloat16).eval()


def told(engine) -> dict[str, list[int]]:
    """What an engine says to some prompts that repeat themselves, greedily and not."""
    texts: dict[str, list[int]] = {}
    for number in range(16):
        prompt = [(7 * number + place % (3 + number)) % SHAPE.vocabulary for place in range(60 + number)]
        sampling = SamplingParams(temperature=0.5 * (number % 2), seed=number, max_tokens=40, ignore_eos=True)
        engine.add(Request(str(number), prompt, sampling))
    while engine.busy:
        for delta in engine.step():
            texts.setdefault(delta.id, []).extend(delta.tokens)
    assert {len(text) for text in texts.values()} == {40} and len(texts) == 16
    return texts


def options(**more):
    return EngineConfig.model_validate({"sequences": 16, "memory": 0.5, "controller": "fixed", "check": True, **more})


@pytest.mark.parametrize("verifier", ["exact_match", "recursive_distinct", "k_seq", "importance", "greedy_drafts"])
def test_one_way_of_what_a_model_drafts_for_itself_is_nearly_always_right(verifier):
    """Not always: a pass for several tokens of a sequence rounds otherwise than one for one."""
    target = model()
    drafter = Model(source="itself", tokens=4)
    engine = build_engine(
        target, options(draft=drafter, draft_tree=(3, 2), verifier=verifier), draft=copy.deepcopy(target)
    )
    told(engine)
    now = engine.snapshot()
    assert sum(now.accepted_at) > 0.8 * sum(now.drafted_at) > 0


@pytest.mark.parametrize("kind", ["model", "ngram", "exit", "medusa"])
def test_keys_and_values_of_what_was_accepted_are_those_of_a_clean_run(kind):
    """A wrong place would be off by the size of the numbers; rounding in bf16 is far below that."""
    target = model()
    drafter = {"ngram": Ngram(shortest=1), "model": Model(source="a model", tokens=4)}.get(kind, Head(source="a head"))
    draft = {"ngram": lambda: None, "model": lambda: draft_of(target, 0.02), "exit": lambda: head_of(target)}.get(
        kind, lambda: head_of(target, Medusa(heads=3))
    )()
    engine = build_engine(target, options(draft=drafter, draft_tree=(3, 2), loop="plain"), draft=draft)
    prompt = [place % 5 for place in range(100)]
    engine.add(Request("drafted", prompt, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)))
    text = list(prompt)
    while engine.busy:
        for delta in engine.step():
            text += delta.tokens
    now, cache, size = engine.snapshot(), engine.executor.cache, engine.executor.block_size
    assert now.drafted_tokens > now.accepted_tokens

    def contents() -> list[torch.Tensor]:
        blocks = torch.tensor(engine.memory.pool.match(text, len(text)))
        assert len(blocks) >= (len(text) - 1) // size - 1
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()
        hidden = engine.executor.hidden
        kept = [] if hidden is None else [hidden._states.flatten(0, 1)[slots.cuda()]]
        return [each.float().clone() for each in (*cache.read(slots), *kept)]

    drafted = contents()
    engine.memory.pool.forget()
    engine.add(Request("clean", text, SamplingParams(temperature=0, max_tokens=1, drafts=False)))
    while engine.busy:
        engine.step()
    for own, clean in zip(drafted, contents(), strict=True):
        wrong = (own - clean).abs().mean() / clean.abs().mean()
        assert wrong < 0.02, f"off by {wrong:.3f} of the size of the numbers"
