"""The book's scripts: pinned, checked, and never a reason to fail."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

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


def test_only_the_pinned_file_is_used(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"package/a.js": "1", "package/fonts/x.woff": "2", "package/rest.js": "3"}
    package = archive(tools, "thing-1.0.tgz", files)
    wanted = {"package/a.js": "m/a.js", "package/fonts/": "m/fonts/"}
    pinned = vendor.Package("npm", "thing@1.0", sha256_file(package), wanted)
    monkeypatch.setattr(vendor, "PARTS", {"thing": ("m/a.js", (pinned,))})
    target = tmp_path / "book"
    assert vendor.vendor(target) == {"thing": "thing@1.0"}
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == {
        "m/a.js",
        "m/fonts/x.woff",
        "versions.json",
    }
    assert read_json(target / "versions.json") == {"thing": "thing@1.0"}

    archive(tools, "thing-1.0.tgz", {**files, "package/a.js": "evil"})
    assert vendor.vendor(target) == {"thing": "thing@1.0"}  # there already: nothing is asked for
    (target / "m" / "a.js").unlink()
    reason = vendor.vendor(target)["thing"]
    assert "not the pinned" in reason
    assert not (target / "m" / "a.js").exists()


def test_without_npm_the_wheel_serves_and_without_both_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = archive(tmp_path, "w.whl", {"es5/tex-mml-chtml.js": "1", "es5/output/chtml/fonts/woff-v2/f.woff": "2"})

    def fetch(package: vendor.Package, folder: Path) -> Path:
        if package.tool == "npm":
            raise CompanionError("npm is not installed")
        return wheel

    first = vendor.Package("npm", "m@1", "", {})
    second = vendor.Package("pip", "m==1", "", vendor._mathjax("es5"))
    parts = {"formulas": ("mathjax/tex-mml-chtml.js", (first, second)), "viewer": ("embed.js", (first,))}
    monkeypatch.setattr(vendor, "fetch", fetch)
    monkeypatch.setattr(vendor, "PARTS", parts)
    monkeypatch.setattr(vendor, "VENDOR", tmp_path / "book")
    monkeypatch.setattr(vendor.vendor, "__defaults__", (tmp_path / "book",))
    assert vendor.main() == 0
    assert (tmp_path / "book" / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2" / "f.woff").exists()
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: the book will load viewer from the network (npm is not installed)"]


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompanionError, match="npm is not installed"):
        vendor.fetch(vendor.Package("npm", "thing@1.0", "", {}), tmp_path)


@pytest.mark.parametrize("name", ["p.tgz", "p.whl"])
def test_nothing_is_written_outside_and_nothing_may_be_missing(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path, name, {"package/fonts/../../../x": "1", "package/a.js": "2"})
    with pytest.raises(CompanionError, match="leads out of"):
        vendor.unpack(path, {"package/fonts/": "fonts/"}, tmp_path / "to")
    with pytest.raises(CompanionError, match="has no package/b"):
        vendor.unpack(path, {"package/b.js": "b.js"}, tmp_path / "to")
    assert not (tmp_path / "x").exists()


def test_every_part_is_pinned_by_version_and_checksum() -> None:
    for proof, packages in vendor.PARTS.values():
        for package in packages:
            assert any(target in (proof, "mathjax/") or target.startswith(proof) for target in package.files.values())
            assert len(package.sha256) == 64
            assert package.spec.rpartition("@" if package.tool == "npm" else "==")[2][0].isdigit()
