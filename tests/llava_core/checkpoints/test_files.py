"""Files of checkpoint folders as untrusted input: pointers, permissions, and JSON that is not a configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoint_fixtures import loaded, original, root  # noqa: F401 - fixtures

from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.base_models import base_hash
from llava_core.checkpoints.files import atomic_folder, contained_file, error_at, read_config
from llava_core.checkpoints.tokenizer import TOKENIZER_FILES
from llava_core.runtime import CheckpointError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["config.json", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"])
def test_git_lfs_pointers_are_named(original, name) -> None:
    (original / name).write_text(POINTER)
    (problem,) = inspect(original)["problems"]
    assert f"{name}: a Git LFS pointer" in problem
    assert "git lfs pull" in problem


def test_a_pointer_instead_of_the_tokenizer_is_named(original) -> None:
    for file in original.glob("tokenizer*"):
        file.unlink()
    (original / "tokenizer.model").write_text(POINTER)
    (problem,) = inspect(original)["problems"]
    assert "tokenizer.model: a Git LFS pointer" in problem


def test_an_unread_pointer_is_no_fault(original) -> None:
    (original / "README.md").write_text(POINTER)
    (original / "flax_model.msgpack").write_text(POINTER)
    assert "README.md" not in TOKENIZER_FILES
    assert inspect(original)["problems"] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize(
    ("name", "mode"), [("", 0), ("", 0o444), ("config.json", 0), ("pytorch_model-00002-of-00002.bin", 0)]
)
def test_files_that_may_not_be_read_are_named(original, name, mode) -> None:
    (original / name).chmod(mode)
    (problem,) = inspect(original)["problems"]
    (original / name).chmod(0o755)
    assert f"{name or 'original'}: cannot be read" in problem


def test_a_file_that_cannot_be_opened_is_named(original, monkeypatch) -> None:
    def denied(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(Permission denied\); fix"):
        contained_file(original, "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rms_norm_eps": NaN}', "NaN is not a finite number"),
        ('{"rms_norm_eps": -Infinity}', "-Infinity is not a finite number"),
        ('{"rms_norm_eps": 1e999}', "1e999 is not a finite number"),
        ('{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        (f"{{{', '.join(f'{chr(34)}{k}{chr(34)}: 1' for k in (*range(70_000), 69_999))}}}", "'69999' is there twice"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_ambiguous_json_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json: invalid JSON .{re.escape(message)}"):
        read_config(tmp_path, "config.json")


def test_a_huge_configuration_is_not_read(tmp_path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 1,000,000 bytes"):
        read_config(tmp_path, "config.json")


@pytest.mark.parametrize("name", ["a\ud800", "a\x1b[2J", "a\nerror: b"])
def test_errors_print_names_of_others_safely(name, original) -> None:
    text = str(error_at(original, f"{name} is unknown; fix: download it again"))
    assert text.isprintable()
    assert text.encode()
    long = str(error_at(original, f"{name * 10**6} is unknown; fix: download it again"))
    assert len(long) < 2000
    assert long.endswith("fix: download it again")


WRITER = """
import sys
from pathlib import Path
from llava_core.checkpoints.files import atomic_folder
from llava_core.runtime import CheckpointError
target, name, overwrite = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "overwrite"
try:
    with atomic_folder(target, overwrite) as folder:
        (folder / "first").write_text(name)
        print("writing", flush=True)
        sys.stdin.read()
        (folder / "last").write_text(name)
except CheckpointError as error:
    print(error)
"""


def writer(target: Path, name: str, how: str) -> subprocess.Popen[str]:
    """A process that writes two files into a folder, the last one when its stdin is closed."""
    words = [sys.executable, "-c", WRITER, str(target), name, how]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["new", "overwrite"])
def test_two_processes_do_not_write_one_folder(tmp_path: Path, how: str) -> None:
    target = tmp_path / "target"
    with writer(target, "a", how) as first:
        assert first.stdout.readline() == "writing\n"
        with writer(target, "b", how) as second:
            if how == "new":
                assert "target: another process is writing it; fix: wait for it" in second.communicate(timeout=20)[0]
            first.communicate()
            assert {file.read_text() for file in target.iterdir()} == {"a"}
            if how == "overwrite":
                assert second.communicate(timeout=20)[0] == "writing\n"
    assert {file.name: file.read_text() for file in target.iterdir()} == dict.fromkeys(
        ("first", "last"), "a" if how == "new" else "b"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_folder_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with writer(target, "a", "new") as killed:
        assert killed.stdout.readline() == "writing\n"
        killed.kill()
    with writer(target, "b", "new") as second:
        second.communicate()
    assert {file.read_text() for file in target.iterdir()} == {"b"}
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_folder_that_is_replaced_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    for text in ("old", "new"):
        with suppress(SystemExit), atomic_folder(target, overwrite=True) as folder:
            (folder / "file").write_text(text)
            if text == "new":  # killed between the two renames
                monkeypatch.setattr(type(target), "rename", lambda self, to: os.rename(self, to) or sys.exit())
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(CheckpointError, match="exists already"), atomic_folder(target):
        pass
    assert (target / "file").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"a": {"\\uDFFF b": 1}}', '{"a": ["\\ude00\\ud83d"]}'])
def test_half_a_character_is_refused(tmp_path, text) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: holds half a character .*; fix: "):
        read_config(tmp_path, "config.json")
    (tmp_path / "config.json").write_text('{"a": "\\ud83d\\ude00 \\\\ud800"}')
    assert read_config(tmp_path, "config.json") == {"a": "\U0001f600 \\ud800"}


def test_a_file_that_is_almost_empty_is_not_read(tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 10_000)
    os.truncate(file, 200 << 30)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: only [\d,]+ of its 214,748,364,800 bytes are there; fix: "
    ):
        contained_file(tmp_path, "model.safetensors")


@pytest.mark.parametrize("files", [["config.json"], "config.json", {"../a": "0" * 64}])
def test_files_of_a_base_model_that_are_no_hashes_are_refused(tmp_path, files) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "a").touch()
    (base / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=r"base.*; (refused; )?fix: "):
        base_hash(str(base))


def test_errors_in_a_new_folder_name_the_target(tmp_path) -> None:
    def write_nothing() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            read_config(folder, "config.json")

    with pytest.raises(CheckpointError, match=r"/out/config\.json: missing; fix: "):
        write_nothing()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("I/O error: No space left on device (os error 28)")]
)
def test_full_disk_is_named_and_leaves_no_folder(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mine: not written: No space left"), atomic_folder(tmp_path / "mine"):
        raise error
    assert not list(tmp_path.iterdir())
