"""Acceptance checks of the base models: exact answers are counted over answer tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from companion.miniature import acceptance, pretraining_text
from llava_core.data.label_mask import encode


class Parrot:
    """Puts all weight on the right next token, except at the positions in `wrong`: row -> position from the end."""

    def __init__(self, tokenizer: Any, dialogues: list[tuple[str, str]], wrong: dict[str, int]) -> None:
        self.texts = {}
        for question, answer in dialogues:
            ids = encode(pretraining_text.dialogue([(question, answer)]), tokenizer, 0).input_ids
            output = list(ids)
            if question in wrong:
                output[wrong[question]] = tokenizer.bos_token_id
            self.texts[tuple(ids)] = output

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 400)
        for row, ids in enumerate(input_ids.tolist()):
            # the row lacks the last token of the longest text and is padded if it is a shorter one
            (output,) = (s for full, s in self.texts.items() if (*ids, full[-1])[: len(full)] == full)
            for place, token in enumerate(output[1:]):
                logits[row, place, token] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_exact_answers_counts_answer_tokens_only(tmp_path: Path, batch: int) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    dialogues = [("what color is the car", "blue and red"), ("the dog", "red"), ("what", "a helpful human")]
    documents = [pretraining_text.dialogue([pair]) for pair in dialogues]
    assert acceptance.exact_answers(Parrot(tokenizer, dialogues, {}), tokenizer, documents, batch) == [True] * 3
    spoiled = {"the dog": -1, "what": 5}  # the terminator of one answer; one word of the other's prompt
    result = acceptance.exact_answers(Parrot(tokenizer, dialogues, spoiled), tokenizer, documents, batch)
    assert result == [True, False, True]
