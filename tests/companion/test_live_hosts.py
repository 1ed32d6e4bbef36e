"""The hosts of a module: HTML outputs with and without JavaScript, JupyterLab, a MyST page; figures with controls."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageColor

from companion.live.controls import bars, cell_picture, with_controls
from companion.live.host import html_output, widget, write_myst
from companion.live.page import live_content, module
from companion.miniature.world import draw_scene, sample_scene
from llava_core.chat import Conversation
from llava_core.runtime import DataError
from tests.companion.browser import BROWSER, PATIENCE, launched
from tests.companion.test_live import needs_node, rounded

needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


def opened(browser: Any, file: Path, content: str, **context: Any) -> Any:
    file.write_text(f"<!doctype html><meta charset=utf-8>{content}", encoding="utf-8")
    page = browser.new_context(**context).new_page()
    page.goto(file.as_uri())
    return page


FIGURE = with_controls(
    {"cap": [1, 20], "cell": [0, 1, 2, 3]},
    {
        (cap, cell): (
            f"cap {cap}, cell {cell} <i>",
            bars([{"label": "<b>dog</b>", "value": cap, "low": 0.5, "high": 30, "mark": 2}], "pairs")
            + cell_picture(np.arange(4).reshape(2, 2) == cell, ["#ffffff", "#0067a5"], "cells", sets=1),
        )
        for cap in (1, 20)
        for cell in range(4)
    },
    (20, 0),
).data


def test_pictures_of_cells_keep_every_color_and_bars_need_no_number() -> None:
    colors = [f"#{k:02x}10{255 - k:02x}{120 + k:02x}" for k in range(32)]
    html = cell_picture(np.arange(32).reshape(4, 8), colors, "cells")
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).reshape(32, 4)
    assert [tuple(pixel) for pixel in pixels.tolist()] == [ImageColor.getcolor(color, "RGBA") for color in colors]
    assert "<table" in bars([])
    assert "width: 100.0%" in bars([{"label": "loss", "value": -0.02}])


@needs_browser
def test_controls_choose_the_drawing(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path / "page.html", FIGURE * 2)  # twice in a page: two figures
    figure, other = page.locator(".companion-controls").all()
    text = figure.get_by_role("status")
    assert text.text_content() == "cap 20, cell 0 <i>"
    figure.get_by_label("cap").focus()
    page.keyboard.press("ArrowLeft")
    assert text.text_content() == "cap 1, cell 0 <i>"
    box = figure.locator("[data-sets]").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"])
    assert text.text_content() == "cap 1, cell 3 <i>"
    assert figure.get_by_label("cell").get_attribute("aria-valuetext") == "3"
    assert figure.locator("td").first.text_content() == "<b>dog</b>"
    assert other.get_by_role("status").text_content() == "cap 20, cell 0 <i>"


@needs_browser
def test_figure_is_readable_without_javascript(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path / "page.html", FIGURE, java_script_enabled=False)
    assert "cap 20, cell 0 <i>" in page.locator("body").inner_text()
    assert page.locator("td").last.inner_text() == "20"
    assert page.get_by_alt_text("cells").is_visible()


def test_incomplete_and_large_figures_are_refused() -> None:
    with pytest.raises(DataError, match="no drawing for"):
        with_controls({"a": [1, 2]}, {(1,): ("", "")}, (1,))
    with pytest.raises(DataError, match="a page takes"):
        with_controls({"a": [1, 2]}, {(k,): ("", "x" * 2_000_000) for k in (1, 2)}, (1,))


def test_content_cannot_end_its_element() -> None:
    text = html_output("export default {};", {"state": "</script><script>alert(1)</script>"}, "").data
    assert len(re.findall("<script", text)) == 2


@needs_node
def test_myst_page_has_the_module_with_its_content(tmp_path: Path) -> None:
    esm = (
        "export default { render({ model, el }) { el.given = model.get('state'); el.bytes = model.get('weights'); } };"
    )
    page = write_myst(tmp_path, "live", "Title", esm, {"state": {"a": 1}, "weights": b"\1\2"})
    assert page.read_text() == "# Title\n\n:::{anywidget} ./live.mjs\n{}\n:::\n"
    script = "const el = {}; (await import('./live.mjs')).default.render({ model: {}, el });"
    script += "console.log(JSON.stringify(el));"
    command = [str(shutil.which("node")), "--input-type=module", "-e", script]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == {"given": {"a": 1}, "bytes": "AQI="}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """JupyterLab on this machine, in a folder with the chat's content and a notebook that shows it."""
    scene = {"scene": draw_scene(sample_scene(0, seed=5))}
    content = live_content(rounded(), scene, "a checkpoint of the tests")
    (tmp_path / "state.json").write_text(json.dumps(content["state"]))
    (tmp_path / "weights.safetensors").write_bytes(content["weights"])
    (tmp_path / "chat.mjs").write_text(module())
    cells = [
        "import json\nfrom pathlib import Path\nfrom companion.live.host import widget\n"
        "esm, state = Path('chat.mjs').read_text(), json.loads(Path('state.json').read_text())\n"
        "weights = Path('weights.safetensors').read_bytes()\n"
        "chat = widget(esm, {'state': state, 'weights': weights}, turns=[])\nchat",
        "print('python reads', [turn['answer'] for turn in chat.turns])",
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}  # else Lab asks
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)
    nbformat.write(book, tmp_path / "chat.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--IdentityProvider.token=secret", "--expose-app-in-browser", f"--ServerApp.root_dir={tmp_path}"]
    folders = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, **folders, "PYTHONPATH": root}
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(PATIENCE // 500):
            try:
                urllib.request.urlopen(f"{address}/api/status?token=secret", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/chat.ipynb?token=secret"
    finally:
        server.terminate()
        server.wait(30)


@needs_browser
@pytest.mark.slow
def test_widget_answers_in_jupyterlab_and_python_reads_it(browser: Any, lab: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(lab)
    kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"{kernel}?.connectionStatus === 'connected' && {kernel}.status === 'idle'")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".llava-live .thumbs img")
    page.get_by_label("Question").fill("What color is the dog?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".llava-live .log p >> nth=1")
    page.wait_for_selector(".llava-live button:text-is('Stop'):disabled")
    page.locator(".jp-CodeCell .jp-InputArea-editor").last.click()
    page.keyboard.press("Control+Enter")
    answer = Conversation(rounded(), draw_scene(sample_scene(0, seed=5))).ask("What color is the dog?")
    page.wait_for_function("text => document.body.innerText.includes(text)", arg=f"python reads {[answer]!r}")
    page.close()


def test_widget_sends_weights_as_bytes() -> None:
    chat = widget("export default {};", {"state": {"a": 1}, "weights": b"\1"}, turns=[])
    assert chat.get_state()["weights"] == b"\1"
    assert chat.trait_metadata("turns", "sync")
