from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from companion.evaluation.bench_steps import reference_messages
from companion.evaluation.science_qa import Failure, parse_answer
from companion.miniature import language
from companion.miniature.offline_chat import TURNS, respond, with_errors
from companion.miniature.scene_text import read_context, read_scene
from companion.miniature.scienceqa import make_problem
from companion.miniature.world import Scene, sample_scene
from companion.teacher.parse import parse_detail, parse_dialogue, parse_reasoning
from companion.teacher.prompts import build_messages
from companion.teacher.prompts import context_text as written
from llava_core.runtime import DataError

SCENES = [sample_scene(k, seed=5, split="ood" if k % 3 == 0 else "train") for k in range(200)]


def captions_of(scene: Scene) -> list[str]:
    return language.captions(scene, random.Random(scene.id))


def boxes_of(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    return [(item.category, item.box) for item in scene.items]


def ask(kind: str, scene: Scene) -> str:
    return respond(build_messages(kind, written(captions_of(scene), () if kind == "conversation" else boxes_of(scene))))


# ------------------------------------------------------------------------------------------------ reading


def test_captions_and_boxes_are_parsed() -> None:
    scene = SCENES[0]
    context = read_context(written(captions_of(scene), boxes_of(scene)))
    assert context.captions == tuple(captions_of(scene))
    assert context.boxes == tuple((c, tuple(round(x, 3) for x in box)) for c, box in boxes_of(scene))
    assert read_context("A sign: stop.\n\nstop sign: [0.1, 0.2, 0.3, 0.4]").captions == ("A sign: stop.",)


def test_scenes_are_parsed_from_captions_boxes_or_description() -> None:
    for scene in SCENES:
        facts = language.facts_of_scene(scene)
        assert read_scene(captions_of(scene), boxes_of(scene)) == facts
        assert read_scene([language.describe(facts)]) == facts


def test_captions_alone_give_no_wrong_fact() -> None:
    open_positions = 0
    for scene in SCENES:
        read = read_scene(captions_of(scene))
        assert read is not None
        assert read.background == scene.background
        for group in read.groups:
            truth = next(g for g in scene.groups if g.category == group.category)
            assert (group.color, group.count, group.size) == (truth.color, truth.count, truth.size)
            assert group.position in (truth.position, None)
            open_positions += group.position is None
        assert len(read.groups) == len(scene.groups)
    assert open_positions < 100


@pytest.mark.parametrize(
    "captions", [["A red car on a beach.", "A man rides a horse."], ["A red zebra."], [], ["On a beach."]]
)
def test_other_captions_are_treated_as_photographs(captions: list[str]) -> None:
    assert read_scene(captions) is None


# ------------------------------------------------------------------------------------------------ instruction data


def test_conversations_have_the_miniatures_wording_and_answers() -> None:
    kinds: Counter[str] = Counter()
    overviews = 0
    for scene in SCENES[:40]:
        facts = language.facts_of_scene(scene)
        true = {qa.question: qa for seed in range(300) for qa in language.questions(facts, random.Random(seed))}
        turns = parse_dialogue(ask("conversation", scene))
        overview_turns = [k for k, (_, answer) in enumerate(turns) if answer.startswith("The image shows ")]
        for k in overview_turns:  # of what the captions tell, so the order may be another
            assert sorted(re.findall(r"\w+", turns[k][1])) == sorted(re.findall(r"\w+", language.overview(facts)))
        assert overview_turns in ([], [0], [len(turns) - 1])
        overviews += len(overview_turns)
        turns = [turn for k, turn in enumerate(turns) if k not in overview_turns]
        assert 4 <= len(turns) <= TURNS
        assert len({question for question, _ in turns}) == len(turns)
        for question, answer in turns:
            assert true[question].answer == answer
            kinds[true[question].kind] += 1
    assert set(kinds) == {"presence", "count", "color", "background", "position", "category", "relation"}
    assert kinds["presence"] < 0.3 * kinds.total()
    assert 8 < overviews < 34


def test_yes_and_no_are_balanced() -> None:
    answers = Counter(
        a for scene in SCENES for _, a in parse_dialogue(ask("conversation", scene)) if a in ("Yes.", "No.")
    )
    assert 0.4 < answers["Yes."] / answers.total() < 0.6


def test_descriptions_and_reasoning_have_the_miniatures_wording() -> None:
    sums = 0
    for scene in SCENES:
        facts = language.facts_of_scene(scene)
        assert parse_detail(ask("detail", scene)) == language.describe(facts)
        [(question, answer)] = parse_reasoning(ask("complex", scene))
        known = {qa for seed in range(30) if (qa := language.reasoning(facts, random.Random(seed)))}
        if known:
            assert (question, answer) in {(qa.question, qa.answer) for qa in known}
        else:
            sums += 1
            assert answer in language.describe(facts)
    assert 0 < sums < 50


def test_replies_are_deterministic_by_prompt() -> None:
    chat = build_messages("conversation", written(captions_of(SCENES[1])))
    assert respond(chat) == respond(json.loads(json.dumps(chat)))
    other = [{"role": "system", "content": chat[0]["content"] + " Please."}, *chat[1:]]
    assert respond(chat) != respond(other)


def test_prompt_of_no_known_job_is_an_error() -> None:
    for messages in (
        [{"role": "user", "content": "Write a poem."}],
        [{"role": "system", "content": "Describe the picture."}, {"role": "user", "content": ""}],
    ):
        with pytest.raises(DataError, match="does not know what to do"):
            respond(messages)


# ------------------------------------------------------------------------------------------------ a teacher with errors


def facts_by_name(facts: language.Facts) -> list[object]:
    """The stated facts in a fixed order."""
    values: list[object] = [facts.background]
    for g in facts.groups:
        values += [g.category, g.color, g.count, g.size]
    return values


@pytest.mark.parametrize("error", [0.0, 0.1, 0.3, 1.0])
def test_error_rate_is_the_share_of_wrong_facts(error: float) -> None:
    wrong, total = 0, 0
    for scene in SCENES:
        facts = language.facts_of_scene(scene)
        facts = replace(facts, groups=tuple(replace(g, position=None) for g in facts.groups))  # keeps their order
        misread = with_errors(facts, error, random.Random(scene.id))
        pairs = list(zip(facts_by_name(facts), facts_by_name(misread), strict=True))
        wrong, total = wrong + sum(a != b for a, b in pairs), total + len(pairs)
    assert abs(wrong / total - error) <= 3 * (error * (1 - error) / total) ** 0.5


def test_misread_scenes_are_scenes() -> None:
    moved = 0
    for scene in SCENES:
        facts = language.facts_of_scene(scene)
        misread = with_errors(facts, 0.5, random.Random(scene.id))
        for what in ("category", "position"):
            values = [getattr(g, what) for g in misread.groups]
            assert len(set(values)) == len(values) == len(facts.groups)
        assert [g.position for g in misread.groups] == sorted(
            (g.position for g in misread.groups), key=lambda p: ("left", "middle", "right").index(str(p))
        )
        assert read_scene([language.describe(misread)]) == misread
        moved += {g.position for g in facts.groups} != {g.position for g in misread.groups}
    assert moved > 20


def test_errors_are_decided_by_prompt_rate_and_seed() -> None:
    chats = [build_messages("detail", written(captions_of(scene), boxes_of(scene))) for scene in SCENES[:60]]
    replies = {error: [respond(chat, error=error) for chat in chats] for error in (0.0, 0.1, 0.3)}
    assert replies[0.0] == [respond(chat) for chat in chats]
    assert replies[0.1] == [respond(chat, error=0.1) for chat in chats]
    assert replies[0.1] != [respond(chat, error=0.1, seed=1) for chat in chats]
    same = {error: [a == b for a, b in zip(replies[0.0], replies[error], strict=True)] for error in (0.1, 0.3)}
    assert sum(same[0.3]) < sum(same[0.1]) < 60


def test_errors_reach_every_kind_and_keep_the_format() -> None:
    for kind, parse in (("conversation", parse_dialogue), ("detail", parse_detail), ("complex", parse_reasoning)):
        changed = 0
        for scene in SCENES[:30]:
            text = written(captions_of(scene), () if kind == "conversation" else boxes_of(scene))
            chat = build_messages(kind, text)
            parse(respond(chat, error=0.3))
            changed += respond(chat, error=0.3) != respond(chat)
        assert changed > 15, kind


def test_errors_about_photographs_are_refused() -> None:
    chat = build_messages("detail", written(["A man rides a horse."], [("horse", (0.1, 0.1, 0.5, 0.5))]))
    assert respond(chat)
    with pytest.raises(DataError, match=r"miniature only, not about 'A man rides a horse\.'"):
        respond(chat, error=0.1)
    with pytest.raises(DataError, match="error rate is 10; give a share"):
        respond(build_messages("detail", written(captions_of(SCENES[0]))), error=10)


# ------------------------------------------------------------------------------------------------ multiple choice

QUESTION = "Which word rhymes with cat?\nContext: N/A\nOptions: (A) dog (B) hat (C) tree\n"


def choose(text: str) -> str:
    return respond([{"role": "user", "content": text}])


def test_knowledge_question_gets_a_letter() -> None:
    assert choose(QUESTION) == "The answer is B."
    assert choose("Which word rhymes with cat?\nA. hat\nB. lake") == "The answer is A."
    assert choose("Which one needs food?\nContext: \nOptions: (A) car (B) tree (C) horse\n") == "The answer is C."


def test_it_declines_questions_that_need_the_image() -> None:
    rng, outcomes = random.Random(0), Counter[str]()
    for _ in range(300):
        problem = make_problem(rng)
        choices = " ".join(f"({letter}) {c}" for letter, c in zip("ABCDE", problem["choices"], strict=False))
        image = "\n<image>" if problem["image"] else ""
        reply = choose(f"{problem['question']}\nContext: {problem['hint'] or 'N/A'}\nOptions: {choices}\n{image}")
        answer = parse_answer(reply, len(problem["choices"]))
        right = "declined" if isinstance(answer, Failure) else "right" if answer == problem["answer"] else "wrong"
        outcomes[f"{'seen' if image else 'read'} {right}"] += 1
    assert outcomes["seen right"] == outcomes["seen wrong"] == 0
    assert outcomes["read right"] > 10 * outcomes["read wrong"]
    assert outcomes["read right"] > 0.3 * (outcomes.total() - outcomes["seen declined"])


def test_image_question_takes_over_an_earlier_answer() -> None:
    for text in (QUESTION + "<image>", QUESTION.replace("Which", "In this picture, which")):
        assert "cannot see" in choose(text)
        assert choose(f"{text}\nFirst: The answer is B.\nSecond: The answer is A.") == "The answer is A."
    assert choose(f"{QUESTION}\nFirst: The answer is B.\nSecond: The answer is A.") == "The answer is B."


def test_reference_answers_agree_with_the_context() -> None:
    for scene in SCENES[:20]:
        facts, context = language.facts_of_scene(scene), written(captions_of(scene), boxes_of(scene))
        for qa in language.questions(facts, random.Random(0))[:3]:
            assert respond(reference_messages(qa.question, context)) == qa.answer
        if qa := language.reasoning(facts, random.Random(1)):
            assert respond(reference_messages(qa.question, context)) == qa.answer
        assert respond(reference_messages("Describe this image in detail.", context)) == language.describe(facts)
    assert "dog" in respond(reference_messages("What is it?", "A dog sleeps on a sofa."))
