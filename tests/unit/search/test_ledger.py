"""What a budget buys: against a loop that gives a token at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.models.config import DecoderConfig
from penstock.plan.hardware import DEVICES
from penstock.search.ledger import Wish, shares
from penstock.search.prices import Prices

SHAPE = DecoderConfig(
    vocabulary=50, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=96, window=16,
    windowed_layers=(0,),
)  # fmt: skip
PRICES = Prices(SHAPE)

wishes = st.builds(
    lambda length, new, most: Wish(length, max(0, length - 1 - new), most, PRICES, length),
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(0, 12),
)


@given(st.lists(wishes, max_size=6), st.sampled_from(["generated", "tokens", "flops", "eflops"]), st.floats(0, 1.2))
def test_a_token_each_in_turn(asked, unit, share):
    """The definition: everybody has the same number, but for those who want fewer and, in order, one more."""
    whole = sum(wish.price(unit, wish.most) for wish in asked)
    left = share * whole
    granted = shares(asked, unit, left)
    spent = sum(wish.price(unit, count) for wish, count in zip(asked, granted, strict=True))
    assert spent <= left or not any(granted)
    counts = [0] * len(asked)
    while True:
        turn = [place for place, wish in enumerate(asked) if counts[place] < wish.most]
        before = list(counts)
        for place in turn:
            more = [*counts[:place], counts[place] + 1, *counts[place + 1 :]]
            if sum(wish.price(unit, count) for wish, count in zip(asked, more, strict=True)) > left:
                assert granted == counts
                return
            counts = more
        if counts == before:
            assert granted == counts
            return


def test_what_positions_cost():
    """By hand: operations of the matrices, of the keys that are seen, and the bytes of these."""
    device = DEVICES["h100"]
    for position in (0, 5, 40):
        seen = min(position + 1, 16) + position + 1
        flops = 2 * SHAPE.matmul_parameters() + 4 * 4 * 8 * seen
        read = 2 * 2 * 2 * 8 * seen
        assert PRICES.cost("flops", position, position + 1) == flops
        both = flops + read * device.flops / device.bandwidth
        assert PRICES.cost("eflops", position, position + 1) == pytest.approx(both)
    plain = Prices(SHAPE.model_copy(update={"window": None, "windowed_layers": None}))
    mean = SHAPE.model_copy(update={"window": None, "windowed_layers": None}).flops_per_token(64)
    assert plain.cost("flops", 0, 64) == pytest.approx(64 * mean)
