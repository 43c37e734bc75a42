"""A timeline as one HTML page that needs nothing else: zoom, memory, and the way of each microbatch."""

from __future__ import annotations

import html
import importlib.resources
import json
from typing import Any

from penstock.pipeline.draw.blocks import blocks, curve, messages
from penstock.pipeline.draw.palette import HUES, NAMES, chunked, colours, key
from penstock.pipeline.simulate.simulator import Simulation


def page(simulation: Simulation, title: str) -> str:
    """The page, from the template ``page.html`` beside this file, with the timeline as JSON inside."""
    template = importlib.resources.files("penstock.pipeline.draw").joinpath("page.html").read_text(encoding="utf-8")
    # In a script element, nothing but "</" could end the data.
    text = json.dumps(_data(simulation), separators=(",", ":")).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)


def _data(simulation: Simulation) -> dict[str, Any]:
    """What the page shows.

    A task is [name, kind, microbatch, start, end, number of its colour, lane], with the lanes of
    :class:`~penstock.pipeline.draw.blocks.Block`; a message is as in that module.
    """
    schedule = simulation.schedule
    shades = colours(schedule)
    table = sorted(set(shades.values()))
    number = {shade: index for index, shade in enumerate(table)}
    used = sorted({task.kind for _, task in simulation.tasks()})
    return {
        "makespan": simulation.makespan,
        "microbatches": schedule.microbatches,
        "colours": table,
        "kinds": {kind.name: [NAMES[kind], "#{:02x}{:02x}{:02x}".format(*HUES[kind])] for kind in used},
        "chunked": chunked(schedule.placement),
        "pairs": bool(schedule.overlapped),
        "summary": simulation.summary(),
        "devices": [
            {
                "tasks": [
                    [str(task), task.kind.name, task.microbatch, start, end, number[shades[key(task)]], lane]
                    for task, start, end, lane in blocks(simulation, device)
                ],
                "memory": curve(simulation, device),
                "busy": simulation.busy[device],
            }
            for device in range(schedule.devices)
        ],
        "messages": messages(simulation),
    }
