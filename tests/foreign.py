"""Tiny random checkpoints in the formats of other projects, written by hand and not by our writers."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file

from llava_core.checkpoints.base_models import base_hash
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, build
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models.llava import Llava

LLAMA_LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


DELIMITERS = ["<im_start>", "<im_end>"]


def random_model(root: Path, projector: str = "linear", feature_layer: int = -2, delimiters: bool = False) -> Loaded:
    """A random model on tiny base models in `root`; every parameter is random, so that a lost one is noticed."""
    bases = (str(root / "llm"), str(root / "clip")) if (root / "clip").exists() else tiny.base_models(root)
    torch.manual_seed(7)
    loaded = build(*bases, torch.float32, projector, feature_layer)
    if delimiters:  # two more words, as in the tokenizers of v0
        loaded.tokenizer.add_tokens(DELIMITERS, special_tokens=True)
        loaded.model.language_model.resize_token_embeddings(len(loaded.tokenizer))
    for name, p in loaded.model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.15)
    write_tower(loaded.model, root / "clip")
    loaded.manifest["base_hash"]["vision_tower"] = base_hash(bases[1])
    return loaded


def model_with_bases(root: Path, projector: str = "linear") -> tuple[Path, Loaded, Options]:
    """A random model, its language model as a LLaMA folder `base`, and the options that name both base models."""
    loaded = random_model(root, projector)
    base = write_llama(loaded, root / "base")
    return root, loaded, Options(base=str(base), vision_tower=str(root / "clip"))


def logits(loaded: Loaded) -> torch.Tensor:
    """Logits (1, T, V) of a fixed sequence with an image."""
    generator = torch.Generator().manual_seed(3)
    n, size = loaded.model.n_image_tokens, loaded.processor.size
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN_ID] * n, 9, 20, 30]])
    with torch.no_grad():
        output: torch.Tensor = loaded.model(ids, torch.randn(1, 3, size, size, generator=generator)).logits
    return output


def write_tower(model: Llava, folder: Path) -> None:
    """The tower as a CLIP checkpoint of the hub has it: `vision_model.` before each name, with a text half."""
    tensors = {f"vision_model.{n}": t.detach().clone() for n, t in model.vision_tower.state_dict().items()}
    tensors["logit_scale"] = torch.tensor(2.6)
    tensors["text_projection.weight"] = torch.randn(16, 24)
    (folder / "manifest.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def language_tensors(model: Llava) -> dict[str, torch.Tensor]:
    """The language model under the names of a LLaMA checkpoint."""
    llm = model.language_model
    tensors = {"model.embed_tokens.weight": llm.model.embed_tokens.weight, "model.norm.weight": llm.model.norm.weight}
    for k, layer in enumerate(llm.model.layers):
        for name in LLAMA_LAYER:
            tensors[f"model.layers.{k}.{name}.weight"] = layer.get_submodule(name).weight
        tensors[f"model.layers.{k}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)  # in files of 2023
    return {n: t.detach().clone() for n, t in {**tensors, "lm_head.weight": llm.lm_head.weight}.items()}


def write_llama(loaded: Loaded, folder: Path, offset: float = 0.0) -> Path:
    """The language model as a LLaMA of the hub; `offset` is added to every number."""
    folder.mkdir()
    tensors = {n: t + offset for n, t in language_tensors(loaded.model).items() if "inv_freq" not in n}
    save_file(tensors, folder / "model.safetensors")
    loaded.model.language_model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def projector_tensors(model: Llava, prefix: str = "model.mm_projector.") -> dict[str, torch.Tensor]:
    """The projector as the original code names it: `weight`, `bias`, or `0.weight` ... `2.bias`."""
    return {prefix + n: t.detach().clone() for n, t in model.multi_modal_projector.state_dict().items()}


def original_config(model: Llava, tower: str, **more: Any) -> dict[str, Any]:
    """`config.json` of the original code."""
    c = model.language_model.config
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers, "vocab_size": c.vocab_size,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "max_position_embeddings": c.max_position_embeddings, "rms_norm_eps": c.rms_norm_eps, "hidden_act": "silu",
        "torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048,
        "mm_vision_tower": tower, "mm_hidden_size": model.vision_tower.config.hidden_size,
        "mm_vision_select_layer": model.feature_layer, "mm_use_im_start_end": False, "use_mm_proj": True,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "square", "tune_mm_mlp_adapter": False, **more,
        **({} if model.projector_name == "linear" else {"mm_projector_type": "mlp2x_gelu"}),
    }  # fmt: skip


def copy_tokenizer(root: Path, folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (root / "llm" / file).exists():
            shutil.copyfile(root / "llm" / file, folder / file)


def write_original(loaded: Loaded, root: Path, folder: Path, shards: int = 1, tower: bool = False) -> Path:
    """The original format, `pytorch_model*.bin`; with `tower`, as runs that tuned or saved the tower wrote it."""
    folder.mkdir()
    tensors = {**language_tensors(loaded.model), **projector_tensors(loaded.model)}
    if tower:
        prefix = "model.vision_tower.vision_tower.vision_model."
        tensors |= {prefix + n: t.clone() for n, t in loaded.model.vision_tower.state_dict().items()}
    config = original_config(loaded.model, str(root / "clip"))
    (folder / "config.json").write_text(json.dumps(config))
    copy_tokenizer(root, folder)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin" for k in range(shards)]
    where = {n: names[k % shards] for k, n in enumerate(tensors)}
    for name in names:
        torch.save({n: t for n, t in tensors.items() if where[n] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(model: Any, folder: Path, base: Path | str, **settings: Any) -> Any:
    """A LoRA adapter saved by peft itself, its second matrices random; returns peft's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **settings})
    adapted = get_peft_model(copy.deepcopy(model), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2)
        elif ".modules_to_save." in name:
            torch.nn.init.normal_(p, 0.1, 0.2)
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return adapted


def write_mmpretrain(loaded: Loaded, folder: Path) -> Path:
    """A flat `.pth` as mmpretrain's converter writes it: the original names after `model.lang_encoder.`."""
    folder.mkdir()
    tensors = {**language_tensors(loaded.model), **projector_tensors(loaded.model)}
    torch.save({f"model.lang_encoder.{n}": t for n, t in tensors.items()}, folder / "llava_7b.pth")
    return folder


def write_hf(loaded: Loaded, root: Path, folder: Path) -> Path:
    """transformers' own class, saved by `save_pretrained`; the image token is in a vocabulary with padding rows."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

    model, linear = loaded.model, loaded.model.projector_name == "linear"
    vision, text = (getattr(model, part).config.to_dict() for part in ("vision_tower", "language_model"))
    side = vision["image_size"] // vision["patch_size"]
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text["vocab_size"] - 1, image_seq_length=side**2,
        vision_feature_layer=model.feature_layer, projector_hidden_act="linear" if linear else "gelu",
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(config)
    theirs.model.vision_tower.load_state_dict(model.vision_tower.state_dict())
    theirs.model.language_model.load_state_dict(model.language_model.model.state_dict())
    theirs.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
    box = theirs.model.multi_modal_projector
    if linear:
        box.linear_1.load_state_dict(model.multi_modal_projector.state_dict())
        torch.nn.init.eye_(box.linear_2.weight)
        torch.nn.init.zeros_(box.linear_2.bias)
    else:
        box.linear_1.load_state_dict(model.multi_modal_projector[0].state_dict())
        box.linear_2.load_state_dict(model.multi_modal_projector[2].state_dict())
    theirs.save_pretrained(folder)
    size = vision["image_size"]
    CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    ).save_pretrained(folder)  # fmt: skip
    copy_tokenizer(root, folder)
    return folder
