"""Pipeline schedules against the baselines of their papers, simulated.

Numbers of devices and microbatches are of the size of the papers' experiments; times are in units of a forward of a
p-th of the model. Nothing but the schedules differs, so this is what their papers' ideas give, without what their
implementations add.
"""

from __future__ import annotations

import itertools
from typing import Any

from penstock.core.bench import Bench
from penstock.pipeline.partition.balanced import balanced
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create

#: Profiles of transformers in the zero-bubble paper have W well below F and I, and short transfers.
TRANSFORMER = Times(forward=1.0, input_grad=1.0, weight_grad=0.7, transfer=0.04)
#: Papers before it count a backward as two forwards.
PLAIN = Times()
KINDS = ("forward", "input_grad", "weight_grad")
#: What a paper says of the ratio to its baseline.
GAIN, PARITY = "gain", "parity"


def main(bench: Bench) -> None:
    large = [(8, 16)] if bench.quick else [(8, 32), (32, 128)]
    for p, m in large:
        zero_bubble(bench, p, m)
        controllable_memory(bench, p, m)
    for p in (8,) if bench.quick else (8, 32):
        waves(bench, p)
        both_ways(bench, p)
    for p, m in large:
        offload(bench, p, m)
        vocabulary(bench, p, m)


def zero_bubble(bench: Bench, p: int, m: int) -> None:
    """The paper's ZB-1p and ZB-2p. As there, no device waits for others at the end: a step takes the longest span."""
    peer = run("1f1b", p, m, TRANSFORMER)
    for name, memory in (("zb_auto", p), ("zb_auto", 2 * p), ("zb_h1", None), ("zb_h2", None)):
        options: dict[str, Any] = {"times": TRANSFORMER.model_dump(), "memory": memory} if memory else {}
        found = run(name, p, m, TRANSFORMER, **options)
        subject = f"{name} in {max(found.peak_activations) / p:.2g}x 1F1B's memory"
        throughput(bench, subject, found, "1f1b", peer, TRANSFORMER, paper=3, span=True)


def controllable_memory(bench: Bench, p: int, m: int) -> None:
    """Throughput and peak memory of the V-shaped schedules."""
    peer = run("1f1b", p, m, TRANSFORMER)
    for name in ("v_min", "v_half", "v_zb"):
        found = run(name, p, m, TRANSFORMER)
        # Of v_min the paper says "comparable throughput", of v_zb "the same activation memory".
        throughput(
            bench,
            name,
            found,
            "1f1b",
            peer,
            TRANSFORMER,
            paper=21,
            claim=PARITY if name == "v_min" else GAIN,
            span=True,
        )
        memory(bench, name, found, "1f1b", peer, TRANSFORMER, paper=21, claim=PARITY if name == "v_zb" else GAIN)
    blocks_by_times(bench, p, m)
    whole_backwards(bench, p, m)


def blocks_by_times(bench: Bench, p: int, m: int) -> None:
    """The block that is chosen by times, within the memory of each named one."""
    for name in ("v_min", "v_half"):
        peer = run(name, p, m, TRANSFORMER)
        limit = max(peer.peak_bytes)
        found = run("v_auto", p, m, TRANSFORMER, times=TRANSFORMER.model_dump(), memory=limit)
        throughput(bench, f"v_auto in the memory of {name}", found, name, peer, TRANSFORMER)


def whole_backwards(bench: Bench, p: int, m: int) -> None:
    """What a V and small groups save of the memory of 1F1B and interleaved 1F1B, and what time that takes."""
    for name, other, paper in (("1f1b_v", "1f1b", 21), ("grouped_interleaving", "interleaved_1f1b", 170)):
        found, peer = run(name, p, m, PLAIN), run(other, p, m, PLAIN)
        throughput(bench, name, found, other, peer, PLAIN, paper=paper, claim=PARITY)
        memory(bench, name, found, other, peer, PLAIN, paper=paper)


#: Microbatches for each device. The papers' pictures and most of their claims are of one unit.
UNITS = (1, 2, 4, 8)


def waves(bench: Bench, p: int) -> None:
    """Hanayo on one unit of p microbatches and on more."""
    for units, other in itertools.product(UNITS, ("chimera", "1f1b")):
        peer = run(other, p, units * p, PLAIN)
        for count in (1, 2, 4) if units == 1 else (2,):
            found = run("hanayo", p, units * p, PLAIN, waves=count)
            throughput(bench, f"hanayo, {count} waves", found, other, peer, PLAIN, paper=7)


def both_ways(bench: Bench, p: int) -> None:
    """BitPipe on one unit of p microbatches and on more, without the exchange of gradients between its two copies."""
    for units, other in itertools.product(UNITS, ("interleaved_1f1b", "chimera", "1f1b")):
        found = run("bitpipe", p, units * p, PLAIN)
        throughput(bench, "bitpipe", found, other, run(other, p, units * p, PLAIN), PLAIN, paper=0)


def offload(bench: Bench, p: int, m: int) -> None:
    """Offload where copies hide, and where they take longer than the work between them."""
    for host in (0.5, 1.5):
        times = Times(weight_grad=0.7, transfer=0.04, host=host)
        schedule = create("pipeline.schedule", "interleaved_1f1b").build(p, m)
        plain = simulate(schedule, times.costs(schedule))
        moved = create("pipeline.transform", "pipeoffload", times=times.model_dump()).apply(schedule)
        found = simulate(moved, times.costs(moved))
        share = len(moved.offloaded) / (moved.stages * m)
        subject = f"interleaved_1f1b + pipeoffload, {share:.0%} offloaded"
        # "Negligible overhead": no throughput is claimed to be gained, memory is.
        throughput(bench, subject, found, "interleaved_1f1b", plain, times, paper=170, claim=PARITY)
        memory(bench, subject, found, "interleaved_1f1b", plain, times, paper=170)


def vocabulary(bench: Bench, p: int, m: int) -> None:
    """The output layer sharded, against all of it on the last stage, and against that with layers moved from there to
    the others.

    A product with its matrix takes V / 12h times as long as the forward of a layer of width h, or a tenth less with
    attention to 2,048 tokens: for h = 3,072 and 4 layers on a device, 0.2 of a device's forward at V = 32 k, and 1.6 of
    it at 256 k.
    """
    for name, barriers, output in itertools.product(("1f1b", "v_half"), (3, 2, 1), (0.2, 1.6)):
        times = TRANSFORMER.model_copy(update={"output": output})
        schedule = create("pipeline.schedule", name).build(p, m)
        plain = simulate(schedule, times.costs(schedule))
        moved = create("pipeline.transform", "vocabulary", barriers=barriers, times=times.model_dump()).apply(schedule)
        found = simulate(moved, times.costs(moved))
        subject = f"{name} + vocabulary, barriers={barriers}"
        throughput(bench, subject, found, name, plain, times, paper=117)
        # What it costs; the memory that the paper claims to save is that of weights, which are not counted here.
        memory(bench, subject, found, name, plain, times)
        if name == "1f1b":
            uneven = simulate(schedule, without_layers(times, p).costs(schedule))
            throughput(bench, subject, found, f"{name}, layers moved", uneven, times, paper=117)


def without_layers(times: Times, p: int) -> Times:
    """The times of stages of 4 layers on average, cut as evenly as whole layers and the output layer allow."""
    shares = [len(stage) / 4 for stage in balanced([0.25] * (4 * p), p, last=times.output)]
    each = {field: tuple(getattr(times, field) * share for share in shares) for field in KINDS}
    return times.model_copy(update=each)


def run(name: str, p: int, m: int, times: Times, /, **options: Any) -> Simulation:
    """A schedule, built and simulated."""
    schedule = create("pipeline.schedule", name, **options).build(p, m)
    return simulate(schedule, times.costs(schedule))


def throughput(
    bench: Bench,
    subject: str,
    found: Simulation,
    peer: str,
    other: Simulation,
    times: Times,
    *,
    paper: int | None = None,
    claim: str = GAIN,
    span: bool = False,
) -> None:
    """A row of microbatches in the time of a forward, for synchronous steps or, with ``span``, for unsynchronised;
    without ``paper``, it is no evidence for one."""
    value, peer_value = (
        simulation.schedule.microbatches / (simulation.longest_span if span else simulation.makespan)
        for simulation in (found, other)
    )
    shown = {"metric": "simulated throughput", "unit": "microbatches/F", "better": "higher"}
    papers = () if paper is None else (paper,)
    row(bench, subject, found, peer, times, value=value, peer_value=peer_value, papers=papers, claim=claim, **shown)


def memory(
    bench: Bench,
    subject: str,
    found: Simulation,
    peer: str,
    other: Simulation,
    times: Times,
    *,
    paper: int | None = None,
    claim: str = GAIN,
) -> None:
    """A row of the highest peak of activations of a device; without ``paper``, it is no evidence for one."""
    value, peer_value = max(found.peak_bytes), max(other.peak_bytes)
    papers = () if paper is None else (paper,)
    shown = {"metric": "simulated peak memory", "unit": "activations", "better": "lower"}
    row(bench, subject, found, peer, times, value=value, peer_value=peer_value, papers=papers, claim=claim, **shown)


def row(
    bench: Bench, subject: str, found: Simulation, peer: str, times: Times, *, value: float, peer_value: float, **fields
) -> None:
    """One comparison. Simulations do not vary: there is nothing to repeat."""
    schedule = found.schedule
    bench.row(
        subject=subject,
        setting=f"p={schedule.devices}, m={schedule.microbatches}, I={times.input_grad:g}, W={times.weight_grad:g}, "
        f"transfer={times.transfer:g}, host={times.host:g}" + (f", output={times.output:g}" if times.output else ""),
        value=value,
        peer=peer,
        peer_value=peer_value,
        ratio=value / peer_value,
        simulated=True,
        **fields,
    )
