"""Tables are read by a child process: damaged and inflated ones are one problem that names the file."""

from __future__ import annotations

import json
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from companion.data_tools.check import check_file
from companion.data_tools.convert import convert_data
from llava_core.data.tables import TableError, read_table

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def table(rows: int = 50) -> Any:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    return pa.Table.from_pylist([{"id": str(k), "conversations": turns} for k in range(rows)])


def write_stream(content: Any, path: Path) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    return path


@pytest.mark.parametrize("offsets", [(0, 4, 2**31 - 1), (0, -(2**30), 9), (0, 2**30, 9)])
def test_wrong_offsets_are_damage_and_no_crash(offsets: tuple[int, ...], tmp_path: Path) -> None:
    path = write_stream(pa.table({"caption": ["1234", "56789"]}), tmp_path / "data.arrow")
    content = path.read_bytes()
    assert content.count(struct.pack("<3i", 0, 4, 9)) == 1
    path.write_bytes(content.replace(struct.pack("<3i", 0, 4, 9), struct.pack("<3i", *offsets)))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    with pytest.raises(TableError, match=r"data\.arrow: .*damaged"):
        convert_data(tmp_path, tmp_path / "mine.json")
    assert not (tmp_path / "mine.json").exists()


def test_flipped_bytes_are_refused_or_read(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "sound.parquet")
    sound = {"parquet": (tmp_path / "sound.parquet").read_bytes()}
    sound["arrow"] = write_stream(table(), tmp_path / "sound.arrow").read_bytes()
    for seed in range(6):
        draw, suffix = random.Random(seed), ("parquet", "arrow")[seed % 2]
        content = bytearray(sound[suffix])
        for _ in range(4):
            content[draw.randrange(len(content))] = draw.choice((0, 127, 255))
        path = tmp_path / f"flipped.{suffix}"
        path.write_bytes(content)
        with suppress(TableError):  # any other error fails
            assert all(row is None or isinstance(row, dict) for _, row in read_table([path])[1])


BOMBS = {
    "dictionary": lambda: pa.table({"id": pa.DictionaryArray.from_arrays(pa.array([0] * 9000), ["x" * 100_000])}),
    "nulls": lambda: pa.table({"id": pa.nulls(2_000_000, pa.string())}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_rows_beyond_the_file_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.parquet"
    pq.write_table(BOMBS[name](), path)
    assert path.stat().st_size < 2**20
    last = check_file(path)["problems"][0]
    assert last["kind"] == "not_parquet"
    assert "bytes and 50 times the file" in last["message"]


def test_rows_beyond_the_memory_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["y" * 2**28] * 7}), tmp_path / "cell.parquet", compression="zstd")
    with pytest.raises(TableError, match=r"cell\.parquet: damaged, or 64 rows take more than"):
        list(read_table([tmp_path / "cell.parquet"])[1])


def test_values_that_json_lacks_become_text(tmp_path: Path) -> None:
    day = pa.array([0], pa.date32())
    pq.write_table(pa.table({"day": day, "image": [b"x"], "none": pa.nulls(1), "n": [2.5]}), tmp_path / "a.parquet")
    columns, rows = read_table([tmp_path / "a.parquet"])
    assert columns == {"day": False, "image": True, "none": False, "n": False}
    assert [row for _, row in rows] == [{"day": "1970-01-01", "image": b"x", "n": 2.5}]
