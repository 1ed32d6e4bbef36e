"""Run the notebooks that are not up to date, in the order of their dependencies, then build the book.

Each notebook runs in its own process (worker.py); notebooks.py decides which must run. An executed copy gets its final
name only when its notebook has ended without an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from companion.book.notebooks import (
    Chapter,
    choose,
    give_parameters,
    make_plan,
    read_chapters,
    shared_parts,
    with_needs,
)
from llava_core.config import load_scale
from llava_core.runtime import ROOT, CompanionError, display_path, file_lock, printable, read_json, write_json

OUT = ROOT / "book" / "notebooks"
HEARTBEAT_S = 60  # between two lines of progress where the output is not a terminal
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# the kernel ends with its worker: else its training would go on and write into the record of the next call
PARENT_DEATH = "import ctypes; ctypes.CDLL(None).prctl(1, 9); " if sys.platform == "linux" else ""
KERNEL = PARENT_DEATH + "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s" if minutes else f"{rest} s"


class _Progress:
    """A progress bar over the notebooks; without a terminal, a line per minute."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, unit="notebook", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.start = self.last = time.monotonic()
        self.done = 0

    def line(self, text: str) -> None:
        tqdm.write(printable(text, keep="\n"), file=sys.stderr)
        sys.stderr.flush()

    def ended(self, chapter: Chapter) -> None:
        self.done += 1
        self.bar.update()
        took = _clock(chapter.seconds) if chapter.seconds is not None else ""
        self.line(f"[{self.done:2}/{self.bar.total}] {chapter.name:32} {took:>10}  {chapter.status}")

    def tick(self, running: Iterable[_Worker]) -> None:
        now = time.monotonic()
        if now - self.last < (0.5 if sys.stderr.isatty() else HEARTBEAT_S):
            return
        self.last = now
        names = ", ".join(f"{worker.chapter.name} ({worker.progress()})" for worker in running)
        self.bar.set_postfix_str(names)
        if not sys.stderr.isatty():
            self.line(
                f"        {self.done} of {self.bar.total} done after {_clock(now - self.start)}; running: {names}"
            )


class _Worker:
    def __init__(self, chapter: Chapter, out: Path, scale: str, threads: int) -> None:
        self.chapter, self.out, self.begun = chapter, out, time.monotonic()
        state = out / ".state"
        self.log, self.error_file = state / f"{chapter.name}.log", state / f"{chapter.name}.error.json"
        self.error_file.unlink(missing_ok=True)
        spec = {
            "name": chapter.name,
            "source": os.path.relpath(chapter.path, ROOT),
            "out": str(out),
            "parameters": chapter.given,
            "parts": chapter.parts,
            "parent": os.getpid(),
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "companion.book.worker", json.dumps(spec)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=_worker_environment(out, scale, threads),
                start_new_session=True,  # Ctrl-C reaches only this process, which then ends the group
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def progress(self) -> str:
        cells = re.findall(rb"cell (\d+/\d+)", self.log.read_bytes()[-4096:])
        return f"cell {cells[-1].decode()}, {_clock(self.seconds)}" if cells else _clock(self.seconds)

    def finish(self) -> None:
        chapter, code = self.chapter, self.process.returncode
        chapter.seconds = round(self.seconds, 1)
        if code == 0:
            chapter.status = "ran"
            return
        chapter.status = "failed"
        if self.error_file.exists():
            chapter.error = str(read_json(self.error_file)["message"])
        else:
            why = f"ended with code {code}" if code > 0 else f"was ended by signal {-code} (9: often too little memory)"
            chapter.error = f"{chapter.name}: its process {why}; see {display_path(self.log)}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _worker_environment(out: Path, scale: str, threads: int) -> dict[str, str]:
    state = out / ".state"
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    if load_scale(scale).offline:
        environment |= dict.fromkeys(OFFLINE_VARIABLES, "1")
    environment |= {
        "LLAVA_ROOT": str(ROOT),
        "LLAVA_OUT": str(out),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # the kernel python3 is this interpreter, and no start-up files of the user are read
        "JUPYTER_PATH": str(state / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(state / "ipython"),
    }
    environment.pop("MPLBACKEND", None)  # the kernel selects the inline backend
    return environment


def _write_kernel(out: Path) -> None:
    argv = [sys.executable, "-Xfrozen_modules=off", "-c", KERNEL, "-f", "{connection_file}"]
    spec = {
        "argv": [*argv, "--HistoryManager.enabled=False"],  # kernels would block each other on one history database
        "display_name": "Python 3",
        "language": "python",
        "metadata": {"debugger": False},
    }
    write_json(out / ".state" / "jupyter" / "kernels" / "python3" / "kernel.json", spec)


def _dependents(name: str, plan: Sequence[Chapter]) -> set[str]:
    direct = {chapter.name for chapter in plan if name in chapter.needs}
    return direct.union(*(_dependents(other, plan) for other in direct))


def _run_plan(plan: Sequence[Chapter], out: Path, scale: str, jobs: int, threads: int) -> None:
    """Run the chapters that have a reason, up to `jobs` at once; a failure stops the chapters that need it."""
    progress = _Progress(len(plan))
    todo: dict[str, Chapter] = {}
    for chapter in plan:
        if chapter.reason is None:
            chapter.status = "up to date"
            progress.ended(chapter)
        else:
            todo[chapter.name] = chapter
    dependents = {name: len(_dependents(name, plan)) for name in todo}  # the chapter that most others need starts first
    bad: set[str] = set()
    running: list[_Worker] = []
    try:
        while todo or running:
            for chapter in list(todo.values()):
                if broken := [need for need in chapter.needs if need in bad]:
                    chapter.status, chapter.error = "stopped", f"needs {broken[0]}"
                    bad.add(chapter.name)
                    progress.ended(todo.pop(chapter.name))
            unfinished = {*todo, *(worker.chapter.name for worker in running)}
            ready = [c for c in todo.values() if not unfinished.intersection(c.needs)]
            for chapter in sorted(ready, key=lambda c: -dependents[c.name])[: jobs - len(running)]:
                progress.line(f"        {chapter.name} starts: {chapter.reason}")
                running.append(_Worker(todo.pop(chapter.name), out, scale, threads))
            progress.tick(running)
            time.sleep(0.05)
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                worker.finish()
                if worker.chapter.status == "failed":
                    bad.add(worker.chapter.name)
                progress.ended(worker.chapter)
                if worker.chapter.error:
                    progress.line(textwrap.indent(f"error: {worker.chapter.error}", "        "))
    finally:
        for worker in running:
            worker.kill()
        progress.bar.close()


@contextlib.contextmanager
def _output_lock(out: Path) -> Iterator[None]:
    """Lock the output folder; the operating system releases the lock when the process ends."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(out / ".state" / "lock", wait=False))
        except BlockingIOError:
            raise CompanionError(
                f"another `llava reproduce` is running in {display_path(out)}; wait until it has finished"
            ) from None
        yield


def reproduce(
    scale: str = "mini",
    fast: bool = False,
    only: str | Iterable[str | int] | None = None,
    start: str | int | None = None,
    dry_run: bool = False,
    parameters: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    notebooks_dir: str | Path | None = None,
    out_dir: str | Path | None = None,
    book: str = "auto",
) -> dict[str, Any]:
    """Run the notebooks that are not up to date, in the order of their needs, and build the book.

    Progress, errors and the table of results go to stderr. A notebook that fails stops those that need it; the others
    run, the result lists `failed`, and the next call starts there.

    Args:
        scale: name of a file in configs/scales.
        fast: the shortest runs that still show every step.
        only: numbers or names of notebooks, as `"20,21"` or as a list; what they need runs too where it must.
        start: leave out the notebooks before this number.
        dry_run: list what would run, and why; write nothing.
        parameters: further papermill parameters, for the chosen notebooks that have them.
        jobs: notebooks at once; by default one per core at the scale `mini` and one elsewhere.
        book: `auto` builds the book when all notebooks ended well, `only` builds it from what is there, `no` does not.

    Returns:
        `notebooks` with `status` (`ran`, `up to date`, `failed`, `stopped`, `would run`); names `failed` or stopped;
        `checks`: claims, published and measured; `book`: the path of its first page, or None; `seconds`.

    Raises:
        ConfigError: an unknown notebook, parameter or need.
        CompanionError: another call is running in the same folder, or the book could not be built.
    """
    from companion.book.book import build_book, chapter_checks

    begun = time.monotonic()
    hardware = load_scale(scale)  # raises for an unknown scale
    out = Path(out_dir).resolve() if out_dir else OUT
    everything = read_chapters(Path(notebooks_dir).resolve() if notebooks_dir else ROOT / "notebooks")
    chosen = [] if book == "only" else choose(everything, only, start)
    chapters = with_needs(everything, chosen)
    give_parameters(chapters, chosen, {"scale": scale, "fast": fast}, parameters or {})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, jobs or (cores if hardware.device == "cpu" else 1))

    if dry_run:
        plan = make_plan(chapters, out, shared_parts(scale, dry_run), chosen)
        for chapter in plan:
            chapter.status = "up to date" if chapter.reason is None else "would run"
            print(f"{chapter.name:32} {chapter.status:10} {chapter.reason or ''}".rstrip(), file=sys.stderr)
        return _result(plan, [], None, begun)

    page, trouble, plan = None, None, []
    with _output_lock(out):
        if chosen:
            plan = make_plan(chapters, out, shared_parts(scale, dry_run), chosen)
            if needed := [c.name for c in plan if c.name not in chosen]:
                print(f"also needed, and not up to date: {', '.join(needed)}", file=sys.stderr)
            _write_kernel(out)
            _run_plan(plan, out, scale, jobs, max(1, cores // jobs))
        failed = [chapter for chapter in plan if chapter.status in ("failed", "stopped")]
        if book != "no" and not failed:
            try:
                page = build_book(out, list(everything), scale)
            except CompanionError as error:  # raised after the table of results
                trouble = error
    checks = chapter_checks(out, [chapter.name for chapter in plan] or list(everything))
    result = _result(plan, checks, page, begun)
    _print_summary(result)
    if trouble is not None:
        raise trouble
    return result


def _result(plan: Sequence[Chapter], checks: list[dict[str, Any]], page: Path | None, begun: float) -> dict[str, Any]:
    fields = ("name", "status", "seconds", "reason", "error")
    return {
        "notebooks": [{key: getattr(chapter, key) for key in fields} for chapter in plan],
        "failed": [chapter.name for chapter in plan if chapter.status in ("failed", "stopped")],
        "checks": checks,
        "book": str(page) if page else None,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _print_summary(result: Mapping[str, Any]) -> None:
    from companion.figures import cell_text

    heads = ("claim", "published", "measured", "verdict")
    for check in result["checks"]:
        chapter = check["notebook"].partition("_")[0]
        claim, *cells = (cell_text(check.get(head)) for head in heads)
        print(
            f"{chapter}  {textwrap.shorten(claim, 60):60}  {'  '.join(f'{cell:>16}' for cell in cells)}",
            file=sys.stderr,
        )
    if result["failed"]:
        print(f"failed: {', '.join(result['failed'])}; correct the error and call again", file=sys.stderr)
    ran = sum(n["status"] == "ran" for n in result["notebooks"])
    print(f"{ran} of {len(result['notebooks'])} notebooks ran; {_clock(result['seconds'])} in all", file=sys.stderr)
    if result["book"]:
        print(f"book: {result['book']}", file=sys.stderr)
