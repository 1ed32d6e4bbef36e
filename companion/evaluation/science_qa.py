"""ScienceQA accuracy. A strict rule extracts the choice from each answer; answers without a choice are counted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from companion.data_tools.scienceqa import SUBJECTS, SUBSETS
from companion.evaluation.predictions import Predictions, check_settings, differences, read_predictions
from companion.evaluation.reporting import LUCK, accuracy_rules, format_rules
from companion.evaluation.statistics import mcnemar, p_text, paired_bootstrap, proportion
from llava_core.runtime import DataError, display_path, read_json

PAPER_ACCURACY = 90.92  # Source: paper Table 7, LLaVA, average; 3856 of 4241

FORMS = {  # of answers by extraction rule: this project's strict one, those of three released scorers
    "ours": "`The answer is B.`, `B` and `B. text`",
    "v0": "`The answer is B.`",
    "1.0": "`The answer is B.`",
    "1.5": "`B`, `B. text` and `The answer is B.`",
}
ERAS = tuple(FORMS)
DEFAULT_ERA = "ours"

# The last dot is a wildcard in the released code too: "The answer is B" at the end of a text does not match, and from
# "The answer is Belgium" it extracts B. The rule "ours" does not.
_RELEASED_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_SENTENCE = re.compile(r"The answer is ([A-Z])(?!\w).")
_RELEASED_OPENING = re.compile(r"([A-E])(?:\Z|\. )")
_OPENING = re.compile(r"\s*([A-E])(?:(?P<answer>\s*\Z|\. )|\.?\s*\n)")
# Other forms that name a choice; they are reported, and not scored.
_OTHER_FORMS = re.compile(
    r"\b(?i:answer|option|choice)\W+(?:is\W+)?\(?([A-E])\b|\(([A-E])\)|^\W*([A-E])\b\W*$|^\W*([A-E])[.):]\s",
    re.MULTILINE,
)
SURPRISING = 3.0  # standard deviations from the expected number of lucky draws


class Failure(Enum):
    """Why no choice can be extracted; not an integer, so it cannot index the choices."""

    UNPARSED = "unparsed"
    INVALID = "invalid"


UNPARSED, INVALID = Failure.UNPARSED, Failure.INVALID
Answer = int | Failure


@dataclass(frozen=True, slots=True)
class Question:
    """A question as scoring needs it; `answer` is the index of the right choice."""

    id: str
    n_choices: int
    answer: int
    has_text: bool
    has_image: bool
    subject: str | None = None
    grade: int | None = None

    @property
    def subsets(self) -> list[str]:
        """The columns of the paper's Table 7 that the question belongs to; IMG and TXT do not exclude each other."""
        names = [name for name, present in (("TXT", self.has_text), ("IMG", self.has_image)) if present] or ["NO"]
        if self.subject is not None:
            names.append(self.subject)
        if self.grade is not None:
            names.append("G1-6" if self.grade <= 6 else "G7-12")
        return names


def answer_letter(text: str, era: str = DEFAULT_ERA) -> str | None:
    """Return the capital letter that an answer names, or None for none or several.

    Source: llava/eval/eval_science_qa.py, 8959d5c ("v0", "1.0") and from ce1aa08 on ("1.5").
    """
    if era not in ERAS:
        raise ValueError(f"unknown era {era!r}; known: {', '.join(ERAS)}")
    if era != "ours":
        opening = _RELEASED_OPENING.match(text) if era == "1.5" else None
        sentences = _RELEASED_SENTENCE.findall(text)
        return opening[1] if opening else sentences[0] if len(sentences) == 1 else None
    opening, sentences = _OPENING.match(text), _SENTENCE.findall(text)
    if len(sentences) > 1 or (opening and sentences and sentences != [opening[1]]):
        return None
    if sentences:
        return str(sentences[0])
    return opening[1] if opening and opening["answer"] is not None else None


def parse_answer(text: str, n_choices: int, era: str = DEFAULT_ERA) -> Answer:
    """Return the index of the named choice, UNPARSED (not in a form that the rule reads) or INVALID (no such choice).

    Eras "v0" and "1.0" need exactly one sentence `The answer is X.`; "1.5" first takes a text that is `X` or begins
    with `X. `; "ours" accepts the same forms unless they name different letters.
    """
    letter = answer_letter(text, era)
    if letter is None:
        return UNPARSED
    index = ord(letter) - ord("A")
    return index if index < n_choices else INVALID


def read_questions(path: str | Path, split: str = "test") -> list[Question]:
    """Read a split of ScienceQA's `problems.json` (problems without a split count as it), or LLaVA-1.5's CQM-A file."""
    content = read_json(path)
    if not content:
        raise DataError(f"{display_path(path)}: empty; give problems.json or llava_test_CQM-A.json")
    if isinstance(content, list):
        return [_from_conversation(record, f"{display_path(path)}, record {i}") for i, record in enumerate(content)]
    if not isinstance(content, dict):
        raise DataError(
            f"{display_path(path)}: neither a dict of problems nor a list of conversations; give a ScienceQA "
            "question file"
        )
    wanted = {key: p for key, p in content.items() if not isinstance(p, dict) or p.get("split", split) == split}
    if not wanted:
        splits = sorted({str(p.get("split")) for p in content.values()})
        raise DataError(f"{display_path(path)}: no problem of split {split!r}; the file has {', '.join(splits)}")
    return as_questions(wanted, display_path(path))


def as_questions(problems: Mapping[str, Any] | Iterable[Any], where: str = "problems") -> list[Question]:
    """Return questions from a `problems.json` mapping or from objects with the same fields and an `id`."""
    if isinstance(problems, Mapping):
        return [_from_problem(str(key), problem, where) for key, problem in problems.items()]
    return [p if isinstance(p, Question) else _from_problem(str(_field(p, "id")), p, where) for p in problems]


def _field(problem: Any, name: str) -> Any:
    return problem.get(name) if isinstance(problem, Mapping) else getattr(problem, name, None)


def _from_problem(identifier: str, problem: Any, where: str) -> Question:
    choices, answer = _field(problem, "choices"), _field(problem, "answer")
    if not isinstance(choices, list | tuple) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"{where}, problem {identifier}: needs a list `choices` and the index `answer` of one of them")
    subject, grade = _field(problem, "subject"), re.search(r"\d+", str(_field(problem, "grade") or ""))
    if subject is not None and str(subject) not in SUBJECTS:
        raise DataError(f"{where}, problem {identifier}: subject {subject!r} is none of {', '.join(SUBJECTS)}")
    return Question(
        id=identifier,
        n_choices=len(choices),
        answer=answer,
        has_text=bool(_field(problem, "hint")),
        has_image=bool(_field(problem, "image")),
        subject=SUBJECTS[subject] if subject is not None else None,
        grade=int(grade[0]) if grade else None,
    )


def _from_conversation(record: Any, where: str) -> Question:
    try:
        identifier = str(record["id"])
        human, letter = (str(record["conversations"][i]["value"]) for i in (0, 1))
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{where}: needs `id` and two `conversations`, as llava_test_CQM-A.json has them") from error
    n_choices = 0
    for line in human.split("\n"):  # a choice may run over several lines, so every lettered line in order counts one
        if line.startswith("A. "):
            n_choices = 1
        elif n_choices and line.startswith(f"{chr(ord('A') + n_choices)}. "):
            n_choices += 1
    answer = ord(letter) - ord("A") if re.fullmatch("[A-Z]", letter) else -1
    if not 0 <= answer < n_choices:
        raise DataError(
            f"{where} (question {identifier}): the right answer {letter[:20]!r} is none of its {n_choices} lettered "
            "lines `A. ...`; give the CQM-A format or problems.json"
        )
    has_text = human.removeprefix("<image>\n").startswith("Context:")
    return Question(identifier, n_choices, answer, has_text, has_image="image" in record)


def tally(questions: Iterable[Question], answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Score extracted choices, over all questions and over the columns of Table 7.

    Returns:
        n (all questions), correct, accuracy, interval; unparsed, invalid and missing, each with its `_ids`;
        reporting (`reporting.accuracy_rules`: failed answers as wrong, excluded, at expected luck, where unparsed and
        invalid answers are drawn uniformly and missing ones are wrong); subsets (name -> n, correct, accuracy,
        interval).
    """
    questions = list(questions)
    failures: dict[Failure | None, list[str]] = {UNPARSED: [], INVALID: [], None: []}
    right: dict[str, bool] = {}
    luck: list[float] = []  # of each failed answer
    for question in questions:
        answer = answers.get(question.id)
        right[question.id] = answer == question.answer
        if answer is None or isinstance(answer, Failure):
            failures[answer].append(question.id)
            luck.append(1 / question.n_choices if answer else 0.0)
    if len(right) != len(questions):
        raise DataError("two questions have the same id; each id may occur once")
    subsets = {}
    for name in SUBSETS:
        if rows := [right[q.id] for q in questions if name in q.subsets]:
            subsets[name] = proportion(sum(rows), len(rows))
    total = proportion(sum(right.values()), len(questions))
    counts = {"unparsed": failures[UNPARSED], "invalid": failures[INVALID], "missing": failures[None]}
    return {
        **total,
        **{name: len(ids) for name, ids in counts.items()},
        **{f"{name}_ids": ids for name, ids in counts.items()},
        "reporting": accuracy_rules(total["correct"], total["n"], luck),
        "subsets": subsets,
    }


def right_answers(problems: Mapping[str, Any] | Iterable[Any], answers: Mapping[str, str]) -> list[bool]:
    """Return for each problem, in order, whether its answer names the right choice."""
    return [parse_answer(answers[q.id], q.n_choices) == q.answer for q in as_questions(problems)]


def score(
    problems: Mapping[str, Any] | Iterable[Any], answers: Mapping[Any, str], *, era: str = DEFAULT_ERA
) -> dict[str, Any]:
    """Score answers (question id -> complete output) to the problems of `as_questions`.

    Returns:
        `tally`'s dict with `era` and `notes`, sentences on the answers that do not count.

    Raises:
        DataError: an answer belongs to no question.
    """
    questions = {q.id: q for q in as_questions(problems)}
    texts = {str(key): text for key, text in answers.items()}
    unknown = [key for key in texts if key not in questions]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(texts)} predictions belong to no question (first: {unknown[0]!r}); "
            "give the questions that were asked, or score a part on purpose (subset=True, --subset)"
        )
    result = tally(questions.values(), {k: parse_answer(t, questions[k].n_choices, era) for k, t in texts.items()})
    return result | {"era": era, "notes": _notes(result, questions, texts, era)}


def _notes(
    result: Mapping[str, Any], questions: Mapping[str, Question], texts: Mapping[str, str], era: str
) -> list[str]:
    notes = []
    if result["invalid"]:
        named = [
            f"question {key} names option {answer_letter(texts[key], era)} of {questions[key].n_choices} choices"
            for key in result["invalid_ids"]
        ]
        notes.append(f"{result['invalid']} invalid, counted as wrong: {_some(named)}.")
    if result["unparsed"]:
        notes.append(_unparsed_note([questions[key] for key in result["unparsed_ids"]], texts, era))
    if result["missing"]:
        notes.append(f"{result['missing']} missing (no prediction), counted as wrong: {_some(result['missing_ids'])}.")
    if result["missing"] and texts:
        share = 100 * result["correct"] / (result["n"] - result["missing"])
        notes.append(f"The code released until September 2023 left missing ones out of the count: {share:.2f} %.")
    drawn = next(row["accuracy"] for row in result["reporting"] if row["rule"] == LUCK)
    if drawn != result["accuracy"]:
        notes.append(
            "The code released from April to September 2023 drew a random choice for an unparsed or invalid answer: on "
            f"average {drawn:.2f} %."
        )
    return notes


def _unparsed_note(failed: Sequence[Question], texts: Mapping[str, str], era: str) -> str:
    note = (
        f"{len(failed)} unparsed (not in a known form: the rule '{era}' reads {FORMS[era]}), counted as wrong: "
        f"{_some([q.id for q in failed])}; e.g. question {failed[0].id}: {_excerpt(texts[failed[0].id])}."
    )
    reads = {e: sum(isinstance(parse_answer(texts[q.id], q.n_choices, e), int) for q in failed) for e in ERAS}
    best = max(reads, key=lambda e: reads[e])
    if reads[best]:
        return f"{note} The rule '{best}' (--era {best}) reads a choice in {reads[best]} of them."
    named = sum(_loose_choice(texts[q.id]) is not None for q in failed)
    return f"{note} {named} of them name one letter in another form." if named else note


def _loose_choice(text: str) -> int | None:
    """The choice that a text names in any usual form; None for none or several."""
    letters = {letter for found in _OTHER_FORMS.findall(text) for letter in found if letter}
    return ord(letters.pop()) - ord("A") if len(letters) == 1 else None


def _excerpt(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")


def _some(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def evaluate_files(
    predictions: str | Path,
    questions: str | Path,
    *,
    era: str = DEFAULT_ERA,
    split: str = "test",
    subset: bool = False,
    prompt_format: str | None = None,
    checkpoint: str | Path | None = None,
    released: bool = False,
) -> dict[str, Any]:
    """Score a file of answers (`read_predictions`) against a file of questions (`read_questions`).

    Args:
        subset: score only the questions of the file, although there are predictions for others.
        prompt_format: refuse answers with another prompt format, or that do not name theirs.
        checkpoint: refuse answers of another model.
        released: score the choices that a released result file stores, random draws included, not its texts.

    Returns:
        `score`'s dict; `made_with`, the settings of the answers or None; `header`, acc, correct and count of a released
        file, and `map`, its stored choices compared with its texts, question by question (see `_compare_with_map`).

    Raises:
        DataError: a file cannot be read, the two do not belong together, or the settings are refused.
    """
    asked = read_questions(questions, split)
    file = read_predictions(predictions)
    check_settings(predictions, file, prompt_format, checkpoint)
    known = {q.id for q in asked}
    if not known & file.answers.keys():
        raise DataError(
            f"{display_path(predictions)}: none of its {len(file.answers)} question ids is in "
            f"{display_path(questions)}; give the questions that were asked"
        )
    answers = {key: text for key, text in file.answers.items() if key in known or not subset}
    try:
        result = score(asked, answers, era=era)
    except DataError as error:
        raise DataError(f"{display_path(predictions)} against {display_path(questions)}: {error}") from error
    result |= {"made_with": file.settings, "header": {k: v for k, v in file.released.items() if k != "results"}}
    stored = file.released.get("results")
    if released:
        stored = _result_map(predictions, file)
        result |= tally(asked, _choices(asked, answers, era, stored))
        result["notes"] = [
            "The choices are those that the file stores, its random draws included, not its texts; its header says "
            f"{result['header'].get('correct')} of {result['header'].get('count')}."
        ]
    if isinstance(stored, dict):
        result["map"], notes = _compare_with_map([q for q in asked if q.id in answers], answers, stored, era)
        result["notes"] += notes
    if file.settings is None:
        result["notes"].append(
            "The file does not name the prompt format, template and checkpoint of its answers (a foreign format); they "
            "are scored without this check."
        )
    elif file.settings.get("n", 0) > len(file.answers):
        n = file.settings["n"]
        result["notes"].append(
            f"The file holds {len(file.answers)} of {n} answers: the run that writes it has not finished."
        )
    return result


def _stored(question: Question, stored: Mapping[str, Any], text: Answer) -> Answer:
    """The choice that a result file stores; it stores -1 for both kinds of failure, so the text decides which."""
    value = stored.get(question.id)
    if isinstance(value, int) and 0 <= value < question.n_choices:
        return value
    return text if isinstance(text, Failure) else UNPARSED


def _result_map(path: str | Path, file: Predictions) -> dict[str, Any]:
    """The choices that a released result file stores (`results`: question id -> index, -1 for a failure)."""
    stored = file.released.get("results")
    if not isinstance(stored, dict):
        raise DataError(f"{display_path(path)}: stores no choices (`results`), only texts; leave --released away")
    for key, value in stored.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < -1:
            raise DataError(
                f"{display_path(path)}, results, question {key}: {str(value)[:40]!r} is neither a choice's index "
                "nor -1; leave --released away"
            )
    return stored


def _compare_with_map(
    questions: Sequence[Question], answers: Mapping[str, str], stored: Mapping[str, Any], era: str
) -> tuple[dict[str, Any], list[str]]:
    """Compare the choices that a released file stores with those in its texts, question by question.

    Returns:
        right (stored choices), differ_ids (another choice than the text's), drawn_ids (a choice where the text gives
        none), drawn_right, with expected_right and deviation of uniform draws; and notes on what differs.
    """
    texts = _choices(questions, answers, era)
    differ = [q for q in questions if not isinstance(texts[q.id], Failure) and stored.get(q.id) != texts[q.id]]
    drawn = [q for q in questions if isinstance(texts[q.id], Failure) and stored.get(q.id) in range(q.n_choices)]
    right, lucky = ([q.id for q in part if stored.get(q.id) == q.answer] for part in (questions, drawn))
    expected = math.fsum(1 / q.n_choices for q in drawn)
    deviation = math.sqrt(math.fsum((1 - 1 / q.n_choices) / q.n_choices for q in drawn))
    result: dict[str, Any] = {
        "right": len(right),
        "differ_ids": [q.id for q in differ],
        "drawn_ids": [q.id for q in drawn],
        "drawn_right": len(lucky),
        "expected_right": expected,
        "deviation": deviation,
    }
    if not differ and not drawn:
        return result, []
    accuracy = 100 * len(right) / len(questions)
    own = sum(texts[q.id] == q.answer for q in questions)
    notes = [f"The file's own result map has {len(right)} right ({accuracy:.2f} %), its texts {own}."]
    if differ:
        notes.append(
            f"The map holds another choice than the text, or none, in {len(differ)} questions: "
            f"{_some([q.id for q in differ])}."
        )
    unlike = [*differ, *drawn]
    reads = {e: sum(parse_answer(answers[q.id], q.n_choices, e) == stored.get(q.id) for q in unlike) for e in ERAS}
    best = max(reads, key=lambda e: reads[e])
    named = sum(_loose_choice(answers[q.id]) == stored[q.id] for q in drawn)
    chance = f"random draws would get {expected:.1f} right, give or take {deviation:.1f}"
    if 2 * reads[best] > len(unlike):
        notes.append(
            f"The rule '{best}' reads the map's choice in {reads[best]} of these {len(unlike)} texts: the map was "
            f"written with another rule than '{era}'; score the file with --era {best}."
        )
    elif drawn and (2 * named > len(drawn) or abs(len(lucky) - expected) > SURPRISING * deviation):
        notes.append(
            f"The map holds a choice in {len(drawn)} questions whose texts the rule '{era}' cannot read, "
            f"{len(lucky)} of them right; {chance}: the map was written with another rule, and none of "
            f"{', '.join(ERAS)} is it; such a text is {_excerpt(answers[drawn[0].id])}. Write the answers as "
            "`The answer is B.` to score them."
        )
    elif drawn:
        which = f" (question {_some(lucky)})" if lucky else ""
        notes.append(
            f"Where the text gives no choice ({len(drawn)}), the map holds a random draw: {len(lucky)} by luck right"
            f"{which}; {chance}."
        )
        if (round(accuracy, 2), len(questions), [q.id for q in unlike]) == (PAPER_ACCURACY, 4241, ["3247"]):
            notes.append(f"The paper's {PAPER_ACCURACY} % is this same file with that draw counted as an answer.")
    return result, notes


def _choices(
    questions: Iterable[Question], answers: Mapping[str, str], era: str, stored: Mapping[str, Any] | None = None
) -> dict[str, Answer]:
    """Question id -> choice of its text, or the one that a result file stores."""
    texts = {q.id: (q, parse_answer(answers[q.id], q.n_choices, era)) for q in questions if q.id in answers}
    return {key: text if stored is None else _stored(q, stored, text) for key, (q, text) in texts.items()}


def compare_files(
    first: str | Path,
    second: str | Path,
    questions: str | Path,
    *,
    era: str = DEFAULT_ERA,
    split: str = "test",
    subset: bool = False,
    released: bool = False,
) -> dict[str, Any]:
    """Compare two files of answers to the same questions; arguments as for `evaluate_files`.

    Returns:
        n; first and second (`proportion`s with unparsed and invalid); difference (second minus first, in points) and
        its interval (paired bootstrap over the questions); only_first, only_second and p (McNemar's exact test); notes.

    Raises:
        DataError: the two answer different questions, or as in `evaluate_files`.
    """
    paths, files = (first, second), [read_predictions(path) for path in (first, second)]
    asked = {q.id: q for q in read_questions(questions, split)}
    if subset:
        files = [replace(f, answers={k: text for k, text in f.answers.items() if k in asked}) for f in files]
    for one, other in ((0, 1), (1, 0)):
        unmatched = [key for key in files[one].answers if key not in files[other].answers]
        if unmatched:
            raise DataError(
                f"{display_path(paths[one])} answers {len(unmatched)} questions that {display_path(paths[other])} "
                f"does not ({_some(unmatched)}); compare answers to the same questions"
            )
    unknown = [key for key in files[0].answers if key not in asked]
    if unknown:
        raise DataError(
            f"{display_path(first)}: {len(unknown)} questions are not in {display_path(questions)} ({_some(unknown)}); "
            "give the questions that were asked, or compare a part on purpose (subset=True, --subset)"
        )
    answered = [asked[key] for key in sorted(files[0].answers)]
    if len(answered) < 2:
        raise DataError(f"{display_path(first)}: {len(answered)} answers cannot be compared; give two or more")
    maps = [_result_map(path, file) if released else None for path, file in zip(paths, files, strict=True)]
    choices = [_choices(answered, file.answers, era, stored) for file, stored in zip(files, maps, strict=True)]
    right = [[own[q.id] == q.answer for q in answered] for own in choices]
    change, test = paired_bootstrap(*right), mcnemar(*right)
    notes = [] if len(asked) == len(answered) else [f"{len(answered)} of {len(asked)} questions are answered."]
    failed = [[q for q in answered if own[q.id] is UNPARSED] for own in choices]
    for path, file, unparsed in zip(paths, files, failed, strict=True):
        if unparsed and not released:
            notes.append(f"{display_path(path)}: {_unparsed_note(unparsed, file.answers, era)}")
    invalid = [sum(choice is INVALID for choice in own.values()) for own in choices]
    scores = [
        proportion(sum(own), len(answered)) | {"unparsed": len(unparsed), "invalid": n}
        for own, unparsed, n in zip(right, failed, invalid, strict=True)
    ]
    settings = [file.settings for file in files]
    unnamed = [display_path(path) for path, own in zip(paths, settings, strict=True) if own is None]
    notes += [f"{path} does not name the settings of its answers." for path in unnamed]
    if all(settings):
        notes += [f"Different settings: {line}." for line in differences(settings[0] or {}, settings[1] or {})]
    return {
        "n": len(answered),
        "first": scores[0],
        "second": scores[1],
        "difference": 100 * change["difference"],
        "interval": [100 * end for end in change["interval"]],
        "only_first": test["only_first"],
        "only_second": test["only_second"],
        "p": test["p"],
        "notes": notes,
    }


def format_comparison(result: Mapping[str, Any]) -> str:
    """Return a comparison as text."""
    rows = [
        f"{name:8}{row['accuracy']:8.2f} %   95 % interval {row['interval'][0]:.2f} to {row['interval'][1]:.2f}, "
        f"unparsed {row['unparsed']}, invalid {row['invalid']}"
        for name, row in ((name, result[name]) for name in ("first", "second"))
    ]
    low, high = result["interval"]
    rows.append(f"second minus first: {result['difference']:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")
    discordant = f"right in the first only {result['only_first']}, in the second only {result['only_second']}"
    rows.append(f"of {result['n']} questions {discordant}; McNemar's exact p: {p_text(result['p'])}")
    return "\n".join(rows + [f"- {note}" for note in result["notes"]])


def format_report(result: Mapping[str, Any]) -> str:
    """Return a result as a text table."""
    lines = [f"{'':8}{'right':>7}{'of':>7}{'%':>8}   95 % interval"]
    for name, row in {"all": result, **result["subsets"]}.items():
        low, high = row["interval"]
        lines.append(f"{name:8}{row['correct']:7}{row['n']:7}{row['accuracy']:8.2f}   {low:.2f} to {high:.2f}")
    lines.append(f"unparsed {result['unparsed']}, invalid {result['invalid']}, missing {result['missing']}")
    lines.append(format_rules(result["reporting"]))
    return "\n".join(lines + [f"- {note}" for note in result.get("notes", [])])
