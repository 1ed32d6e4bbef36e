"""Fetch the scripts that the book would otherwise load from the network: `python -m companion.book.vendor`.

Two packages of fixed versions, checked against fixed checksums, go into book/_vendor, which is not part of the
repository: MathJax for formulas and the viewer of Jupyter widgets. npm brings both; without it pip brings MathJax.
Whatever is missing afterwards the book loads from its public address.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_core.runtime import ROOT, CompanionError, atomic_write, read_json, sha256_file, write_json

VENDOR = ROOT / "book" / "_vendor"
TIMEOUT_S = 120


@dataclass(frozen=True)
class Package:
    """One package of a registry.

    Args:
        tool: `npm` or `pip`.
        spec: name and version as the tool wants them.
        sha256: of the package's file.
        files: beginning of a path in the package -> beginning of its path in the vendor folder; the rest of the path
            is kept, and what begins with none of them is left out.
    """

    tool: str
    spec: str
    sha256: str
    files: Mapping[str, str]


def _mathjax(inside: str) -> dict[str, str]:
    return {
        f"{inside}/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
        f"{inside}/output/chtml/fonts/woff-v2/": "mathjax/output/chtml/fonts/woff-v2/",
    }


# part -> (the file that shows that it is there, where to get it, best first)
PARTS: dict[str, tuple[str, tuple[Package, ...]]] = {
    "MathJax 3.2.2": (
        "mathjax/tex-mml-chtml.js",
        (
            Package(
                "npm",
                "mathjax@3.2.2",
                "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
                _mathjax("package/es5"),
            ),
            Package(
                "pip",
                "django-static-mathjax==3.2.2.1",
                "05ad109fd9e5d9d380c76389689b7f523e9ccb7f7a85c1eb962c7564eac7601d",
                _mathjax("mathjax/static/mathjax/es5"),
            ),
        ),
    ),
    "widget viewer 1.0.15": (
        "embed.js",
        (
            Package(
                "npm",
                "@jupyter-widgets/html-manager@1.0.15",
                "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638",
                # the viewer looks for its fonts beside itself; their names are checksums
                {"package/dist/embed.js.LICENSE.txt": "embed.js.LICENSE.txt", "package/dist/embed.js": "embed.js"}
                | {
                    f"package/dist/{name}.woff2": f"{name}.woff2"
                    for name in ("1551f4f60c37af51121f", "7a3337626410ca2f4071", "d878b0a6a1144760244f")
                },
            ),
        ),
    ),
}


def fetch(package: Package, folder: Path) -> Path:
    """Download a package's file with its registry's own client.

    Raises:
        CompanionError: the client is missing, has no answer, or the file is not the pinned one.
    """
    npm = shutil.which("npm")
    if package.tool == "npm" and npm is None:
        raise CompanionError("npm is not installed")
    if package.tool == "npm":
        command = [str(npm), "pack", package.spec, "--pack-destination", str(folder), "--loglevel=error"]
        command += ["--prefer-offline", "--fetch-retries=1", "--fetch-retry-maxtimeout=2000", "--fetch-timeout=20000"]
        command += ["--fetch-retry-mintimeout=1000"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--retries=1", "--timeout=20", "--dest", str(folder), package.spec]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CompanionError(f"{package.tool} had no answer in {TIMEOUT_S} s") from None
    files = [path for path in folder.iterdir() if path.suffix in (".tgz", ".whl")]
    if done.returncode != 0 or len(files) != 1:
        lines = done.stderr.strip().splitlines() or ["no file came"]
        said = next((line for line in lines if line.lower().startswith(("error", "npm error"))), lines[-1])
        raise CompanionError(f"{package.tool} could not fetch {package.spec}: {said[:200]}")
    if (found := sha256_file(files[0])) != package.sha256:
        raise CompanionError(f"{package.spec} has SHA-256 {found}, not the pinned {package.sha256}; it is not used")
    return files[0]


def unpack(archive: Path, files: Mapping[str, str], folder: Path) -> list[str]:
    """Write the listed files of a .tgz or .whl below a folder.

    Returns:
        The written paths, relative to the folder.

    Raises:
        CompanionError: a listed beginning matches nothing, or a path leads out of the folder.
    """
    members: dict[str, bytes] = {}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            members = {name: wheel.read(name) for name in wheel.namelist() if name.startswith(tuple(files))}
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.startswith(tuple(files)):
                    members[member.name] = (tar.extractfile(member) or io.BytesIO()).read()
    written = []
    for beginning, target in files.items():
        exact = not beginning.endswith("/")
        names = [n for n in members if (n == beginning if exact else n.startswith(beginning))]
        if not names:
            raise CompanionError(f"{archive.name} has no {beginning}")
        for name in names:
            path = (folder / (target + name.removeprefix(beginning))).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise CompanionError(f"{archive.name}: the path {name} leads out of {folder.name}")
            atomic_write(path, members[name])
            written.append(str(path.relative_to(folder.resolve())))
    return written


def vendor(folder: Path = VENDOR) -> dict[str, str]:
    """Bring every part into the vendor folder that is not there yet.

    Returns:
        Part -> the package it came from, or the reason why the network copy will be used.
    """
    stamp = folder / "versions.json"
    have: dict[str, str] = read_json(stamp) if stamp.exists() else {}
    result = {}
    for part, (proof, packages) in PARTS.items():
        if have.get(part) in {package.spec for package in packages} and (folder / proof).exists():
            result[part] = have[part]
            continue
        have.pop(part, None)
        reasons = []
        for package in packages:
            try:
                with tempfile.TemporaryDirectory() as temporary:
                    unpack(fetch(package, Path(temporary)), package.files, folder)
            except (CompanionError, OSError) as error:
                reasons.append(str(error))
                continue
            result[part] = have[part] = package.spec
            break
        else:
            result[part] = "; ".join(reasons)
    if have:
        write_json(stamp, have)
    return result


def main() -> int:
    """Fetch what is missing; a part that cannot be had costs one line and nothing else."""
    specs = {package.spec for _, packages in PARTS.values() for package in packages}
    for part, origin in vendor().items():
        if origin not in specs:
            print(f"note: the book will load {part} from the network ({origin})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
