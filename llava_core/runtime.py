"""Process-level helpers of a run: paths, atomic file writes, seeds, device, environment, the offline switch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

try:
    import fcntl
except ImportError:  # Windows has no such locks: start one process at a time there
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

ROOT = Path(os.environ.get("LLAVA_ROOT") or Path(__file__).resolve().parents[1]).resolve()
"""The repository; relative paths of configs start here (`LLAVA_ROOT` overrides it)."""

REPORTED_PACKAGES = ("llava-core", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "peft")


# C0, DEL and C1, bidirectional controls, line and paragraph separators, the byte order mark, surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_CURSOR_UP = re.compile(r"(?:\x1b\[A)+")  # between two progress bars


def printable(text: object, keep: str = "") -> str:
    r"""Return text for a terminal or a log, with control characters as `\n` or `\u001b`.

    Names and texts of others could otherwise move the cursor, hide a text, or write a line that looks like ours.
    `keep` holds the control characters of the layout.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else json.dumps(match[0])[1:-1], str(text))


@contextlib.contextmanager
def printable_stderr() -> Iterator[None]:
    """Make what this process writes to stderr printable: also log records, warnings, progress bars of libraries."""
    factory, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _format_warning
    try:
        with contextlib.redirect_stderr(cast(Any, _PrintableStream(sys.stderr))):
            yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_warning


def _format_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"{category.__name__}: {printable(message)}\n"


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - the name of `logging`
        return printable(super().getMessage(), keep="\n").replace("\n", "\n  ")


class _PrintableStream:
    """A text stream that escapes control characters; lines, tabs and progress bars stay."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text.startswith("\r"):  # a progress bar
            self._stream.write("\r" + printable(text[1:]))
        else:
            self._stream.write(text if _CURSOR_UP.fullmatch(text) else printable(text, keep="\n\t"))
        return len(text)


class CompanionError(Exception):
    """An error whose message names the file, the record and the fix; each argument is a line of it."""

    exit_code = 1

    def __str__(self) -> str:
        return "\n  ".join(map(printable, self.args))


class ConfigError(CompanionError):
    """A name, key or value of a configuration is wrong."""


class DataError(CompanionError):
    """A data file is missing, damaged or not of the expected format."""


class CheckpointError(CompanionError):
    """A checkpoint is incomplete, damaged or does not fit the model."""


def resolve(path: str | Path) -> Path:
    """Return `path` as an absolute path; a relative one starts at the repository root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else ROOT / path


def user_path(path: str | Path) -> Path:
    """Return what a user typed as an absolute path: from the working folder if it is there, else as `resolve` does."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # "~nobody", too long, NUL
        if Path(path).expanduser().exists():
            return Path(path).expanduser().absolute()
        return resolve(path)
    return ROOT / "no such path"


def display_path(path: str | Path) -> str:
    """Return `path` relative to the repository root if it is inside it, else unchanged."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def shortened(value: object, most: int = 100) -> str:
    """Return a value as text of at most `most` characters for a message; a longer one ends in an ellipsis."""
    try:
        text = str(value)
    except RecursionError:  # lists in lists in lists
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader, or a killed writer, never leaves half of it; halves of characters as JSON does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        set_default_mode(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of a write, as on a full disk
            error.filename = str(path)
        raise
    return path


_UMASK = os.umask(0)  # read once: two threads that read it at a time would leave it at 0
os.umask(_UMASK)


def set_default_mode(path: str | Path) -> None:
    """Give a file the permissions that `open` gives; `mkstemp` and safetensors make private files."""
    os.chmod(path, 0o666 & ~_UMASK)


def lock_descriptor(descriptor: int, wait: bool = True) -> None:
    """Lock an open file or folder exclusively; BlockingIOError if taken and not `wait`. Without locks, as if free."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # NFS does not lock folders, some clusters' file systems lock nothing
        pass


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file, at most until the process ends; BlockingIOError if taken and not `wait`.

    The file is created where it is missing; its content stays. A file system without locks does as if it were free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        lock_descriptor(file.fileno(), wait)
        yield


@contextlib.contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a folder, as `file_lock`; FileNotFoundError if it was renamed or removed meanwhile."""
    if os.name == "nt":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        lock_descriptor(descriptor, wait)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(descriptor)


_OTHER_CONTENT = {  # first bytes -> what the file is, and what to do
    b"PAR1": "a parquet table, not text; name it .parquet where parquet is read, or write it as JSON",
    b"ARROW1": "an arrow table, not text; write it as JSON or parquet",
    b"\x1f\x8b": "compressed by gzip; unpack it with gunzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the table as CSV",
    b"SQLite format 3": "an SQLite database, not text",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<!doctype html": "a web page; the link answered with a page: download the file again",
    b"<html": "a web page; the link answered with a page: download the file again",
}


def other_content(content: bytes) -> str | None:
    """Return what a file is that has other content than the expected text, and what to do; None if unknown."""
    start = content[:64].lstrip()
    for prefix, what in _OTHER_CONTENT.items():
        if start.startswith(prefix) or (prefix.startswith(b"<") and start.lower().startswith(prefix)):
            return what
    return "UTF-16 text or binary data; save it as UTF-8" if b"\0" in content[:4] else None


def unread_content(path: str | Path) -> str | None:
    """Return why a file is not to be read whole as text, and what to do: other content, or mostly holes; else None."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if what := other_content(file.read(64)):
            return what
    stored = 512 * getattr(status, "st_blocks", 0)  # 0 where the file system does not tell
    if 0 < stored < status.st_size / 10 and status.st_size > 2**26:
        return f"only {stored:,} of its {status.st_size:,} bytes are there; copy or download it again"
    return None


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text; a missing file or other content is a DataError that says what it is."""
    is_stream = str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/"))  # what a shell makes of <(COMMAND)
    if Path(path).exists() and not Path(path).is_file() and not is_stream:
        raise DataError(f"{display_path(path)}: a folder, a pipe or a device; name a file")
    try:
        what = None if is_stream else unread_content(path)
        content = b"" if what else Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{display_path(path)}: no such file; check the path or run the step that writes it") from error
    if what := what or other_content(content):
        raise DataError(f"{display_path(path)}: {what}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{display_path(path)}: not UTF-8 text (byte {error.start}); is it the right file?") from error


def jsonl_fault(text: str) -> str | None:
    """Return what JSON a text holds that is not of one value per line, and what to do; None if unknown."""
    text = text.strip().removeprefix("\ufeff")
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and end == len(text):
        return "a JSON list, not one value per line; name the file .json"
    if "\n" in text[:end]:
        return "JSON values over several lines; write one per line (`jq -c . FILE`), or a list into a .json file"
    return None


def read_json(path: str | Path, **hooks: Any) -> Any:
    """Read a JSON file with hooks of `json.loads`; if it is missing or not JSON, a DataError names file and line."""
    text = read_text(path)
    try:
        return _parse(text, path, **hooks)
    except DataError as error:
        reason = error.__cause__
        if isinstance(reason, json.JSONDecodeError) and reason.msg == "Extra data" and reason.lineno > 1:
            raise DataError(
                f"{display_path(path)}: several JSON values; name a file of one per line .jsonl"
            ) from reason
        raise


def read_jsonl(path: str | Path) -> list[Any]:
    """Read a file of one JSON value per line; blank lines are skipped, errors are as in `read_json`."""
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and its like unescaped
    text = read_text(path)
    lines = [(number, line.lstrip("\ufeff")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        values = [_parse(line, path, number) for number, line in lines]
    except DataError:
        if fault := jsonl_fault(text):
            raise DataError(f"{display_path(path)}: {fault}") from None
        raise
    if len(values) == 1 and isinstance(values[0], list):
        raise DataError(f"{display_path(path)}: {jsonl_fault(text)}")
    return values


def _parse(text: str, path: str | Path, line: int | None = None, **hooks: Any) -> Any:
    """Parse JSON; `line` is the line of the file if the text is one of its lines."""
    try:
        return json.loads(text, **hooks)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, lists in lists in lists
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        line = line or getattr(error, "lineno", None)
        place = f"{display_path(path)}, line {line}" if line else display_path(path)
        raise DataError(f"{place}: invalid JSON ({reason}); correct the line or write the file again") from error


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON, atomically."""
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line, atomically."""
    return atomic_write(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{display_path(path)}: no such file; check the path or run the step that writes it") from error


def fingerprint(value: Any) -> str:
    """Return 12 hex digits that depend on a JSON-like value and not on the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode(errors="backslashreplace")).hexdigest()[:12]


def seed_everything(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto` (a GPU where there is one), `cpu` or `cuda` (without a GPU a ConfigError)."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': PyTorch sees no GPU; fix: device 'cpu', or a CUDA build of torch")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device '{name}' (known: auto, cpu, cuda)")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name in `DTYPES`; a ConfigError for another name."""
    import torch

    if name not in DTYPES:
        raise ConfigError(f"unknown dtype '{name}' (known: {', '.join(DTYPES)})")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def child_environment(**more: Any) -> dict[str, str]:
    """Return the environment in which a Python process finds this package and this root."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "LLAVA_ROOT": str(ROOT), **{k: str(v) for k, v in more.items()}}


def rank() -> int:
    """Return this process's rank (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of launched processes (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_offline() -> None:
    """Forbid the Hugging Face libraries any request; call it before they are imported."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[variable] = "1"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or an unpacked archive: the record says so by a null
    return answer.stdout.strip()


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a number: versions, machine, commit and date (UTC)."""
    packages: dict[str, str | None] = {}
    for package in REPORTED_PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = None
    torch = sys.modules.get("torch")  # asked only when the run has loaded it: an import costs seconds
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch is not None else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "commit": _commit(),
        "packages": packages,
    }


def progress(work: Iterable[Any] | int, desc: str, **options: Any) -> tqdm[Any]:
    """Return a progress bar on stderr, over an iterable or up to a total number of steps."""
    from tqdm import tqdm

    if options.get("disable") is False:
        del options["disable"]  # tqdm then asks TQDM_DISABLE of the environment
    source = {"total": work} if isinstance(work, int) else {"iterable": work}
    return tqdm(**source, desc=printable(desc), file=sys.stderr, dynamic_ncols=True, mininterval=0.5, **options)
