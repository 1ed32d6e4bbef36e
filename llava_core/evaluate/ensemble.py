"""LLaVA together with a text-only GPT-4 on ScienceQA: complement, judge, and the bound that no rule can pass.

Source: paper Section 5.2, Table 7; llava/eval/eval_science_qa_gpt4{,_requery}.py@8959d5c.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llava_core.evaluate.science_qa import DEFAULT_ERA, Answer, Failure, as_questions, parse_answer, tally


def complement(llava: Answer, gpt4: Answer) -> Answer:
    """Return GPT-4's answer, and LLaVA's where GPT-4 gave none.

    The released code fell back on LLaVA for unparsed text only and drew a letter beyond the choices at random; here
    either failure falls back.
    """
    return llava if isinstance(gpt4, Failure) else gpt4


def judged(llava: Answer, gpt4: Answer, requery: Answer) -> Answer:
    """Return GPT-4's second answer where the two differ, and LLaVA's where they agree or the second is no choice."""
    return llava if llava == gpt4 or isinstance(requery, Failure) else requery


def evaluate(
    problems: Mapping[str, Any] | Iterable[Any],
    llava: Mapping[str, str],
    gpt4: Mapping[str, str],
    requery: Mapping[str, str] | None = None,
    *,
    era: str = DEFAULT_ERA,
) -> dict[str, dict[str, Any]]:
    """Score both systems, their ensembles and the upper bound (either is right) on the same questions.

    Args:
        problems: as in `science_qa.score`.
        llava: question id -> LLaVA's output.
        gpt4: question id -> GPT-4's output; a missing one counts as unparsed, here and below.
        requery: question id -> GPT-4's output after it saw both; without it there is no `judge`.
        era: see `science_qa.parse_answer`.

    Returns:
        `science_qa.tally`'s dict for llava, gpt4, complement, upper_bound and, with `requery`, judge.
    """
    rows: dict[str, dict[str, Answer]] = {"llava": {}, "gpt4": {}, "complement": {}, "upper_bound": {}}
    questions = as_questions(problems)
    for q in questions:
        ours, theirs = (parse_answer(texts.get(q.id, ""), q.n_choices, era) for texts in (llava, gpt4))
        rows["llava"][q.id], rows["gpt4"][q.id] = ours, theirs
        rows["complement"][q.id] = complement(ours, theirs)
        rows["upper_bound"][q.id] = theirs if theirs == q.answer else ours
        if requery is not None:
            second = parse_answer(requery.get(q.id, ""), q.n_choices, era)
            rows.setdefault("judge", {})[q.id] = judged(ours, theirs, second)
    return {name: tally(questions, answers) for name, answers in rows.items()}
