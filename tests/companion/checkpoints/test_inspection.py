"""Damaged, foreign and hostile folders: one line each, no code is run, no call blocks."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import change_json, loaded, original, root  # noqa: F401 - fixtures
from safetensors.torch import load_file, save_file

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.load import load, save_checkpoint
from llava_core.checkpoints.open import open_checkpoint
from llava_core.checkpoints.tensors import open_file, open_folder
from llava_core.inference import prompt_ids
from llava_core.runtime import CheckpointError


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("intact")
    loaded = foreign.random_model(root)
    full = save_checkpoint(root / "llava", loaded, "full", template="v0", image_position="last")
    convert(full, root / "hf", "hf", shard_bytes=30_000)
    return {
        "llava": full, "hf": root / "hf", "root": root, "original": foreign.write_original(loaded, root, root / "o", 3),
        "projector": save_checkpoint(root / "p", loaded, "projector", template="plain"),
    }  # fmt: skip


def test_intact_checkpoints_have_no_problems(intact) -> None:
    for name in ("llava", "hf", "original", "projector"):
        result = inspect(intact[name])
        assert result["problems"] == [], name
        assert result["parameters"] > 20_000
        assert result["template"] == {"original": "v1", "projector": "plain"}.get(name, "v0")
    assert inspect(intact["hf"])["facts"]["vision_tower"] == "inside"
    system = inspect(intact["llava"])["system"]
    assert system == "the template's own"


def _missing_shard(folder: Path, mark: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _truncated(folder: Path, mark: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def _wrong_vocabulary(folder: Path, mark: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens([f"word{k}" for k in range(90)])
    tokenizer.save_pretrained(folder / "tokenizer")


def _no_projector(folder: Path, mark: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        save_file({n: t for n, t in load_file(folder / file).items() if "proj" not in n.split(".")[0]}, folder / file)
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "projector" not in n}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _foreign(folder: Path, mark: Path) -> None:
    for file in folder.iterdir():
        file.unlink() if file.is_file() else shutil.rmtree(file)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 12}))
    (folder / "model.gguf").write_bytes(b"GGUF")


def _pickle_with_code(folder: Path, mark: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap(mark)}))


def _zip_with_code(folder: Path, mark: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": Trap(mark)}, folder / "pytorch_model.bin")


def _link_out(folder: Path, mark: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    outside = folder.parent / "outside.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)


def _index_out(folder: Path, mark: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../../etc/model.safetensors"
    file.write_text(json.dumps(index))


def _empty(folder: Path, mark: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _unreadable(folder: Path, mark: Path) -> None:
    file = folder / "config.json"
    file.unlink()
    file.mkdir()


def _pipe(folder: Path, mark: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.unlink()
    os.mkfifo(file)


def _cyclic_index(folder: Path, mark: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], file.name)
    file.write_text(json.dumps(index))


def _cyclic_link(folder: Path, mark: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.unlink()
    file.symlink_to(file.name)


def _not_json(folder: Path, mark: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llava", "text_config": ')


def _remote_code(folder: Path, mark: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    config.pop("llava_core")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os; os.system('touch {mark}')")


DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "missing shard": (_missing_shard, r"model-00002-of-\d+.safetensors: missing"),
    "truncated file": (_truncated, r"model-00001-of-\d+.safetensors: damaged or cut off"),
    "wrong vocabulary": (_wrong_vocabulary, "tokenizer knows 410 tokens, the word embeddings have 320 rows"),
    "projector absent": (_no_projector, "multi_modal_projector.*is missing"),
    "foreign format": (_foreign, "llama.cpp's format"),
    "pickle with code": (_pickle_with_code, "holds more than tensors.*nothing of it was executed"),
    "zip with code": (_zip_with_code, "holds more than tensors.*nothing of it was executed"),
    "symlink out": (_link_out, "is a link out of its folder; refused"),
    "index that points out": (_index_out, "points outside the folder; refused"),
    "empty": (_empty, "not a LLaVA checkpoint .it is empty"),
    "unreadable": (_unreadable, "config.json: not a regular file"),
    "pipe": (_pipe, "not a regular file"),
    "cyclic index": (_cyclic_index, "an index that leads to an index"),
    "cyclic link": (_cyclic_link, "cannot be followed"),
    "half a config": (_not_json, "config.json, line 1: invalid JSON"),
    "code in the folder": (_remote_code, "no language model of model_type 'evil' is known"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_one_line_and_run_nothing(intact, name, tmp_path) -> None:
    folder, mark = tmp_path / "c", tmp_path / "executed"
    shutil.copytree(intact["hf"], folder)
    damage, message = DAMAGES[name]
    damage(folder, mark)
    result = inspect(folder)
    (problem,) = result["problems"]
    assert "\n" not in problem
    assert re.search(message, problem), problem
    assert not mark.exists()
    if name != "wrong vocabulary":
        with pytest.raises(CheckpointError):
            load(folder)
    assert not mark.exists()


def test_pickle_trap_works_without_weights_only(tmp_path) -> None:
    """Without `weights_only` the file's code runs, so the tests above can fail."""
    mark = tmp_path / "executed"
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": Trap(mark)}))
    with open(tmp_path / "x.bin", "rb") as file:
        pickle.load(file)
    assert mark.exists()


WRONG_FIELDS = {
    "parts": (["multi_modal_projector"], "manifest and weights disagree about language_model"),
    "projector": ("mlp2x_gelu", "multi_modal_projector.0.weight is missing"),
    "d_vision": (4096, "has shape|does not take the width 24"),
    "image": ({"size": 32, "mode": "crop"}, "mean is missing"),
    "files": ({"model.safetensors": "0" * 64}, "damaged"),
    "files left out": ({}, r"model\.safetensors: the manifest does not list it"),
    "feature_layer": (-9, "feature_layer is -9"),
    "format_version": (99, "format version 99"),
    "base": ("none", "base is missing or no dict"),
    "template": ("v7", "unknown conversation template 'v7'"),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_wrong_manifest_fields_are_errors(intact, field, tmp_path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(intact["llava"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    value, message = WRONG_FIELDS[field]
    (folder / "manifest.json").write_text(json.dumps(manifest | {field.partition(" ")[0]: value}))
    (problem,) = inspect(folder)["problems"]
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 321}, "has shape .320, 32., its configuration says .321, 32."),
        ({"num_hidden_layers": 3}, r"layers\.2\..*is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', not 1 to"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776, not 1 to"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', not 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not 1 to"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not"),
        ({"model_type": "nothing"}, "no language model of model_type 'nothing'"),
    ],
)
def test_configuration_with_wrong_shapes_is_an_error(intact, change, message, tmp_path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(intact["llava"], folder)
    file = folder / "language_model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (problem,) = inspect(folder)["problems"]
    assert re.search(message, problem), problem
    with pytest.raises(CheckpointError):
        load(folder)


def test_links_of_the_hub_cache_are_followed(intact, tmp_path) -> None:
    """`snapshots/<commit>/file -> ../../blobs/<hash>` is how the hub's cache keeps every model."""
    home = tmp_path / "models--someone--llava"
    (home / "blobs").mkdir(parents=True)
    folder = home / "snapshots" / "abc"
    shutil.copytree(intact["hf"], folder)
    for k, file in enumerate(f for f in sorted(folder.iterdir()) if f.is_file()):
        shutil.move(file, home / "blobs" / f"hash{k}")
        file.symlink_to(Path("../../blobs") / f"hash{k}")
    assert inspect(folder)["problems"] == []


def test_safetensors_are_read_first(intact, tmp_path) -> None:
    mark = tmp_path / "executed"
    shutil.copytree(intact["llava"], tmp_path / "c")
    (tmp_path / "c" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    open_checkpoint(tmp_path / "c")
    assert not mark.exists()


def test_unusual_weights_files(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not a weights file"):
        open_file(tmp_path / "a.txt")
    torch.save([1, 2], tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match="holds list, not a dict of tensors"):
        open_file(tmp_path / "b.bin")
    torch.save({"a": torch.zeros(2), "epoch": 3}, tmp_path / "c.bin")
    with pytest.raises(CheckpointError, match="'epoch' is int, not a plain tensor"):
        open_file(tmp_path / "c.bin")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert open_file(tmp_path / "old.bin")["a"].shape == (2,)
    assert open_folder(tmp_path) == {}
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_inspect_command_exits_with_1_on_a_problem(intact, tmp_path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(intact["hf"], folder)
    _truncated(folder, tmp_path)
    run = [sys.executable, "-m", "companion", "inspect", str(folder)]
    done = subprocess.run([*run, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["layout"] == "hf"
    assert len(result["problems"]) == 1
    good = subprocess.run([*run[:-1], str(intact["hf"])], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert "hf" in good.stdout


def _places(value: object, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, v in inner for place in [(*path, key), *_places(v, (*path, key))]]


@pytest.mark.parametrize("name", ["llava", "hf", "original"])
def test_random_configuration_values_never_crash(intact, name, tmp_path) -> None:
    """Random fields of the JSON files get random values: one problem in one line, or none."""
    folder, draw = tmp_path / "c", random.Random(name)
    shutil.copytree(intact[name], folder)
    files = [f for f in folder.rglob("*.json") if f.name != "tokenizer.json"]
    for _ in range(25):
        file = draw.choice(files)
        text = file.read_text()
        value = json.loads(text)
        *way, last = draw.choice(_places(value))
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = draw.choice([None, -1, 0, "x", [], {}, 10**9, True, 1.5, ["a"], {"a": 1}])
        file.write_text(json.dumps(value))
        problems = inspect(folder)["problems"]
        assert len(problems) <= 1, (file.name, way, last, inner[last])
        assert all("\n" not in problem for problem in problems)
        file.write_text(text)


def test_missing_text_config_fields_have_defaults(loaded, root, tmp_path) -> None:
    """As llava-hf writes it: only what differs from transformers' defaults."""
    folder = foreign.write_hf(foreign.random_model(tmp_path / "b", "mlp2x_gelu"), tmp_path / "b", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_act", "rms_norm_eps", "attention_bias", "rope_parameters", "tie_word_embeddings"):
        config["text_config"].pop(name)
    config["text_config"]["torch_dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder)["problems"] == []


def test_inspect_downloads_nothing(original, monkeypatch) -> None:
    import huggingface_hub

    change_json(original / "config.json", mm_vision_tower="someone/a-tower")
    asked = []

    def snapshot(source: str, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        raise OSError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (problem,) = inspect(original)["problems"]
    assert "someone/a-tower" in problem
    assert asked
    assert all(asked)


@pytest.mark.parametrize(
    ("file", "text"), [("config.json", "[" * 100_000), ("config.json", '{"mm_vision_tower": 1' + "0" * 5000 + "}")]
)
def test_invalid_json_is_a_one_line_problem(original, file, text) -> None:
    (original / file).write_text(text)
    (problem,) = inspect(original)["problems"]
    assert "invalid JSON" in problem
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
    change_json(saved / "manifest.json", **fields)
    (problem,) = inspect(saved)["problems"]
    assert message in problem


@pytest.mark.parametrize("delimiters", [False, True])
def test_an_export_that_transformers_saved_again_is_sound(delimiters, tmp_path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    loaded = foreign.random_model(tmp_path, delimiters=delimiters)
    usage = {"template": "v0_exact", "image_delimiters": foreign.DELIMITERS} if delimiters else {"template": "v1"}
    saved = save_checkpoint(tmp_path / "c", loaded, "full", **usage, image_position="last")
    convert(saved, tmp_path / "hf", "hf")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    result = inspect(tmp_path / "again")
    assert result["problems"] == []
    assert result["template"] == usage["template"]
    again = load(tmp_path / "again")
    assert torch.equal(foreign.logits(again), foreign.logits(loaded))
    assert prompt_ids(again, [("what color", None)], True) == prompt_ids(load(saved), [("what color", None)], True)
