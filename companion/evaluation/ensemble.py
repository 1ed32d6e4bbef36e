"""LLaVA together with a text-only GPT-4 on ScienceQA: complement, judge, and the bound of picking one of the two.

GPT-4 is asked twice at most: first every problem, after two solved examples and without the image; then, where its
answer and LLaVA's differ, the same problem with both answers. The paper published neither of the two prompts (Table 10
shows the roles, both whole answers, and the last sentence), which examples it gave, nor which of GPT-4's snapshots it
asked: the wording is ours.

Source: paper Section 5.2, Tables 7 and 10; llava/eval/eval_science_qa_gpt4{,_requery}.py@8959d5c.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from companion.data_tools.scienceqa import Problem, format_problem
from companion.evaluation.science_qa import DEFAULT_ERA, Answer, Failure, as_questions, parse_answer, tally
from companion.evaluation.statistics import mcnemar, paired_bootstrap
from companion.teacher.asking import concurrently
from companion.teacher.chat import PRICES, BudgetError, ChatError, ChatReply, ChatRequest, ServerError, estimate
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError, progress

if TYPE_CHECKING:
    from companion.teacher.chat import ChatClient, Message

MODEL, TEMPERATURE, REPLY_TOKENS, SHOTS = "gpt-4-0314", 0.0, 1024, 2
"""The number of examples is the paper's; snapshot, temperature and length are ours."""

SOLVER_SYSTEM = (
    "You solve multiple-choice questions from school. You cannot see images. Begin with one sentence of the form: The "
    "answer is X. Then explain, after the word BECAUSE: why. If the question cannot be answered without its image, say "
    "so and name no letter."
)
JUDGE_SYSTEM = (
    "You solve multiple-choice questions from school. Two assistants have answered one. Weigh both answers and reason "
    "for yourself; neither need be right. End with one sentence of the form: The answer is X."
)


# ------------------------------------------------------------------------------------------------ asking


def pick_shots(train: Sequence[Problem], n: int = SHOTS, seed: int = 0) -> list[Problem]:
    """Return n problems without an image as examples, drawn by seed."""
    return random.Random(seed).sample([problem for problem in train if not problem.image], n)


def solver_messages(problem: Problem, shots: Sequence[Problem] = ()) -> list[Message]:
    """Return what the text-only model is asked about a problem: solved examples, then the problem without its image."""
    messages = [{"role": "system", "content": SOLVER_SYSTEM}]
    for shot in shots:
        asked, replied = format_problem(shot, "QCM-ALE").turns[0]
        messages += [{"role": "user", "content": _blind(asked)}, {"role": "assistant", "content": replied}]
    return [*messages, {"role": "user", "content": _blind(format_problem(problem, "QCM-ALE").turns[0][0])}]


def requery_messages(problem: Problem, llava: str, gpt4: str) -> list[Message]:
    """Return what the text-only model is asked after both have answered: LLaVA is Assistant 1, itself Assistant 2."""
    asked = _blind(format_problem(problem, "QCM-ALE").turns[0][0])
    text = f"{asked}\n\nAssistant 1:\n{llava}\n\nAssistant 2:\n{gpt4}\n\nWhich choice is right?"
    return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": text}]


def _blind(question: str) -> str:
    return question.replace(IMAGE_MARKER, "").strip()


def ask(client: ChatClient, requests: Mapping[str, ChatRequest], desc: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Ask each question once.

    Args:
        client: any chat client of `companion.teacher`; its attribute `concurrency` says how many requests it likes.
        requests: by question id.
        desc: of the progress bar.

    Returns:
        Texts by question id, without those that got no reply; and the bill: requests (sent now), replayed (from a
        cassette), unanswered, tokens (prompt, completion), spend_usd (paid now), cost_usd (whenever it was paid) and
        models (replies by snapshot).

    Raises:
        ServerError, BudgetError, DataError: the client's; what was answered until then is in its cassette.
    """

    def one(request: ChatRequest) -> ChatReply | None:
        try:
            return client.complete(request)
        except (ServerError, BudgetError):
            raise
        except ChatError:
            return None

    work = concurrently(
        one, requests.values(), getattr(client, "concurrency", 1), getattr(client, "stop", lambda: None)
    )
    found = dict(zip(requests, progress(work, desc, total=len(requests), leave=False, delay=1), strict=True))
    replies = {key: reply for key, reply in found.items() if reply is not None}
    fresh = [reply for reply in replies.values() if not reply.cached]
    bill = {
        "requests": len(fresh),
        "replayed": len(replies) - len(fresh),
        "unanswered": len(found) - len(replies),
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
    era: str = DEFAULT_ERA,
) -> dict[str, Any]:
    """Ask the text-only model, ask it again where it and LLaVA differ, and score both rules.

    Args:
        problems: what both answer.
        llava: problem id -> LLaVA's output, for every problem.
        client: any chat client of `companion.teacher`.
        shots: solved examples of the first query.
        model: asked for by this name.
        era: see `science_qa.parse_answer`.

    Returns:
        systems (see `evaluate`), n, asked_again, bills (of `ask`: gpt4 and requery), spend_usd and cost_usd (of both),
        listed (`chat.estimate` of the same requests at the model's listed price; None where none is listed), texts
        (gpt4 and requery, by problem id), shots (their ids).

    Raises:
        DataError: LLaVA has not answered every problem; and as in `ask`.
    """
    absent = [p.id for p in problems if p.id not in llava]
    if absent:
        raise DataError(f"LLaVA has not answered {len(absent)} of {len(problems)} problems (first: {absent[0]})")

    def request(messages: list[Message]) -> ChatRequest:
        return ChatRequest(messages, model, TEMPERATURE, REPLY_TOKENS)

    asked = {p.id: request(solver_messages(p, shots)) for p in problems}
    gpt4, first = ask(client, asked, "GPT-4")
    again = {}
    for p in problems:
        ours, theirs = (parse_answer(texts.get(p.id, ""), len(p.choices), era) for texts in (llava, gpt4))
        if ours != theirs:
            again[p.id] = request(requery_messages(p, llava[p.id], gpt4.get(p.id, "")))
    requery, second = ask(client, again, "GPT-4, again")
    return {
        "systems": evaluate(problems, llava, gpt4, requery, era=era),
        "n": len(problems),
        "asked_again": len(again),
        "bills": {"gpt4": first, "requery": second},
        "spend_usd": first["spend_usd"] + second["spend_usd"],
        "cost_usd": first["cost_usd"] + second["cost_usd"],
        "listed": estimate([*asked.values(), *again.values()]) if model in PRICES else None,
        "texts": {"gpt4": gpt4, "requery": requery},
        "shots": [shot.id for shot in shots],
    }


# ------------------------------------------------------------------------------------------------ rules


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

    The bound is one of rules that pick one of the two answers: a judge that names a third choice may pass it.

    Args:
        problems: as in `science_qa.score`.
        llava: question id -> LLaVA's output.
        gpt4: question id -> GPT-4's output; a missing one counts as unparsed, here and below.
        requery: question id -> GPT-4's output after it saw both; without it there is no `judge`.
        era: see `science_qa.parse_answer`.

    Returns:
        `science_qa.tally`'s dict for llava, gpt4, complement, upper_bound and, with `requery`, judge; all but llava's
        with `against_llava`: difference in points, its interval, and McNemar's p.
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
    """Return `run`'s result as a table for people."""
    lines = [f"{'':12}{'right':>7}{'of':>7}{'%':>8}{'no answer':>11}   minus LLaVA, 95 % interval, McNemar's p"]
    for name, row in result["systems"].items():
        line = f"{name:12}{row['correct']:7}{row['n']:7}{row['accuracy']:8.2f}{row['unparsed'] + row['invalid']:11}"
        if against := row.get("against_llava"):
            low, high = against["interval"]
            line += f"   {against['difference']:+.2f}, {low:+.2f} to {high:+.2f}, {against['p']:.3g}"
        lines.append(line)
    sent = sum(bill["requests"] for bill in result["bills"].values())
    replayed = sum(bill["replayed"] for bill in result["bills"].values())
    unanswered = sum(bill["unanswered"] for bill in result["bills"].values())
    lines.append(f"{result['asked_again']} of {result['n']} questions were asked again, where the two differ")
    lines.append(f"{sent} requests sent, {replayed} replayed, {unanswered} without a reply; ")
    lines[-1] += f"paid now {result['spend_usd']:.2f} USD, all replies together {result['cost_usd']:.2f} USD"
    return "\n".join(lines)
