"""Control answers of LLaVA-Bench: the scores that a judge gives to answers of known quality.

A candidate's score means something only above the floors (answers that ignore the image) and below the ceiling (the
reference answer itself, scored against itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from companion.evaluation.bench_steps import Bench, answer_of, reference_messages
from companion.evaluation.llava_bench import JUDGE_MAX_TOKENS, JUDGE_MODEL, judge, score_reviews
from companion.teacher.asking import ask_all
from companion.teacher.chat import MAX_TOKENS, BudgetError, ChatError, ChatRequest
from llava_core.runtime import DataError, display_path

if TYPE_CHECKING:
    from companion.teacher.chat import ChatClient

CONSTANT = "The image shows several things."
GUESS = "Yes, there is one red car on the left, because it is a vehicle and vehicles carry people."
REFERENCE = "reference"
WRONG_REASON = "it is made of cheese and cheese sings"


def control_answers(bench: Bench, objects: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the control answers, control -> question id -> text, from the lowest expected score to the highest.

    Args:
        objects: names of the control that lists all of them.

    Raises:
        DataError: a question has no reference answer, or all questions of a kind are about one image.
    """
    reference = {str(row["question_id"]): row["text"] for row in bench.reference or ()}
    keys = [str(row["question_id"]) for row in bench.questions]
    if absent := [key for key in keys if key not in reference]:
        raise DataError(
            f"{display_path(bench.folder)}: question {absent[0]} has no reference answer; complete the file"
        )
    listed = ", ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in objects)
    others = {str(row["question_id"]): reference[_another_image(bench, k)] for k, row in enumerate(bench.questions)}
    reasons = {key: reference[key].partition(" because ") for key in keys}
    return {
        "empty answer": dict.fromkeys(keys, ""),
        "constant sentence": dict.fromkeys(keys, CONSTANT),
        "constant guess": dict.fromkeys(keys, GUESS),
        "list of all objects": dict.fromkeys(keys, f"There is {listed}."),
        "another image's reference": others,
        "reference with a wrong reason": {
            key: f"{claim} because {WRONG_REASON}." if because else reference[key]
            for key, (claim, because, _) in reasons.items()
        },
        REFERENCE: {key: reference[key] for key in keys},
    }


def _another_image(bench: Bench, k: int) -> str:
    """The id of the next question of the same kind that is about another image."""
    row, n = bench.questions[k], len(bench.questions)
    following = (bench.questions[(k + step) % n] for step in range(1, n))
    for other in following:
        if other["category"] == row["category"] and other["image"] != row["image"]:
            return str(other["question_id"])
    raise DataError(
        f"{display_path(bench.folder)}: all questions of kind {row['category']} are about {row['image']}; give a bench "
        "with several images"
    )


def text_only_answers(
    bench: Bench, client: ChatClient, model: str = JUDGE_MODEL, max_tokens: int = MAX_TOKENS
) -> dict[str, str]:
    """Return the client's own answers from the images' descriptions, by question id.

    Raises:
        BudgetError: the budget does not allow all of them.
        ChatError: a question has no whole answer.
    """
    messages = [reference_messages(row["text"], bench.context[row["image"]]) for row in bench.questions]
    requests = [ChatRequest(asked, model, 0.0, max_tokens) for asked in messages]
    asked, tally = ask_all(client, requests, answer_of, "text-only answers")
    if tally["stopped"]:
        raise BudgetError(tally["stopped"])
    answers = {str(row["question_id"]): result for row, result in zip(bench.questions, asked, strict=True)}
    for question, result in answers.items():
        if not result.good:
            raise ChatError(f"question {question}: no text-only answer, so it cannot be judged: {result.reason}")
    return {question: result.value for question, result in answers.items()}


def score_controls(
    bench: Bench,
    client: ChatClient,
    objects: Sequence[str],
    model: str = JUDGE_MODEL,
    max_tokens: int = JUDGE_MAX_TOKENS,
) -> list[dict[str, Any]]:
    """Let a judge score the control answers and the answers that its model gives from the images' descriptions.

    Returns:
        A row per control, the reference last: answers (its name), n, failed, and the relative scores in %: all, conv,
        detail, complex (None where the bench has no such question).

    Raises:
        DataError, ServerError: as `llava_bench.judge` and `control_answers`.
        BudgetError: the budget does not allow all reviews.
    """
    controls = control_answers(bench, objects)
    ceiling, most = controls.pop(REFERENCE), max(max_tokens, MAX_TOKENS)
    controls |= {"text-only model": text_only_answers(bench, client, model, most), REFERENCE: ceiling}
    rows = []
    for name, answers in controls.items():
        files = (bench.questions, bench.context, bench.reference or (), answers)
        reviews, tally = judge(*files, client, model=model, max_tokens=max_tokens)
        if tally["stopped"]:
            raise BudgetError(tally["stopped"])
        result = score_reviews(reviews)
        kinds = {kind: result["categories"].get(kind) for kind in ("conv", "detail", "complex")}
        rows.append({"answers": name, "n": result["n"], "failed": result["failed"], "all": result["all"], **kinds})
    return rows
