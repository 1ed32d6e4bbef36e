"""What the chapters on speed measure: times in turns, and training steps beside transformers' loop."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.lab.figures import BLUE, CARD, COLORS, INK, _axes, _styled
from llava_core.record import RunRecord
from llava_core.train.stages import TrainingSet, build_model, load_samples
from llava_core.train.trainer import Item, Trainer, collate
from llava_core.weights.checkpoint import Loaded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ------------------------------------------------------------------------------------------------ timing


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, dict[str, float]]:
    """Time functions in turns, so that whatever else the machine does hits all of them alike.

    Args:
        functions: name -> what is timed; each runs once before the clock starts.
        rounds: timed turns.

    Returns:
        Name -> median, lowest and highest seconds.
    """
    for function in functions.values():
        function()
    _wait()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(rounds):
        names = list(functions)
        for name in names if k % 2 else names[::-1]:
            begin = time.perf_counter()
            functions[name]()
            _wait()
            seconds[name].append(time.perf_counter() - begin)
    return {n: {"median": statistics.median(s), "low": min(s), "high": max(s)} for n, s in seconds.items()}


def _wait() -> None:
    """Wait for a GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(like: torch.Tensor, size: int = 1024, rounds: int = 7) -> float:
    """Measured operations per second of a square matrix product, on the device and in the dtype of `like`."""
    a, b = torch.randn(2, size, size).to(like)
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, rounds)["matmul"]["median"]


# ------------------------------------------------------------------------------------------------ the training step


class Ours:
    """One optimizer step of our trainer, on a fresh model, without writing anything.

    Args:
        record: a finished run; its configuration says what is trained.
        initial: the finished run that it starts from, if any.
    """

    def __init__(self, record: RunRecord, initial: RunRecord | None = None) -> None:
        config = record.config
        self.loaded = build_model(config, None if initial is None else initial.checkpoint)
        n, self.settings = self.loaded.model.n_image_tokens, config.experiment.train
        train, held = (
            TrainingSet(samples, self.loaded.tokenizer, self.loaded.processor, config, n, cache=True)
            for samples in load_samples(config)
        )
        self.trainer = Trainer(record, self.loaded, train, held, resume=False)
        self.batch_size = min(self.settings.global_batch, len(train))

    def items(self, step: int = 0) -> list[Item]:
        """The samples of a step."""
        return [self.trainer.train_set[k] for k in self.trainer._indices(step)]

    def step(self, items: list[Item]) -> float:
        """Forward, backward and update; returns the loss."""
        self.trainer.step = 1  # the learning rate of one early step, whatever was done before
        return self.trainer._train_step(items)[0]


class Peer:
    """The same step in transformers' own model in a plain loop: one padded batch, the loss of the full logits, AdamW.

    The model is built from the sizes of ours and gets copies of our weights, and our projector of one layer in place of
    its own of two, so that both compute the same function.
    """

    def __init__(self, ours: Ours) -> None:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        self.ours, model, tokenizer = ours, ours.loaded.model, ours.loaded.tokenizer
        # two ids of the existing vocabulary that no sample has: one marks image positions, the other pads
        self.image_id, self.pad_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config = LlavaConfig(
            vision_config=copy.deepcopy(model.vision_tower.config),
            text_config=copy.deepcopy(model.language_model.config),
            image_token_index=self.image_id,
            image_seq_length=model.n_image_tokens,
            vision_feature_layer=model.feature_layer,
        )
        self.model = LlavaForConditionalGeneration(config)
        self.model.model.multi_modal_projector = copy.deepcopy(model.multi_modal_projector)
        self.model.model.vision_tower.load_state_dict(model.vision_tower.state_dict())
        self.model.model.language_model.load_state_dict(model.language_model.model.state_dict())
        self.model.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
        weight = next(model.parameters())
        self.model.to(weight.device, weight.dtype).train().requires_grad_(False)
        self.model.model.vision_tower.eval()
        if "projector" in ours.settings.trainable:
            self.model.model.multi_modal_projector.requires_grad_(True)
        if "language_model" in ours.settings.trainable:
            self.model.model.language_model.requires_grad_(True)
            self.model.lm_head.requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=ours.settings.learning_rate, weight_decay=0.0)

    def batch(self, items: Sequence[Item]) -> dict[str, Any]:
        """The padded batch as transformers wants it."""
        made = collate(items, self.ours.loaded).to(next(self.model.parameters()).device)
        ids = made.input_ids.masked_fill(made.attention_mask == 0, self.pad_id)
        ids = ids.masked_fill(made.input_ids == IMAGE_TOKEN_ID, self.image_id)
        return {
            "input_ids": ids,
            "attention_mask": made.attention_mask,
            "labels": made.labels,
            "pixel_values": made.pixel_values,
        }

    def loss(self, items: Sequence[Item]) -> torch.Tensor:
        """Mean loss over the supervised tokens of the batch."""
        loss: torch.Tensor = self.model(**self.batch(items), use_cache=False).loss
        return loss

    def step(self, items: list[Item]) -> float:
        """Forward, backward and update; returns the loss."""
        loss = self.loss(items)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.ours.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def parity(ours: Ours, peer: Peer, items: list[Item]) -> dict[str, float]:
    """Loss of both models on the same samples before any step, and the largest relative error of a gradient."""
    total = sum(label >= 0 for e, _ in items for label in e.labels)
    mine = ours.trainer._loss(items) / total
    theirs = peer.loss(items)
    pairs = [(ours.loaded.model.multi_modal_projector, mine), (peer.model.model.multi_modal_projector, theirs)]
    a, b = (torch.autograd.grad(loss, list(part.parameters())) for part, loss in pairs)
    error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))
    return {"ours": float(mine.detach()), "transformers": float(theirs.detach()), "gradient error": error}


def _mark(marks: list[float]) -> None:
    _wait()
    marks.append(time.perf_counter())


@contextmanager
def _clocked(module: torch.nn.Module) -> Iterator[list[float]]:
    """When each call of a module begins and ends."""
    marks: list[float] = []
    hooks = [module.register_forward_pre_hook(lambda *_: _mark(marks))]
    hooks.append(module.register_forward_hook(lambda *_: _mark(marks)))
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def where_time_goes(ours: Ours, items: list[Item], rounds: int = 5) -> dict[str, float]:
    """Median seconds of the parts of one step: reading, tower, projector and language model, backward, optimizer."""
    parts: dict[str, list[float]] = {}
    trainer, total = ours.trainer, sum(label >= 0 for e, _ in items for label in e.labels)
    trainer.model.train()
    for k in range(rounds + 1):
        marks: list[float] = []
        _mark(marks)
        fetched = ours.items(0)
        _mark(marks)
        with _clocked(trainer.model.vision_tower) as calls:
            loss = trainer._loss(fetched) / total
        _mark(marks)
        loss.backward()
        _mark(marks)
        torch.nn.utils.clip_grad_norm_(list(trainer.trainable.values()), ours.settings.grad_clip)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        _mark(marks)
        read, forward, backward, update = (b - a for a, b in itertools.pairwise(marks))
        tower = sum(end - begin for begin, end in zip(calls[::2], calls[1::2], strict=True))
        found = {"reading samples": read, "vision tower": tower, "projector, LLM, loss": forward - tower,
                 "backward": backward, "optimizer": update}  # fmt: skip
        for name, seconds in found.items() if k else ():  # the first round warms up
            parts.setdefault(name, []).append(seconds)
    return {name: statistics.median(values) for name, values in parts.items()}


def step_flops(loaded: Loaded, items: Sequence[Item], trainable: Sequence[str]) -> float:
    """Floating-point operations that one step cannot do without: matrix products of real tokens and patches.

    A weight costs 2 per token forward, 2 for the gradient that passes through it and 2 for its own; padding, attention
    scores, norms and the recomputation of nothing are left out.
    """
    weights = {part: sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
               for part, module in loaded.model.named_children()}  # fmt: skip
    tokens = sum(len(e.input_ids) for e, _ in items)
    images = sum(pixels is not None for _, pixels in items)
    patches = images * loaded.model.n_image_tokens
    llm = 6 if "language_model" in trainable else 4
    return float(
        2 * weights["vision_tower"] * patches + 4 * weights["multi_modal_projector"] * patches
        + llm * weights["language_model"] * tokens
    )  # fmt: skip


@_styled
def stacked_figure(parts: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """One bar per row, cut into the seconds of its parts."""
    figure, (axes,) = _axes(7.6, 1.3 + 0.5 * len(parts))
    names = list(dict.fromkeys(name for row in parts.values() for name in row))
    for y, row in enumerate(parts.values()):
        left, whole = 0.0, sum(row.values())
        for k, name in enumerate(names):
            seconds = row.get(name, 0.0)
            axes.barh(
                y,
                1000 * seconds,
                left=left,
                height=0.6,
                color=COLORS[k],
                edgecolor=CARD,
                label=name if y == 0 else None,
            )
            if seconds > 0.06 * whole:
                place = (left + 500 * seconds, y)
                axes.annotate(f"{seconds / whole:.0%}", place, ha="center", va="center", color="white", fontsize=9)
            left += 1000 * seconds
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set(xlabel="milliseconds of one optimizer step", title=title)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=3)
    return figure


@_styled
def speed_figure(times: Mapping[str, Mapping[str, float]], reference: str, title: str = "") -> Figure:
    """How many times as fast as the reference each one is; whiskers from the fastest and slowest round."""
    figure, (axes,) = _axes(height=0.9 + 0.42 * len(times))
    base = times[reference]["median"]
    for k, row in enumerate(times.values()):
        ratio, low, high = base / row["median"], base / row["high"], base / row["low"]
        axes.barh(k, ratio, height=0.62, color=BLUE, alpha=0.85)
        axes.errorbar(
            ratio, k, xerr=[[max(0, ratio - low)], [max(0, high - ratio)]], color=INK, capsize=3, linewidth=1.2
        )
        axes.annotate(
            f"{ratio:.2f} × ({1000 * row['median']:.3g} ms)",
            (high, k),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(times)), list(times))
    axes.set(
        xlabel=f"speed relative to {reference}",
        title=title,
        xlim=(0, 1.35 * max(base / r["low"] for r in times.values())),
    )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    return figure
