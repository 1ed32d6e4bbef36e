"""Memory, time and cost of a training run, from its configuration: no weights are loaded and no GPU is needed.

The model is built on the meta device and sharded among ranks that do not exist, as the trainer shards it. A packed row
then runs through one and two of its layers, and the bytes of all live tensors are counted. Hours and dollars are
estimates from assumed rates (`planner.yaml`); no GPU run has confirmed them.
"""

from __future__ import annotations

import json
import os
import shlex
import weakref
from collections.abc import Iterable, Mapping
from functools import cache, reduce
from math import ceil
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from llava_core import runtime
from llava_core.checkpoints.configs import build_on_meta, language_config, quiet_transformers, tower_config
from llava_core.checkpoints.files import read_config
from llava_core.checkpoints.tokenizer import open_tokenizer, tokenizer_folder
from llava_core.config import AdapterConfig, RunConfig
from llava_core.constants import IGNORE_INDEX
from llava_core.models.llava import Llava
from llava_core.ops.cpu_varlen import BLOCK, MAX_SAVED_BYTES
from llava_core.ops.linear_cross_entropy import linear_cross_entropy
from llava_core.record import RunRecord
from llava_core.registry import unknown
from llava_core.runtime import CompanionError, ConfigError, DataError, display_path, resolve_dtype
from llava_core.train.dataset import TrainingSet, load_samples
from llava_core.train.loader import CACHED_LAYERS

FACTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
GIB = 2**30
ATTENTION = "llava_planner"
NF4_BYTES = 0.5 + 4 / 64  # a weight of 4 bits, and its share of an fp32 scale per 64 weights
ZERO_BUCKET, ZERO_LIVE = 5e8, 1e9  # DeepSpeed's defaults: elements reduced at once, elements gathered at a time
MEASURED = 256  # samples whose length is measured

# ------------------------------------------------------------------------------------------------ memory


class _LiveBytes(TorchDispatchMode):
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


def _configuration(config: RunConfig, name: str) -> dict[str, Any]:
    """transformers' configuration of a base model: from its folder, or the known one of a model on the hub."""
    source = Path(config.model_source(name))
    return read_config(source, "config.json") if source.is_absolute() else dict(FACTS["models"][name])


class _Setting(NamedTuple):
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


def _setting(config: RunConfig) -> _Setting:
    model, train = config.experiment.model, config.experiment.train
    text = language_config(_configuration(config, model.language_model), model.language_model)
    tower = tower_config(_configuration(config, model.vision_tower))
    return _Setting(
        json.dumps(text), json.dumps(tower), model.projector, model.feature_layer, tuple(train.trainable),
        train.adapters.model_dump_json() if train.adapters else None, train.precision,
        config.scale.parallel.kind in ("none", "ddp"), _recomputes(config),
    )  # fmt: skip


def _build(setting: _Setting, layers: int | None = None) -> Llava:
    """The model without weights, or with so many layers and one in the tower; see `_model` for one to be read only."""
    text, tower = json.loads(setting.text), json.loads(setting.tower)
    if layers is not None:
        text["num_hidden_layers"], tower["num_hidden_layers"] = layers, 1
    with quiet_transformers(), torch.device("meta"):
        parts = build_on_meta("vision_tower", tower), build_on_meta("language_model", text)
        llava = Llava(*parts, setting.projector, setting.feature_layer)
        llava.set_trainable(setting.trainable)
        if setting.adapters is not None:
            from llava_core.train.adapters import add_adapters

            add_adapters(llava, AdapterConfig.model_validate_json(setting.adapters), seed=0)
    return llava


@cache
def _model_of(setting: _Setting) -> Llava:
    return _build(setting)


def _model(config: RunConfig) -> Llava:
    """The model of a run without weights; nobody may change it."""
    return _model_of(_setting(config)._replace(precision="", replicated=False, recomputes=False))


def ranks_of(config: RunConfig) -> int:
    """Number of processes of a run."""
    parallel = config.scale.parallel
    here = max(1, torch.cuda.device_count())
    return parallel.nodes * (here if parallel.processes == "gpus" else parallel.processes)


def _recomputes(config: RunConfig) -> bool:
    """Whether activations are recomputed from the first step on."""
    setting, full = config.scale.activation_checkpointing, "language_model" in config.experiment.train.trainable
    return setting == "always" or (setting == "auto" and full and ranks_of(config) > 1)


@cache
def _row_bytes(setting: _Setting, tokens: int, supervised: int) -> float:
    """What a packed row's forward and backward pass adds to weights and gradients at its peak."""
    one, two = (_peak(setting, layers, tokens, supervised) for layers in (1, 2))
    return one + (two - one) * (json.loads(setting.text)["num_hidden_layers"] - 1)


def _peak(setting: _Setting, layers: int, tokens: int, supervised: int) -> float:
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
    with _LiveBytes() as live:
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
def _fixed_bytes(setting: _Setting, kind: str, ranks: int, offload: bool) -> dict[str, float]:
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


def shard(module: Any, train: Any, parallel: Any, device: torch.device, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    tower = set(module.model.vision_tower.parameters())
    for unit in (*module.model.language_model.get_decoder().layers, module.model.multi_modal_projector, module):
        for p in (p for p in unit.parameters() if p not in tower and not hasattr(p, "to_local")):
            p.data = p.data.to(torch.float32 if p.requires_grad and train.precision != "pure_bf16" else dtype)
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=tower)


def _shard_sizes(model: Llava, setting: _Setting, ranks: int) -> dict[str, float]:
    """Elements of each parameter on rank 0 after the trainer's own `shard`, which replaces the model's parameters."""
    if dist.is_initialized():
        raise CompanionError("this process is a rank of a training run; fix: plan in another process")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        root = nn.Module()
        root.model = model
        shard(root, setting, None, torch.device("cpu"), setting.dtype)
        named: Any = [(name, p) for name, p in model.named_parameters() if not name.startswith("vision_tower.")]
        return {name: p.to_local().numel() for name, p in named}
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ data, time, cost


class Data(NamedTuple):
    """Samples of a run; `lengths` are tokens of some of them, longest first, and empty if nothing was measured."""

    samples: int
    images: int
    repeated: bool
    tokens: float
    supervised: float
    lengths: list[int]


def _data(config: RunConfig, samples: int | None) -> Data:
    """What the files of a run hold; what they or a tokenizer on this machine cannot tell comes from `planner.yaml`."""
    data, files = config.experiment.data, config.training_files
    facts, known = FACTS["data"].get(data.name), all(path.is_file() for path in files)
    if not known and (config.scale.miniature or facts is None):
        raise DataError(f"{display_path(files[0])}: not found; fix: run {data.written_by}, which writes it")
    if not known:
        total = round(sum(facts["kinds"][k] * share for k, share in data.subset.items())) or facts["samples"]
        held_out = 0 if data.validation_file else data.held_out * (total if data.held_out < 1 else 1)
        n = samples or min(total - round(held_out), data.limit or total)
        return Data(n, min(n, facts["images"]), facts["repeated"], facts["tokens"], facts["supervised"], [])
    found, language_model = load_samples(config)[0], config.experiment.model.language_model
    uses = [sample.image for sample in found if sample.image is not None]
    counted = Data(samples or len(found), len(set(uses)), len(set(uses)) < len(uses), 0, 0, [])
    if (folder := tokenizer_folder(Path(config.model_source(language_model)))) is None:
        if facts is None:
            raise DataError(
                f"no tokenizer counts the tokens of '{data.name}'; fix: name the folder of {language_model}"
            )
        return counted._replace(tokens=facts["tokens"], supervised=facts["supervised"])
    tokenizer = open_tokenizer(folder, language_config(_configuration(config, language_model), language_model))
    some: Any = found[:: ceil(len(found) / MEASURED)]
    no_images: Any = None
    measured = TrainingSet(some, tokenizer, no_images, config, _model(config).n_image_tokens)
    items = [measured.encoded(k) for k in range(len(some))]
    lengths = sorted((len(item.input_ids) for item in items), reverse=True)
    supervised = sum(label != IGNORE_INDEX for item in items for label in item.labels)
    return counted._replace(tokens=sum(lengths) / len(some), supervised=supervised / sum(lengths), lengths=lengths)


def _row_tokens(config: RunConfig, data: Data) -> int:
    """Tokens of the longest row that a step can have."""
    batch, ranks = config.experiment.train.global_batch, ranks_of(config)
    if batch % ranks:
        raise ConfigError(f"global batch of {batch} samples on {ranks} ranks; fix: a number of ranks that divides it")
    longest = max(data.lengths, default=config.experiment.train.max_length)
    return max(longest, min(config.scale.row_tokens, sum(data.lengths[: batch // ranks]) or batch // ranks * longest))


def _feature_bytes(config: RunConfig, data: Data) -> float:
    """Bytes of the tower's features on disk; 0 if the trainer does not keep them."""
    repeated = config.experiment.train.epochs > 1 or data.repeated or len(config.scale.seeds) > 1
    model, size = _model(config), resolve_dtype(config.dtype).itemsize
    width = model.n_image_tokens * model.vision_tower.config.hidden_size * len(CACHED_LAYERS)
    return data.images * width * size * float(repeated and model.feature_layer in CACHED_LAYERS)


def _memory(config: RunConfig, data: Data, on_gpu: bool, tokens: int) -> dict[str, float]:
    """GiB per process by part, for rows of so many tokens; `offloaded` is in the host's memory."""
    setting, parallel, model, reserve = _setting(config), config.scale.parallel, _model(config), FACTS["reserve"]
    parts = dict(_fixed_bytes(setting, parallel.kind, ranks_of(config), parallel.offload))
    parts["activations"] = _row_bytes(setting, tokens, max(1, round(tokens * data.supervised)))
    features = _feature_bytes(config, data)
    tower = sum(p.numel() for p in model.vision_tower.parameters()) * setting.dtype.itemsize
    if on_gpu:
        parts["tower"] = 0.0 if features else tower
        parts["reserve"] = reserve["gpu_gib"] * GIB + reserve["share"] * (sum(parts.values()) - parts["offloaded"])
    else:
        text, side = model.language_model.config, model.vision_tower.config.image_size
        scores = text.num_attention_heads * tokens * (data.tokens + BLOCK) / 2 * 4  # of a layer, saved if they are few
        if scores <= MAX_SAVED_BYTES:
            parts["activations"] += scores * (1 if setting.recomputes else text.num_hidden_layers)
        pixels = data.images * side**2 * 3 if config.scale.cache_pixels else 0
        parts |= {"tower": tower, "data": features + pixels, "reserve": reserve["cpu_gib"] * GIB}
    return {name: size / GIB for name, size in parts.items()}


def _total(parts: Mapping[str, float]) -> float:
    return sum(parts.values()) - parts["offloaded"]


def _flops(config: RunConfig, data: Data) -> float:
    """Floating-point operations of a run, with recomputed activations; shared prefixes are counted for each sample."""
    model, train, again = _model(config), config.experiment.train, float(_recomputes(config))
    text, tower = model.language_model.config, sum(p.numel() for p in model.vision_tower.parameters())
    sizes = {n: p.numel() for n, p in model.language_model.named_parameters() if p.dim() == 2 and ".layers." in n}
    lora = sum(n for name, n in sizes.items() if ".lora_" in name)
    linear = sum(sizes.values()) - lora + data.supervised * text.vocab_size * text.hidden_size
    learns = "language_model" in train.trainable and train.adapters is None
    # forward and gradients of activations; gradients of weights where they are trained
    per_token = 2 * linear * (2 + learns + again) + 2 * lora * (3 + again)
    # causal scores and values: half of 4 x length x width per layer, twice that backward
    per_token += 2 * data.tokens * text.hidden_size * text.num_hidden_layers * (3 + again)
    passes = 1 if _feature_bytes(config, data) else train.epochs
    return train.epochs * data.samples * data.tokens * per_token + 2 * tower * passes * data.images * (
        model.n_image_tokens + 1
    )


def _recorded_speed(config: RunConfig) -> float | None:
    """Tokens per second of the newest finished run of the same experiment, model and engine at this scale, if any."""

    def what(config: RunConfig) -> tuple[Any, ...]:
        model, train = config.experiment.model, config.experiment.train
        return model, train.trainable, train.adapters, train.precision, config.scale.parallel, config.fast

    runs = (runtime.ROOT / "runs" / config.experiment.name / config.scale.name).glob("*/summary.json")
    records = [RunRecord(path.parent) for path in sorted(runs, key=lambda path: path.stat().st_mtime)]
    speeds = [float(r.summary["tokens_per_s"]) for r in records if what(r.config) == what(config)]
    return speeds[-1] if speeds else None


def _changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with other values, by dotted field as for `--set`."""
    values = config.model_dump()
    for field, value in changes.items():
        section, _, name = (field if field.startswith("scale.") else f"experiment.{field}").rpartition(".")
        reduce(getitem, section.split("."), values)[name] = value
    return RunConfig.model_validate(values)


def plan_train(
    config: RunConfig,
    gpu: str | None = None,
    gpus: int | None = None,
    kind: str | None = None,
    samples: int | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """Plan a run before anything is loaded.

    Args:
        gpu: a GPU of `planner.yaml`; None: the default, or none at a scale of a CPU.
        gpus, kind: another number of processes and another engine than the scale's.
        samples: training samples, instead of those of the data's files.
        price: USD per GPU and hour.

    Returns:
        memory_gib per process, limit_gib, fits, parts_gib; host_gib; disk_gib; row_tokens and largest_row_tokens;
        steps; hours and usd, with their lowest values; would_fit, for a run that does not; assumed.

    Raises:
        CompanionError: the combination is impossible, or nothing is known about the data or a model.
    """
    changes = {"scale.parallel.processes": gpus, "scale.parallel.nodes": gpus and 1, "scale.parallel.kind": kind}
    config = _changed(config, {field: value for field, value in changes.items() if value is not None})
    device, ranks, train = config.scale.device, ranks_of(config), config.experiment.train
    if gpu is None and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        gpu = FACTS["default_gpu"]
    if gpu is not None and gpu not in FACTS["gpus"]:
        raise ConfigError(unknown("GPU", gpu, FACTS["gpus"]))
    memory_here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    threads = config.scale.threads or os.cpu_count() or 1
    cpu = {"memory_gib": memory_here / ranks, "tflops": FACTS["cpu"]["tflops_per_thread"] * threads, "usd": 0.0}
    facts = cpu if gpu is None else FACTS["gpus"][gpu]
    data, limit = _data(config, samples), facts["memory_gib"]

    row = _row_tokens(config, data)
    if config.scale.activation_checkpointing == "auto" and _total(_memory(config, data, gpu is not None, row)) > limit:
        config = _changed(config, {"scale.activation_checkpointing": "always"})  # as the trainer does, then
    parts, twice = (_memory(config, data, gpu is not None, n) for n in (row, 2 * row))
    memory = _total(parts)
    more = (limit - memory) * row / (_total(twice) - memory)  # tokens; each needs the same
    largest = max(0, int((row + more) // train.max_length)) * train.max_length

    flops, speed = _flops(config, data), _recorded_speed(config)
    low, high = FACTS["utilisation"][config.experiment.stage]
    tokens = round(train.epochs * data.samples * data.tokens)
    least, most = (flops / (ranks * facts["tflops"] * 1e12 * share) / 3600 for share in (high, low))
    basis = f"{low:.0%} to {high:.0%} of the peak; no GPU run has confirmed it"
    if speed is not None:
        least, most, basis = *2 * (tokens / speed / 3600,), f"{speed:.0f} tokens/s of a finished run"
    rate = ranks * (facts["usd"] if price is None else price)

    size, whole = resolve_dtype(config.dtype).itemsize, [*_model(config).parameters()]
    trained = sum(p.numel() for p in whole if p.requires_grad) / GIB
    state = 3 * trained * (size if train.precision == "pure_bf16" else 4)
    full = "language_model" in train.trainable and train.adapters is None
    loads = 0 if config.scale.parallel.kind in ("fsdp2", "zero3") else sum(p.numel() for p in whole) * size / GIB
    host = memory if gpu is None else FACTS["reserve"]["host_gib"] + loads + parts["offloaded"]
    return {
        "run": f"{config.experiment.name} at {config.scale.name}", "gpu": gpu or "cpu", "processes": ranks,
        "kind": config.scale.parallel.kind, "offload": config.scale.parallel.offload,
        "activation_checkpointing": _recomputes(config),
        "memory_gib": memory, "limit_gib": limit, "fits": memory <= limit, "parts_gib": parts, "host_gib": ranks * host,
        "disk_gib": {
            "features": _feature_bytes(config, data) / GIB, "state": state,
            "states": (config.scale.states.keep + 1) * state, "checkpoint": trained * (size if full else 4),
        },
        "row_tokens": row, "largest_row_tokens": largest, "samples": data.samples, "tokens": tokens, "flops": flops,
        "steps": ceil(data.samples / train.global_batch) * train.epochs,
        "hours": most, "hours_least": least, "usd": most * rate, "usd_least": least * rate,
        "would_fit": [] if memory <= limit else _would_fit(config, data, gpu is not None, limit),
        "assumed": {
            "hours": basis, "usd": FACTS["prices"] if price is None else f"{price} USD per GPU and hour",
            "tokens": f"{data.tokens:.0f} per sample, {data.supervised:.0%} supervised, "
            + ("measured" if data.lengths else "not measured"),
        },
    }  # fmt: skip


def _would_fit(config: RunConfig, data: Data, on_gpu: bool, limit: float) -> list[dict[str, Any]]:
    """Changes, as for `--set`, each of which makes a run fit."""
    train, small = config.experiment.train, {"model.language_model": "vicuna-7b"}
    numbers = [n for n in (2, 4, 8, 16, 32) if n > ranks_of(config) and train.global_batch % n == 0]
    options: list[dict[str, Any]] = [
        {"scale.row_tokens": train.max_length},
        {"scale.activation_checkpointing": "always"},
        {"scale.parallel.kind": "fsdp2"},
        *({"scale.parallel.kind": kind, "scale.parallel.offload": True} for kind in ("fsdp2", "zero3")),
        *({"scale.parallel.kind": "fsdp2", "scale.parallel.processes": n} for n in numbers),
        small,
    ]
    if "language_model" in train.trainable and train.adapters is None:
        adapters = [{"r": 128, "alpha": 256, "dropout": 0.05, **bits} for bits in ({}, {"bits": 4})]
        lora = [{"train.adapters": adapter, "train.learning_rate": 2e-4} for adapter in adapters]
        options += [*lora, *({**change, **small} for change in lora)]
    found = []
    for change in options:
        other = _changed(config, change)
        memory = _total(_memory(other, data, on_gpu, _row_tokens(other, data)))
        if other != config and memory <= limit:
            found.append({"set": change, "memory_gib": memory})
    return found


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan as a short table."""
    parts, disk = (
        ", ".join(f"{name} {size:.1f}" for name, size in plan[group].items() if size >= 0.05)
        for group in ("parts_gib", "disk_gib")
    )
    rows = {
        "run": f"{plan['run']}: {plan['processes']} x {plan['gpu']}, {plan['kind']}{' with offload' * plan['offload']}",
        "memory": f"{plan['memory_gib']:.1f} of {plan['limit_gib']:.1f} GiB per process ({parts})",
        "host, disk": f"{plan['host_gib']:.0f} GiB of memory; GiB on disk: {disk or 0}",
        "row_tokens": f"{plan['row_tokens']}; {plan['largest_row_tokens']} would fit",
        "steps": f"{plan['steps']} for {plan['samples']} samples ({plan['assumed']['tokens']})",
        "hours": f"{plan['hours_least']:.1f} to {plan['hours']:.1f} ({plan['assumed']['hours']})",
        "USD": f"{plan['usd_least']:.0f} to {plan['usd']:.0f} ({plan['assumed']['usd']})",
    }
    lines = [f"{name:12} {text}" for name, text in rows.items()]
    if not plan["fits"]:
        lines += ["it does not fit; what would:", *map(_option_text, plan["would_fit"])]
    return "\n".join(lines)


def _option_text(option: Mapping[str, Any]) -> str:
    values = {field: v if isinstance(v, str) else json.dumps(v) for field, v in option["set"].items()}
    words = " ".join(f"--set {shlex.quote(f'{field}={value}')}" for field, value in values.items())
    return f"{option['memory_gib']:8.1f} GiB  {words}"
