"""Plots on narrow and wide screens, in Chromium."""

from pathlib import Path

import pytest

from llava_core.runtime import ROOT
from tests.companion.browser import BROWSER, launched

PLOT = "<svg xmlns='http://www.w3.org/2000/svg' width='{}' height='90'/>"


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_plot_scrolls_in_its_own_box_on_a_narrow_screen(tmp_path: Path) -> None:
    for name in ("companion.css", "figures.js"):
        (tmp_path / name).write_text((ROOT / "book" / "assets" / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name, width in {"wide": 740, "small": 200}.items():
        (tmp_path / f"{name}.svg").write_text(PLOT.format(width))
    outputs = "".join(f'<div class="cell_output"><img src="{name}.svg" alt=""></div>' for name in ("wide", "small"))
    head = '<!doctype html><link rel="stylesheet" href="companion.css"><script src="figures.js"></script>'
    (tmp_path / "page.html").write_text(f"{head}<body>{outputs}")
    shown = "[...document.querySelectorAll('.cell_output > .wide')].map((box) => [box.firstChild.width, box.tabIndex])"
    with launched() as browser:
        page = browser.new_page(viewport={"width": 375, "height": 700})
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function(f"JSON.stringify({shown}) === '[[704,0],[200,-1]]'")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        page.set_viewport_size({"width": 1280, "height": 700})
        page.wait_for_function(f"JSON.stringify({shown}) === '[[740,-1],[200,-1]]'")
