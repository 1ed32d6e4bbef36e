"""Round trips between all formats: equal logits, the same tensors, and an error for any that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from companion.checkpoints.convert import convert, key_map, targets
from companion.checkpoints.divergence import first_divergence, first_module, verify_export
from llava_core.checkpoints.base_models import load_language_model
from llava_core.checkpoints.configs import tower_config
from llava_core.checkpoints.describe import Checkpoint, Description, Options, check, expected_shapes
from llava_core.checkpoints.formats.common import CheckpointFormat, new_checkpoint
from llava_core.checkpoints.formats.names import export_name, import_name
from llava_core.checkpoints.formats.original import from_original
from llava_core.checkpoints.load import Loaded, load, save_checkpoint
from llava_core.checkpoints.open import FORMATS, detect_format, format_named, open_checkpoint
from llava_core.checkpoints.tensors import LazyTensor
from llava_core.checkpoints.tokenizer import copy_tokenizer, tokenizer_folder
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.runtime import CheckpointError, ConfigError

SOURCES = ("original", "original with tower", "mmpretrain", "hf", "llava", "projector")
WHOLE = [name for name in targets() if not format_named(name).only_required_parts]


def logits(loaded: Loaded) -> torch.Tensor:
    """Logits of a fixed sequence with an image."""
    generator = torch.Generator().manual_seed(3)
    n, size = loaded.model.n_image_tokens, loaded.processor.size
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN_ID] * n, 9, 20, 30]])
    with torch.no_grad():
        found: torch.Tensor = loaded.model(ids, torch.randn(1, 3, size, size, generator=generator)).logits
    return found


def needed(options: Options, name: str) -> Options:
    """Options for what a format does not contain; unused ones are refused."""
    return options if name in ("mmpretrain", "projector") else Options()


def write(name: str, loaded: Loaded, root: Path, folder: Path) -> Path:
    """A checkpoint in one of `SOURCES`."""
    if name == "llava":
        return save_checkpoint(folder, loaded, "full", template="v1", image_position="first")
    if name == "hf":
        return foreign.hf(loaded, root, folder)
    if name == "mmpretrain":
        return foreign.mmpretrain(loaded, folder)
    if name == "projector":  # its language model is in the folder `base`
        folder.mkdir()
        torch.save(foreign.projector(loaded.model), folder / "mm_projector.bin")
        return folder
    return foreign.original(loaded, root, folder, shards=3, tower=name.endswith("tower"))


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def world(request, tmp_path_factory) -> tuple[Path, Loaded, Options]:
    """A folder with base models, a random model on them, and the options that name the bases."""
    root = tmp_path_factory.mktemp(request.param)
    loaded = foreign.model(root, request.param)
    base = foreign.plain_base(loaded, root / "base")
    return root, loaded, Options(base=str(base), vision_tower=str(root / "clip"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_converts_to_every_other(world, name, tmp_path) -> None:
    root, loaded, options = world
    source, options = write(name, loaded, root, tmp_path / "source"), needed(options, name)
    wanted = logits(loaded)
    opened = open_checkpoint(source, options)
    detected = detect_format(source)
    assert detected is not None
    assert opened.format == detected.name == name.split(" ")[0]
    torch.testing.assert_close(logits(load(source, options=options)), wanted, rtol=0, atol=0)
    for to in WHOLE:
        target = tmp_path / to
        report = convert(source, target, to, options, shard_bytes=20_000)
        again = open_checkpoint(target)
        assert first_divergence(opened, again) is None
        assert set(again.tensors) >= set(opened.tensors)
        assert {n.split(".")[0] for n in set(again.tensors) - set(opened.tensors)} <= {"vision_tower"}
        assert report["parameters"] == again.parameters
        back = logits(load(target))
        torch.testing.assert_close(back[..., : wanted.shape[-1]], wanted, rtol=0, atol=0)
        second = convert(target, tmp_path / f"{to}-again", "original")
        assert second["left_out"] == {}  # what was dropped (inv_freq) was dropped once
        assert first_divergence(opened, open_checkpoint(tmp_path / f"{to}-again")) is None


def test_projector_file_round_trip(world, tmp_path) -> None:
    root, loaded, options = world
    source = write("original", loaded, root, tmp_path / "source")
    convert(source, tmp_path / "p", "projector")
    names = set(torch.load(tmp_path / "p" / "mm_projector.bin", weights_only=True))
    assert names == {f"model.mm_projector.{n}" for n, _ in loaded.model.multi_modal_projector.named_parameters()}
    torch.testing.assert_close(logits(load(tmp_path / "p", options=options)), logits(loaded), rtol=0, atol=0)
    alone = open_checkpoint(tmp_path / "p")
    assert alone.parts == ("multi_modal_projector",)
    with pytest.raises(CheckpointError, match=r"no language model.*--base"):
        convert(tmp_path / "p", tmp_path / "q", "hf", Options(vision_tower=options.vision_tower))


def test_projector_file_with_word_embeddings(world, tmp_path) -> None:
    """v0's script extracted all rows, later ones the two rows of the image delimiters."""
    _, loaded, options = world
    words = loaded.model.language_model.get_input_embeddings().weight.detach()
    base = tmp_path / "base"
    tokenizer = load_language_model(options.base, torch.float32)[1]
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    config = loaded.model.language_model.config.to_dict() | {"vocab_size": len(tokenizer)}
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(base)
    tensors = {n: t for n, t in foreign.language(loaded.model).items() if "inv_freq" not in n}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(2, tensors[name].shape[1])])
    save_file(tensors, base / "model.safetensors")
    options = Options(base=str(base), vision_tower=options.vision_tower)
    file, rows = tmp_path / "projector.bin", torch.randn(2, words.shape[1])
    torch.save({**foreign.projector(loaded.model), "model.embed_tokens.weight": rows}, file)
    opened = open_checkpoint(file, options)
    table = opened.tensors["language_model.model.embed_tokens.weight"].read()
    torch.testing.assert_close(table, torch.cat([words, rows]))
    assert opened.description.usage["image_delimiters"] == ["<im_start>", "<im_end>"]
    full = torch.randn(len(tokenizer), words.shape[1])
    torch.save({**foreign.projector(loaded.model), "model.embed_tokens.weight": full}, file)
    table = open_checkpoint(file, options).tensors["language_model.model.embed_tokens.weight"].read()
    torch.testing.assert_close(table, full)
    torch.save({**foreign.projector(loaded.model), "model.embed_tokens.weight": full[:-1]}, file)
    with pytest.raises(CheckpointError, match="vocabulary was extended"):
        open_checkpoint(file, options)


def npz_format() -> CheckpointFormat:
    """A format of one NumPy archive and our description, as a contributor would add it."""

    def read(path: Path, options: Options) -> Checkpoint:
        description = Description.from_dict(json.loads((path / "about.json").read_text()), path / "about.json")
        arrays = dict(np.load(path / "weights.npz"))
        tensors = {name: LazyTensor.of(torch.from_numpy(array)) for name, array in arrays.items()}
        return new_checkpoint("npz", path, tensors, lambda name: name, description, tokenizer_folder(path), [])

    def write(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
        np.savez(folder / "weights.npz", **{n: t.read().numpy() for n, t in checkpoint.tensors.items()})
        (folder / "about.json").write_text(json.dumps(checkpoint.description.to_dict()))
        copy_tokenizer(checkpoint.tokenizer, folder)

    return CheckpointFormat("npz", "a NumPy archive", lambda path: (path / "weights.npz").exists(), read, write)


def test_new_format_is_one_entry_in_the_tuple(world, tmp_path, monkeypatch) -> None:
    root, loaded, _ = world
    source = write("original", loaded, root, tmp_path / "source")
    with pytest.raises(ConfigError, match="unknown checkpoint format 'npz'"):
        convert(source, tmp_path / "npz", "npz")
    monkeypatch.setattr("llava_core.checkpoints.open.FORMATS", (*FORMATS, npz_format()))
    convert(source, tmp_path / "npz", "npz")
    convert(tmp_path / "npz", tmp_path / "back", "original")
    torch.testing.assert_close(logits(load(tmp_path / "npz")), logits(loaded), rtol=0, atol=0)
    assert first_divergence(open_checkpoint(source), open_checkpoint(tmp_path / "back")) is None


def test_safetensors_precede_an_index_of_another_format(world, tmp_path) -> None:
    root, loaded, _ = world
    source = write("original", loaded, root, tmp_path / "source")  # pytorch_model.bin.index.json and shards
    tensors = {n: t + 1 for n, t in foreign.language(loaded.model).items()} | foreign.projector(loaded.model)
    save_file(tensors, source / "model.safetensors")
    words = open_checkpoint(source).tensors["language_model.model.embed_tokens.weight"].read()
    assert torch.equal(words, tensors["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------ one thing wrong


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (file,) = folder.glob("*.safetensors") if list(folder.glob("*.safetensors")) else folder.glob("*.[bp]*[nh]")
    read = load_file if file.suffix == ".safetensors" else lambda f: torch.load(f, weights_only=True)
    tensors = read(file)
    inner = tensors.get("state_dict", tensors)
    change(inner)
    if file.suffix == ".safetensors":
        save_file(inner, file)
    else:
        torch.save(tensors, file)


KEYS = {
    "original": "model.layers.1.mlp.up_proj.weight",
    "mmpretrain": "model.lang_encoder.model.layers.0.mlp.up_proj.weight",
    "hf": "language_model.model.layers.1.self_attn.q_proj.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def intact(world, tmp_path_factory) -> dict[str, Path]:
    """One intact checkpoint of each foreign format, in one file."""
    root, loaded, _ = world
    folder = tmp_path_factory.mktemp("intact")
    made = {name: write(name, loaded, root, folder / name) for name in ("mmpretrain", "hf")}
    return made | {"original": foreign.original(loaded, root, folder / "original")}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "renamed"])
def test_wrong_tensor_is_named_in_the_error(world, intact, name, wrong, tmp_path) -> None:
    import shutil

    folder, key, options = tmp_path / "c", KEYS[name], needed(world[2], name)
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

    _edit(folder, change)
    ours = import_name(key, format_named(name).rules)
    named = {"missing": ours, "renamed": ours, "extra": key.replace("weight", "bias"), "shape": key}[wrong]
    for act in (
        lambda: load(folder, options=options),
        lambda: convert(folder, tmp_path / "out", "llava", options),
    ):
        with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
            act()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_first_divergence_names_the_changed_tensor(world, intact, tmp_path) -> None:
    import shutil

    loaded = world[1]
    folder = tmp_path / "c"
    shutil.copytree(intact["original"], folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            tensors[key][0, 0] += 0.25

    _edit(folder, change)
    one, other = (open_checkpoint(f) for f in (intact["original"], folder))
    found = first_divergence(one, other)
    assert found is not None
    assert found.name == "language_model.model.layers.0.mlp.down_proj.weight"
    assert found.largest == pytest.approx(0.25, rel=1e-5)
    assert first_divergence(one, other, tolerance=0.3) is None
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits(load(folder)), logits(loaded))


def test_swapped_tensors_are_detected_after_writing(intact, tmp_path, monkeypatch) -> None:
    real = format_named("original").write
    assert real is not None

    def swapped(opened: Checkpoint, folder: Path, shard_bytes: int) -> None:
        t = opened.tensors
        a, b = (f"language_model.model.layers.{k}.mlp.gate_proj.weight" for k in (0, 1))
        changed = Checkpoint(**{**vars(opened), "tensors": {**t, a: t[b], b: t[a]}})
        real(changed, folder, shard_bytes)

    broken = format_named("original")
    changed = tuple(replace(f, write=swapped) if f is broken else f for f in FORMATS)
    monkeypatch.setattr("llava_core.checkpoints.open.FORMATS", changed)
    with pytest.raises(
        CheckpointError, match=r"not the same: language_model\.model\.layers\.0\.mlp\.gate_proj\.weight"
    ):
        convert(intact["hf"], tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_verification_names_the_first_module_that_differs(world, tmp_path) -> None:
    root, loaded, _ = world
    source = foreign.original(loaded, root, tmp_path / "source")
    report = convert(source, tmp_path / "hf", "hf", verify=True)
    assert 0 <= report["largest_difference"] < 1e-5
    opened = open_checkpoint(source).require("vision_tower")
    full = verify_export(opened, tmp_path / "hf")
    names = [d.name for d in full]
    assert first_module(full) is None
    assert names.index("vision_tower.embeddings") < names.index("multi_modal_projector") < len(names) - 1
    assert {"language_model.model.layers.1.mlp", "language_model.lm_head"} <= set(names)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    opened.tensors[name] = opened.tensors[name].map(lambda t: t + 0.1)
    wrong = first_module(verify_export(opened, tmp_path / "hf"))
    assert wrong is not None
    assert wrong.name == "language_model.model.layers.1.mlp.up_proj"
    with pytest.raises(CheckpointError, match="only what is written as 'hf'"):
        convert(source, tmp_path / "x", "original", verify=True)


# ------------------------------------------------------------------------------------------------ sizes of the paper


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
    rules = format_named(name).rules
    theirs = {export_name(n, rules): s for n, s in shapes.items()}
    assert len(theirs) == len(shapes) == 9 * layers + 3 + 4 + 24 * 16 + 7
    assert {import_name(n, rules) for n in theirs} == set(shapes)
    total = sum(torch.Size(s).numel() for s in shapes.values())
    assert total == {32: 7_062_902_784, 40: 13_350_839_296}[layers]
    lazy = {import_name(n, rules): LazyTensor(s, torch.float16, pytest.fail) for n, s in theirs.items()}
    opened = Checkpoint(name, Path("7b"), description, lazy, {import_name(n, rules): n for n in theirs})
    check(opened)
    lost = f"language_model.model.layers.{layers - 1}.self_attn.o_proj.weight"
    tensor = opened.tensors.pop(lost)
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        check(opened)
    opened.tensors |= {lost: tensor, "multi_modal_projector.4.weight": tensor}
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.4\.weight is unknown"):
        check(opened)


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
    rules = format_named("original").rules
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.mm_projector.{k}.{end}" for k in (0, 2) for end in ("weight", "bias")]
    names += [f"model.layers.{k}.{end}" for k in range(32) for end in ends]
    inside = "model.vision_tower.vision_tower.vision_model."
    names += [inside + n.removeprefix("vision_tower.") for n in shapes if n.startswith("vision_tower.")]
    tensors = {n: LazyTensor(shapes[import_name(n, rules)], torch.float16, pytest.fail) for n in names}
    computed = LazyTensor((64,), torch.float32, pytest.fail)
    rotary = {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": computed for k in range(32)}
    rotary[inside + "embeddings.position_ids"] = computed

    def opened(files: dict[str, LazyTensor]) -> Checkpoint:
        return new_checkpoint("original", tmp_path, files, from_original, description, None, [])

    found = opened(tensors | rotary)
    check(found)
    assert set(found.tensors) == set(shapes)
    assert set(found.left_out) == set(rotary)
    for to in ("hf", "mmpretrain"):
        theirs = [row[2] for row in key_map(found, to)]
        assert len(set(theirs)) == len(shapes)
    lost = tensors.pop("model.layers.31.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"layers\.31\.mlp\.up_proj\.weight is missing"):
        check(opened(tensors))
    tensors |= {"model.layers.31.mlp.up_proj.weight": lost, "model.layers.32.mlp.up_proj.weight": lost}
    with pytest.raises(CheckpointError, match=r"model\.layers\.32\.mlp\.up_proj\.weight is unknown"):
        check(opened(tensors))


# ------------------------------------------------------------------------------------------------ shards and memory


def test_shards_are_small_and_in_order(intact, tmp_path) -> None:
    convert(intact["original"], tmp_path / "out", "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5
    assert files[0].endswith(f"-of-{len(files):05d}.safetensors")
    held = {}
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            held |= dict.fromkeys(shard.keys(), file)
    assert held == index["weight_map"]


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

    opened = open_checkpoint(intact["original"])
    opened.tensors = {n: counted(t) for n, t in opened.tensors.items()}
    folder = tmp_path / "out"
    folder.mkdir()
    write_original = format_named("original").write
    assert write_original is not None
    write_original(opened, folder, 20_000)
    largest = max(t.bytes for t in opened.tensors.values())
    assert most <= 20_000 + 2 * largest
    assert most < sum(t.bytes for t in opened.tensors.values()) / 2


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
    loaded = foreign.model(tmp_path)
    llm = loaded.model.language_model
    llm.config.tie_word_embeddings = True
    llm.lm_head.weight = llm.model.embed_tokens.weight
    saved = save_checkpoint(tmp_path / "c", loaded, "full", template="v0")
    opened = open_checkpoint(saved)
    assert "language_model.lm_head.weight" not in opened.tensors
    again = load(saved)
    torch.testing.assert_close(logits(again), logits(loaded), rtol=0, atol=0)
    convert(saved, tmp_path / "hf", "hf")
    back = logits(load(tmp_path / "hf"))
    torch.testing.assert_close(back, logits(loaded), rtol=0, atol=0)
