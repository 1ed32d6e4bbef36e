"""What is read from a server's answer: its text without reasoning, whether it is whole, its tokens; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cassette_processes import generate

from companion.data_tools.coco import AnnotatedImage
from companion.evaluation.llava_bench import judge, parse_scores, score_reviews
from companion.teacher import parse
from companion.teacher.chat import ChatReply, ChatRequest, ServerError
from companion.teacher.client import OfflineClient
from companion.teacher.parse import parse_detail, whole_text
from companion.teacher.protocol import ONLY_REASONING, Dialect, RetryableError, left_out, read_reply, same_for_all
from companion.teacher.reasoning import without_reasoning

REQUEST = ChatRequest([{"role": "user", "content": "one"}], "m", max_tokens=400)
TEXT = "A man stands next to a blue car."


def body(message: Any = None, finish: Any = "stop", **fields: Any) -> bytes:
    message = {"content": TEXT} if message is None else message
    return json.dumps({"choices": [{"finish_reason": finish, "message": message}], **fields}).encode()


def read(message: Any = None, finish: Any = "stop", **fields: Any) -> ChatReply:
    return read_reply(body(message, finish, **fields), REQUEST, (1.0, 1.0))


# ------------------------------------------------------------------------------------------------ reasoning

REASONED = [
    "<think>\nThe captions mention a car.\n</think>\n\n{}",
    "<think>\n\n</think>\n\n{}",
    "The captions mention a car.\n</think>\n{}",
    "<THINK>a car</THINK>{}",
    "<thinking>a car</thinking>\n{}",
    "<thought>a car</thought>\n{}",
    "<reasoning>a car</reasoning>{}\n",
    "<seed:think>a car</seed:think>{}",
    '<think budget="9">a <think> b </think> c</think> {}',
    "<think>a</think>\n<think>b</think>\n{}",
    "&lt;think&gt;a car&lt;/think&gt;\n{}",
    "[THINK]a car[/THINK]{}",
    "◁think▷a car◁/think▷{}",
    "<|begin_of_thought|>a car<|end_of_thought|>\n\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|START_THINKING|>a car<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "<|channel|>analysis<|message|>a car<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "<|channel|>analysis a car<|channel|>final {}",
    "analysisThe captions mention a car.assistantfinal{}",
    "<|channel>thought\na car<channel|>{}",
    "<unused94>thought\na car<unused95>{}",
    "<think>a car</think><answer>\n{}\n</answer>",
    '<details type="reasoning" done="true">\n<summary>Thought</summary>\na car\n</details>\n{}',
    "```thinking\na car\n```\n{}",
    "Thinking...\na car\n...done thinking.\n\n{}",
    "<inner_monologue>a car</inner_monologue>{}",
    "<|think|>a car<|/think|>{}",
    "<think/>{}",
    "Reasoning: the captions mention a car.\n\nFinal answer: {}",
    "Here is my thought process:\na car\n\nHere is my response:\n{}",
]


@pytest.mark.parametrize("form", REASONED)
def test_reasoning_is_not_the_reply(form: str) -> None:
    text = form.format(TEXT)
    assert read({"content": text}).text == without_reasoning(text) == parse_detail(text) == TEXT
    assert parse_scores(form.format("6 5\nBecause 8 7")) == (6, 5)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe captions mention a car.",
        "<think>The captions mention a car.</think>",
        "The captions mention a car.</think>\n",
        "<think>a</think>A man stands.<think>b</think>He is tall.",
        "A man stands.\n<think>Is he tall?</think>",
        "<|channel|>analysis<|message|>The captions mention a car.<|end|>",
        "analysisThe captions mention a car.",
        "<think>a</think><answer>A man",
        '<details type="reasoning">\na car',
        "<|begin_of_thought|>a car",
    ],
)
def test_reasoning_without_a_reply_is_a_named_error(text: str) -> None:
    assert without_reasoning(text) is None
    assert read({"content": text}).finish_reason == ONLY_REASONING
    with pytest.raises(parse.OnlyReasoning):
        parse_detail(text)
    assert read({"content": text}, "length").finish_reason == "length"


@pytest.mark.parametrize("text", [TEXT, "", " 8 7\n\n", "A <b>man</b> thinks of an analysis.", "Thinking, he stands."])
def test_text_without_reasoning_is_unchanged(text: str) -> None:
    assert without_reasoning(text) == read({"content": text}).text == text


def test_description_does_not_open_with_reasoning() -> None:
    for opening in ("**Thought process:** The captions mention a car.", "Okay, so the user wants a description."):
        with pytest.raises(parse.OnlyReasoning, match="opens with the model's reasoning"):
            parse_detail(f"{opening}\n\n{TEXT}")


def test_reasoning_in_its_own_field() -> None:
    for name in ("reasoning_content", "reasoning"):
        assert read({"content": TEXT, name: "a car"}).text == TEXT
        only = read({"content": None, name: "a car"})
        assert (only.text, only.finish_reason) == ("", ONLY_REASONING)
        with pytest.raises(parse.OnlyReasoning):
            whole_text(only.text, only.finish_reason)


# ------------------------------------------------------------------------------------------------ finish reason


@pytest.mark.parametrize("reason", ["stop", "STOP", "end_turn", "eos", "eos_token", "stop_sequence"])
def test_finished_texts(reason: str) -> None:
    reply = read(finish=reason)
    assert whole_text(reply.text, reply.finish_reason) == TEXT


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("length", parse.CutOffReply),
        ("MAX_TOKENS", parse.CutOffReply),
        ("content_filter", parse.UnfinishedReply),
        ("SAFETY", parse.UnfinishedReply),
        ("error", parse.UnfinishedReply),
        ("tool_calls", parse.UnfinishedReply),
        ("abort", parse.UnfinishedReply),
        ("insufficient_system_resource", parse.UnfinishedReply),
        ({"type": "cut"}, parse.UnfinishedReply),
        ("refusal", parse.Refusal),
    ],
)
def test_any_other_reason_is_a_failure(reason: Any, error: type[parse.ReplyError]) -> None:
    reply = read({"content": "A man stands next to a"}, reason)
    with pytest.raises(error):
        parse_detail(reply.text, reply.finish_reason)
    with pytest.raises(error):
        whole_text("", read({"content": None}, reason).finish_reason)


def test_missing_reason_is_unknown_unless_the_limit_was_reached() -> None:
    for reason in (None, ""):
        assert read(finish=reason).finish_reason == "not reported"
        cut = read(finish=reason, usage={"prompt_tokens": 9, "completion_tokens": 400})
        with pytest.raises(parse.CutOffReply):
            whole_text(cut.text, cut.finish_reason)


def test_structured_refusal_is_a_refusal() -> None:
    parts = [{"type": "refusal", "refusal": "That is private."}]
    for message in ({"content": None, "refusal": "That is private."}, {"content": parts}):
        reply = read(message)
        with pytest.raises(parse.Refusal, match="That is private"):
            whole_text(reply.text, reply.finish_reason)
    assert read({"content": TEXT, "refusal": None}).finish_reason == "stop"


# ------------------------------------------------------------------------------------------------ content and tokens


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "thinking", "thinking": "a car"}, {"type": "text", "text": TEXT}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "a car"}]}, {"type": "text", "text": TEXT}],
        [{"type": "reasoning", "text": "a car"}, {"type": "output_text", "text": TEXT}],
        [{"text": "a car", "thought": True}, {"text": TEXT}],
        [{"type": "text", "text": "<think>a car</think>A man stands"}, {"type": "text", "text": TEXT[12:]}],
        [TEXT],
    ],
)
def test_content_as_a_list_of_parts(content: Any) -> None:
    reply = read({"content": content})
    assert (reply.text, reply.finish_reason) == (TEXT, "stop")


@pytest.mark.parametrize(
    "content", [{"a": 1}, 7, [7], [{"type": "image_url"}], [{"type": "text", "text": None}, {"type": "text"}]]
)
def test_content_that_is_no_text_fails_once(content: Any) -> None:
    reply = read({"content": content})
    with pytest.raises(parse.UnfinishedReply, match="content of type"):
        whole_text(reply.text, reply.finish_reason)
    assert read({"content": [{"type": "thinking", "thinking": "a car"}]}).finish_reason == ONLY_REASONING


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": None, "completion_tokens": None}, (5, 9)),
        ({"prompt_tokens": 70}, (70, 9)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (5, 9)),
        ({"prompt_tokens": "many", "completion_tokens": 30.0}, (5, 30)),
        ({"input_tokens": 70, "output_tokens": 30}, (70, 30)),
        ([], (5, 9)),
        (None, (5, 9)),
    ],
)
def test_missing_counts_are_estimated(usage: Any, tokens: tuple[int, int]) -> None:
    reply = read(usage=usage)
    assert (reply.prompt_tokens, reply.completion_tokens) == tokens
    assert reply.cost_usd == pytest.approx(sum(tokens) / 1e6)


def test_estimate_counts_the_reasoning() -> None:
    reply = read({"content": TEXT, "reasoning_content": 400 * "x"})
    assert reply.completion_tokens == 109


def test_half_of_a_character_is_a_failure() -> None:
    reply = read({"content": "A man \ud83d"})
    assert read({"content": "A man \U0001f600"}).finish_reason == "stop"
    with pytest.raises(parse.UnfinishedReply, match="half of a character"):
        whole_text(reply.text, reply.finish_reason)
    assert reply.text.encode() == b"A man ?"


def test_choice_without_a_message_fails_once() -> None:
    reply = read_reply(b'{"choices": [{"message": null, "finish_reason": "content_filter"}]}', REQUEST, (1.0, 1.0))
    with pytest.raises(parse.UnfinishedReply, match="content_filter"):
        whole_text(reply.text, reply.finish_reason)


def test_error_in_the_body_of_a_reply() -> None:
    with pytest.raises(ServerError, match="Insufficient credits"):
        read_reply(b'{"error": {"code": 402, "message": "Insufficient credits"}}', REQUEST, (1.0, 1.0))
    with pytest.raises(RetryableError, match="overloaded"):
        read_reply(b'{"error": {"code": 503, "message": "overloaded"}}', REQUEST, (1.0, 1.0))


@pytest.mark.parametrize("answer", [b"{", b"[]", b'{"choices": []}', b'{"error": {"message": "no"}}', b"null"])
def test_body_without_a_completion_is_asked_for_again(answer: bytes) -> None:
    with pytest.raises(RetryableError, match="not a chat completion"):
        read_reply(answer, REQUEST, (1.0, 1.0))


# ------------------------------------------------------------------------------------------------ refusals

MAX_TOKENS = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
    "instead.",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
NEWER = {"temperature", "max_completion_tokens"}
TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
    "supported.",
    "param": "temperature",
    "code": "unsupported_value",
}
EXTRA = {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted", "type": "extra"}]}
TOO_LONG = {"message": "'max_tokens' is too large: 400. This model's maximum context length is 300.", "param": None}


@pytest.mark.parametrize(
    ("status", "error", "sent"),
    [
        (400, MAX_TOKENS, NEWER),
        (400, TEMPERATURE, {"max_tokens"}),
        (422, EXTRA, {"max_tokens"}),
        (400, {"message": "invalid temperature: only 1 is allowed for this model"}, {"max_tokens"}),
        (400, {"message": "Unsupported: max_tokens; max_completion_tokens is the maximum"}, NEWER),
        (400, "`temperature` is deprecated for this model.", {"max_tokens"}),
    ],
)
def test_refused_parameter_is_left_out_or_renamed(status: int, error: Any, sent: set[str]) -> None:
    dialect = Dialect()
    first = dialect.body(REQUEST)
    assert first == json.loads(REQUEST.canonical)
    assert dialect.learn("m", first, status, error)
    assert dialect.body(REQUEST).keys() - {"messages", "model"} == sent
    assert dialect.body(REQUEST).get("max_completion_tokens", 400) == 400
    assert left_out(dialect.body(REQUEST)) == ("" if "temperature" in sent else ", without temperature")
    assert dialect.learn("m", first, status, error)  # of a request that was under way
    assert not dialect.learn("m", dialect.body(REQUEST), status, error)
    assert dialect.body(ChatRequest(REQUEST.messages, "other")).keys() == first.keys()


@pytest.mark.parametrize(
    ("status", "error"), [(400, TOO_LONG), (500, MAX_TOKENS), (400, {"message": "flagged", "param": "messages"}),
                          (422, {"detail": [{"loc": ["messages"], "msg": "bad", "input": {"temperature": 0.7}}]})]
)  # fmt: skip
def test_other_refusals_change_no_parameter(status: int, error: Any) -> None:
    dialect = Dialect()
    assert not dialect.learn("m", dialect.body(REQUEST), status, error)
    assert not same_for_all(status, error)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, None),
        (402, {"message": "Insufficient Balance"}),
        (404, "no"),
        (429, {"code": "insufficient_quota"}),
        (400, {"message": "API key not valid. Please pass a valid API key."}),
        (400, {"message": "The model `x` does not exist", "code": None}),
        (400, {"message": "no", "param": "model"}),
        (400, {"message": "max_tokens is too large: this model supports at most 100", "param": "max_tokens"}),
        (400, {"message": "mine is not a valid model ID"}),
        (400, {"message": "'messages[0].role' does not support 'system'", "code": "unsupported_value"}),
        (400, MAX_TOKENS | {"param": "max_completion_tokens"}),
    ],
)
def test_refusals_that_hold_for_all(status: int, error: Any) -> None:
    assert same_for_all(status, error)


# ------------------------------------------------------------------------------------------------ teacher and judge


def test_teacher_keeps_the_text_after_reasoning(tmp_path: Path) -> None:
    image = AnnotatedImage("1", "1.jpg", ["A car."], [])
    result = generate([image], ["detail"], OfflineClient(lambda _: REASONED[0].format(TEXT)), tmp_path)
    assert result["records"] == 1
    [record] = json.loads((tmp_path / "detail_1.json").read_text())
    assert record["conversations"][1]["value"] == TEXT


class Ended:
    """Replies with a text and a finish reason."""

    def __init__(self, text: str, reason: str) -> None:
        self.text, self.reason = text, reason

    def complete(self, request: ChatRequest) -> ChatReply:
        return ChatReply(self.text, "m", 1, 1, finish_reason=self.reason)


@pytest.mark.parametrize(
    ("text", "reason", "scores"),
    [
        ("<think>8 7\n</think>\n6 5", "stop", [6, 5]),
        ("8 1", "length", None),
        ("8 7\nThe first", "content_filter", None),
        ("<think>8 7", "stop", None),
        ("8 7\n</think>", "stop", None),
    ],
)
def test_judge_scores_whole_reviews_without_reasoning(text: str, reason: str, scores: Any) -> None:
    questions = [{"question_id": 1, "image": "a.jpg", "text": "What?", "category": "conv"}]
    reviews, tally = judge(questions, {"a.jpg": "a car"}, {"1": "A car."}, {"1": "A bus."}, Ended(text, reason))
    assert reviews[0]["tuple"] == scores
    assert score_reviews(reviews, released=True)["all"] == (100 * scores[1] / scores[0] if scores else 100)
    assert tally["failed"] == (scores is None)
    assert score_reviews(reviews)["n"] == (scores is not None)
    assert ("wrong" in reviews[0]) == (scores is None)
