"""Run the notebooks in the order of their needs, skip what is up to date, then build the book.

Every notebook runs in a process of its own (this module started with `_run`), several at once. What a finished one
depended on is kept in `<out>/.state/<name>.json`: its source, parameters, the package code that it imports, the
configurations, the base models' manifests and the notebooks before it. The next call compares, names what changed and
runs only that. An executed copy appears under its final name only when its notebook has ended well.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import json
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.runtime import (
    ROOT,
    CompanionError,
    ConfigError,
    DataError,
    fingerprint,
    read_json,
    sha256_file,
    shown,
    write_json,
)

PACKAGE = Path(__file__).resolve().parents[1]
OUT = ROOT / "book" / "notebooks"
HEARTBEAT_S = 60  # between two lines of progress where the output is not a terminal
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# the kernel ends with its worker: a training that nobody watches would write into the record of the next call's
PARENT_DEATH = "import ctypes; ctypes.CDLL(None).prctl(1, 9); " if sys.platform == "linux" else ""
KERNEL = PARENT_DEATH + "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"


@dataclass
class Chapter:
    """One notebook and what decides whether it must run.

    Args:
        name: the file's name without its extension, e.g. `20_feature_alignment`.
        needs: the names of the notebooks that must have run before.
        declared: the names that its cell tagged `parameters` assigns.
        given: the parameters of this call.
        parts: one hash for each thing that the result depends on.
        reason: why it must run; None when it is up to date.
        expected_s: seconds that it took last time, or that its author promises; None when nobody knows.
    """

    name: str
    path: Path
    content: dict[str, Any]
    needs: list[str]
    declared: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    expected_s: float | None = None
    status: str = "waiting"
    seconds: float | None = None
    error: str | None = None

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]


# ------------------------------------------------------------------------------------------------ reading notebooks


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])  # a list of lines, or one string: both are valid


def _code(cell: Mapping[str, Any]) -> ast.Module:
    """Return a cell's syntax tree without its IPython magics; empty when it is not Python (the run will say so)."""
    lines = ["pass" if re.match(r"\s*[%!?]", line) else line for line in _source(cell).splitlines()]
    with contextlib.suppress(SyntaxError):
        return ast.parse("\n".join(lines))
    return ast.Module(body=[], type_ignores=[])


def _assigned(tree: ast.Module) -> list[str]:
    targets: list[ast.expr] = []
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign):
            targets.append(statement.target)
        elif isinstance(statement, ast.Assign):
            targets.extend(statement.targets)
    return [target.id for target in targets if isinstance(target, ast.Name)]


def read_chapters(folder: Path) -> dict[str, Chapter]:
    """Read all notebooks `NN_name.ipynb` of a folder, each after the ones that it needs.

    Raises:
        ConfigError: a notebook needs one that does not exist, or two need each other.
        DataError: a file is not a notebook.
    """
    found: dict[str, Chapter] = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
            raise DataError(f"{shown(path)}: not a notebook of format 4; save it again with JupyterLab")
        tagged = [c for c in content["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
        facts = content.get("metadata", {}).get("companion", {})
        declared = [name for cell in tagged for name in _assigned(_code(cell))]
        found[path.stem] = Chapter(path.stem, path, content, list(facts.get("needs", [])), declared)
    if not found:
        raise ConfigError(f"{shown(folder)}: no notebooks NN_name.ipynb here")

    ordered: dict[str, Chapter] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise ConfigError(f"notebooks need each other in a circle: {' -> '.join([*trail, name])}")
        for need in found[name].needs:
            if need not in found:
                raise ConfigError(f"{name} needs '{need}', which is not in {shown(folder)}; known: {', '.join(found)}")
            visit(need, (*trail, name))
        ordered.setdefault(name, found[name])

    for name in found:
        visit(name, ())
    return ordered


# ------------------------------------------------------------------------------------------------ what changed


@functools.lru_cache(maxsize=1024)
def _module(path: Path, changed_ns: int) -> tuple[str, tuple[str, ...]]:
    """Return a hash of a module's meaning (comments and layout do not count) and the names that it imports."""
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return hashlib.sha256(text.encode()).hexdigest()[:12], ()
    parents = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -1 if path.name != "__init__.py" else None]
    package = [part for part in parents if part != "__init__"]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12], tuple(_imported(tree, package))


def _imported(tree: ast.AST, package: Sequence[str] = ()) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # an attribute finds no file and drops out


def imported_code(names: Iterable[str]) -> dict[str, str]:
    """Return the package's files that imports reach, with a hash of each.

    Args:
        names: dotted names that a notebook imports; those outside the package are ignored.

    Returns:
        Path from the repository root -> hash; modules reached through other modules, the `__init__` files on the way
        and the data files beside a reached module are among them.
    """
    todo = [name for name in names if name.partition(".")[0] == PACKAGE.name]
    seen: set[Path] = set()
    hashes: dict[str, str] = {}
    while todo:
        parts = todo.pop().split(".")
        for end in range(1, len(parts) + 1):
            stem = PACKAGE.parent.joinpath(*parts[:end])
            path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            hashes[shown(path)], more = _module(path, path.stat().st_mtime_ns)
            todo.extend(name for name in more if name.partition(".")[0] == PACKAGE.name)
    for folder in {path.parent for path in seen}:
        for path in folder.iterdir():
            if path.suffix in (".yaml", ".json", ".txt", ".mplstyle"):
                hashes[shown(path)] = sha256_file(path)[:12]
    return hashes


def _parts(chapter: Chapter, shared: Mapping[str, str], before: Mapping[str, Chapter]) -> dict[str, str]:
    cells = [(c["cell_type"], _source(c), c.get("metadata", {}).get("tags", [])) for c in chapter.content["cells"]]
    code = [c for c in chapter.content["cells"] if c["cell_type"] == "code"]
    parts = {
        "the notebook": fingerprint(cells),
        "its parameters": fingerprint(chapter.given),
        **imported_code(name for cell in code for name in _imported(_code(cell))),
        **shared,
        **{need: fingerprint(before[need].parts) for need in chapter.needs},
    }
    for name, value in chapter.given.items():
        if isinstance(value, str) and len(value) < 1024 and (path := ROOT / value).is_file():
            parts[f"the file of parameter '{name}'"] = sha256_file(path)[:12]
    return parts


def _shared_parts(scale: str, dry_run: bool) -> dict[str, str]:
    """Return a hash of each file that any notebook may read; writes the miniature's data where they are not in order.

    Written here once, so that no two notebooks find them missing at the same time; a dry run only says so.
    """
    data = sorted((ROOT / "data" / scale).glob("*/card.json"))
    stale = False
    if scale == "mini":
        from llava_core import miniature

        folder = miniature.default_root()
        if dry_run:
            stale = any(miniature.stale(folder, name, 0, miniature.Sizes()) for name in miniature.SETS)
        else:
            miniature.ensure()
        data = sorted(folder.glob("*/card.json"))
    files = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "models" / scale).glob("*/manifest.json"), *data]
    parts = {shown(path): sha256_file(path)[:12] for path in sorted(files)}
    return parts | ({"the miniature's data": "to be written"} if stale else {})


def _state_path(out: Path, name: str) -> Path:
    return out / ".state" / f"{name}.json"


def _state(out: Path, name: str) -> dict[str, Any]:
    path = _state_path(out, name)
    with contextlib.suppress(DataError):  # a damaged state only means that the notebook runs once more
        state = read_json(path) if path.exists() else {}
        return state if isinstance(state, dict) else {}
    return {}


def _reason(chapter: Chapter, out: Path, state: Mapping[str, Any]) -> str | None:
    """Say why a notebook must run, or None when everything that it depends on is as it was."""
    if "parts" not in state:
        return "first run"
    old = state["parts"]
    changed = [name for name in {**old, **chapter.parts} if old.get(name) != chapter.parts.get(name)]
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        return f"changed: {', '.join(changed[:2])}{more}"
    for file, expected in state.get("outputs", {}).items():
        if not (out / file).is_file():
            return f"{file} is gone"
        if sha256_file(out / file) != expected:
            return f"{file} was changed after the run"
    for run in state.get("runs", []):
        if not any((folder / "summary.json").exists() for folder in [ROOT / run, *ROOT.glob(f"runs/*/*/{run}")]):
            return f"the record of run {run} is gone"
    return None


# ------------------------------------------------------------------------------------------------ the plan


def _chosen(chapters: Mapping[str, Chapter], only: Any, start: Any) -> list[str]:
    known = f"known: {', '.join(chapters)}"
    names = list(chapters)
    if start is not None:
        number = f"{start}".partition("_")[0].zfill(2)
        names = [name for name in names if chapters[name].number >= number]
        if not number.isdigit() or not names:
            raise ConfigError(f"no notebook from '{start}' on; {known}")
    if only is None:
        return names
    listed = only.split(",") if isinstance(only, str) else [f"{part}" for part in only]
    wanted = [part.strip().removesuffix(".ipynb") for part in listed if part.strip()]
    wanted = [part.zfill(2) if part.isdigit() else part for part in wanted]
    for part in wanted:
        if not any(part in (name, chapters[name].number) for name in names):
            raise ConfigError(f"no notebook '{part}'; {known}")
    return [name for name in names if name in wanted or chapters[name].number in wanted]


def _with_needs(chapters: Mapping[str, Chapter], chosen: Sequence[str]) -> dict[str, Chapter]:
    kept = set(chosen)
    for name in reversed(list(chapters)):
        if name in kept:
            kept.update(chapters[name].needs)
    return {name: chapter for name, chapter in chapters.items() if name in kept}


def _give_parameters(
    chapters: Mapping[str, Chapter], chosen: Sequence[str], fixed: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Hand every notebook its parameters; papermill would only log a name that no notebook knows."""
    for chapter in chapters.values():
        if missing := [name for name in fixed if name not in chapter.declared]:
            raise ConfigError(
                f"{shown(chapter.path)}: its cell tagged 'parameters' must assign {' and '.join(missing)}; "
                f"it has {', '.join(chapter.declared) or 'none'}"
            )
        own = {name: value for name, value in extra.items() if chapter.name in chosen and name in chapter.declared}
        chapter.given = {**fixed, **own}
    for name in extra:
        if name in fixed or not any(name in chapters[chapter].declared for chapter in chosen):
            known = "; ".join(
                f"{c} has {', '.join(p for p in chapters[c].declared if p not in fixed) or 'none'}" for c in chosen
            )
            raise ConfigError(f"unknown notebook parameter '{name}' (beside {', '.join(fixed)}): {known}")


def make_plan(
    chapters: dict[str, Chapter], out: Path, shared: Mapping[str, str], duration: str, chosen: Sequence[str]
) -> list[Chapter]:
    """Find out which of the chosen notebooks, and of those that they need, must run.

    Args:
        chapters: the notebooks, each after the ones that it needs.
        out: where the executed copies and the states are.
        shared: hashes of the files that every notebook depends on.
        duration: the key of earlier durations, such as `mini-fast`.
        chosen: the names that were asked for.

    Returns:
        The chapters in a runnable order: all chosen ones, and the needed ones that are not up to date; a chapter with
        a `reason` must run.
    """
    for name, chapter in chapters.items():
        chapter.parts = _parts(chapter, shared, chapters)
        state = _state(out, name)
        promised = chapter.content.get("metadata", {}).get("companion", {}).get("seconds", {})
        chapter.expected_s = state.get("durations", {}).get(duration, promised.get(duration))
        chapter.reason = _reason(chapter, out, state)
        if chapter.reason is None and (first := next((n for n in chapter.needs if chapters[n].reason), None)):
            chapter.reason = f"{first} runs again"

    included = set(chosen)
    for name in reversed(list(chapters)):
        if name in included:
            included.update(need for need in chapters[name].needs if chapters[need].reason is not None)
    return [chapter for name, chapter in chapters.items() if name in included]


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


def _left_s(
    todo: Iterable[Chapter], running: Sequence[_Worker], urgency: Mapping[str, float], jobs: int
) -> float | None:
    """Return the seconds that are left, from earlier durations; None when there are none to go by."""
    todo = list(todo)
    known = [c.expected_s for c in [*todo, *(w.chapter for w in running)] if c.expected_s is not None]
    if not known:
        return None
    typical = sum(known) / len(known)
    waiting = sum(c.expected_s if c.expected_s is not None else typical for c in todo)
    rest = {w.chapter.name: max((w.chapter.expected_s or typical) - w.seconds, 1.0) for w in running}
    chains = [rest[w.chapter.name] + urgency[w.chapter.name] - (w.chapter.expected_s or typical) for w in running]
    return max([(waiting + sum(rest.values())) / jobs, *chains, *(urgency[c.name] for c in todo)])


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
            "durations": _state(out, chapter.name).get("durations", {}),
            "duration": duration,
            "parent": os.getpid(),
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llava_core.lab.pipeline", "_run", json.dumps(spec)],
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


def _urgency(plan: Sequence[Chapter]) -> dict[str, float]:
    """Return for each chapter the seconds of the longest chain that begins with it."""
    known = [chapter.expected_s for chapter in plan if chapter.expected_s is not None]
    typical = sum(known) / len(known) if known else 1.0
    urgency: dict[str, float] = {}
    for chapter in reversed(plan):
        after = [urgency[c.name] for c in plan if chapter.name in c.needs and c.name in urgency]
        own = chapter.expected_s if chapter.expected_s is not None else typical
        urgency[chapter.name] = own + max(after, default=0.0)
    return urgency


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
    urgency = _urgency([chapter for chapter in plan if chapter.reason is not None])
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
            for chapter in sorted(ready, key=lambda c: -urgency[c.name])[: jobs - len(running)]:
                display.line(f"        {chapter.name} starts: {chapter.reason}")
                running.append(_Worker(todo.pop(chapter.name), out, scale, duration, threads))
            display.tick(running, _left_s(todo.values(), running, urgency, jobs))
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
    from llava_core.config import load_scale
    from llava_core.lab.book import build_book, chapter_checks

    begun = time.monotonic()
    load_scale(scale)  # an unknown scale ends here, with the known ones named
    out = Path(out_dir).resolve() if out_dir else OUT
    everything = read_chapters(Path(notebooks_dir).resolve() if notebooks_dir else ROOT / "notebooks")
    chosen = [] if book == "only" else _chosen(everything, only, start)
    chapters = _with_needs(everything, chosen)
    _give_parameters(chapters, chosen, {"scale": scale, "fast": fast}, parameters or {})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, jobs or (cores if scale == "mini" else 1))
    duration = f"{scale}-fast" if fast else scale

    if dry_run:
        plan = make_plan(chapters, out, _shared_parts(scale, dry_run), duration, chosen)
        for chapter in plan:
            chapter.status = "up to date" if chapter.reason is None else "would run"
            took = _clock(chapter.expected_s) if chapter.expected_s is not None else "?"
            print(f"{chapter.name:32} {chapter.status:10} {took:>10}  {chapter.reason or ''}".rstrip(), file=sys.stderr)
        return _result(plan, [], None, begun)

    page = None
    with _alone(out):
        plan = []
        if chosen:
            plan = make_plan(chapters, out, _shared_parts(scale, dry_run), duration, chosen)
            if needed := [c.name for c in plan if c.name not in chosen]:
                print(f"also needed, and not up to date: {', '.join(needed)}", file=sys.stderr)
            _write_kernel(out)
            _run_plan(plan, out, scale, duration, jobs, max(1, cores // jobs))
        failed = [chapter for chapter in plan if chapter.status in ("failed", "stopped")]
        if book != "no" and not failed:
            page = build_book(out, list(everything), scale)
    checks = chapter_checks(out, [chapter.name for chapter in plan] or list(everything))
    result = _result(plan, checks, page, begun)
    _print_summary(result)
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
    from llava_core.lab.book import cell_text

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
    line = next((text for text in _source(cell).splitlines() if text.strip()), "")
    return f"{name}, cell [{cell['execution_count'] or code.index(cell) + 1}] `{textwrap.shorten(line, 80)}`: {what}"


def _run(spec: Mapping[str, Any]) -> int:
    """Execute one notebook; called in a process of its own."""
    _die_with(spec["parent"])
    import papermill

    name, out = spec["name"], Path(spec["out"])
    part, failed = out / ".state" / f"{name}.part.ipynb", out / f"{name}.failed.ipynb"
    final, numbers, state = out / f"{name}.ipynb", out / f"{name}.json", _state_path(out, name)
    for path in (part, failed, numbers):
        path.unlink(missing_ok=True)
    begun = time.monotonic()
    try:
        papermill.execute_notebook(
            spec["source"],
            os.path.relpath(part, ROOT),
            parameters=spec["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar={"bar_format": "cell {n_fmt}/{total_fmt} ", "mininterval": 0},
            start_timeout=120,
        )
        if not numbers.exists():
            raise DataError(f"no {numbers.name} was written; the notebook must end with save_numbers('{name}', ...)")
    except Exception as error:
        message = _failure(name, part, error)
        if part.exists():
            os.replace(part, failed)
            message += f"\nthe executed copy is {shown(failed)}"
        write_json(out / ".state" / f"{name}.error.json", {"message": message})
        return 1
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
