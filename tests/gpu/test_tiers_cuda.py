"""Blocks that leave a GPU's cache and come back, beside the work that is queued."""

from __future__ import annotations

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.paged.contract import CacheShape
from penstock.ops.paged.flashinfer import FlashInfer
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.kv.host import HostBlocks
from penstock.serve.messages import Request

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)


def test_copies_keep_their_order_with_the_work_before_and_behind_them():
    """Blocks are written over again and again while copies are under way: each comes back as it was when it left."""
    shape = CacheShape(8, 8, 8, 128, 512, 16, torch.bfloat16, torch.device("cuda"))
    cache = FlashInfer().open(shape)
    host = HostBlocks(cache, 64)
    slots = torch.arange(64 * 16)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for turn in range(1, 6):
        weight = weight @ weight.softmax(0)  # the device is behind the host
        values = torch.full((8, 8, 64 * 16, 128), float(turn), device="cuda", dtype=torch.bfloat16)
        cache.write(slots, values, -values)
        host.save(list(range(64)), list(range(64)))
        cache.write(slots, values * 0, values * 0)
        host.load(list(range(64)), list(range(64, 128)))
        keys, found = cache.read(slots + 64 * 16)
        assert torch.equal(keys, values) and torch.equal(found, -values)
    assert bytes(host.content(0)) == bytes(host.content(63))


@pytest.mark.parametrize("loop", ["plain", "overlapped"])
def test_an_engine_whose_blocks_come_and_go_says_what_one_with_room_does(loop, tmp_path):
    """Deterministic, so that tokens do not depend on how prompts are cut."""
    with torch.device("cuda"):
        model = Decoder(SHAPE)
    model = model.initialize(0).to("cuda", torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2000, (24, 300), generator=draw).tolist()
    said = []
    for tokens, more in ((24 * 400, {}), (4 * 400, {"kv_host": "200MB", "kv_disk": tmp_path})):
        config = EngineConfig.model_validate(
            {"sequences": 4, "cache_tokens": tokens, "loop": loop, "deterministic": True, "check": True, **more}
        )
        engine = build_engine(model, config)
        told: dict[str, list[int]] = {}
        for turn in range(3):
            for number, prompt in enumerate(prompts):
                id = f"{turn} {number}"
                engine.add(Request(id, prompt, SamplingParams(temperature=0, max_tokens=16)))
            while engine.busy:
                for delta in engine.step():
                    told.setdefault(delta.id, []).extend(delta.tokens)
        said.append(told)
        hits = engine.snapshot().tier_hits
        engine.close()
    assert said[0] == said[1]
    assert hits[0] > 24 * 18
