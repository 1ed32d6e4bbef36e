"""Pickles of a few bytes that run no code and would still take hours or gigabytes."""

from __future__ import annotations

import pickle
from pathlib import Path
from zipfile import ZipFile

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
