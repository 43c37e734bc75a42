"""Adapters on a GPU: under compiled passes and graphs, loaded and dropped while these stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nearly import agreement
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.low_rank import LowRank, Sorted, wearing
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from tiny_adapters import added, merged, row_by_row, written

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=6, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)
OPTIONS = {"sequences": 8, "tokens": 512, "cache_tokens": 16_384, "check": True}
NAMES = ("", "a", "b", "c")


def model(dtype: torch.dtype = torch.bfloat16) -> Decoder:
    with torch.device("cuda"):
        blank = Decoder(SHAPE)
    return blank.initialize(0).to("cuda", dtype).eval()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: written(tmp_path / name, model(), seed, rank=4 * seed + 4) for seed, name in enumerate("abc")}


def open_engine(decoder: Decoder, **options) -> Engine:
    return build_engine(decoder, EngineConfig.model_validate({**OPTIONS, **options}))


def answers(engine: Engine, names: tuple[str, ...], chosen: str | None = None) -> dict[str, list[int]]:
    """Of twelve requests with the adapters ``names`` in turn: of all, or, as if they had none, of one of these."""
    draw, told = torch.Generator().manual_seed(0), dict[str, list[int]]()
    for number in range(12):
        prompt = torch.randint(2000, (20 + 30 * number,), generator=draw).tolist()
        name, sampling = names[number % len(names)], SamplingParams(temperature=0, max_tokens=40)
        if chosen is None or name == chosen:
            engine.add(Request(str(number), prompt, sampling, adapter=name if chosen is None else ""))
    while engine.busy:
        for delta in engine.step():
            told.setdefault(delta.id, []).extend(delta.tokens)
    return told


def alone(folders: dict[str, Path], decoder: Decoder, **options) -> dict[str, list[int]]:
    """What engines of the merged models say, one after the other."""
    wanted = {}
    for name in NAMES:
        own = merged(decoder, folders[name]) if name else decoder
        wanted |= answers(open_engine(own, **options), NAMES, name)
    return wanted


def test_a_batch_is_answered_as_by_each_merged_model_in_float32(folders):
    options = {"compile": False, "attention": "reference"}
    told = answers(open_engine(model(torch.float32), adapters=folders, **options), NAMES)
    wanted = alone(folders, model(torch.float32), **options)
    assert sum(told[id] == wanted[id] for id in wanted) >= 11


def test_compiled_passes_and_graphs_have_adapters_too(folders):
    engine = open_engine(model(), adapters=folders)
    runner, replayed = engine.executor, set()
    for adapted, pair in runner.passes.captured.items():
        for place, graphs in enumerate(pair):
            replay, kind = graphs.replay, (adapted, place)
            graphs.replay = lambda *rest, replay=replay, kind=kind: (replayed.add(kind), replay(*rest))[1]
    told = answers(engine, NAMES)
    assert (True, 1) in replayed, "no step with adapters was replayed"
    assert agreement(told, alone(folders, model())) > 0.8
    replayed.clear()
    assert agreement(answers(engine, ("",)), answers(open_engine(model()), ("",))) > 0.8
    assert not any(adapted for adapted, _ in replayed), "steps without adapters compute them"


def test_graphs_stay_where_adapters_come_and_go(folders):
    engine = open_engine(model(), adapters={"x": folders["c"]})
    answers(engine, ("x",))
    engine.adapters.drop("x")
    engine.adapters.load("y", folders["a"])
    wanted = answers(open_engine(merged(model(), folders["a"])), ("",))
    assert agreement(answers(engine, ("y",)), wanted) > 0.8
    engine.control.sleep()
    engine.control.wake()
    assert agreement(answers(engine, ("y",)), wanted) > 0.8


def test_parts_that_run_at_the_same_time_have_each_its_own(folders):
    engine = open_engine(model(), adapters=folders, batching="nanoflow")
    assert agreement(answers(engine, NAMES), alone(folders, model())) > 0.8


def test_memory_says_what_the_slots_take(folders):
    memory = open_engine(model(), adapters=folders, adapter_slots=8).executor.memory
    assert memory["adapters"] > 0 and memory["other"] > 0
    assert sum(memory.values()) == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.01)


def on_device(room: LowRank) -> LowRank:
    return LowRank(room.a.cuda(), [b.cuda() for b in room.b], room.ranges)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("size", "widths", "rank", "count"),
    # Ranks and rows that are no whole tiles; few rows an adapter and many; pieces that share a tile of columns.
    [(512, (256, 64, 64), 16, 40), (200, (130, 50, 70), 24, 1), (1000, (33,), 8, 700), (96, (300, 300), 136, 90)],
)
def test_kernels_add_the_sum_row_by_row(size, widths, rank, count, dtype):
    """Within a graph, whoever has which adapter."""
    draw, slots = torch.Generator().manual_seed(size), 5
    room = added(slots, rank, size, widths, torch.float32, draw)
    room = LowRank((room.a / size**0.5).to(dtype), [(b / rank**0.5).to(dtype) for b in room.b], room.ranges)
    x, out = (torch.randn(count, n, generator=draw).to(dtype) for n in (size, room.ranges[-1][1] + 2))
    given, here = (x.cuda(), out.cuda()), on_device(room)
    owners = torch.zeros(count, dtype=torch.int64, device="cuda")

    def run() -> torch.Tensor:
        worn = wearing(owners, slots, natively=False)
        assert isinstance(worn, Sorted)
        return worn.add(given[1].clone(), given[0], here)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for whose in (torch.randint(0, slots + 1, (count,), generator=draw), torch.full((count,), 3), 0 * owners.cpu()):
        owners.copy_(whose)
        graph.replay()
        wanted = row_by_row(out, x, room, whose)
        # What goes between the two products is rounded as the rest.
        off = 1e-5 if dtype is torch.float32 else 2**-6
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=off, atol=off)
        assert torch.equal(found.cpu()[whose == 0], out[whose == 0])
