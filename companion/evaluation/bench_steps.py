"""LLaVA-Bench in steps, each from files to a file: questions to ask a checkpoint, reference answers, reviews.

Source: paper Section 5.1; llava/eval/{model_vqa,eval_gpt_review_bench}.py@181a2f8. `llava_bench` computes the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.evaluation.llava_bench import CATEGORY_PREFIX, JUDGE_MAX_TOKENS, JUDGE_MODEL, judge
from companion.evaluation.prompts import PROMPTS
from companion.evaluation.reporting import review_report
from companion.teacher.asking import ask_all
from companion.teacher.chat import MAX_TOKENS, BudgetError, ChatReply, ChatRequest, Message
from companion.teacher.parse import answer_text
from companion.teacher.prompts import context_text
from llava_core.runtime import DataError, display_path, read_json, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from companion.teacher.chat import ChatClient

FILES = {  # official names: In-the-Wild and the miniature, then COCO
    "questions": ("questions.jsonl", "qa90_questions.jsonl"),
    "context": ("context.jsonl", "caps_boxes_coco2014_val_80.jsonl"),
    "reference": ("answers_gpt4.jsonl", "qa90_gpt4_answer.jsonl"),
}


@dataclass(frozen=True)
class Bench:
    """A bench's questions, descriptions by image (for a model that cannot see it) and perhaps reference answers."""

    folder: Path
    questions: list[dict[str, Any]]
    context: dict[str, str]
    reference: list[dict[str, Any]] | None
    boxes: bool = False  # whether the descriptions have boxes, as those of LLaVA-Bench (COCO)

    def rows(self, images: Path | None = None) -> tuple[list[dict[str, Any]], Path]:
        """Return the questions with the names of their image files, and the folder of these (default: the bench's)."""
        images = images or self.folder / "images"
        rows = []
        for row in self.questions:
            names = (row["image"], f"COCO_val2014_{row['image']}")  # the bench omits COCO's prefix
            name = next((name for name in names if (images / name).is_file()), None)
            if name is None:
                raise DataError(
                    f"{display_path(images / row['image'])}: no such image (question {row['question_id']}); name the "
                    "folder of the bench's images, COCO val2014 for the questions about COCO"
                )
            rows.append({**row, "image": name})
        return rows, images


def load_bench(folder: str | Path, limit: int | None = None) -> Bench:
    """Read the official files (`FILES`) of LLaVA-Bench (COCO or In-the-Wild) or a bench of the miniature."""
    folder = Path(folder)
    paths = {name: _one_of(folder, name) for name in FILES}
    if paths["questions"] is None or paths["context"] is None:
        names = " and ".join(" or ".join(FILES[name]) for name in ("questions", "context") if paths[name] is None)
        raise DataError(f"{display_path(folder)}: no {names}; give the folder of LLaVA-Bench's official files")
    questions = _rows(paths["questions"], {"image": str, "text": str, "category": str}, unique=True)
    context, described = {}, _rows(paths["context"], {"image": str})
    for number, row in enumerate(described, start=1):
        context[row["image"]] = _description(row, f"{display_path(paths['context'])}, record {number}")
    reference = _rows(paths["reference"], {"text": str}, unique=True) if paths["reference"] else None
    return Bench(folder, questions[:limit], context, reference, boxes=any("instances" in row for row in described))


def _one_of(folder: Path, what: str) -> Path | None:
    paths = [folder / name for name in FILES[what] if (folder / name).is_file()]
    if len(paths) > 1:
        raise DataError(
            f"{display_path(folder)}: {paths[0].name} and {paths[1].name}; put each bench into its own folder"
        )
    return paths[0] if paths else None


def _rows(path: Path, fields: Mapping[str, type], unique: bool = False) -> list[dict[str, Any]]:
    """Read JSONL rows with these fields; `unique`: each has another question_id."""
    rows, seen = read_jsonl(path), set()
    for number, row in enumerate(rows, start=1):
        where = f"{display_path(path)}, record {number}"
        wrong = [n for n, kind in fields.items() if not isinstance(row, dict) or not isinstance(row.get(n), kind)]
        if wrong or (unique and not isinstance(row.get("question_id"), int | str)):
            raise DataError(f"{where}: needs {', '.join([*fields, *(['question_id'] if unique else [])])}")
        if unique and str(row["question_id"]) in seen:
            raise DataError(f"{where}: question {row['question_id']} has two rows; remove one")
        seen.add(str(row.get("question_id")))
    if not rows:
        raise DataError(f"{display_path(path)}: is empty; copy it again")
    return rows


def _description(row: Mapping[str, Any], where: str) -> str:
    """The text that replaces the image: one long caption (In-the-Wild), or captions and boxes (COCO)."""
    if isinstance(row.get("caption"), str):
        return str(row["caption"])
    try:
        if not isinstance(row["captions"], list):
            raise TypeError
        return context_text(row["captions"], [(i["category"], i["bbox"]) for i in row["instances"]])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise DataError(f"{where}: needs `caption`, or `captions` and `instances` with category and bbox") from None


def write_reference(
    bench: Bench, client: ChatClient, out: str | Path, model: str = JUDGE_MODEL, max_tokens: int = MAX_TOKENS
) -> dict[str, Any]:
    """Answer a bench with a text-only model that reads the images' descriptions, as the paper's GPT-4 did.

    Returns:
        answers, file (rows of question_id, text, category and the source), and the tally of `teacher.asking.ask_all`.
    """
    requests = []
    for row in bench.questions:
        if row["image"] not in bench.context:
            raise DataError(
                f"{display_path(bench.folder)}: question {row['question_id']}: no context for {row['image']}"
            )
        messages = reference_messages(row["text"], bench.context[row["image"]])
        requests.append(ChatRequest(messages, model, 0.0, max_tokens))
    asked, tally = ask_all(client, requests, answer_of, "reference")
    rows = [
        {"question_id": row["question_id"], "text": result.text, "category": row["category"], **result.source()}
        for row, result in zip(bench.questions, asked, strict=True)
        if result.good
    ]
    return {"answers": len(rows), **tally, "file": display_path(write_jsonl(out, rows))}


def answer_of(reply: ChatReply) -> str:
    """The answer in a reply, or a `ReplyError`."""
    return answer_text(reply.text, reply.finish_reason)


def reference_messages(question: str, context: str) -> list[Message]:
    """Return the chat messages that ask for a reference answer."""
    user = f"[Context]\n{context}\n\n[Question]\n{question}\n\n[Answer]"
    return [{"role": "system", "content": PROMPTS["reference_system"]}, {"role": "user", "content": user}]


def read_rules(path: str | Path, bench: Bench) -> dict[str, str]:
    """Read the judge's rule for each category of a bench's questions from the released rule.json.

    Descriptions with boxes take the rule `conv`, those of captions alone `llava_bench_conv`, and so on.

    Raises:
        DataError: another format, or no rule for a category.
    """
    content: Any = read_json(path)
    rules: dict[str, str] = {}
    for category in dict.fromkeys(row["category"] for row in bench.questions):
        name = category.removeprefix(CATEGORY_PREFIX)
        name = name if bench.boxes else f"{CATEGORY_PREFIX}{name}"
        given = content.get(name) if isinstance(content, dict) else None
        rule = given if isinstance(given, dict) else {}
        text, role = rule.get("prompt"), rule.get("role", "Assistant")
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{display_path(path)}: no rule '{name}' with a text in `prompt`; give LLaVA's "
                "llava/eval/table/rule.json"
            )
        if role != "Assistant":
            raise DataError(f"{display_path(path)}, rule '{name}': its role is {str(role)[:40]!r}, not 'Assistant'")
        rules[category] = text
    return rules


def write_reviews(
    bench: Bench,
    answers: str | Path,
    client: ChatClient,
    out: str | Path,
    reference: str | Path | None = None,
    model: str = JUDGE_MODEL,
    swap: bool = False,
    max_tokens: int = JUDGE_MAX_TOKENS,
    rule: str | Path | None = None,
) -> dict[str, Any]:
    """Review the answers of a file against reference answers, by default the bench's; `swap`: in both orders.

    `rule`: a file of the judge's rules by category (`read_rules`), instead of this project's.

    A repeat, as in the paper, needs another `out` and another cassette: a cassette answers the same request with the
    same review.

    Returns:
        `review_report` of the reviews, the tally of `teacher.asking.ask_all` without its `failed`, file.

    Raises:
        DataError: as `llava_bench.judge`.
        BudgetError: the budget allows no review.
    """
    given = _rows(Path(reference), {"text": str}, unique=True) if reference else bench.reference
    if given is None:
        raise DataError(f"{display_path(bench.folder)}: no reference answers; fix: llava evaluate bench reference")
    candidate = _rows(Path(answers), {"text": str}, unique=True)
    chosen: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "swap": swap}
    chosen["rules"] = read_rules(rule, bench) if rule else None
    reviews, tally = judge(bench.questions, bench.context, given, candidate, client, **chosen)
    if not reviews:
        raise BudgetError(f"{display_path(out)}: no review: {tally['stopped']}")
    file = display_path(write_jsonl(out, reviews))
    return {**review_report(reviews), **{k: v for k, v in tally.items() if k != "failed"}, "file": file}
