"""A timeline as a PNG picture, with the activations that each device holds."""

from __future__ import annotations

import io
import math

from penstock.pipeline.draw.blocks import Block, blocks, curve, joined, messages
from penstock.pipeline.draw.palette import HUES, NAMES, chunked, colours, key
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Simulation

DPI = 120

#: Points: of a block's width, below which it has no edges; of a digit's, at the size of labels; of a pixel's.
EDGED, DIGIT, PIXEL = 3.0, 5.5, 72 / DPI

#: Of a device's row, from top to bottom: its blocks, and the curve of its activations.
BLOCKS, CURVE = 0.58, 0.3

INK, FAINT, ROW, MEMORY = "#23272f", "#6b7280", "#eef0f3", "#a3476b"


def png(simulation: Simulation, title: str) -> bytes:
    """The picture: a row for each device, with its blocks, and below them its bytes of activations over time.

    All curves have one scale. Messages that take time are lines from the end of one task to their arrival.
    """
    from matplotlib.figure import Figure

    schedule = simulation.schedule
    whole = simulation.makespan or 1.0
    height = min(0.5, 24 / schedule.devices)  # inches of a row
    figure = Figure(figsize=(13, 1.7 + height * schedule.devices), layout="constrained", facecolor="white")
    axes = figure.subplots()
    width = 72 * 11.5 / whole  # points of a second
    for device in range(schedule.devices):
        _row(axes, simulation, device, width)
        _memory(axes, simulation, device)
    if any(message.arrives > message.sent for message in messages(simulation)):
        _messages(axes, simulation)
    axes.set(ylim=(schedule.devices - 0.04, -0.04), xlim=(0, whole))
    axes.set_yticks(
        [device + BLOCKS / 2 for device in range(0, schedule.devices, -(-schedule.devices // 32))],
        [str(device) for device in range(0, schedule.devices, -(-schedule.devices // 32))],
    )
    axes.tick_params(length=0, colors=FAINT, labelsize=9)
    axes.set_xlabel("time", color=FAINT, fontsize=9)
    axes.set_ylabel("device", color=FAINT, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=30)
    _legend(axes, simulation)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


def _row(axes, simulation: Simulation, device: int, width: float) -> None:  # type: ignore[no-untyped-def]
    """The blocks of a device; ``width`` is in points a second."""
    shades = colours(simulation.schedule)
    axes.broken_barh([(0, simulation.makespan or 1.0)], (device, BLOCKS), facecolors=ROW, linewidth=0)
    for lane in (-1, 0, 1):
        own = [block for block in blocks(simulation, device) if block.lane == lane]
        edged = [width * (block.end - block.start) >= EDGED for block in own]
        reaches = [0.0 if edge else PIXEL / width * join for edge, join in zip(edged, joined(own), strict=True)]
        top, height = (device, BLOCKS) if lane < 0 else (device + lane * BLOCKS / 2, BLOCKS / 2)
        axes.broken_barh(
            [(block.start, block.end - block.start + reach) for block, reach in zip(own, reaches, strict=True)],
            (top, height),
            facecolors=[shades[key(block.task)] for block in own],
            edgecolors="white",
            snap=False,  # so that a part of a pixel is a part of its colour
            linewidth=[0.7 * edge for edge in edged],
        )
        for block in own:
            _label(axes, block, top + height / 2, width, size=8 if lane < 0 else 6)


def _label(axes, block: Block, middle: float, width: float, size: float) -> None:  # type: ignore[no-untyped-def]
    name = str(block.task.microbatch)
    if width * (block.end - block.start) >= DIGIT * len(name) + 2:
        centre = (block.start + block.end) / 2
        axes.text(centre, middle, name, ha="center", va="center_baseline", fontsize=size, color=INK)


def _memory(axes, simulation: Simulation, device: int) -> None:  # type: ignore[no-untyped-def]
    """The activations of a device, as a filled curve of steps."""
    most = max(simulation.peak_bytes) or 1.0
    times, sizes = zip(*curve(simulation, device), strict=True)
    base = device + BLOCKS + 0.04 + CURVE
    times, levels = (*times, simulation.makespan), [base - CURVE * size / most for size in (*sizes, sizes[-1])]
    axes.fill_between(times, levels, base, step="post", color=MEMORY, alpha=0.28, linewidth=0)
    axes.step(times, levels, where="post", color=MEMORY, linewidth=0.8)
    peak = f" {_short(simulation.peak_bytes[device])}"
    axes.annotate(
        peak, (1, base - CURVE / 2), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=MEMORY
    )


def _messages(axes, simulation: Simulation) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.collections import LineCollection

    lines = [
        ((sent, source + BLOCKS * (source < target)), (arrives, target + BLOCKS * (source > target)))
        for source, _, target, _, sent, arrives in messages(simulation)
    ]
    faint = min(0.9, 40 / math.sqrt(1 + len(lines)) / 10)
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=0.6, alpha=faint, zorder=3))


def _legend(axes, simulation: Simulation) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = sorted({task.kind for order in simulation.schedule.orders for task in order})
    handles: list[Patch | Line2D] = [
        Patch(facecolor=[part / 255 for part in HUES[Kind(kind)]], label=f"{Kind(kind).name}, {NAMES[kind]}")
        for kind in kinds
    ]
    if chunked(simulation.schedule.placement):
        handles.append(Patch(facecolor="none", label="(lighter: later chunks of a device)"))
    handles.append(Patch(facecolor=ROW, label="idle"))
    scale = _short(max(simulation.peak_bytes))
    handles.append(
        Patch(facecolor=MEMORY, alpha=0.4, label=f"activations held (full height {scale}; right: each device's peak)")
    )
    if any(message.arrives > message.sent for message in messages(simulation)):
        handles.append(Line2D([], [], color=INK, linewidth=0.8, label="message"))
    axes.legend(
        handles=handles,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        borderaxespad=0.3,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _short(size: float) -> str:
    return f"{size:.4g}"
