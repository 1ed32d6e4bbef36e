from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cassette_processes import generate

from companion import cli
from companion.data_tools.check import check_file
from companion.data_tools.coco import AnnotatedImage, load_annotations
from companion.data_tools.expansion import DETAIL_INSTRUCTIONS
from companion.miniature.offline_chat import respond
from companion.teacher.chat import BudgetError, ChatError, ChatReply, ChatRequest, Message, ServerError
from companion.teacher.client import OfflineClient, RecordClient, ReplayClient
from companion.teacher.generate import requests_for
from companion.teacher.prompts import DETAIL_QUESTIONS, KINDS, PROMPTS, load_prompts
from llava_core.data.instruct import load_instruct
from llava_core.runtime import ROOT, ConfigError, DataError, read_json, read_jsonl

BOXES = [("car", (0.1, 0.2, 0.3, 0.4))]


def annotated(name: str, *captions: str) -> AnnotatedImage:
    return AnnotatedImage(name, f"{name}.jpg", list(captions) or ["A red car.", "A car on a street."], BOXES)


IMAGES = [annotated(f"{k:012d}") for k in range(40)]
REPLY = "Question:\nWhat color?\n===\nAnswer:\nRed.\n===\nQuestion:\nWhere?\n===\nAnswer:\nThere."


def scripted(messages: list[Message]) -> str:
    kind = next(kind for kind, prompt in PROMPTS.items() if prompt.system == messages[0]["content"])
    return {"conversation": REPLY, "detail": "A car.", "complex": "\n".join(REPLY.split("\n")[:5])}[kind]


def test_records_have_the_official_format_and_two_keys(tmp_path: Path) -> None:
    result = generate(IMAGES[:3], KINDS, OfflineClient(scripted), tmp_path)
    assert {k: result[k] for k in ("records", "failed", "requests", "replayed", "spend_usd")} == {
        "records": 9, "failed": 0, "requests": 9, "replayed": 0, "spend_usd": 0.0
    }  # fmt: skip
    names = ["conversation_3.json", "detail_3.json", "complex_3.json", "llava_instruct.json"]
    others = ["llava_instruct.parquet", "failures.jsonl", "provenance.jsonl"]
    assert [Path(f).name for f in result["files"]] == [*names, *others]
    every = read_json(tmp_path / "llava_instruct.json")
    assert [(r["id"], r["type"]) for r in every] == [(image.id, kind) for image in IMAGES[:3] for kind in KINDS]
    assert set(every[0]) == {"id", "image", "type", "conversations", "provenance"}
    assert [turn["from"] for turn in every[0]["conversations"]] == ["human", "gpt"] * 2
    assert [turn["value"] for turn in every[0]["conversations"][1:]] == ["Red.", "Where?", "There."]
    by_kind = [record for name in names[:3] for record in read_json(tmp_path / name)]
    assert by_kind == sorted(every, key=lambda r: KINDS.index(r["type"]))
    assert every[0]["provenance"].keys() == {"request", "model", "date", "client", "prompt", "seed"}
    assert [every[0]["provenance"][key] for key in ("model", "date", "client")] == ["offline", None, "offline"]
    pq = pytest.importorskip("pyarrow.parquet", reason="the records as columns need pyarrow")
    assert pq.read_table(tmp_path / "llava_instruct.parquet").to_pylist() == every
    assert (tmp_path / "failures.jsonl").read_text() == ""
    assert {s.kind for s in load_instruct(tmp_path / "llava_instruct.json")} == set(KINDS)


def test_only_conversations_are_generated_without_boxes(tmp_path: Path) -> None:
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


def test_image_position_follows_seed_and_record(tmp_path: Path) -> None:
    for name, images, seed in (("a", IMAGES, 0), ("b", IMAGES, 0), ("c", IMAGES, 1), ("d", IMAGES[7:9], 0)):
        generate(images, ["detail"], OfflineClient(scripted), tmp_path / name, seed=seed)
    a, b, c, d = (first_turns(tmp_path / name) for name in "abcd")
    assert a == b != c
    assert d == {key: a[key] for key in d}  # the other images do not matter
    places = [text.startswith("<image>\n") for text in a.values()]
    assert all(first != text.endswith("\n<image>") for first, text in zip(places, a.values(), strict=True))
    assert 8 < sum(places) < 32
    asked = {text.replace("<image>", "").strip() for text in a.values()}
    assert asked <= set(DETAIL_QUESTIONS)
    assert len(asked) > 8


BAD = {"1": "", "2": "Question:\nA?", "3": "Answer:\nA.", "4": "Question:\nA?"}


@pytest.mark.parametrize("learns", [False, True])
def test_malformed_replies_are_counted_and_retried_once(tmp_path: Path, learns: bool) -> None:
    asked: list[list[Message]] = []

    def sloppy(messages: list[Message]) -> str:
        asked.append(messages)
        context = next(m["content"] for m in messages[::-1] if m["content"] in "012345")
        return REPLY if learns and messages[-1]["content"] != context else BAD.get(context, REPLY)

    images = [annotated(str(k), str(k)) for k in range(6)]
    result = generate(images, ["conversation"], OfflineClient(sloppy), tmp_path)
    assert (result["records"], result["failed"]) == ((6, 0) if learns else (2, 4))
    assert (result["requests"], result["retried"], result["repaired"]) == (10, 4, 4 if learns else 0)
    assert result["failures"] == ({} if learns else {"BadAlternation": 1, "EmptyReply": 1, "MissingAnswer": 2})
    rows = read_jsonl(tmp_path / "failures.jsonl")
    first = [(row["id"], row["error"], row["reply"]) for row in rows if row["attempt"] == 1]
    assert first[:2] == [("1", "EmptyReply", ""), ("2", "MissingAnswer", "Question:\nA?")]
    assert (len(first), len(rows)) == (4, 4 if learns else 8)
    assert {row["repaired"] for row in rows} == {learns}
    provenance = read_jsonl(tmp_path / "provenance.jsonl")
    assert (len(provenance), len({row["request"] for row in provenance})) == (10, 10)
    assert {row["context"] for row in provenance} == set("012345")
    assert len(read_json(tmp_path / f"conversation_{result['records']}.json")) == result["records"]
    second = next(messages for messages in asked if messages[-1]["content"].startswith("This reply cannot be used"))
    assert second[-2] == {"role": "user", "content": "1"}  # an empty reply is not quoted
    assert "(EmptyReply): the reply is empty" in second[-1]["content"]
    last = next(messages for messages in asked if "(MissingAnswer)" in messages[-1]["content"])
    assert last[-2] == {"role": "assistant", "content": "Question:\nA?"}


class Moody:
    """Refuses one image, changes its model, and ends its budget."""

    concurrency = 4

    def __init__(self, refused: str = "", broke_after: int = 99) -> None:
        self.refused, self.left = refused, broke_after

    def complete(self, request: ChatRequest) -> ChatReply:
        self.left -= 1
        context = request.messages[-1]["content"]
        if self.left < 0:
            raise BudgetError("budget of 1 USD: spent")
        if context == self.refused or self.refused == "all":
            raise ChatError("status 400: no")
        return ChatReply("A car.", "gpt-4-0314" if context < "3" else "gpt-4-0613", 1, 1, 0.125, date="2023-05-01")


def test_missing_replies_and_changed_models_are_reported(tmp_path: Path) -> None:
    images = [AnnotatedImage(str(k), f"{k}.jpg", [str(k)], []) for k in range(6)]
    result = generate(images, ["detail"], Moody("2"), tmp_path)
    assert (result["records"], result["failed"], result["unasked"], result["stopped"]) == (5, 1, 0, None)
    assert result["failures"] == {"ChatError": 1}
    assert result["models"] == {"gpt-4-0314": 2, "gpt-4-0613": 3}
    assert [r["id"] for r in read_json(tmp_path / "llava_instruct.json")] == list("01345")
    assert [(r["id"], r["reply"]) for r in read_jsonl(tmp_path / "failures.jsonl")] == [("2", None)]
    with pytest.raises(ServerError, match="20 requests in a row had no reply; the last one: status 400"):
        generate([*images] * 5, ["detail"], Moody("all"), tmp_path / "b")


def test_spent_budget_keeps_earlier_records(tmp_path: Path) -> None:
    images = [AnnotatedImage(str(k), f"{k}.jpg", [str(k)], []) for k in range(9)]
    client = Moody(broke_after=5)
    client.concurrency = 1
    result = generate(images, ["detail"], client, tmp_path)
    assert (result["records"], result["failed"], result["unasked"]) == (5, 0, 4)
    assert (result["stopped"], result["spend_usd"]) == ("budget of 1 USD: spent", 0.625)
    assert len(read_json(tmp_path / "detail_5.json")) == 5


def test_requests_for_lists_the_requests_of_generate(tmp_path: Path) -> None:
    asked = [request for _, _, request in requests_for(IMAGES[:3], KINDS, model="gpt-4")]
    sent: list[str] = []

    class Spy:
        def complete(self, request: ChatRequest) -> ChatReply:
            sent.append(request.key)
            return ChatReply(scripted(list(request.messages)), "m", 1, 1)

    generate(IMAGES[:3], KINDS, Spy(), tmp_path, model="gpt-4")
    assert sent == [request.key for request in asked]


def test_files_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    client = OfflineClient(scripted)
    generate(IMAGES[:5], ["detail"], client, tmp_path)
    (tmp_path / "detail_23k.json").write_text("[]")
    generate(IMAGES[:2], ["detail"], client, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("detail_*")) == ["detail_2.json", "detail_23k.json"]


@pytest.mark.parametrize("name", ["1", "\udc80"])
def test_halves_of_characters_end_no_run(tmp_path: Path, name: str) -> None:
    image = annotated(name, "A car \ud83d stands on a road.")
    client = RecordClient(OfflineClient(respond), tmp_path / "tape.sqlite")
    assert generate([image], ["detail"], client, tmp_path / "out")["records"] == 1
    [record] = read_json(tmp_path / "out" / "llava_instruct.json")
    assert record["id"] == name
    assert (tmp_path / "out" / "llava_instruct.parquet").exists() == (name == "1")
    generate([image], ["detail"], ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "again")


def test_unknown_kind_is_an_error_before_any_request(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'details'; did you mean 'detail'"):
        generate(IMAGES, ["conversation", "details"], OfflineClient(lambda m: pytest.fail("asked")), tmp_path)
    with pytest.raises(ConfigError, match="unknown kind of instruction data 'detail'"):
        generate(IMAGES, ["detail"], OfflineClient(scripted), tmp_path, prompts={"complex": PROMPTS["complex"]})


class Server:
    """A paid model that writes down what it was asked, and kills the process at its `deadly` request."""

    def __init__(self, log: Path, deadly: int | None = None) -> None:
        self.log, self.deadly, self.served = log, deadly, 0

    def complete(self, request: ChatRequest) -> ChatReply:
        messages = request.messages
        if self.served == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.served += 1
        with open(self.log, "a") as file:
            file.write(f"{hash((messages[0]['content'], messages[-1]['content']))}\n")
        return ChatReply(scripted(list(messages)), "gpt-4-0314", 1, 1, 0.5, date="2023-05-01T00:00:00+00:00")


def test_resumed_run_pays_each_request_once(tmp_path: Path) -> None:
    images = [annotated(str(k), f"Car {k}.") for k in range(7)]
    script = (
        "import importlib.util, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('here', {__file__!r})\n"
        "here = importlib.util.module_from_spec(spec); sys.modules['here'] = here; spec.loader.exec_module(here)\n"
        "images = [here.annotated(str(k), f'Car {k}.') for k in range(7)]\n"
        f"folder = Path({str(tmp_path)!r}); server = here.Server(folder / 'log', 9)\n"
        "here.generate(images, here.KINDS, here.RecordClient(server, folder / 'tape.sqlite'), folder / 'out')\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not (tmp_path / "out").exists()
    server = Server(tmp_path / "log")
    result = generate(images, KINDS, RecordClient(server, tmp_path / "tape.sqlite"), tmp_path / "out")
    assert (result["records"], result["requests"], result["replayed"], result["spend_usd"]) == (21, 3, 18, 1.5)
    assert len((tmp_path / "log").read_text().split()) == 21
    generate(images, KINDS, Server(tmp_path / "other"), tmp_path / "straight")
    second = generate(images, KINDS, ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "replayed")
    assert (second["requests"], second["replayed"], second["spend_usd"]) == (0, 21, 0.0)
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


@pytest.mark.parametrize("prompts", ["ours", "released"])
def test_contexts_of_real_images_follow_the_paper(reference: Path, prompts: str) -> None:
    images = load_annotations(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl")
    chosen = load_prompts(reference / "coco" / "prompts") if prompts == "released" else None
    jobs = list(requests_for(images, KINDS, chosen))
    assert len(jobs) == 240
    with_boxes = 0
    for image, kind, request in jobs:
        captions, _, boxes = request.messages[-1]["content"].partition("\n\n")
        assert captions.split("\n") == [" ".join(caption.split()) for caption in image.captions]
        lines = boxes.split("\n") if boxes else []
        assert [line.partition(": [")[0] for line in lines] == [
            name for name, _ in (image.boxes if kind != "conversation" else ())
        ]
        assert all(0 <= float(x) <= 1 for line in lines for x in line.partition(": [")[2][:-1].split(", "))
        with_boxes += bool(lines)
    assert with_boxes > 150


def test_real_images_give_the_same_files_by_seed(reference: Path, tmp_path: Path) -> None:
    images = load_annotations(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate(images, KINDS, OfflineClient(respond), tmp_path / name, seed=seed)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name
    a, c = (read_json(tmp_path / name / "llava_instruct.json") for name in "ac")
    assert [r["conversations"][1] for r in a] == [r["conversations"][1] for r in c]  # the teacher has no seed
    changed = sum(x["conversations"][0] != y["conversations"][0] for x, y in zip(a, c, strict=True))
    assert 80 < changed < 240  # half of the sides, and nearly every way to ask for a description


def test_descriptions_use_the_given_questions(tmp_path: Path) -> None:
    generate(IMAGES, ["detail"], OfflineClient(scripted), tmp_path / "a", detail_questions=["What?", "Which?"])
    assert {text.replace("<image>", "").strip() for text in first_turns(tmp_path / "a").values()} == {"What?", "Which?"}
    generate(IMAGES, ["detail"], OfflineClient(scripted), tmp_path / "b", detail_questions=DETAIL_INSTRUCTIONS)
    generate(IMAGES, ["detail"], OfflineClient(scripted), tmp_path / "c")
    assert first_turns(tmp_path / "b") == first_turns(tmp_path / "c")


class Foresighted(OfflineClient):
    """Wants to know all requests before it answers one."""

    def __init__(self, responder: Callable[[list[Message]], str]) -> None:
        super().__init__(responder)
        self.known: dict[str, ChatReply] = {}
        self.rounds: list[int] = []

    def prefetch(self, requests: Sequence[ChatRequest]) -> list[ChatReply | None]:
        self.rounds.append(len(requests))
        self.known |= {request.key: super(Foresighted, self).complete(request) for request in requests}
        return [self.known[request.key] for request in requests]

    def complete(self, request: ChatRequest) -> ChatReply:
        return self.known[request.key]


def test_prefetch_gets_first_requests_then_retries(tmp_path: Path) -> None:
    def sloppy(messages: list[Message]) -> str:
        return BAD.get(messages[-1]["content"], REPLY)

    images = [annotated(str(k), str(k)) for k in range(6)]
    client = Foresighted(sloppy)
    result = generate(images, ["conversation"], client, tmp_path / "a")
    assert client.rounds == [6, 4]
    assert (result["records"], result["repaired"]) == (6, 4)
    generate(images, ["conversation"], OfflineClient(sloppy), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_command_line_takes_prompts_and_instructions(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, folder = reference / "coco" / "caps_boxes_coco2014_val_80.jsonl", reference / "coco" / "prompts"
    (tmp_path / "list.txt").write_text("Say what you see.\nSay it all.\n")
    words = ["generate", "--annotations", str(annotations), "--limit", "9", "--json"]
    more = ["--prompts", str(folder), "--instructions", str(tmp_path / "list.txt")]
    assert cli.main([*words, "--out", str(tmp_path / "ours")]) == 0
    assert cli.main([*words, *more, "--out", str(tmp_path / "theirs")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 27
    records = read_json(tmp_path / "theirs" / "llava_instruct.json")
    versions = {kind: prompt.version for kind, prompt in load_prompts(folder).items()}
    assert {record["type"]: record["provenance"]["prompt"] for record in records} == versions
    asked = {r["conversations"][0]["value"].replace("<image>", "").strip() for r in records if r["type"] == "detail"}
    assert asked == {"Say what you see.", "Say it all."}
    ours = {r["provenance"]["prompt"] for r in read_json(tmp_path / "ours" / "llava_instruct.json")}
    assert not ours & set(versions.values())
    assert cli.main([*words, "--prompts", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert "system_message.txt" in capsys.readouterr().err
    # one prompt more or less is another price, which the plan tells
    for extra in ([], ["--prompts", str(folder)]):
        assert cli.main(["plan", *words, *extra]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert plans[0]["requests"] == plans[1]["requests"] == 27
    assert plans[0]["tokens"]["prompt"] != plans[1]["tokens"]["prompt"]
