"""The colours of tasks, alike in all pictures: a hue for each kind, lighter for later chunks of a device."""

from __future__ import annotations

from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Placement, Schedule, Task

#: Red, green and blue of the first chunk of each kind.
HUES = {
    Kind.F: (66, 133, 204),
    Kind.I: (38, 150, 119),
    Kind.W: (226, 170, 60),
    Kind.B: (98, 160, 70),
    Kind.E: (150, 180, 210),
    Kind.S: (190, 110, 170),
    Kind.N: (130, 120, 190),
    Kind.T: (205, 95, 85),
    Kind.G: (170, 200, 150),
}
NAMES = {
    Kind.F: "forward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.B: "backward",
    Kind.E: "embedding",
    Kind.S: "scores",
    Kind.N: "normalizers",
    Kind.T: "output gradients",
    Kind.G: "embedding gradient",
}


def colours(schedule: Schedule) -> dict[tuple[Kind, int, int], str]:
    """``#rrggbb`` of each (kind, stage, replica)."""
    chunks = _chunks(schedule.placement)
    most = max(chunks.values())
    shades = {
        (kind, *place): _lighter(hue, 0.55 * chunk / most if most else 0.0)
        for place, chunk in chunks.items()
        for kind, hue in HUES.items()
    }
    return shades | {(kind, 0, 0): _lighter(HUES[kind], 0.0) for kind in VOCABULARY}


def chunked(placement: Placement) -> bool:
    """Whether a device has several stages, or replicas of them, which differ in their shades."""
    return max(_chunks(placement).values()) > 0


def key(task: Task) -> tuple[Kind, int, int]:
    """Where :func:`colours` has the colour of ``task``; shards of the vocabulary are alike."""
    return (task.kind, 0, 0) if task.kind in VOCABULARY else (task.kind, task.stage, task.replica)


def _chunks(placement: Placement) -> dict[tuple[int, int], int]:
    """For each (stage, replica), how many its device has before it."""
    counts: dict[int, int] = {}
    chunks = {}
    for stage, devices in enumerate(placement):
        for replica, device in enumerate(devices):
            chunks[stage, replica] = counts.get(device, 0)
            counts[device] = chunks[stage, replica] + 1
    return chunks


def _lighter(colour: tuple[int, int, int], share: float) -> str:
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in colour)
