"""Recorded requests and replies in one SQLite file: a request with a recorded reply is not sent again.

Each reply is on disk before it is used. After `kill -9` only the requests under way, at most `concurrency`, are sent
again; the most that they can have cost counts against the budget.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from companion.teacher.chat import BudgetError, ChatReply, ChatRequest, valid_unicode
from llava_core.runtime import ConfigError, DataError, display_path, shortened

_REPLY = (
    "text, model, prompt_tokens, completion_tokens, cost_usd, finish_reason, price_prompt, price_completion, date, kind"
)
_NUMBERS = ("prompt_tokens", "completion_tokens", "cost_usd", "price_prompt", "price_completion")
_TABLES = (
    f"replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, {_REPLY})",
    "failures (key TEXT NOT NULL, date TEXT NOT NULL, why TEXT NOT NULL, doubtful_usd REAL NOT NULL, last INTEGER)",
    "batches (name TEXT PRIMARY KEY, date TEXT NOT NULL, file TEXT NOT NULL, id TEXT, state TEXT NOT NULL)",
    "asked (key TEXT PRIMARY KEY, request TEXT NOT NULL)",  # requests of the open batch
)
# only numbers of at least 0: in a damaged file another cost would add to the budget
_SPEND = "SELECT TOTAL(cost_usd) FROM replies WHERE cost_usd BETWEEN 0 AND 9e999"
_DOUBTFUL = "SELECT TOTAL(doubtful_usd) FROM failures WHERE doubtful_usd BETWEEN 0 AND 9e999"
NO_REPLY = "sent, and no reply arrived"
MOST_BYTES = 2**26  # of a row: far more than the longest answer of a server
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes the cassette


@dataclass(frozen=True)
class OpenBatch:
    """A requested batch; its replies are not recorded yet, and its id is None if the creation was not confirmed."""

    name: str
    file: str
    id: str | None
    requests: Sequence[ChatRequest]


Failure = tuple[ChatRequest, str, float, bool]
"""The arguments of `Cassette.fail`."""


class Cassette:
    """SQLite file of replies (path None: a temporary one); every write is on disk before the method returns.

    Raises:
        DataError: the file is missing (read only) or is no cassette; in methods, it is damaged or cannot be written.
    """

    def __init__(self, path: str | Path | None, read_only: bool = False) -> None:
        self.path = Path(path or "")
        self._lock = threading.Lock()
        address = f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}" if path else ""
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if read_only and not os.access(self.path.absolute().parent, os.W_OK):
            address += "&immutable=1"  # reading a write-ahead log creates two files, which this folder forbids
        try:
            self._file = sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False)
            self._file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
            if self._file.execute("SELECT 1 FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone():
                raise sqlite3.DatabaseError("it has a view or a trigger, which no cassette has")
            if not read_only:
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=FULL")
                with self._file:
                    for table in _TABLES:
                        self._file.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                    self._file.execute("CREATE INDEX IF NOT EXISTS cost ON replies (cost_usd)")  # for `spend`
            self._file.execute(f"SELECT key, request, {_REPLY} FROM replies LIMIT 1")
            self._file.execute("SELECT key, date, why, doubtful_usd, last FROM failures LIMIT 1")
        except sqlite3.Error as error:
            raise DataError(
                f"{display_path(self.path)}: no cassette of replies ({error}); name another file"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One thread at a time; what it writes is on disk afterwards, or nothing of it after an error."""
        try:
            with self._lock, self._file:
                yield
        except sqlite3.Error as error:
            raise DataError(f"{display_path(self.path)}: {error}; free the disk, or name another cassette") from error

    def get(self, request: ChatRequest) -> ChatReply | None:
        with self._transaction():
            row = self._file.execute(f"SELECT {_REPLY} FROM replies WHERE key = ?", (request.key,)).fetchone()
        for name, value in zip(_REPLY.split(", "), row or (), strict=False):
            number = isinstance(value, int | float) and 0 <= value < math.inf
            if not (number if name in _NUMBERS else isinstance(value, str)):
                problem = f"the reply to request {request.key} has the {name} {shortened(repr(value))}"
                raise DataError(f"{display_path(self.path)}: {problem}; remove its row, or name another cassette")
        return replace(ChatReply(*row), cached=True) if row else None

    def put(self, request: ChatRequest, reply: ChatReply, attempt: int | None = None) -> None:
        """Record a reply, and that the attempt of `begin` is over; the first reply to a request stays."""
        with self._transaction():
            recorded = self._put(request, reply)
            doubtful = 0.0 if recorded else reply.cost_usd  # a second reply is not recorded, but paid
            self._end(attempt, doubtful)

    def begin(self, request: ChatRequest, most_usd: float, budget_usd: float | None = None) -> int:
        """Record an attempt before it is sent and return its number; BudgetError if it could exceed the budget."""
        with self._transaction():
            if budget_usd is not None:
                spent, doubtful = self._total(_SPEND), self._total(_DOUBTFUL)
                if not spent + doubtful + most_usd <= budget_usd + 1e-9:  # nor if one of them is NaN
                    raise over_budget(budget_usd, spent, doubtful, most_usd)
            return self._fail(request, NO_REPLY, most_usd, False)

    def cancel(self, attempt: int) -> None:
        with self._transaction():
            self._end(attempt, 0.0)

    def _end(self, attempt: int | None, doubtful: float) -> None:
        if doubtful:
            self._file.execute("UPDATE failures SET doubtful_usd = ? WHERE rowid = ?", (doubtful, attempt))
        else:
            self._file.execute("DELETE FROM failures WHERE rowid = ?", (attempt,))

    def fail(self, request: ChatRequest, why: str, doubtful_usd: float = 0.0, last: bool = False) -> None:
        """Record a failed attempt, billed with at most `doubtful_usd`; `last`: the request is given up."""
        with self._transaction():
            self._fail(request, why, doubtful_usd, last)

    def _put(self, request: ChatRequest, reply: ChatReply) -> bool:
        values = [_stored(getattr(reply, name)) for name in _REPLY.split(", ")]
        query = f"INSERT OR IGNORE INTO replies (key, request, {_REPLY}) VALUES (?, ?{', ?' * len(values)})"
        return self._file.execute(query, (request.key, request.canonical, *values)).rowcount > 0

    def _fail(self, request: ChatRequest, why: str, doubtful_usd: float, last: bool) -> int:
        values = (request.key, _now(), valid_unicode(why), doubtful_usd, last)
        columns = "key, date, why, doubtful_usd, last"
        row = self._file.execute(f"INSERT INTO failures ({columns}) VALUES (?, ?, ?, ?, ?)", values).lastrowid
        assert row is not None
        return row

    def given_up(self, request: ChatRequest) -> str | None:
        query = "SELECT why FROM failures WHERE key = ? AND last ORDER BY rowid DESC"
        with self._transaction():
            row = self._file.execute(query, (request.key,)).fetchone()
        return row[0] if row else None

    def doubtful(self) -> float:
        """Return the most that the server may have billed for attempts without a reply, in USD."""
        with self._transaction():
            return self._total(_DOUBTFUL)

    def spend(self) -> float:
        with self._transaction():
            return self._total(_SPEND)

    def __len__(self) -> int:
        with self._transaction():
            return int(self._total("SELECT COUNT(*) FROM replies"))

    def _total(self, query: str) -> float:
        return float(self._file.execute(query).fetchone()[0])

    def begin_batch(self, batch: OpenBatch) -> None:
        """Record the requests of a batch, before the server is asked to create it."""
        with self._transaction():
            values = (batch.name, _now(), batch.file, batch.id)
            self._file.execute("INSERT INTO batches (name, date, file, id, state) VALUES (?, ?, ?, ?, 'open')", values)
            rows = ((request.key, request.canonical) for request in batch.requests)
            self._file.executemany("INSERT INTO asked (key, request) VALUES (?, ?)", rows)

    def open_batch(self) -> OpenBatch | None:
        """Return the batch without recorded replies, or None."""
        with self._transaction():
            row = self._file.execute("SELECT name, file, id FROM batches WHERE state = 'open'").fetchone()
            asked = self._file.execute("SELECT request FROM asked ORDER BY rowid").fetchall() if row else []
        if row is None:
            return None
        try:
            requests = [ChatRequest(**json.loads(text)) for (text,) in asked]
            name, file, batch_id = row
            return OpenBatch(name, file, batch_id, [request for request in requests if request.key])
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise DataError(f"{display_path(self.path)}: its open batch is damaged; name another cassette") from error

    def note_batch(self, batch: OpenBatch) -> None:
        with self._transaction():
            self._file.execute("UPDATE batches SET id = ? WHERE name = ?", (batch.id, batch.name))

    def end_batch(
        self,
        batch: OpenBatch,
        state: str,
        replies: Iterable[tuple[ChatRequest, ChatReply]] = (),
        failures: Iterable[Failure] = (),
    ) -> None:
        """Record the results of a batch and that it is closed, in one transaction."""
        with self._transaction():
            for request, reply in replies:
                self._put(request, reply)
            for failure in failures:
                self._fail(*failure)
            self._file.execute("UPDATE batches SET state = ? WHERE name = ?", (state, batch.name))
            self._file.execute("DELETE FROM asked")

    def close(self) -> None:
        self._file.close()


def over_budget(limit: float, spent: float, doubtful: float, most: float) -> BudgetError:
    doubt = f" and {doubtful:.4f} that may have been billed" if doubtful else ""
    return BudgetError(
        f"budget of {limit:g} USD: {spent:.4f} spent{doubt}, and the next request may cost {most:.4f}; "
        "raise the budget to go on"
    )


def _stored(value: str | float) -> str | float:
    return valid_unicode(value) if isinstance(value, str) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class WriterLock:
    """Exclusive lock for writing to a cassette; it ends with the object or with the process, also by `kill -9`."""

    def __init__(self, path: Path, timeout: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(f"{path}.lock", timeout=timeout, isolation_level=None, check_same_thread=False)
        try:
            self._file.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"{display_path(path)}: another process records to this cassette; wait for it or name another cassette"
            ) from error

    def __del__(self) -> None:
        self._file.close()


_LOCKS: weakref.WeakValueDictionary[Path, WriterLock] = weakref.WeakValueDictionary()


def lock_cassette(cassette: Path) -> WriterLock:
    """Lock a cassette against other processes, or raise ConfigError; all callers in a process share the lock."""
    path = cassette.absolute()
    lock = _LOCKS.get(path)
    if lock is None:
        lock = _LOCKS[path] = WriterLock(path, LOCK_TIMEOUT)
    return lock
