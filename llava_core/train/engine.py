"""How the ranks of a run share its work: replicated weights, PyTorch's fully_shard (FSDP2), or DeepSpeed's ZeRO.

Each rank divides its loss by the supervised tokens of the global batch, so the sum of the ranks' gradients is the
gradient of one large batch: 1 x 32 == 2 ranks x 16, under every engine. The trainer does not know which one it has.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from llava_core.config import ParallelConfig, RunConfig, TrainConfig
from llava_core.runtime import ConfigError, rank, resolve_device, resolve_dtype, world_size
from llava_core.train.loader import RowInputs, padding_row
from llava_core.train.optimizer import make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str, Sequence[int]], torch.Tensor]
"""Returns the whole tensor of a name in a saved state; its shape is given for a check."""


class Engine:
    """One process (`none`), or replicated weights and one sum of the gradients per step (`ddp`).

    The wrapped module's forward is the loss of a packed row; its `model` is a `Llava`.
    """

    knows_norm_first = True  # before it updates the weights
    can_retry = True  # a step whose backward pass was interrupted
    maps_weights = False  # whether the language model is best left on disk until it is sharded

    def __init__(self, config: RunConfig) -> None:
        self.train, self.parallel = config.experiment.train, config.scale.parallel
        self.dtype = resolve_dtype(config.dtype)
        self.rank, self.world = rank(), world_size()
        self.device = start(config)

    def prepare(self, module: nn.Module) -> None:
        """Place or shard the module's weights, and make the optimizer of the trainable ones."""
        model: Any = module.model
        self.shapes = {name: _shape(p) for name, p in model.named_parameters()}  # of whole parameters
        self.module: Any = self._wrap(module)
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: self.shapes[name] for name in self.parameters}  # ZeRO's have no vision tower
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.optimizer: Any = self._make_optimizer()

    def _wrap(self, module: Any) -> Any:
        for part in (module.model.multi_modal_projector, module.model.language_model):
            part.to(self.device)
        return module

    def _make_optimizer(self) -> Any:
        return make_optimizer(list(self.trainable.values()), self.train)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a row's gradients; with `last`, those of all ranks are summed if they are not yet."""
        loss.backward()
        if last and self.world > 1:
            for p in self.trainable.values():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                dist.all_reduce(p.grad)

    def step(self, rate: float) -> float:
        """Clip the gradients, update the weights, discard the gradients; returns the norm before clipping.

        Gradients that are not finite are discarded without an update (by ZeRO after one).
        """
        norm = self._clipped_norm()
        if not math.isfinite(norm):
            self.discard_gradients()
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.discard_gradients()
        return norm

    def _clipped_norm(self) -> float:
        return float(_whole(nn.utils.clip_grad_norm_(list(self.trainable.values()), self.train.grad_clip)))

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def rows(self, rows: list[RowInputs], count: int) -> list[RowInputs]:
        """The rows of a step and, up to `count`, rows that add nothing: collectives need the same number per rank."""
        return [*rows, *(padding_row() for _ in range(count - len(rows)))]

    def all_gather(self, values: Sequence[float]) -> torch.Tensor:
        """The values of every rank, (world, n) in fp64 on the CPU."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return own[None]
        if dist.get_backend() == "nccl":
            own = own.to(self.device)
        out = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(out, own)
        return torch.stack(out).cpu()

    def local_weights(self) -> dict[str, torch.Tensor]:
        """This rank's part of the trained weights, as the optimizer updates them."""
        return {name: p.detach() for name, p in self.trainable.items()}

    def whole(self, name: str) -> torch.Tensor:
        """A parameter, not sharded, as the optimizer updates it; every rank must call it."""
        return _whole(self.parameters[name].detach())

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors of weights and optimizer moments, one at a time; every rank must iterate to the end."""
        for name, p in self.trainable.items():
            yield f"weights/{name}", self.whole(name)
            for moment in MOMENTS:
                yield f"{moment}/{name}", self._whole_moment(p, moment)

    def load_state(self, read: Read, step: int) -> None:
        """Continue from the whole tensors of `state` after optimizer step `step`, saved by any engine and world."""
        with torch.no_grad():
            for name, p in self.trainable.items():
                shape = self.shapes[name]
                p.copy_(self._own_part(p, read(f"weights/{name}", shape)))
                moments = {m: self._own_part(p, read(f"{m}/{name}", shape)).to(p.dtype) for m in MOMENTS}
                self.optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}

    def _whole_moment(self, p: torch.Tensor, moment: str) -> torch.Tensor:
        return _whole(self.optimizer.state[p][moment])

    def _own_part(self, p: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        return whole.to(p.device).clone()


PEAK_TFLOPS = {
    "H100 PCIe": 756, "H[12]00 NVL": 835, "H[12]00": 989, "A100": 312, "L40S": 362, "RTX 4090$": 165,
}  # fmt: skip
"""Dense bf16 of a GPU by a pattern of its name; the first that fits counts (data sheets)."""


def model_flops(engine: Engine, tokens_per_s: float) -> dict[str, float]:
    """`tflops` per rank: 2 per weight and token forward, 2 for activation and 2 for weight gradients; `mfu` on a GPU.

    Without attention; word embeddings do not count, and a shared prefix counts for each of its samples.
    """
    inner = {n: math.prod(shape) for n, shape in engine.shapes.items() if n.startswith("language_model.")}
    weights = sum(size for n, size in inner.items() if "embed_tokens" not in n)
    trained = sum(size for n, size in inner.items() if "embed_tokens" not in n and n in engine.trainable)
    tflops = (4 * weights + 2 * trained) * tokens_per_s / engine.world / 1e12
    name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else ""
    peak = next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, name)), None)
    return {"tflops": tflops} if peak is None else {"tflops": tflops, "mfu": tflops / peak}


class FullyShard(Engine):
    """FSDP2: weights, gradients and optimizer state are sharded; fp32 weights are gathered in the compute dtype.

    It is also the mechanism of mixed precision on one rank.
    """

    maps_weights = True
    can_retry = False

    def _wrap(self, module: Any) -> Any:
        return shard(module, self.train, self.parallel, self.device, self.dtype)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        (loss * self.world).backward()  # FSDP2 averages; it reduces every row, so that no whole gradient is kept

    def local_weights(self) -> dict[str, torch.Tensor]:
        trainable: dict[str, Any] = self.trainable
        return {name: p.detach().to_local() for name, p in trainable.items()}

    def _own_part(self, p: Any, whole: torch.Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        # no broadcast: every rank has read the same tensor
        part = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        return part.to(p.device)  # of an offloaded weight the CPU, and not the mesh's device


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shape(p: Any) -> tuple[int, ...]:
    state = getattr(p, "quant_state", None)  # of bitsandbytes, whose 4-bit weights are stored packed
    return tuple(p.shape if state is None else state.shape)


def shard(
    module: nn.Module, train: TrainConfig, parallel: ParallelConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Apply fully_shard to each decoder layer, the projector and the rest; the vision tower is left alone.

    Args:
        module: its forward is the loss, so that the output layer's weight, which the loss reads, is gathered there.
        dtype: of the arithmetic and of frozen weights.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    model: Any = module.model
    trained = dtype if train.precision == "pure_bf16" else torch.float32
    low = dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    options: dict[str, Any] = {
        "mesh": dist.init_device_mesh(device.type, (dist.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if parallel.offload else OffloadPolicy(),
    }  # fmt: skip

    def wrap(unit: nn.Module, policy: Any, **more: Any) -> None:
        for p in (p for p in unit.parameters() if p not in outside):
            if p.is_floating_point():  # converted unit by unit: weights mapped from disk never are in memory together
                p.data = p.data.to(trained if p.requires_grad else dtype)
        fully_shard(unit, mp_policy=policy, **options, **more)
        outside.update(unit.parameters())

    # the projector's output is a view, as of any linear layer on (N, P, D); nothing changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    outside = set(model.vision_tower.parameters())
    for layer in model.language_model.get_decoder().layers:
        wrap(layer, policy)
    wrap(model.multi_modal_projector, MixedPrecisionPolicy(cast_forward_inputs=False))  # computes in its own dtype
    wrap(module, policy, ignored_params=set(model.vision_tower.parameters()))
    return module


class Zero(Engine):
    """DeepSpeed's ZeRO, stage 2 (sharded gradients and optimizer state) or 3 (sharded weights, too)."""

    knows_norm_first = False
    can_retry = False

    def __init__(self, config: RunConfig) -> None:
        if config.scale.device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        os.environ.setdefault("LOCAL_RANK", "0")
        super().__init__(config)
        self.stage = int(self.parallel.kind[-1])
        self.maps_weights = self.stage == 3
        self.deepspeed = importlib.import_module("deepspeed")

    def _wrap(self, module: Any) -> Any:
        model = module.model
        parts = {n: p for n, p in model.named_parameters() if not n.startswith("vision_tower.")}
        self._originals = {name: p.data for name, p in parts.items() if p.requires_grad}
        for p in parts.values():
            if p.is_floating_point():  # one by one, since they may be mapped from disk
                p.data = p.data.to(self.device, self.dtype)
        tower = model.vision_tower
        del model.vision_tower  # outside of the module tree it is neither sharded nor moved
        object.__setattr__(model, "vision_tower", tower)
        return module

    def _make_optimizer(self) -> Any:
        deepspeed = self.deepspeed
        if self.device.type == "cpu":  # gloo does without an operation that DeepSpeed would compile for minutes
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        module: Any = self.module
        self.module, optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=super()._make_optimizer(), config=self._settings()
        )
        if self.stage == 3:  # the loss reads this weight outside of the layer's forward
            head = module.model.language_model.get_output_embeddings()
            deepspeed.zero.register_external_parameter(module, head.weight)
        if self.dtype != torch.float32:  # DeepSpeed's fp32 weights are copies of the rounded ones
            for name, original in self._originals.items():
                deepspeed.utils.safe_set_full_fp32_param(self.trainable[name], original.to(self.device, torch.float32))
        del self._originals
        return optimizer

    def _settings(self) -> dict[str, Any]:
        offload = {"device": "cpu", "pin_memory": self.device.type == "cuda"} if self.parallel.offload else None
        return {
            "train_micro_batch_size_per_gpu": 1,  # counts of rows are ours
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.train.grad_clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {"stage": self.stage, **({"offload_optimizer": offload} if offload else {})},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self.world)  # ZeRO averages

    def step(self, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def discard_gradients(self) -> None:
        self.module.zero_grad()

    def local_weights(self) -> dict[str, torch.Tensor]:
        if self.stage == 2:  # one flat tensor of all parts
            return {"language_model": self.optimizer.single_partition_of_fp32_groups[0]}
        return {name: self.deepspeed.utils.safe_get_local_fp32_param(p) for name, p in self.trainable.items()}

    def whole(self, name: str) -> torch.Tensor:
        p = self.parameters[name]
        if p.requires_grad:
            return self.deepspeed.utils.safe_get_full_fp32_param(p)
        with self.deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
            return p.detach().clone()

    def _whole_moment(self, p: torch.Tensor, moment: str) -> torch.Tensor:
        return self.deepspeed.utils.safe_get_full_optimizer_state(p, moment)

    def load_state(self, read: Read, step: int) -> None:
        utils = self.deepspeed.utils
        for name, p in self.trainable.items():
            utils.safe_set_full_fp32_param(p, read(f"weights/{name}", self.shapes[name]).to(self.device))
        # a step at rate 0, of a row without targets, makes the moments and copies fp32 weights to those of the forward
        self.backward(self.module(padding_row()), last=True)
        self.step(0.0)
        for name, p in self.trainable.items():
            for moment in MOMENTS:
                whole = read(f"{moment}/{name}", self.shapes[name])
                utils.safe_set_full_optimizer_state(p, whole.to(self.device), moment)
        for state in self.optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(step), device=state["exp_avg"].device)


def start(config: RunConfig) -> torch.device:
    """Choose this rank's device and join the process group that the launcher describes in the environment."""
    device, parallel = resolve_device(config.scale.device), config.scale.parallel
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if config.dtype == "float32" else "high")  # TF32
    if parallel.kind != "none" and not dist.is_initialized():
        alone: dict[str, Any] = (
            {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=parallel.timeout_s), **alone)
    return device


ENGINES = {"none": Engine, "ddp": Engine, "fsdp2": FullyShard, "zero2": Zero, "zero3": Zero}


def make_engine(config: RunConfig) -> Engine:
    """The engine of the scale's `parallel.kind`.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    kind = config.scale.parallel.kind
    if kind.startswith("zero"):
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"parallel.kind {kind} needs DeepSpeed ({error}); fix: pip install deepspeed") from error
    return ENGINES[kind](config)
