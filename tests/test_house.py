"""The contract of notebooks, and the size of files in git."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llava_core.runtime import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CELLS, MOST_LINES, MOST_COLUMNS = 25, 30, 100
MOST_BYTES = 60 * 2**20


# ------------------------------------------------------------------------------------------------ notebooks


def lines_of(cell: dict[str, Any]) -> list[str]:
    source = cell["source"]
    return (source if isinstance(source, str) else "".join(source)).rstrip("\n").split("\n")


def tree_of(cell: dict[str, Any]) -> ast.Module:
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines_of(cell)))


def calls_of(tree: ast.AST) -> set[str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}


def broken_rules(notebook: dict[str, Any]) -> list[str]:
    """What a notebook does against its contract, in words."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    broken = []
    if not cells or cells[0]["cell_type"] != "markdown" or not lines_of(cells[0])[0].startswith("# "):
        broken.append("the first cell must be text that begins with a title")
    tagged = [cell for cell in code if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        broken.append(f"{len(tagged)} cells are tagged `parameters`; it must be one")
    else:
        named = [node for node in tree_of(tagged[0]).body if isinstance(node, ast.AnnAssign)]
        first = [ast.unparse(node) for node in named[:2]]
        if first != ["scale: str = 'mini'", "fast: bool = False"]:
            broken.append('the parameters must begin with `scale: str = "mini"` and `fast: bool = False`')
        if len(named) != len(tree_of(tagged[0]).body):
            broken.append("each parameter needs a type")
        text = ["", *lines_of(tagged[0])]  # after the parameter, or above one that takes several lines
        if [n for n in named if "#" not in text[n.lineno] and not text[n.lineno - 1].startswith("#")]:
            broken.append("each parameter needs a comment")
    wide = [line for cell in cells for line in lines_of(cell) if len(line) > MOST_COLUMNS]
    if wide:
        broken.append(f"{len(wide)} lines of more than {MOST_COLUMNS} characters: {wide[0][:60]} ...")
    if len(code) > MOST_CELLS:
        broken.append(f"{len(code)} code cells; at most {MOST_CELLS}")
    for number, cell in enumerate(code, start=1):
        place = f"code cell {number}"
        lines = lines_of(cell)
        if len(lines) > MOST_LINES:
            broken.append(f"{place}: {len(lines)} lines; at most {MOST_LINES}")
        if cell.get("outputs") or cell.get("execution_count") is not None:
            broken.append(f"{place}: has outputs or a count; `make format` removes them")
        if any(line.lstrip().startswith("!") for line in lines):
            broken.append(f"{place}: runs a shell command")
        for text in unsafe_markdown(tree_of(cell)):
            broken.append(f"{place}: Markdown may have markup of data; use figures.markdown_safe: {text[:60]}")
        for node in ast.walk(tree_of(cell)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                broken.append(f"{place}: defines {node.name}; definitions belong into the package")
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
                broken.append(f"{place}: uses sys.path")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.match(r"(/|~/|[A-Za-z]:[\\/])\w", node.value):
                    broken.append(f"{place}: absolute path {node.value!r}")
                if re.match(r"https?://", node.value):
                    broken.append(f"{place}: uses the network: {node.value!r}")
    ending = [tree_of(cell) for cell in code[-2:]]
    if not any("save_numbers" in calls_of(tree) for tree in ending):
        broken.append("the last cells must save the chapter's numbers with `save_numbers`")
    if not any(isinstance(node, ast.Assert) for tree in ending for node in ast.walk(tree)):
        broken.append("the last cells must assert what the chapter claims")
    broken += broken_exercises(cells)
    companion = notebook["metadata"].get("companion", {})
    if not {"needs", "claims"} <= companion.keys():
        broken.append("the metadata must hold `companion: {needs, claims}`")
    return broken


def names_of(cells: list[dict[str, Any]], context: type[ast.expr_context]) -> set[str]:
    """The names that cells assign (`ast.Store`) or read (`ast.Load`), without the variables of comprehensions."""
    nodes = [node for cell in cells for node in ast.walk(tree_of(cell))]
    local = [name for node in nodes if isinstance(node, ast.comprehension) for name in ast.walk(node.target)]
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context) and n not in local}


def broken_exercises(cells: list[dict[str, Any]]) -> list[str]:
    """What the exercises of a notebook do against their rules: each has a question and a folded, checked solution."""
    solutions = [cell for cell in cells if "exercise" in cell.get("metadata", {}).get("tags", [])]
    broken = []
    for number, cell in enumerate(solutions, start=1):
        at, name = cells.index(cell), f"solution_{number}"
        before = [c for c in cells[:at] if c["cell_type"] == "code"]
        after = [c for c in cells[at:] if c["cell_type"] == "code" and c not in solutions]
        head = "## Exercises" if number == 1 else f"{number}. "
        if cells[at - 1]["cell_type"] != "markdown" or not lines_of(cells[at - 1])[0].startswith(head):
            broken.append(f"exercise {number}: the cell before it must be its question and begin with {head}")
        if "hide-cell" not in cell["metadata"]["tags"]:
            broken.append(f"exercise {number}: its solution is not folded (tag `hide-cell`)")
        checks = [node for node in tree_of(cell).body if isinstance(node, ast.Assert)]
        computed = names_of([cell], ast.Store)
        tested = {n.id for check in checks for n in ast.walk(check) if isinstance(n, ast.Name)}
        if name not in computed or not computed & tested:
            broken.append(f"exercise {number}: assign its numbers to {name} and assert something of what it computes")
        if changed := computed & names_of(before, ast.Store) & names_of(after, ast.Load):
            broken.append(f"exercise {number}: changes {', '.join(sorted(changed))}, which a later cell reads")
        if not any("save_numbers" in calls_of(tree_of(c)) for c in after):
            broken.append(f"exercise {number}: `save_numbers` must come after it")
    return broken


# Calls whose result has no markup of data: `markdown_safe` itself, and functions that apply it to every text.
ESCAPING = {"markdown_safe", "card_text", "explain", "len"}
TEXT_METHODS = {"join", "format", "partition", "replace"}


def is_safe(node: ast.AST | None, names: dict[str, list[ast.expr]]) -> bool:
    """Whether a text has only our markup: constants, numbers with a format such as `:.1f`, and escaped texts.

    `names`: the values that the names of the cell are assigned.
    """
    match node:
        case ast.Constant():
            return True
        case ast.FormattedValue(format_spec=ast.JoinedStr(values=[ast.Constant(value=str(spec))])) if (
            spec[-1] in "dfge%,"
        ):
            return True  # such a format refuses a text
        case ast.FormattedValue(value=value) | ast.Subscript(value=value) | ast.DictComp(value=value):
            return is_safe(value, names)
        case ast.ListComp(elt=value) | ast.GeneratorExp(elt=value):
            return is_safe(value, names)
        case ast.JoinedStr(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts):
            return all(is_safe(part, names) for part in parts)
        case ast.BinOp(left=one, op=ast.Add(), right=other) | ast.IfExp(body=one, orelse=other):
            return is_safe(one, names) and is_safe(other, names)
        case ast.Name(id=name):
            others = {key: values for key, values in names.items() if key != name}
            return name in names and all(is_safe(value, others) for value in names[name])
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in ESCAPING:
            return True
        case ast.Call(func=ast.Attribute(value=text, attr=name), args=args, keywords=keywords) if name in TEXT_METHODS:
            return all(is_safe(part, names) for part in [text, *args, *(word.value for word in keywords)])
    return False


def unsafe_markdown(tree: ast.AST) -> list[str]:
    """The calls of `Markdown` whose text may have markup of data."""
    names: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                pairs = list(zip(targets, values, strict=False))
            case ast.Assign(targets=targets, value=value):
                pairs = [(target, value) for target in targets]
            case ast.AugAssign(target=target, value=value):
                pairs = [(target, value)]
            case _:
                continue
        for target, value in pairs:
            if isinstance(target, ast.Name):
                names.setdefault(target.id, []).append(value)
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func)[-8:] == "Markdown"
    ]
    texts = [text for call in calls for text in [*call.args, *(word.value for word in call.keywords)]]
    return [ast.unparse(text) for text in texts if not is_safe(text, names)]


def needs_of(notebooks: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    return {name: book["metadata"].get("companion", {}).get("needs", []) for name, book in notebooks.items()}


def circle(needs: dict[str, list[str]]) -> list[str]:
    """Names that no order of running can reach."""
    ready: set[str] = set()
    while more := {name for name, upstream in needs.items() if name not in ready and set(upstream) <= ready}:
        ready |= more
    return sorted(set(needs) - ready)


def test_notebooks_exist() -> None:
    assert NOTEBOOKS
    numbers = [path.name.partition("_")[0] for path in NOTEBOOKS]
    assert all(re.fullmatch(r"\d\d", number) for number in numbers)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_follow_the_contract(path: Path) -> None:
    assert broken_rules(json.loads(path.read_text())) == []


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem < "60"], ids=lambda path: path.stem)
def test_chapters_have_two_exercises_and_folded_imports(path: Path) -> None:
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert sum("exercise" in cell["metadata"].get("tags", []) for cell in code) == 2
    assert "hide-cell" in code[1]["metadata"]["tags"], "the cell after the parameters, with the imports"


def test_ablation_chapters_have_the_same_code() -> None:
    """Chapters 40 to 43 differ in their parameters and in prose."""
    chapters = [path for path in NOTEBOOKS if path.stem[:2] in ("40", "41", "42", "43")]
    assert len(chapters) == 4
    code = []
    for path in chapters:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        code.append([lines_of(cell) for cell in cells if cell["metadata"].get("tags") != ["parameters"]])
        parameters = {
            ast.unparse(node) for cell in cells for node in tree_of(cell).body if isinstance(node, ast.AnnAssign)
        }
        assert f"chapter: str = '{path.stem}'" in parameters
        assert f"ablation: str = '{path.stem.partition('_ablation_')[2]}'" in parameters
    assert code[1:] == code[:-1]


def test_notebook_needs_exist_without_a_circle() -> None:
    needs = needs_of({path.stem: json.loads(path.read_text()) for path in NOTEBOOKS})
    assert not {n for upstream in needs.values() for n in upstream} - needs.keys()
    assert circle(needs) == []
    assert circle({"a": ["b"], "b": ["a"], "c": []}) == ["a", "b"]


def sample_notebook() -> dict[str, Any]:
    def cell(source: str, *tags: str) -> dict[str, Any]:
        return {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}, "outputs": []}

    parameters = 'scale: str = "mini"  # hardware and data\nfast: bool = False  # shortest runs'
    return {
        "metadata": {"companion": {"needs": [], "claims": []}},
        "cells": [
            {"cell_type": "markdown", "source": "# Title", "metadata": {}},
            cell(parameters, "parameters"),
            cell("%matplotlib inline\nx = 1"),
            cell('assert x\nsave_numbers("00_sample", {"x": x})'),
        ],
    }


@pytest.mark.parametrize(
    ("cell", "source", "rule"),
    [
        (0, "No title", "title"),
        (1, 'fast: bool = False  # a\nscale: str = "mini"  # b', "must begin with"),
        (1, 'scale: str = "mini"  # a\nfast: bool = False  # b\nsteps = 3  # c', "needs a type"),
        (1, 'scale: str = "mini"\nfast: bool = False  # b', "needs a comment"),
        (2, "x = 1\n" * 31, "31 lines"),
        (2, f"x = {'1' * 97}", "more than 100 characters"),
        (2, "def f(): ...", "defines f"),
        (2, "if True:\n    class A: ...", "defines A"),
        (2, "!pip install x", "shell command"),
        (2, "import sys\nsys.path.append('.')", "sys.path"),
        (2, "open('/home/me/x')", "absolute path"),
        (2, "open('https://example.org')", "network"),
        (2, 'Markdown(f"**{question}**")', "markup of data"),
        (2, "display(Markdown(text))", "markup of data"),
        (2, 't = f"{n:d}"\nt += row["id"]\nIPython.display.Markdown(t)', "markup of data"),
        (2, 'Markdown(data="; ".join(names))', "markup of data"),
        (2, 'Markdown("{a}".format(a=reply.text))', "markup of data"),
        (3, 'save_numbers("00_sample", {})', "assert"),
        (3, "assert x", "save_numbers"),
    ],
)
def test_notebook_rules_detect_each_violation(cell: int, source: str, rule: str) -> None:
    notebook = sample_notebook()
    assert broken_rules(notebook) == []
    notebook["cells"][cell]["source"] = source
    result = broken_rules(notebook)
    assert len(result) == 1
    assert rule in result[0]


EXERCISE = "n = 2 * x\nsolution_1 = {'n': n}\nassert n == 2"


@pytest.mark.parametrize(
    ("question", "solution", "tags", "rule"),
    [
        ("## Exercises\n\n1. Twice?", EXERCISE, ["exercise", "hide-cell"], None),
        ("Twice?", EXERCISE, ["exercise", "hide-cell"], "begin with ## Exercises"),
        ("## Exercises", EXERCISE, ["exercise"], "not folded"),
        ("## Exercises", EXERCISE.replace("solution_1", "result"), ["exercise", "hide-cell"], "numbers to solution_1"),
        ("## Exercises", EXERCISE.replace("n == 2", "1 == 1"), ["exercise", "hide-cell"], "assert something"),
        ("## Exercises", f"{EXERCISE}\nx = 3", ["exercise", "hide-cell"], "changes x"),
    ],
)
def test_exercise_rules_detect_each_violation(question: str, solution: str, tags: list[str], rule: str | None) -> None:
    notebook = sample_notebook()
    cell = {"cell_type": "code", "source": solution, "metadata": {"tags": tags}, "outputs": []}
    notebook["cells"][3:3] = [{"cell_type": "markdown", "source": question, "metadata": {}}, cell]
    result = broken_rules(notebook)
    assert len(result) == (rule is not None)
    assert rule is None or rule in result[0]


# A cell of a chapter that needs no more than its imports, or some values: what is right in it, and a wrong answer
WRONG = [
    ("12", 2, "-(-records // batch)", "records // batch", {"config": None, "samples": None}),
    ("20", 1, "math.ceil(pairs / batch_size)", "pairs // batch_size", {}),
    ("22", 1, "-(-ledger", "(ledger", {}),
    ("40", 1, "2 * pooled * (1 - pooled)", "pooled * (1 - pooled)", {"paper": {"reference": 90.92, "other": 89.96}}),
]


@pytest.mark.parametrize(("number", "exercise", "right", "wrong", "given"), WRONG)
def test_wrong_solutions_fail(number: str, exercise: int, right: str, wrong: str, given: dict[str, Any]) -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith(number))
    cells = json.loads(path.read_text())["cells"]
    (cell,) = (cell for cell in cells if cell["id"] == f"solution-{exercise}")
    text = "\n".join(lines_of(cell))
    assert text.count(right) == 1
    if "config" in given:
        from llava_core.config import load_experiment

        given = {"config": load_experiment("finetune", "mini"), "samples": range(100)}
    if "paper" in given:
        given = {"paper": {**given["paper"], "n": 4241, "standard_error": 0.633}}
    exec(text, dict(given))
    with pytest.raises(AssertionError):
        exec(text.replace(right, wrong), dict(given))


def test_escaped_texts_and_numbers_are_safe() -> None:
    cell = """
text = f"{share:.0%} of {len(rows)}: {', '.join(f'*{figures.markdown_safe(r)}*' for r in rows)}"
text += " (one seed)" if one else f" [{low:.1f}, {high:,}]"
display(Markdown(text), Markdown("{a}".format(**{k: markdown_safe(v) for k, v in known.items()})))
"""
    assert unsafe_markdown(ast.parse(cell)) == []


@pytest.mark.parametrize("package", ["benchmarks", "companion", "llava_core"])
def test_packages_show_no_markup_of_data(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert unsafe_markdown(ast.parse(path.read_text(encoding="utf-8"))) == [], path


def test_notebook_rules_detect_outputs_and_missing_metadata() -> None:
    notebook = sample_notebook()
    notebook["cells"][2]["outputs"] = [{"output_type": "stream"}]
    notebook["cells"][3]["execution_count"] = 3
    del notebook["metadata"]["companion"]
    notebook["cells"] += [sample_notebook()["cells"][2]] * 26
    text = " ".join(broken_rules(notebook))
    assert "code cell 2: has outputs" in text
    assert "code cell 3: has outputs" in text
    assert "companion" in text
    assert "29 code cells" in text


# ------------------------------------------------------------------------------------------------ git


def test_files_in_git_are_small() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]
    assert sum(path.lstat().st_size for path in files) < MOST_BYTES
    assert not [path for path in files if path.suffix in {".pyc", ".ckpt", ".bin", ".pkl"}]


def test_curated_figures_have_their_numbers() -> None:
    from companion.figures import CURATED

    files = {path.name: path for path in (ROOT / "figures").iterdir()}
    assert set(files) == {f"{name}{suffix}" for name in CURATED for suffix in (".svg", ".json")}
    assert sum(path.stat().st_size for path in files.values()) < 3 * 2**20
    for name in CURATED:
        assert json.loads(files[f"{name}.json"].read_text())
    shown = re.findall(r"\(figures/([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(shown) == 2
    assert set(shown) <= set(files)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imported_names_exist(path: Path) -> None:
    """A name that has moved breaks a notebook only where it is run."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    nodes = [node for cell in cells for node in ast.walk(tree_of(cell)) if isinstance(node, ast.ImportFrom)]
    for node in (n for n in nodes if (n.module or "").split(".")[0] in ("llava_core", "companion", "benchmarks")):
        module = importlib.import_module(node.module or "")
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")
