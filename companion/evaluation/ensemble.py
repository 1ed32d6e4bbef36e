"""The ScienceQA ensemble of LLaVA and a text-only GPT-4: complement, judge, and the upper bound of choosing one answer.

GPT-4 answers without the image, after two solved examples; where the two differ, it is shown both answers. The paper
published neither prompts nor examples nor the GPT-4 snapshot; this project chose wording and examples.
Source: paper Section 5.2, Tables 7 and 10; llava/eval/eval_science_qa_gpt4.py@8959d5c,
llava/eval/eval_science_qa_gpt4_requery.py@main.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.data_tools.scienceqa import Problem, format_problem
from companion.evaluation.predictions import read_predictions
from companion.evaluation.prompts import PROMPTS
from companion.evaluation.science_qa import Answer, Failure, as_questions, parse_answer, tally
from companion.evaluation.statistics import mcnemar, p_text, paired_bootstrap
from companion.teacher.asking import ask_all
from companion.teacher.chat import PRICES, BudgetError, ChatReply, ChatRequest
from companion.teacher.plan import estimate
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError, display_path

if TYPE_CHECKING:
    from companion.teacher.chat import ChatClient, Message

MODEL, TEMPERATURE, REPLY_TOKENS, SHOTS = "gpt-4-0314", 0.0, 1024, 2
"""The number of examples is the paper's; snapshot, temperature and length are not published."""


def pick_shots(train: Sequence[Problem]) -> list[Problem]:
    """Return `SHOTS` problems without an image, drawn with a fixed seed, as examples."""
    return random.Random(0).sample([problem for problem in train if not problem.image], SHOTS)


def solver_messages(problem: Problem, shots: Sequence[Problem] = ()) -> list[Message]:
    """Return the first query: solved examples, then the problem without its image."""
    messages = [{"role": "system", "content": PROMPTS["solver_system"]}]
    for shot in shots:
        asked, replied = format_problem(shot, "QCM-ALE").turns[0]
        messages += [{"role": "user", "content": _blind(asked)}, {"role": "assistant", "content": replied}]
    return [*messages, {"role": "user", "content": _blind(format_problem(problem, "QCM-ALE").turns[0][0])}]


def requery_messages(problem: Problem, llava: str, gpt4: str) -> list[Message]:
    """Return the second query, with both answers: LLaVA is Assistant 1, the text-only model Assistant 2."""
    asked = _blind(format_problem(problem, "QCM-ALE").turns[0][0])
    text = f"{asked}\n\nAssistant 1:\n{llava}\n\nAssistant 2:\n{gpt4}\n\nWhich choice is right?"
    return [{"role": "system", "content": PROMPTS["requery_system"]}, {"role": "user", "content": text}]


def _blind(question: str) -> str:
    return question.replace(IMAGE_MARKER, "").strip()


def ask(client: ChatClient, requests: Mapping[str, ChatRequest], desc: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Ask each question once; return the replies by question id, without failed requests, and the bill.

    The bill has requests (sent now), replayed (from a cassette), unanswered, tokens (prompt, completion), spend_usd
    (paid now), cost_usd (paid at any time) and models (replies per snapshot).

    Raises:
        ServerError, BudgetError, DataError: the client's; earlier replies are in its cassette.
    """
    asked, tally = ask_all(client, list(requests.values()), lambda reply: reply, desc)
    if tally["stopped"]:
        raise BudgetError(tally["stopped"])
    replies: dict[str, ChatReply] = {k: one.value for k, one in zip(requests, asked, strict=True) if one.good}
    fresh = [reply for reply in replies.values() if not reply.cached]
    bill = {
        "requests": len(fresh),
        "replayed": len(replies) - len(fresh),
        "unanswered": len(requests) - len(replies),
        "tokens": [sum(r.prompt_tokens for r in replies.values()), sum(r.completion_tokens for r in replies.values())],
        "spend_usd": sum(reply.cost_usd for reply in fresh),
        "cost_usd": sum(reply.cost_usd for reply in replies.values()),
        "models": dict(Counter(reply.model for reply in replies.values())),
    }
    return {key: reply.text for key, reply in replies.items()}, bill


def run(
    problems: Sequence[Problem],
    llava: Mapping[str, str],
    client: ChatClient,
    *,
    shots: Sequence[Problem] = (),
    model: str = MODEL,
    max_tokens: int = REPLY_TOKENS,
) -> dict[str, Any]:
    """Query the text-only model, send the second query where it and LLaVA (problem id -> output) differ, and score.

    Returns:
        systems (see `evaluate`), n, asked_again, bills (of `ask`: gpt4 and requery), spend_usd and cost_usd (sums),
        listed (`plan.estimate` of the same requests at the listed price of the model, or None), texts (gpt4 and
        requery, by problem id), shots (their ids).

    Raises:
        DataError: LLaVA has not answered every problem; and as `ask`.
    """
    absent = [p.id for p in problems if p.id not in llava]
    if absent:
        raise DataError(f"LLaVA has not answered {len(absent)} of {len(problems)} problems (first: {absent[0]})")

    def request(messages: list[Message]) -> ChatRequest:
        return ChatRequest(messages, model, TEMPERATURE, max_tokens)

    asked = {p.id: request(solver_messages(p, shots)) for p in problems}
    gpt4, first = ask(client, asked, "GPT-4")
    second_queries = {}
    for p in problems:
        llava_choice, gpt4_choice = (parse_answer(texts.get(p.id, ""), len(p.choices)) for texts in (llava, gpt4))
        if llava_choice != gpt4_choice:
            second_queries[p.id] = request(requery_messages(p, llava[p.id], gpt4.get(p.id, "")))
    requery, second = ask(client, second_queries, "GPT-4, again")
    return {
        "systems": evaluate(problems, llava, gpt4, requery),
        "n": len(problems),
        "asked_again": len(second_queries),
        "bills": {"gpt4": first, "requery": second},
        "spend_usd": first["spend_usd"] + second["spend_usd"],
        "cost_usd": first["cost_usd"] + second["cost_usd"],
        "listed": estimate([*asked.values(), *second_queries.values()]) if model in PRICES else None,
        "texts": {"gpt4": gpt4, "requery": requery},
        "shots": [shot.id for shot in shots],
    }


def answerable(client: ChatClient, problems: Sequence[Problem], shots: Sequence[Problem] = ()) -> tuple[int, int]:
    """Ask at most 200 problems, without image if there are such; return how many replies name a choice, of how many."""
    asked = ([p for p in problems if not p.image] or list(problems))[:200]
    requests = [ChatRequest(solver_messages(p, shots), MODEL, TEMPERATURE, REPLY_TOKENS) for p in asked]
    texts = [client.complete(request).text for request in requests]
    named = [isinstance(parse_answer(t, len(p.choices)), int) for p, t in zip(asked, texts, strict=True)]
    return sum(named), len(asked)


def run_files(
    problems: Sequence[Problem], llava: Mapping[str, str], gpt4: str | Path, requery: str | Path | None = None
) -> dict[str, Any]:
    """Score the ensemble from files of GPT-4's answers and of its answers to the second query; no request is sent.

    The files have a format of `read_predictions`, as the released scripts read them. A problem without a second answer
    keeps LLaVA's.

    Returns:
        systems, n, asked_again (problems with a second answer) and notes on what the files lack.

    Raises:
        DataError: a file has another format or answers none of the problems.
    """
    files = {"llava": dict(llava), "gpt4": read_predictions(gpt4).answers}
    if requery is not None:
        files["requery"] = read_predictions(requery).answers
    known = {p.id: len(p.choices) for p in problems}
    notes = []
    for name, path in (("gpt4", gpt4), ("requery", requery)):
        if path is not None and not known.keys() & files[name].keys():
            raise DataError(f"{display_path(path)}: answers none of the {len(known)} problems; give the same split")
    for name, what in (("llava", "LLaVA"), ("gpt4", "GPT-4")):
        if absent := [key for key in known if key not in files[name]]:
            notes.append(
                f"{what} has no answer to {len(absent)} problems (first: {absent[0]}); they count as unparsed."
            )
    for name, what in (("llava", "LLaVA's"), ("gpt4", "GPT-4's"), ("requery", "GPT-4's second")):
        texts = {key: text for key, text in files.get(name, {}).items() if key in known}
        failed = [k for k, text in texts.items() if isinstance(parse_answer(text, known[k]), Failure)]
        if failed:
            notes.append(f"{len(failed)} of {what} {len(texts)} answers name no choice (first: {failed[0]}).")
    again = known.keys() & files.get("requery", {}).keys()
    return {
        "systems": evaluate(problems, files["llava"], files["gpt4"], files.get("requery")),
        "n": len(problems),
        "asked_again": len(again),
        "notes": notes,
    }


def complement(llava: Answer, gpt4: Answer) -> Answer:
    """Return GPT-4's answer, or LLaVA's where GPT-4 gave no valid choice.

    The released code took LLaVA's only for unparsed text, and drew a choice at random for an invalid letter.
    """
    return llava if isinstance(gpt4, Failure) else gpt4


def judged(llava: Answer, gpt4: Answer, requery: Answer) -> Answer:
    """Return GPT-4's second answer where the two differ, or LLaVA's where they agree or the second is no choice."""
    return llava if llava == gpt4 or isinstance(requery, Failure) else requery


def evaluate(
    problems: Mapping[str, Any] | Iterable[Any],
    llava: Mapping[str, str],
    gpt4: Mapping[str, str],
    requery: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score both systems, their ensembles and the upper bound (either is right) on the same questions.

    The bound holds for rules that choose one of the two answers; a judge that names a third choice may exceed it. The
    outputs are texts by question id; a missing one of GPT-4 counts as unparsed.

    Returns:
        `science_qa.tally`'s dict for llava, gpt4, complement, upper_bound and, with `requery`, judge; all but llava's
        with `against_llava`: difference in points, its interval, and McNemar's p.
    """
    rows: dict[str, dict[str, Answer]] = {"llava": {}, "gpt4": {}, "complement": {}, "upper_bound": {}}
    questions = as_questions(problems)
    for q in questions:
        llava_choice, gpt4_choice = (parse_answer(texts.get(q.id, ""), q.n_choices) for texts in (llava, gpt4))
        rows["llava"][q.id], rows["gpt4"][q.id] = llava_choice, gpt4_choice
        rows["complement"][q.id] = complement(llava_choice, gpt4_choice)
        rows["upper_bound"][q.id] = gpt4_choice if gpt4_choice == q.answer else llava_choice
        if requery is not None:
            second = parse_answer(requery.get(q.id, ""), q.n_choices)
            rows.setdefault("judge", {})[q.id] = judged(llava_choice, gpt4_choice, second)
    scores = {name: tally(questions, answers) for name, answers in rows.items()}
    right = {name: [answers[q.id] == q.answer for q in questions] for name, answers in rows.items()}
    for name in rows.keys() - {"llava"} if len(questions) > 1 else ():
        change = paired_bootstrap(right["llava"], right[name])
        scores[name]["against_llava"] = {
            "difference": 100 * change["difference"],
            "interval": [100 * end for end in change["interval"]],
            "p": mcnemar(right["llava"], right[name])["p"],
        }
    return scores


def format_report(result: Mapping[str, Any]) -> str:
    """Return `run`'s result as a text table."""
    lines = [f"{'':12}{'right':>7}{'of':>7}{'%':>8}{'no answer':>11}   minus LLaVA, 95 % interval, McNemar's p"]
    for name, row in result["systems"].items():
        line = f"{name:12}{row['correct']:7}{row['n']:7}{row['accuracy']:8.2f}{row['unparsed'] + row['invalid']:11}"
        if against := row.get("against_llava"):
            low, high = against["interval"]
            line += f"   {against['difference']:+.2f}, {low:+.2f} to {high:+.2f}, {p_text(against['p'])}"
        lines.append(line)
    if "bills" not in result:
        lines.append(f"{result['asked_again']} of {result['n']} questions have a second answer of GPT-4")
        return "\n".join([*lines, *(f"- {note}" for note in result["notes"])])
    sent = sum(bill["requests"] for bill in result["bills"].values())
    replayed = sum(bill["replayed"] for bill in result["bills"].values())
    unanswered = sum(bill["unanswered"] for bill in result["bills"].values())
    lines.append(f"{result['asked_again']} of {result['n']} questions were asked again, where the two differ")
    lines.append(f"{sent} requests sent, {replayed} replayed, {unanswered} without a reply; ")
    lines[-1] += f"paid now {result['spend_usd']:.2f} USD, all replies together {result['cost_usd']:.2f} USD"
    return "\n".join(lines)
