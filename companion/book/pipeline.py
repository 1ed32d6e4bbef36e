"""Run the notebooks in the order of their needs, skip what is up to date, then build the book.

Every notebook runs in a process of its own (this module started with `_run`), several at once; notebooks.py says which
must. An executed copy appears under its final name only when its notebook has ended well.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.book.notebooks import (
    Chapter,
    choose,
    give_parameters,
    make_plan,
    read_chapters,
    read_state,
    shared_parts,
    source_of,
    state_path,
    with_needs,
)
from llava_core.runtime import ROOT, CompanionError, DataError, read_json, sha256_file, shown, write_json

OUT = ROOT / "book" / "notebooks"
HEARTBEAT_S = 60  # between two lines of progress where the output is not a terminal
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# the kernel ends with its worker: a training that nobody watches would write into the record of the next call's
PARENT_DEATH = "import ctypes; ctypes.CDLL(None).prctl(1, 9); " if sys.platform == "linux" else ""
KERNEL = PARENT_DEATH + "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"


# ------------------------------------------------------------------------------------------------ showing progress


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s" if minutes else f"{rest} s"


class _Display:
    """Lines that stay, and below them, on a terminal, one that says what is going on right now."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begun, self.last = total, 0, time.monotonic(), time.monotonic()
        self.live = sys.stderr.isatty()

    def line(self, text: str) -> None:
        print(("\r\x1b[K" if self.live else "") + text, file=sys.stderr, flush=True)

    def ended(self, chapter: Chapter) -> None:
        self.done += 1
        took = _clock(chapter.seconds) if chapter.seconds is not None else ""
        self.line(f"[{self.done:2}/{self.total}] {chapter.name:32} {took:>10}  {chapter.status}")

    def tick(self, running: Iterable[_Worker], left_s: float | None) -> None:
        now = time.monotonic()
        if now - self.last < (0.5 if self.live else HEARTBEAT_S):
            return
        self.last = now
        busy = ", ".join(f"{worker.chapter.name} ({worker.progress()})" for worker in running)
        left = f", about {_clock(left_s)} left" if left_s is not None else ""
        text = f"{self.done} of {self.total} done after {_clock(now - self.begun)}{left}; running: {busy}"
        if self.live:
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        else:
            self.line(f"        {text}")


def _longest_chains(chapters: Sequence[Chapter], costs: Mapping[str, float]) -> dict[str, float]:
    """Return for each chapter the seconds of the longest chain of needs that begins with it."""
    chains: dict[str, float] = {}
    for chapter in reversed(chapters):
        after = [chains[c.name] for c in chapters if chapter.name in c.needs and c.name in chains]
        chains[chapter.name] = costs[chapter.name] + max(after, default=0.0)
    return chains


def _costs(chapters: Sequence[Chapter]) -> dict[str, float]:
    """Return the seconds that each chapter is expected to take: the mean of the others where nobody knows."""
    known = [chapter.expected_s for chapter in chapters if chapter.expected_s is not None]
    typical = sum(known) / len(known) if known else math.nan
    return {c.name: c.expected_s if c.expected_s is not None else typical for c in chapters}


def _left_s(todo: Sequence[Chapter], begun: Mapping[str, tuple[Chapter, float]], jobs: int) -> float | None:
    """Return the seconds that are left; None when there are no durations to go by.

    Args:
        todo: the chapters that wait.
        begun: the running ones by name, with the seconds that they have run.
        jobs: how many run at once.
    """
    chapters = [*(chapter for chapter, _ in begun.values()), *todo]
    costs = _costs(chapters)
    for name, (_, seconds) in begun.items():
        costs[name] = max(costs[name] - seconds, 1.0)
    left = max([sum(costs.values()) / jobs, *_longest_chains(chapters, costs).values()], default=0.0)
    return None if math.isnan(left) else left


# ------------------------------------------------------------------------------------------------ running


class _Worker:
    """The process that executes one notebook."""

    def __init__(self, chapter: Chapter, out: Path, scale: str, duration: str, threads: int) -> None:
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
            "durations": read_state(out, chapter.name).get("durations", {}),
            "duration": duration,
            "parent": os.getpid(),
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "companion.book.pipeline", "_run", json.dumps(spec)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=_worker_environment(out, scale, threads),
                start_new_session=True,  # Ctrl-C comes to this process alone, which then ends the group
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def progress(self) -> str:
        """Return how far it is, e.g. `cell 7/18, 42 s`."""
        cells = re.findall(rb"cell (\d+/\d+)", self.log.read_bytes()[-4096:])
        return f"cell {cells[-1].decode()}, {_clock(self.seconds)}" if cells else _clock(self.seconds)

    def finish(self) -> None:
        """Take over the result of the ended process."""
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
            chapter.error = f"{chapter.name}: its process {why}; see {shown(self.log)}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _worker_environment(out: Path, scale: str, threads: int) -> dict[str, str]:
    state = out / ".state"
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    if scale == "mini":
        environment |= dict.fromkeys(OFFLINE_VARIABLES, "1")
    environment |= {
        "LLAVA_ROOT": str(ROOT),
        "LLAVA_OUT": str(out),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # a kernel named python3 that is this interpreter, whatever else is installed, and no start-up files of the user
        "JUPYTER_PATH": str(state / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(state / "ipython"),
    }
    environment.pop("MPLBACKEND", None)  # the kernel chooses the one that puts figures into the notebook
    return environment


def _write_kernel(out: Path) -> None:
    argv = [sys.executable, "-Xfrozen_modules=off", "-c", KERNEL, "-f", "{connection_file}"]
    spec = {
        "argv": [*argv, "--HistoryManager.enabled=False"],  # several kernels would wait for one history database
        "display_name": "Python 3",
        "language": "python",
        "metadata": {"debugger": False},
    }
    write_json(out / ".state" / "jupyter" / "kernels" / "python3" / "kernel.json", spec)


def _run_plan(plan: Sequence[Chapter], out: Path, scale: str, duration: str, jobs: int, threads: int) -> None:
    """Run the chapters that have a reason to, as many at once as there are jobs; a failure stops what needs it."""
    display = _Display(len(plan))
    todo: dict[str, Chapter] = {}
    for chapter in plan:
        if chapter.reason is None:
            chapter.status = "up to date"
            display.ended(chapter)
        else:
            todo[chapter.name] = chapter
    costs = {name: 1.0 if math.isnan(cost) else cost for name, cost in _costs(list(todo.values())).items()}
    chains = _longest_chains(list(todo.values()), costs)  # what much waits for begins first
    bad: set[str] = set()
    running: list[_Worker] = []
    try:
        while todo or running:
            for chapter in list(todo.values()):
                if broken := [need for need in chapter.needs if need in bad]:
                    chapter.status, chapter.error = "stopped", f"needs {broken[0]}"
                    bad.add(chapter.name)
                    display.ended(todo.pop(chapter.name))
            unfinished = {*todo, *(worker.chapter.name for worker in running)}
            ready = [c for c in todo.values() if not unfinished.intersection(c.needs)]
            for chapter in sorted(ready, key=lambda c: -chains[c.name])[: jobs - len(running)]:
                display.line(f"        {chapter.name} starts: {chapter.reason}")
                running.append(_Worker(todo.pop(chapter.name), out, scale, duration, threads))
            display.tick(
                running, _left_s([*todo.values()], {w.chapter.name: (w.chapter, w.seconds) for w in running}, jobs)
            )
            time.sleep(0.05)
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                worker.finish()
                if worker.chapter.status == "failed":
                    bad.add(worker.chapter.name)
                display.ended(worker.chapter)
                if worker.chapter.error:
                    display.line(textwrap.indent(f"error: {worker.chapter.error}", "        "))
    finally:
        for worker in running:
            worker.kill()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the output folder; the system lets go of it when the process ends, however it ends."""
    (out / ".state").mkdir(parents=True, exist_ok=True)
    with open(out / ".state" / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompanionError(f"another `llava reproduce` is at work in {shown(out)}; wait for its end") from None
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
    run on, the result says `"failed"`, and the next call begins where it is needed.

    Args:
        scale: name of a file in configs/scales.
        fast: the shortest runs that still show every step.
        only: numbers or names of notebooks, as `"20,21"` or as a list; what they need runs too where it must.
        start: leave out the notebooks before this number.
        dry_run: say what would run, and why; write nothing.
        parameters: further papermill parameters, for the chosen notebooks that have them.
        jobs: notebooks at once; by default one per core at the scale `mini` and one elsewhere.
        notebooks_dir: where the notebooks are.
        out_dir: where the executed copies and the numbers go.
        book: `auto` builds the book when all notebooks ended well, `only` builds it from what is there, `no` does not.

    Returns:
        `notebooks`: name, status (`ran`, `up to date`, `failed`, `stopped`, `would run`), seconds, reason and error of
        each; `failed`: the names of those that failed or were stopped; `checks`: the claims with what was published and
        what was measured; `book`: the path of its first page, or None; `seconds`.

    Raises:
        ConfigError: an unknown notebook, parameter or need.
        CompanionError: another call is at work in the same folder, or the book could not be built.
    """
    from companion.book.book import build_book, chapter_checks
    from llava_core.config import load_scale

    begun = time.monotonic()
    load_scale(scale)  # an unknown scale ends here, with the known ones named
    out = Path(out_dir).resolve() if out_dir else OUT
    everything = read_chapters(Path(notebooks_dir).resolve() if notebooks_dir else ROOT / "notebooks")
    chosen = [] if book == "only" else choose(everything, only, start)
    chapters = with_needs(everything, chosen)
    give_parameters(chapters, chosen, {"scale": scale, "fast": fast}, parameters or {})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, jobs or (cores if scale == "mini" else 1))
    duration = f"{scale}-fast" if fast else scale

    if dry_run:
        plan = make_plan(chapters, out, shared_parts(scale, dry_run), duration, chosen)
        for chapter in plan:
            chapter.status = "up to date" if chapter.reason is None else "would run"
            took = _clock(chapter.expected_s) if chapter.expected_s is not None else "?"
            print(f"{chapter.name:32} {chapter.status:10} {took:>10}  {chapter.reason or ''}".rstrip(), file=sys.stderr)
        return _result(plan, [], None, begun)

    page, trouble, plan = None, None, []
    with _alone(out):
        if chosen:
            plan = make_plan(chapters, out, shared_parts(scale, dry_run), duration, chosen)
            if needed := [c.name for c in plan if c.name not in chosen]:
                print(f"also needed, and not up to date: {', '.join(needed)}", file=sys.stderr)
            _write_kernel(out)
            _run_plan(plan, out, scale, duration, jobs, max(1, cores // jobs))
        failed = [chapter for chapter in plan if chapter.status in ("failed", "stopped")]
        if book != "no" and not failed:
            try:
                page = build_book(out, list(everything), scale)
            except CompanionError as error:  # the table of results comes first
                trouble = error
    checks = chapter_checks(out, [chapter.name for chapter in plan] or list(everything))
    result = _result(plan, checks, page, begun)
    _print_summary(result)
    if trouble is not None:
        raise trouble
    return result


def _result(plan: Sequence[Chapter], checks: list[dict[str, Any]], page: Path | None, begun: float) -> dict[str, Any]:
    told = ("name", "status", "seconds", "reason", "error")
    return {
        "notebooks": [{key: getattr(chapter, key) for key in told} for chapter in plan],
        "failed": [chapter.name for chapter in plan if chapter.status in ("failed", "stopped")],
        "checks": checks,
        "book": str(page) if page else None,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _print_summary(result: Mapping[str, Any]) -> None:
    from companion.plots.figures import cell_text

    heads = ["chapter", "claim", "published", "measured", "verdict"]
    rows = [[c["notebook"].partition("_")[0], *(cell_text(c.get(key)) for key in heads[1:])] for c in result["checks"]]
    if rows:
        limits = [7, 60, 16, 24, 16]
        widths = [min(max(len(row[i]) for row in [heads, *rows]), limits[i]) for i in range(5)]
        print(file=sys.stderr)
        for row in [heads, ["-" * width for width in widths], *rows]:
            cells = [textwrap.wrap(text, width) or [""] for text, width in zip(row, widths, strict=True)]
            for i in range(max(map(len, cells))):
                line = (c[i] if i < len(c) else "" for c in cells)
                print("  ".join(f"{part:{w}}" for part, w in zip(line, widths, strict=True)).rstrip(), file=sys.stderr)
        print(file=sys.stderr)
    if result["failed"]:
        print(
            f"failed: {', '.join(result['failed'])}; correct the error and call again",
            file=sys.stderr,
        )
    ran = sum(n["status"] == "ran" for n in result["notebooks"])
    print(f"{ran} of {len(result['notebooks'])} notebooks ran; {_clock(result['seconds'])} in all", file=sys.stderr)
    if result["book"]:
        print(f"book: {result['book']}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ inside the worker


def _die_with(parent: int) -> None:
    """End this process when its parent has ended, even by kill -9."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()  # also covers a parent that ended before the lines above


def _failure(name: str, copy: Path, error: BaseException) -> str:
    """Say in one paragraph which cell of which notebook stopped on which error."""
    cells = read_json(copy)["cells"] if copy.exists() else []
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    begun = [cell for cell in code if cell["metadata"].get("papermill", {}).get("start_time")]
    told = [(cell, out) for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    what = f"{told[-1][1]['ename']}: {told[-1][1]['evalue']}" if told else f"{type(error).__name__}: {error}"
    if not (told or begun) or isinstance(error, DataError):
        return f"{name}: {error}"
    cell = told[-1][0] if told else begun[-1]  # a kernel that died leaves no error in its cell
    line = next((text for text in source_of(cell).splitlines() if text.strip()), "")
    return f"{name}, cell [{cell['execution_count'] or code.index(cell) + 1}] `{textwrap.shorten(line, 80)}`: {what}"


def _execute(source: str, copy: str, parameters: Mapping[str, Any]) -> None:
    """Run a notebook into a copy; a kernel that could not begin gets two more chances.

    Two kernels that start at once may choose the same port; the later one then ends with "Address already in use".
    """
    import papermill

    for chance in (2, 1, 0):
        try:
            papermill.execute_notebook(
                source,
                copy,
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar={"bar_format": "cell {n_fmt}/{total_fmt} ", "mininterval": 0},
                start_timeout=120,
            )
            return
        except RuntimeError as error:
            if not chance or "died before replying" not in str(error):
                raise


def _run(spec: Mapping[str, Any]) -> int:
    """Execute one notebook; called in a process of its own."""
    _die_with(spec["parent"])
    name, out = spec["name"], Path(spec["out"])
    part, failed = out / ".state" / f"{name}.part.ipynb", out / f"{name}.failed.ipynb"
    final, numbers, state = out / f"{name}.ipynb", out / f"{name}.json", state_path(out, name)
    for path in (part, failed, numbers):
        path.unlink(missing_ok=True)
    begun = time.monotonic()
    try:
        _execute(spec["source"], os.path.relpath(part, ROOT), spec["parameters"])
        if not numbers.exists():
            raise DataError(f"no {numbers.name} was written; the notebook must end with save_numbers('{name}', ...)")
    except Exception as error:
        message = _failure(name, part, error)
        if part.exists():
            os.replace(part, failed)
            message += f"\nthe executed copy is {shown(failed)}"
        write_json(out / ".state" / f"{name}.error.json", {"message": message})
        return 1
    copy = read_json(part)
    copy["metadata"].pop("papermill", None)  # paths and times of this machine
    for cell in copy["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-cell")  # the book folds it
            cell["metadata"]["mystnb"] = {"code_prompt_show": "The parameters of this run"}
    write_json(part, copy)
    os.replace(part, final)
    result = {
        "parts": spec["parts"],
        "outputs": {path.name: sha256_file(path) for path in (final, numbers)},
        "runs": read_json(numbers).get("runs", []),
        "durations": {**spec["durations"], spec["duration"]: round(time.monotonic() - begun, 1)},
    }
    write_json(state, result)
    return 0


if __name__ == "__main__" and sys.argv[1:2] == ["_run"]:
    sys.exit(_run(json.loads(sys.argv[2])))
