"""The merge of partial attentions against attention over the union."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.ops.merge import merge_attention

HEADS, DIM = 2, 3


def problem(keys: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scores [H, keys] and values [H, keys, D] in float64."""
    draw = torch_generator(0, "merge", keys)
    scores = sharpness * torch.randn(HEADS, keys, generator=draw, dtype=torch.float64)
    return scores, torch.randn(HEADS, keys, DIM, generator=draw, dtype=torch.float64)


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output [H, D] and log-sum-exp [H], by definition: NaN and -inf where there are no keys."""
    weights = scores.exp()
    return (weights.unsqueeze(-1) * values).sum(1) / weights.sum(1, keepdim=True), weights.sum(1).log()


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return merge_attention(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), st.randoms(use_true_random=False))
def test_any_split_in_any_order_equals_the_whole(sizes, random):
    scores, values = problem(sum(sizes))
    parts = [attention(s, v) for s, v in zip(scores.split(sizes, 1), values.split(sizes, 1), strict=True)]
    random.shuffle(parts)
    torch.testing.assert_close(merged(parts), attention(scores, values), rtol=0, atol=1e-13)
    cut = random.randrange(len(parts))
    halves = [merged(half) for half in (parts[:cut], parts[cut:]) if half]
    torch.testing.assert_close(merged(halves), attention(scores, values), rtol=0, atol=1e-13)


def test_large_scores_do_not_overflow():
    scores, values = problem(8, sharpness=20)
    parts = [attention(scores[:, :3], values[:, :3]), attention(scores[:, 3:], values[:, 3:])]
    far = [(out, logsumexp + 5000) for out, logsumexp in parts]
    out, logsumexp = merged(far)
    wanted = attention(scores, values)
    torch.testing.assert_close((out, logsumexp - 5000), wanted, rtol=0, atol=1e-11)


def test_nothing_to_merge_is_zero():
    nothing = torch.full((2, 4, HEADS, DIM), math.nan), torch.full((2, 4, HEADS), -math.inf)
    out, logsumexp = merge_attention(*nothing)
    assert torch.equal(out, torch.zeros(4, HEADS, DIM))
    assert torch.equal(logsumexp, torch.full((4, HEADS), -math.inf))


def test_low_precision_outputs_keep_their_dtype():
    scores, values = problem(10)
    parts = [attention(scores[:, :4], values[:, :4]), attention(scores[:, 4:], values[:, 4:])]
    outputs, logsumexp = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    out, _ = merge_attention(outputs.bfloat16(), logsumexp.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), attention(scores, values)[0], rtol=0, atol=0.02)
