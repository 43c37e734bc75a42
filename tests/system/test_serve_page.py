"""The page at /, in a real browser."""

from __future__ import annotations

import json

import pytest

from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture
def page(server, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=f"{server.url}/")
        browser.until("document.readyState === 'complete' && typeof watch === 'function'")
        yield browser


def text_of(page: Browser, id: str) -> str:
    return page.run(f"document.getElementById({json.dumps(id)}).innerText")


def use_key(page: Browser, key: str) -> None:
    page.run(f"key.value = {json.dumps(key)}; at('access').requestSubmit()")


def test_the_page_wants_a_key_then_chats_completes_and_watches(server, page, tmp_path):
    page.until("at('state').innerText === 'this server wants an API key'")
    page.complaints.clear()  # the browser logs the 401
    use_key(page, "secret-1")
    page.until("at('state').innerText === 'connected'")
    assert text_of(page, "model") == "python-1m"
    assert "of 512 blocks" in page.until("at('blocks').innerText")

    page.run("at('max_tokens').value = 30; at('temperature').value = 0; prompt.value = 'x <b>1</b>'")
    page.run("prompt.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', cancelable: true, bubbles: true}))")
    page.until("!under && log.querySelector('.assistant') && log.innerText.includes('first text after')", 30)
    # What is said is text, never markup.
    assert page.run("log.querySelector('.user').textContent") == "x <b>1</b>"
    messages = [{"role": "user", "content": "x <b>1</b>"}]
    answer = server.post("/v1/chat/completions", messages=messages, max_tokens=30, temperature=0, top_p=0.95).json()
    assert page.run("log.querySelector('.assistant').textContent") == answer["choices"][0]["message"]["content"]

    page.run("at('complete').click(); prompt.value = 'def f('; at('ask').requestSubmit()")
    page.until("!under && log.querySelector('.text') && log.innerText.includes('first text after')", 30)
    answer = server.post("/v1/completions", prompt="def f(", max_tokens=30, temperature=0, top_p=0.95).json()
    assert page.run("log.querySelector('.text').textContent") == "def f(" + answer["choices"][0]["text"]
    page.until("Number(at('output').innerText) >= 60 || at('output').innerText.endsWith('K')")
    assert not page.complaints


def test_stop_ends_a_request(server, page):
    use_key(page, "secret-1")
    page.until("at('state').innerText === 'connected'")
    page.run(
        "choose(at('complete')); at('max_tokens').value = 2000; prompt.value = 'import'; at('ask').requestSubmit()"
    )
    page.until("at('running').innerText === '1'", 20)
    page.run("at('stop').click()")
    page.until("log.innerText.includes('stopped')")
    server.until_idle()


def test_what_became_of_a_request_is_told_by_a_click_or_by_its_id(server, page):
    answer = server.post("/v1/completions", prompt="x", n=2, max_tokens=3, ignore_eos=True).json()
    use_key(page, "secret-1")
    page.until(f"at('newest').children.length && at('newest').children[0].dataset.id === {answer['id']!r}")
    page.run("at('newest').children[0].click()")
    page.until("at('course').querySelectorAll('ol').length === 2")
    told = server.http.get(f"/v1/requests/{answer['id']}/events").json()["continuations"][0]
    shown = page.run("[...at('course').querySelector('ol').children].map(e => e.textContent)")
    assert shown == [line.replace("  ", "") for line in told["story"]]
    assert page.run("at('course').querySelector('p').textContent") == told["summary"]
    assert page.run("at('newest').children[0].getAttribute('aria-pressed')") == "true"
    page.complaints.clear()
    page.run("at('request').value = 'no <b>such'; at('find').requestSubmit()")
    assert "no <b>such" in page.until("at('course').querySelector('.fault')?.textContent")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_what_people_need_to_use_it(server, page, colours, width):
    """Every control has a name, text stands out from its ground by 4.5 to 1, and nothing hangs over the edge."""
    server.post("/v1/completions", prompt="x", max_tokens=1)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    page.run("key.value = 'secret-1'; at('access').requestSubmit()")
    page.until("at('newest').children.length")
    page.run("at('newest').children[0].click()")
    page.until("at('course').querySelectorAll('li').length")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "textbox", "tab", "spinbutton", "meter", "image")
    ]
    assert len(controls) >= 12
    assert [node for node in controls if not node["name"]["value"]] == []
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    contrasts = page.run("""(() => {
      const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
          .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ground = e => { const c = getComputedStyle(e).backgroundColor;
          return /rgba\\(.*, 0\\)/.test(c) && e.parentElement ? ground(e.parentElement) : c; };
      return [...document.querySelectorAll("h1, h1 span, h2, h3, li, time, dt, dd, dd small, label, .note, " +
        "button:not(:disabled)")].map(e => [light(getComputedStyle(e).color), light(ground(e))])
        .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)); })()""")
    assert len(contrasts) > 20
    assert min(contrasts) >= 4.5
