"""Chat templates of others: recognised by the text that they give, kept byte for byte, rendered within limits."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import pytest
from checkpoint_fixtures import change_json, loaded, root  # noqa: F401 - fixtures

from companion.checkpoints.convert import convert
from companion.checkpoints.hf_export import chat_template
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints import chat_template as module
from llava_core.checkpoints.chat_template import read_chat_template, usage_of_template
from llava_core.checkpoints.load import load, save_checkpoint
from llava_core.checkpoints.open import open_checkpoint
from llava_core.data.conversation import TEMPLATES
from llava_core.inference import prompt_ids
from llava_core.runtime import CheckpointError

HUB = (  # as those of llava-hf: no system message, a space after each text, `generation` for training
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\r\n{% for p in m['content'] %}"
    "{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def folder(loaded, root, tmp_path) -> Path:
    """A folder of transformers without a chat template, whose tokenizer adds the BOS token."""
    path = foreign.write_hf(loaded, root, tmp_path / "source")
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    added = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text]}
    added |= {"special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    change_json(path / "tokenizer.json", post_processor=added)
    return path


def test_the_hubs_template_is_recognised() -> None:
    expected = {"template": "v1_hf", "system": "", "image_position": "first", "image_delimiters": None}
    assert usage_of_template(HUB, Path()) == expected


@pytest.mark.parametrize("name", [n for n in TEMPLATES.names() if TEMPLATES.get(n).encoder is None])
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("delimiters", [None, foreign.DELIMITERS])
def test_our_own_templates_are_recognised(name, position, delimiters) -> None:
    usage = {"system": "Be brief." if "{system}" in TEMPLATES.get(name).opening else "", "image_position": position}
    usage |= {"image_delimiters": delimiters}
    found = usage_of_template(chat_template(TEMPLATES.get(name), usage), Path())
    assert found == usage | {"template": name}


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("template", [HUB, CHATML], ids=["hub", "chatml"])
def test_a_template_is_written_back_byte_for_byte(folder, name, template, tmp_path) -> None:
    file = folder / name
    if name.endswith("jinja"):
        file.write_bytes(template.encode())
    else:
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | {"chat_template": template}))
    assert read_chat_template(folder) == template
    convert(folder, tmp_path / "hf", "hf", verify=True)
    assert (tmp_path / "hf" / "chat_template.jinja").read_bytes() == template.encode()
    convert(tmp_path / "hf", tmp_path / "llava", "llava")
    convert(tmp_path / "llava", tmp_path / "again", "hf")
    assert (tmp_path / "again" / "chat_template.jinja").read_bytes() == template.encode()


def test_a_template_of_another_family_is_told(folder, tmp_path) -> None:
    (folder / "chat_template.jinja").write_bytes(CHATML.encode())
    found = inspect(folder)
    assert found["template"] is None
    assert found["problems"] == []
    assert any("renders '<|im_start|>user" in note and "--assume template=NAME" in note for note in found["notes"])
    convert(folder, tmp_path / "llava", "llava")
    for path in (folder, tmp_path / "llava"):
        with pytest.raises(CheckpointError, match=r"none of ours; fix: .*--assume template=v1"):
            load(path)
    assert load(folder, template="v1").manifest["template"] == "v1"
    convert(folder, tmp_path / "hf", "hf", usage={"template": "v1", "system": "Be brief."})
    assert "Be brief." in (tmp_path / "hf" / "chat_template.jinja").read_text()


def test_our_system_message_is_not_added_unasked(folder, tmp_path) -> None:
    found = inspect(folder)
    assert found["template"] == "v1_hf"
    assert any("no chat template" in note for note in found["notes"])
    ours = load(folder)
    ids = prompt_ids(ours, [("what dog", "red"), ("what car", None)], has_image=True)
    text = ours.tokenizer.decode([t for t in ids if t >= 0], clean_up_tokenization_spaces=False)
    assert text == "<s>USER: \nwhat dog ASSISTANT: red USER: what car ASSISTANT:"
    convert(folder, tmp_path / "hf", "hf")
    assert "helpful assistant" not in (tmp_path / "hf" / "chat_template.jinja").read_text()


def test_an_empty_system_message_is_exported(loaded, tmp_path) -> None:
    source = save_checkpoint(tmp_path / "c", loaded, "full", template="v1", system="", image_position="first")
    convert(source, tmp_path / "hf", "hf", verify=True)
    assert "helpful assistant" not in (tmp_path / "hf" / "chat_template.jinja").read_text()


def test_an_exports_template_changed_by_others_is_refused(loaded, tmp_path) -> None:
    source = save_checkpoint(tmp_path / "c", loaded, "full", template="v1", image_position="first")
    convert(source, tmp_path / "hf", "hf")
    (tmp_path / "hf" / "chat_template.json").unlink()  # as a client of another version saves it
    open_checkpoint(tmp_path / "hf")
    file = tmp_path / "hf" / "chat_template.jinja"
    file.write_text(file.read_text().replace("USER", "User"))
    with pytest.raises(CheckpointError, match=r"chat_template is .* when it was exported"):
        open_checkpoint(tmp_path / "hf")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set x = 'a' * 9000000000 %}{{ x }}"
ESCAPE = "{{ messages.__class__.__mro__ }}"


@pytest.mark.parametrize("template", [ENDLESS, HUGE, ESCAPE, "{% if", "{{ raise_exception('no') }}"])
def test_hostile_templates_end_with_one_line(folder, template, monkeypatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 2)
    (folder / "chat_template.jinja").write_text(template)
    found = inspect(folder)
    assert found["problems"] == []
    assert any("chat template" in note and "\n" not in note for note in found["notes"])
