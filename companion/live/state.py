"""What a page needs to run a checkpoint in the browser: weights, shapes, tokenizer, template, image settings."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save

from llava_core.checkpoints.load import Loaded
from llava_core.data.conversation import TEMPLATES
from llava_core.models.generation import end_ids
from llava_core.runtime import DataError

PARTS = {
    "vision_tower.": "vision.",
    "multi_modal_projector.": "projector.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "text.",
}
"""Prefixes of the model's parameters and the names that engine.mjs reads them by."""
LARGEST = 6e6  # parameters; two bytes each, and a third more in base64


def live_state(loaded: Loaded) -> dict[str, Any]:
    """Return `state` (JSON) and `weights` (safetensors) with which `open` of engine.mjs starts a conversation.

    The weights are stored in bf16; compare answers with a model that was loaded from the same rounded weights.

    Raises:
        DataError: a model of another kind than the miniature's (CLIP tower, Llama without grouped heads), a larger one,
            or a template or image setting that engine.mjs does not have.
    """
    model, manifest = loaded.model, loaded.manifest
    template = TEMPLATES.get(manifest.get("template", "v0"))
    text, vision = model.language_model.config, model.vision_tower.config
    rope = text.rope_parameters
    tokenizer = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    refused = {
        f"{sum(p.numel() for p in model.parameters()):,} parameters": sum(p.numel() for p in model.parameters())
        > LARGEST,
        f"language model '{text.model_type}'": text.model_type != "llama",
        f"tower with '{vision.hidden_act}'": vision.hidden_act != "quick_gelu",
        "grouped attention heads": text.num_key_value_heads != text.num_attention_heads,
        "tied output weights": text.tie_word_embeddings,
        f"rope '{rope['rope_type']}'": rope["rope_type"] != "default",
        f"template '{template.name}'": template.encoder is not None or template.tight_images,
        f"image mode '{loaded.processor.mode}'": loaded.processor.mode != "crop",
        "image delimiters": manifest.get("image_delimiters") is not None,
        f"image position '{manifest.get('image_position')}'": manifest.get("image_position", "data") == "random",
        "a tokenizer other than byte-level BPE": (tokenizer["pre_tokenizer"] or {}).get("type") != "ByteLevel"
        or tokenizer["normalizer"] is not None,
    }
    if wrong := [what for what, is_wrong in refused.items() if is_wrong]:
        raise DataError(f"the live page runs checkpoints of the miniature's kind; this one has {', '.join(wrong)}")
    side = manifest.get("image_position", "data")
    system = manifest.get("system")
    state = {
        "facts": {
            "vision": {
                "image_size": vision.image_size, "patch_size": vision.patch_size, "hidden": vision.hidden_size,
                "heads": vision.num_attention_heads, "layers": vision.num_hidden_layers, "eps": vision.layer_norm_eps,
            },
            "text": {
                "hidden": text.hidden_size, "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
                "eps": text.rms_norm_eps, "theta": rope["rope_theta"], "positions": text.max_position_embeddings,
            },
            "projector": model.projector_name,
            "feature_layer": model.feature_layer,
        },
        "template": {
            "opening": template.opening.format(system=template.system if system is None else system),
            "opening_next": template.opening_next, "bridge": template.bridge, "closing": template.closing,
            "stop": template.stop, "eos": template.eos, "image_side": template.image_side if side == "data" else side,
            "bos_id": loaded.tokenizer.bos_token_id, "eos_id": loaded.tokenizer.eos_token_id,
            "end_ids": sorted(end_ids(model, loaded.tokenizer)),
        },
        "tokenizer": {
            "added_tokens": [{"id": t["id"], "content": t["content"]} for t in tokenizer["added_tokens"]],
            "model": {"vocab": tokenizer["model"]["vocab"], "merges": tokenizer["model"]["merges"]},
        },
        "image": {"size": loaded.processor.size, "mean": loaded.processor.mean, "std": loaded.processor.std},
    }  # fmt: skip
    return {"state": state, "weights": save(_tensors(model))}


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters in bf16 by the names of engine.mjs; the tower's layers after the feature layer are left out."""
    found = {}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), None)
        if prefix is None or name.endswith("position_ids"):
            continue
        own = PARTS[prefix] + name.removeprefix(prefix).removeprefix("vision_model.")
        if not own.startswith("vision.post_layernorm"):
            found[own] = tensor.detach().to(torch.bfloat16).contiguous()
    return found
