"""Vocabulary parallelism: its closed forms in the simulator, and the arithmetic of its passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penstock.core.errors import UsageError
from penstock.ops.cross_entropy import IGNORE
from penstock.parallel.world import World
from penstock.pipeline.draw.page import page
from penstock.pipeline.draw.svg import svg
from penstock.pipeline.draw.terminal import legend, timeline
from penstock.pipeline.ir.schedule import Kind, Schedule, Task
from penstock.pipeline.ir.torch_csv import to_csv
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.vocabulary import STATISTICS, Shard, shard_rows, width
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.vocabulary import shard as with_shards
from penstock.policy import create
from penstock.testing.pipeline_runtime import check_schedule_runs
from penstock.testing.ranks import agreed


def sharded(name: str, p: int, m: int, barriers: int, output: float) -> Simulation:
    times = Times(output=output)
    transform = create("pipeline.transform", "vocabulary", barriers=barriers, times=times.model_dump())
    schedule = transform.apply(create("pipeline.schedule", name).build(p, m))
    return simulate(schedule, times.costs(schedule))


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("barriers", [1, 2, 3])
def test_each_barrier_costs_one_activation_of_1f1b_and_no_time(p, barriers):
    """Whatever the vocabulary: p + barriers on the first device, and about 1F1B's bubble; every device works alike."""
    m = 4 * p
    for output in (1.0, 4.0, 16.0):
        found = sharded("1f1b", p, m, barriers, output)
        assert found.schedule.barriers == barriers
        assert max(found.peak_activations) <= p + barriers
        assert found.busy == pytest.approx([m * (3 + 3 * output / p)] * p)
        assert found.makespan <= m * (3 + 3 * output / p) + 3 * (p - 1) + barriers


def test_without_it_the_last_device_does_the_work_of_all():
    schedule = create("pipeline.schedule", "1f1b").build(4, 16)
    plain = simulate(schedule, Times(output=4.0).costs(schedule))
    assert plain.busy == [48, 48, 48, 48 + 16 * 3 * 4]
    assert sharded("1f1b", 4, 16, 1, 4.0).makespan < plain.makespan / 2


def test_what_gains_nothing_stays():
    assert sharded("1f1b", 4, 8, 2, 0.0).schedule == create("pipeline.schedule", "1f1b").build(4, 8)
    assert sharded("1f1b", 1, 8, 1, 3.0).schedule.barriers == 0


def test_balanced_schedules_stay_balanced():
    """V-Half's peaks on all devices are as even with a sharded vocabulary as without."""
    peaks = sharded("v_half", 8, 32, 1, 4.0).peak_activations
    assert max(peaks) - min(peaks) <= 2
    plain = create("pipeline.schedule", "v_half").build(8, 32)
    assert max(peaks) <= max(simulate(plain, Times().costs(plain)).peak_activations) + 4


def test_traffic_of_the_shards():
    """Hidden states and gradients to or from each other device, at both ends of the model."""
    found = sharded("1f1b", 4, 16, 2, 2.0)
    assert found.transfers == 2 * 3 * 16 + 4 * 3 * 16


def test_pictures_show_the_passes():
    found = sharded("zb_h1", 4, 12, 3, 4.0)
    assert "S scores" in legend(found).plain.replace("  ", " ")
    assert "T0" in timeline(found, 2000).plain
    assert "<title>3S0'1</title>" in svg(found)
    assert '"3T11"' in page(found, "title")


def test_it_applies_once_and_pytorch_cannot_run_it():
    found = sharded("1f1b", 2, 8, 1, 4.0).schedule
    with pytest.raises(UsageError, match="sharded already"):
        create("pipeline.transform", "vocabulary").apply(found)
    with pytest.raises(UsageError, match="no word for the passes"):
        to_csv(found)


def test_other_transforms_follow_it():
    found = sharded("1f1b", 4, 12, 2, 4.0).schedule
    times = Times(output=4.0, host=0.5)
    for name in ("2bp", "pipeoffload"):
        again = create("pipeline.transform", name, times=times.model_dump()).apply(found)
        assert simulate(again, times.costs(again)).makespan <= simulate(found, times.costs(found)).makespan
        passes = [[task for task in order if task.kind is Kind.T] for order in again.orders]
        assert [len(own) for own in passes] == [12] * 4


def test_rows_are_equal_parts():
    assert shard_rows(13, 3) == [range(4), range(4, 8), range(8, 13)]
    with pytest.raises(UsageError, match="a vocabulary of 2 cannot be sharded over 3 devices"):
        shard_rows(2, 3)


TOKENS, HIDDEN, VOCABULARY = 6, 4, 9


def through_shards(barriers: int, devices: int, hidden, embedding, head, tokens, targets, scale):
    """Loss, gradients of hidden states, head and embedding, and the embeddings, all by the passes of the shards."""
    shards = []
    for rows in shard_rows(VOCABULARY, devices):
        own = [nn.Parameter(matrix[rows.start : rows.stop].clone()) for matrix in (embedding, head)]
        shards.append((Shard(barriers, rows, *own, lambda _: (tokens, targets), scale), *own))
    embedded = sum(shard.embed(0) for shard, _, _ in shards)
    sent = [shard.score(0, hidden) for shard, _, _ in shards]
    reader = Task(Kind.T if barriers < 3 else Kind.N, 0, 0)
    first = [part[..., : width(Task(Kind.S, 0, 0), reader, barriers, HIDDEN)] for part in sent]
    assert first[0].shape[-1] == (1 if barriers == 3 else STATISTICS)
    if barriers == 3:
        first = [shard.normalize(0, first) for shard, _, _ in shards]
    made = [shard.differentiate(0, first) for shard, _, _ in shards]
    gradient = shards[0][0].hidden_gradient(0, sent if barriers == 1 else [part for _, part in made])
    for shard, _, _ in shards:
        shard.embedded(0, gradient)
    losses = torch.stack([loss for loss, _ in made])
    assert torch.equal(losses, losses[:1].expand_as(losses))
    heads = torch.cat([own.grad for _, _, own in shards])
    return losses[0], gradient, heads, torch.cat([own.grad for _, own, _ in shards]), embedded


@pytest.mark.parametrize("barriers", [1, 2, 3])
@settings(max_examples=25)
@given(devices=st.integers(1, 9), seed=st.integers(0, 9), spread=st.sampled_from([0.1, 1.0, 300.0]))
def test_the_shards_together_are_the_whole(barriers, devices, seed, spread):
    """Against PyTorch's cross-entropy on the whole matrix in fp64, also where exp would overflow; one target is not
    counted."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in (TOKENS, VOCABULARY, VOCABULARY)]
    hidden, embedding, head = draw[0] * spread, draw[1], draw[2]
    tokens, targets = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    targets[1] = IGNORE
    whole = [x.clone().requires_grad_() for x in (hidden, head, embedding)]
    expected = (
        torch.nn.functional.cross_entropy(whole[0] @ whole[1].T, targets, reduction="sum", ignore_index=IGNORE) / 7
    )
    expected.backward()
    looked_up = torch.nn.functional.embedding(tokens, whole[2])
    looked_up.backward(whole[0].grad)
    found = through_shards(barriers, devices, hidden, embedding, head, tokens, targets, 1 / 7)
    for ours, theirs in zip(found, (expected, *(x.grad for x in whole), looked_up), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("barriers", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_compute_what_one_does(barriers):
    """Also where a stage has replicas, one device turns the pipeline round, and activations wait on the host."""
    offload = create("pipeline.transform", "pipeoffload", times={"host": 0.01})

    def built(name: str, world: World) -> Schedule:
        return with_shards(create("pipeline.schedule", name).build(world.size, 6), barriers, Times(), 1.0)

    def work(world: World) -> None:
        for name in ("chimera", "v_half"):
            check_schedule_runs(built(name, world), Grid(world, world.size))
        both = offload.apply(built("1f1b", world))
        assert both.offloaded
        check_schedule_runs(both, Grid(world, world.size))

    agreed(2, work)
