"""What searches cost, with sparse attention, experts and weights, and what is chosen by it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from penstock import LLM, SamplingParams
from penstock.cli import build_app
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.models.attention import CachedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.paged.selection import BlockSelection
from penstock.search.planners.contract import Candidate, Drawn
from penstock.search.planners.drawn import candidates_of
from penstock.search.planners.kinetics import Kinetics
from penstock.search.prices import Prices
from penstock.search.runs import Results
from penstock.testing.search_planner import DEVICE, LARGE, SMALL, counted

KEEP, BLOCK = 12, 4
SPARSE = BlockSelection(BLOCK, KEEP, 1, 1)
EXPERTS = {"experts": 4, "ffn": 16, "router": {"name": "softmax", "top_k": 2}}


class BlockSparse(CachedRows):
    """Decodes one token at a time; each head of keys reads its first and its newest block, and of the others those
    whose mean key one of its queries likes best.

    Attributes:
        read: numbers of keys and values that were read for the newest token, means of blocks among them.
    """

    def extend(self, count, device="cpu"):
        self.read = 0
        return super().extend(count, device)

    def attend(self, layer, query, key, value, *, scale, window, extras):
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [K, T, D]
        if layer in self._cache:
            keys, values = (torch.cat(pair, 1) for pair in zip(self._cache[layer], (keys, values), strict=True))
        self._cache[layer] = keys, values
        asked = query[0, 0].unflatten(0, (len(keys), -1))  # [K, H / K, D]
        if keys.shape[1] > KEEP:
            newest = (keys.shape[1] - 1) // BLOCK * BLOCK
            means = torch.stack([each.mean(1) for each in keys[:, BLOCK:newest].split(BLOCK, 1)], 1)
            best = torch.bmm(asked, means.transpose(1, 2)).amax(1).topk(KEEP // BLOCK - 2).indices
            places = ((1 + best)[..., None] * BLOCK + torch.arange(BLOCK)).flatten(1)
            always = torch.tensor([*range(BLOCK), *range(newest, keys.shape[1])]).expand(len(keys), -1)
            places = torch.cat([places, always], 1)[..., None].expand(-1, -1, 8)
            keys, values = keys.gather(1, places), values.gather(1, places)
            self.read += means.numel()
        self.read += keys.numel() + values.numel()
        weights = torch.bmm(asked, keys.transpose(1, 2)).mul(scale).softmax(-1)
        return torch.bmm(weights, values).flatten(0, 1)[None, None]


def decoded(context: CachedRows, length: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The logits and the operations of each position."""
    model = Decoder(LARGE).initialize(0)
    for position in range(length):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            hidden = model(torch.tensor([[position]]), context.extend(1)).hidden
            logits = model.logits(hidden)
        yield logits, counter.get_total_flops()


def test_sparse_attention_costs_what_it_computes_and_reads():
    """With as many tokens as are kept and fewer, and with more, in whole blocks and not."""
    context, prices = BlockSparse(), Kinetics().prices(LARGE, DEVICE, 2, SPARSE)
    for position, (_, flops) in enumerate(decoded(context, 22)):
        assert prices.cost("flops", position, position + 1, 0) == flops
        assert prices.cost("eflops", position, position + 1, 0) == pytest.approx(flops + 40 * 2 * context.read)


def test_kept_blocks_that_cover_the_context_are_dense_attention():
    """The same logits, and the same price."""
    for (sparse, _), (dense, _) in zip(decoded(BlockSparse(), KEEP), decoded(CachedRows(), KEEP), strict=True):
        torch.testing.assert_close(sparse, dense)
    sparse, dense = (Kinetics().prices(LARGE, DEVICE, 2, selection) for selection in (SPARSE, None))
    for unit in ("tokens", "flops", "eflops"):
        assert sparse.cost(unit, 0, KEEP, 0) == dense.cost(unit, 0, KEEP)
    assert sparse.cost("eflops", 0, 40, 0) < dense.cost("eflops", 0, 40)
    assert sparse.cost("eflops", 0, 40, 25) == pytest.approx(
        dense.cost("eflops", 0, 25) + sparse.cost("eflops", 25, 40, 0)
    )


@pytest.mark.parametrize("moe", [None, EXPERTS])
@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_shares_the_reading_of_weights(moe, tied):
    """All matrices of a real decoder but the embedding, which is looked up; of experts, all."""
    config = DecoderConfig(**{**LARGE.model_dump(), "moe": moe, "tied": tied})
    model = Decoder(config)
    read = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    read += sum(each.numel() for each in model.parameters() if each.dim() == 3)
    shared, large = Kinetics(batch=8).prices(config, DEVICE), Kinetics().prices(config, DEVICE)
    more = shared.cost("eflops", 3, 4) - large.cost("eflops", 3, 4)
    assert more == pytest.approx(40 * 2 * read / 8)


def test_latent_attention_reads_what_it_keeps():
    latent = {"rank": 12, "rotated": 4, "plain": 8, "value": 8}
    config = DecoderConfig(**{**LARGE.model_dump(), "latent": latent})
    read = 2 * config.layers * (12 + 4) * 7
    prices = Prices(config, DEVICE)
    assert prices.cost("eflops", 6, 7) - prices.cost("flops", 6, 7) == pytest.approx(40 * read)
    *_, (_, found) = counted(config, 7)
    assert found == read


def test_memory_moves_the_choice_to_the_larger_model():
    """By hand, with long texts: for the same operations a small model draws more texts, which read far more."""
    small = Candidate("small", SMALL, (Drawn(2, (60,) * 8, (True, *(False,) * 7)),))
    large = Candidate("large", LARGE, (Drawn(2, (60,) * 8, (True, True, *(False,) * 6)),))
    found = {}
    for unit in ("flops", "eflops"):
        one, two = (Kinetics().frontier([each], unit, DEVICE) for each in (small, large))
        found[unit] = one[2].cost / two[0].cost  # three eighths, and a quarter
    assert found["eflops"] > found["flops"]


def test_sparse_attention_is_chosen_where_it_is_worth_it():
    """The same texts for less; and dense attention where its texts are right that much more often."""
    prompt, right = 4, (True, True, *(False,) * 6)
    dense = Candidate("large", LARGE, (Drawn(prompt, (50,) * 8, right),))
    for found, name in (((50,) * 8, right), "sparse"), (((50,) * 8, (True, *(False,) * 7)), "dense"):
        sparse = Candidate("large", LARGE, (Drawn(prompt, *found),), SPARSE)
        budget = Kinetics().frontier([dense], "eflops", DEVICE)[0].cost
        choice = Kinetics().choose([dense, sparse], budget, "eflops", DEVICE)
        assert ("dense" if choice.sparse is None else "sparse") == name


def test_a_search_is_planned_from_the_runs_of_two_models(tmp_path):
    """The command, from what a boxed model drew, and a larger one as well: the dearest choice is the whole run."""
    llm = LLM("python-1m", progress=silent, cache_tokens=4096)
    found = llm.search(
        ["import os", "def f("], {"name": "coverage", "n": 4}, scorer=lambda problem, text: float("e" in text),
        sampling_params=SamplingParams(max_tokens=12), progress=silent,
    )  # fmt: skip
    folders = [tmp_path / name for name in ("python-1m", "python-6m")]
    folders.append(tmp_path / "python-1m sparse")
    for folder in folders:
        kv = {"name": "block_topk", "budget": 64} if "sparse" in folder.name else None
        results = Results(folder, {"model": folder.name.split()[0], "problems": "two", "kv": kv})
        for place, each in enumerate(found):
            results.write(place, each.record())
        results.close()
    choice = Kinetics().frontier(candidates_of(folders), "eflops", DEVICE)[-1]
    assert choice.name == "python-1m" and choice.accuracy == pytest.approx(sum(each.score for each in found) / 2)
    asked = ["plan", "search", *map(str, folders), "--unit", "generated"]
    every = json.loads(CliRunner().invoke(build_app(), [*asked, "--json"], catch_exceptions=False).stdout)
    assert [each["cost"] for each in every] == sorted(each["cost"] for each in every)
    said = CliRunner().invoke(build_app(), [*asked, "--budget", str(every[-1]["cost"])], catch_exceptions=False).stdout
    best = every[-1]
    assert f"search {best['name']} PROBLEMS.jsonl --option n={best['samples']} --max-tokens {best['length']}" in said
    asked = ["plan", "search", str(folders[-1]), "--budget", "1e30"]
    sparse = CliRunner().invoke(build_app(), asked, catch_exceptions=False)
    assert (
        "--set kv.name=block_topk --set kv.block=16 --set kv.budget=64 --set kv.first=1 --set kv.newest=2"
        in sparse.stdout
    )
    with pytest.raises(UsageError, match="the least costs"):
        CliRunner().invoke(build_app(), [*asked, "--budget", "0.5"], catch_exceptions=False)


def record(**changed):
    """A result: a root and a text."""
    root = {"number": 0, "parent": None, "tokens": 0, "score": None}
    text = {"number": 1, "parent": 0, "tokens": 3, "score": 1.0}
    ledger = {"prompt": 2, "generated": 3}
    return {"id": "a", "tree": [root, text], "ledger": ledger, "error": None, "exhausted": False} | changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"exhausted": True}, "the budget ended it"),
        ({"error": "ValueError: no"}, "ValueError: no"),
        ({"tree": [record()["tree"][0]]}, "more than texts"),
        ({"ledger": {"prompt": 2, "generated": 4}}, "more than texts"),
        ({"tree": [record()["tree"][0], {**record()["tree"][1], "score": None}]}, "which texts are right"),
    ],
)
def test_runs_that_do_not_tell_are_refused(tmp_path, changed, words):
    results = Results(tmp_path, {"model": "python-1m", "problems": "x"})
    results.write(0, record(**changed))
    results.close()
    with pytest.raises(UsageError, match=words):
        candidates_of([tmp_path])


def test_runs_of_other_problems_or_of_one_model_twice_are_refused(tmp_path):
    for name, model, problems in (("a", "python-1m", "x"), ("b", "python-6m", "y"), ("c", "python-1m", "x")):
        results = Results(tmp_path / name, {"model": model, "problems": problems})
        results.write(0, record())
        results.close()
    with pytest.raises(UsageError, match="other problems"):
        candidates_of([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UsageError, match="as one before it has"):
        candidates_of([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(UsageError, match="no results of a search"):
        candidates_of([tmp_path])
    Results(tmp_path / "d", {"model": "python-1m", "problems": "x"}).close()
    with pytest.raises(UsageError, match="no finished problem"):
        candidates_of([tmp_path / "d"])
