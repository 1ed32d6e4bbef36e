"""Root verbs of questions and their objects, counted with an installed parser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from companion.data_tools import phrases
from companion.data_tools.verbs import BARE, NONE, PAIR, root_verbs

PARSER = importlib.util.find_spec("spacy") and any(importlib.util.find_spec(m.package) for m in phrases.SPACY_MODELS)


needs_parser = pytest.mark.skipif(not PARSER, reason="spaCy and its English model are not installed")


SENTENCES = {
    "Describe this image in detail.": ("describe", "image"),
    "Can you describe the main features of this image for me?": ("describe", "feature"),
    "Give a complete description of the scene.": ("give", "description"),
    "Examine the image closely.": ("examine", "image"),
    "Put the whole scene into words.": ("put", "scene"),
    "Which thing could somebody hold in one hand?": ("hold", "thing"),
    "Why are these people holding umbrellas?": ("hold", "umbrella"),
    "What place does the image show?": ("show", "place"),  # the model tags this verb as a noun
    "What does this picture show? Describe the scene.": ("describe", "scene"),
    "What do you see?": BARE,
    "Look closely and tell me about every part of the image.": BARE,
    "What color is the chair?": NONE,
    "Is there a bird?": NONE,
}


@needs_parser
def test_root_verbs_are_counted_per_question_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "chat.json"
    source.write_text("[]")
    questions = {"a": [*SENTENCES, "Is there a bird?"], "b": ["Describe this image in detail."] * 3}
    result = root_verbs(questions, source, tmp_path / "cache")
    assert result["a"].pairs == {pair: 1 for pair in SENTENCES.values() if isinstance(pair, tuple)}
    assert result["a"].counts == {PAIR: 9, BARE: 2, NONE: 3}
    assert result["b"].pairs == {("describe", "image"): 3}

    def never(*_: object) -> Any:
        raise AssertionError("parsed again")

    monkeypatch.setattr(phrases.Extractor, "start", never)
    assert root_verbs(questions, source, tmp_path / "cache") == result
    with pytest.raises(AssertionError, match="parsed again"):  # other questions of the same file
        root_verbs({"a": ["Describe the dog."]}, source, tmp_path / "cache")
