"""Pickles that run no code and would still take hours or gigabytes, and honest files."""

from __future__ import annotations

import pickle
import time
from collections import OrderedDict
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from llava_core.checkpoints.tensors import open_file
from llava_core.runtime import CheckpointError

NESTED = b")" + b"q\x00h\x00\x86" * 60  # a tuple of two times the tuple before, whose hash takes for ever
PAIRS = b"]]" + NESTED + b"aK\x01aa"  # a list of one pair with it
CALL = b"\x85R"  # with one argument
OPERATIONS = {
    "nested key": b"}" + NESTED + b"K\x01s",
    "nested key among others": b"}(X\x01\x00\x00\x00aK\x01" + NESTED + b"K\x01u",
    "nested key of a dict by its items": b"(" + NESTED + b"K\x01d",
    "dict of pairs": b"ccollections\nOrderedDict\n" + PAIRS + CALL,
    "dict of pairs by another function": b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\n"
    b"ccollections\nOrderedDict\n" + PAIRS + b"\x85NtR",
    "set": b"c__builtin__\nset\n]" + NESTED + b"a" + CALL,
    "counts": b"ccollections\nCounter\n]" + NESTED + b"a" + CALL,
    "gigabytes of zeros": b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10" + CALL,
    "nested key of numbers": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + NESTED
    + b"X\x03\x00\x00\x00cpuK\x01tQ",
    "long key": b"}X\x00\x00\x10\x00" + b"x" * 2**20 + b"K\x01s",
    "numbers of one hash": b"}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"K\x01s",
}


def write_pickle(file: Path, operations: bytes, old: bool) -> Path:
    """Write a file of PyTorch's, or as before 1.6, whose pickle has these operations."""
    pickled = b"\x80\x02" + operations + b"."
    if old:
        start = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
        file.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + pickled + pickle.dumps([], 2))
        return file
    with ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return file


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
