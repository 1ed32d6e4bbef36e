"""The steps of LLaVA-Bench on the official files; answer files are resumed or refused."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from companion.evaluation.bench_controls import text_only_answers
from companion.evaluation.bench_steps import FILES, Bench, load_bench, read_rules, write_reference, write_reviews
from companion.evaluation.llava_bench import score_reviews
from companion.evaluation.predict import predict_questions
from companion.evaluation.predictions import checkpoint_id, read_predictions
from companion.miniature.offline_chat import respond
from companion.teacher.chat import BudgetError, ChatError, ChatReply, ChatRequest
from companion.teacher.client import OfflineClient, RecordClient, ReplayClient
from llava_core.checkpoints.load import Loaded, build, save_checkpoint
from llava_core.runtime import DataError, read_jsonl, write_jsonl

QUESTIONS = [
    {"question_id": k, "image": f"{k % 2}.png", "text": f"what color {'is' * k}", "category": "conv"} for k in range(5)
]
CONTEXT = [{"id": str(k), "image": f"{k}.png", "caption": "A red car on a road."} for k in range(2)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    loaded_model = build(*tiny.base_models(tmp_path_factory.mktemp("bases")), torch.float32)
    torch.nn.init.normal_(loaded_model.model.language_model.get_output_embeddings().weight, std=0.5)
    loaded_model.model.eval()
    return loaded_model


@pytest.fixture(scope="module")
def model(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "model", loaded, "full")


def write_answers(loaded: Loaded, model: Path, bench: Bench, out: Path, **options: Any) -> dict[str, Any]:
    """The answers of a checkpoint, as `llava evaluate bench answers` writes them."""
    rows, images = bench.rows()
    return predict_questions(loaded, model, rows, images, out, **{"max_new_tokens": 1024, "batch": 16, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "context.jsonl", CONTEXT)
    (tmp_path / "images").mkdir()
    for k in range(2):
        Image.new("RGB", (40, 32), (200 * k, 30, 30)).save(tmp_path / "images" / f"{k}.png")
    return tmp_path


# ------------------------------------------------------------------------------------------------ files


def test_official_files_of_the_coco_bench(reference: Path, tmp_path: Path) -> None:
    bench = load_bench(reference / "coco")
    assert (len(bench.questions), len(bench.context), len(bench.reference or [])) == (90, 80, 90)
    assert {row["image"] for row in bench.questions} <= bench.context.keys()
    first = bench.context[bench.questions[0]["image"]].split("\n")
    assert first[5] == ""  # five captions, an empty line, boxes
    assert first[6].startswith("suitcase: [0.")
    names = {f"COCO_val2014_{row['image']}" for row in bench.questions}
    for name in names:
        (tmp_path / name).touch()
    rows, images = bench.rows(tmp_path)
    assert ({row["image"] for row in rows}, images) == (names, tmp_path)
    with pytest.raises(DataError, match=r"no such image \(question 0\)"):
        bench.rows()


def test_first_questions_only(folder: Path) -> None:
    bench = load_bench(folder, 2)
    assert [row["question_id"] for row in bench.questions] == [0, 1]
    assert bench.reference is None


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("questions.jsonl", [{"image": "a", "text": "b", "category": "c"}], r"questions\.jsonl, record 1: needs image"),
        ("questions.jsonl", [*QUESTIONS, QUESTIONS[0]], r"record 6: question 0 has two rows"),
        ("questions.jsonl", [], r"questions\.jsonl: is empty"),
        ("qa90_questions.jsonl", QUESTIONS, "put each bench into its own folder"),
        ("context.jsonl", [{"image": "a", "captions": 3}], r"context\.jsonl, record 1: needs `caption`"),
        ("answers_gpt4.jsonl", [{"question_id": 1}], r"answers_gpt4\.jsonl, record 1: needs text"),
    ],
)
def test_files_of_another_format_are_named(folder: Path, name: str, rows: Any, message: str) -> None:
    write_jsonl(folder / name, rows)
    with pytest.raises(DataError, match=message):
        load_bench(folder)


def test_folder_without_a_bench(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no questions\.jsonl or qa90_questions\.jsonl and context\.jsonl"):
        load_bench(tmp_path)


VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["category", "bbox"]), inner, max_size=2)
    ),
    max_leaves=6,
)
TEXTS = st.text(max_size=3)
GOOD = {"question_id": st.integers(0, 3), "image": TEXTS, "text": TEXTS, "category": TEXTS}
ROWS = st.one_of(
    VALUES,
    st.fixed_dictionaries(GOOD, optional={"caption": VALUES, "captions": VALUES, "instances": VALUES}),
    st.fixed_dictionaries(dict.fromkeys(GOOD, VALUES)),
)


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[st.lists(ROWS, min_size=1, max_size=3)] * 3))
def test_any_files_are_read_or_refused(contents: tuple[list[Any], ...]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for names, rows in zip(FILES.values(), contents, strict=True):
            (Path(place) / names[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        with contextlib.suppress(DataError):
            bench = load_bench(place)
            assert all(isinstance(row["image"], str) for row in bench.questions)
            assert all(isinstance(text, str) for text in bench.context.values())


# ------------------------------------------------------------------------------------------------ answers


def test_answers_are_resumed_and_name_their_settings(loaded: Loaded, model: Path, folder: Path, tmp_path: Path) -> None:
    full, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    bench = load_bench(folder)
    report = write_answers(loaded, model, bench, full, max_new_tokens=6)
    assert (report["answers"], report["new"]) == (5, 5)
    lines = full.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:50])
    second = write_answers(loaded, model, bench, part, max_new_tokens=6, batch=2)
    assert (second["answers"], second["new"]) == (5, 3)
    assert part.read_text() == full.read_text()
    row = json.loads(lines[0])
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert row["metadata"] == report["conditions"] == read_predictions(full).settings
    assert row["metadata"]["checkpoint"] == checkpoint_id(model)
    assert [row["metadata"][k] for k in ("max_new_tokens", "temperature", "dtype")] == [6, 0.0, "float32"]
    assert len({json.loads(line)["answer_id"] for line in lines}) == 5


def test_answers_with_other_settings_are_not_resumed(loaded: Loaded, model: Path, folder: Path, tmp_path: Path) -> None:
    out, bench = tmp_path / "a.jsonl", load_bench(folder)
    write_answers(loaded, model, bench, out, max_new_tokens=6)
    with pytest.raises(DataError, match=r"a\.jsonl, record 1: question 0 was answered .*\(max_new_tokens: 6 and 7\)"):
        write_answers(loaded, model, bench, out, max_new_tokens=7)
    with pytest.raises(DataError, match=r"\(temperature: 0\.0 and 0\.5\)"):
        write_answers(loaded, model, bench, out, max_new_tokens=6, temperature=0.5)
    other = Loaded(loaded.model, loaded.tokenizer, loaded.processor, {**loaded.manifest, "template": "v1"})
    with pytest.raises(DataError, match=r"\(template: 'v0' and 'v1'\)"):
        write_answers(other, model, bench, out, max_new_tokens=6)
    weight = loaded.model.multi_modal_projector.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
        changed = save_checkpoint(tmp_path / "changed", loaded, "full")
        weight.copy_(kept)
    with pytest.raises(DataError, match=r"\(checkpoint: 'manifest:[0-9a-f]{12}' and 'manifest:[0-9a-f]{12}'\)"):
        write_answers(loaded, changed, bench, out, max_new_tokens=6)
    bench.questions[0]["text"] = "what"
    with pytest.raises(DataError, match="question 0 was 'what color ' and is now 'what'"):
        write_answers(loaded, model, bench, out, max_new_tokens=6)
    with pytest.raises(DataError, match="record 3: question 2 is not asked now"):
        write_answers(loaded, model, load_bench(folder, 2), out, max_new_tokens=6)


def test_sampled_answers_depend_on_the_seed(loaded: Loaded, model: Path, folder: Path, tmp_path: Path) -> None:
    rows, images = load_bench(folder).rows()
    output = []
    for k, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{k}.jsonl"
        settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": seed}
        predict_questions(loaded, model, rows, images, out, batch=1 + k, **settings)
        output.append([row["text"] for row in read_jsonl(out)])
    assert output[0] == output[1] != output[2]


# ------------------------------------------------------------------------------------------------ reference and reviews


def test_reference_and_reviews_are_replayed_from_a_cassette(folder: Path, tmp_path: Path) -> None:
    bench, answers = load_bench(folder), tmp_path / "answers.jsonl"
    write_jsonl(answers, [{"question_id": k, "text": "A red car."} for k in range(5)])
    with pytest.raises(DataError, match="no reference answers; fix: llava evaluate bench reference"):
        write_reviews(bench, answers, OfflineClient(respond), tmp_path / "r.jsonl")
    report = write_reference(bench, OfflineClient(respond), tmp_path / "answers_gpt4.jsonl")
    assert (report["answers"], report["failed"]) == (5, 0)
    assert "red car" in read_jsonl(tmp_path / "answers_gpt4.jsonl")[0]["text"]
    bench, tape = load_bench(folder), tmp_path / "tape.sqlite"
    first = write_reviews(bench, answers, RecordClient(OfflineClient(respond), tape), tmp_path / "a.jsonl", swap=True)
    second = write_reviews(bench, answers, ReplayClient(tape), tmp_path / "b.jsonl", swap=True)
    assert (first["n"], first["failed"], second["requests"], second["replayed"]) == (10, 0, 0, 10)
    assert score_reviews(tmp_path / "a.jsonl") == score_reviews(tmp_path / "b.jsonl")
    row = read_jsonl(tmp_path / "a.jsonl")[0]
    assert {"answer1_id", "answer2_id", "content", "tuple", "order", "request", "model", "date"} <= row.keys()


class Poor:
    """Has a reply to the first request only; it is cut off where `cut`."""

    def __init__(self, cut: bool = False) -> None:
        self.cut, self.left = cut, 2

    def complete(self, request: ChatRequest) -> ChatReply:
        self.left -= 1
        if self.left < 0:
            raise BudgetError("budget of 1 USD")
        return ChatReply("It is red.", "m", 1, 1, finish_reason="length" if self.cut else "stop")


def test_only_complete_reference_answers_are_kept(folder: Path, tmp_path: Path) -> None:
    bench = load_bench(folder)
    report = write_reference(bench, Poor(), tmp_path / "a.jsonl")
    assert (report["answers"], report["stopped"], report["unasked"]) == (2, "budget of 1 USD", 3)
    report = write_reference(bench, Poor(cut=True), tmp_path / "a.jsonl")
    assert (report["answers"], report["retried"], report["failed"], report["unasked"]) == (0, 1, 1, 4)


def test_text_only_answer_that_is_missing_is_not_judged_as_empty(folder: Path) -> None:
    client = Poor(cut=True)
    client.left = 99
    with pytest.raises(ChatError, match=r"question 0: no text-only answer, .*: the reply was cut off after 'It is red"):
        text_only_answers(load_bench(folder), client)


def test_no_review_within_the_budget_is_an_error(folder: Path, tmp_path: Path) -> None:
    write_jsonl(folder / "answers_gpt4.jsonl", [{"question_id": k, "text": "Red."} for k in range(5)])
    client = Poor()
    client.left = 0
    with pytest.raises(BudgetError, match=r"r\.jsonl: no review: budget of 1 USD"):
        write_reviews(load_bench(folder), folder / "answers_gpt4.jsonl", client, tmp_path / "r.jsonl")


# ------------------------------------------------------------------------------------------------ the released rules

RULES = {
    "conv": {"role": "Assistant", "prompt": "Judge with boxes."},
    "llava_bench_conv": {"role": "Assistant", "prompt": "Judge without boxes."},
}


class Listening:
    """A judge that keeps what it is asked."""

    concurrency = 1

    def __init__(self) -> None:
        self.calls: list[ChatRequest] = []

    def complete(self, request: ChatRequest) -> ChatReply:
        self.calls.append(request)
        return ChatReply("8 7\nthe first is better", "judge", 1, 1)


@pytest.mark.parametrize("boxes", [False, True])
def test_judge_follows_the_released_rules(boxes: bool, folder: Path) -> None:
    if boxes:
        described = [{"image": f"{k}.png", "captions": ["A car."], "instances": []} for k in range(2)]
        write_jsonl(folder / "context.jsonl", described)
    (folder / "rule.json").write_text(json.dumps(RULES))
    answers = [{"question_id": k, "text": "Red."} for k in range(5)]
    for name in ("answers_gpt4.jsonl", "a.jsonl"):
        write_jsonl(folder / name, answers)
    for rule, end in (
        (folder / "rule.json", f"Judge with{'' if boxes else 'out'} boxes."),
        (None, "explain both scores."),
    ):
        client = Listening()
        write_reviews(load_bench(folder), folder / "a.jsonl", client, folder / "r.jsonl", rule=rule)  # type: ignore[arg-type]
        prompts = [request.messages[1]["content"] for request in client.calls]
        assert len(prompts) == 5
        assert all(prompt.endswith(end) for prompt in prompts)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"conv": RULES["conv"]}, r"rule\.json: no rule 'llava_bench_conv'"),
        ([], "no rule 'llava_bench_conv'"),
        ({"llava_bench_conv": "Judge."}, "with a text in `prompt`"),
        ({"llava_bench_conv": {"role": "Model", "prompt": "Judge."}}, "its role is 'Model'"),
    ],
)
def test_unusable_rules_are_refused(rules: Any, message: str, folder: Path) -> None:
    (folder / "rule.json").write_text(json.dumps(rules))
    with pytest.raises(DataError, match=message):
        read_rules(folder / "rule.json", load_bench(folder))
