"""The book's scripts: pinned, checked, and a failed download is no error."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from companion.book import vendor
from llava_core.runtime import CompanionError, read_json, sha256_file


def archive(folder: Path, name: str, files: dict[str, str]) -> Path:
    path = folder / name
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for inside, text in files.items():
                wheel.writestr(inside, text)
        return path
    with tarfile.open(path, "w:gz") as tar:
        for inside, text in files.items():
            member = tarfile.TarInfo(inside)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose `npm` copies an archive of the same folder instead of asking a registry."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"""#!/bin/sh
for word in "$@"; do
    case "$last" in --pack-destination) to=$word ;; esac
    last=$word
done
cp {folder}/*.tgz "$to"
"""
    (folder / "npm").write_text(script)
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_only_the_pinned_archive_is_used(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"package/a.js": "1", "package/fonts/x.woff": "2", "package/rest.js": "3"}
    package = archive(tools, "thing-1.0.tgz", files)
    wanted = {"package/a.js": "m/a.js", "package/fonts/": "m/fonts/"}
    pinned = {"tool": "npm", "spec": "thing@1.0", "sha256": sha256_file(package), "files": wanted}
    monkeypatch.setattr(vendor, "load_parts", lambda: {"thing": {"proof": "m/a.js", "packages": [pinned]}})
    target = tmp_path / "book"
    assert vendor.vendor(target) == {"thing": "thing@1.0"}
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == {
        "m/a.js",
        "m/fonts/x.woff",
        "versions.json",
    }
    assert read_json(target / "versions.json") == {"thing": "thing@1.0"}

    archive(tools, "thing-1.0.tgz", {**files, "package/a.js": "evil"})
    assert vendor.vendor(target) == {"thing": "thing@1.0"}  # already installed: no download
    (target / "m" / "a.js").unlink()
    reason = vendor.vendor(target)["thing"]
    assert "not the pinned" in reason
    assert not (target / "m" / "a.js").exists()


def test_wheel_replaces_npm_and_missing_both_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = archive(tmp_path, "w.whl", {"es5/tex-mml-chtml.js": "1", "es5/output/chtml/fonts/woff-v2/f.woff": "2"})

    def fetch(package: dict[str, Any], folder: Path) -> Path:
        if package["tool"] == "npm":
            raise CompanionError("npm is not installed")
        return wheel

    proof, fonts = "mathjax/tex-mml-chtml.js", "output/chtml/fonts/woff-v2/"
    files = {"es5/tex-mml-chtml.js": proof, f"es5/{fonts}": f"mathjax/{fonts}"}
    first = {"tool": "npm", "spec": "m@1", "sha256": "", "files": {}}
    second = {"tool": "pip", "spec": "m==1", "sha256": "", "files": files}
    parts = {
        "formulas": {"proof": proof, "packages": [first, second]},
        "viewer": {"proof": "embed.js", "packages": [first]},
    }
    monkeypatch.setattr(vendor, "fetch", fetch)
    monkeypatch.setattr(vendor, "load_parts", lambda: parts)
    monkeypatch.setattr(vendor, "VENDOR", tmp_path / "book")
    monkeypatch.setattr(vendor.vendor, "__defaults__", (tmp_path / "book",))
    assert vendor.main() == 0
    assert (tmp_path / "book" / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2" / "f.woff").exists()
    output = capsys.readouterr().err.splitlines()
    assert output == ["note: the book will load viewer from the network (npm is not installed)"]


def test_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompanionError, match="npm is not installed"):
        vendor.fetch({"tool": "npm", "spec": "thing@1.0"}, tmp_path)


@pytest.mark.parametrize("name", ["p.tgz", "p.whl"])
def test_archive_paths_stay_inside_and_missing_ones_are_named(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path, name, {"package/fonts/../../../x": "1", "package/a.js": "2"})
    with pytest.raises(CompanionError, match=r"cannot be unpacked|has no package/fonts/"):
        vendor.unpack(path, {"package/fonts/": "fonts/"}, tmp_path / "to")
    assert not list(tmp_path.parent.glob("**/x"))
    path = archive(tmp_path, name, {"package/a.js": "2"})
    with pytest.raises(CompanionError, match="has no package/b"):
        vendor.unpack(path, {"package/b.js": "b.js"}, tmp_path / "to")


def test_every_part_is_pinned_by_version_and_checksum() -> None:
    for part in vendor.load_parts().values():
        for package in part["packages"]:
            assert part["proof"] in package["files"].values()
            assert len(package["sha256"]) == 64
            assert package["spec"].rpartition("@" if package["tool"] == "npm" else "==")[2][0].isdigit()


def test_licenses_are_copied_with_the_scripts() -> None:
    for part in vendor.load_parts().values():
        for package in part["packages"]:
            assert any("LICENSE" in target for target in package["files"].values()), package["spec"]
    assert vendor.load_parts()["MathJax 3.2.2"]["proof"] == "mathjax/LICENSE"  # older copies are fetched again


def test_wheels_are_fetched_without_building() -> None:
    assert "--only-binary=:all:" in vendor.FETCH["pip"].split()
