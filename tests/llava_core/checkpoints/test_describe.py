"""Weight maps in the sizes of the paper, from names and shapes without weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import foreign
import pytest
import torch

from companion.checkpoints.convert import key_map
from companion.checkpoints.writers import WRITERS
from llava_core.checkpoints.configs import tower_config
from llava_core.checkpoints.describe import Checkpoint, Description, check, expected_shapes
from llava_core.checkpoints.formats import original
from llava_core.checkpoints.formats.common import new_checkpoint
from llava_core.checkpoints.formats.names import export_name, import_name
from llava_core.checkpoints.tensors import LazyTensor
from llava_core.runtime import CheckpointError


@pytest.mark.parametrize(("layers", "width", "heads", "ffn"), [(32, 4096, 32, 11008), (40, 5120, 40, 13824)])
@pytest.mark.parametrize("name", ["original", "hf", "mmpretrain"])
def test_weight_map_of_7b_and_13b_is_complete(name, layers, width, heads, ffn) -> None:
    """Names and shapes without weights, as an index and the headers of the shards give them."""
    language = {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": ffn, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    tower = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    description = Description(language, tower, None, 1024, "mlp2x_gelu", -2, None)
    shapes = expected_shapes(description)
    rules = WRITERS[name].rules
    theirs = {export_name(n, rules): s for n, s in shapes.items()}
    assert len(theirs) == len(shapes) == 9 * layers + 3 + 4 + 24 * 16 + 7
    assert {import_name(n, rules) for n in theirs} == set(shapes)
    total = sum(torch.Size(s).numel() for s in shapes.values())
    assert total == {32: 7_062_902_784, 40: 13_350_839_296}[layers]
    lazy = {import_name(n, rules): LazyTensor(s, torch.float16, pytest.fail) for n, s in theirs.items()}
    checkpoint = Checkpoint(name, Path("7b"), description, lazy, {import_name(n, rules): n for n in theirs})
    check(checkpoint)
    lost = f"language_model.model.layers.{layers - 1}.self_attn.o_proj.weight"
    tensor = checkpoint.tensors.pop(lost)
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        check(checkpoint)
    checkpoint.tensors |= {lost: tensor, "multi_modal_projector.4.weight": tensor}
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.4\.weight is unknown"):
        check(checkpoint)


def test_released_7b_names_convert_completely(tmp_path) -> None:
    """Names of the index of a released 1.5, with a tower and the rotary frequencies of files of 2023."""
    ends = [f"{name}.weight" for name in foreign.LLAMA_LAYER]
    language = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}
    tower = tower_config(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        }
    )
    description = Description(language, tower, None, 1024, "mlp2x_gelu", -2, None)
    shapes = expected_shapes(description)
    rules = WRITERS["original"].rules
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.mm_projector.{k}.{end}" for k in (0, 2) for end in ("weight", "bias")]
    names += [f"model.layers.{k}.{end}" for k in range(32) for end in ends]
    inside = "model.vision_tower.vision_tower.vision_model."
    names += [inside + n.removeprefix("vision_tower.") for n in shapes if n.startswith("vision_tower.")]
    tensors = {n: LazyTensor(shapes[import_name(n, rules)], torch.float16, pytest.fail) for n in names}
    computed = LazyTensor((64,), torch.float32, pytest.fail)
    rotary = {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": computed for k in range(32)}
    rotary[inside + "embeddings.position_ids"] = computed

    def checkpoint(files: dict[str, LazyTensor]) -> Checkpoint:
        return new_checkpoint(
            "original", tmp_path, files, partial(import_name, rules=original.RULES), description, None, []
        )

    result = checkpoint(tensors | rotary)
    check(result)
    assert set(result.tensors) == set(shapes)
    assert set(result.left_out) == set(rotary)
    for to in ("hf", "mmpretrain"):
        theirs = [row[2] for row in key_map(result, to)]
        assert len(set(theirs)) == len(shapes)
    lost = tensors.pop("model.layers.31.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"layers\.31\.mlp\.up_proj\.weight is missing"):
        check(checkpoint(tensors))
    tensors |= {"model.layers.31.mlp.up_proj.weight": lost, "model.layers.32.mlp.up_proj.weight": lost}
    with pytest.raises(CheckpointError, match=r"model\.layers\.32\.mlp\.up_proj\.weight is unknown"):
        check(checkpoint(tensors))
