"""Rows of parquet files and arrow streams, read by a child process with limits.

Arrow trusts offsets and sizes of a file: damaged ones end the process, and a short file can stand for 100 GB. The child
sends plain values by `marshal`, which, unlike pickle, cannot name code.
"""

from __future__ import annotations

import importlib
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from llava_core.runtime import DataError, child_environment, display_path

ROWS = 64  # rows that are decoded at once, perhaps with the bytes of their images
MEMORY = 3 * 2**29  # bytes that the child may allocate
SECONDS = 8  # CPU time for `ROWS` rows, and for opening a file
MOST_BYTES, MOST_RATIO = 2**28, 50  # rows may take that many bytes, or so many times the file
ROW_BYTES = 1024  # what each row counts besides its values

Row = dict[str, Any] | None
"""A row without its nulls; None if a text in it is not UTF-8."""


class TableError(DataError):
    """A table that cannot be read; `reason` is without the file's name."""

    reason: str = ""


def _error(file: Path, reason: str) -> TableError:
    error = TableError(f"{display_path(file)}: {reason}")
    error.reason = reason
    return error


def import_pyarrow(module: str = "lib") -> Any:
    """Import `pyarrow.<module>`; a DataError if it is not installed."""
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ModuleNotFoundError:
        raise DataError(
            "parquet and arrow files are read by pyarrow, which is not installed; "
            "fix: pip install 'llava-core[notebooks]'"
        ) from None


def read_table(files: Sequence[Path]) -> tuple[dict[str, bool], Iterator[tuple[Path, Row]]]:
    """The columns of a table (name -> whether it stores bytes), and its rows, each with its file.

    `files` are parquet (by suffix) or arrow streams. Raises TableError, also while rows are read, if a file is damaged
    or its rows are more than `MOST_BYTES` and `MOST_RATIO` times the file.
    """
    import_pyarrow()
    messages = _messages(files)
    _, columns = next(messages)
    return columns, ((files[k], row) for k, rows in messages for row in rows)


def _messages(files: Sequence[Path]) -> Iterator[tuple[int, Any]]:
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "llava_core.data.tables", *map(str, files)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=child_environment(),
    )  # fmt: skip
    assert child.stdout is not None
    at = 0
    try:
        with child.stdout as stream:
            while True:
                try:
                    kind, at, value = marshal.loads(stream.read(int.from_bytes(stream.read(8))))
                except (EOFError, ValueError, TypeError):  # the child was ended
                    code = child.wait()
                    why = "it takes too long" if code == -signal.SIGPROF else f"it ends its reader, {code}"
                    raise _error(files[at], f"damaged ({why}); get or write it again") from None
                if kind == "end":
                    return
                if kind == "error":
                    raise _error(files[at], value)
                yield at, value
    finally:
        child.kill()
        child.wait()


def begins_json(path: Path) -> bool:
    """Whether a file's first character is that of a JSON list or object."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")


# ------------------------------------------------------------------------------------------------- the child process


def _message(kind: str, at: int, value: Any) -> bytes:
    """Size and content; `marshal.load` of a stream is slow, because it reads value by value."""
    content = marshal.dumps((kind, at, value))
    return len(content).to_bytes(8) + content


def _send(files: Sequence[Path], stream: BinaryIO) -> None:
    for k, file in enumerate(files):
        left = max(MOST_BYTES, MOST_RATIO * file.stat().st_size)
        try:
            _limit_time(SECONDS)
            for number, batch in enumerate(_batches(file)):
                if not number and not k:
                    columns = {field.name: _holds_bytes(field.type) for field in batch.schema}
                    stream.write(_message("rows", k, columns))
                batch.validate()
                content = _message("rows", k, [_plain(row) for row in _rows(batch)])
                left -= len(content) + ROW_BYTES * batch.num_rows
                if left < 0:
                    what = f"its rows take more than {MOST_BYTES:,} bytes and {MOST_RATIO} times the file"
                    stream.write(_message("error", k, f"{what}; write a smaller table"))
                    return
                _limit_time(0)  # writing waits for the reader
                stream.write(content)
                _limit_time(SECONDS)
        except MemoryError:
            message = f"damaged, or {ROWS} rows take more than {MEMORY:,} bytes; get it again, or write a smaller table"
            stream.write(_message("error", k, message))
            return
        except Exception as error:  # pyarrow raises SystemError, OverflowError and many kinds of its own
            what = f"or damaged ({' '.join(str(error).split())[:200]}); get or write it again"
            what = "JSON text; name it .json or .jsonl" if begins_json(file) else what
            name = "parquet" if file.suffix == ".parquet" else "arrow stream"
            stream.write(_message("error", k, f"no {name}, {what}"))
            return
    stream.write(_message("end", 0, None))


def _batches(file: Path) -> Iterator[Any]:
    """Record batches; an empty table has one, so that its columns are known."""
    arrow = import_pyarrow()
    # mapped, because a group of rows with images may be larger than `MEMORY`
    with arrow.memory_map(str(file)) as mapped:
        if file.suffix.lower() == ".parquet":
            table = import_pyarrow("parquet").ParquetFile(mapped)
            yield arrow.RecordBatch.from_pylist([], schema=table.schema_arrow)
            yield from table.iter_batches(batch_size=ROWS)
            return
        with import_pyarrow("ipc").open_stream(mapped) as stream:
            yield arrow.RecordBatch.from_pylist([], schema=stream.schema)
            for batch in stream:
                yield from (batch.slice(start, ROWS) for start in range(0, batch.num_rows, ROWS))


def _holds_bytes(kind: Any) -> bool:
    types = import_pyarrow("types")
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return bool(types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _rows(batch: Any) -> list[Row]:
    """The rows of a batch; text that is not UTF-8, which arrow stores unchecked, is looked for row by row."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for k in range(batch.num_rows) for row in _rows(batch.slice(k, 1))]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _plain(value: Any) -> Any:
    """Values that JSON has, and bytes; others, such as dates, become text."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str | bytes) else str(value)


def _limit_time(seconds: float) -> None:
    """End this process after so many seconds of CPU time (0: no limit)."""
    if hasattr(signal, "setitimer"):  # Windows has none
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(ImportError):  # Windows has no such limits
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import_pyarrow().set_cpu_count(1)
    with stream, suppress(BrokenPipeError):
        _send([Path(name) for name in sys.argv[1:]], stream)


if __name__ == "__main__":
    main()
