"""The data card: measurements, provenance, and protection of cards that are already there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from companion import cli
from companion.data_tools import data_card, phrases
from companion.data_tools.data_card import audit_file, card_text, write_card
from companion.data_tools.verbs import root_verbs
from llava_core.runtime import ConfigError, DataError


def test_audit_runs_without_a_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    with pytest.raises(ConfigError, match=r"root verbs need a parser.*pip install"):
        root_verbs({"a": ["What?"]}, tmp_path)
    result = audit_file(chat(tmp_path))
    assert result["verbs"] is None
    assert "pip install" in result["verbs_missing"]
    assert "Root verbs were not looked for. root verbs need a parser" in card_text(result)


def chat(folder: Path, name: str = "chat.json") -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog. See the caption."}]
    path = folder / name
    path.write_text(
        json.dumps([{"id": k, "image": f"{k}.jpg", "type": "detail", "conversations": turns} for k in "ab"])
    )
    return path


def provenance(folder: Path) -> None:
    row = {"id": "a", "image": "a.jpg", "type": "detail", "request": "f00", "prompt": "beef", "client": "live"}
    row |= {"temperature": 0.7, "asked_model": "gpt-4-0314", "price": [30.0, 60.0], "context": "A car."}
    rows = [
        row | {"model": "gpt-4-0314", "date": f"2023-04-0{day}T10:00:00Z", "cost_usd": 0.25}
        | {"prompt_tokens": 100, "completion_tokens": 20} for day in (2, 1, 3)
    ]  # fmt: skip
    (folder / "provenance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "failures.jsonl").write_text('{"error": "MissingLabel"}\n')


def test_card_has_the_measurements_and_no_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    provenance(tmp_path)
    (tmp_path / "card.json").write_text('{"name": "mine", "about": "Photos.", "license": "CC0-1.0"}')
    boxes = [{"id": k, "image": f"{k}.jpg", "captions": ["A car."], "instances": []} for k in "ab"]
    boxes[0]["instances"] = [{"category": "dog", "bbox": [0, 0, 1, 1]}]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boxes))
    result = audit_file(chat(tmp_path), tmp_path / "boxes.jsonl")
    text = card_text(result)
    for part in (
        "2 records, 2 turns, 2 images",
        "mine: Photos. License: CC0-1.0",
        "2023-04-01 to 2023-04-03",
        "gpt-4-0314 (3 replies)",
        "| refused replies | 1 |",
        "30 and 60 USD per million tokens",
        "0.75 USD",
        "300 of prompts, 60 of replies",
        "detail <code>beef</code>",
        "| detail | 2 | 2 | 1 | 3 | 5 | 1 | 1 |",
        "| a text with a word on captions | 2 | 4 | texts | 50 |",
        "| an answer names an object that no caption and no box has | 1 | 2 | answers | 50 |",
        "Such as detail <code>b</code>.",
        "llava data audit chat.json --annotations boxes.jsonl",
    ):
        assert part in text, part
    card, twin = (write_card(result, tmp_path / "out")[k] for k in (1, 0))
    assert card.read_text() == text
    assert json.loads(twin.read_text()) == json.loads(json.dumps(result))
    assert card_text(json.loads(twin.read_text())) == text  # the twin holds all that the card needs


def test_foreign_cards_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    result = audit_file(chat(tmp_path))
    (tmp_path / data_card.CARD).write_text("# Another's")
    with pytest.raises(DataError, match="somebody else"):
        write_card(result, tmp_path)
    assert (tmp_path / data_card.CARD).read_text() == "# Another's"
    write_card(result, tmp_path / "own")
    write_card(result, tmp_path / "own")
    with pytest.raises(DataError, match=r"the card of chat\.json"):
        write_card(audit_file(chat(tmp_path, "more.json")), tmp_path / "own")


def test_card_has_notes_on_the_released_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    text = card_text(audit_file(chat(tmp_path, "llava_instruct_150k.json")))
    assert "CC BY NC 4.0" in text
    assert "OpenAI's terms" in text
    assert "not recorded" in text
    assert "no annotations were given" in text
    assert "not stated" in card_text(audit_file(chat(tmp_path, "mine.json")))


def test_audit_command_writes_the_card_next_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    path = chat(tmp_path)
    assert cli.main(["data", "audit", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["records"] == 2
    assert (tmp_path / data_card.CARD).is_file()
    assert cli.main(["data", "audit", str(path), "--out", str(tmp_path / "there")]) == 0
    assert "2 of        4 texts    a text with a word on captions" in capsys.readouterr().out
    assert (tmp_path / "there" / data_card.TWIN).is_file()
    path.write_text("[{}]")
    assert cli.main(["data", "audit", str(path)]) == 1
    assert "chat.json" in capsys.readouterr().err
