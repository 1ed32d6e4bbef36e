"""Pickles that run no code and would still take hours or gigabytes, and honest files."""

from __future__ import annotations

import time
from collections import OrderedDict
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from hostile_pickles import OPERATIONS, write_pickle

from llava_core.checkpoints.tensors import open_file
from llava_core.runtime import CheckpointError


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("operations", OPERATIONS.values(), ids=OPERATIONS)
def test_pickles_without_a_bound_are_refused_at_once(operations, old, tmp_path) -> None:
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r"a\.bin: holds more than tensors.*; fix: get safetensors"):
        open_file(write_pickle(tmp_path / "a.bin", operations, old))
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("old", [False, True])
def test_pickles_of_all_kinds_of_weights_are_read(old, tmp_path) -> None:
    layer = torch.nn.Linear(3, 2)
    content = OrderedDict(layer.state_dict(), parameter=layer.weight, half=torch.ones(2, 2).bfloat16().T)
    torch.save(content, tmp_path / "a.bin", _use_new_zipfile_serialization=not old)
    tensors = open_file(tmp_path / "a.bin")
    assert {name: torch.equal(tensors[name].read(), content[name]) for name in content} == dict.fromkeys(content, True)


def test_one_compressed_member_is_refused(tmp_path) -> None:
    """Its size in the archive's list, which may be wrong, is no bound."""
    file = write_pickle(tmp_path / "a.bin", b"}", old=False)
    with ZipFile(file, "a", ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"")
    with pytest.raises(CheckpointError, match=r"a\.bin: compressed, which PyTorch's files are not; fix: "):
        open_file(file)


def test_a_large_pickle_is_not_read(tmp_path) -> None:
    file = write_pickle(tmp_path / "a.bin", b"}X\x00\x00\x00\x01" + b"x" * 2**24 + b"K\x01s", old=False)
    with pytest.raises(CheckpointError, match=r"a\.bin: a pickle of 16,777,\d+ bytes; fix: "):
        open_file(file)


@pytest.mark.parametrize(("old", "message"), [(False, "members, more than 50,000"), (True, "cut off")])
def test_more_tensors_than_any_model_has_are_refused_unread(old, message, tmp_path) -> None:
    content = {f"model.layers.{k}": torch.ones(1) for k in range(10**5)}
    torch.save(content, tmp_path / "a.bin", _use_new_zipfile_serialization=not old)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=rf"a\.bin: .*({message}).*; fix: "):
        open_file(tmp_path / "a.bin")
    assert time.process_time() - begin < 5
