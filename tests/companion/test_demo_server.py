"""`llava demo` as a process, used in Chromium: upload, dialogue, stop, files that are none, two visitors, the token."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from onnx_files import write_red_detector
from PIL import Image

from llava_core.checkpoints.load import build, save_checkpoint

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="voila is not installed"),
]
SECONDS = 180_000  # milliseconds; a kernel imports torch first
HTML = "<img src=x onerror=\"document.title='script'\"><b>bold</b>"


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address, with its token, of a demo with the image filter on; Ctrl-C must end it."""
    folder = tmp_path_factory.mktemp("demo")
    loaded = build(*tiny.base_models(folder), torch.float32)
    model, tokenizer = loaded.model.language_model, loaded.tokenizer
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    with torch.no_grad():  # an answer that does not end by itself
        model.get_output_embeddings().weight[[tokenizer.eos_token_id, *tokenizer.encode("###")]] = 0
    model.config.max_position_embeddings = 4096
    checkpoint = save_checkpoint(folder / 'a model\'s "folder"', loaded, "full", base={})
    gallery = folder / "gallery"
    gallery.mkdir()
    (gallery / "blue.png").write_bytes(png("blue"))
    red = write_red_detector(folder / "red.onnx")
    words = ["demo", "--model", str(checkpoint), "--images", str(gallery), "--no-browser"]
    words += ["--guard", "image", "--guard-image", str(red)]
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with it ignored
    process = subprocess.Popen([sys.executable, "-m", "companion", *words], stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, earlier)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", process.stdout.readline())
        assert found is not None
        yield found.group()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def visit(browser: Any, address: str) -> tuple[Any, list[str]]:
    """A new visitor's page, once the chat is there, and the hosts that it asked."""
    page, hosts = browser.new_context().new_page(), list[str]()
    page.on("response", lambda response: hosts.append(response.url))
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.wait_for_selector(".llava-demo button.ask")
    return page, hosts


def ask(page: Any, text: str, tokens: int = 6) -> str:
    count = page.locator(".turn").count()
    page.fill(".question", text)
    page.fill("[aria-label='Longest answer in tokens']", str(tokens))
    page.click("button.ask")
    page.wait_for_selector(f".turn:nth-of-type({count + 1}) button:enabled")
    return str(page.inner_text(f".turn:nth-of-type({count + 1}) .words"))


def give(page: Any, name: str, content: bytes) -> None:
    page.set_input_files(".llava-demo input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})


def alert(page: Any, words: str) -> str:
    page.wait_for_function("words => document.querySelector('[role=alert]').textContent.includes(words)", arg=words)
    return str(page.inner_text("[role=alert]"))


def test_dialogue_of_two_visitors(address: str, browser: Any) -> None:
    page, hosts = visit(browser, address)
    give(page, "green.png", png("green"))
    page.wait_for_function("document.querySelector('.crop').textContent.includes('green.png: 90 x 40 pixels')")
    assert "stopped at the longest answer" in ask(page, "what color is the car")
    ask(page, HTML)
    assert page.inner_text(".turn:nth-of-type(2) p").endswith(HTML)

    other, _ = visit(browser, address)
    assert other.locator(".turn").count() == 0
    ask(other, "what is the dog")
    assert (other.locator(".turn").count(), page.locator(".turn").count()) == (1, 2)
    other.close()

    page.fill("[aria-label='Longest answer in tokens']", "2048")
    page.click("button.ask")
    page.wait_for_function("document.querySelectorAll('.turn .words')[2]?.textContent.length > 40")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".turn:nth-of-type(3) button:enabled")
    stopped = page.inner_text(".turn:nth-of-type(3) .words")
    assert stopped.endswith("(stopped)")
    page.click(".turn:nth-of-type(1) button")
    page.hover(".words span >> nth=0")
    assert "mean over layers and heads" in page.inner_text(".crop")

    give(page, f"{HTML}.png", b"no image")
    message = alert(page, "no image")
    assert HTML in message
    assert "\n" not in message
    give(page, "large.png", bytes(21_000_000))
    assert alert(page, "21 MB") == "large.png has 21 MB; choose an image of at most 20 MB"
    give(page, "red.png", png("red"))
    assert alert(page, "filter").startswith("the filter 'image' refuses this image")
    assert page.locator(".turn").count() == 3  # the dialogue about the green image goes on

    page.evaluate("""async () => {
        const blob = await (await fetch(document.querySelector(".thumbs img").src)).blob(), data = new DataTransfer();
        data.items.add(new File([blob], "dropped.png", { type: "image/png" }));
        const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
        document.querySelector(".llava-demo .picture").dispatchEvent(event);
    }""")
    page.wait_for_function("document.querySelector('.crop').textContent.includes('dropped.png')")
    assert page.locator(".turn").count() == 0
    assert "open_nsfw on each image" in page.inner_text(".facts")
    assert page.title() != "script"
    assert page.locator(".llava-demo b", has_text="bold").count() == 0
    assert all(url.startswith((address.partition("?")[0], "data:", "blob:")) for url in hosts)
    page.close()


@pytest.mark.parametrize("path", ["", "demo.ipynb", "voila/render/demo.ipynb", "api/kernels/0/channels"])
def test_nothing_is_served_without_the_token(address: str, path: str) -> None:
    base = address.partition("?")[0]
    for end in ("", "?token=wrong"):
        try:
            with urllib.request.urlopen(f"{base}{path}{end}", timeout=60) as answer:
                result = answer.url, answer.read().decode()
        except urllib.error.HTTPError as error:
            result = str(error.code), ""
        assert "/login" in result[0] or result[0] in ("403", "404")
        assert "kernelId" not in result[1]


def test_used_port_is_an_error_with_its_fix(address: str, tmp_path: Path) -> None:
    from companion.demo_server import serve
    from llava_core.runtime import ConfigError

    port = int(re.findall(r":(\d+)/", address)[0])
    with pytest.raises(ConfigError, match=rf"port {port} cannot be used .*; fix: another --port, or none"):
        serve({}, port, browser=False)
