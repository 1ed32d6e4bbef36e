"""Parallel map over worker processes; memory does not grow with the number of items."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice, starmap
from typing import Any, TypeVar

from llava_core.runtime import ConfigError, DataError

R = TypeVar("R")


def _exit_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def parallel_map(work: Callable[..., R], items: Iterable[tuple[Any, ...]], processes: int | None = None) -> Iterator[R]:
    """Yield `work(*item)` of each item, in order; at most two items per process are in memory.

    `work` is a function of a module. With one process (None: one per core) or one item it is done in this process.
    Raises DataError if a worker was killed, ConfigError for fewer than one process.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"{processes} processes: write 1 or more, or nothing for one per core")
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    items = iter(items)
    first = list(islice(items, 2))
    if processes == 1 or len(first) < 2:
        yield from starmap(work, chain(first, items))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads of numpy and PyTorch
    pool = ProcessPoolExecutor(processes, spawn, _exit_with_parent)
    running: deque[Future[R]] = deque()
    try:
        for item in chain(first, items):
            running.append(pool.submit(work, *item))
            if len(running) >= 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was ended, perhaps because memory ran out; finished work is stored: run again, with "
            "fewer processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
