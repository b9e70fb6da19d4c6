"""The page of a report in a headless Chromium: it works by mouse and keyboard, complains of nothing, asks for nothing.

Needs a browser and nothing else (``apt-get install chromium``). Pictures are kept where ``FXCOMPRESS_PICTURES`` says.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from tests.browser import Browser, installed
from tests.test_reporting import Net, record

PROGRAM = installed()

_FOLD_AROUND = """(element => {
    const inside = element.tagName === "SUMMARY" ? element.parentElement : element;
    return inside.parentElement.closest("details").firstElementChild.firstElementChild.textContent;
})(document.activeElement)"""

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium here; install one (apt-get install chromium) or set FXCOMPRESS_BROWSER"
)


class Mixed(nn.Module):
    """Convolutions with batch norm, one shared layer, and a grouped convolution that passes refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.grouped = Net(blocks=12), nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(self.grouped(x))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``page.html``, with everything a page can have, and ``large.html``, of a thousand nodes."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    gm = fxcompress.compile(
        Mixed().eval(), ["fold-batch-norm", "alds:ratio=0.2,error=frobenius"], torch.randn(2, 4, 8, 8)
    )
    report = fxcompress.report(gm)
    refusals = [{"node": f"conv_{i}", "target": f"a.conv.{i}", "reason": "<b>grouped</b>"} for i in range(3)]
    extra = record(name="extra", warnings=("mind <the> gap",), latency_before=0.002, latency_after=0.001)
    data = report.to_dict()
    data["passes"].append({**vars(extra), "refusals": refusals})
    unknown = {"node": "add", "target": "add", "reason": "its size is not known"}
    data["passes"].append({**vars(record(name="other")), "refusals": [unknown]})
    fxcompress.Report.from_dict(data).to_html(folder / "page.html", measured={"agreement": "98.4%"})
    large = fxcompress.compile(Net(blocks=250).eval(), ["fold-batch-norm"], torch.randn(1, 4, 4, 4), verify=False)
    fxcompress.report(large).to_html(folder / "large.html")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser: Browser, pages: Path) -> Iterator[Browser]:
    """The page, freshly loaded in a window of a desk; at the end nothing was complained of and nothing asked for."""
    browser.problems.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.prefer(prefers_color_scheme="light")
    browser.open(pages / "page.html")
    yield browser
    assert browser.problems == []
    assert browser.requests == [(pages / "page.html").as_uri()]


def keep(browser: Browser, name: str, tmp_path: Path) -> None:
    """Take a picture, which must show something, and keep it if that is wanted."""
    picture = tmp_path / f"{name}.png"
    browser.screenshot(picture)
    assert picture.stat().st_size > 20_000
    if wanted := os.environ.get("FXCOMPRESS_PICTURES"):
        Path(wanted).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, wanted)


def background(browser: Browser) -> int:
    """How bright the page is, 0 to 255."""
    color = browser.run("getComputedStyle(document.body).backgroundColor")
    return int(color.split("(")[1].split(",")[0])


def test_the_theme_follows_the_system_and_the_button(page: Browser, tmp_path: Path) -> None:
    assert background(page) > 200
    keep(page, "light", tmp_path)
    page.prefer(prefers_color_scheme="dark")
    assert background(page) < 60
    keep(page, "dark", tmp_path)
    shown = []
    for _ in range(3):
        page.click("#theme")
        shown.append((page.run("document.getElementById('theme').textContent"), background(page) < 60))
    assert shown == [("Theme: dark", True), ("Theme: light", False), ("Theme: auto", True)]


def test_the_policy_lets_no_other_script_run(page: Browser) -> None:
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hurt=1\">')")
    page.run("{const s = document.createElement('script'); s.textContent = 'window.hurt=1'; document.body.append(s)}")
    page.settle()
    assert page.run("window.hurt === undefined")
    assert any("Content Security Policy" in text for text in page.problems)
    assert page.run("fetch('https://example.org').then(() => 'got it', () => 'refused')") == "refused"
    page.problems.clear()
    page.requests[1:] = []


def test_refusals_are_filtered(page: Browser) -> None:
    shown = "[...document.querySelectorAll('#refusal-list > details')].filter(e => !e.hidden).length"
    count = "document.getElementById('refusal-count').textContent"
    total = int(page.run(count).split()[2])
    assert total >= 4
    page.click("#refusal-find")
    page.write("conv_1")
    assert (page.run(shown), page.run(count)) == (1, f"1 of {total} places")
    page.run("document.getElementById('refusal-find').value = ''")
    page.write("<b>grouped")
    assert page.run(count) == f"3 of {total} places"
    page.run(
        "{const e = document.getElementById('refusal-pass'); e.value = 'other'; e.dispatchEvent(new Event('change'))}"
    )
    assert page.run(count) == f"0 of {total} places"


def test_layers_are_found_and_sorted(page: Browser) -> None:
    first = "document.querySelector('#layer-table tbody tr:not([hidden]) .path').textContent"
    order = "[...document.querySelectorAll('#layer-table tbody tr')].map(e => +e.dataset.parameters)"
    page.click("#layer-table th[data-sort=parameters] button")
    sizes = page.run(order)
    assert sizes == sorted(sizes, reverse=True)
    page.click("#layer-table th[data-sort=parameters] button")
    assert page.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    page.click("#layer-find")
    page.write("blocks.11.conv")
    assert page.run(first) == "net.blocks.11.conv"
    assert page.run("document.getElementById('layer-count').textContent").startswith("1 of")
    page.click("#layer-relative")
    widths = page.run(
        "[...document.querySelectorAll('tr:not([hidden]) .size .bar')].map(e => e.firstChild.getAttribute('width'))"
    )
    assert "100%" in widths


def test_a_curve_is_chosen_by_the_keyboard_and_by_the_mouse(page: Browser) -> None:
    chosen = "document.querySelector('[role=option][aria-selected=true]').dataset.curve"
    lit = "document.querySelector('.curve.chosen').dataset.curve"
    assert page.run(chosen) == page.run(lit) == "0"
    page.run("document.querySelector('[role=listbox]').focus()")
    page.press("ArrowDown", "ArrowDown")
    assert page.run(chosen) == page.run(lit) == "2"
    page.press("Home")
    assert page.run(chosen) == page.run(lit) == "0"
    page.click("[role=option]:nth-child(4)")
    assert page.run(chosen) == page.run(lit) == "3"


def test_the_graph_is_walked_by_the_keyboard(page: Browser, tmp_path: Path) -> None:
    where = "document.activeElement.textContent"
    page.run("document.getElementById('graph-changed').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.closest('#graph-list') !== null")
    assert page.run("document.querySelectorAll('#graph-list [tabindex=\"0\"]').length") == 1
    page.click("#graph-close")
    page.run("document.querySelector('#graph-list [tabindex=\"0\"]').focus()")
    page.press("Home")
    while page.run("document.activeElement.tagName") != "SUMMARY":
        page.press("ArrowDown")
    assert page.run("document.activeElement.parentElement.open") is False
    path = page.run("document.activeElement.firstElementChild.textContent")
    page.press("ArrowRight")
    assert page.run("document.activeElement.parentElement.open") is True
    page.press("ArrowRight")
    assert page.run(where) != path
    assert page.run(_FOLD_AROUND) == path
    assert page.run("document.querySelectorAll('.edge.lit').length") > 0
    assert page.run("document.activeElement.matches(':focus-visible')")
    page.press("ArrowLeft", "ArrowLeft")
    assert page.run("document.activeElement.parentElement.open") is False
    assert page.run("document.activeElement.firstElementChild.textContent") == path
    page.press("End")
    assert "output" in page.run(where)


def test_the_graph_shows_what_is_looked_for(page: Browser) -> None:
    count = "document.getElementById('graph-count').textContent"
    rows = "[...document.querySelectorAll('#graph-list .row')].filter(e => e.checkVisibility()).length"
    page.click("#graph-changed")
    changed = int(page.run(count).split()[0])
    assert 0 < changed < int(page.run(count).split()[2])
    page.click("#graph-changed")
    page.click("#graph-find")
    page.write("blocks_7_conv")
    assert page.run(rows) == int(page.run(count).split()[0]) > 0
    page.run("{const e = document.getElementById('graph-find'); e.value = ''; e.dispatchEvent(new Event('input'))}")
    page.click("#graph-open")
    everything = page.run("document.querySelectorAll('#graph-list .row').length")
    assert page.run(rows) == everything
    assert page.run("document.querySelectorAll('#graph-list .edge').length") > everything
    page.click("#graph-close")
    assert page.run(rows) < everything


def test_everything_is_reached_by_the_tab_key(page: Browser) -> None:
    reached = []
    for _ in range(60):
        page.press("Tab")
        reached.append(page.run("(e => e.id || e.className || e.tagName)(document.activeElement)"))
        if reached[-1] == "BODY":
            break
    assert reached[0] == "skip"
    ids = (
        "theme",
        "layer-find",
        "layer-changed",
        "choices",
        "graph-open",
        "graph-find",
        "refusal-find",
        "refusal-pass",
    )
    places = [reached.index(name) for name in ids]
    assert places == sorted(places)
    names = page.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(names) == len(set(names))


def test_the_skip_link_leads_to_the_summary(page: Browser) -> None:
    page.press("Tab", "Enter")
    assert page.run("document.activeElement.id") == "main"
    page.requests[1:] = [url for url in page.requests[1:] if "#main" not in url]


@pytest.mark.parametrize("width", [360, 700, 1024, 1920])
def test_nothing_sticks_out_of_the_window(page: Browser, width: int, tmp_path: Path) -> None:
    page.resize(width, 800)
    page.click("#graph-open")
    assert page.run("document.documentElement.scrollWidth") <= width
    keep(page, f"width-{width}", tmp_path)


def test_it_can_be_printed(page: Browser) -> None:
    folded = "document.querySelectorAll('details:not([open])').length"
    before = page.run(folded)
    assert before > 0
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 2
    assert page.run(folded) == before


def test_it_can_be_read_without_scripts(page: Browser, pages: Path) -> None:
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.requests.clear()
        page.send("Page.navigate", url=(pages / "page.html").as_uri())
        time.sleep(1)
        found = page.send("DOM.getDocument", depth=-1)
        controls = page.send("DOM.querySelector", nodeId=found["root"]["nodeId"], selector="#theme")
        assert "hidden" in page.send("DOM.getAttributes", nodeId=controls["nodeId"])["attributes"]
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)


def test_a_thousand_nodes_stay_usable(browser: Browser, pages: Path, tmp_path: Path) -> None:
    browser.problems.clear()
    browser.resize(1280, 900)
    browser.prefer()
    start = time.perf_counter()
    browser.open(pages / "large.html")
    assert browser.run("document.querySelectorAll('#graph-list .row').length") > 1000
    assert (
        browser.run("[...document.querySelectorAll('#graph-list .row')].filter(e => e.checkVisibility()).length") < 100
    )
    browser.click("#graph-open")
    browser.settle()
    assert browser.run("document.querySelectorAll('#graph-list .edge').length") > 1000
    assert time.perf_counter() - start < 30
    browser.click("#graph-close")
    keep(browser, "large", tmp_path)
    assert browser.problems == []
