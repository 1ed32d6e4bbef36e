"""Import rules: companion -> llava_core only, floors inside llava_core, no circles; names in strings exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_core.runtime import ROOT

PACKAGES = ("llava_core", "companion", "benchmarks")
# A module may import from lower floors and from its own.
FLOORS = (
    ("config", "config_files", "runtime", "record", "registry", "constants", "__init__"),
    ("ops",),
    ("models", "data"),
    ("checkpoints",),
    ("train",),
    ("chat", "inference"),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
NOT_ACROSS = {"models": "data", "data": "models"}  # same floor, and neither imports the other
FRONT = ("llava_core/__init__.py", "llava_core/chat.py")  # `llava_core.load`, imported when it is called


def sources(root: Path = ROOT) -> dict[str, str]:
    """Path below `root` -> source text of every module of the three packages."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    return {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}


def module_file(name: str, files: dict[str, str]) -> str | None:
    stem = name.replace(".", "/")
    return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in files), None)


def imports(path: str, files: dict[str, str]) -> Iterator[str]:
    """Files that a module imports anywhere: at its top, in functions, for types only."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(files[path])):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            inner = [f"{module}.{alias.name}" for alias in node.names]
            submodules = [name for name in inner if module_file(name, files)]
            # `from package import submodule` needs the submodule; any other name needs the package itself
            names = submodules if len(submodules) == len(inner) else [*submodules, module]
        for name in names:
            if (file := module_file(name, files)) and file != path:
                yield file


def upward(files: dict[str, str]) -> list[str]:
    """Imports against the rules, as `file -> file`."""
    wrong = []
    for path in files:
        for other in imports(path, files):
            package, target = path.split("/")[0], other.split("/")[0]
            if package == target == "llava_core" and (path, other) != FRONT:
                own, below = (FLOOR.get(name.split("/")[1].removesuffix(".py")) for name in (path, other))
                across = NOT_ACROSS.get(path.split("/")[1]) == other.split("/")[1]
                if own is None or below is None or below > own or across:
                    wrong.append(f"{path} -> {other}")
            elif PACKAGES.index(target) > PACKAGES.index(package) and path != "companion/cli/bench.py":
                wrong.append(f"{path} -> {other}")
    return wrong


def circle(files: dict[str, str]) -> list[str]:
    """Files of one import circle in their order; empty without one."""
    graph = {path: sorted({*imports(path, files)}) for path in files}
    graph[FRONT[0]] = [other for other in graph.get(FRONT[0], []) if other != FRONT[1]]
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> list[str]:
        if path in trail:
            return [*trail[trail.index(path) :], path]
        if path in done:
            return []
        for other in graph[path]:
            if ring := visit(other, [*trail, path]):
                return ring
        done.add(path)
        return []

    return next((ring for path in graph if (ring := visit(path, []))), [])


EMPTY = dict.fromkeys(sources(), "")


def test_imports_go_down() -> None:
    assert upward(sources()) == []


def test_no_import_circle() -> None:
    assert circle(sources()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("llava_core/ops/reference.py", "from llava_core.models import llava"),
        ("llava_core/config.py", "def f():\n    import llava_core.train.trainer"),
        ("llava_core/train/loader.py", "from ..chat import open_assistant"),
        ("llava_core/data/images.py", "from companion.evaluation import science_qa"),
        ("llava_core/models/llava.py", "from llava_core.data.images import load_image"),
        ("companion/demo.py", "from benchmarks import common"),
        ("llava_core/__init__.py", "from llava_core.train import launch"),
    ],
)
def test_planted_upward_import_is_detected(path: str, source: str) -> None:
    assert len(upward(EMPTY | {"benchmarks/common.py": "", path: source})) == 1


@pytest.mark.parametrize(
    "planted",
    [
        {"companion/a.py": "from companion import b", "companion/b.py": "from companion.a import f"},
        {"llava_core/ops/a.py": "from . import b", "llava_core/ops/b.py": "def f():\n    from . import c",
         "llava_core/ops/c.py": "import llava_core.ops.a"},
    ],
)  # fmt: skip
def test_planted_circle_is_detected(planted: dict[str, str]) -> None:
    assert set(circle(EMPTY | planted)) == set(planted)


@pytest.mark.parametrize(
    "module", ["llava_core", "llava_core.config", "llava_core.runtime", "llava_core.record", "companion.cli"]
)
def test_light_modules_load_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {(ROOT / path).parent for path in sources()}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_modules_named_in_strings_exist() -> None:
    """`-m package.module`, entry points, Sphinx extensions, `{{ constant:MODULE:NAME }}`, `module:function`."""
    texts = [ROOT / name for name in ("Makefile", "pyproject.toml", "jupyter_book_config.yml", "CONTRIBUTING.md")]
    texts += [*(ROOT / "book").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    files = sources()
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in texts} | files
    named = re.compile(r"(?<![\w./])((?:llava_core|companion|benchmarks)(?:\.(?!css|mplstyle|py)\w+)+)")
    lost = []
    for path, text in lines.items():
        for name in named.findall(text):
            parts = name.split(".")
            ends = [end for end in range(1, len(parts) + 1) if module_file(".".join(parts[:end]), files)]
            # at most `module.Class.attribute` follows a module; a lost module leaves only its package
            package_only = bool(ends) and module_file(".".join(parts[: max(ends)]), files).endswith("__init__.py")
            rest = parts[max(ends) :] if ends else parts
            if not ends or (package_only and rest and not defined(files, parts[: max(ends)], rest[0])):
                lost.append(f"{path}: {name}")
    assert lost == []


def defined(files: dict[str, str], package: list[str], name: str) -> bool:
    """Whether a package's `__init__` has a name, or a data file carries it."""
    source = files["/".join([*package, "__init__.py"])]
    return re.search(rf"\b{name}\b", source) is not None or any((ROOT.joinpath(*package)).glob(f"{name}.*"))


def test_globbed_folders_exist() -> None:
    """Code that is hashed by folder: a moved folder would be missing in the hash."""
    from companion.results import EVALUATION_CODE
    from llava_core.train.identity import CODE_FOLDERS, NOT_TRAINING

    assert [name for name in EVALUATION_CODE if not list((ROOT / name).rglob("*.py"))] == []
    assert [name for name in CODE_FOLDERS if not list((ROOT / "llava_core" / name).rglob("*.py"))] == []
    assert [name for name in NOT_TRAINING if not (ROOT / "llava_core" / name).is_file()] == []
