"""Requests and replies in one SQLite file: what was paid for once is never asked for again."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from companion.teacher.chat import ChatReply, ChatRequest
from llava_core.runtime import DataError, shown

_REPLY = (
    "text, model, prompt_tokens, completion_tokens, cost_usd, finish_reason, price_prompt, price_completion, date, kind"
)
_TABLES = (
    f"replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, {_REPLY})",
    "failures (key TEXT NOT NULL, date TEXT NOT NULL, why TEXT NOT NULL, doubtful_usd REAL NOT NULL, last INTEGER)",
    "batches (name TEXT PRIMARY KEY, date TEXT NOT NULL, file TEXT NOT NULL, id TEXT, state TEXT NOT NULL)",
    "asked (key TEXT PRIMARY KEY, request TEXT NOT NULL)",  # of the batch that is open
)


@dataclass(frozen=True)
class OpenBatch:
    """A batch that was asked for, and whose replies are not here yet.

    Attributes:
        name: ours; the server keeps it as metadata.
        file: the server's id of the uploaded requests.
        id: the server's id of the batch; None if its creation was not confirmed.
        requests: what it asks.
    """

    name: str
    file: str
    id: str | None
    requests: Sequence[ChatRequest]


Failure = tuple[ChatRequest, str, float, bool]
"""The arguments of `Cassette.fail`."""


class Cassette:
    """One transaction per reply, on disk (write-ahead log, synchronous) before `put` returns.

    Args:
        path: the SQLite file; made with its folder where it is missing.
        read_only: do not make or change it.

    Raises:
        DataError: the file is missing (read only) or is no cassette.
    """

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        address = f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        if read_only and not os.access(self.path.absolute().parent, os.W_OK):
            address += "&immutable=1"  # SQLite puts two files beside a log that it reads, and may not do so here
        try:
            self._file = sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False)
            if not read_only:
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=FULL")
                with self._file:
                    for table in _TABLES:
                        self._file.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            self._file.execute(f"SELECT key, request, {_REPLY} FROM replies LIMIT 1")
            self._file.execute("SELECT key, date, why, doubtful_usd, last FROM failures LIMIT 1")
        except sqlite3.Error as error:
            raise DataError(f"{shown(self.path)}: no cassette of replies ({error}); name another file") from error

    def get(self, request: ChatRequest) -> ChatReply | None:
        """Return the reply to a request, or None."""
        with self._lock:
            row = self._file.execute(f"SELECT {_REPLY} FROM replies WHERE key = ?", (request.key,)).fetchone()
        return replace(ChatReply(*row), cached=True) if row else None

    def put(self, request: ChatRequest, reply: ChatReply) -> None:
        """Keep a reply; the first one to a request stays."""
        with self._lock, self._file:
            self._put(request, reply)

    def _put(self, request: ChatRequest, reply: ChatReply) -> None:
        values = [getattr(reply, name) for name in _REPLY.split(", ")]
        self._file.execute(
            f"INSERT OR IGNORE INTO replies (key, request, {_REPLY}) VALUES (?, ?{', ?' * len(values)})",
            (request.key, request.canonical, *values),
        )

    def fail(self, request: ChatRequest, why: str, doubtful_usd: float = 0.0, last: bool = False) -> None:
        """Keep that an attempt failed.

        Args:
            request: got no reply.
            why: in words.
            doubtful_usd: what the server may have billed for it at most.
            last: the request was given up.
        """
        with self._lock, self._file:
            self._fail(request, why, doubtful_usd, last)

    def _fail(self, request: ChatRequest, why: str, doubtful_usd: float, last: bool) -> None:
        self._file.execute(
            "INSERT INTO failures (key, date, why, doubtful_usd, last) VALUES (?, ?, ?, ?, ?)",
            (request.key, _now(), why, doubtful_usd, last),
        )

    def given_up(self, request: ChatRequest) -> str | None:
        """Return why a request was given up, or None."""
        query = "SELECT why FROM failures WHERE key = ? AND last ORDER BY rowid DESC"
        with self._lock:
            row = self._file.execute(query, (request.key,)).fetchone()
        return row[0] if row else None

    def doubtful(self) -> float:
        """Return what the server may have billed, at most, for attempts that brought no reply, in USD."""
        with self._lock:
            return float(self._file.execute("SELECT TOTAL(doubtful_usd) FROM failures").fetchone()[0])

    def __len__(self) -> int:
        with self._lock:
            return int(self._file.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def spend(self) -> float:
        """Return what all replies together cost, in USD."""
        with self._lock:
            return float(self._file.execute("SELECT TOTAL(cost_usd) FROM replies").fetchone()[0])

    def models(self) -> dict[str, int]:
        """Return how many replies each model snapshot gave, by its name."""
        with self._lock:
            return dict(self._file.execute("SELECT model, COUNT(*) FROM replies GROUP BY model ORDER BY MIN(date)"))

    def begin_batch(self, batch: OpenBatch) -> None:
        """Keep what a batch will ask, before the server is asked to begin with it."""
        with self._lock, self._file:
            values = (batch.name, _now(), batch.file, batch.id)
            self._file.execute("INSERT INTO batches (name, date, file, id, state) VALUES (?, ?, ?, ?, 'open')", values)
            rows = ((request.key, request.canonical) for request in batch.requests)
            self._file.executemany("INSERT INTO asked (key, request) VALUES (?, ?)", rows)

    def open_batch(self) -> OpenBatch | None:
        """Return the batch that is under way, or None."""
        with self._lock:
            row = self._file.execute("SELECT name, file, id FROM batches WHERE state = 'open'").fetchone()
            asked = self._file.execute("SELECT request FROM asked ORDER BY rowid").fetchall() if row else []
        if row is None:
            return None
        name, file, found = row
        return OpenBatch(name, file, found, [ChatRequest(**json.loads(text)) for (text,) in asked])

    def note_batch(self, batch: OpenBatch) -> None:
        """Keep the server's ids of the batch under way."""
        with self._lock, self._file:
            self._file.execute("UPDATE batches SET file = ?, id = ? WHERE name = ?", (batch.file, batch.id, batch.name))

    def end_batch(
        self,
        batch: OpenBatch,
        state: str,
        replies: Iterable[tuple[ChatRequest, ChatReply]] = (),
        failures: Iterable[Failure] = (),
    ) -> None:
        """Keep all that came of a batch, in one transaction, and that it is not under way any more."""
        with self._lock, self._file:
            for request, reply in replies:
                self._put(request, reply)
            for failure in failures:
                self._fail(*failure)
            self._file.execute("UPDATE batches SET state = ? WHERE name = ?", (state, batch.name))
            self._file.execute("DELETE FROM asked")

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
