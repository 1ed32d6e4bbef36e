"""The live page in Chromium: answers, composed scenes, files of readers, and no request to another host."""

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from companion.live.page import live_content, live_html, module
from companion.miniature.world import draw_scene, sample_scene
from llava_core.chat import Conversation
from llava_core.checkpoints.load import Loaded
from llava_core.runtime import ROOT
from tests.companion.browser import BROWSER, PATIENCE, launched
from tests.companion.test_live import rounded

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
ALERT = ".llava-live [role=alert]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return rounded()


@pytest.fixture(scope="module")
def gallery() -> dict[str, Image.Image]:
    return {f"scene {k}": draw_scene(sample_scene(k, seed=5)) for k in range(2)}


@pytest.fixture(scope="module")
def folder(loaded: Loaded, gallery: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    content = live_html(live_content(loaded, gallery, "a checkpoint <b>of the tests</b>")).data
    (path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{content}", encoding="utf-8")
    return path


@pytest.fixture(params=["file", "http"])
def address(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if request.param == "file":
        yield (folder / "page.html").as_uri()
        return
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/page.html"
        server.shutdown()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[str], Any]]:
    """Open an address; requests to other addresses are refused and fail the test."""
    page, refused = browser.new_page(), []

    page.set_default_timeout(PATIENCE)

    def opened(address: str) -> Any:
        def answer(route: Any) -> None:
            if route.request.url.partition("#")[0] in (
                address.partition("#")[0],
                address.rpartition("/")[0] + "/favicon.ico",
            ):
                route.continue_()
            else:
                refused.append(route.request.url)
                route.abort()

        page.route(lambda url: not url.startswith(("data:", "blob:")), answer)
        page.goto(address)
        page.wait_for_selector(".llava-live canvas")
        page.evaluate("document.querySelector('.companion-host').running.ready")
        return page

    yield opened
    page.close()
    assert refused == []


def ask(page: Any, question: str) -> str:
    """Ask in the page; returns the answer."""
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector("button:text-is('Stop'):disabled")
    turns = page.evaluate("document.querySelector('.companion-host').running.conversation.turns")
    assert turns[-1]["question"] == question
    return str(turns[-1]["answer"])


def test_page_answers_as_python_does_and_asks_no_host(
    address: str, visit: Callable[[str], Any], loaded: Loaded, gallery: dict[str, Image.Image]
) -> None:
    page, conversation = visit(address), Conversation(loaded, gallery["scene 0"])
    for number, question in enumerate(("What color is the dog?", "What is on the left?")):
        answer = conversation.ask(question)
        assert ask(page, question) == answer
        said = page.locator(".log p").all_text_contents()[2 * number :]
        assert said[0] == f"You {question}"
        assert said[1].split() == f"LLaVA {answer}".split()  # words apart, as they are copied and read aloud
    words = page.locator(".log p").nth(3).locator(".word")
    words.nth(1).click()
    page.get_by_role("button", name="What changes the answer?").click()
    page.locator(".maps").wait_for()  # of the word that was clicked, and of the one that is pointed at
    assert f'from "{words.nth(1).text_content()}", at most' in page.locator(".maps small").text_content()
    words.first.hover()
    assert f'from "{words.first.text_content()}", at most' in page.locator(".maps small").text_content()
    assert "mean over layers and heads" in page.locator(".llava-live small").first.text_content()
    assert page.locator("small b").count() == 0


def test_front_page_box_asks_the_live_page_in_a_frame(folder: Path, browser: Any, tmp_path: Path) -> None:
    box = (ROOT / "book" / "live_box.html").read_text(encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(folder / "page.html", tmp_path / "notebooks" / "61_live_demo.html")
    (tmp_path / "intro.html").write_text(f"<!doctype html><meta charset=utf-8>{box}", encoding="utf-8")
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((tmp_path / "intro.html").as_uri())
    assert page.locator("iframe").count() == 0  # the weights come when a reader asks
    page.get_by_label("Ask about a picture").fill("Is there a dog & a cat?")
    page.get_by_role("button", name="Ask").click()
    frame = page.frame_locator("iframe")
    frame.locator(".log p").nth(1).wait_for()
    assert frame.locator(".log p").first.text_content() == "You Is there a dog & a cat?"
    assert not frame.get_by_role("button", name="Save as JSON").is_visible()
    page.close()


def test_files_that_are_no_images_are_one_sentence(folder: Path, visit: Callable[[str], Any], tmp_path: Path) -> None:
    page = visit((folder / "page.html").as_uri())
    name = '<img src=x onerror="document.body.dataset.hit = 1">.png'
    sentences = {
        ("large.jpg", b"\0" * 30_000_000): "large.jpg has 30 MB; choose an image of at most 20 MB.",
        ("notes.txt", b"hello"): "notes.txt is no image that this browser can read; choose a JPEG, PNG or WebP file.",
        (name, b"x"): f"{name} is no image that this browser can read; choose a JPEG, PNG or WebP file.",
    }
    for (file, content), sentence in sentences.items():
        (tmp_path / file).write_bytes(content)
        page.locator("input[type=file]").set_input_files(tmp_path / file)
        page.wait_for_function("text => document.querySelector('[role=alert]').textContent === text", arg=sentence)
    assert page.locator(f"{ALERT} img").count() == 0
    assert page.evaluate("document.body.dataset.hit ?? null") is None


def test_an_answer_can_be_stopped_and_a_dialogue_cleared(folder: Path, visit: Callable[[str], Any]) -> None:
    page = visit((folder / "page.html").as_uri())
    turns = "document.querySelector('.companion-host').running.conversation.turns.length"
    page.get_by_label("Question").fill("Describe this image in detail.")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("button:text-is('Stop'):disabled")
    stopped = page.evaluate(turns)
    assert stopped <= 1
    assert len(page.locator(".word").all()) < 96
    ask(page, "What is on the left?")
    assert page.evaluate(turns) == stopped + 1
    page.get_by_role("button", name="Image scene 1").click()
    page.wait_for_function(f"{turns} === 0")
    assert page.get_by_label("Question").input_value() == "What is on the left?"  # to ask it about the new image, too
    page.get_by_role("button", name="Clear").click()
    assert page.evaluate(turns) == 0
    assert page.locator(".log").text_content() == ""
    assert page.get_by_label("Question").input_value() == ""
    page.get_by_label("Question").fill("What is on the left?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Clear").click()  # an answer under way does not become a turn of the next dialogue
    page.wait_for_selector("button:text-is('Stop'):disabled")
    assert page.evaluate(turns) == 0
    assert page.locator(".log").text_content() == ""


def test_module_is_one_file_with_the_export_of_an_anywidget() -> None:
    lines = [line for line in module().splitlines() if line.startswith(("import ", "export "))]
    assert lines == ["export default { render: chat };"]
