"""LoRA directories: the logits of peft's merge, and clear errors."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import change_json, loaded, root  # noqa: F401 - fixtures
from foreign import logits
from safetensors.torch import load_file, save_file

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load, save_checkpoint
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Loaded, Options]:
    """Base models, a random model, and its language model as a plain LLaMA folder `base`."""
    return foreign.model_with_bases(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def adapter(world) -> tuple[Path, torch.Tensor]:
    """A LoRA directory as the original trainer writes it (adapters by peft itself), and the logits of peft's merge."""
    from peft import LoraConfig, get_peft_model

    root, loaded, options = world
    folder = root / "lora"
    full = copy.deepcopy(loaded)
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(full.model.language_model, config)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    adapted.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = options.base
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    trained = foreign.projector_tensors(loaded.model, "base_model.model.model.mm_projector.")
    torch.save({n: t + 0.5 for n, t in trained.items()}, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    full.model.language_model = adapted.merge_and_unload()
    with torch.no_grad():
        for p in full.model.multi_modal_projector.parameters():
            p += 0.5
    return folder, logits(full)


def test_lora_merge_equals_peft(world, adapter, tmp_path) -> None:
    folder, wanted = adapter
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "lora"
    torch.testing.assert_close(logits(load(folder)), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, logits(world[1]), atol=1e-2)
    for to in ("llava", "original", "hf"):
        convert(folder, tmp_path / to, to)
        torch.testing.assert_close(logits(load(tmp_path / to))[..., : wanted.shape[-1]], wanted, rtol=1e-5, atol=1e-5)


def test_adapter_of_a_quantised_base_is_no_quantised_model(adapter, tmp_path) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "qlora")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(folder)), adapter[1], rtol=1e-5, atol=1e-5)


def test_lora_on_a_llava_base(world, adapter, tmp_path) -> None:
    root, loaded, _ = world
    folder, wanted = adapter
    base = foreign.write_original(loaded, root, tmp_path / "base")
    got = logits(load(folder, options=Options(base=str(base))))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"r": 0}, "give no scale"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"base_model_name_or_path": "nowhere/at-all"}, r"nowhere/at-all.* is not here; fix: --base"),
    ],
)
def test_unsupported_lora_settings_are_refused(adapter, change, message, tmp_path) -> None:
    shutil.copytree(adapter[0], tmp_path / "c")
    file = tmp_path / "c" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def test_incomplete_adapters_are_refused(world, adapter, tmp_path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(adapter[0], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks one of its two matrices"):
        open_checkpoint(folder)
    save_file(tensors | {name: tensors[name].flatten()}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="or their rank is not 4"):
        open_checkpoint(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match="could not use an image"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_change_their_base_are_refused(kind, loaded, root, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "llm")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=kind, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{kind}'"):
        open_checkpoint(tmp_path / "lora", Options(base=str(root / "llm")))


def test_lora_on_all_linear_layers_equals_peft(loaded, root, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, folder = foreign.write_llama(loaded, tmp_path / "base"), tmp_path / "lora"
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    adapted.save_pretrained(folder)
    torch.save(
        foreign.projector_tensors(loaded.model, "base_model.model.model.mm_projector."),
        folder / "non_lora_trainables.bin",
    )
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    merged = adapted.merge_and_unload()
    ours = load(folder, options=Options(base=str(base)))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_token", [True, False])
@pytest.mark.parametrize("padding_token", [True, False])
def test_lora_with_its_own_word_embeddings(world, patch_token, padding_token, tmp_path) -> None:
    """Trained with image delimiters: both embeddings are in non_lora_trainables.bin, with rows of the new tokens."""
    root, loaded, options = world
    assert options.base is not None
    folder, full = tmp_path / "lora", copy.deepcopy(loaded)
    tokens = ["[PAD]"] * padding_token + ["<im_patch>"] * patch_token + ["<im_start>", "<im_end>"]
    ids = range(len(loaded.tokenizer), len(loaded.tokenizer) + len(tokens))
    llm = full.model.language_model
    llm.resize_token_embeddings(ids[-1] + 1)
    trained = foreign.projector_tensors(full.model)
    for name, layer in (("model.embed_tokens", llm.get_input_embeddings()), ("lm_head", llm.get_output_embeddings())):
        layer.weight.data = torch.randn_like(layer.weight) * 0.2
        trained[f"{name}.weight"] = layer.weight.detach().clone()
    adapted = foreign.write_adapter(llm, folder, options.base)
    if padding_token or patch_token:  # else as recent versions of peft save them, in the adapter
        saved = {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_" in n}
        save_file(saved, folder / "adapter_model.safetensors")
        torch.save({f"base_model.model.{n}": t for n, t in trained.items()}, folder / "non_lora_trainables.bin")
    else:
        projector = {f"base_model.model.{n}": t for n, t in trained.items() if "proj" in n}
        torch.save(projector, folder / "non_lora_trainables.bin")
    fields = {"mm_use_im_start_end": True, "mm_use_im_patch_token": patch_token, "vocab_size": ids[-1] + 1}
    config = foreign.original_config(full.model, str(root / "clip"), **fields)
    (folder / "config.json").write_text(json.dumps(config))
    full.model.language_model = adapted.merge_and_unload()
    assert inspect(folder)["problems"] == []
    for to in (None, "llava", "original", "hf", "mmpretrain"):
        if to is not None:
            convert(folder, tmp_path / to, to)
        got = load(folder if to is None else tmp_path / to)
        assert got.tokenizer.convert_tokens_to_ids(tokens) == list(ids)
        assert got.tokenizer.convert_ids_to_tokens(5) == loaded.tokenizer.convert_ids_to_tokens(5)
        assert got.manifest["image_delimiters"] == ["<im_start>", "<im_end>"]
        assert got.manifest["template"] == ("v0_exact" if padding_token else "v1_tight")
        torch.testing.assert_close(logits(got), logits(full), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "original" / "added_tokens.json").read_text())["<im_end>"] == ids[-1]
    saved = {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_" in n}
    save_file(saved, folder / "adapter_model.safetensors")
    trained = {n: t for n, t in trained.items() if "proj" in n}
    torch.save({f"base_model.model.{n}": t for n, t in trained.items()}, folder / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match=r"word embeddings of 320 rows for 320 tokens .*complete non_lora"):
        open_checkpoint(folder)


def test_a_lora_folders_own_tokenizer_counts(world, adapter, tmp_path) -> None:
    folder = shutil.copytree(adapter[0], tmp_path / "c")
    foreign.copy_tokenizer(world[0], folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer == folder
    assert checkpoint.description.usage["template"] == "v0_exact_1_0"
    assert open_checkpoint(adapter[0]).description.usage["template"] == "v1"


OLD_KEYS = (  # names of transformers' LLaVA since 4.52 -> before
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


def old_key(name: str) -> str:
    """A tensor's name as peft saved it with transformers before 4.52."""
    name = name.removeprefix("base_model.model.")
    new = next(old + name.removeprefix(recent) for recent, old in OLD_KEYS if name.startswith(recent))
    return f"base_model.model.{new}"


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def exported(request, tmp_path_factory) -> tuple[Path, Loaded]:
    """A checkpoint as format hf, written by us."""
    root = tmp_path_factory.mktemp("exported")
    loaded = foreign.random_model(root, request.param)
    saved = save_checkpoint(root / "c", loaded, "full", template="v1", image_position="first")
    convert(saved, root / "hf", "hf")
    return root, loaded


TARGETS = {
    "all linear layers": {"target_modules": "all-linear"},
    "language model": {"target_modules": r".*language_model.*(q_proj|v_proj)"},
    "first layer of the projector": {"target_modules": ["linear_1", "o_proj"]},
    "projector saved": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    "tower and projector saved": {
        "target_modules": ["up_proj"], "modules_to_save": ["linear_1", "post_layernorm", "pre_layrnorm"]
    },
}  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("keys", ["old", "new"])
def test_adapters_on_an_hf_export_equal_peft(exported, targets, keys, tmp_path) -> None:
    from transformers import LlavaForConditionalGeneration

    root, loaded = exported
    folder = tmp_path / "lora"
    theirs = LlavaForConditionalGeneration.from_pretrained(root / "hf").eval()
    adapted = foreign.write_adapter(theirs, folder, root / "hf", **TARGETS[targets])
    if keys == "old":
        file = folder / "adapter_model.safetensors"
        save_file({old_key(n): t for n, t in load_file(file).items()}, file)
    merged = adapted.merge_and_unload()
    image = merged.config.image_token_id
    ids = torch.tensor([[1, 5, *[image] * loaded.model.n_image_tokens, 9, 20, 30]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = merged(input_ids=ids, pixel_values=pixels).logits[..., : loaded.model.language_model.config.vocab_size]
    ours = load(folder)
    assert ours.manifest["template"] == "v1"
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(wanted, logits(loaded), atol=1e-2)
    convert(folder, tmp_path / "merged", "hf")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, rtol=1e-5, atol=2e-5)
    if targets == "language model":
        convert(folder, tmp_path / "kept", "hf", keep_adapter=True)
        torch.testing.assert_close(logits(load(tmp_path / "kept" / "adapter")), wanted, rtol=1e-5, atol=2e-5)
    else:
        with pytest.raises(CheckpointError, match="fix: convert it without --keep-adapter"):
            convert(folder, tmp_path / "kept", "hf", keep_adapter=True)


MERGE = r"fix: merge it with peft \(merge_and_unload, save_pretrained\)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "word embeddings of another vocabulary"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A is no matrix of a linear layer"),
        ({"target_modules": ["lm_head"]}, "word embeddings of another vocabulary"),
        ({"use_dora": True}, "use_dora is True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern is"),
        ({"bias": "lora_only", "target_modules": ["linear_1"]}, "bias is 'lora_only'"),
    ],
)
def test_adapters_that_only_peft_can_merge_are_refused(exported, settings, message, tmp_path) -> None:
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(exported[0] / "hf")
    foreign.write_adapter(theirs, tmp_path / "lora", exported[0] / "hf", **settings)
    with pytest.raises(CheckpointError, match=f"{message}.*{MERGE}"):
        open_checkpoint(tmp_path / "lora")


def test_result_of_peft_itself_opens(exported, tmp_path) -> None:
    """The way out of the errors above; peft has adapted both layers of the projector."""
    from transformers import LlavaForConditionalGeneration

    root, loaded = exported
    theirs = LlavaForConditionalGeneration.from_pretrained(root / "hf").eval()
    adapted = foreign.write_adapter(theirs, tmp_path / "lora", root / "hf", target_modules="all-linear", use_dora=True)
    merged, folder = adapted.merge_and_unload(), shutil.copytree(root / "hf", tmp_path / "merged")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    merged.save_pretrained(folder)
    image = merged.config.image_token_id
    ids = torch.tensor([[1, 5, *[image] * loaded.model.n_image_tokens, 9, 20, 30]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = merged(input_ids=ids, pixel_values=pixels).logits[..., : loaded.model.language_model.config.vocab_size]
    assert inspect(folder)["problems"] == []
    torch.testing.assert_close(logits(load(folder)), wanted, rtol=1e-5, atol=2e-5)


def test_lost_modules_to_save_are_refused(exported, tmp_path) -> None:
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(exported[0] / "hf")
    foreign.write_adapter(theirs, tmp_path / "lora", exported[0] / "hf", modules_to_save=["multi_modal_projector"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lora_" in n}, file)
    with pytest.raises(CheckpointError, match="lacks multi_modal_projector, one of its modules_to_save"):
        open_checkpoint(tmp_path / "lora")


def test_trained_tower_beside_a_lora(world, adapter, tmp_path) -> None:
    root, loaded, _ = world
    folder = shutil.copytree(adapter[0], tmp_path / "c")
    trained = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    tower = {n: t + 0.1 for n, t in loaded.model.vision_tower.state_dict().items()}
    prefix = "base_model.model.model.vision_tower.vision_tower.vision_model."
    torch.save(trained | {prefix + n: t for n, t in tower.items()}, folder / "non_lora_trainables.bin")
    change_json(folder / "config.json", unfreeze_mm_vision_tower=True, mm_vision_tower="org/not-here")
    with pytest.raises(CheckpointError, match=r"contains a vision tower.*fix: --vision-tower DIR"):
        open_checkpoint(folder)
    ours = load(folder, options=Options(vision_tower=str(root / "clip")))
    assert all(torch.equal(t, tower[n]) for n, t in ours.model.vision_tower.state_dict().items())
