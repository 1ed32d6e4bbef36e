"""Memory, disk, hours and dollars of a training run, from its configuration, before anything is loaded.

Hours and dollars are estimates from assumed rates (`planner.yaml`); no GPU run has confirmed them.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from math import ceil
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import torch

from companion.training_memory import FACTS, fixed_bytes, model_of, recomputes, row_bytes, setting_of
from llava_core import runtime
from llava_core.checkpoints.tokenizer import open_tokenizer, tokenizer_folder
from llava_core.config import RunConfig
from llava_core.constants import IGNORE_INDEX
from llava_core.ops.cpu_varlen import BLOCK, MAX_SAVED_BYTES
from llava_core.record import RunRecord
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, display_path, resolve_dtype
from llava_core.train.dataset import TrainingSet, load_samples, steps_of
from llava_core.train.loader import CACHED_LAYERS
from llava_core.train.processes import ranks_of

GIB = 2**30
MEASURED = 256  # samples whose length is measured


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
    tokenizer = open_tokenizer(folder)
    some: Any = found[:: ceil(len(found) / MEASURED)]
    no_images: Any = None
    measured = TrainingSet(some, tokenizer, no_images, config, model_of(config).n_image_tokens)
    items = []
    for k in range(len(some)):
        with suppress(DataError):  # preflight's part
            items.append(measured.encoded(k))
    lengths = sorted((len(item.input_ids) for item in items), reverse=True)
    supervised = sum(label != IGNORE_INDEX for item in items for label in item.labels)
    return counted._replace(tokens=sum(lengths) / len(items), supervised=supervised / sum(lengths), lengths=lengths)


def _row_tokens(config: RunConfig, data: Data) -> int:
    """Tokens of the longest row that a step can have."""
    samples = config.experiment.train.global_batch // ranks_of(config)
    longest = max(data.lengths, default=config.experiment.train.max_length)
    return max(longest, min(config.scale.row_tokens, sum(data.lengths[:samples]) or samples * longest))


def _feature_bytes(config: RunConfig, data: Data) -> float:
    """Bytes of the tower's features on disk; 0 if the trainer does not keep them."""
    repeated = config.experiment.train.epochs > 1 or data.repeated or len(config.scale.seeds) > 1
    model, size = model_of(config), resolve_dtype(config.dtype).itemsize
    width = model.n_image_tokens * model.vision_tower.config.hidden_size * len(CACHED_LAYERS)
    return data.images * width * size * float(repeated and model.feature_layer in CACHED_LAYERS)


def _memory(config: RunConfig, data: Data, on_gpu: bool, tokens: int) -> dict[str, float]:
    """GiB per process by part, for rows of so many tokens; `offloaded` is in the host's memory."""
    setting, parallel, model, reserve = setting_of(config), config.scale.parallel, model_of(config), FACTS["reserve"]
    parts = dict(fixed_bytes(setting, parallel.kind, ranks_of(config), parallel.offload))
    parts["activations"] = row_bytes(setting, tokens, max(1, round(tokens * data.supervised)))
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
    model, train, again = model_of(config), config.experiment.train, float(recomputes(config))
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


def _gpu_here() -> tuple[str, dict[str, float]]:
    """This machine's GPU with its own memory, and peak and price of the most alike; the default without a GPU."""
    default, known = FACTS["default_gpu"], FACTS["gpus"]
    if not torch.cuda.is_available():
        return default, known[default]
    device = torch.cuda.get_device_properties(0)
    memory = device.total_memory / GIB
    alike = [name for name in known if name.removeprefix("RTX-").partition("-")[0] in device.name] or [default]
    nearest = min(alike, key=lambda name: abs(known[name]["memory_gib"] - memory))
    return device.name, {**known[nearest], "memory_gib": memory}


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
        gpu: a GPU of `planner.yaml`; None: this machine's, or the default; none at a scale of a CPU.
        gpus, kind: another number of processes and another engine than the scale's.
        samples: training samples, instead of those of the data's files.
        price: USD per GPU and hour.

    Returns:
        memory_gib per process, limit_gib, fits, parts_gib; host_gib; disk_gib; state_gib (one saved state);
        row_tokens and largest_row_tokens; steps; hours and usd, with their lowest values; would_fit, for a run that
        does not; assumed.

    Raises:
        CompanionError: the combination is impossible, or nothing is known about the data or a model.
    """
    changes = {"scale.parallel.processes": gpus, "scale.parallel.nodes": gpus and 1, "scale.parallel.kind": kind}
    config = _changed(config, {field: value for field, value in changes.items() if value is not None})
    device, ranks, train = config.scale.device, ranks_of(config), config.experiment.train
    speed = _recorded_speed(config) if gpu is None else None
    if gpu is None and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        gpu, facts = _gpu_here()
    elif gpu is not None:
        if gpu not in FACTS["gpus"]:
            raise ConfigError(unknown("GPU", gpu, FACTS["gpus"]))
        facts = FACTS["gpus"][gpu]
    else:
        host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        speed_here = FACTS["cpu"]["tflops_per_thread"] * (config.scale.threads or os.cpu_count() or 1)
        facts = {"memory_gib": host_memory / ranks, "tflops": speed_here, "usd": 0.0}
    data, limit = _data(config, samples), facts["memory_gib"]

    row = _row_tokens(config, data)
    if config.scale.activation_checkpointing == "auto" and _total(_memory(config, data, gpu is not None, row)) > limit:
        config = _changed(config, {"scale.activation_checkpointing": "always"})  # as the trainer does, then
    parts, twice = (_memory(config, data, gpu is not None, n) for n in (row, 2 * row))
    memory = _total(parts)
    more = (limit - memory) * row / (_total(twice) - memory)  # tokens; each needs the same
    largest = max(0, int((row + more) // train.max_length)) * train.max_length

    flops = _flops(config, data)
    low, high = FACTS["utilisation"][config.experiment.stage]
    tokens = round(train.epochs * data.samples * data.tokens)
    least, most = (flops / (ranks * facts["tflops"] * 1e12 * share) / 3600 for share in (high, low))
    basis = f"{low:.0%} to {high:.0%} of the peak; no transfers of offloading; no GPU run has confirmed it"
    if speed is not None:
        least, most, basis = *2 * (tokens / speed / 3600,), f"{speed:.0f} tokens/s of a finished run"
    rate = ranks * (facts["usd"] if price is None else price)

    size, whole = resolve_dtype(config.dtype).itemsize, [*model_of(config).parameters()]
    trained = sum(p.numel() for p in whole if p.requires_grad) / GIB
    state = 3 * trained * (size if train.precision == "pure_bf16" else 4)
    full = "language_model" in train.trainable and train.adapters is None
    loads = 0 if config.scale.parallel.kind in ("fsdp2", "zero3") else sum(p.numel() for p in whole) * size / GIB
    host = memory if gpu is None else FACTS["reserve"]["host_gib"] + loads + parts["offloaded"]
    return {
        "run": f"{config.experiment.name} at {config.scale.name}", "gpu": gpu or "cpu", "processes": ranks,
        "kind": config.scale.parallel.kind, "offload": config.scale.parallel.offload,
        "activation_checkpointing": recomputes(config),
        "memory_gib": memory, "limit_gib": limit, "fits": memory <= limit, "parts_gib": parts, "host_gib": ranks * host,
        "disk_gib": {
            "features": _feature_bytes(config, data) / GIB, "saved states": (config.scale.states.keep + 1) * state,
            "checkpoint": trained * (size if full else 4),
        },
        "state_gib": state,
        "row_tokens": row, "largest_row_tokens": largest, "samples": data.samples, "tokens": tokens, "flops": flops,
        "steps": steps_of(data.samples, train),
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
    train, small, parallel = config.experiment.train, {"model.language_model": "vicuna-7b"}, "scale.parallel"
    more = ((n, nodes) for nodes, n in ((1, 2), (1, 4), (1, 8), (2, 8), (4, 8)) if n * nodes > ranks_of(config))
    more = ((n, nodes) for n, nodes in more if train.global_batch % (n * nodes) == 0)
    options: list[dict[str, Any]] = [
        {"scale.row_tokens": train.max_length},
        {"scale.activation_checkpointing": "always"},
        {f"{parallel}.kind": "fsdp2"},
        *({f"{parallel}.kind": kind, f"{parallel}.offload": True} for kind in ("fsdp2", "zero3")),
        *({f"{parallel}.kind": "fsdp2", f"{parallel}.processes": n, f"{parallel}.nodes": nodes} for n, nodes in more),
        small,
    ]
    if "language_model" in train.trainable:
        lora = train.adapters.model_dump() if train.adapters else {"r": 128, "alpha": 256, "dropout": 0.05}
        rate = {} if train.adapters else {"train.learning_rate": 2e-4}
        changes = [{"train.adapters": adapters, **rate} for adapters in (lora, {**lora, "bits": 4})]
        options += [*changes, *({**change, **small} for change in changes)]
    found: list[dict[str, Any]] = []
    for change in options:
        other = _changed(config, change)
        enough = f"{parallel}.nodes" in change and any(f"{parallel}.nodes" in option["set"] for option in found)
        if other == config or enough:
            continue
        parts = _memory(other, data, on_gpu, _row_tokens(other, data))
        if _total(parts) <= limit:
            on_host = parts["offloaded"] * ranks_of(other)
            found.append({"set": change, "memory_gib": _total(parts), "offloaded_gib": on_host})
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
        "host": f"{plan['host_gib']:.0f} GiB of memory",
        "disk": f"{sum(plan['disk_gib'].values()):.0f} GiB ({disk or 'nothing is saved'})",
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
    on_host = f" and {option['offloaded_gib']:.0f} GiB on the host" if option["offloaded_gib"] else ""
    return f"{option['memory_gib']:8.1f} GiB{on_host}  {words}"
