"""Training code that all base models share: tokenizer, padding, optimizers, loop, manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llava_core.runtime import progress, sha256_file, write_json

SPECIAL = ("<pad>", "<s>", "</s>", "###")  # the stop string "###" is one token


def train_tokenizer(out: Path, texts: Iterable[str], vocabulary: int, special: Sequence[str] = SPECIAL) -> Any:
    """Train a byte-level BPE tokenizer and save it in transformers' format; `special` tokens have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def pad(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
    """Token ids or labels of several sequences as one tensor (B, T), padded on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class Muon(torch.optim.Optimizer):
    """Muon with Newton-Schulz iterations in fp32; torch's own use bf16, 50 times slower on CPUs without bf16 units.

    Source: Jordan et al. 2024; the update is scaled to the size of an AdamW update.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])
                tall = x.size(0) > x.size(1)
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.add_(x.T if tall else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def _optimizers(model: nn.Module, hidden_rate: float, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Hidden matrices by Muon or AdamW at `hidden_rate`; embeddings, head, norms and biases by AdamW at `rate`."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": rest, "lr": rate}] + ([] if muon else [{"params": hidden, "lr": hidden_rate}])
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return [adamw, Muon(hidden, hidden_rate)] if muon else [adamw]


def _schedule(step: int, steps: int, warmup: float = 0.03) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    w = max(1, int(steps * warmup))
    return (step + 1) / w if step < w else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - w) / max(1, steps - w)))


def fit(
    model: nn.Module,
    batches: Iterator[Any],
    loss_of: Callable[[Any], torch.Tensor],
    steps: int,
    name: str,
    rates: tuple[float, float],
    muon: bool = False,
) -> float:
    """Training loop with peak learning `rates` (hidden matrices, rest); returns the mean loss of the last 50 steps."""
    optimizers, losses = _optimizers(model, *rates, muon), []
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    bar = progress(steps, name)
    for step in range(steps):
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * _schedule(step, steps)
        loss = loss_of(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        bar.update(1)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    bar.close()
    return float(np.mean(losses[-50:]))


def write_manifest(folder: Path, training: dict[str, Any]) -> None:
    """Write manifest.json: the training settings and the SHA-256 of every file, checked when the model is loaded."""
    files = {f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.name != "manifest.json"}
    write_json(folder / "manifest.json", {"license": "Apache-2.0", "training": training, "files": files})
