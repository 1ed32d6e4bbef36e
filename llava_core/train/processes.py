"""The processes of a run: ranks that end with their launcher, errors that reach it, and the lock of the record."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from llava_core import runtime
from llava_core.config import ParallelConfig, RunConfig
from llava_core.record import RunRecord
from llava_core.runtime import CompanionError, ConfigError, child_environment, display_path, lock_descriptor
from llava_core.train.signals import Interrupted, stop_on_signal

POLL_S = 0.1
WORKER = [sys.executable, "-m", "llava_core.train"]


def launched() -> bool:
    """Whether this process is one rank of a start by torchrun or srun, whose variables become torchrun's."""
    env = os.environ
    # in a job's shell SLURM_NTASKS is set as well; this one only inside `srun`
    if "WORLD_SIZE" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        first = re.match(r"([^\[,]+)(?:\[(\d+)[^]]*\]([^,]*))?", env["SLURM_STEP_NODELIST"])
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        address = "".join(part or "" for part in first.groups()) if first else ""
        if "MASTER_ADDR" not in env and (not address or "[" in address):
            raise ConfigError(
                f"the first of the nodes {env['SLURM_STEP_NODELIST']} is not clear; fix: export MASTER_ADDR=$(scontrol "
                "show hostnames | head -n 1) before srun"
            )
        env.setdefault("MASTER_ADDR", address)
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    return "WORLD_SIZE" in env


def ranks_per_node(parallel: ParallelConfig) -> int:
    """Processes per node; for "gpus" those of this machine, a ConfigError where there is none."""
    if parallel.processes != "gpus":
        return parallel.processes
    import torch

    if not (count := torch.cuda.device_count()):
        raise ConfigError("scale.parallel.processes is 'gpus', and PyTorch sees no GPU; fix: set it to a number")
    return count


def ranks_of(config: RunConfig) -> int:
    """Ranks of a run on all nodes; a ConfigError if they cannot share the global batch equally."""
    parallel, batch = config.scale.parallel, config.experiment.train.global_batch
    ranks = ranks_per_node(parallel) * parallel.nodes
    if batch % ranks:
        raise ConfigError(
            f"train.global_batch is {batch}, which {ranks} ranks cannot share equally; "
            "fix: scale.parallel.processes and nodes whose product divides it"
        )
    return ranks


def check_ranks(config: RunConfig) -> None:
    """Raise ConfigError if a run cannot be started as this process was: alone, or as one of WORLD_SIZE ranks."""
    parallel, ranks = config.scale.parallel, ranks_of(config)
    local = ranks // parallel.nodes
    if launched() and runtime.world_size() != ranks:
        raise ConfigError(
            f"started as {runtime.world_size()} processes (WORLD_SIZE), but the scale has {parallel.nodes} nodes x "
            f"{local} processes; fix: --set scale.parallel.processes=N --set scale.parallel.nodes=N"
        )
    if parallel.nodes > 1 and not launched():
        run = f"{config.experiment.name} --scale {config.scale.name}"
        raise ConfigError(
            f"scale.parallel.nodes is {parallel.nodes}: start it on each node; fix: sbatch what `llava train {run} "
            f"--slurm` prints, or run `torchrun --nnodes {parallel.nodes} --nproc-per-node {local} --node-rank K "
            f"--master-addr HOST -m companion train {run}` (and your --set) on each; torchrun kills "
            "ranks 30 s after a SIGTERM, too soon for the state of a large model"
        )


@contextlib.contextmanager
def record_lock(folder: Path) -> Iterator[IO[str]]:
    """Hold the lock of a record, also in child processes that inherit the file; a waiting process prints the holder."""
    with open(folder / ".lock", "a+") as file:
        try:
            lock_descriptor(file.fileno(), wait=False)
        except BlockingIOError:
            file.seek(0)
            sys.stderr.write(f"{display_path(folder)}: waiting, it is being trained by {file.read() or '?'}\n")
            sys.stderr.flush()
            lock_descriptor(file.fileno())
        sign_lock(file, os.getpid())
        yield file


def sign_lock(file: IO[str], pid: int) -> None:
    """Write into a lock file which process holds the lock."""
    file.seek(0)
    file.truncate()
    file.write(f"pid {pid} on {socket.gethostname()} since {datetime.now(UTC).isoformat(timespec='seconds')}")
    file.flush()


def die_with_parent() -> None:
    """End this process when its parent ends, however that ends; call it before anything else."""
    parent = int(os.environ.get("LLAVA_PARENT", os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)
    else:
        threading.Thread(target=watch, daemon=True).start()


def error_file(record: RunRecord, name: str) -> Path:
    """Where the process `name` ("rank0", "launch") of a record leaves why it failed."""
    return record.path / "logs" / f"{name}.json"


def end_with_error(record: RunRecord, name: str, error: BaseException) -> None:
    """Show an error, leave it for the launcher, and end this process."""
    known = isinstance(error, CompanionError)
    lines = error.args if known else "".join(traceback.format_exception(error)[-4:]).strip().splitlines()
    code = getattr(error, "exit_code", 1)
    if name == "launch" or not known:  # the message of a rank is shown by its launcher
        sys.stderr.write(f"error: {error}\n" if known else traceback.format_exc())
        sys.stderr.flush()
    with contextlib.suppress(OSError):  # a full disk
        runtime.write_json(
            error_file(record, name), {"exit_code": code, "message": [runtime.printable(line) for line in lines]}
        )
    os._exit(code)  # the exit handlers of a process group wait for ranks that may be gone


def error_of(record: RunRecord, name: str) -> CompanionError | None:
    """The error that a process of a record left."""
    if not (file := error_file(record, name)).exists():
        return None
    left = runtime.read_json(file)
    return (Interrupted if left["exit_code"] == Interrupted.exit_code else CompanionError)(*left["message"])


def free_port() -> int:
    """A port for ranks to meet at; no outgoing connection takes it before they do, as it is not an ephemeral one."""
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(record: RunRecord, arguments: Sequence[str], lock: IO[str]) -> None:
    """Train a record by ranks on this machine; rank 0 takes over the lock of the record.

    Raises:
        CompanionError: a rank failed; the others are killed at once.
        Interrupted: SIGTERM or Ctrl-C; it was passed on, and the ranks have saved their state.
    """
    count = ranks_per_node(record.config.scale.parallel)
    environment = child_environment(
        WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, LLAVA_PARENT=os.getpid(),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(),
    )  # fmt: skip
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine may not resolve its own name
    ranks: list[subprocess.Popen[bytes]] = []
    with stop_on_signal(announce=False) as stop:
        try:
            for k in range(count):
                ranks.append(_start_rank(record, k, arguments, environment, lock))
            sign_lock(lock, ranks[0].pid)
            lock.close()  # rank 0 holds the lock now, until it ends
            passed_on = False
            while None in (codes := [rank.poll() for rank in ranks]):
                _check(record, codes, stop.requested)
                if stop.requested and not passed_on:
                    passed_on = True
                    for rank in ranks:
                        rank.terminate()
                time.sleep(POLL_S)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    _check(record, codes, stop.requested)
    if any(codes):
        raise error_of(record, "rank0") or Interrupted(f"{display_path(record.path)}: stopped; start it again")


def _start_rank(
    record: RunRecord, k: int, arguments: Sequence[str], environment: Mapping[str, str], lock: IO[str]
) -> subprocess.Popen[bytes]:
    """Start rank `k`; rank 0 writes to this process's stderr, the others to a file of the record."""
    error_file(record, f"rank{k}").unlink(missing_ok=True)
    log = record.path / "logs" / f"rank{k}.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "wb") if k else contextlib.nullcontext(2) as output:
        return subprocess.Popen(
            [*WORKER, str(record.path), *arguments],
            env={**environment, "RANK": str(k), "LOCAL_RANK": str(k)}, pass_fds=[] if k else [lock.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            process_group=0,  # a Ctrl-C of the terminal comes once, from this process
        )  # fmt: skip


def _check(record: RunRecord, codes: Sequence[int | None], stopping: bool) -> None:
    """Raise the error of the rank that failed first, if one of the exit codes is a failure."""
    failed = {k: code for k, code in enumerate(codes) if code and code != Interrupted.exit_code}
    if not failed:
        return
    name = display_path(record.path)
    if stopping and set(failed.values()) == {-signal.SIGTERM}:
        raise Interrupted(f"{name}: stopped before its first step; start it again")
    files = {k: error_file(record, f"rank{k}") for k in failed}
    # a killed rank leaves no file; the others then fail for its sake
    first = min(failed, key=lambda k: files[k].stat().st_mtime_ns if files[k].exists() else 0)
    error = error_of(record, f"rank{first}")
    lines = error.args if error else ()
    if not lines:
        log = record.path / "logs" / f"rank{first}.log"
        tail = log.read_text(errors="replace").splitlines()[-12:] if first else []
        end = f"exit code {failed[first]}" if failed[first] > 0 else f"signal {-failed[first]} (9: out of memory?)"
        lines = (f"ended by {end}", *tail)
    raise CompanionError(f"{name}: rank {first} of {len(codes)}: {lines[0]}", *lines[1:])
