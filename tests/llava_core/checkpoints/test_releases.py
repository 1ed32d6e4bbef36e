"""Details of the released folders that a reader can get wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from companion.checkpoints import delta, divergence
from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.chat import Assistant
from llava_core.checkpoints.base_models import base_hash
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load, save_checkpoint
from llava_core.checkpoints.open import detect_format, open_checkpoint
from llava_core.inference import prompt_ids
from llava_core.runtime import CheckpointError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


@pytest.fixture(scope="module")
def loaded(root: Path) -> Loaded:
    return foreign.model(root)


@pytest.fixture
def original(loaded, root, tmp_path) -> Path:
    return foreign.original(loaded, root, tmp_path / "original", shards=2)


def open_format(path: Path) -> str | None:
    detected = detect_format(path)
    return detected.name if detected else None


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_release_with_an_extra_projector_file(original, loaded) -> None:
    torch.save(foreign.projector(loaded.model), original / "mm_projector.bin")
    assert open_format(original) == "original"
    assert "language_model" in open_checkpoint(original).parts


def test_projector_file_under_its_published_name(loaded, root, tmp_path) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    torch.save(foreign.projector(loaded.model), folder / "LLaVA-7b-pretrain-projector-v0.bin")
    assert open_format(folder) == "projector"
    options = Options(base=str(root / "llm"), vision_tower=str(root / "clip"))
    assert open_checkpoint(folder, options).parts == ("multi_modal_projector", "language_model")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model like LLaMA's, trained here: bytes for unknown characters, `</s>` as BOS or not."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = [
        "A curious human talks with a helpful assistant that can see. USER: what color is the car ASSISTANT: red"
    ] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=310, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False,
        add_dummy_prefix=True, normalization_rule_name="identity",
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.mark.parametrize("model_type", ["llama", "llava", "llava_llama"])
def test_release_with_only_a_sentencepiece_tokenizer(original, sentencepiece_model, model_type, tmp_path) -> None:
    import sentencepiece

    for file in original.glob("tokenizer*"):
        file.unlink()
    shutil.copyfile(sentencepiece_model, original / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (original / "tokenizer_config.json").write_text(json.dumps(settings))
    change(original / "config.json", model_type=model_type)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model)).encode("what color is the car")
    assert inspect(original)["problems"] == []
    for to in ("llava", "hf"):
        convert(original, tmp_path / to, to)
    for folder in (original, tmp_path / "llava", tmp_path / "hf"):
        tokenizer = load(folder).tokenizer
        assert tokenizer("what color is the car", add_special_tokens=False)["input_ids"] == theirs
        assert tokenizer.bos_token_id == 1


def test_code_of_a_tokenizer_is_never_run(original, tmp_path) -> None:
    mark = tmp_path / "executed"
    (original / "evil.py").write_text(f"import os\nos.system('touch {mark}')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(original / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    code = f"import llava_core; llava_core.load({str(original)!r})"
    subprocess.run([sys.executable, "-c", code], input="y\n" * 9, text=True, capture_output=True, check=False)
    inspect(original)
    assert not mark.exists()


def test_export_declares_the_dtype_of_its_language_model(original, tmp_path) -> None:
    for file in original.glob("*.bin"):
        torch.save({n: t.half() for n, t in torch.load(file, weights_only=True).items()}, file)
    convert(original, tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    convert(original, tmp_path / "llava", "llava")
    assert json.loads((tmp_path / "llava" / "manifest.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("bos", "delimiters", "template", "position"),
    [("</s>", True, "v0_exact", "last"), ("</s>", False, "v0_exact", "last"), ("<s>", False, "v1", "first")],
)
def test_era_decides_template_and_image_position(original, bos, delimiters, template, position) -> None:
    (original / "special_tokens_map.json").write_text(json.dumps({"bos_token": bos}))
    change(original / "config.json", mm_use_im_start_end=delimiters)
    opened = open_checkpoint(original)
    assert opened.description.usage["template"] == template
    assert opened.description.usage["image_position"] == position
    assert any(note.startswith(f"template {template}") for note in opened.notes)
    changed = open_checkpoint(original, usage={"template": "v0"})
    assert not any(note.startswith("template") for note in changed.notes)


def test_missing_text_config_fields_have_defaults(loaded, root, tmp_path) -> None:
    """As llava-hf writes it: only what differs from transformers' defaults."""
    folder = foreign.hf(foreign.model(tmp_path / "b", "mlp2x_gelu"), tmp_path / "b", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_act", "rms_norm_eps", "attention_bias", "rope_parameters", "tie_word_embeddings"):
        config["text_config"].pop(name)
    config["text_config"]["torch_dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder)["problems"] == []


# ------------------------------------------------------------------------------------------------ others' changes


def test_export_changed_by_others_is_refused(original, tmp_path) -> None:
    convert(original, tmp_path / "hf", "hf")
    convert(original, tmp_path / "back", "original")
    change(tmp_path / "hf" / "config.json", vision_feature_layer=-1)
    with pytest.raises(CheckpointError, match=r"vision_feature_layer is -1 and was -2.*remove 'llava_core'"):
        open_checkpoint(tmp_path / "hf")
    change(tmp_path / "back" / "config.json", mm_vision_select_layer=-1)
    with pytest.raises(CheckpointError, match="mm_vision_select_layer is -1 and was -2"):
        open_checkpoint(tmp_path / "back")


def test_vision_towers_are_compared_by_their_files(original, root, tmp_path) -> None:
    convert(original, tmp_path / "c", "llava")
    copy = tmp_path / "copy"
    shutil.copytree(root / "clip", copy)
    assert load(tmp_path / "c", options=Options(vision_tower=str(copy)))
    tensors = load_file(copy / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="made with another vision tower"):
        load(tmp_path / "c", options=Options(vision_tower=str(copy)))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    change(tmp_path / "c" / "manifest.json", base_hash={"vision_tower": base_hash("someone/clip")})
    assert manifest["base_hash"]["vision_tower"].startswith("files:")
    opened = open_checkpoint(tmp_path / "c")
    assert any("taken unchecked" in note for note in opened.notes)


def test_unused_options_are_refused(original, root) -> None:
    with pytest.raises(CheckpointError, match="contains what --base names"):
        open_checkpoint(original, Options(base=str(root / "llm")))


def test_inspect_downloads_nothing(original, monkeypatch) -> None:
    import huggingface_hub

    change(original / "config.json", mm_vision_tower="someone/a-tower")
    asked = []

    def snapshot(source: str, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        raise OSError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (problem,) = inspect(original)["problems"]
    assert "someone/a-tower" in problem
    assert asked
    assert all(asked)


# ------------------------------------------------------------------------------------------------ delta and LoRA


def test_models_and_deltas_are_distinguished(original, loaded, root, tmp_path) -> None:
    base = foreign.plain_base(loaded, tmp_path / "base", offset=0.001)
    with pytest.raises(CheckpointError, match="is a model already, no delta"):
        delta.apply(str(base), original, tmp_path / "out")
    delta.make(str(base), original, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="is a delta already"):
        delta.make(str(base), tmp_path / "delta", tmp_path / "out")
    found = inspect(tmp_path / "delta")
    assert (found["layout"], found["problems"]) == ("delta", [])
    assert "fingerprint is recorded" in found["notes"][0]
    with pytest.raises(CheckpointError, match=r"not a folder with a LLaVA.*fix"):
        delta.apply(str(base), tmp_path / "nowhere", tmp_path / "out")


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

    base, folder = foreign.plain_base(loaded, tmp_path / "base"), tmp_path / "lora"
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    adapted.save_pretrained(folder)
    torch.save(
        foreign.projector(loaded.model, "base_model.model.model.mm_projector."),
        folder / "non_lora_trainables.bin",
    )
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    merged = adapted.merge_and_unload()
    ours = load(folder, options=Options(base=str(base)))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ odds and ends


def test_tensor_with_two_names_is_written_twice(original, tmp_path) -> None:
    merged = {n: t for f in original.glob("*.bin") for n, t in torch.load(f, weights_only=True).items()}
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    for file in original.glob("pytorch_model*"):
        file.unlink()
    torch.save(merged, original / "pytorch_model.bin")
    convert(original, tmp_path / "out", "llava")
    opened = open_checkpoint(tmp_path / "out")
    assert torch.equal(opened.tensors["language_model.lm_head.weight"].read(), merged["lm_head.weight"])


def test_comparison_of_no_module_is_an_error(original, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(divergence, "_in_memory", lambda name: f"nowhere.{name}")
    with pytest.raises(CheckpointError, match="nothing is compared"):
        convert(original, tmp_path / "hf", "hf", verify=True)
    assert not (tmp_path / "hf").exists()


def test_image_and_image_file_give_the_same_pixels(loaded, tmp_path) -> None:
    clear = Image.new("RGBA", (40, 32), (10, 20, 30, 0))
    clear.save(tmp_path / "clear.png")
    turned, exif = Image.new("RGB", (32, 40), (255, 255, 255)), Image.Exif()
    turned.paste((0, 0, 0), (0, 0, 32, 20))
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assistant = Assistant(loaded)
    for name in ("clear.png", "turned.jpg"):
        from_file, opened = (assistant.chat(p).image for p in (tmp_path / name, Image.open(tmp_path / name)))
        assert from_file is not None
        assert opened is not None
        assert from_file.tobytes() == opened.tobytes()


def test_paths_are_relative_to_the_working_folder(original, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("original").manifest["template"] == "v1"
    convert(Path("original"), Path("out"), "llava")
    assert prompt_ids(load("out"), [("what", None)], True)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load("~nobody-of-that-name/x")


@pytest.mark.parametrize(
    ("file", "text"),
    [("config.json", "[" * 100_000), ("config.json", '{"mm_vision_tower": 1' + "0" * 5000 + "}")],
)
def test_invalid_json_is_a_one_line_problem(original, file, text) -> None:
    (original / file).write_text(text)
    (problem,) = inspect(original)["problems"]
    assert "not JSON" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": 5}, "system is 5"),
        ({"base": {"vision_tower": 7}}, "not names of base models"),
        ({"base_hash": 3}, "base_hash"),
    ],
)
def test_usage_of_a_wrong_type_is_a_one_line_problem(loaded, tmp_path, fields, message) -> None:
    saved = save_checkpoint(tmp_path / "c", loaded, "full", template="v0")
    change(saved / "manifest.json", **fields)
    (problem,) = inspect(saved)["problems"]
    assert message in problem


def test_convert_into_an_empty_working_folder(original, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    convert(original, Path("."), "projector")
    assert os.listdir(tmp_path / "empty") != []
