"""Loading: no code of a checkpoint runs, vision towers are compared, paths are relative."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_fixtures import adapted, bases, change_json, loaded, original, root  # noqa: F401 - fixtures
from foreign import logits
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints import load as loading
from llava_core.checkpoints.base_models import base_hash, model_folder, no_downloads
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import build, load, load_into, save_checkpoint
from llava_core.checkpoints.open import open_checkpoint
from llava_core.checkpoints.tensors import LazyTensor
from llava_core.inference import prompt_ids
from llava_core.runtime import CheckpointError


def test_code_of_a_tokenizer_is_never_run(original, tmp_path) -> None:
    mark = tmp_path / "executed"
    (original / "evil.py").write_text(f"import os\nos.system('touch {mark}')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change_json(original / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    code = f"import llava_core; llava_core.load({str(original)!r})"
    subprocess.run([sys.executable, "-c", code], input="y\n" * 9, text=True, capture_output=True, check=False)
    inspect(original)
    assert not mark.exists()


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
    change_json(tmp_path / "c" / "manifest.json", base_hash={"vision_tower": base_hash("someone/clip")})
    assert manifest["base_hash"]["vision_tower"].startswith("files:")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert any("taken unchecked" in note for note in checkpoint.notes)


def test_paths_are_relative_to_the_working_folder(original, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("original").manifest["template"] == "v1"
    convert(Path("original"), Path("out"), "llava")
    assert prompt_ids(load("out"), [("what", None)], True)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load("~nobody-of-that-name/x")


def test_an_adapter_on_another_base_is_refused(bases, tmp_path) -> None:
    llm, clip = (shutil.copytree(base, tmp_path / Path(base).name) for base in bases)
    path = save_checkpoint(tmp_path / "c", adapted((str(llm), str(clip))), "adapter")
    (llm / "manifest.json").unlink()
    weights = load_file(llm / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="made with another language model"):
        load(path)


def test_a_projector_of_other_base_models_is_refused(bases, tmp_path) -> None:
    loaded = build(*bases, torch.float32)
    path = save_checkpoint(tmp_path / "c", loaded, "projector")
    load_into(loaded.model, path, base_hash=loaded.manifest["base_hash"])
    other = loaded.manifest["base_hash"] | {"language_model": "files:0"}
    with pytest.raises(CheckpointError, match="trained with another language model than this run's"):
        load_into(loaded.model, path, base_hash=other)


def test_a_model_without_named_base_models_is_not_saved(bases, tmp_path) -> None:
    loaded = build(*bases, torch.float32)
    del loaded.manifest["base"]  # as of a LLaVA of transformers, which has its vision tower inside
    with pytest.raises(CheckpointError, match="names no base models"):
        save_checkpoint(tmp_path / "c", loaded, "full")
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_that_lacks_its_adapter_is_refused(bases, tmp_path) -> None:
    path = save_checkpoint(tmp_path / "c", adapted(bases), "adapter")
    other = build(*bases, torch.float32).model
    load_into(other, path, ("multi_modal_projector.",))
    with pytest.raises(CheckpointError, match="adapter would be left out"):
        load_into(other, path)
    (path / "adapter_model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"c: no adapter_model\.safetensors; fix: "):
        load(path)
    (tmp_path / "kept").rename(path / "adapter_model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"kind": "projector"}))
    with pytest.raises(CheckpointError, match="disagree about an adapter"):
        load(path)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_ranks_read_the_same_tensors_in_the_same_order(bases, kind, tmp_path, monkeypatch) -> None:
    loaded = adapted(bases) if kind == "adapter" else build(*bases, torch.float32)
    reads: dict[int, list[str]] = {0: [], 1: []}

    def tensors(rank: int) -> dict[str, LazyTensor]:
        state = dict(sorted(loaded.model.state_dict().items(), reverse=True))  # B before A
        return {
            name: LazyTensor(tuple(t.shape), t.dtype, lambda n=name, t=t: (reads[rank].append(n), t)[1])
            for name, t in state.items()
        }

    for rank in (1, 0):
        monkeypatch.setattr(loading, "rank", lambda rank=rank: rank)
        path = save_checkpoint(tmp_path / "c", loaded, kind, tensors(rank), torch.bfloat16)
        assert path.exists() == (rank == 0)
    assert reads[0] == reads[1]
    assert len(reads[0]) == len(set(reads[0])) > 20
    stored = load_file(path / "model.safetensors")
    dtypes = {name.partition(".")[0]: tensor.dtype for name, tensor in stored.items()}
    assert dtypes.pop("multi_modal_projector") == torch.float32
    assert dtypes == ({"language_model": torch.bfloat16} if kind == "full" else {})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["dtype"] == ("bfloat16" if kind == "full" else "float32")


def test_a_tensor_that_was_not_gathered_is_noticed(bases, tmp_path) -> None:
    loaded = build(*bases, torch.float32)
    tensors = {name: LazyTensor.of(t) for name, t in loaded.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="has no weights"):
        save_checkpoint(tmp_path / "c", loaded, "full", {f"module.{name}": t for name, t in tensors.items()})
    kept = {name: t for name, t in tensors.items() if "projector" not in name}
    with pytest.raises(CheckpointError, match="lack multi_modal_projector"):
        save_checkpoint(tmp_path / "c", loaded, "full", kept)
    del tensors["language_model.model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        save_checkpoint(tmp_path / "c", loaded, "full", tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_hub_id_is_downloaded_where_that_is_allowed(original, root, suffix, tmp_path, monkeypatch) -> None:
    """The hub has sharded `.bin` files with an index; files of a pattern that is not asked for do not come."""
    import huggingface_hub

    if suffix == "safetensors":
        convert(original, tmp_path / "hub", "original", Options(vision_tower=str(root / "clip")))
    hub = tmp_path / "hub" if suffix == "safetensors" else original
    copy, local = tmp_path / "copy", []

    def snapshot(source: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        local.append(local_files_only)
        if local_files_only:
            raise LocalEntryNotFoundError(source)
        copy.mkdir(exist_ok=True)
        for file in hub.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(file, copy / file.name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    with no_downloads(), pytest.raises(CheckpointError, match=r"someone/llava: .* not in the cache"):
        load("someone/llava")
    assert local == [True]
    assert torch.equal(logits(load("someone/llava")), logits(load(original)))
    assert not local[-1]
    for path in ("some one/llava", "a/b/c", "./llava", "llava"):
        local.clear()
        with pytest.raises(CheckpointError, match="no such file or folder"):
            load(path)
        assert not local


def test_hub_is_asked_with_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    def snapshot(source: str, **_: object) -> str:
        raise LocalEntryNotFoundError(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for source in ("someone/tower", "someone/tower", "another/tower", "/nowhere/tower"):
        with pytest.raises(CheckpointError, match="not in the cache"):
            model_folder(source)
    with no_downloads(), pytest.raises(CheckpointError, match="not in the cache"):
        model_folder("third/tower")
    names = ("someone/tower", "another/tower")
    assert capsys.readouterr().err == "".join(
        f"note: {name} is not a folder here, so the hub is asked for it\n" for name in names
    )
