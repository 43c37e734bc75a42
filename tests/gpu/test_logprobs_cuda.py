"""Log-probabilities on CUDA, beside float64's, and whatever rows are beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.ops.logprobs import logprob_table, wanted_by, wanted_table

pytestmark = pytest.mark.gpu

ROWS = 37


def given(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, some of which are forbidden, tokens, and which rows want to know how they are spread."""
    draw = torch_generator(0, "told", size)
    logits = (3 * torch.randn(ROWS, size, generator=draw)).to(dtype)
    tokens = torch.randint(size, (ROWS,), generator=draw)
    logits[1, : size // 2], tokens[1] = -torch.inf, size - 1
    return logits.cuda(), tokens.cuda(), (torch.arange(ROWS) % 3 == 0).cuda()


@pytest.mark.parametrize("most", [0, 1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [17, 4096, 49_152, 151_936])
def test_rows_are_those_of_float64(size: int, dtype: torch.dtype, most: int) -> None:
    logits, tokens, spread = given(size, dtype)
    told = logprob_table(logits, tokens, most, spread)
    values = told.view(torch.float32).double()
    scores = logits.double().log_softmax(-1)
    own = scores.gather(1, tokens.unsqueeze(1))
    assert torch.equal(told[:, 0], tokens.int())
    assert torch.equal(told[:, 1], (scores > own).sum(1).int() + 1)
    torch.testing.assert_close(values[:, 2], own.squeeze(1), atol=2e-5, rtol=1e-6)
    entropy = torch.special.entr(scores.exp()).sum(1).where(spread, 0)
    torch.testing.assert_close(values[:, 3], entropy, atol=2e-5, rtol=1e-5)
    certainty = -scores.mean(1) - torch.tensor(size).double().log()
    torch.testing.assert_close(values[:, 4], certainty.where(spread, 0), atol=2e-5, rtol=1e-5)
    names, best = told[:, 5::2].long(), values[:, 6::2]
    torch.testing.assert_close(best, scores.topk(most, 1).values, atol=2e-5, rtol=1e-6)
    # Of equal ones the first, and no token twice.
    assert torch.equal(scores.gather(1, names), scores.topk(most, 1).values)
    assert all(len(set(row)) == most for row in names.tolist())


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, tokens, spread = given(151_936, torch.bfloat16)
    together = logprob_table(logits, tokens, 5, spread)
    alone = [logprob_table(logits[[row]], tokens[[row]], 5, spread[[row]]) for row in range(ROWS)]
    assert torch.equal(together, torch.cat(alone))


def test_scores_that_are_not_numbers_end_all_the_same() -> None:
    logits = torch.full((3, 5000), torch.nan, device="cuda", dtype=torch.bfloat16)
    logits[1] = -torch.inf
    told = logprob_table(logits, torch.tensor([0, 1, 2], device="cuda"), 5)
    assert ((told[:, 5::2] >= 0) & (told[:, 5::2] < 5000)).all()


def test_each_row_of_a_graph_is_told_what_it_wants() -> None:
    """Whatever it wanted when the graph was captured; of the others nothing is looked up."""
    logits, tokens, _ = given(151_936, torch.bfloat16)
    wanted = torch.zeros_like(tokens)
    wanted_table(logits, tokens, wanted, 20)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = wanted_table(logits, tokens, wanted, 20)
    for seed in range(3):
        draw = np.random.default_rng(seed)
        alternatives, spread = draw.integers(-1, 21, ROWS), draw.random(ROWS) < 0.5
        wanted.copy_(torch.from_numpy(wanted_by(alternatives, spread)))
        table.fill_(-7)
        graph.replay()
        for row, most in enumerate(alternatives.tolist()):
            own, rest = table[row].split([0 if most < 0 else 5 + 2 * most, 45 if most < 0 else 40 - 2 * most])
            assert (rest == -7).all()
            if most >= 0:
                rated = torch.tensor([bool(spread[row])], device="cuda")
                assert torch.equal(own, logprob_table(logits[[row]], tokens[[row]], most, rated)[0])
