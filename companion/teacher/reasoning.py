"""Reasoning inside a reply: the text of a reasoning model without what it wrote before its answer."""

from __future__ import annotations

import re

# repetitions are bounded: a long text without an end must not be searched from each of its letters
_NAME = r"(?:[\w:.-]{0,30}(?:think|thought|reason|reflect|scratch_?pad|monologue|deliberat|analys)[\w:.-]{0,30}|cot)"
_LT, _GT = "(?:<|&lt;)", "(?:>|&gt;)"
_TAG = re.compile(
    # DeepSeek-R1, QwQ and others; Sky-T1 and Cohere; Magistral; Kimi-VL; Gemma; Granite; Ollama's terminal
    rf"(?P<close>{_LT}/\s*{_NAME}\s*{_GT}|<\|(?:/|end_(?:of_)?){_NAME}\|>|<\|{_NAME}_end\|>"
    r"|\[/(?:think(?:ing)?|reasoning)\]|◁/think▷|<channel\|>|<unused95>|here(?: is|'s) my response:"
    r"|\.\.\.done thinking\.)"
    rf"|(?P<open>{_LT}{_NAME}(?:\s[^<>]*)?{_GT}|<\|{_NAME}\|>|\[(?:think(?:ing)?|reasoning)\]|◁think▷"
    r"|<\|channel>\s*thought|<unused94>|\A\s*here(?: is|'s) my thought process:|\A\s*thinking\.\.\.\s*\n)",
    re.IGNORECASE,
)
_BLOCK = re.compile(
    r"\A\s*(?:<details[^<>]{0,200}reasoning[^<>]{0,200}>(?:.*?</details>|.*)"
    rf"|```{_NAME}\s(?:.*?```|.*)|{_LT}{_NAME}\s*/{_GT})",
    re.IGNORECASE | re.DOTALL,
)
LABEL = re.compile(r"\W*(?:my )?(?:thoughts?|thinking|reasoning|analysis)(?: process)?\W*:", re.IGNORECASE)
_ANSWER_LABEL = re.compile(
    r"\n\W{0,20}(?:(?:my|the|final) ){1,3}(?:answer|response|reply|text)\W{0,20}:", re.IGNORECASE
)
_CHANNEL, _END_OF_MESSAGE = "<|channel|>", re.compile(r"<\|(?:end|return|call)\|>")  # gpt-oss
_FINAL = re.compile(r"<\|channel\|>\s*final\s*(?:<\|constrain\|>\s*\w+\s*)?(?:<\|message\|>)?", re.IGNORECASE)
_BARE_CHANNEL, _BARE_FINAL = re.compile(r"\s*analysis(?=[A-Z\"'])"), "assistantfinal"  # the same without special tokens
_WRAPPER = re.compile(
    r"<(answer|response|output|final(?:_answer)?|solution)>|<\|(?:begin_of_|start_)(response|solution)\|>",
    re.IGNORECASE,
)


def without_reasoning(text: str) -> str | None:
    """Return the answer that follows the reasoning, or a text without reasoning as it is.

    None where there is no answer (it ended while reasoning), or where reasoning and answer cannot be told apart.
    """
    if _CHANNEL in text:
        final = list(_FINAL.finditer(text))
        return _answer(_END_OF_MESSAGE.split(text[final[-1].end() :])[0]) if final else None
    if _BARE_CHANNEL.match(text):
        return _answer(text.rpartition(_BARE_FINAL)[2]) if _BARE_FINAL in text else None
    text = _BLOCK.sub("<think></think>", text)
    if LABEL.match(text) and (labels := list(_ANSWER_LABEL.finditer(text))):
        return _answer(text[labels[-1].end() :])
    depth, position = 0, 0
    outside: list[str] = []
    for tag in _TAG.finditer(text):
        if tag["open"]:
            outside += [text[position : tag.start()]] if depth == 0 else []
            depth += 1
        elif depth == 0:
            outside.clear()  # the prompt's template wrote the opening tag
        else:
            depth -= 1
        position = tag.end()
    if depth or any(part.strip(" \t\r\n\ufeff") for part in outside):
        return None
    return _answer(text[position:]) if position or _WRAPPER.search(text) else text


def _answer(text: str) -> str | None:
    """The text inside an answer's tags, if it has these; None if it is empty or has more than one part."""
    text = text.strip()
    opening = _WRAPPER.match(text)
    if opening is None:
        return text if text and not _WRAPPER.search(text) else None
    closing = re.compile(rf"(?:</{opening[1]}>|<\|end(?:_of)?_{opening[2]}\|>)\Z", re.IGNORECASE).search(text)
    inside = text[opening.end() : closing.start()].strip() if closing else ""
    return inside if inside and not _WRAPPER.search(inside) else None
