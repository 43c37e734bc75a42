"""What ranks have of a model that they divide among them, and what they exchange."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.models.shares import Share, divided
from penstock.parallel import tensor

SHAPE = DecoderConfig(vocabulary=101, hidden=32, layers=3, heads=8, kv_heads=2, head_dim=8, ffn=48)


@pytest.mark.parametrize(
    ("changes", "size", "what", "hint"),
    [
        ({}, 3, "it has 8 attention heads", "Set tensor_parallel to 2 or 4 or 8."),
        ({"ffn": 50}, 4, "it has 50 numbers of a feed-forward block", "Set tensor_parallel to 2."),
        ({"heads": 6, "kv_heads": 3}, 2, "it has 3 heads of keys and values", "Set tensor_parallel to 3 or 6."),
        ({"vocabulary": 63}, 8, "it has 63 tokens only", "Set tensor_parallel to 2 or 4."),
        ({"heads": 7, "kv_heads": 7, "ffn": 48}, 2, "it has 7 attention heads", "Leave tensor_parallel out."),
        ({"moe": MoEConfig(experts=4, ffn=6)}, 4, "it has 6 numbers of an expert", "Set tensor_parallel to 2."),
    ],
)
def test_what_cannot_be_divided_is_refused_and_what_can_is_named(changes, size, what, hint):
    with pytest.raises(UsageError, match=what) as refusal:
        divided(SHAPE.model_copy(update=changes), size)
    assert refusal.value.hint == hint


@pytest.mark.parametrize(
    ("whole", "part", "size", "wanted"),
    [
        (8, 4, 2, [(0, 4), (4, 8)]),
        (10, 4, 3, [(0, 4), (4, 8), (8, 10)]),  # a vocabulary that is rounded up
        (2, 1, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),  # fewer heads of keys than ranks
        (1, 1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_shares_are_neighbours_and_leave_nothing_out(whole, part, size, wanted):
    assert [Share(rank, size).of(whole, part) for rank in range(size)] == wanted


@pytest.mark.parametrize("extra", [{}, {"qk_norm": "width"}])
def test_an_attention_and_a_feed_forward_block_end_with_one_sum_each(monkeypatch, extra):
    """Beside them the embedding is one, and so are norms over the heads of all ranks."""
    calls: list[str] = []
    monkeypatch.setattr(tensor, "sum_of_ranks", lambda x: calls.append("sum") or x)
    monkeypatch.setattr(
        tensor, "gathered_from_ranks", lambda x, ranks: calls.append("gather") or torch.stack([x] * ranks)
    )
    whole = SHAPE.model_copy(update=extra)
    model = tensor.join(Decoder(divided(whole, 2)).initialize(0), whole, Share(0, 2))
    hidden = model(torch.arange(6)[None], CausalRows.of(6)).hidden
    assert calls == ["sum"] * (1 + whole.layers * (2 + len(extra)))
    assert model.logits(hidden).shape == (1, 6, 101)
    assert calls[-1] == "gather"


def test_a_share_has_its_bytes_and_no_others(tmp_path: Path):
    """Of a matrix in its own storage, as of one that is quantized."""
    shape = SHAPE.model_copy(update={"hidden": 64, "ffn": 256, "head_dim": 32})
    hub.save(Decoder(shape).initialize(0), tmp_path / "plain")
    hub.save(Decoder(shape).initialize(0), tmp_path / "int8", scheme="int8")
    for name in ("plain", "int8"):
        sizes = []
        for share in (None, Share(0, 2), Share(1, 2)):
            model = hub.load_for_inference(tmp_path / name, share=share)
            tensors = [*model.layers.parameters(), *model.layers.buffers()]
            sizes.append(sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values()))
        assert sizes[1] == sizes[2] < 0.53 * sizes[0]


def test_a_group_that_would_be_cut_is_refused(tmp_path: Path):
    shape = SHAPE.model_copy(update={"hidden": 64, "ffn": 192, "head_dim": 32})
    hub.save(Decoder(shape).initialize(0), tmp_path / "w4", scheme="w4a16")  # in groups of 64
    with pytest.raises(UsageError, match=r"down_proj.weight cannot be divided .*: 64 columns are stored together"):
        hub.load_for_inference(tmp_path / "w4", share=Share(0, 2))
