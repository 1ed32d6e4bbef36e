"""Conversion between all formats: equal logits, equal tensors, and an error for any that is wrong."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from checkpoint_fixtures import (  # noqa: F401 - fixtures
    BITS,
    adapted,
    bases,
    change_json,
    edit_tensors,
    intact,
    loaded,
    needed_options,
    original,
    root,
    world,
    write_checkpoint,
)
from foreign import logits
from safetensors import safe_open

from companion.checkpoints.convert import convert, key_map
from companion.checkpoints.divergence import first_divergence
from companion.checkpoints.inspection import inspect
from companion.checkpoints.writers import WRITERS, Writer
from llava_core.checkpoints.describe import Checkpoint, Description, Options
from llava_core.checkpoints.formats.common import CheckpointFormat, new_checkpoint
from llava_core.checkpoints.formats.names import import_name
from llava_core.checkpoints.load import build, load, save_checkpoint
from llava_core.checkpoints.open import FORMATS, detect_format, open_checkpoint
from llava_core.checkpoints.tensors import LazyTensor
from llava_core.checkpoints.tokenizer import copy_tokenizer, tokenizer_folder
from llava_core.runtime import CheckpointError, ConfigError

SOURCES = ("original", "original with tower", "mmpretrain", "hf", "llava", "projector")


COMPLETE_FORMATS = [name for name, writer in WRITERS.items() if not writer.only_required_parts]


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_converts_to_every_other(world, name, tmp_path) -> None:
    root, loaded, options = world
    source, options = write_checkpoint(name, loaded, root, tmp_path / "source"), needed_options(options, name)
    wanted = logits(loaded)
    checkpoint = open_checkpoint(source, options)
    detected = detect_format(source)
    assert detected is not None
    assert checkpoint.format == detected.name == name.split(" ")[0]
    torch.testing.assert_close(logits(load(source, options=options)), wanted, rtol=0, atol=0)
    for to in COMPLETE_FORMATS:
        target = tmp_path / to
        named = replace(options, vision_tower=str(root / "clip")) if (name, to) == ("hf", "original") else options
        report = convert(source, target, to, named, shard_bytes=20_000)
        repeated = open_checkpoint(target)
        assert first_divergence(checkpoint, repeated) is None
        assert set(repeated.tensors) >= set(checkpoint.tensors)
        assert {n.split(".")[0] for n in set(repeated.tensors) - set(checkpoint.tensors)} <= {"vision_tower"}
        assert report["parameters"] == repeated.parameters
        back = logits(load(target))
        torch.testing.assert_close(back, wanted, rtol=0, atol=0)  # bitwise: equal shapes, equal weights
        second = convert(target, tmp_path / f"{to}-again", "original", Options(vision_tower=str(root / "clip")))
        assert second["left_out"] == {}  # what was dropped (inv_freq) was dropped once
        assert first_divergence(checkpoint, open_checkpoint(tmp_path / f"{to}-again")) is None


def test_projector_file_round_trip(world, tmp_path) -> None:
    root, loaded, options = world
    source = write_checkpoint("original", loaded, root, tmp_path / "source")
    convert(source, tmp_path / "p", "projector")
    names = set(torch.load(tmp_path / "p" / "mm_projector.bin", weights_only=True))
    assert names == {f"model.mm_projector.{n}" for n, _ in loaded.model.multi_modal_projector.named_parameters()}
    torch.testing.assert_close(logits(load(tmp_path / "p", options=options)), logits(loaded), rtol=0, atol=0)
    single = open_checkpoint(tmp_path / "p")
    assert single.parts == ("multi_modal_projector",)
    with pytest.raises(CheckpointError, match=r"no language model.*--base"):
        convert(tmp_path / "p", tmp_path / "q", "hf", Options(vision_tower=options.vision_tower))


def npz_format() -> tuple[CheckpointFormat, Writer]:
    """Reader and writer of a format of one NumPy archive and our description, as a contributor would add it."""

    def read(path: Path, options: Options) -> Checkpoint:
        description = Description.from_dict(json.loads((path / "about.json").read_text()), path / "about.json")
        arrays = dict(np.load(path / "weights.npz"))
        tensors = {name: LazyTensor.of(torch.from_numpy(array)) for name, array in arrays.items()}
        return new_checkpoint("npz", path, tensors, lambda name: name, description, tokenizer_folder(path), [])

    def write(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
        np.savez(folder / "weights.npz", **{n: t.read().numpy() for n, t in checkpoint.tensors.items()})
        (folder / "about.json").write_text(json.dumps(checkpoint.description.to_dict()))
        copy_tokenizer(checkpoint.tokenizer, folder)

    def detect(path: Path) -> bool:
        return (path / "weights.npz").exists()

    return CheckpointFormat("npz", detect, read), Writer("a NumPy archive", write)


def test_new_format_is_one_reader_and_one_writer(world, tmp_path, monkeypatch) -> None:
    root, loaded, _ = world
    source = write_checkpoint("original", loaded, root, tmp_path / "source")
    with pytest.raises(ConfigError, match="unknown checkpoint format 'npz'"):
        convert(source, tmp_path / "npz", "npz")
    reader, writer = npz_format()
    monkeypatch.setattr("llava_core.checkpoints.open.FORMATS", (*FORMATS, reader))
    monkeypatch.setitem(WRITERS, "npz", writer)
    convert(source, tmp_path / "npz", "npz")
    convert(tmp_path / "npz", tmp_path / "back", "original")
    torch.testing.assert_close(logits(load(tmp_path / "npz")), logits(loaded), rtol=0, atol=0)
    assert first_divergence(open_checkpoint(source), open_checkpoint(tmp_path / "back")) is None


KEYS = {
    "original": "model.layers.1.mlp.up_proj.weight",
    "mmpretrain": "model.lang_encoder.model.layers.0.mlp.up_proj.weight",
    "hf": "language_model.model.layers.1.self_attn.q_proj.weight",
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "renamed"])
def test_wrong_tensor_is_named_in_the_error(world, intact, name, wrong, tmp_path) -> None:
    import shutil

    folder, key, options = tmp_path / "c", KEYS[name], needed_options(world[2], name)
    shutil.copytree(intact[name], folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if wrong in ("missing", "renamed"):
            taken = tensors.pop(key)
        if wrong == "renamed":
            tensors[key.replace("_proj", "_porj")] = taken
        if wrong == "extra":
            tensors[key.replace("weight", "bias")] = torch.zeros(3)
        if wrong == "shape":
            tensors[key] = tensors[key][:-1].clone()

    edit_tensors(folder, change)
    ours = import_name(key, WRITERS[name].rules)
    named = {"missing": ours, "renamed": ours, "extra": key.replace("weight", "bias"), "shape": key}[wrong]
    for act in (lambda: load(folder, options=options), lambda: convert(folder, tmp_path / "out", "llava", options)):
        with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
            act()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_swapped_tensors_are_detected_after_writing(world, intact, tmp_path, monkeypatch) -> None:
    writer = WRITERS["original"]

    def swapped(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
        t = checkpoint.tensors
        a, b = (f"language_model.model.layers.{k}.mlp.gate_proj.weight" for k in (0, 1))
        changed = Checkpoint(**{**vars(checkpoint), "tensors": {**t, a: t[b], b: t[a]}})
        writer.write(changed, folder, shard_bytes)

    monkeypatch.setitem(WRITERS, "original", replace(writer, write=swapped))
    with pytest.raises(
        CheckpointError, match=r"not the same: language_model\.model\.layers\.0\.mlp\.gate_proj\.weight"
    ):
        convert(intact["hf"], tmp_path / "out", "original", Options(vision_tower=world[2].vision_tower))
    assert not (tmp_path / "out").exists()


def test_shards_are_small_and_in_order(intact, tmp_path) -> None:
    convert(intact["original"], tmp_path / "out", "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5
    assert files[0].endswith(f"-of-{len(files):05d}.safetensors")
    kept = {}
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            kept |= dict.fromkeys(shard.keys(), file)
    assert kept == index["weight_map"]


def test_conversion_needs_memory_for_one_shard(intact, tmp_path) -> None:
    """The peak size of live tensors, counted in the calls of the writer."""
    alive, most = 0, 0

    def counted(tensor: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            nonlocal alive, most
            value = tensor.read().clone()
            alive += value.numel() * value.itemsize
            most = max(most, alive)

            def gone(size: int = value.numel() * value.itemsize) -> None:
                nonlocal alive
                alive -= size

            import weakref

            weakref.finalize(value, gone)
            return value

        return LazyTensor(tensor.shape, tensor.dtype, read)

    checkpoint = open_checkpoint(intact["original"])
    checkpoint.tensors = {n: counted(t) for n, t in checkpoint.tensors.items()}
    folder = tmp_path / "out"
    folder.mkdir()
    WRITERS["original"].write(checkpoint, folder, 20_000)
    largest = max(t.bytes for t in checkpoint.tensors.values())
    assert most <= 20_000 + 2 * largest
    assert most < sum(t.bytes for t in checkpoint.tensors.values()) / 2


def test_weight_map_has_all_three_names(intact) -> None:
    rows = key_map(open_checkpoint(intact["original"]), "hf")
    by_name = {row[1]: row for row in rows}
    row = by_name["language_model.model.layers.0.mlp.up_proj.weight"]
    assert row == (
        "model.layers.0.mlp.up_proj.weight", row[1], "language_model.model.layers.0.mlp.up_proj.weight", (64, 32)
    )  # fmt: skip


def test_existing_target_is_not_overwritten(intact, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(intact["hf"], tmp_path / "out", "llava")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_tied_embeddings_are_stored_once(tmp_path) -> None:
    loaded = foreign.random_model(tmp_path)
    llm = loaded.model.language_model
    llm.config.tie_word_embeddings = True
    llm.lm_head.weight = llm.model.embed_tokens.weight
    saved = save_checkpoint(tmp_path / "c", loaded, "full", template="v0")
    checkpoint = open_checkpoint(saved)
    assert "language_model.lm_head.weight" not in checkpoint.tensors
    second = load(saved)
    torch.testing.assert_close(logits(second), logits(loaded), rtol=0, atol=0)
    convert(saved, tmp_path / "hf", "hf")
    back = logits(load(tmp_path / "hf"))
    torch.testing.assert_close(back, logits(loaded), rtol=0, atol=0)


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
    change_json(original / "config.json", model_type=model_type)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model)).encode("what color is the car")
    assert inspect(original)["problems"] == []
    for to in ("llava", "hf"):
        convert(original, tmp_path / to, to)
    for folder in (original, tmp_path / "llava", tmp_path / "hf"):
        tokenizer = load(folder).tokenizer
        assert tokenizer("what color is the car", add_special_tokens=False)["input_ids"] == theirs
        assert tokenizer.bos_token_id == 1


def test_export_declares_the_dtype_of_its_language_model(original, tmp_path) -> None:
    for file in original.glob("*.bin"):
        torch.save({n: t.half() for n, t in torch.load(file, weights_only=True).items()}, file)
    convert(original, tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    convert(original, tmp_path / "llava", "llava")
    assert json.loads((tmp_path / "llava" / "manifest.json").read_text())["dtype"] == "float16"


def test_export_changed_by_others_is_refused(original, tmp_path) -> None:
    convert(original, tmp_path / "hf", "hf")
    convert(original, tmp_path / "back", "original")
    change_json(tmp_path / "hf" / "config.json", vision_feature_layer=-1)
    with pytest.raises(CheckpointError, match=r"vision_feature_layer is -1 and was -2.*remove 'llava_core'"):
        open_checkpoint(tmp_path / "hf")
    change_json(tmp_path / "back" / "config.json", mm_vision_select_layer=-1)
    with pytest.raises(CheckpointError, match="mm_vision_select_layer is -1 and was -2"):
        open_checkpoint(tmp_path / "back")


def test_tensor_with_two_names_is_written_twice(original, tmp_path) -> None:
    merged = {n: t for f in original.glob("*.bin") for n, t in torch.load(f, weights_only=True).items()}
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    for file in original.glob("pytorch_model*"):
        file.unlink()
    torch.save(merged, original / "pytorch_model.bin")
    convert(original, tmp_path / "out", "llava")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert torch.equal(checkpoint.tensors["language_model.lm_head.weight"].read(), merged["lm_head.weight"])


def test_convert_into_an_empty_working_folder(original, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    convert(original, Path("."), "projector")
    assert os.listdir(tmp_path / "empty") != []


@pytest.mark.parametrize("bits", BITS)
def test_peft_reads_the_export_for_transformers(bases, bits, tmp_path) -> None:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    loaded = adapted(bases, bits)
    path = save_checkpoint(tmp_path / "c", loaded, "adapter", template="v0", image_position="first")
    target = tmp_path / "hf"
    convert(path, target, "hf", keep_adapter=True)
    quantised = {} if bits is None else {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )}  # fmt: skip
    theirs = LlavaForConditionalGeneration.from_pretrained(target, dtype=torch.float32, **quantised)
    if bits is not None:  # else bitsandbytes evaluates with scales in bf16
        for module in theirs.modules():
            module.support_avx512bf16_for_cpu = False
    peft = PeftModel.from_pretrained(theirs, target / "adapter").eval()
    image = theirs.config.image_token_id
    ids = torch.tensor([[1, 5, *[image] * loaded.model.n_image_tokens, 9, 20, 30]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = peft(input_ids=ids, pixel_values=pixels).logits[..., : loaded.model.language_model.config.vocab_size]
    torch.testing.assert_close(got, logits(loaded), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load(target / "adapter")), logits(loaded), rtol=1e-5, atol=1e-5)
    convert(path, tmp_path / "merged", "hf")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(loaded), rtol=1e-5, atol=1e-5)


def test_keeping_an_adapter_needs_one_and_the_format_hf(bases, tmp_path) -> None:
    loaded = build(*bases, torch.float32)
    path = save_checkpoint(tmp_path / "c", loaded, "full", template="v0", image_position="first")
    with pytest.raises(CheckpointError, match="has no adapter"):
        convert(path, tmp_path / "out", "hf", keep_adapter=True)
    with pytest.raises(CheckpointError, match="fix: --to hf"):
        convert(path, tmp_path / "out", "llava", keep_adapter=True)
