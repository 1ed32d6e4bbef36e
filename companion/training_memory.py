"""Memory of a training step per process, counted on the meta device.

The model is sharded among ranks that do not exist, as the trainer shards it; a packed row runs through one and two of
its layers, and the bytes of all live tensors are counted, so that no formula has to follow the model's code.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from torch import distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from llava_core.checkpoints.configs import build_on_meta, language_config, quiet_transformers, tower_config
from llava_core.checkpoints.files import read_config
from llava_core.config import AdapterConfig, RunConfig
from llava_core.models.llava import Llava
from llava_core.ops.linear_cross_entropy import linear_cross_entropy
from llava_core.runtime import CompanionError
from llava_core.train.adapters import add_adapters
from llava_core.train.engine import shard
from llava_core.train.processes import ranks_of

FACTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("planner.yaml").read_text())
ATTENTION = "llava_planner"
NF4_BYTES = 0.5 + 4 / 64  # a weight of 4 bits, and its share of an fp32 scale per 64 weights
ZERO_BUCKET, ZERO_LIVE = 5e8, 1e9  # DeepSpeed's defaults: elements reduced at once, elements gathered at a time


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs | self.known:  # neither a view nor in place
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """The memory of attention without T x T scores: saves queries, keys, values, outputs and logsumexp."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, length, size = q.shape
        out = q.new_empty(rows, length, heads, size)
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


AttentionInterface.register(ATTENTION, lambda module, q, k, v, mask, **kwargs: (_Attention.apply(q, k, v), None))
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def configuration(config: RunConfig, name: str) -> dict[str, Any]:
    """transformers' configuration of a base model: from its folder, or the known one of a model on the hub."""
    source = Path(config.model_source(name))
    return read_config(source, "config.json") if source.is_absolute() else dict(FACTS["models"][name])


class Setting(NamedTuple):
    """What decides the tensors of a model and of a row in it; `text` and `tower` are transformers' configurations."""

    text: str
    tower: str
    projector: str
    feature_layer: int
    trainable: tuple[str, ...]
    adapters: str | None
    precision: str
    replicated: bool
    recomputes: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "float32" else torch.bfloat16


def setting_of(config: RunConfig) -> Setting:
    model, train = config.experiment.model, config.experiment.train
    text = language_config(configuration(config, model.language_model), model.language_model)
    tower = tower_config(configuration(config, model.vision_tower))
    return Setting(
        json.dumps(text), json.dumps(tower), model.projector, model.feature_layer, tuple(train.trainable),
        train.adapters.model_dump_json() if train.adapters else None, train.precision,
        config.scale.parallel.kind in ("none", "ddp"), recomputes(config),
    )  # fmt: skip


def _build(setting: Setting, layers: int | None = None) -> Llava:
    """The model without weights, or with so many layers; the one of `model_of` is shared."""
    text, tower = json.loads(setting.text), json.loads(setting.tower)
    if layers is not None:
        text["num_hidden_layers"], tower["num_hidden_layers"] = layers, 1
    with quiet_transformers(), torch.device("meta"):
        parts = build_on_meta("vision_tower", tower), build_on_meta("language_model", text)
        llava = Llava(*parts, setting.projector, setting.feature_layer)
        llava.set_trainable(setting.trainable)
        if setting.adapters is not None:
            add_adapters(llava, AdapterConfig.model_validate_json(setting.adapters), seed=0)
    return llava


@cache
def _cached_model(setting: Setting) -> Llava:
    return _build(setting)


def model_of(config: RunConfig) -> Llava:
    """The model of a run without weights; nobody may change it."""
    return _cached_model(setting_of(config)._replace(precision="", replicated=False, recomputes=False))


def recomputes(config: RunConfig) -> bool:
    """Whether activations are recomputed from the first step on."""
    setting, full = config.scale.activation_checkpointing, "language_model" in config.experiment.train.trainable
    return setting == "always" or (setting == "auto" and full and ranks_of(config) > 1)


@cache
def row_bytes(setting: Setting, tokens: int, supervised: int) -> float:
    """What a packed row's forward and backward pass adds to weights and gradients at its peak."""
    one, two = (_peak(setting, layers, tokens, supervised) for layers in (1, 2))
    return one + (two - one) * (json.loads(setting.text)["num_hidden_layers"] - 1)


def _peak(setting: Setting, layers: int, tokens: int, supervised: int) -> float:
    model, dtype = _build(setting, layers), setting.dtype
    language_model = model.language_model
    for name, p in model.named_parameters():
        fp32 = p.requires_grad and setting.precision == "mixed_bf16" and (setting.replicated or "projector" in name)
        p.data = p.data.to(torch.float32 if fp32 else dtype)
        p.grad = torch.empty_like(p) if p.requires_grad else None  # of earlier rows
    language_model.train().set_attn_implementation(ATTENTION)
    if setting.recomputes:
        enable = getattr(language_model, "activation_checkpointing_enable", None)
        (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
    ids, positions = (torch.empty(1, n, dtype=torch.long, device="meta") for n in (tokens, supervised))
    shape = (ceil(tokens / model.n_image_tokens), model.n_image_tokens, model.vision_tower.config.hidden_size)
    no_mask = torch.empty(1, 1, 1, 1, device="meta")  # without it transformers looks at values
    with LiveBytes() as live:
        visual_tokens = model.project(torch.empty(shape, dtype=dtype, device="meta"))
        embeds = language_model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids < 0)[..., None], visual_tokens.to(embeds.dtype))
        hidden = language_model.get_decoder()(
            inputs_embeds=embeds, position_ids=ids, attention_mask=no_mask, use_cache=False
        ).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, positions[0])
        linear_cross_entropy(hidden, language_model.get_output_embeddings().weight, positions[0]).backward()
    return live.peak


@cache
def fixed_bytes(setting: Setting, kind: str, ranks: int, offload: bool) -> dict[str, float]:
    """Bytes per GPU that do not depend on the row; `offloaded` ones are on the host instead.

    ZeRO has fp32 weights beside those in the compute dtype; fully_shard has the former only and gathers the latter.
    """
    model, low = _build(setting), setting.dtype.itemsize
    named = {name: p for name, p in model.named_parameters() if not name.startswith("vision_tower.")}
    trained = {name for name, p in named.items() if p.requires_grad}
    size = {name: float(low) for name in named}  # of an element in the compute dtype
    if setting.adapters is not None and json.loads(setting.adapters)["bits"] == 4:
        size |= {n: NF4_BYTES for n, p in named.items() if ".layers." in n and p.dim() == 2 and n not in trained}
    whole = {name: p.numel() for name, p in named.items()}
    local = {name: n / ranks if kind == "zero3" else n for name, n in whole.items()}
    if kind == "fsdp2":
        local = _shard_sizes(model, setting, ranks)

    def total(counts: Mapping[str, float], names: Iterable[str]) -> float:
        return sum(counts[name] * size[name] for name in names)

    n, frozen = sum(whole[name] for name in trained), total(local, named.keys() - trained)
    inner = [name for name in named if ".layers." in name]
    layers = len(model.language_model.get_decoder().layers)
    copy, masters, gathered = 0.0, float(sum(local[name] for name in trained)), 0.0
    if kind.startswith("zero"):
        bucket = low * min(ZERO_BUCKET, n)
        gathered = bucket + (low * min(ZERO_LIVE, sum(whole.values())) if kind == "zero3" else bucket)
        copy, masters = total(local, trained), n / ranks
    elif kind == "fsdp2":
        # two layers at a time, and one layer's gradients before and in their sum in fp32; always embedding and head
        learning = total(whole, trained & {*inner}) * (1 + 4 / low)
        gathered = (2 * total(whole, inner) + learning) / layers + total(whole, named.keys() - {*inner})
    width = low if setting.precision == "pure_bf16" else 4
    moving = {"weights": masters * width, "gradients": masters * width, "optimizer": 2 * masters * width}
    held = {**moving, "weights": moving["weights"] + copy, "frozen": frozen}
    if not offload:
        return {**held, "gathered": gathered, "offloaded": 0.0}
    left = {**dict.fromkeys(held, 0.0), "weights": copy, "frozen": 0.0 if kind == "fsdp2" else frozen}
    return {**left, "gathered": gathered, "offloaded": sum(held.values()) - sum(left.values())}


def _shard_sizes(model: Llava, setting: Setting, ranks: int) -> dict[str, float]:
    """Elements of each parameter on rank 0 after the trainer's own `shard`, which replaces the model's parameters."""
    if dist.is_initialized():
        raise CompanionError("this process is a rank of a training run; fix: plan in another process")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        root: Any = nn.Module()
        root.model = model
        train: Any = SimpleNamespace(precision=setting.precision)
        parallel: Any = SimpleNamespace(offload=False)
        shard(root, train, parallel, torch.device("cpu"), setting.dtype)
        named: Any = [(name, p) for name, p in model.named_parameters() if not name.startswith("vision_tower.")]
        return {name: p.to_local().numel() for name, p in named}
    finally:
        dist.destroy_process_group()
