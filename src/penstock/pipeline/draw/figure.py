"""A timeline as a PNG picture, with the activations that each device holds."""

from __future__ import annotations

import io

from penstock.pipeline.draw.palette import HUES, NAMES, colours, key
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Simulation

#: Above so many tasks, labels would be specks.
LABELLED = 800


def png(simulation: Simulation, title: str) -> bytes:
    """The picture: above, a row for each device; below, its bytes of activations over time."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule = simulation.schedule
    figure = Figure(figsize=(12, 2.2 + 0.38 * min(schedule.devices, 64)), layout="constrained")
    rows, memory = figure.subplots(2, 1, sharex=True, height_ratios=(max(2, min(schedule.devices, 64)), 2.5))
    shades = colours(schedule)
    labelled = sum(map(len, schedule.orders)) <= LABELLED
    for device, order in enumerate(schedule.orders):
        spans = [
            (start, end - start) for start, end in zip(simulation.starts[device], simulation.ends[device], strict=True)
        ]
        faces = [shades[key(task)] for task in order]
        rows.broken_barh(spans, (device - 0.45, 0.9), facecolors=faces, edgecolors="white", linewidth=0.4)
        for task, (start, length) in zip(order, spans, strict=True):
            if labelled and length:
                rows.text(start + length / 2, device, task.microbatch, ha="center", va="center", fontsize=7)
        times, sizes = zip(*simulation.memory(device), strict=True)
        memory.step(times, sizes, where="post", linewidth=1, label=f"device {device}")
    figure.suptitle(title)  # above the legend
    rows.set(ylabel="device", ylim=(schedule.devices - 0.5, -0.5), xlim=(0, simulation.makespan or 1))
    rows.set_yticks(range(0, schedule.devices, -(-schedule.devices // 32)))
    kinds = sorted({task.kind for order in schedule.orders for task in order})
    patches = [Patch(color=[part / 255 for part in HUES[Kind(kind)]], label=NAMES[kind]) for kind in kinds]
    rows.legend(handles=patches, ncols=len(patches), loc="lower right", fontsize=8, bbox_to_anchor=(1, 1))
    memory.set(xlabel="time", ylabel="activations")
    if schedule.devices <= 8:
        memory.legend(fontsize=7, ncols=2, loc="upper right")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
