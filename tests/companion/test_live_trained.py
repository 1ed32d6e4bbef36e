"""The live page with a checkpoint that answers: a changed color changes the answer, and the map moves to what is asked.

The checkpoint is made here in seconds. The base language model has read patches as sums of word vectors, so a projector
of least squares, from the tower's features to those sums, is enough for questions about colors.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from companion.live.page import live_content, live_html
from companion.miniature.acceptance import patch_weights
from companion.miniature.pretraining_text import patch_words
from companion.miniature.world import Scene, draw_scene, sample_scene
from llava_core.chat import Conversation
from llava_core.checkpoints.load import Loaded
from llava_core.inference import prompt_ids
from tests.companion.browser import BROWSER, PATIENCE, launched
from tests.companion.test_live import rounded

SCENES = 400  # drawn to fit the projector


@pytest.fixture(scope="module")
def aligned() -> Loaded:
    """The miniature's base models with a fitted projector, in weights that bf16 holds exactly."""
    loaded = rounded()
    model, scenes = loaded.model, [sample_scene(k, seed=11) for k in range(SCENES)]
    embedding = model.language_model.get_input_embeddings()
    features, words = [], []
    with torch.inference_mode():
        for scene in scenes:
            pixels = torch.from_numpy(loaded.processor(draw_scene(scene, size=112)))
            features.append(model.tower_features(pixels[None])[0])  # (P, D_vision)
            for patch in patch_words(scene):
                ids = loaded.tokenizer(f" {patch}", add_special_tokens=False)["input_ids"]
                words.append(embedding(torch.tensor(ids)).sum(0))
        x = torch.cat(features).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)  # (SCENES * P, D_vision + 1)
        ridge = torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(x.T @ x + ridge, x.T @ torch.stack(words).double()).to(torch.bfloat16).float()
        model.multi_modal_projector.weight.copy_(weight[:-1].T)
        model.multi_modal_projector.bias.copy_(weight[-1])
    return loaded


def two_things() -> list[Scene]:
    scenes = (sample_scene(k, seed=77, n_groups=2) for k in range(60))
    return [scene for scene in scenes if len(scene.items) == 2][:20]


def occlusion(loaded: Loaded, image: Image.Image, question: str) -> tuple[str, np.ndarray]:
    """The first token of the answer, and what greying each patch takes from its log-probability (P,).

    test_live.py compares these numbers with those of the page; here they are computed for all patches in one batch.
    """
    model, processor, side = loaded.model, loaded.processor, 7
    ids = prompt_ids(loaded, [(question, None)], has_image=True)
    pixels = torch.from_numpy(processor(image)).repeat(side**2 + 1, 1, 1, 1)  # the first one stays as it is
    patch = pixels.shape[-1] // side
    grey = (0.5 - torch.tensor(processor.mean)) / torch.tensor(processor.std)
    for k in range(side**2):
        top, left = (patch * n for n in divmod(k, side))
        pixels[k + 1, :, top : top + patch, left : left + patch] = grey[:, None, None]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]).repeat(len(pixels), 1), pixels, use_cache=False).logits[:, -1]
    token = int(logits[0].argmax())
    scores = logits.log_softmax(-1)[:, token]
    return loaded.tokenizer.decode([token]), (scores[0] - scores[1:]).clamp(min=0).numpy()


def test_occlusion_moves_to_the_thing_that_is_asked_for(aligned: Loaded) -> None:
    """Both things of a scene are asked for: the share of the map on the first is larger when it is the one."""
    scenes, moved, right = two_things(), 0, 0
    assert len(scenes) == 20
    for scene in scenes:
        shares = []
        for item in scene.items:
            word, change = occlusion(aligned, draw_scene(scene), f"What color is the {item.category}?")
            right += word.strip().lower() == item.color
            here, there = (float(change @ patch_weights(other.box, 7)) for other in scene.items)
            shares.append(here / max(here + there, 1e-9))
        moved += shares[0] > shares[1]
    assert right >= 30, f"{right} of 40 colors are right"
    assert moved >= 15, f"the map moves in {moved} of 20 scenes"


@pytest.fixture(scope="module")
def page(aligned: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    file = tmp_path_factory.mktemp("site") / "page.html"
    content = live_html(live_content(aligned, {"scene": draw_scene(two_things()[0])}, "")).data
    file.write_text(f"<!doctype html><meta charset=utf-8>{content}", encoding="utf-8")
    with launched() as browser:
        opened = browser.new_page()
        opened.set_default_timeout(PATIENCE)
        opened.goto(file.as_uri())
        yield opened


def composed_answer(page: Any, color: str) -> str:
    """Compose a scene of one car in a color and ask for it."""
    for button in page.get_by_role("button", name="Remove").all():
        button.click()
    page.get_by_label("Color").select_option(color)
    page.get_by_label("Thing").select_option("car")
    before = page.locator(".llava-live").evaluate("el => el.parentElement.running.conversation.seen.data.join()")
    page.get_by_role("button", name="Add").click()
    seen = "document.querySelector('.companion-host').running.conversation.seen.data.join()"
    page.wait_for_function(f"before => {seen} !== before", arg=before)
    page.get_by_label("Question").fill("What color is the car?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector("button:text-is('Stop'):disabled")
    return str(page.evaluate("document.querySelector('.companion-host').running.conversation.turns.at(-1).answer"))


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_changed_color_of_a_composed_scene_changes_the_answer(page: Any) -> None:
    page.get_by_role("button", name="Compose a scene").click()
    answers = {color: composed_answer(page, color) for color in ("red", "blue", "yellow")}
    assert answers == {"red": "Red.", "blue": "Blue.", "yellow": "Yellow."}


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_answer_about_a_scene_is_that_of_python(page: Any, aligned: Loaded) -> None:
    scene = two_things()[0]
    question = f"What color is the {scene.items[0].category}?"
    page.locator(".thumbs button").first.click()
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".log p >> nth=1")
    page.wait_for_selector("button:text-is('Stop'):disabled")
    turns = page.evaluate("document.querySelector('.companion-host').running.conversation.turns")
    assert [turn["answer"] for turn in turns] == [Conversation(aligned, draw_scene(scene)).ask(question)]
