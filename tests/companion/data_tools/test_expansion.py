"""Naive expansion of captions: instruction lists and seeded draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from companion.data_tools.expansion import LISTS, draw, expand, load_instructions
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError


def test_instruction_lists_have_the_papers_length(tmp_path: Path) -> None:
    assert [len(set(load_instructions(name))) for name in ("brief", "detail")] == [11, 16]
    path = tmp_path / "official.txt"
    path.write_text('\ufeffDescribe the image.\n\n- "Say it."\n', encoding="utf-8")
    assert load_instructions(path) == ("Describe the image.", "Say it.")
    for text, wrong in (("", "no instruction"), ("A.\nA.", "line 2"), ("A <image>.", "line 1")):
        path.write_text(text)
        with pytest.raises(DataError, match=wrong):
            load_instructions(path)
    with pytest.raises(DataError, match="did you mean 'brief'"):
        load_instructions("breif")


def test_instructions_are_drawn_evenly_by_seed_and_id() -> None:
    brief = LISTS["brief"]
    assert draw(brief, "000000123") == draw(brief, "000000123")
    drawn = Counter(draw(brief, str(k)) for k in range(11_000))
    assert set(drawn) == set(brief)
    assert all(850 < count < 1150 for count in drawn.values())
    assert sum(draw(brief, str(k)) != draw(brief, str(k), 1) for k in range(1000)) > 800
    turns = [expand("A cat.", str(k), brief) for k in range(1000)]
    first = sum(question["value"].startswith(IMAGE_MARKER) for question, _ in turns)
    assert 400 < first < 600
    assert all(question["value"].count(IMAGE_MARKER) == 1 for question, _ in turns)
    assert IMAGE_MARKER not in expand("A cat.", "1", brief, image=False)[0]["value"]
