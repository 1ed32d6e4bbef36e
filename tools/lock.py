"""Write constraints.txt and environment.yml from pyproject.toml and the packages of this interpreter.

Run it with `make lock` after a change of the dependencies. A declared package that is not installed here (the GPU
ones, on a machine without a GPU) keeps the pin that constraints.txt gives it.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HEAD = "# Written by tools/lock.py from pyproject.toml (`make lock`); do not edit."


def declared() -> list[str]:
    """Return every requirement of pyproject.toml as it is written there, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]


def pins(constraints: str) -> dict[str, str]:
    """Return the pinned version of each package of a constraints file."""
    lines = [line.split("==") for line in constraints.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in lines}


def closure(requirements: list[str], known: dict[str, str]) -> dict[str, str]:
    """Return the version of each package that the requirements lead to.

    Raises:
        SystemExit: a declared package is neither installed nor pinned before.
    """
    pinned: dict[str, str] = {}
    queue = [(Requirement(line), True) for line in requirements]
    done = set()
    while queue:
        requirement, direct = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in done:
            continue
        done.add((name, frozenset(requirement.extras)))
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if direct and name not in known:
                raise SystemExit(f"{name}: install it, or add `{name}==VERSION` to constraints.txt once") from None
            if direct:
                pinned[name] = known[name]
            continue
        pinned[name] = package.version.partition("+")[0]  # 2.13.0+cpu: which build is the machine's choice
        for line in package.requires or []:
            inner = Requirement(line)
            if any(not inner.marker or inner.marker.evaluate({"extra": e}) for e in ["", *requirement.extras]):
                queue.append((inner, False))
    return pinned


def environment_yml() -> str:
    """Return the conda environment: Python from conda-forge, everything else as pyproject.toml asks for it."""
    lines = [HEAD, "name: llava", "channels: [conda-forge]", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    return "\n".join([*lines, *(f'      - "{item}"' for item in ["-c constraints.txt", *declared(), "-e ."])]) + "\n"


def main() -> None:
    """Write both files."""
    path = ROOT / "constraints.txt"
    known = pins(path.read_text()) if path.exists() else {}
    lines = sorted(f"{name}=={version}" for name, version in closure(declared(), known).items())
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    (ROOT / "environment.yml").write_text(environment_yml())
    print(f"constraints.txt: {len(lines)} packages; environment.yml: {len(declared())} declared ones")


if __name__ == "__main__":
    main()
