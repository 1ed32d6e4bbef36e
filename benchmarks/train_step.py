"""A training step against transformers' own model in a plain padded loop: same weights, samples and batch.

The savings of our trainer can be enabled one after the other (`SAVINGS`), to measure each.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Clock,
    all_in_turns,
    circumstances,
    headline,
    in_own_process,
    peak_mib,
    ratios,
    steady_in_turns,
)
from companion import miniature
from companion.padded_batch import collate
from llava_core.config import TrainConfig, load_experiment
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.packing import pack
from llava_core.data.tokenization import Encoded
from llava_core.models.llava import Llava
from llava_core.ops.linear_cross_entropy import linear_cross_entropy
from llava_core.ops.transformers_backend import packed_attention
from llava_core.runtime import ConfigError, resolve_device, resolve_dtype
from llava_core.train.dataset import TrainingSet, build_model, load_samples
from llava_core.train.loader import RowInputs
from llava_core.train.optimizer import make_optimizer
from llava_core.train.trainer import PackedRowLoss

PEER: Literal["transformers"] = "transformers"
SAVINGS = {
    "head": "logits of supervised positions only, in chunks",
    "features": "features of the frozen tower from the cache",
    "packed": "packed rows instead of padding",
    "shared": "shared prefixes once",
}
ALL = "shared"
SIZES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())["train_step"]
"""Random models of real shapes; `mini` are the miniature's own models and samples."""

SYSTEM_TOKENS = 38  # of v0's system text

PARTS = {1: ["projector"], 2: ["projector", "language_model"]}


@dataclass
class Case:
    """A model and the samples of one optimizer step.

    Attributes:
        model: the weights that both sides have.
        items: ids and labels.
        keys: an image's name per sample; None for text only.
        pixels: what the tower sees of each image, uint8 (H, W, 3).
        normalise: makes pixel values (N, 3, H, W) of them.
        stage: 1 or 2.
    """

    model: Llava
    items: list[Encoded]
    keys: list[Any]
    pixels: dict[Any, np.ndarray]
    normalise: Callable[[np.ndarray], np.ndarray]
    stage: int

    @property
    def supervised(self) -> int:
        """Supervised tokens of the batch."""
        return sum(label != IGNORE_INDEX for item in self.items for label in item.labels)

    @property
    def padding(self) -> float:
        """Positions of the padded batch per token."""
        lengths = [len(item.input_ids) for item in self.items]
        return len(lengths) * max(lengths) / sum(lengths)


def make_case(
    name: str,
    stage: int,
    samples: int = 8,
    per_image: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    image_tokens: int | None = None,
) -> Case:
    """Build the models and draw the samples of a case, by a fixed seed.

    Args:
        name: `mini`, or one of `SIZES`.
        stage: 1 trains the projector, 2 the language model as well.
        samples: of the optimizer step.
        per_image: how many samples in a row have the same image; above 1 the most that sharing can give.
        dtype: of the weights.
        device: `cpu` or `cuda`.
        image_tokens: a square number, instead of the tower's own; not for `mini`.

    Raises:
        ConfigError: no such case, or `image_tokens` is no square number.
    """
    if name == "mini":
        return _miniature(stage, samples)
    if name not in SIZES:
        raise ConfigError(f"no model '{name}'; choose one of mini, {', '.join(SIZES)}")
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    vision = dict(SIZES[name]["tower"])
    if image_tokens is not None:
        if math.isqrt(image_tokens) ** 2 != image_tokens:
            raise ConfigError(f"{image_tokens} image tokens are no square of patches; fix: 49, 196, 256 or 576")
        vision["image_size"] = vision["patch_size"] * math.isqrt(image_tokens)
    torch.manual_seed(0)
    torch.set_default_dtype(resolve_dtype(dtype))
    try:
        with torch.device(device):
            tower = CLIPVisionModel(CLIPVisionConfig(**vision))
            model = Llava(tower, LlamaForCausalLM(LlamaConfig(**SIZES[name]["text"])))
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_trainable(PARTS[stage])
    side = vision["image_size"]
    items = _typical(stage, samples, model.n_image_tokens)
    keys = [k // per_image for k in range(samples)]
    draw = np.random.default_rng(0)
    pixels = {key: draw.integers(0, 255, (side, side, 3), dtype=np.uint8) for key in dict.fromkeys(keys)}
    return Case(model, items, keys, pixels, _normalise, stage)


def _normalise(pixels: np.ndarray) -> np.ndarray:
    return (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.45) / 0.27


def _typical(stage: int, samples: int, n_image: int, draws: int = 200) -> list[Encoded]:
    """Samples of random words of an optimizer step whose share of padding is that of the average step.

    The padding of single steps varies by a factor of two. All samples have their image first, as half of the
    instruction data.
    """
    rng = random.Random(stage)
    system = [rng.randrange(3, 32000) for _ in range(SYSTEM_TOKENS)]
    batches = [[_turns(rng, stage) for _ in range(samples)] for _ in range(draws)]
    lengths = [[SYSTEM_TOKENS + n_image + sum(map(sum, turns)) for turns in batch] for batch in batches]
    usual = sum(samples * max(batch) for batch in lengths) / sum(map(sum, lengths))
    chosen = min(range(draws), key=lambda k: abs(samples * max(lengths[k]) / sum(lengths[k]) - usual))
    items = []
    for turns in batches[chosen]:
        ids, labels = [*system, *[IMAGE_TOKEN_ID] * n_image], [IGNORE_INDEX] * (len(system) + n_image)
        for question, answer in turns:
            words = [rng.randrange(3, 32000) for _ in range(question + answer)]
            ids += words
            labels += [IGNORE_INDEX] * question + words[question:]
        items.append(Encoded(ids, labels, 1))
    return items


def _turns(rng: random.Random, stage: int) -> list[tuple[int, int]]:
    """(question, answer) tokens of each turn of a sample, special tokens included.

    Stage 1 is an instruction and a caption of about ten words. Stage 2 has 110 tokens on average after system text and
    image and a long tail, which gives batches of 8 and 16 at 196 image tokens the padding factors 1.5 and 1.7.
    """
    if stage == 1:
        return [(rng.randrange(8, 17), max(8, round(rng.gauss(24, 6))))]
    left, turns = min(max(12, round(rng.lognormvariate(4.4, 0.78))), 1400), []
    while left > 0:
        question, answer = rng.randrange(8, 15), rng.randrange(20, 110)
        answer = answer if left > question + answer + 12 else max(4, left - question)
        turns.append((question, answer))
        left -= question + answer
    return turns


def _miniature(stage: int, samples: int) -> Case:
    """The first samples of the miniature's training, with its models."""
    miniature.ensure()
    config = load_experiment({1: "pretrain", 2: "finetune"}[stage], "mini", {"init_from": None} if stage == 2 else {})
    loaded = build_model(config, None)
    data = TrainingSet(
        load_samples(config)[0], loaded.tokenizer, loaded.processor, config, loaded.model.n_image_tokens, cache=True
    )
    order = np.random.default_rng((config.experiment.train.seed, 0)).permutation(len(data))[:samples]
    numbers = [int(k) for k in order]
    keys = [data.samples[k].image for k in numbers]
    pixels = {key: data.pixels(key) for key in keys if key is not None}
    return Case(loaded.model, [data.encoded(k) for k in numbers], keys, pixels, loaded.processor.normalise, stage)


# ------------------------------------------------------------------------------------------------ both sides


class TransformersStep:
    """transformers' own model with our weights: one padded batch, the tower in every step, all logits, fused AdamW.

    It gets our linear projector instead of its own of two layers, so that both compute the same function.
    """

    def __init__(self, case: Case) -> None:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        self.case, ours = case, case.model
        text = ours.language_model.config
        used = {token for item in case.items for token in item.input_ids}
        # two unused ids of the vocabulary, for image positions and for padding
        self.image_id, self.pad_id = itertools.islice((k for k in range(text.vocab_size) if k not in used), 2)
        config = LlavaConfig(
            vision_config=copy.deepcopy(ours.vision_tower.config), text_config=copy.deepcopy(text),
            image_token_index=self.image_id, image_seq_length=ours.n_image_tokens,
            vision_feature_layer=ours.feature_layer,
        )  # fmt: skip
        with torch.device("meta"):
            self.model = LlavaForConditionalGeneration(config)
        inner = self.model.model
        inner.multi_modal_projector = copy.deepcopy(ours.multi_modal_projector)
        inner.vision_tower = copy.deepcopy(ours.vision_tower)
        inner.language_model = copy.deepcopy(ours.language_model.get_decoder())
        self.model.lm_head = copy.deepcopy(ours.language_model.get_output_embeddings())
        self.model.train()
        inner.vision_tower.eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, _settings())

    def loss(self) -> torch.Tensor:
        """Mean loss over the supervised tokens."""
        device = self.model.lm_head.weight.device
        pairs = zip(self.case.items, self.case.keys, strict=True)
        batch = collate([(item, self.case.pixels.get(key)) for item, key in pairs], self.case.normalise).to(device)
        ids = batch.input_ids.masked_fill(batch.attention_mask == 0, self.pad_id)
        ids = ids.masked_fill(batch.input_ids == IMAGE_TOKEN_ID, self.image_id)
        pixels = None if batch.pixel_values is None else batch.pixel_values.to(self.model.lm_head.weight.dtype)
        loss: torch.Tensor = self.model(
            input_ids=ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            pixel_values=pixels,
            use_cache=False,
        ).loss
        return loss

    def step(self) -> float:
        """Forward, backward and update; returns the loss."""
        return _update(self.loss(), self.parameters, self.optimizer)


class PackedStep:
    """Our step, with the savings up to `saving` of `SAVINGS`, and an attention backend."""

    def __init__(self, case: Case, saving: str = ALL, backend: str = "auto") -> None:
        if saving not in SAVINGS:
            raise ConfigError(f"no saving '{saving}'; choose one of {', '.join(SAVINGS)}")
        self.case, self.on, self.backend = case, list(SAVINGS)[: list(SAVINGS).index(saving) + 1], backend
        self.model = case.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, _settings())
        self.device = self.parameters[0].device
        self.features = {key: self._tower([key])[0] for key in case.pixels} if "features" in self.on else {}

    def _tower(self, keys: Sequence[Any]) -> torch.Tensor:
        values = torch.from_numpy(self.case.normalise(np.stack([self.case.pixels[key] for key in keys])))
        return self.model.tower_features(values.to(self.device))

    def loss(self) -> torch.Tensor:
        """Mean loss over the supervised tokens; packs the rows as the loader does."""
        return (self._packed() if "packed" in self.on else self._padded()) / self.case.supervised

    def _packed(self) -> torch.Tensor:
        max_tokens = len(self.case.items) * max(len(item.input_ids) for item in self.case.items)
        row_loss = PackedRowLoss(self.model, self.case.normalise, self.device)
        total = torch.zeros((), device=self.device)
        for row in pack(self.case.items, self.case.keys, max_tokens, "shared" in self.on):
            keys = list(dict.fromkeys(row.images))
            images = torch.stack([self.features[key] for key in keys]) if keys else None
            inputs = RowInputs.of(row, images, [keys.index(key) for key in row.images])
            total = total + row_loss(inputs)
        return total

    def _padded(self) -> torch.Tensor:
        batch = collate([(item, None) for item in self.case.items], self.case.normalise).to(self.device)
        keys = [key for key in self.case.keys if key is not None]
        features = torch.stack([self.features[key] for key in keys]) if self.features else self._tower(keys)
        embeds = self.model.embed(batch.input_ids, None, self.model.project(features))
        decoder, head = (self.model.language_model.get_decoder(), self.model.language_model.get_output_embeddings())
        hidden = decoder(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        supervised = batch.labels[:, 1:] != IGNORE_INDEX
        return linear_cross_entropy(hidden[:, :-1][supervised], head.weight, batch.labels[:, 1:][supervised])

    def inside(self) -> ExitStack:
        """Context of loss and backward pass."""
        stack = ExitStack()
        if "packed" in self.on:
            stack.enter_context(packed_attention(self.model.language_model, self.backend))
        return stack

    def step(self) -> float:
        """Forward, backward and update; returns the loss."""
        with self.inside():
            return _update(self.loss(), self.parameters, self.optimizer)


def _settings() -> TrainConfig:
    # so small that neither side leaves the initial weights
    return load_experiment("finetune", "mini").experiment.train.model_copy(update={"learning_rate": 1e-9})


def _update(loss: torch.Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def difference(case: Case, saving: str = ALL) -> dict[str, float]:
    """Relative difference of loss and projector gradient from transformers', before any step."""
    ours, peer = PackedStep(case, saving), TransformersStep(case)
    with ours.inside():
        mine = ours.loss()
        a = torch.autograd.grad(mine, list(case.model.multi_modal_projector.parameters()))
    theirs = peer.loss()
    b = torch.autograd.grad(theirs, list(peer.model.model.multi_modal_projector.parameters()))
    gradient = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))
    return {"loss": abs(mine.item() - theirs.item()) / abs(theirs.item()), "gradient": gradient}


# ------------------------------------------------------------------------------------------------ measuring


def tokens(case: Case, how: str = "shared") -> int:
    """Number of tokens: all (`samples`), in packed rows (`packed`), with shared prefixes (`shared`)."""
    if how == "samples":
        return sum(len(item.input_ids) for item in case.items)
    return sum(len(row.input_ids) for row in pack(case.items, case.keys, 10**9, how == "shared"))


def step_flops(ours: PackedStep) -> int:
    """FLOPs of the matrix products of forward and backward pass, as PyTorch counts them; the features are cached."""
    with FlopCounterMode(display=False) as counter, ours.inside():
        ours.loss().backward()
    ours.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def parts_of_step(ours: PackedStep, rounds: int = 5) -> dict[str, float]:
    """Median seconds of the parts of our step; another thread prefetches the batch."""
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    with ours.inside():
        for k in range(rounds + 1):
            marks = [time.perf_counter()]
            loss = ours.loss()
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(ours.parameters, 1.0)
            ours.optimizer.step()
            ours.optimizer.zero_grad(set_to_none=True)
            marks.append(time.perf_counter())
            for name, (begin, end) in zip(parts if k else (), itertools.pairwise(marks), strict=False):
                parts[name].append(end - begin)
    return {name: float(np.median(values)) for name, values in parts.items()}


def matmul_rate(like: torch.Tensor, height: int = 2048, clock: Clock = "wall") -> float:
    """Measured FLOP/s of a matrix product of `height` tokens with a square weight."""
    width = 1024 if like.device.type == "cpu" else 4096
    a, b = (torch.randn(n, width, device=like.device, dtype=like.dtype) for n in (height, width))
    seconds = all_in_turns({"matmul": lambda: a @ b}, 9, clock)["matmul"]
    return 2 * height * width**2 / float(np.median(seconds))


def peak_of_step(side: str, name: str, stage: int, samples: int, per_image: int, dtype: str, device: str) -> float:
    """Peak memory in MiB of the second step of one side, weights included; call it in a process of its own."""
    case = make_case(name, stage, samples, per_image, dtype, device)
    step = TransformersStep(case).step if side == PEER else PackedStep(case, side).step
    if side == PEER:
        case.model = None  # type: ignore[assignment]  # the peer has copied the weights
    step()
    return peak_mib(step, resolve_device(device))


def bench_train_step(
    model: Literal["mini", "135m", "7b"] = "mini",
    stage: Literal[1, 2] = 2,
    samples: int | None = None,
    per_image: int = 1,
    rounds: int = 3,
    clock: Clock = "cpu",
    savings: Sequence[str] = (ALL,),
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    peer: Literal["transformers"] = PEER,
    memory: bool = True,
) -> dict[str, Any]:
    """Time the step with each of some savings against transformers' step, interleaved, and measure both peaks.

    Args:
        model: size; other weights than mini's are random.
        stage: of the training.
        samples: of the optimizer step; None: 16 at mini, its runs' own global batch, and 8 elsewhere.
        per_image: samples of one image.
        rounds: timed turns.
        clock: computing time (cpu) or elapsed time (wall).
        savings: names in `SAVINGS`, each with all before it.
        dtype: of the weights.
        device: where both run.
        peer: what it is compared with.
        memory: measure the peaks too, each in a process of its own.

    Returns:
        The headline of the last saving, with `cases`: a row per saving, in the order of `savings`.

    Raises:
        TooNoisyError: as `steady_in_turns`.
    """
    name = model
    samples = samples or (16 if name == "mini" else 8)
    peak = partial(
        in_own_process, "benchmarks.train_step:peak_of_step", name=name, stage=stage, samples=samples,
        per_image=per_image, dtype=dtype, device=device,
    )  # fmt: skip
    # first, because the models that are timed below stay in memory
    peaks = {side: round(peak(side=side)) for side in (PEER, *savings)} if memory else {}
    case = make_case(name, stage, samples, per_image, dtype, device)
    differences = {saving: difference(case, saving) for saving in savings}
    ours = {saving: PackedStep(case, saving) for saving in savings}
    sides: dict[str, Callable[[], object]] = {PEER: TransformersStep(case).step}
    sides |= {saving: side.step for saving, side in ours.items()}
    for step in sides.values():
        step()
    seconds = steady_in_turns(sides, PEER, rounds, clock)
    theirs = peaks.get(PEER)
    rows = []
    for saving in savings:
        median = float(np.median(seconds[saving]))
        own = peaks.get(saving)
        rows.append(
            {
                "case": saving, "model": name, "stage": stage, "per_image": per_image, "dtype": dtype, "clock": clock,
                "samples": samples, "tokens": tokens(case, "samples"),
                "padding": round(case.padding, 3),
                "supervised": round(case.supervised / tokens(case, "samples"), 3),
                "ours": round(median, 4), "peer": round(float(np.median(seconds[PEER])), 4),
                **{name: round(value, 3) for name, value in ratios(seconds[saving], seconds[PEER]).items()},
                "peak_mib": own, "peer_peak_mib": theirs,
                "peak_ratio": round(own / theirs, 3) if own and theirs else None,
                "loss_difference": f"{differences[saving]['loss']:.1e}",
                **circumstances(resolve_device(device)),
            }
        )  # fmt: skip
    return headline(rows)
