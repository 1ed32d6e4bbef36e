from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.conversation import TEMPLATES, encode, place_image, supervised_text
from llava_core.runtime import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


TURNS = [("<image>\nwhat color is the car", "red"), ("and the dog", "blue.")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("v0", " red\n### blue.\n###"), ("v1", " red</s> blue.</s>"), ("plain", "red\nblue.\n")],
)
def test_supervised_text_is_the_answers_with_their_terminators(tokenizer, name, expected) -> None:
    encoded = encode(TEMPLATES.get(name).render(TURNS), tokenizer, 4)
    assert supervised_text(encoded, tokenizer) == expected
    assert encoded.input_ids.count(IMAGE_TOKEN_ID) == 4
    assert len(encoded.input_ids) == len(encoded.labels)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert all(t == s for t, s in zip(encoded.labels, encoded.input_ids, strict=True) if t != IGNORE_INDEX)


@given(
    st.lists(
        st.tuples(st.text("abc #\n:é", max_size=20), st.text("xyz #é\n", min_size=1, max_size=20)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_supervision_survives_any_text(tmp_path_factory, turns) -> None:
    made = tiny.tokenizer(tmp_path_factory.getbasetemp() / "shared")
    template = TEMPLATES.get("v0")
    encoded = encode(template.render(turns), made, 4)
    assert supervised_text(encoded, made) == "".join(f" {a}\n###" for _, a in turns)


def test_generation_prompt_is_a_prefix_of_the_training_sequence(tokenizer) -> None:
    for name in ("v0", "v1"):
        whole = encode(TEMPLATES.get(name).render(TURNS), tokenizer, 4).input_ids
        prompt = encode(TEMPLATES.get(name).render([TURNS[0], (TURNS[1][0], None)]), tokenizer, 4).input_ids
        assert whole[: len(prompt)] == prompt


def test_truncation_drops_whole_turns_and_never_an_image(tokenizer) -> None:
    segments = TEMPLATES.get("v0").render(TURNS)
    whole = encode(segments, tokenizer, 4)
    short = encode(segments, tokenizer, 4, max_length=len(whole.input_ids) - 1)
    assert supervised_text(short, tokenizer) == " red\n###"
    with pytest.raises(DataError, match=r"record 7.*max_length"):
        encode(segments, tokenizer, 4, max_length=6, name="record 7")


def test_image_position() -> None:
    text = "look\n<image>"
    assert place_image(text, "data", "a") == text
    assert place_image(text, "first", "a") == "<image>\nlook"
    assert place_image("<image>\nlook", "last", "a") == text
    drawn = {place_image(text, "random", str(k)) for k in range(20)}
    assert drawn == {text, "<image>\nlook"}
    assert place_image(text, "random", "5") == place_image(text, "random", "5")


def test_unknown_template_names_the_known() -> None:
    with pytest.raises(ConfigError, match="v0"):
        TEMPLATES.get("v00")


def test_templates_render_nothing_for_no_turns() -> None:
    with pytest.raises(DataError, match="without turns"):
        TEMPLATES.get("v1").render([])


def test_folder_is_used(tokenizer, tmp_path: Path) -> None:
    assert tiny.tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
