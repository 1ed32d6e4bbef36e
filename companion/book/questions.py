"""The page of questions: each question of the benchmarks with its image, answer, reference and verdict.

It is made of the answers that chapters 30 to 32 have stored; `book/assets/questions.js` adds filters in the browser.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from companion.data_tools.scienceqa import load_problems
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.llava_bench import CATEGORY_PREFIX
from companion.figures import html_safe, image_uri
from companion.results import bench_folders
from llava_core.record import RunRecord
from llava_core.runtime import ROOT, DataError, read_json

BENCHES = {"bench-coco": "LLaVA-Bench (COCO)", "bench-wild": "LLaVA-Bench (In-the-Wild)"}
SCIENCE, CAPTIONS = "ScienceQA", "Captions"
SHOWN = 400  # questions per benchmark, so that a page of the paper's data stays small
SIDE = 88  # pixels of a thumbnail
RIGHT, WRONG = 9, 3  # scores from and below which an answer to LLaVA-Bench counts as right and as wrong
INTRODUCTION = f"""# Every question and answer

<p class="lead">What the trained model was asked, what it answered, and how that was scored.</p>

The answers are those of the last run of chapters 30 to 32; of a benchmark with more than {SHOWN} questions the page
shows the first {SHOWN}, otherwise all. LLaVA-Bench has the scores of the answer and of the reference, from 1 to 10: an
answer counts as right from {RIGHT}, as wrong below {WRONG}. The rule scorer gives the last point
of a right answer only to more than two words. ScienceQA is right or wrong, and a caption has its CIDEr.
"""


class Question(NamedTuple):
    """One question as it was asked, and what came of it; `mood` is the verdict's class in companion.css."""

    bench: str
    kind: str
    text: str
    image: Path | None
    answer: str
    reference: str
    verdict: str
    mood: str


def _science(record: RunRecord, stored: dict[str, Any]) -> Iterator[Question]:
    problems = load_problems(record.config.data_path, "test")
    for problem, digit in zip(problems, stored["right"], strict=False):
        choices = "".join(f"\n({chr(65 + k)}) {choice}" for k, choice in enumerate(problem.choices))
        right = digit == "1"
        yield Question(
            SCIENCE,
            problem.subject,
            f"{problem.question}{choices}",
            problem.image,
            stored["answers"].get(problem.id, ""),
            f"({problem.letter}) {problem.choices[problem.answer]}",
            "right" if right else "wrong",
            "agrees" if right else "disagrees",
        )


def _bench(record: RunRecord, stored: dict[str, Any], name: str) -> Iterator[Question]:
    folder, images = bench_folders(record, name)
    bench, reviews = load_bench(folder), {str(row["question_id"]): row for row in stored["reviews"]}
    rows, images = bench.rows(images)
    references = {str(row["question_id"]): row["text"] for row in bench.reference or []}
    for row in rows:
        key = str(row["question_id"])
        if key not in reviews:
            continue
        verdict, mood = "not scored", "not-resolved"
        if pair := reviews[key]["tuple"]:
            verdict = f"{pair[1]:g}, reference {pair[0]:g}"
            mood = "agrees" if pair[1] >= RIGHT else "disagrees" if pair[1] < WRONG else "partly"
        kind = row["category"].removeprefix(CATEGORY_PREFIX)
        answer = stored["answers"].get(key, "")
        reference = references.get(key, "")
        yield Question(BENCHES[name], kind, row["text"], images / row["image"], answer, reference, verdict, mood)


def _captions(saved: dict[str, Any]) -> Iterator[Question]:
    for row in saved["numbers"].get("captions", []):
        verdict, mood = f"CIDEr {row['cider']:.0f}", "shown-only"
        image = ROOT / row["image"]
        yield Question(CAPTIONS, "stage 1", row["request"], image, row["caption"], row["reference"], verdict, mood)


def stored_questions(out: Path) -> dict[str, list[Question]]:
    """Return the questions of each benchmark whose chapter has run; `out` has the chapters' numbers."""
    found: dict[str, list[Question]] = {}
    for chapter, names in {"30_llava_bench": list(BENCHES), "31_science_qa": ["science_qa"]}.items():
        if not (out / f"{chapter}.json").is_file():
            continue
        for run in read_json(out / f"{chapter}.json").get("runs", [])[:1]:
            for name in names:
                path = ROOT / run / f"{name}.json"
                if path.is_file():
                    record, stored = RunRecord(path.parent), read_json(path)
                    rows = _bench(record, stored, name) if name in BENCHES else _science(record, stored)
                    found[BENCHES.get(name, SCIENCE)] = list(rows)
    if (out / "32_captioning.json").is_file() and (captions := list(_captions(read_json(out / "32_captioning.json")))):
        found[CAPTIONS] = captions
    return found


def _text(text: str) -> str:
    """Text as HTML in one line, since an empty line would end the block; without the braces of a page's values."""
    lines = (" ".join(line.split()) for line in html_safe(text).replace("{", "&#123;").splitlines())
    return "<br>".join(filter(None, lines))


def _entry(number: int, question: Question) -> str:
    picture = ""
    if question.image is not None:
        with Image.open(question.image) as image:
            source = image_uri(image, "webp", within=(2 * SIDE, SIDE))
        picture = f'<img alt="Image of question {number}" src="{source}">'
    data = f'data-bench="{question.bench}" data-kind="{_text(question.kind)}" data-verdict="{question.mood}"'
    return (
        f'<article {data}><div class="picture">{picture}</div>'
        f"<div><h3>{number}. {question.bench}, {_text(question.kind)}</h3><p>{_text(question.text)}</p>"
        f"<dl><dt>LLaVA</dt><dd>{_text(question.answer) or '(nothing)'}</dd>"
        f"<dt>reference</dt><dd>{_text(question.reference)}</dd></dl></div>"
        f'<div><span class="verdict {question.mood}">{_text(question.verdict)}</span></div></article>'
    )


def questions_page(out: Path) -> str:
    """Return the page of all questions, or an empty text if no chapter has stored answers."""
    found = stored_questions(out)
    if not found:
        return ""
    lines, number = [INTRODUCTION], 0
    for bench, rows in found.items():
        more = f", the first {SHOWN}" if len(rows) > SHOWN else ""
        lines += [
            f"## {bench}: {len(rows):,} questions{more}",
            "",
            f'<div class="questions mathjax_ignore" data-asked="{len(rows)}">',
        ]
        for question in rows[:SHOWN]:
            number += 1
            try:
                lines.append(_entry(number, question))
            except OSError as error:
                raise DataError(f"the image of question {number}, {question.image}: {error}") from None
        lines += ["</div>", ""]
    return "\n".join(lines)
