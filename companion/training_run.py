"""A run in a process of its own, which a notebook starts, follows, leaves and finds again."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from llava_core.config import RunConfig
from llava_core.record import RunRecord
from llava_core.runtime import (
    CompanionError,
    ConfigError,
    DataError,
    child_environment,
    display_path,
    fcntl,
    printable_stderr,
    user_path,
    write_json,
)
from llava_core.train.launch import launch, open_record
from llava_core.train.processes import check_ranks, end_with_error, error_file, error_of, sign_lock
from llava_core.train.signals import Interrupted
from llava_core.train.trackers import check_trackers

POLL_S = 0.2
WORKER = [sys.executable, "-m", "companion.training_run"]
LAUNCHED = "launch.yaml"
"""The run at the scale of this start, in its record."""
TAIL = 4096
"""Bytes of the log that `follow` begins with."""


class TrainingRun:
    """A run that `start` began; all it knows is in the record, so `attach` finds it from any process.

    Attributes:
        record: the record of the run.
        log: the file of its messages and progress bars, those of the runs that it starts from included.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record, self.log = record, record.path / "train.log"
        self._lock = record.path / ".launch.lock"  # held by the process of the run for its whole life

    def __repr__(self) -> str:
        return f"TrainingRun({display_path(self.record.path)}: {self.status})"

    @property
    def status(self) -> Literal["running", "finished", "stopped", "failed"]:
        """`stopped` runs have saved their state on request; starting a stopped or failed run again resumes it."""
        if self._running():
            return "running"
        if self.record.finished:
            return "finished"
        return "stopped" if isinstance(error_of(self.record, "launch"), Interrupted) else "failed"

    def follow(self) -> RunRecord | None:
        """Show the log until the run ends, and return its record; an interrupt ends only this call, with None.

        Raises:
            CompanionError: the run failed; its message.
            Interrupted: the run was stopped.
        """
        if self.record.finished and not self.log.exists():  # trained by `launch`
            return self.record
        try:
            # text, because a read may end inside a character; newline="" keeps the returns of progress bars
            with open(self.log, encoding="utf-8", errors="replace", newline="") as log:
                log.seek(max(0, self.log.stat().st_size - TAIL))
                running = True
                while running:
                    running = self._running()  # before the read, which must see the last words of the run
                    sys.stderr.write(log.read())
                    sys.stderr.flush()
                    time.sleep(POLL_S if running else 0)
        except KeyboardInterrupt:
            sys.stderr.write(f"\nthe run goes on; attach({display_path(self.record.path)!r}) finds it again\n")
            return None
        if self.record.finished:
            return self.record
        raise error_of(self.record, "launch") or CompanionError(
            f"{display_path(self.record.path)}: the process of the run was killed; fix: start it again to resume; "
            f"its log is {display_path(self.log)}"
        )

    def cancel(self) -> None:
        """Ask the run to save its state and stop after its current step; `follow` waits until it has."""
        if not self._running():
            return
        pid, host = re.findall(r"^pid (\d+) on (\S+)", self._lock.read_text())[0]
        if host != socket.gethostname():
            raise CompanionError(f"{display_path(self.record.path)}: runs on {host}; fix: cancel it there")
        # what a process leaves that cannot save yet; one that can writes its own
        left = {"exit_code": Interrupted.exit_code, "message": [f"{display_path(self.record.path)}: cancelled"]}
        write_json(error_file(self.record, "launch"), left)
        os.kill(int(pid), signal.SIGTERM)

    def _running(self) -> bool:
        if not self._lock.exists():
            return False
        with open(self._lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def start(config: RunConfig, resume: bool = True) -> TrainingRun:
    """Launch a run in a process that outlives this one, unless it is finished or running; arguments as `launch`."""
    if fcntl is None:
        raise ConfigError("start() needs file locks, which this system lacks; fix: use launch()")
    check_ranks(config)
    check_trackers(config)
    run = TrainingRun(record := open_record(config))
    with open(run._lock, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return run
        except OSError as error:  # some clusters' file systems lock nothing
            raise ConfigError(
                f"{display_path(record.path)}: start() needs file locks: {error.strerror}; fix: use launch()"
            ) from error
        if record.finished:
            return run
        config.write(record.path / LAUNCHED)
        error_file(record, "launch").unlink(missing_ok=True)
        command = [*WORKER, str(record.path)]
        with open(run.log, "wb") as log:
            process = subprocess.Popen(
                command if resume else [*command, "--no-resume"],
                env=child_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                pass_fds=[lock.fileno()],
            )  # fmt: skip
        sign_lock(lock, process.pid)
    return run


def attach(record: str | Path) -> TrainingRun:
    """Return the run of a record, e.g. after a restart of the kernel."""
    run = TrainingRun(RunRecord(user_path(record)))
    if not (run.log.exists() or run.record.finished):
        raise DataError(f"{record}: not the record of a run of start(); fix: runs/EXPERIMENT/SCALE/RUN_ID")
    return run


def main() -> None:
    """Launch the run of a record: the process that `start` leaves it to."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--no-resume", action="store_true")
    arguments = parser.parse_args()
    record = RunRecord(arguments.record)
    with printable_stderr():
        try:
            launch(RunConfig.read(record.path / LAUNCHED), not arguments.no_resume)
        except BaseException as error:
            end_with_error(record, "launch", error)


if __name__ == "__main__":
    main()
