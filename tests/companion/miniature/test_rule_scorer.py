"""The rule scorer: order of answers of known quality, on the whole bench and on answers of other wording."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from companion import miniature
from companion.data_tools.coco import load_annotations
from companion.evaluation.bench_controls import control_answers, score_controls
from companion.evaluation.bench_steps import Bench, load_bench
from companion.evaluation.llava_bench import judge, judge_messages, parse_scores
from companion.miniature import language
from companion.miniature.offline_chat import respond
from companion.miniature.rule_scorer import TERSE, THOROUGH, Criteria
from companion.miniature.world import CATEGORIES, Scene, sample_scene
from companion.teacher.client import OfflineClient
from companion.teacher.prompts import context_text as written
from llava_core.runtime import DataError

SCENES = [sample_scene(k, seed=5, split="ood" if k % 3 == 0 else "train") for k in range(200)]


def captions_of(scene: Scene) -> list[str]:
    return language.captions(scene, random.Random(scene.id))


def boxes_of(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    return [(item.category, item.box) for item in scene.items]


# ------------------------------------------------------------------------------------------------ single answers


def scores(question: str, context: str, first: str, second: str) -> tuple[float, float]:
    review = respond(judge_messages(question, context, first, second))
    assert re.fullmatch(r"\d+(\.5)? \d+(\.5)?\n.+", review)
    result = parse_scores(review)
    swapped = parse_scores(respond(judge_messages(question, context, second, first)))
    assert result is not None
    assert swapped == result[::-1]
    assert all(1 <= score <= 10 for score in result)
    return result


def test_right_answer_scores_above_a_wrong_one() -> None:
    for scene, other in zip(SCENES[:15], SCENES[60:75], strict=True):
        facts, context = language.facts_of_scene(scene), written(captions_of(scene), boxes_of(scene))
        rng = random.Random(scene.id)
        for qa in language.questions(facts, rng):
            others = language.questions(language.facts_of_scene(other), rng) + language.questions(facts, rng)
            wrong = [x.answer for x in others if x.kind == qa.kind and x.answer != qa.answer]
            right = qa.statement
            assert scores(qa.question, context, right, qa.answer)[1] >= 9 <= scores(qa.question, context, right, "")[0]
            if wrong:  # "a red car" for "two red cars" is right in part
                assert scores(qa.question, context, right, wrong[0])[1] <= (8 if qa.kind == "category" else 3)
        true, false = language.describe(facts), language.describe(language.facts_of_scene(other))
        high, low = scores("Describe this image in detail.", context, true, false)
        assert high == 10
        assert low <= 5
        assert 3 < scores("Describe this image in detail.", context, true, captions_of(scene)[0])[1] < 10
        if reason := language.reasoning(facts, rng):
            assert scores(reason.question, context, reason.answer, "The zebra, because it is nice.") >= (9, 1)


def test_wild_bench_is_judged_by_descriptions() -> None:
    facts = language.facts_of_scene(SCENES[0])
    group = facts.groups[0]
    name = group.category if group.count == 1 else language.plural(group.category)
    question = f"What color {'is' if group.count == 1 else 'are'} the {name}?"
    wrong = next(color for color in language.COLORS if color != group.color)
    high, low = scores(question, language.describe(facts), f"It is {group.color}.", f"It is {wrong}.")
    assert high >= 9
    assert low < 3


def test_answer_with_all_colors_is_not_right() -> None:
    context = "A red car on a street.\nA red car."
    every = " or ".join(language.COLORS)
    right, vague = scores("What color is the car?", context, "The car is red.", f"It is {every}.")
    assert right == 10
    assert vague < 4


def test_real_reference_answers_beat_unrelated_ones(reference: Path) -> None:
    folder = reference / "coco"
    images = {a.id: a for a in load_annotations(folder / "caps_boxes_coco2014_val_80.jsonl")}
    rows = [json.loads(line) for line in (folder / "qa90_questions.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["text"] for line in (folder / "qa90_gpt4_answer.jsonl").read_text().splitlines()]
    won = []
    for k, row in enumerate(rows):
        image = images[Path(row["image"]).stem[-12:]]
        high, low = scores(row["text"], written(image.captions, image.boxes), answers[k], answers[(k + 3) % 90])
        won.append(high > low + 1)
    assert sum(won) >= 86
    image = images[Path(rows[0]["image"]).stem[-12:]]
    high, low = scores(rows[0]["text"], written(image.captions, image.boxes), answers[0], "I see nothing")
    assert (high, low) == (10, 1)


def test_criteria_weigh_length_and_completeness() -> None:
    scene = SCENES[0]
    facts = language.facts_of_scene(scene)
    context, full = written(captions_of(scene), boxes_of(scene)), language.describe(facts)
    short = f"There is {language.with_article(facts.groups[0].category)}."
    prompt = judge_messages("Describe this image in detail.", context, full, short)

    def ratio(criteria: Criteria) -> float:
        scores = parse_scores(respond(prompt, criteria))
        assert scores is not None
        return scores[1] / scores[0]

    assert ratio(THOROUGH) < 0.8 < 1 < ratio(TERSE)
    wrong = parse_scores(
        respond(judge_messages("What do you see?", context, full, "A sentence without a fact."), TERSE)
    )
    assert wrong is not None
    assert wrong[1] == 1  # a short wrong answer gets the lowest score


# ------------------------------------------------------------------------------------------------ other wording

CAR = "A red car on the left, two white dogs on the right.\nA red car and two white dogs on a street.\nTwo white dogs."
CARRY = language.AFFORDANCE["vehicle"][0]
FEED = language.AFFORDANCE["animal"][0]
ORDERED = {  # question -> answers from best to worst, "=" where two shall be equal
    CARRY: [
        ("The red car, because it is a vehicle and vehicles carry people.", "The car, since people can ride in it."),
        ("The car.", "It is the car in the picture."),
        (
            "The red car, because it is made of cheese and cheese sings.",
            "The red car, because it is not a vehicle and vehicles carry people.",
            "The red car, because it is an animal and animals need food.",
            "The car, because vehicles cannot carry people.",
        ),
        (
            "The dogs, because they are vehicles and vehicles carry people.",
            "Not the car, because it is a vehicle and vehicles carry people.",
            "",
            "It is a vehicle.",
        ),
    ],
    FEED: [
        ("One of the dogs, because it is an animal and animals need food.", "The white dogs, since dogs get hungry."),
        ("One of the dogs, because it is an animal.", "The dogs."),
        ("One of the black dogs.", "The dogs, because it is a plant and plants grow."),
        ("The car, because it is an animal and animals need food.", "I cannot see an animal."),
    ],
    "What color is the car?": [
        ("It is red.", "The car is red, not blue.", "The car in the picture is not blue but red."),
        ("Red or blue.",),
        ("It is blue.", "The car is not red.", "The car isn't red.", "It is never red.", "The dogs are red."),
    ],
    "How many dogs are there?": [
        ("There are two dogs.", "I count two of them."),
        ("One or two or three.",),
        ("There are three dogs.", "There are not two dogs.", "There are two cars."),
    ],
    "Is there a dog?": [
        ("Yes, there is a dog.", "There are two dogs on the right."),
        ("Yes and no.",),
        ("No, there is no dog.", "I cannot see the image.", "Yes, there is a car."),
    ],
    "Describe this image in detail.": [
        ("A red car and two white dogs on a street. The car is on the left. The dogs are on the right.",),
        ("The image shows a red car and two white dogs on a street.",),
        ("The image shows a red car.", "A street."),
        ("There is not a red car, and there are no two white dogs.", "A blue house on a beach.", ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize("question", ORDERED)
def test_answers_of_other_wording_keep_their_order(question: str) -> None:
    groups = [[scores(question, CAR, text, "")[0] for text in group] for group in ORDERED[question]]
    assert max(groups[0]) >= 9
    assert max(groups[-1]) <= 3
    for better, worse in pairwise(groups):
        assert min(better) > max(worse), groups


def test_reasons_of_another_kind_are_wrong() -> None:
    """The right object with each kind's reason: only its own is above no reason at all."""
    seen = set()
    for scene in SCENES[:60]:
        facts, context = language.facts_of_scene(scene), written(captions_of(scene), boxes_of(scene))
        if (qa := language.reasoning(facts, random.Random(0))) is None:
            continue
        claim, _, own = qa.answer.rstrip(".").partition(" because ")
        unreasoned = scores(qa.question, context, claim.rstrip(",") + ".", "")[0]
        seen.add(own)
        for _, reason in language.AFFORDANCE.values():
            score = scores(qa.question, context, f"{claim} because {reason}.", "")[0]
            assert score == 10 if reason == own else score < unreasoned, (qa.question, reason)
    assert len(seen) == len(language.AFFORDANCE)


# ------------------------------------------------------------------------------------------------ the whole bench


@pytest.fixture(scope="module", params=["bench-coco", "bench-wild"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("mini")
    miniature.write(root, only=[request.param])
    return load_bench(root / request.param)


def test_controls_have_the_expected_order(bench: Bench) -> None:
    table = {row["answers"]: row for row in score_controls(bench, OfflineClient(respond), list(CATEGORIES))}
    for kind in ("all", "conv", "detail", "complex"):
        order = ("empty answer", "constant sentence", "another image's reference", "text-only model", "reference")
        empty, constant, other, own, ceiling = (table[name][kind] for name in order)
        assert empty <= constant < other < own <= ceiling == 100, kind
        assert max(table[name][kind] for name in ("list of all objects", "constant guess")) < 40 < own
        assert other < 30 < 90 < own
    reasons = table["reference with a wrong reason"]
    assert reasons["complex"] < 40
    assert reasons["conv"] == reasons["detail"] == 100  # they have no reason


def test_no_question_prefers_a_control_to_its_reference(bench: Bench) -> None:
    client = OfflineClient(respond)
    for name, answers in control_answers(bench, list(CATEGORIES)).items():
        reviews, _ = judge(bench.questions, bench.context, bench.reference or [], answers, client)
        for row in reviews:
            assert row["tuple"][1] <= row["tuple"][0] == 10, (name, row)
            if row["category"].endswith("complex") and name.endswith("wrong reason"):
                assert row["tuple"][1] < 5, row


def test_controls_need_references_and_images(bench: Bench) -> None:
    with pytest.raises(DataError, match="no reference answer"):
        control_answers(Bench(bench.folder, bench.questions, bench.context, None), ["car"])
    one = [row for row in bench.questions if row["image"] == bench.questions[0]["image"]]
    with pytest.raises(DataError, match="several images"):
        control_answers(Bench(bench.folder, one, bench.context, bench.reference), ["car"])
