"""A timeline as one HTML page that needs nothing else: zoom, hover, and the activations of each device."""

from __future__ import annotations

import html
import importlib.resources
import json

from penstock.pipeline.draw.palette import NAMES, colours, key
from penstock.pipeline.simulate.simulator import Simulation


def page(simulation: Simulation, title: str) -> str:
    """The page, from the template ``page.html`` beside this file, with the timeline as JSON inside."""
    shades = colours(simulation.schedule)
    table = sorted(set(shades.values()))
    number = {shade: index for index, shade in enumerate(table)}
    data = {
        "makespan": simulation.makespan,
        "colours": table,
        "kinds": {kind.name: name for kind, name in NAMES.items()},
        "summary": simulation.summary(),
        "devices": [
            {
                "tasks": [
                    [str(task), task.kind.name, start, end, number[shades[key(task)]]]
                    for task, start, end in zip(order, simulation.starts[device], simulation.ends[device], strict=True)
                ],
                "memory": simulation.memory(device),
            }
            for device, order in enumerate(simulation.schedule.orders)
        ],
    }
    template = importlib.resources.files("penstock.pipeline.draw").joinpath("page.html").read_text(encoding="utf-8")
    # In a script element, nothing but "</" could end the data.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)
