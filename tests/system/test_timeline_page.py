"""The page of a timeline, in a real browser, from a file and without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from penstock.pipeline.draw.blocks import blocks
from penstock.pipeline.draw.page import page
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, simulate
from penstock.policy import create

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

#: Of two pictures of the canvas, how many pixels differ.
DIFFERENCE = """(() => {
  const now = pen.getImageData(0, 0, view.width, view.height).data;
  let count = 0;
  if (window.before) for (let i = 0; i < now.length; i += 4)
    count += now[i] !== before[i] || now[i + 1] !== before[i + 1] || now[i + 2] !== before[i + 2];
  window.before = now;
  return count;
})()"""


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    schedule = create("pipeline.schedule", "v_half").build(4, 8)
    return simulate(schedule, Costs.even(schedule, link=Link(latency=0.25)))


@pytest.fixture
def shown(simulation, tmp_path):
    path = tmp_path / "timeline.html"
    path.write_text(page(simulation, "v_half"))
    with Browser(tmp_path / "profile") as browser:
        size = {"width": 1200, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        browser.call("Page.navigate", url=Path(path).as_uri())
        browser.until("document.readyState === 'complete' && typeof follow === 'function'")
        browser.run(DIFFERENCE)
        yield browser
        assert [text for text in browser.complaints if "willReadFrequently" not in text] == []  # that is our reading


def press(browser: Browser, key: str) -> None:
    browser.run(f"window.dispatchEvent(new KeyboardEvent('keydown', {{key: {json.dumps(key)}, bubbles: true}}))")


def point(browser: Browser, kind: str, x: float, y: float) -> None:
    browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_a_microbatch_is_followed_through_the_devices(shown, simulation):
    """By choice, by keys and by pointing at a task; said in words, and drawn by outlines and arrows."""
    legend = shown.run("find('legend').innerText")
    for name in ("forward", "input gradient", "weight gradient", "idle", "activations held: full height is"):
        assert name in legend
    shown.run("choice.value = 5; choice.dispatchEvent(new Event('change'))")
    said = shown.run("find('story').innerText")
    own = [block for device in range(4) for block in blocks(simulation, device) if block.task.microbatch == 5]
    first, last = min(own, key=lambda block: block.start), max(own, key=lambda block: block.end)
    assert said.startswith(
        f"Microbatch 5: {len(own)} tasks on 4 devices, {first.task} at {first.start:g} to {last.task} at"
    )
    assert said.endswith(f"{simulation.transfers // 8} messages.")
    assert shown.run(DIFFERENCE) > 1000
    press(shown, "]")
    assert shown.run("[find('story').innerText.slice(0, 13), choice.value]") == ["Microbatch 6:", "6"]
    press(shown, "Escape")
    assert shown.run("find('story').innerText") == ""

    shown.run(DIFFERENCE)
    where = "(() => { const a = view.getBoundingClientRect(), t = data.devices[2].tasks[3], b = box(2, t);"
    x, y, microbatch = shown.run(
        f"{where} return [a.left + b[0] + b[2] / 2, a.top + b[1] + b[3] / 2, t[MICROBATCH]] }})()"
    )
    point(shown, "mouseMoved", x, y)
    assert shown.run("find('story').innerText").startswith(f"Microbatch {microbatch}:")
    assert shown.run("tip.innerText").startswith("device 2, ")
    assert shown.run(DIFFERENCE) > 1000
    point(shown, "mousePressed", x, y)
    point(shown, "mouseReleased", x, y)
    point(shown, "mouseMoved", 5, 5)
    assert shown.run("choice.value") == str(microbatch)
    assert shown.run("find('story').innerText").startswith(f"Microbatch {microbatch}:")


def test_zooming_keeps_the_scale_true(shown, simulation):
    """A task is drawn where the axis has its times, whatever part of the step is shown."""
    places = "(() => { const t = data.devices[1].tasks[4], b = box(1, t); return [at(b[0]), at(b[0] + b[2])] })()"
    block = blocks(simulation, 1)[4]
    for key in ("", "+", "+", "ArrowRight", "-", "0"):
        press(shown, key)
        assert shown.run(places) == pytest.approx([block.start, block.end])
        assert 0 <= shown.run("from") < shown.run("to") <= simulation.makespan
    assert shown.run("[from, to]") == [0, simulation.makespan]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_block_has_its_colour_in_light_and_dark(shown, simulation, scheme):
    """In the middle of each task is its colour, in a gap the row's, and the paper is as the reader likes it."""
    shown.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    shown.run("draw()")
    wrong = shown.run("""(() => {
      const wrong = [], hex = text => [1, 3, 5].map(i => parseInt(text.slice(i, i + 2), 16));
      const seen = (x, y) => [...pen.getImageData(Math.round(x), Math.round(y), 1, 1).data.slice(0, 3)];
      data.devices.forEach((device, row) => device.tasks.forEach(task => {
        const [left, top, width] = box(row, task), found = seen(left + width / 2, top + 3);
        if (found.join() !== hex(data.colours[task[COLOUR]]).join()) wrong.push([task[0], found]);
      }));
      const idle = colour("--row").trim(), gap = data.devices[3].tasks[0][START];
      if (seen(place(gap / 2), 3 * ROW + 3).join() !== hex(idle).join()) wrong.push("idle");
      return wrong;
    })()""")
    assert wrong == []
    paper = shown.run("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
