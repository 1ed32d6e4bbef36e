"""The live page in Chromium, from a file: answers, composed scenes, files of readers, and no request to any host."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from companion.live.page import live_html, module
from companion.miniature.world import draw_scene, sample_scene
from llava_core.chat import Conversation
from llava_core.checkpoints.load import Loaded
from tests.companion.test_live import rounded

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
HELPERS = """
const host = document.querySelector(".llava-live-host"), el = host.firstElementChild;
const wait = async (condition) => { while (!condition()) await new Promise((done) => setTimeout(done, 5)); };
const named = (text) => [...el.querySelectorAll("button")].find((node) => node.textContent === text);
const ask = async (text) => {
  el.querySelector(".question").value = text;
  named("Ask").click();
  await wait(() => named("Ask").disabled);
  await wait(() => !named("Ask").disabled);
};
const give = async (file) => {
  const carrier = new DataTransfer(), input = el.querySelector("input[type=file]");
  carrier.items.add(file);
  input.files = carrier.files;
  input.dispatchEvent(new Event("change"));
  await new Promise((done) => setTimeout(done, 300));
  return el.querySelector("[role=alert]").textContent;
};
await wait(() => host.chat);
await host.chat.ready;
"""


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return rounded()


@pytest.fixture(scope="module")
def gallery() -> dict[str, Image.Image]:
    return {f"scene {k}": draw_scene(sample_scene(k, seed=5)) for k in range(2)}


@pytest.fixture
def drive(loaded: Loaded, gallery: dict[str, Image.Image], tmp_path: Path) -> Any:
    """Run a script in the page and return what it assigns to `result`."""
    content = live_html(loaded, gallery, "a checkpoint <b>of the tests</b>").data

    def run(script: str) -> Any:
        page = tmp_path / "page.html"
        body = f"let result; try {{ {HELPERS} {script} }} catch (problem) {{ result = String(problem) }}"
        end = f'<script type="module">{body} document.title = JSON.stringify(result);</script>'
        page.write_text(f"<!doctype html><meta charset=utf-8><title></title>{content}{end}", encoding="utf-8")
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=120000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", "--dump-dom", page.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
        return json.loads(html.unescape(dom.partition("<title>")[2].partition("</title>")[0]))

    return run


def test_page_answers_as_python_does_and_asks_no_host(
    drive: Any, loaded: Loaded, gallery: dict[str, Image.Image]
) -> None:
    questions = ["What color is the dog?", "What is on the left?"]
    got = drive(
        """
        for (const text of QUESTIONS) await ask(text);
        const { turns } = host.chat.conversation;
        el.querySelector(".word")?.dispatchEvent(new Event("mouseenter"));
        const said = [...el.querySelectorAll(".log p")].map((node) => node.textContent);
        const attention = el.querySelector("small").textContent;
        const names = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 5));
        result = { turns, said, attention, names, bold: el.querySelectorAll("small b").length };
    """.replace("QUESTIONS", json.dumps(questions))
    )
    conversation = Conversation(loaded, gallery["scene 0"])
    answers = [conversation.ask(question) for question in questions]
    assert [turn["answer"] for turn in got["turns"]] == answers
    assert got["said"][0] == f"You {questions[0]}"
    assert got["said"][1].replace(" ", "") == f"LLaVA{answers[0]}".replace(" ", "")
    assert "mean over layers and heads" in got["attention"]
    assert set(got["names"]) <= {"data:", "blob:"}
    assert got["bold"] == 0


def test_composed_scene_reaches_the_model_and_a_changed_color_changes_it(drive: Any) -> None:
    got = drive("""
        const mean = () => [0, 1, 2].map((c) => {
          const { data } = host.chat.conversation.seen;
          let sum = 0;
          for (let k = c; k < data.length; k += 3) sum += data[k];
          return sum / (data.length / 3);
        });
        named("Compose a scene").click();
        await wait(() => el.textContent.includes("red car") && host.chat.conversation.seen);
        await new Promise((done) => setTimeout(done, 500));
        const red = mean();
        el.querySelector("[aria-label='Remove the red car']").click();
        await new Promise((done) => setTimeout(done, 500));
        const empty = mean();
        el.querySelector("[aria-label=Color]").value = "blue";
        named("Add").click();
        await new Promise((done) => setTimeout(done, 500));
        result = { red, empty, blue: mean() };
    """)
    for color, channel in (("red", 0), ("blue", 2)):
        change = [got[color][c] - got["empty"][c] for c in range(3)]
        assert max(range(3), key=lambda c: change[c]) == channel, got
    assert abs(got["red"][0] - got["blue"][0]) > 1, got


def test_files_that_are_no_images_are_one_sentence(drive: Any) -> None:
    got = drive("""
        const large = await give(new File([new Uint8Array(30e6)], "large.jpg", { type: "image/jpeg" }));
        const text = await give(new File(["hello"], "notes.txt", { type: "text/plain" }));
        const name = "<img src=x onerror=\\"document.body.dataset.hit = 1\\">.png";
        const markup = await give(new File(["x"], name, { type: "image/png" }));
        const images = el.querySelectorAll("[role=alert] img").length;
        result = { large, text, markup, images, hit: document.body.dataset.hit ?? null };
    """)
    assert got["large"] == "large.jpg has 30 MB; choose an image of at most 20 MB."
    assert got["text"] == "notes.txt is no image that this browser can read; choose a JPEG, PNG or WebP file."
    assert got["markup"].startswith("<img src=x onerror=")
    assert (got["images"], got["hit"]) == (0, None)


def test_an_answer_can_be_stopped_and_a_dialogue_cleared(drive: Any) -> None:
    got = drive("""
        el.querySelector(".question").value = "Describe this image in detail.";
        named("Ask").click();
        await wait(() => el.querySelectorAll(".word").length || !named("Stop").disabled);
        named("Stop").click();
        await wait(() => !named("Ask").disabled);
        const stopped = host.chat.conversation.turns.length;
        await ask("What is on the left?");
        const after = host.chat.conversation.turns.length;
        named("Clear").click();
        const log = el.querySelector(".log").textContent;
        result = { stopped, after, cleared: host.chat.conversation.turns.length, log };
    """)
    assert got["stopped"] <= 1
    assert got["after"] == got["stopped"] + 1
    assert (got["cleared"], got["log"]) == (0, "")


def test_module_is_one_file_with_the_signature_of_an_anywidget() -> None:
    text = module()
    assert [line for line in text.splitlines() if line.startswith(("import ", "export "))] == [
        "export function render({ model, el }) {"
    ]
