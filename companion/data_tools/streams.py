"""Files that are written record by record and appear whole or not at all: memory does not grow with their records."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a file in a folder of its own to write into; it takes its place in the end, if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        yield part
        os.replace(part, path)


@contextmanager
def json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Write a list in JSON, one element per line.

    Args:
        path: the file.

    Yields:
        A function that adds an element.
    """
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    with _whole(path) as part, open(part, "w", encoding="utf-8") as file:
        between = "[\n"

        def add(value: Any) -> None:
            nonlocal between
            file.write(between + encode(value))
            between = ",\n"

        yield add
        file.write("\n]\n" if between == ",\n" else "[]\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def parquet(path: Path, columns: Sequence[str], group: int = 50_000) -> Iterator[Callable[[dict[str, str]], None]]:
    """Write a parquet file of text columns; needs pyarrow.

    Args:
        path: the file.
        columns: their names.
        group: rows that are held and written together.

    Yields:
        A function that adds a row.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    rows: list[dict[str, str]] = []
    with _whole(path) as part, ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            rows.clear()

        def add(row: dict[str, str]) -> None:
            rows.append(row)
            if len(rows) >= group:
                flush()

        yield add
        flush()
