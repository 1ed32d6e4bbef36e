"""What the overview, the data chapters and the demo draw and write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from companion.book.notebooks import Chapter
from companion.data_tools.coco import AnnotatedImage
from companion.miniature.offline_chat import respond
from companion.plots import chapters_data
from companion.plots.chapters_data import (
    boxed,
    dialogue_html,
    estimate_mix,
    generate_mix,
    mix_jobs,
    opening_words,
    own_folder,
    paper_model,
    shape_text,
    traced_shapes,
)
from companion.teacher.client import BudgetError, ChatReply, ChatRequest, OfflineClient, estimate
from llava_core.data.instruct import load_instruct
from llava_core.runtime import DataError, read_jsonl


def annotated(count: int) -> list[AnnotatedImage]:
    captions = ["A red car on a street.", "A red car on the left."]
    return [AnnotatedImage(f"{k:012d}", f"{k}.jpg", captions, [("car", (0.1, 0.5, 0.4, 0.8))]) for k in range(count)]


def test_the_paper_s_model_has_the_paper_s_shapes() -> None:
    shapes = traced_shapes(paper_model("vicuna-13b"), 6, 2)
    assert shapes["features"] == (256, 1024)
    assert shapes["image_tokens"] == (256, 5120)
    assert shapes["question_tokens"] == (6, 5120)
    assert shapes["projector"] == "5,248,000 parameters"
    assert traced_shapes(paper_model("vicuna-7b"), 1, 1)["projector"] == "4,198,400 parameters"
    assert shape_text(shapes["image"]) == "3 × 224 × 224"


def test_a_mix_asks_each_kind_about_its_share_and_keeps_the_order_of_the_images(tmp_path: Path) -> None:
    images = annotated(10)
    shares = {"conversation": 1.0, "detail": 0.4, "complex": 0.7}
    results = generate_mix(images, shares, OfflineClient(respond), tmp_path / "a")
    assert {kind: r["records"] for kind, r in results.items()} == {"conversation": 10, "detail": 4, "complex": 7}
    samples = load_instruct(tmp_path / "a" / "llava_instruct.json")
    assert [s.id for s in samples] == sorted(s.id for s in samples)
    assert len(read_jsonl(tmp_path / "a" / "provenance.jsonl")) == 21
    described = {s.id for s in samples if s.kind == "detail"}
    assert described < {s.id for s in samples if s.kind == "complex"}  # a smaller share is part of a larger one
    generate_mix(images, shares, OfflineClient(respond), tmp_path / "b")
    name = "llava_instruct.json"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(DataError, match=r"detail.*1\.5"):
        generate_mix(images, {"detail": 1.5}, OfflineClient(respond), tmp_path / "c")


def test_a_budget_that_ends_leaves_a_mix_of_all_kinds(tmp_path: Path) -> None:
    class Poor(OfflineClient):
        def complete(self, request: ChatRequest) -> ChatReply:
            asked.append(request.model)
            if len(asked) > 11:
                raise BudgetError("budget of 5 USD: spent")
            return super().complete(request)

    asked: list[str] = []
    shares = {"conversation": 1.0, "detail": 0.5, "complex": 1.0}
    results = generate_mix(annotated(10), shares, Poor(respond), tmp_path, model="gpt-4o")
    assert set(asked) == {"gpt-4o"}
    assert all(result["records"] >= 1 and result["stopped"] == "budget of 5 USD: spent" for result in results.values())
    assert sum(result["records"] for result in results.values()) == 11
    assert sum(result["unasked"] for result in results.values()) == 14
    assert len(load_instruct(tmp_path / "llava_instruct.json")) == 11


def test_a_mix_is_estimated_for_several_teachers() -> None:
    shares, counts = {"conversation": 1.0, "detail": 0.4}, {"conversation": 58_000, "detail": 23_000}
    images = [replace(image, captions=[f"Car {image.id}."]) for image in annotated(10)]
    rows = estimate_mix(images, shares, ["gpt-4", "gpt-4o"], counts)
    assert [row["teacher"] for row in rows] == ["gpt-4", "gpt-4o"]
    assert [row["requests"] for row in rows] == [14, 14]
    assert rows[0]["USD per million tokens"] == "30 + 60"
    whole = "81,000 records (USD)"
    assert rows[0]["USD"] < rows[0]["USD at most"] < rows[0][whole]
    assert rows[0]["in batches (USD)"] == pytest.approx(rows[0][whole] / 2)
    told = estimate(request for _, _, request in mix_jobs(images, shares, "gpt-4"))
    assert rows[0]["USD"] == pytest.approx(told["usd"], abs=1e-3)
    [one] = estimate_mix(annotated(1), {"conversation": 1.0}, ["gpt-4"], {"conversation": 1000})
    assert one["1,000 records (USD)"] == pytest.approx(1000 * one["USD"])


def test_a_refused_reply_is_kept_beside_the_records(tmp_path: Path) -> None:
    client = OfflineClient(lambda messages: "no format at all")
    results = generate_mix(annotated(3), {"conversation": 1.0}, client, tmp_path)
    assert results["conversation"]["failed"] == 3
    failures = read_jsonl(tmp_path / "failures.jsonl")
    assert [(row["error"], row["attempt"]) for row in failures] == [("MissingLabel", 1), ("MissingLabel", 2)] * 3


def test_data_of_others_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "LLaVA-Instruct"
    assert own_folder(folder, "chat.json", "report.json") == folder
    folder.mkdir()
    (folder / "chat.json").write_text("[]")
    assert own_folder(folder, "chat.json", "report.json") == chapters_data.ROOT / "runs" / "generated" / folder.name
    (folder / "report.json").write_text("{}")
    assert own_folder(folder, "chat.json", "report.json") == folder


def test_openings_are_counted_without_marker_and_signs() -> None:
    counts = opening_words(["<image>\nWhat is this?", "What is, in short, that?\n<image>", "Why?"])
    assert counts == {"what is": 2, "why": 1}


def test_only_direct_needs_get_an_arrow() -> None:
    chapters = {}
    for name, needs in (("10_a", []), ("20_b", ["10_a"]), ("21_c", ["20_b", "10_a"])):
        chapters[name] = Chapter(name, Path(name), {}, needs, [])
    assert chapters_data._direct(chapters, chapters["21_c"]) == ["20_b"]
    axes = chapters_data.chapter_graph(chapters).axes[0]
    assert len(axes.patches) == 3
    assert sum(text.arrow_patch is not None for text in axes.texts if hasattr(text, "arrow_patch")) == 2


def test_boxes_are_drawn_where_they_are_and_dialogues_are_escaped() -> None:
    plain = Image.new("RGB", (40, 40), "black")
    drawn = boxed(plain, [("", (0.5, 0.5, 0.9, 0.9))])
    assert drawn.size == (80, 80)
    assert drawn.getpixel((10, 10)) == (0, 0, 0)
    assert drawn.getpixel((71, 60)) != (0, 0, 0)
    page = dialogue_html(plain, [("1 < 2?", "<b>yes</b>")]).data
    assert "1 &lt; 2?" in page
    assert "<b>yes" not in page
