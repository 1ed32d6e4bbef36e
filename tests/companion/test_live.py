"""The engine of the live page against the Python model: tokens, logits, attention, tokenizer, resize."""

import base64
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from companion.live.state import live_state
from companion.miniature.base_models import MODELS
from companion.miniature.world import draw_scene, sample_scene
from llava_core.chat import Conversation
from llava_core.checkpoints.load import Loaded, build
from llava_core.runtime import DataError
from tests import tiny

ENGINE = Path(__file__).parents[2] / "companion" / "live" / "engine.mjs"
RUNNER = Path(__file__).with_name("live_runner.mjs")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
QUESTIONS = (
    "What color is the dog?", "How many cups are there?", "What place does the image show?", "What is on the left?",
    "Is there a kite?", "Describe this image in detail.", "Was ist das? \u00fc\u00df \U0001f600", "a  b\n c's 12",
)  # fmt: skip


def rounded(projector: str = "linear", **options: Any) -> Loaded:
    """The miniature's base models with a random projector, in weights that bf16 holds exactly."""
    torch.manual_seed(0)
    loaded = build(str(MODELS / "llm-7b"), str(MODELS / "clip"), torch.float32, projector, **options)
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return loaded


def packed(image: Image.Image) -> dict[str, Any]:
    rgb = base64.b64encode(np.asarray(image.convert("RGB")).tobytes()).decode()
    return {"rgb": rgb, "width": image.width, "height": image.height}


def run(tmp_path: Path, loaded: Loaded, questions: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    asked = {"questions": questions, "texts": [], "resizes": [], "max_new_tokens": 8, **more}
    (tmp_path / "state.json").write_text(json.dumps(live_state(loaded), default=lambda b: base64.b64encode(b).decode()))
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    command = [str(NODE), str(RUNNER), str(ENGINE), str(tmp_path / "state.json"), str(tmp_path / "questions.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def expected(loaded: Loaded, image: Image.Image | None, turns: list[str]) -> tuple[list[str], list[int], torch.Tensor]:
    """Answers, ids of a next question and their last logits."""
    from llava_core.inference import prompt_ids

    conversation = Conversation(loaded, image)
    answers = [conversation.ask(question, max_new_tokens=8) for question in turns]
    ids = prompt_ids(loaded, [*conversation.turns, ("next", None)], image is not None)
    pixels = None if image is None else torch.from_numpy(loaded.processor(image))[None]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids]), pixels).logits[0, -1]
    return answers, ids, logits


@needs_node
def test_answers_ids_and_logits_are_those_of_the_model(tmp_path: Path) -> None:
    loaded, rng = rounded(), random.Random(0)
    images = [draw_scene(sample_scene(k, seed=5), size=rng.choice((224, 112, 150))) for k in range(24)]
    images = [*images, images[0].resize((300, 140)), images[1].resize((90, 200)), None]
    cases = [(image, rng.sample(QUESTIONS, rng.choice((1, 1, 2, 3)))) for image in images * 4]
    got = run(tmp_path, loaded, [{"image": image and packed(image), "turns": turns} for image, turns in cases])
    assert sum(len(turns) for _, turns in cases) > 150
    for (image, turns), own in zip(cases, got["answers"], strict=True):
        answers, ids, logits = expected(loaded, image, turns)
        assert [row["answer"] for row in own["rows"]] == answers
        assert own["ids"] == ids
        assert torch.allclose(torch.tensor(own["logits"]), logits, atol=1e-3, rtol=0)
        if image is not None:
            seen = np.frombuffer(base64.b64decode(own["seen"]), np.uint8)
            assert (seen == np.asarray(loaded.processor.visible(image)).ravel()).all()


@needs_node
def test_attention_and_occlusion_are_those_of_the_model(tmp_path: Path) -> None:
    loaded, image, question = rounded("mlp2x_gelu"), draw_scene(sample_scene(1, seed=5)), "What color is the dog?"
    got = run(tmp_path, loaded, [{"image": packed(image), "turns": [question]}])
    from llava_core.inference import prompt_ids

    model, ids = loaded.model, prompt_ids(loaded, [(question, None)], True)
    tokens = got["occlusion"]["tokens"]
    pixels = torch.from_numpy(loaded.processor(image))[None]
    model.language_model.set_attn_implementation("eager")  # it returns the weights
    with torch.inference_mode():
        output = model(torch.tensor([ids]), pixels, output_attentions=True, use_cache=False)
        mean = torch.stack(output.attentions).mean((0, 2))[0, -1]
        begin = ids.index(-200)
        own = torch.tensor(got["answers"][0]["rows"][0]["attention"][0])
        assert torch.allclose(own, mean[begin : begin + model.n_image_tokens], atol=1e-5)

        def score(values: torch.Tensor) -> torch.Tensor:
            logits = model(torch.tensor([ids + tokens]), values).logits[0, len(ids) - 1 : -1]
            return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]

        greyed, (row, column) = pixels.clone(), divmod(10, 7)
        grey = (0.5 - torch.tensor(loaded.processor.mean)) / torch.tensor(loaded.processor.std)
        greyed[0, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = grey[:, None, None]
        change = score(pixels) - score(greyed)
    assert [part["patch"] for part in got["occlusion"]["rows"]] == list(range(49))
    assert torch.allclose(torch.tensor(got["occlusion"]["rows"][10]["changes"]), change, atol=1e-3)


@needs_node
def test_tokenizer_and_resize_are_those_of_python(tmp_path: Path) -> None:
    loaded, rng = rounded(), random.Random(1)
    letters = "abc  \n\t.,'`#<>/s\u00e9\u00df\u4e2d\U0001f600\u0301 12'll"
    texts = [
        *QUESTIONS,
        "",
        " ",
        "###",
        "a###b</s>c",
        "### Human: ",
        *("".join(rng.choices(letters, k=30)) for _ in range(60)),
    ]
    noise = np.random.default_rng(0).integers(0, 256, (2, 97, 131, 3), dtype=np.uint8)
    resizes = [
        (Image.fromarray(noise[k % 2]), to)
        for k, to in enumerate(((112, 151), (40, 97), (131, 30), (260, 200), (5, 3)))
    ]
    got = run(tmp_path, loaded, [], texts=texts, resizes=[{"image": packed(i), "to": to} for i, to in resizes])
    for text, own in zip(texts, got["encoded"], strict=True):
        assert own["ids"] == loaded.tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert own["back"] == text
    for (image, to), own in zip(resizes, got["resized"], strict=True):
        pixels = np.asarray(image.resize(to, Image.Resampling.BICUBIC)).ravel()
        assert (np.frombuffer(base64.b64decode(own), np.uint8) == pixels).all(), to


def test_what_the_engine_does_not_compute_is_refused(tmp_path: Path) -> None:
    loaded = rounded()
    for field, value, word in (
        ("template", "v0_exact", "template 'v0_exact'"),
        ("image_delimiters", ["<s>", "</s>"], "image delimiters"),
        ("image_position", "random", "image position 'random'"),
    ):
        manifest = {**loaded.manifest, field: value}
        with pytest.raises(DataError, match=word):
            live_state(Loaded(loaded.model, loaded.tokenizer, loaded.processor, manifest))
    llm, tower = tiny.base_models(tmp_path)
    other = build(llm, tower, torch.float32)
    other.model.language_model.config.num_key_value_heads = 1
    with pytest.raises(DataError, match="grouped attention heads"):
        live_state(other)
