"""Log-probabilities of tokens, by the native kernel and by operators: what float64 says of the same scores."""

from __future__ import annotations

import math

import pytest
import torch

from penstock.ops import logprobs, native

needs_compiler = pytest.mark.skipif(not native.serves(logprobs.SOURCE), reason="there is no compiler")
TABLES = [
    pytest.param(logprobs._table, id="operators"),
    pytest.param(logprobs._native_table, id="native", marks=needs_compiler),
]


def drawn(rows: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, some of which are forbidden, and tokens that are not."""
    draw = torch.Generator().manual_seed(size)
    scores = (4 * torch.randn(rows, size, generator=draw)).to(dtype)
    tokens = torch.randint(0, size, (rows,), generator=draw)
    for row in range(0, rows, 3):
        scores[row, torch.arange(size) != tokens[row]] = -torch.inf
    if size > 2:
        scores[1, (tokens[1] + 1) % size] = -torch.inf
    return scores, tokens


def numbers(table: torch.Tensor, columns: slice) -> torch.Tensor:
    return table[:, columns].contiguous().view(torch.float32).double()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 16, 17, 515, 4096, 50001])
@pytest.mark.parametrize("most", [0, 3])
def test_a_table_says_what_float64_says(table, dtype, size, most):
    scores, tokens = drawn(7, size, dtype)
    most, spread = min(most, size), torch.arange(7) != 2
    found = table(scores, tokens, most, spread)
    logs = scores.double().log_softmax(-1)
    own = logs.gather(-1, tokens.unsqueeze(-1))
    ranks = (scores > scores.gather(-1, tokens.unsqueeze(-1))).sum(-1) + 1
    entropies = -torch.where(logs > -torch.inf, logs.exp() * logs, 0).sum(-1)
    certainties = -logs.mean(-1) - math.log(size)
    wanted = torch.stack([own.squeeze(-1), *(torch.where(spread, each, 0) for each in (entropies, certainties))], -1)
    assert found.dtype == torch.int32 and found.shape == (7, logprobs.FIXED + 2 * most)
    assert torch.equal(found[:, 0].long(), tokens) and torch.equal(found[:, 1].long(), ranks)
    torch.testing.assert_close(numbers(found, slice(2, 5)), wanted, rtol=1e-5, atol=1e-5)
    best = logs.topk(most, -1).values
    torch.testing.assert_close(numbers(found, slice(6, None, 2)), best, rtol=1e-5, atol=1e-5)
    picked = logs.gather(-1, found[:, 5::2].long())
    torch.testing.assert_close(picked, best, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_rows_bits_depend_neither_on_the_others_nor_on_threads_nor_on_what_is_beside_it():
    scores, tokens = drawn(90, 3000, torch.float32)
    wide = torch.randn(90, 3500)
    wide[:, :3000] = scores
    spread = torch.ones(90, dtype=torch.bool)
    whole, threads = logprobs._native_table(scores, tokens, 0, spread), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        rows = [slice(row, row + 1) for row in range(90)]
        alone = [logprobs._native_table(scores[own], tokens[own], 0, spread[own]) for own in rows]
        beside = logprobs._native_table(wide[:, :3000], tokens, 0, spread)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.cat(alone)) and torch.equal(whole, beside)


@pytest.mark.parametrize("table", TABLES)
def test_an_alternative_is_told_as_it_is_told_of_the_token(table):
    scores, _ = drawn(64, 4096, torch.float32)
    found = table(scores, scores.argmax(-1), 1, None)
    assert torch.equal(found[:, 2], found[:, 6]) and torch.equal(found[:, 0], found[:, 5])
