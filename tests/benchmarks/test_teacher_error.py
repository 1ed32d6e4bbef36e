"""Objects that the teacher's and the model's descriptions name and the image lacks."""

from __future__ import annotations

import inspect

import pytest

from benchmarks import run
from benchmarks.teacher_error import absent_objects
from companion.data_tools.coco import AnnotatedImage
from companion.miniature import language
from companion.miniature.offline_chat import respond
from companion.miniature.world import sample_scene
from companion.teacher.prompts import build_messages, context_text

SCENES = [sample_scene(k, seed=3) for k in range(120)]


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_absent_objects_follow_the_error_rate(error: float) -> None:
    boxes = {str(scene.id): [(item.category, item.box) for item in scene.items] for scene in SCENES}
    captions = {str(s.id): [language.describe(language.facts_of_scene(s))] for s in SCENES}
    images = [AnnotatedImage(key, f"{key}.jpg", captions[key], boxes[key]) for key in boxes]
    said = {
        key: respond(build_messages("detail", context_text(captions[key], boxes[key])), error=error) for key in boxes
    }
    share = absent_objects(said, images)["objects"]
    assert share["n"] > 150
    if error:
        assert share["interval"][0] < 100 * error < share["interval"][1]
    else:
        assert share["share"] == 0


def test_command_has_the_benchmarks_parameters() -> None:
    parameters = inspect.signature(run.load("teacher-error")).parameters
    assert [*parameters] == ["errors", "seeds", "images", "limit", "fast"]
    assert min(parameters["errors"].default) == 0
    assert max(parameters["errors"].default) == 0.3
