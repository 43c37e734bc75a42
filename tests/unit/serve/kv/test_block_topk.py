"""Block top-k attention beside its rule in float64, and what the engine makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError, UsageError
from penstock.models.decoder import Decoder
from penstock.ops.paged.selection import BlockSelection
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.policies.block_topk import BlockTopK
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.messages import Request
from penstock.testing.paged_scene import attention
from penstock.testing.reference import greedy
from penstock.testing.serve_model import SHAPE, small_model

PROMPT = [(7 * place + place * place) % 50 for place in range(30)]


def engine_of(kv: CachePolicy, **options: object) -> Engine:
    fields = {"sequences": 4, "block_size": 4, "cache_tokens": 400, "check": True, "attention": "reference"}
    return build_engine(small_model(), EngineConfig.model_validate({"kv": kv, **fields, **options}))


def told(engine: Engine, asked: dict[str, list[int]], count: int = 20, **sampling: object) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for id, prompt in asked.items():
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True).model_copy(update=sampling)
        engine.add(Request(id, prompt, params))
    while engine.busy:
        for delta in engine.step():
            found.setdefault(f"{delta.id}.{delta.index}", []).extend(delta.tokens)
    return found


def by_the_rule(selection: BlockSelection, query: torch.Tensor, keys: torch.Tensor, place: int) -> list[list[int]]:
    """The tokens that the one at ``place`` reads, by KV head: ``query`` [H, D], ``keys`` [S, K, D], in float64."""
    size, own = selection.block, place // selection.block
    budget = selection.budget * (place + 1) if selection.budget <= 1 else selection.budget
    count = max(-(-budget // size), selection.first + selection.newest)
    found = []
    for head in range(keys.shape[1]):
        group = query.view(keys.shape[1], -1, query.shape[-1])[head]
        always = {block for block in range(own + 1) if block < selection.first or block > own - selection.newest}
        others = sorted(set(range(own + 1)) - always)
        worth = {}
        for block in others:
            mean = sum(keys[block * size + inside, head] for inside in range(size)) / size
            worth[block] = max(float(each @ mean) for each in group)
        best = sorted(others, key=lambda block: (-worth[block], block))[: max(0, int(count) - len(always))]
        read = sorted(always | set(best))
        found.append([token for block in read for token in range(block * size, min((block + 1) * size, place + 1))])
    return found


@given(
    seed=st.integers(0, 99),
    block=st.integers(1, 5),
    budget=st.sampled_from([0.2, 0.5, 1.0, 6, 13]),
    first=st.integers(0, 2),
    newest=st.integers(1, 3),
    begin=st.integers(0, 20),
)
def test_tokens_attend_to_what_the_rule_reads(seed, block, budget, first, newest, begin):
    """And to nothing else, whatever is computed together; a count of it is what the price says."""
    selection = BlockSelection(block, budget, first, newest)
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(24, 2, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    query = torch.randn(24 - begin, 4, 8, generator=draw, dtype=torch.float64)
    found = selection.attend(query, keys, values, begin, 0.4)
    for row, place in enumerate(range(begin, 24)):
        for head, tokens in enumerate(by_the_rule(selection, query[row], keys, place)):
            mask = torch.zeros(1, 24, dtype=torch.bool)
            mask[0, tokens] = True
            own = slice(2 * head, 2 * head + 2)
            rows = (query[row : row + 1, own], keys[:, head : head + 1], values[:, head : head + 1])
            torch.testing.assert_close(found[row, own], attention(*rows, mask, scale=0.4)[0])
            assert selection.reads(place + 1)[0] == len(tokens)


@given(place=st.integers(0, 62), seed=st.integers(0, 20))
def test_a_planted_needle_is_read(place, seed):
    """Of 64 tokens in blocks of 4, of which 16 are read, one that a query head likes far more than the others."""
    draw = torch.Generator().manual_seed(seed)
    keys, query = (torch.randn(count, heads, 8, generator=draw) for count, heads in ((64, 2), (1, 4)))
    keys[place] = 80 * torch.nn.functional.normalize(query[0, 1::2], dim=-1)
    blocks = BlockSelection(4, 16, 1, 1).chosen(query, keys, 63)
    assert blocks.shape == (1, 2, 4) and (blocks == place // 4).any(-1).all()


def test_of_equal_blocks_the_earlier_is_read():
    keys, query = torch.ones(40, 1, 8), torch.ones(1, 2, 8)
    assert BlockSelection(4, 20, 1, 1).chosen(query, keys, 39).tolist() == [[[0, 1, 2, 3, 9]]]


def test_what_is_decoded_reads_less_and_all_stays():
    """The prompt is read whole; the text differs from that of dense attention only behind it, and nothing is let go."""
    engine = engine_of(BlockTopK(budget=8, block=4, newest=1))
    found = told(engine, {"a": PROMPT})["a.0"]
    dense = greedy(small_model(), PROMPT, 20)
    assert found[0] == dense[0] and found != dense
    assert engine.snapshot().dropped_tokens == 0


def test_texts_are_the_same_in_small_chunks_and_after_preemptions():
    prompts = {str(number): [(token + number) % 50 for token in PROMPT] for number in range(4)}
    kv = BlockTopK(budget=0.4, block=4, newest=1)
    pressed = engine_of(kv, tokens=7, cache_tokens=120)
    found = told(pressed, prompts)
    assert pressed.snapshot().preemptions > 0
    for id, prompt in prompts.items():
        assert found[f"{id}.0"] == told(engine_of(kv), {id: prompt})[f"{id}.0"]


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_coded_blocks_are_read_as_they_are_decoded(codec):
    """With a budget for all, what the full cache says in that codec; with less, the same alone and beside others."""
    prompts = {str(number): [(token + number) % 50 for token in PROMPT] for number in range(3)}
    kv, options = BlockTopK(budget=0.4, block=4, newest=1), {"codec": codec}
    together = told(engine_of(kv, **options), prompts)
    assert told(engine_of(kv, **options), {"1": prompts["1"]})["1.0"] == together["1.0"]
    whole = [told(engine_of(each, **options), prompts) for each in (kv.limit(), Full())]
    assert whole[0] == whole[1]


def test_branches_share_blocks_and_part():
    kv = BlockTopK(budget=0.4, block=4, newest=1)
    together = told(engine_of(kv), {"a": PROMPT}, n=3, temperature=0.9, seed=5)
    alone = told(engine_of(kv, sequences=1), {"a": PROMPT}, n=3, temperature=0.9, seed=5)
    assert together == alone and len({tuple(each) for each in together.values()}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": {"name": "block_topk", "budget": 2.5}}, "neither a share nor a number"),
        ({"kv": {"name": "block_topk", "newest": 0}}, "newest"),
        ({"kv": "block_topk", "attention": "cpu"}, "block top-k attention"),
        ({"kv": "block_topk", "deterministic": True}, "block top-k attention"),
        ({"kv": "block_topk", "draft": "ngram", "draft_tree": "2"}, "reads blocks of tokens in a row"),
        ({"kv": "block_topk", "kv_reuse": "ape"}, "does not read it whole"),
        ({"kv": "block_topk", "draft": {"name": "model", "source": "x"}}, "keeps or reads a part"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises((UsageError, PenstockError, ValueError), match="(?s)" + message):
        build_engine(small_model(), EngineConfig.model_validate({"cache_tokens": 100, **options}))


def test_a_model_with_windows_is_refused():
    model = Decoder(SHAPE.model_copy(update={"window": 8})).initialize(0).eval()
    with pytest.raises(UsageError, match=r"block_topk.*leaves tokens unread"):
        build_engine(model, EngineConfig(kv=BlockTopK(), cache_tokens=100))
