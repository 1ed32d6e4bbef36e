"""The process that pays: it alone talks to the server and writes the cassette, and it outlives a killed caller.

A reply that arrives just when `kill -9` meets the process that asked is paid for and lost. So the caller does not ask
itself: a second process does, in a session of its own. When its caller is gone it begins nothing new, waits for the
replies that are under way, commits them and ends. While it lives it holds the cassette's lock, so that a caller started
again waits for it first and then finds those replies.

What remains: a reply is lost if *this* process is killed between the reply's last byte and the commit that follows at
once (nothing is awaited between the two), or if the machine stops while requests are under way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from companion.teacher.cassette import Cassette
from companion.teacher.chat import BudgetError, ChatError, ChatReply, ChatRequest, ServerError
from companion.teacher.live import CONCURRENCY, NO_SDK, LiveClient
from llava_core.runtime import CompanionError, ConfigError, DataError, shown

_ERRORS: Mapping[str, type[CompanionError]] = {
    kind.__name__: kind for kind in (BudgetError, ServerError, ChatError, ConfigError, DataError)
}
_MOST_THREADS = 1024
_ENDED = "the recording process has ended; start again: the replies that it got are in the cassette"


class RecorderProcess:
    """Answers from a cassette, and from a paid server where that has no reply yet; see the module's text.

    Args:
        cassette: SQLite file of the replies.
        concurrency: how many requests a caller should have under way.
        live: further arguments of `LiveClient`. A budget counts what the cassette's replies have cost before.

    Raises:
        ConfigError: the package openai is not installed, there is no key, or another recorder holds the cassette.
        DataError: the file is no cassette.
    """

    def __init__(self, cassette: str | Path, concurrency: int = CONCURRENCY, **live: Any) -> None:
        _need_sdk()
        self.path, self.concurrency = Path(cassette).absolute(), concurrency
        if (earlier := _OPEN.pop(str(self.path), None)) is not None:
            earlier.close()  # a notebook's cell that runs again would wait for itself
        # a session of its own: neither the terminal's Ctrl-C nor a kill of the caller's group reaches it
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from companion.teacher.recorder import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([_package_root(), os.environ.get("PYTHONPATH", "")])},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._lock, self._count = self._process.stdin, threading.Lock(), 0
        self._waiting: dict[int, Future[ChatReply]] = {}
        self._gone = threading.Event()
        self._close = weakref.finalize(self, _end, self._process)
        self._write({"cassette": str(self.path), "concurrency": concurrency, **live})
        hello = {"waiting": True}
        while "waiting" in hello:
            hello = json.loads(self._process.stdout.readline() or '{"error": "", "message": "it did not start"}')
            if "waiting" in hello:
                note = "waiting for another process that records to it, or for what a killed one had under way"
                print(f"note: {shown(self.path)}: {note}", file=sys.stderr)
        if "error" in hello:
            self._close()
            raise _error(hello)
        _OPEN[str(self.path)] = self
        shared = (self._process.stdout, self._waiting, self._lock, self._gone)
        threading.Thread(target=_distribute, args=shared, name="recorder", daemon=True).start()

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply as `ChatClient` says; when this returns the reply is on disk."""
        future: Future[ChatReply] = Future()
        with self._lock:
            if self._gone.is_set():
                raise ServerError(_ENDED)
            self._count += 1
            number = self._count
            self._waiting[number] = future
        self._write({"id": number, "request": json.loads(request.canonical)})
        return future.result()

    def stop(self) -> None:
        """Begin no further attempt; those under way are finished, and kept."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def close(self) -> None:
        """Let the process finish what is under way, and wait for it."""
        self._close()

    def _write(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._stdin.write(line)
                self._stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise ServerError(_ENDED) from error


_OPEN: weakref.WeakValueDictionary[str, RecorderProcess] = weakref.WeakValueDictionary()


def _package_root() -> str:
    return str(Path(__file__).resolve().parents[2])


def _need_sdk() -> None:
    try:
        found = importlib.util.find_spec("openai") is not None
    except ValueError:  # a module without a spec
        found = False
    if not found:
        raise ConfigError(NO_SDK)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def _error(message: Mapping[str, Any]) -> CompanionError:
    return _ERRORS.get(message["error"], ServerError)(message["message"])


def _distribute(
    stdout: IO[bytes], waiting: dict[int, Future[ChatReply]], lock: threading.Lock, gone: threading.Event
) -> None:
    """Hand the process's answers to those who wait for them."""
    for line in stdout:
        answer = json.loads(line)
        with lock:
            future = waiting.pop(answer["id"])
        if "error" in answer:
            future.set_exception(_error(answer))
        else:
            future.set_result(ChatReply(**answer["reply"]))
    with lock:
        gone.set()
    for future in waiting.values():
        future.set_exception(ServerError(_ENDED))
    stdout.close()


# ------------------------------------------------------------------------------------------------ the process


def main() -> None:
    """Read options, then requests, one JSON value per line of stdin; write replies as they come."""
    from companion.teacher.client import RecordClient

    say, lock = sys.stdout.buffer, threading.Lock()

    def tell(message: Mapping[str, Any]) -> None:
        try:
            with lock:
                say.write(json.dumps(message).encode() + b"\n")
                say.flush()
        except OSError:
            pass  # the caller is gone; the cassette is what counts

    def answer(number: int, fields: Mapping[str, Any]) -> None:
        try:
            tell({"id": number, "reply": client.complete(ChatRequest(**fields)).as_json()})
        except CompanionError as error:
            tell({"id": number, "error": type(error).__name__, "message": str(error)})
        except Exception as error:
            tell({"id": number, "error": "ServerError", "message": f"{type(error).__name__}: {error}"})

    try:
        options = json.loads(sys.stdin.buffer.readline())
        path = Path(options.pop("cassette"))
        try:
            held = hold(path, 0.5)
        except ConfigError:
            tell({"waiting": True})
            held = hold(path, 2 * float(options.get("timeout", 120.0)) + 30)
        cassette = Cassette(path)
        if batch := cassette.open_batch():  # asked one by one they would be paid twice
            under_way = f"a batch of {len(batch.requests)} requests is under way"
            raise ConfigError(f"{shown(path)}: {under_way}; let the client 'batch' read it, or name another cassette")
        live = LiveClient(**options, spent_usd=cassette.spend(), doubtful_usd=cassette.doubtful())
        client = RecordClient(live, cassette)
    except CompanionError as error:
        return tell({"error": type(error).__name__, "message": str(error)})
    except Exception as error:
        return tell({"error": "ServerError", "message": f"{type(error).__name__}: {error}"})
    tell({"ready": True})
    with ThreadPoolExecutor(_MOST_THREADS) as pool:  # the caller decides how many requests are under way
        for line in sys.stdin.buffer:
            if line.endswith(b"\n"):  # a killed caller may leave half of one
                message = json.loads(line)
                pool.submit(answer, message["id"], message["request"])
        live.stop()
    cassette.close()
    held.close()
    return None


def hold(cassette: Path, patience: float) -> sqlite3.Connection:
    """Take the lock of a cassette, which its holder loses by ending in whatever way.

    Raises:
        ConfigError: another process kept it for so many seconds.
    """
    cassette.parent.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(f"{cassette}.lock", timeout=patience, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"{shown(cassette)}: another process records to this cassette; wait for it or name another cassette"
        ) from error
    return lock
