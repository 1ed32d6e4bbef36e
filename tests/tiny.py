"""Tiny random base models of the real architectures and layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llava_core.constants import IGNORE_INDEX
from llava_core.runtime import sha256_file

WORDS = (
    "A curious human talks with a helpful assistant that can see . ### Human : Assistant \n red blue car dog what "
    "color is the"
)
IMAGES = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
}  # fmt: skip


def tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer with BOS, EOS, padding and `###` as one piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "###"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([WORDS] * 4, trainer)
    tokens = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokens.save_pretrained(folder)
    return tokens


def base_models(root: Path) -> tuple[str, str]:
    """Folders of a tiny Llama (with tokenizer) and a tiny CLIPModel, each with a manifest."""
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llm, clip = root / "llm", root / "clip"
    vocabulary = len(tokenizer(llm))
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256,
        )
    ).save_pretrained(llm)  # fmt: skip
    small = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "projection_dim": 16,
    }
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16},
        text_config={**small, "vocab_size": vocabulary, "max_position_embeddings": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(clip)
    (clip / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    for folder in (llm, clip):
        files = {f.name: sha256_file(f) for f in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return str(llm), str(clip)


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The definition of a batch's loss: cross-entropy of all logits, summed over supervised tokens.

    Args:
        logits: (B, T, V).
        labels: (B, T), -100 ignored; position t is predicted at t - 1.

    Returns:
        A scalar, in fp32.
    """
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
