"""The report as a browser shows it: wide and narrow, light and dark. It wants Debian's `chromium`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from browser import THEMES, find_browser, open_browser
from command import offstep
from event_lines import make_run

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no browser: apt-get install chromium")

WIDTHS = (1280, 390)

_ROOM = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
_CUT = "[...document.querySelectorAll('.scroll')].filter(node => node.scrollWidth > node.clientWidth).length"
_OVERLAPS = """(() => {
  const boxes = [...document.querySelectorAll("h1,h2,p,small,strong,td,th,.name,.scale,.value,.ticks span,.tile span")]
    .filter(node => node.textContent.trim() && !node.querySelector("small"))
    .map(node => { const range = document.createRange(); range.selectNodeContents(node);
                   return [node, range.getBoundingClientRect()]; })
    .filter(([_, box]) => box.width > 0 && box.height > 0);
  const found = [];
  boxes.forEach(([a, first], index) => boxes.slice(index + 1).forEach(([b, second]) => {
    const across = Math.min(first.right, second.right) - Math.max(first.left, second.left);
    const down = Math.min(first.bottom, second.bottom) - Math.max(first.top, second.top);
    if (across > 1 && down > 2 && !a.contains(b) && !b.contains(a)) found.push(a.textContent + " | " + b.textContent);
  }));
  return found; })()"""
_FAINT = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(value => value / 255)
    .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const paper = node => { while (node) { const found = parse(getComputedStyle(node).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found; node = node.parentElement; } return [255, 255, 255]; };
  return [...document.querySelectorAll("body *")]
    .filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()))
    .filter(node => node.getClientRects().length && !node.closest("svg"))
    .map(node => { const pair = [light(parse(getComputedStyle(node).color)), light(paper(node))].sort((a, b) => b - a);
                   return [node.textContent, (pair[0] + 0.05) / (pair[1] + 0.05)]; })
    .filter(([_, contrast]) => contrast < 4.5); })()"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("reports")
    logs = {
        "usual": make_run(40, failing=12, skipping=20),
        "first": make_run(1),
        "many": make_run(10_000, keep=20),
    }
    for name, lines in logs.items():
        assert offstep("report", lines.write(directory / name), directory / f"{name}.html").code == 0
    return [directory / f"{name}.html" for name in logs]


def test_it_fits_and_can_be_read_wide_and_narrow_in_light_and_dark(reports: list[Path]) -> None:
    # One test: a browser starts processes whenever it likes, and no test may leave any.
    papers = set()
    with open_browser() as browser:
        for report, width, theme in itertools.product(reports, WIDTHS, THEMES):
            browser.show(report, width=width, theme=theme)
            case = f"{report.name}, {width} pixels, {theme}"
            assert browser.evaluate("innerWidth") == width, case
            assert browser.evaluate(_ROOM) == 0, f"{case}: scrolls sideways"
            assert browser.evaluate(_CUT) == 0, f"{case}: a table is cut"
            assert browser.evaluate(_OVERLAPS) == [], case
            assert browser.evaluate(_FAINT) == [], case
            assert browser.evaluate("document.querySelectorAll('svg').length") >= 4, case
            papers.add((theme, browser.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert browser.problems == []
    assert len(papers) == len({color for _, color in papers}) == 2
