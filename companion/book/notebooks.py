"""The notebooks, their dependencies, and which of them must run.

The dependencies of a finished notebook are stored in `<out>/.state/<name>.json` as hashes: its source, parameters, the
code that it imports, the configurations, the base models' manifests and the notebooks before it. `make_plan` compares.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.checkpoints.files import verify_files
from llava_core.config import load_scale
from llava_core.runtime import ROOT, ConfigError, DataError, display_path, fingerprint, read_json, sha256_file

CODE_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llava_core", "companion", "benchmarks")
STORED = {
    "companion/ablation_records.py": "results/ablations/*.json",
    "companion/single_runs.py": "benchmarks/results/single_runs.csv",
}
"""The stored results that a module reads; chapters that use it run again when one is new."""


@dataclass
class Chapter:
    """One notebook and its state.

    Args:
        name: the file's name without its extension, e.g. `20_feature_alignment`.
        declared: the names that its cell tagged `parameters` assigns.
        given: the parameters of this call.
        parts: one hash per dependency of the result.
        reason: why it must run; None when it is up to date.
    """

    name: str
    path: Path
    content: dict[str, Any]
    needs: list[str]
    declared: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    status: str = "waiting"
    seconds: float | None = None
    error: str | None = None

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]


def source_of(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])  # a list of lines, or one string: both are valid


def _code(cell: Mapping[str, Any]) -> ast.Module:
    """Return a cell's syntax tree without its IPython magics; empty when it is not valid Python (its run will fail)."""
    lines = ["pass" if re.match(r"\s*[%!?]", line) else line for line in source_of(cell).splitlines()]
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
    chapters: dict[str, Chapter] = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
            raise DataError(f"{display_path(path)}: not a notebook of format 4; save it again with JupyterLab")
        tagged = [c for c in content["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
        metadata = content.get("metadata", {}).get("companion", {})
        declared = [name for cell in tagged for name in _assigned(_code(cell))]
        chapters[path.stem] = Chapter(path.stem, path, content, list(metadata.get("needs", [])), declared)
    if not chapters:
        raise ConfigError(f"{display_path(folder)}: no notebooks NN_name.ipynb here")

    ordered: dict[str, Chapter] = {}

    def add(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise ConfigError(f"notebooks need each other in a circle: {' -> '.join([*trail, name])}")
        for need in chapters[name].needs:
            if need not in chapters:
                raise ConfigError(
                    f"{name} needs '{need}', which is not in {display_path(folder)}; known: {', '.join(chapters)}"
                )
            add(need, (*trail, name))
        ordered.setdefault(name, chapters[name])

    for name in chapters:
        add(name, ())
    return ordered


@functools.lru_cache(maxsize=1024)
def _module(path: Path, changed_ns: int) -> tuple[str, tuple[str, ...]]:
    """Return a hash of a module's syntax tree (without comments and formatting) and the names that it imports."""
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return hashlib.sha256(text.encode()).hexdigest()[:12], ()
    parents = path.relative_to(CODE_ROOT).with_suffix("").parts[: -1 if path.name != "__init__.py" else None]
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
            yield from (f"{base}.{alias.name}" for alias in node.names)  # an attribute has no file and is ignored


def imported_code(names: Iterable[str]) -> dict[str, str]:
    """Return the source files that imports of dotted names reach (path from the repository root -> hash).

    They include the modules that modules import, the `__init__` files of their packages and the data files in their
    folders; names outside the package are ignored.
    """
    todo = [name for name in names if name.partition(".")[0] in PACKAGES]
    seen: set[Path] = set()
    hashes: dict[str, str] = {}
    while todo:
        name = todo.pop()
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            stem = CODE_ROOT.joinpath(*parts[:end])
            path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            hashes[display_path(path)], more = _module(path, path.stat().st_mtime_ns)
            todo.extend(name for name in more if name.partition(".")[0] in PACKAGES)
    for folder in {path.parent for path in seen}:
        for path in folder.iterdir():
            if path.suffix in (".yaml", ".json", ".txt", ".mplstyle", ".svg"):
                hashes[display_path(path)] = sha256_file(path)[:12]
    return hashes


def _parts(chapter: Chapter, shared: Mapping[str, str], before: Mapping[str, Chapter]) -> dict[str, str]:
    cells = [(c["cell_type"], source_of(c), c.get("metadata", {}).get("tags", [])) for c in chapter.content["cells"]]
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
    read = {name for cell in code for name in re.findall(r"benchmarks/results/\w+\.csv", source_of(cell))}
    read |= {pattern for module, pattern in STORED.items() if module in parts}
    for path in sorted({path for pattern in read for path in ROOT.glob(pattern)}):
        parts[display_path(path)] = sha256_file(path)[:12]
    return parts


def shared_parts(scale: str, dry_run: bool) -> dict[str, str]:
    """Return a hash of each file that any notebook may read.

    Missing or stale data sets of the miniature are written here, before two notebooks could both write them; a dry run
    only reports it. A damaged or missing base model is a CheckpointError.
    """
    data = sorted((ROOT / "data" / scale).glob("*/card.json"))
    stale, hardware = False, load_scale(scale)
    if hardware.miniature:
        from companion import miniature

        folder = miniature.default_root()
        if dry_run:
            stale = any(miniature.stale(folder, name, 0, miniature.Sizes()) for name in miniature.SETS)
        else:
            miniature.ensure()
        data = sorted(folder.glob("*/card.json"))
    manifests = [ROOT / model / "manifest.json" for model in hardware.models.values() if hardware.miniature]
    for manifest in manifests:
        verify_files(manifest.parent)
    files = [*(ROOT / "configs").rglob("*.yaml"), *manifests, *data]
    parts = {display_path(path): sha256_file(path)[:12] for path in sorted(files)}
    return parts | ({"the miniature's data": "to be written"} if stale else {})


def state_path(out: Path, name: str) -> Path:
    return out / ".state" / f"{name}.json"


def read_state(out: Path, name: str) -> dict[str, Any]:
    path = state_path(out, name)
    with contextlib.suppress(DataError):  # after a damaged state the notebook runs again
        state = read_json(path) if path.exists() else {}
        return state if isinstance(state, dict) else {}
    return {}


def _reason(chapter: Chapter, out: Path, state: Mapping[str, Any]) -> str | None:
    if "parts" not in state:
        return "first run"
    old = state["parts"]
    changed = [name for name in {**old, **chapter.parts} if old.get(name) != chapter.parts.get(name)]
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        return f"changed: {', '.join(changed[:2])}{more}"
    for file, expected in state.get("outputs", {}).items():
        if not (out / file).is_file():
            return f"{file} is missing"
        if sha256_file(out / file) != expected:
            return f"{file} was changed after the run"
    for run in state.get("runs", []):
        if not any((folder / "summary.json").exists() for folder in [ROOT / run, *ROOT.glob(f"runs/*/*/{run}")]):
            return f"the record of run {run} is missing"
    return None


def choose(chapters: Mapping[str, Chapter], only: Any, start: Any) -> list[str]:
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


def with_needs(chapters: Mapping[str, Chapter], chosen: Sequence[str]) -> dict[str, Chapter]:
    included = set(chosen)
    for name in reversed(list(chapters)):
        if name in included:
            included.update(chapters[name].needs)
    return {name: chapter for name, chapter in chapters.items() if name in included}


def give_parameters(
    chapters: Mapping[str, Chapter], chosen: Sequence[str], fixed: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Set each notebook's parameters and refuse unknown names, which papermill would only log."""
    for chapter in chapters.values():
        if missing := [name for name in fixed if name not in chapter.declared]:
            raise ConfigError(
                f"{display_path(chapter.path)}: its cell tagged 'parameters' must assign {' and '.join(missing)}; "
                f"it has {', '.join(chapter.declared) or 'none'}"
            )
        own = {name: value for name, value in extra.items() if chapter.name in chosen and name in chapter.declared}
        chapter.given = {**fixed, **own}
    for name in extra:
        if name in fixed or not any(name in chapters[chapter].declared for chapter in chosen):
            known = "; ".join(
                f"{c} has {', '.join(p for p in chapters[c].declared if p not in fixed) or 'none'}" for c in chosen
            )
            raise ConfigError(f"unknown notebook parameter '{name}' (in addition to {', '.join(fixed)}): {known}")


def make_plan(
    chapters: dict[str, Chapter], out: Path, shared: Mapping[str, str], chosen: Sequence[str]
) -> list[Chapter]:
    """Return the chosen notebooks, and the needed ones that are not up to date, in a runnable order.

    Those with a `reason` must run. `chapters` come after the ones that they need; `shared` is from `shared_parts`, and
    `out` has the executed copies and the states.
    """
    for name, chapter in chapters.items():
        chapter.parts = _parts(chapter, shared, chapters)
        state = read_state(out, name)
        chapter.reason = _reason(chapter, out, state)
        if chapter.reason is None and (first := next((n for n in chapter.needs if chapters[n].reason), None)):
            chapter.reason = f"{first} runs again"

    included = set(chosen)
    for name in reversed(list(chapters)):
        if name in included:
            included.update(need for need in chapters[name].needs if chapters[need].reason is not None)
    return [chapter for name, chapter in chapters.items() if name in included]
