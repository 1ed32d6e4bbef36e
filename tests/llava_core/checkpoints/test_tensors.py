"""Weights files: modes of what is written, and views that claim more than their file has."""

from __future__ import annotations

import os
import time
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import tiny
import torch
from checkpoint_fixtures import loaded, original, root  # noqa: F401 - fixtures
from safetensors.torch import save_file

from companion.checkpoints.convert import convert
from companion.checkpoints.writers import WRITERS
from llava_core import runtime
from llava_core.checkpoints.load import build, save_checkpoint
from llava_core.checkpoints.tensors import lone_weights_file, open_file
from llava_core.runtime import CheckpointError


@pytest.fixture(params=[0o027])
def umask(request, monkeypatch):
    monkeypatch.setattr(runtime, "_UMASK", request.param)  # which is read once
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_written_files_have_the_modes_of_the_umask(original, umask, tmp_path) -> None:
    for to in WRITERS:
        convert(original, tmp_path / "out" / to, to, shard_bytes=30_000)
    bases = tiny.base_models(tmp_path / "bases")
    save_checkpoint(tmp_path / "out" / "saved", build(*bases, torch.float32), "projector")
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_views_that_repeat_a_small_storage_are_refused(tmp_path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a is \(1048576, 1048576\), larger than its storage"):
        open_file(tmp_path / "a.bin")


def test_pickles_of_a_trainer_are_no_weights(tmp_path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"")
    assert lone_weights_file(tmp_path) is None
    (tmp_path / "llava_7b.pth").write_bytes(b"")
    assert lone_weights_file(tmp_path) == tmp_path / "llava_7b.pth"


def test_compressed_pickles_are_refused(tmp_path) -> None:
    """An archive of a few bytes could fill the memory when it is decompressed."""
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.bin")
    with ZipFile(tmp_path / "a.bin") as stored, ZipFile(tmp_path / "b.bin", "w", ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert open_file(tmp_path / "a.bin")["a"].shape == (10**6,)
    with pytest.raises(CheckpointError, match=r"b\.bin: compressed"):
        open_file(tmp_path / "b.bin")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype) -> None:
    torch.save({"embeddings.position_ids": torch.arange(3), "a": torch.zeros(2, dtype=dtype)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=rf"a has type {dtype}; fix: "):
        open_file(tmp_path / "a.bin")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("file", ["a.bin", "a.safetensors"])
def test_values_that_are_not_finite_are_refused_when_read(file, dtype, value, tmp_path) -> None:
    largest = torch.full((3, 50), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite
    broken = largest.clone()
    broken[1, 7] = value
    write = torch.save if file.endswith("bin") else save_file
    write({"good": largest, "broken": broken}, tmp_path / file)
    tensors = open_file(tmp_path / file)
    assert torch.equal(tensors["good"].read(), largest)
    with pytest.raises(CheckpointError, match=rf"{file}: broken holds NaN or infinity; fix: "):
        tensors["broken"].read()


@pytest.mark.parametrize("shape", [(0,), (30_000, 0), (0, 4)])
def test_tensors_without_numbers_are_refused(shape, tmp_path) -> None:
    torch.save({"a": torch.zeros(shape)}, tmp_path / "a.bin")
    save_file({"a": torch.zeros(shape)}, tmp_path / "a.safetensors")
    for file in ("a.bin", "a.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{file}: a is .*, without a number; fix: "):
            open_file(tmp_path / file)


@pytest.mark.parametrize("name", ["a\ud800", "a\x1b[2J.rotary_emb.inv_freq"])
def test_names_that_cannot_be_printed_are_refused(name, tmp_path) -> None:
    torch.save({name: torch.ones(2)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin: a\\.* is no name of a tensor; fix: "):
        open_file(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("number", "message"), [(50_000, "50,000 tensors, more than 20,000"), (200_000, "a header of")]
)
def test_more_tensors_than_any_model_has_are_refused(number, message, tmp_path) -> None:
    save_file({f"a.{k}": torch.ones(1) for k in range(number)}, tmp_path / "a.safetensors")
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: {message}.*; fix: "):
        open_file(tmp_path / "a.safetensors")
    assert time.process_time() - begin < 5
