"""Attention against softmax written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.models.attention import PackedRows
from penstock.ops import attention
from penstock.ops.attention import attend_packed_rows, attend_rows, attend_varlen, causal_mask, varlen_serves


def heads(*shape: int, name: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, name), dtype=torch.float64)


def written_out(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Head by head and query by query; ``seen`` [B, T, S]."""
    out = torch.zeros_like(query)
    shared = query.shape[2] // key.shape[2]
    for b, t, h in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        scores = scale * (key[b, :, h // shared] @ query[b, t, h])
        weights = scores.masked_fill(~seen[b, t], -math.inf).softmax(0)
        out[b, t, h] = weights @ value[b, :, h // shared]
    return out


@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_equal_softmax_written_out(query_heads: int, key_heads: int, masked: bool):
    """Grouped heads, causal or with a mask over more keys than queries; output and gradients."""
    rows, queries, keys = 2, 6, 9 if masked else 6
    inputs = [
        heads(rows, queries, query_heads, 8, name="query").requires_grad_(),
        heads(rows, keys, key_heads, 8, name="key").requires_grad_(),
        heads(rows, keys, key_heads, 8, name="value").requires_grad_(),
    ]
    if masked:
        seen = heads(rows, queries, keys, name="mask") > 0
        seen[..., 0] = True
        out = attend_rows(*inputs, scale=0.3, mask=seen.unsqueeze(1))
    else:
        seen = torch.ones(rows, queries, keys, dtype=torch.bool).tril()
        out = attend_rows(*inputs, scale=0.3, causal=True)
    expected = written_out(*inputs, 0.3, seen)
    probe = heads(*out.shape, name="probe")
    ours, theirs = ([o, *torch.autograd.grad((o * probe).sum(), inputs)] for o in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_rows_without_a_mask_see_every_key():
    query, key, value = heads(1, 3, 2, 4, name="q"), heads(1, 5, 2, 4, name="k"), heads(1, 5, 2, 4, name="v")
    everything = torch.ones(1, 3, 5, dtype=torch.bool)
    expected = written_out(query, key, value, 0.5, everything)
    torch.testing.assert_close(attend_rows(query, key, value, scale=0.5), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 6, 20])
def test_a_window_is_a_mask(window: int):
    """A query sees itself and the window - 1 positions before it."""
    query, key, value = (heads(2, 7, count, 4, name=str(count)) for count in (4, 2, 2))
    seen = torch.tensor([[0 <= t - s < window for s in range(7)] for t in range(7)]).expand(2, 7, 7)
    positions = torch.arange(7).unsqueeze(0)
    mask = causal_mask(positions, positions, window).unsqueeze(1)
    expected = written_out(query, key, value, 0.5, seen)
    torch.testing.assert_close(attend_rows(query, key, value, scale=0.5, mask=mask), expected, rtol=0, atol=1e-12)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=8),
    st.lists(st.integers(0, 20), min_size=1, max_size=8),
    st.none() | st.integers(1, 10),
)
def test_causal_masks_follow_positions(queries: list[int], keys: list[int], window: int | None):
    """In any order, and with repeats, as in packed rows."""
    mask = causal_mask(torch.tensor(queries), torch.tensor(keys), window)
    expected = [[s <= t and (window is None or t - s < window) for s in keys] for t in queries]
    assert mask.tolist() == expected


@pytest.mark.parametrize("block", [1, 4, 5, 13, 64])
def test_blocks_of_queries_equal_the_whole_mask(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    query, key, value = (heads(2, 13, count, 8, name=str(count)).requires_grad_() for count in (4, 2, 2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7], list(range(13))])
    documents = torch.tensor([[0] * 5 + [1] * 8, [2] * 13])
    mask = (causal_mask(positions, positions) & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    whole = attend_rows(query, key, value, scale=0.35, mask=mask)
    blocks = attend_packed_rows(query, key, value, mask, scale=0.35)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad((whole**2).sum(), (query, key, value))
    ours = torch.autograd.grad((blocks**2).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_bf16_stays_close():
    query, key, value = (heads(2, 16, count, 8, name=str(count)) for count in (4, 2, 2))
    exact = attend_rows(query, key, value, scale=0.35, causal=True)
    ours = attend_rows(query.bfloat16(), key.bfloat16(), value.bfloat16(), scale=0.35, causal=True)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "served"),
    [
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.float16, 8, True),
        ("cuda", torch.bfloat16, 256, True),
        ("cuda", torch.bfloat16, 4, False),
        ("cuda", torch.bfloat16, 100, False),
        ("cuda", torch.bfloat16, 264, False),
        ("cuda", torch.float32, 64, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_varlen_is_for_heads_that_its_kernel_has(device: str, dtype: torch.dtype, head_dim: int, served: bool):
    assert varlen_serves(torch.device(device), dtype, head_dim) is served


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [4, 8, 100, 264])
def test_packed_rows_take_heads_of_any_size(head_dim: int):
    """Those that the kernel takes and those that it does not, beside fp64."""
    exact = [heads(1, 24, count, head_dim, name=str(count)).cuda() for count in (4, 2, 2)]
    context = PackedRows.of(torch.tensor([[0] * 7 + [1] * 17])).to(torch.device("cuda"))
    expected, ours = (
        context.attend(0, *(x.to(dtype) for x in exact), scale=head_dim**-0.5, window=None)
        for dtype in (torch.float64, torch.bfloat16)
    )
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_attends_within_each_sequence(window: int | None):
    """An empty sequence among them, as PackedRows pads its boundaries."""
    lengths = [17, 1, 0, 30]
    query, key, value = (heads(48, count, 64, name=str(count)).cuda() for count in (4, 2, 2))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    halves = [x.bfloat16() for x in (query, key, value)]
    ours = attend_varlen(*halves, ends.to("cuda", torch.int32), 48, scale=0.125, window=window)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        positions = torch.arange(end - start, device="cuda").unsqueeze(0)
        mask = causal_mask(positions, positions, window).unsqueeze(1)
        alone = (x[None, start:end] for x in (query, key, value))
        expected = attend_rows(*alone, scale=0.125, mask=mask)[0]
        torch.testing.assert_close(ours[start:end].double(), expected, rtol=0, atol=0.03)
