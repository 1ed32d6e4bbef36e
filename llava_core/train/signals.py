"""SIGTERM and Ctrl-C as a request to save the state and stop after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from llava_core.runtime import CompanionError, rank


class Interrupted(CompanionError, KeyboardInterrupt):  # noqa: N818 - not an error
    """A run was stopped on request; starting it again resumes it. In a notebook it is an ordinary KeyboardInterrupt."""

    exit_code = 75  # EX_TEMPFAIL; a job scheduler requeues on it


class StopRequest:
    """Whether this process was asked to stop, and when (`time.monotonic`)."""

    since: float | None = None

    @property
    def requested(self) -> bool:
        return self.since is not None


@contextlib.contextmanager
def stop_on_signal(announce: bool = True) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the caller reads after each step; a second Ctrl-C raises at once.

    Outside the main thread, which alone receives signals, the request never comes.
    """
    stop = StopRequest()

    def request(number: int, frame: object) -> None:
        now = time.monotonic()
        if stop.since is None:
            stop.since = now
            if announce and rank() == 0:
                # not sys.stderr: the signal may have interrupted one of its own writes
                os.write(2, b"\nstopping after this step, with a saved state; Ctrl-C again stops at once\n")
        elif number == signal.SIGINT and now - stop.since > 1:  # one Ctrl-C under torchrun arrives twice
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler or signal.SIG_DFL)
