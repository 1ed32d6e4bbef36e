from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llava_core.data.coco import load_annotations
from llava_core.data.instruct import check_file, load_instruct
from llava_core.miniature.offline_chat import respond
from llava_core.runtime import ROOT, ConfigError, DataError, read_json, read_jsonl
from llava_core.teacher.client import ChatReply, Message, OfflineClient, RecordClient, ReplayClient
from llava_core.teacher.generate import generate
from llava_core.teacher.prompts import DETAIL_QUESTIONS, KINDS, PROMPTS, load_prompts


@dataclass
class Image:
    id: str
    image: str
    captions: list[str] = field(default_factory=lambda: ["A red car.", "A car on a street."])
    boxes: list[tuple[str, tuple[float, float, float, float]]] = field(
        default_factory=lambda: [("car", (0.1, 0.2, 0.3, 0.4))]
    )


IMAGES = [Image(f"{k:012d}", f"{k:012d}.jpg") for k in range(40)]
REPLY = "Question:\nWhat color?\n===\nAnswer:\nRed.\n===\nQuestion:\nWhere?\n===\nAnswer:\nThere."


def scripted(messages: list[Message]) -> str:
    kind = next(kind for kind, prompt in PROMPTS.items() if prompt.system == messages[0]["content"])
    return {"conversation": REPLY, "detail": "A car.", "complex": "\n".join(REPLY.split("\n")[:5])}[kind]


def test_records_are_of_the_official_format_with_two_keys_more(tmp_path: Path) -> None:
    result = generate(IMAGES[:3], KINDS, OfflineClient(scripted), tmp_path)
    assert {k: result[k] for k in ("records", "failed", "requests", "replayed", "spend_usd")} == {
        "records": 9, "failed": 0, "requests": 9, "replayed": 0, "spend_usd": 0.0
    }  # fmt: skip
    names = ["conversation_3.json", "detail_3.json", "complex_3.json", "llava_instruct.json"]
    assert [Path(f).name for f in result["files"]] == [*names, "failures.jsonl", "provenance.jsonl"]
    every = read_json(tmp_path / "llava_instruct.json")
    assert [(r["id"], r["type"]) for r in every] == [(image.id, kind) for image in IMAGES[:3] for kind in KINDS]
    assert set(every[0]) == {"id", "image", "type", "conversations", "provenance"}
    assert [turn["from"] for turn in every[0]["conversations"]] == ["human", "gpt"] * 2
    assert [turn["value"] for turn in every[0]["conversations"][1:]] == ["Red.", "Where?", "There."]
    by_kind = [record for name in names[:3] for record in read_json(tmp_path / name)]
    assert by_kind == sorted(every, key=lambda r: KINDS.index(r["type"]))
    assert (tmp_path / "failures.jsonl").read_text() == ""
    assert {s.kind for s in load_instruct(tmp_path / "llava_instruct.json")} == set(KINDS)


def test_conversations_are_written_from_captions_only_the_others_from_boxes_too(tmp_path: Path) -> None:
    asked: dict[str, str] = {}

    def spy(messages: list[Message]) -> str:
        asked[scripted(messages)] = messages[-1]["content"]
        return scripted(messages)

    generate(IMAGES[:1], KINDS, OfflineClient(spy), tmp_path)
    captions = "A red car.\nA car on a street."
    assert list(asked.values()) == [captions, *[f"{captions}\n\ncar: [0.1, 0.2, 0.3, 0.4]"] * 2]
    assert [row["context"] for row in read_jsonl(tmp_path / "provenance.jsonl")] == list(asked.values())


def first_turns(folder: Path) -> dict[tuple[str, str], str]:
    records = read_json(folder / "llava_instruct.json")
    return {(r["id"], r["type"]): r["conversations"][0]["value"] for r in records}


def test_the_image_stands_first_or_last_by_seed_and_record(tmp_path: Path) -> None:
    for name, images, seed in (("a", IMAGES, 0), ("b", IMAGES, 0), ("c", IMAGES, 1), ("d", IMAGES[7:9], 0)):
        generate(images, ["detail"], OfflineClient(scripted), tmp_path / name, seed=seed)
    a, b, c, d = (first_turns(tmp_path / name) for name in "abcd")
    assert a == b != c
    assert d == {key: a[key] for key in d}  # the other images have no say
    places = [text.startswith("<image>\n") for text in a.values()]
    assert all(first != text.endswith("\n<image>") for first, text in zip(places, a.values(), strict=True))
    assert 8 < sum(places) < 32
    asked = {text.replace("<image>", "").strip() for text in a.values()}
    assert asked <= set(DETAIL_QUESTIONS)
    assert len(asked) > 8


def test_replies_of_a_wrong_format_are_kept_and_counted(tmp_path: Path) -> None:
    bad = {"1": "", "2": "Question:\nA?", "3": "Answer:\nA.", "4": "Question:\nA?"}

    def sloppy(messages: list[Message]) -> str:
        return bad.get(messages[-1]["content"], REPLY)

    images = [Image(str(k), f"{k}.jpg", [str(k)]) for k in range(6)]
    result = generate(images, ["conversation"], OfflineClient(sloppy), tmp_path)
    assert (result["records"], result["failed"]) == (2, 4)
    assert result["failures"] == {"BadAlternation": 1, "EmptyReply": 1, "MissingAnswer": 2}
    rows = read_jsonl(tmp_path / "failures.jsonl")
    assert [(row["id"], row["error"], row["reply"]) for row in rows[:2]] == [
        ("1", "EmptyReply", ""), ("2", "MissingAnswer", "Question:\nA?")
    ]  # fmt: skip
    assert len(read_jsonl(tmp_path / "provenance.jsonl")) == 6
    assert len(read_json(tmp_path / "conversation_2.json")) == 2


def test_files_of_an_earlier_run_do_not_stay_beside_the_new_ones(tmp_path: Path) -> None:
    client = OfflineClient(scripted)
    generate(IMAGES, ["detail"], client, tmp_path, limit=5)
    (tmp_path / "detail_23k.json").write_text("[]")
    generate(IMAGES, ["detail"], client, tmp_path, limit=2)
    assert sorted(p.name for p in tmp_path.glob("detail_*")) == ["detail_2.json", "detail_23k.json"]


def test_an_unknown_kind_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'details'; did you mean 'detail'"):
        generate(IMAGES, ["conversation", "details"], OfflineClient(lambda m: pytest.fail("asked")), tmp_path)
    with pytest.raises(ConfigError, match="unknown kind of instruction data 'detail'"):
        generate(IMAGES, ["detail"], OfflineClient(scripted), tmp_path, prompts={"complex": PROMPTS["complex"]})


class Server:
    """A paid model that writes down what it was asked, and kills the process at its `deadly` request."""

    def __init__(self, log: Path, deadly: int | None = None) -> None:
        self.log, self.deadly, self.served = log, deadly, 0

    def complete(self, messages: Sequence[Message], *, model: str, temperature: float = 0, max_tokens: int = 0) -> Any:
        if self.served == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.served += 1
        with open(self.log, "a") as file:
            file.write(f"{hash((messages[0]['content'], messages[-1]['content']))}\n")
        return ChatReply(scripted(list(messages)), "gpt-4-0314", 1, 1, 0.5)


def test_killed_and_called_again_it_pays_each_request_once(tmp_path: Path) -> None:
    images = [Image(str(k), f"{k}.jpg", [f"Car {k}."]) for k in range(7)]
    script = (
        "import importlib.util, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('here', {__file__!r})\n"
        "here = importlib.util.module_from_spec(spec); sys.modules['here'] = here; spec.loader.exec_module(here)\n"
        "images = [here.Image(str(k), f'{k}.jpg', [f'Car {k}.']) for k in range(7)]\n"
        f"folder = Path({str(tmp_path)!r}); server = here.Server(folder / 'log', 9)\n"
        "here.generate(images, here.KINDS, here.RecordClient(server, folder / 'tape.sqlite'), folder / 'out')\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not (tmp_path / "out").exists()
    server = Server(tmp_path / "log")
    result = generate(images, KINDS, RecordClient(server, tmp_path / "tape.sqlite"), tmp_path / "out")
    assert (result["records"], result["requests"], result["replayed"], result["spend_usd"]) == (21, 3, 18, 1.5)
    assert len((tmp_path / "log").read_text().split()) == 21
    generate(images, KINDS, Server(tmp_path / "other"), tmp_path / "straight")
    again = generate(images, KINDS, ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "replayed")
    assert (again["requests"], again["replayed"], again["spend_usd"]) == (0, 21, 0.0)
    for file in (tmp_path / "straight").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
        assert (tmp_path / "replayed" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(DataError, match="holds no reply"):
        generate(images, KINDS, ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "x", model="gpt-4")


@pytest.mark.parametrize("prompts", ["ours", "released"])
def test_eighty_real_images_become_instruction_data(reference: Path, tmp_path: Path, prompts: str) -> None:
    images = load_annotations(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl")
    chosen = load_prompts(reference / "coco" / "prompts") if prompts == "released" else None
    result = generate(images, KINDS, OfflineClient(respond), tmp_path, prompts=chosen)
    assert (result["records"], result["failed"]) == (240, 0)
    assert check_file(tmp_path / "llava_instruct.json")["errors"] == 0
    samples = load_instruct(tmp_path / "llava_instruct.json")
    turns = {kind: [len(s.turns) for s in samples if s.kind == kind] for kind in KINDS}
    assert all(4 <= n <= 8 for n in turns["conversation"])
    assert set(turns["detail"]) == set(turns["complex"]) == {1}
    text = (tmp_path / "llava_instruct.json").read_text().lower()
    for leak in ("caption", "bounding", "coordinate", "0.", "annotat"):
        assert leak not in text.split('"provenance"')[0]
        assert not [s.id for s in samples if any(leak in part.lower() for turn in s.turns for part in turn)], leak
    detail = [s.turns[0][1] for s in samples if s.kind == "detail"]
    assert len(set(detail)) == 80
    assert min(len(t.split()) for t in detail) >= 15
