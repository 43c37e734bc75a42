"""What each schedule promises beyond the law: the order of PyTorch's own, and the figures of its paper."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as pytorch

from penstock.core.errors import ConfigError
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped, zigzag
from penstock.pipeline.ir.torch_csv import from_csv
from penstock.pipeline.ordering.building_block import v_shaped_block
from penstock.pipeline.simulate.simulator import Costs, Simulation, collectives, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create

#: Numbers of devices: all residues by three and by two, and the others for ``-m slow``.
SOME = [p if p in (1, 2, 3, 4, 5, 6, 9) else pytest.param(p, marks=pytest.mark.slow) for p in range(1, 17)]
SHAPES = [(1, 1), (2, 4), (3, 9), (4, 4), (4, 12), (6, 18), (8, 16)]


def build(name: str, p: int, m: int, **options: int) -> Schedule:
    return create("pipeline.schedule", name, **options).build(p, m)


def run(name: str, p: int, m: int, *, f=1.0, i=1.0, w=1.0, **options: int) -> Simulation:
    schedule = build(name, p, m, **options)
    return simulate(schedule, Costs.even(schedule, forward=f, input_grad=i, weight_grad=w))


def translated(actions) -> tuple[Task, ...]:
    """PyTorch's actions of a rank, without its idle steps and its reductions of gradients."""
    return tuple(
        Task(Kind[action.computation_type.value], action.stage_index, action.microbatch_index)
        for action in actions
        if action is not None and action.computation_type.value in Kind.__members__
    )


def rank_orders(cls, p: int, m: int, v: int) -> tuple[tuple[Task, ...], ...]:
    """The order that a schedule class of PyTorch computes for each rank, without process groups."""
    rounds = m // max(1, m // p)
    asked = SimpleNamespace(pp_group_size=p, _n_microbatches=m, _num_stages=p * v, num_stages=p * v, n_local_stages=v,
                            _stages=[None] * v, microbatches_per_round=rounds)  # fmt: skip
    return tuple(translated(cls._calculate_single_rank_operations(asked, rank)) for rank in range(p))


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize(("name", "cls"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
def test_orders_are_those_of_pytorch(name, cls, p, m):
    theirs = getattr(pytorch, cls)._get_pipeline_order(SimpleNamespace(_num_stages=p, _n_microbatches=m))
    # PyTorch numbers the forwards of 1F1B's last rank from 1, in this description of the order (its runtime does not).
    ranks = range(p - 1 if name == "1f1b" else p)
    ours = build(name, p, m).orders
    assert [ours[rank] for rank in ranks] == [translated(theirs[rank]) for rank in ranks]
    last = [kind for kind, *_ in ours[-1]]
    assert last == [kind for kind, *_ in translated(theirs[p - 1])]


@pytest.mark.parametrize(("p", "m"), [*SHAPES, (4, 10), (4, 3), (5, 9), (3, 8), (8, 36)])
@pytest.mark.parametrize("v", [2, 3])
def test_interleaved_order_is_that_of_pytorch(p, m, v):
    assert build("interleaved_1f1b", p, m, chunks=v).orders == rank_orders(pytorch.ScheduleInterleaved1F1B, p, m, v)


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize("v", [1, 2, 3])
def test_breadth_first_takes_as_long_as_pytorchs(p, m, v):
    theirs = Schedule(looped(p, v), rank_orders(pytorch.ScheduleLoopedBFS, p, m, v), m)
    ours = run("breadth_first", p, m, chunks=v)
    assert ours.makespan == simulate(theirs, Costs.even(theirs)).makespan
    assert [Counter(order) for order in ours.schedule.orders] == [Counter(order) for order in theirs.orders]


@pytest.mark.parametrize(("p", "m"), SHAPES)
def test_v_zb_is_as_good_as_pytorchs_zbv(p, m):
    m = max(m, 2 * p)
    theirs = Schedule(zigzag(p, 2), rank_orders(pytorch.ScheduleZBVZeroBubble, p, m, 2), m)
    reference = simulate(theirs, Costs.even(theirs))
    ours = run("v_zb", p, m)
    assert ours.makespan == reference.makespan == 3 * m + (p - 1) / 2
    assert ours.bubble_time == reference.bubble_time == 0
    assert ours.peak_activations == reference.peak_activations == [2 * p] * p


@pytest.mark.parametrize("p", range(1, 25))
def test_blocks_are_those_of_the_authors(p):
    """Offsets that the authors' implementation of V-Min and V-Half gives in closed form."""
    wait = 2 if p % 3 == 0 else 0
    assert v_shaped_block(p, (1, 1, 1, 1)).times == (
        tuple(range(p)),
        tuple(2 * p - 1 - d for d in range(p)),
        tuple(2 * p + wait + d for d in range(p)),
        tuple(4 * p + wait - 1 - d for d in range(p)),
    )
    if p == 1:
        return  # their closed form leaves a gap there that nothing needs
    wait = 3 if p % 2 == 0 else 0
    assert v_shaped_block(p, (2, 1, 2, 1)).times == (
        tuple(2 * d for d in range(p)),
        tuple(3 * p - 2 - d for d in range(p)),
        tuple(3 * p + wait - 1 + 2 * d for d in range(p)),
        tuple(6 * p + wait - 2 - d for d in range(p)),
    )


@pytest.mark.parametrize("p", SOME)
def test_memory_of_v_shaped_schedules(p):
    """The authors' table, in activations of one of a device's two stages, attained with microbatches enough."""
    m = 4 * p
    for name, peak in (("v_min", (p + 4) // 3), ("v_half", (p + 2) // 2), ("v_zb", p)):
        assert max(run(name, p, m).peak_activations) == 2 * peak, name


ORDERS = Path(__file__).parents[1] / "orders"


def test_the_handed_orders_are_met():
    """PyTorch's of interleaved 1F1B where m is no multiple of p, and that of DualPipeV."""
    for name, file in (
        ("interleaved_1f1b", "ScheduleInterleaved1F1B_4_10_compute_only"),
        ("dualpipev", "dualpipev_4_8"),
    ):
        theirs = from_csv((ORDERS / f"{file}.csv").read_text(), file)
        assert build(name, theirs.devices, theirs.microbatches) == theirs
    assert run("interleaved_1f1b", 4, 10).makespan == 34.5


@pytest.mark.parametrize("p", range(1, 10))
def test_interleaved_1f1b_is_no_slower_than_1f1b_for_any_number_of_microbatches(p):
    for m in range(1, 3 * p + 2):
        assert run("interleaved_1f1b", p, m).makespan <= 3 * (m + p - 1)


def test_uneven_rounds_begin_with_the_larger_ones():
    """Here the smaller ones first would wait for each other for ever."""
    assert run("interleaved_1f1b", 9, 23, chunks=3).makespan > 0


def test_grouped_interleaving_holds_half_of_interleaved_1f1b():
    """The figures of the authors' program, in units of a forward of a p-th of the model."""
    found = run("grouped_interleaving", 4, 8, group=2)
    assert (found.makespan, max(found.peak_bytes)) == (28.0, 3.0)
    assert found.makespan <= run("interleaved_1f1b", 4, 8).makespan
    for p in (4, 8, 16):
        assert max(run("grouped_interleaving", p, 4 * p).peak_bytes) <= 0.55 * max(
            run("interleaved_1f1b", p, 4 * p).peak_bytes
        )


@pytest.mark.parametrize("p", SOME)
def test_1f1b_v_takes_the_time_of_1f1b_in_two_thirds_of_its_memory(p):
    """The peak is that of the authors' block."""
    for m in (p, 2 * p, 4 * p):
        assert run("1f1b_v", p, m).makespan <= 3 * (m + p - 1)
    assert max(run("1f1b_v", p, 4 * p).peak_activations) == 2 * (2 * p // 3 + 1)


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (2, 2, 1)])
def test_bubbles_of_dualpipe_are_those_of_its_paper(p, f, i, w):
    """(p/2-1)(F&B + B - 3W) for DualPipe, (p-1) times that of stages half as long for DualPipeV, where a pair gains
    nothing; and what it gains does not turn into idle time."""
    stage = (f + i + w) + (i + w) - 3 * w
    for m in (2 * p, 4 * p):
        assert run("dualpipe", p, m, f=f, i=i, w=w).bubble_time == pytest.approx((p / 2 - 1) * stage)
        assert run("dualpipev", p, m, f=f, i=i, w=w).bubble_time == pytest.approx((p - 1) * stage / 2)
    schedule = build("dualpipev", p, 4 * p)
    plain, gained = (simulate(schedule, Times(overlap=share).costs(schedule)).makespan for share in (1.0, 0.7))
    assert gained < 0.9 * plain


@pytest.mark.parametrize("p", SOME[1:])
def test_bubbles_of_v_shaped_schedules(p):
    """Against 1F1B's 3(p-1): about two thirds for V-Min, half for V-Half; they do not grow with m."""
    bubbles = {name: [run(name, p, m).bubble_time for m in (4 * p, 6 * p)] for name in ("v_min", "v_half", "v_zb")}
    assert all(short == long for short, long in bubbles.values()), bubbles
    assert bubbles["v_min"][0] <= 2 * p
    assert bubbles["v_half"][0] <= 1.5 * p
    assert bubbles["v_zb"][0] == 0


@pytest.mark.parametrize("p", [2, 4, 6, 8, 12])
def test_a_unit_of_chimera_has_the_bubble_of_its_paper(p):
    """With B = 2F and m = p: (p-2)/(3m/2 + p-2) of the time."""
    assert run("chimera", p, p).bubble_share == pytest.approx((p - 2) / (1.5 * p + p - 2), abs=1e-12)
    assert max(run("chimera", p, 4 * p).peak_activations) <= p


@pytest.mark.parametrize(("m", "makespan"), [(8, 30), (16, 57), (32, 111)])
def test_bitpipe_is_no_slower_than_the_authors_program(m, makespan):
    """On 8 devices, with their order of so many microbatches."""
    assert run("bitpipe", 8, m).makespan <= makespan


@pytest.mark.parametrize("p", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["bitpipe", "chimera", "hanayo"])
def test_more_microbatches_do_not_repeat_bubbles(name, p):
    """Never behind 1F1B; and where both are in their steady state, further microbatches take their work alone."""
    for m in (p, p + 1, 2 * p, 4 * p, 8 * p):
        found = run(name, p, m)
        assert found.makespan <= 3 * (m + p - 1)
        assert max(found.peak_bytes) <= p + 1
    assert run(name, p, 12 * p).makespan <= run(name, p, 8 * p).makespan + 3 * 4 * p + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitpipe", "chimera", "hanayo"])
def test_many_microbatches_on_many_devices_take_less_than_1f1b(name):
    assert run(name, 32, 256).makespan < run("1f1b", 32, 256).makespan == 861


@pytest.mark.parametrize("p", [4, 6, 8, 12])
def test_bitpipe_beats_interleaved_1f1b_and_chimera_on_a_unit(p):
    bitpipe = run("bitpipe", p, p).makespan
    assert bitpipe < run("interleaved_1f1b", p, p).makespan
    assert bitpipe < run("chimera", p, p).makespan


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("name", ["bitpipe", "chimera"])
def test_each_direction_carries_half_of_the_microbatches(name, p):
    for order in build(name, p, 2 * p).orders:
        forwards = Counter((task.stage, task.replica) for task in order if task.kind is Kind.F)
        assert set(forwards.values()) == {p}
        assert len(forwards) == (4 if name == "bitpipe" else 2)


@pytest.mark.parametrize("p", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_hanayos_bubble_falls_with_its_waves(p):
    """For a unit of p microbatches, by about half for twice the waves; each device holds as much as 1F1B's first."""
    shares = [run("1f1b", p, p).bubble_share, *(run("hanayo", p, p, waves=w).bubble_share for w in (1, 2, 4, 8))]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == len(shares)
    idle = [run("hanayo", p, p, waves=waves).bubble_time for waves in (1, 2, 4, 8)]
    assert all(more <= 0.55 * fewer for fewer, more in itertools.pairwise(idle)), idle
    for m in (p, 3 * p, 3 * p + 1):
        assert max(run("hanayo", p, m, waves=2).peak_bytes) <= p + 1


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("v", [1, 2, 4])
def test_zeropp_trades_memory_for_gathers(p, v):
    """The paper's frontier over the size of the unit: gathers fall and memory grows, bubbles stay below 1F1B's."""
    m = 12 * p
    gathers, peaks = [], []
    for size in (p, 2 * p, 4 * p, m):
        simulation = run("zeropp", p, m, chunks=v, unit=size)
        units = m // size
        # A device with one stage only adds up its gradients over all units.
        assert collectives(simulation.schedule) == ([2 * units] * p * v, [units if v > 1 else 1] * p * v)
        if size * v >= 2 * (p - 1):  # less W than that cannot fill the wait between the units
            assert simulation.bubble_time == 2 * (p - 1) / v < 3 * (p - 1)
        assert simulation.peak_activations == [
            size * v + (min(size * v, 2 * (p - 1 - rank)) if units > 1 else 0) for rank in range(p)
        ]
        gathers.append(simulation.summary()["gathers"])
        peaks.append(max(simulation.peak_activations))
    assert gathers == sorted(gathers, reverse=True)
    assert peaks == sorted(peaks)
    assert run("zeropp", p, m, chunks=v).schedule == run("zeropp", p, m, chunks=v, unit=p).schedule


@pytest.mark.parametrize(
    ("name", "asked", "works"),
    [
        ("dualpipev", (4, 7), (4, 8)),
        ("dualpipe", (3, 5), (4, 8)),
        ("dualpipe", (4, 9), (4, 10)),
        ("chimera", (3, 5), (4, 5)),
        ("bitpipe", (1, 1), (2, 1)),
    ],
)
def test_refusals_name_the_smallest_change(name, asked, works):
    with pytest.raises(RefusalError, match=f"It works with {works[0]} devices and {works[1]} microbatches") as caught:
        build(name, *asked)
    assert (caught.value.devices, caught.value.microbatches) == works
    tried = [(asked[0], m) for m in range(asked[1], works[1])] + [(p, asked[1]) for p in range(asked[0], works[0])]
    for numbers in tried:
        with pytest.raises(RefusalError):
            build(name, *numbers)


@pytest.mark.parametrize(("name", "options"), [("interleaved_1f1b", {"chunks": 1}), ("hanayo", {"waves": 0})])
def test_options_are_checked(name, options):
    with pytest.raises(ConfigError):
        build(name, 4, 4, **options)
