"""Tokenizers of checkpoint folders; code that a folder brings is never run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_core.checkpoints.configs import quiet_transformers
from llava_core.checkpoints.files import contained_file, error_at, has_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def tokenizer_folder(folder: Path) -> Path | None:
    """Return the folder if it contains a tokenizer."""
    return folder if has_file(folder, "tokenizer.json") or has_file(folder, "tokenizer.model") else None


def open_tokenizer(folder: Path, language_model: Mapping[str, Any], **options: Any) -> Any:
    """Open the tokenizer of a folder; `options` are those of transformers' `from_pretrained`.

    `language_model` decides its class: the folder's own `model_type` may be "llava", for which transformers takes a
    class that drops SentencePiece's dummy prefix.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        with quiet_transformers():
            config = AutoConfig.for_model(**language_model)
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        reason = " ".join(str(error).split())[:160]
        raise error_at(folder, f"the tokenizer cannot be read ({reason})") from error


def copy_tokenizer(source: Path | None, target: Path) -> None:
    """Copy the tokenizer's files unchanged; without a source nothing is copied."""
    for name in TOKENIZER_FILES:
        if source is not None and has_file(source, name):
            shutil.copyfile(contained_file(source, name), target / name)
