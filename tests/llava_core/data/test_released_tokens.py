"""Ids and masks equal those of the released code of each era, with the slow tokenizers of its transformers version."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece_models import llama_model, small_model

from llava_core.checkpoints.tokenizer import open_tokenizer
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.conversation import TEMPLATES
from llava_core.runtime import ROOT

SLOW = """
import json, sys
from transformers import LlamaTokenizer
tokenizer = LlamaTokenizer.from_pretrained(sys.argv[1])
tokenizer.add_tokens(json.loads(sys.argv[2]), special_tokens=True)
json.dump([tokenizer(text).input_ids for text in json.load(sys.stdin)], sys.stdout)
"""
PARTS = (
    " ", "  ", "\n", "\n\n", "\t", "detail.", "Provide", " the", " car", "Hello", "world", " 日本語", "👍🏽", "é",
    " def f(x):", "\n    return x", "{}", "<br>", " 12.5", "'s", "#",
)  # fmt: skip
SYSTEM, N = "A chat between a curious user and an assistant.", 3
DELIMITERS = ["<im_start>", "<im_end>"]
TOKENS = ["<im_patch>", *DELIMITERS]

# era: transformers, legacy, template, side of the image, delimiters, images are tokens (before 1.0)
ERAS = {
    "v0": ("4.31", None, "v0_exact", "last", True, True),
    "v0, image first": ("4.31", None, "v0_exact", "first", True, True),
    "v0 by 1.0": ("4.31", None, "v0_exact_1_0", "first", False, False),
    "v1.1": ("4.31", None, "v1_tight", "last", True, True),
    "1.0 with delimiters": ("4.31", None, "v1_tight", "first", True, False),
    "1.0": ("4.31", None, "v1", "first", False, False),
    "1.5": ("4.37", False, "v1", "first", False, False),
    "1.5, legacy": ("4.37", True, "v1", "first", False, False),
    "1.5 with delimiters": ("4.37", False, "v1", "first", True, False),
    "1.5 with delimiters, legacy": ("4.37", True, "v1", "first", True, False),
}  # fmt: skip


def conversations(count: int, side: str) -> list[list[tuple[str, str]]]:
    rng, result = random.Random(0), []
    for _ in range(count):
        texts = ["".join(rng.choices(PARTS, k=rng.randint(1, 15))) for _ in range(2 * rng.randint(1, 4))]
        texts[0] = f"<image>\n{texts[0].strip()}" if side == "first" else f"{texts[0].strip()}\n<image>"
        result.append(list(zip(texts[::2], texts[1::2], strict=True)))
    return result


def parts_of(template: str, turns: list[tuple[str, str]]) -> list[str]:
    """The parts whose tokens the released v0 code counts; for v1 the whole text."""
    if template.startswith("v0"):
        return [f"{SYSTEM}\n\n", *(text for q, a in turns for text in (f"### Human: {q}\n", f"### Assistant: {a}\n"))]
    return [f"{SYSTEM} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns)]


def released_masks(ids: list[int], lengths: list[int]) -> list[int]:
    """v0's labels: questions but for their first two tokens are ignored, by the lengths of their texts alone."""
    labels, position = list(ids), lengths[0]
    labels[:position] = [IGNORE_INDEX] * position
    for k, length in enumerate(lengths[1:]):
        for index in range(position + 2, min(position + length, len(ids))) if k % 2 == 0 else ():
            labels[index] = IGNORE_INDEX
        position += length
    return [IGNORE_INDEX if label == IMAGE_TOKEN_ID else label for label in labels]


class Released:
    """The tokenizer of the released code; without `tokens`, texts around an image are tokenised one by one."""

    def __init__(self, version: str, folder: Path, tokens: bool, added: list[str]) -> None:
        self.path, self.folder, self.tokens, self.added = ROOT / ".interop" / version, folder, tokens, added

    def __call__(self, texts: list[str]) -> list[list[int]]:
        block = "<im_start>" + "<im_patch>" * N + "<im_end>"
        if self.tokens:
            chunks = [[text.replace("<image>", block)] for text in texts]
        else:
            mark = "<im_start><image><im_end>" if self.added else "<image>"
            chunks = [text.replace("<image>", mark).split("<image>") for text in texts]
        command = [sys.executable, "-c", SLOW, str(self.folder), json.dumps(self.added)]
        flat = json.dumps([chunk for of_text in chunks for chunk in of_text])
        environment = {**os.environ, "PYTHONPATH": str(self.path)}
        done = subprocess.run(command, input=flat, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        ids = iter(json.loads(done.stdout))
        return [self._joined([next(ids) for _ in of_text]) for of_text in chunks]

    def _joined(self, chunks: list[list[int]]) -> list[int]:
        ids = chunks[0]
        for chunk in chunks[1:]:
            ids = [*ids, *[IMAGE_TOKEN_ID] * N, *chunk[1:]]
        return ids


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["small", "llama"])
@pytest.mark.parametrize("era", ERAS)
def test_ids_and_masks_equal_the_released_code(era, vocabulary, tmp_path) -> None:
    version, legacy, name, side, delimiters, tokens = ERAS[era]
    if not (ROOT / ".interop" / version).is_dir():
        pytest.skip(f"no transformers {version}; run `make interop`")
    their_folder = tmp_path / "theirs"
    their_folder.mkdir()
    (small_model if vocabulary == "small" else llama_model)(their_folder / "tokenizer.model")
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "pad_token": "<unk>", **({} if legacy is None else {"legacy": legacy})}
    config |= {"bos_token": "</s>"} if era == "v0" else {}  # as in the release
    (their_folder / "tokenizer_config.json").write_text(json.dumps(config))
    own_folder = shutil.copytree(their_folder, tmp_path / "ours")
    rows = len(open_tokenizer(their_folder))
    added = TOKENS if delimiters else []
    (own_folder / "added_tokens.json").write_text(json.dumps({token: rows + k for k, token in enumerate(added)}))
    tokenizer, template = open_tokenizer(own_folder), TEMPLATES.get(name)
    asked = conversations(100, side)
    ours = [
        template.encode(turns, tokenizer, N, system=SYSTEM, delimiters=DELIMITERS if delimiters else None)
        for turns in asked
    ]
    parts = [parts_of(name, turns) for turns in asked]
    whole = ["".join(texts) + "### " * name.startswith("v0") for texts in parts]
    theirs = Released(version, their_folder, tokens, added)
    ids = iter(theirs([text for texts, all_of_it in zip(parts, whole, strict=True) for text in (all_of_it, *texts)]))
    patch = rows if added else None
    for encoded, texts in zip(ours, parts, strict=True):
        expected = [IMAGE_TOKEN_ID if token == patch else token for token in next(ids)]
        assert encoded.input_ids == expected
        lengths = [len(next(ids)) for _ in texts]
        if name.startswith("v0"):
            assert encoded.labels == released_masks(expected, lengths)
