"""Unusual scenes: what each kind changes, and that its answers are those of the image."""

from __future__ import annotations

import numpy as np
import pytest

from companion.unusual_scenes import KINDS, unusual_scenes
from llava_core.runtime import ConfigError

N = 8


def pixels(kind: str) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image, _ in unusual_scenes(kind, N)]


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_equal_by_seed_and_have_questions(kind: str) -> None:
    first, again, other = (list(unusual_scenes(kind, N, seed)) for seed in (0, 0, 1))
    assert [(image.tobytes(), asked) for image, asked in first] == [(i.tobytes(), a) for i, a in again]
    assert [image.tobytes() for image, _ in first] != [image.tobytes() for image, _ in other]
    assert all(image.size == (224, 224) and image.mode == "RGB" for image, _ in first)
    assert sum(len(asked) for _, asked in first) >= N


def test_only_the_named_part_of_a_usual_scene_changes() -> None:
    usual = pixels("usual")
    top = [np.abs(a - b)[:112].sum() / np.abs(a - b).sum() for a, b in zip(usual, pixels("in the sky"), strict=True)]
    assert min(top) > 0.3  # what is drawn at the upper edge, beside what is missing at the lower one
    for a, b in zip(usual, pixels("unseen colors"), strict=True):
        assert 0 < (np.abs(a - b).sum(-1) > 0).mean() < 0.6
    drawing = np.concatenate([p.reshape(-1, 3) for p in pixels("line drawing")])
    assert (drawing == drawing[:, :1]).all()  # gray
    assert (drawing > 200).mean() > 0.7


def test_answers_fit_the_images() -> None:
    colors = {(qa.question, qa.answer) for _, asked in unusual_scenes("usual", N) for qa in asked if qa.kind == "color"}
    new = {
        (qa.question, qa.answer)
        for _, asked in unusual_scenes("unseen colors", N)
        for qa in asked
        if qa.kind == "color"
    }
    assert {question for question, _ in colors} == {question for question, _ in new}
    assert not colors & new
    assert {qa.answer for _, asked in unusual_scenes("empty", N) for qa in asked} == {"No."}
    assert {qa.answer for _, asked in unusual_scenes("crowd", 20) for qa in asked} == {"Four.", "Five.", "Six."}
    for _, asked in unusual_scenes("exchanged colors", N):
        assert [qa.answer for qa in asked] in (["Yes.", "No."] * 2, [])


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="crowd"):
        next(unusual_scenes("crowds", 1))
