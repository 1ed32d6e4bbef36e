"""LoRA and QLoRA: peft's adapters on the decoder's linear layers, trained instead of the language model's weights."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from llava_core.config import AdapterConfig
from llava_core.models.llava import Llava
from llava_core.runtime import ConfigError


def add_adapters(model: Llava, config: AdapterConfig, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Put LoRA adapters on every linear layer of the decoder's layers, in place; the other weights there are frozen.

    An adapter's first matrix is random, by the seed, and its second zero, so that the outputs stay as they are. The
    language model keeps its class; the parameters of adapters have `.lora_` in their names.

    Args:
        dtype: of the adapters' parameters.

    Raises:
        ConfigError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError("train.adapters needs peft; fix: pip install peft, or train.adapters: null")
    from peft import LoraConfig, inject_adapter_in_model

    layers = model.language_model.get_decoder().layers
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    lora = LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=sorted(linear),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model.language_model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, wherever the model is
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model.language_model)
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
