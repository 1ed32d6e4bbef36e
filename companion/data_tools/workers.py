"""The same work on many items, on all cores, with few of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from llava_core.runtime import ConfigError, DataError

R = TypeVar("R")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> None:
    pass


def _begin(begin: Callable[[], None]) -> None:
    parent = multiprocessing.parent_process()

    def follow() -> None:  # a worker whose parent was killed would wait for work for ever
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    begin()


def spread(
    work: Callable[..., R],
    items: Iterable[tuple[Any, ...]],
    processes: int | None = None,
    begin: Callable[[], None] = _nothing,
) -> Iterator[R]:
    """Yield `work(*item)` of every item as it is finished, not in order; never more than two items each are in memory.

    Args:
        work: a function of a module.
        items: its arguments.
        processes: how many; None for one per core. With 1, or a single item, this process does the work.
        begin: called first in each process.

    Raises:
        ConfigError: fewer than one process.
        DataError: a worker was ended from outside.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"{processes} processes: write 1 or more, or nothing for one per core")
    processes, items = processes or cores(), iter(items)
    first = list(islice(items, 2))
    if processes == 1 or len(first) < 2:
        if first:
            begin()
        for item in chain(first, items):
            yield work(*item)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads of numpy and PyTorch
    pool = ProcessPoolExecutor(processes, spawn, _begin, (begin,))
    try:
        running: set[Future[R]] = set()
        for item in chain(first, items):
            running.add(pool.submit(work, *item))
            if len(running) >= 2 * processes:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        yield from (future.result() for future in running)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was ended, perhaps for want of memory; what is finished is kept: run again, with fewer "
            "processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
