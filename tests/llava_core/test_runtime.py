from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from companion.cli import main
from llava_core import runtime
from llava_core.runtime import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\u001b]0;title\\u0007"),
        ("a\nerror: b\r\x85\u2028c", "a\\nerror: b\\r\\u0085\\u2028c"),
        ("\x9b2J\x7f", "\\u009b2J\\u007f"),
        ("evil\u202egpj.exe \u2066x", "evil\\u202egpj.exe \\u2066x"),
        ("\ud83d half", "\\ud83d half"),
        ("Zürich 日本 🧑‍🚀 “q”\u00a0%", "Zürich 日本 🧑‍🚀 “q”\u00a0%"),
    ],
)
def test_control_characters_are_shown_escaped(text: str, shown: str) -> None:
    assert runtime.printable(text) == shown
    assert str(DataError(text, "fix: b")) == f"{shown}\n  fix: b"


def test_stderr_escapes_all_but_lines_and_progress_bars() -> None:
    with contextlib.redirect_stderr(buffer := io.StringIO()), runtime.printable_stderr():
        sys.stderr.write("a\tb\x1b[31m\rc\n")
        log = logging.getLogger("somebody")
        log.addHandler(handler := logging.StreamHandler())
        log.warning("a %s", "b\nerror: c\x9b")
        log.removeHandler(handler)
        sys.stderr.write(warnings.formatwarning("a\nerror: b", UserWarning, "x.py", 3))
    text = buffer.getvalue()
    assert text == "a\tb\\u001b[31m\\rc\na b\n  error: c\\u009b\nUserWarning: a\\nerror: b\n"
    with contextlib.redirect_stderr(buffer := io.StringIO()), runtime.printable_stderr():
        for _ in tqdm(range(2), desc="x\x1b[2J\nerror: y", file=sys.stderr, ascii=True):
            for _ in tqdm(range(2), desc="inner", file=sys.stderr, position=1, ascii=True):
                pass
    assert "\rx\\u001b[2J\\nerror: y:" in buffer.getvalue()
    assert "\n\rinner" in buffer.getvalue()
    assert "\x1b" not in buffer.getvalue().replace("\x1b[A", "")


def test_atomic_write_replaces_the_file_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    runtime.atomic_write(path, "first, and longer")
    runtime.atomic_write(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = runtime.atomic_write(tmp_path / "file.txt", "old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        runtime.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_atomic_write_keeps_default_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    assert runtime.atomic_write(tmp_path / "file", "x").stat().st_mode == plain.stat().st_mode


def test_json_lines_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b é"}, [1, 2.5, None]]
    assert runtime.read_jsonl(runtime.write_jsonl(tmp_path / "rows.jsonl", rows)) == rows
    assert runtime.read_json(runtime.write_json(tmp_path / "value.json", rows)) == rows


def test_bad_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: invalid JSON"):
        runtime.read_jsonl(path)
    path.write_text('{\n"a": ,\n}')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: invalid JSON"):
        runtime.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        runtime.read_json(path)
    for read in (runtime.read_json, runtime.read_jsonl, runtime.sha256_file):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n  {"a": 1},\n  {"a": 2}\n]\n', "a JSON list, not one value per line; name the file .json"),
        (b'[{"a": 1}, {"a": 2}]', "a JSON list, not one value per line"),
        (b'\xef\xbb\xbf[\n{"a": 1}\n]', "a JSON list, not one value per line"),
        (b'{\n  "a": 1\n}\n{\n  "a": 2\n}\n', "JSON values over several lines; write one per line"),
        (b"PAR1\x15\x04\x15\xffPAR1", "a parquet table, not text"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b"PK\x03\x04\x14", "a zip archive or a spreadsheet"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16 text or binary data; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer; .*git lfs pull"),
        (b"<!DOCTYPE html>\n<html></html>", "a web page"),
        (b"<HTML><body>", "a web page"),
        (b'{"a": 1}\n{"a": \xe9}\n', "not UTF-8 text"),
    ],
)
def test_other_content_is_named_and_no_line_blamed(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl: {message}") as refused:
        runtime.read_jsonl(path)
    assert "line 1" not in str(refused.value)


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')  # two files, one after the other
    assert runtime.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert runtime.read_json(path) == {"a": 1}
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl: several JSON values; name a file of one per line \.jsonl"):
        runtime.read_json(path)


def test_fingerprint_ignores_the_order_of_keys() -> None:
    assert runtime.fingerprint({"a": 1, "b": [1, 2]}) == runtime.fingerprint({"b": [1, 2], "a": 1})
    assert runtime.fingerprint({"a": 1}) != runtime.fingerprint({"a": 2})
    assert len(runtime.fingerprint(None)) == 12


def test_sha256_file_hashes_the_bytes(tmp_path: Path) -> None:
    path = runtime.atomic_write(tmp_path / "x", b"abc")
    assert runtime.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_seeds_repeat_every_generator() -> None:
    import random

    import numpy
    import torch

    draws = []
    for seed in (3, 3, 4):
        runtime.seed_everything(seed)
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_missing_cuda_is_one_error() -> None:
    import torch

    assert runtime.resolve_device("cpu") == torch.device("cpu")
    assert runtime.resolve_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        runtime.resolve_device("gpu")
    with pytest.raises(ConfigError, match="unknown dtype 'bf16'"):
        runtime.resolve_dtype("bf16")
    if not torch.cuda.is_available():
        assert runtime.resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="sees no GPU"):
            runtime.resolve_device("cuda")


def test_rank_and_world_size_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (runtime.rank(), runtime.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (runtime.rank(), runtime.world_size()) == (3, 8)


def test_environment_is_json_and_names_versions() -> None:
    environment = json.loads(json.dumps(runtime.environment()))
    assert environment["packages"]["llava-core"]
    assert environment["packages"]["torch"]
    assert environment["date"].endswith("+00:00")


def test_offline_switch_sets_library_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    runtime.set_offline()
    assert [os.environ[name] for name in names] == ["1", "1", "1"]


def test_environment_hides_progress_bars_that_are_not_hidden_otherwise() -> None:
    code = "from llava_core import runtime; print(runtime.progress([], 'x', disable=False).disable)"
    for value, hidden in (("", b"False"), ("1", b"True")):
        environment = os.environ | {"TQDM_DISABLE": value}
        child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert child.stdout.strip() == hidden, child.stderr


def test_progress_goes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(runtime.progress([1, 2], "counting")) == [1, 2]
    with runtime.progress(2, "counting") as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err


def test_root_can_be_set_by_variable(tmp_path: Path) -> None:
    code = "from llava_core import runtime; print(runtime.resolve('configs'))"
    env = {**os.environ, "LLAVA_ROOT": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(tmp_path.resolve() / "configs")
    assert runtime.display_path(runtime.ROOT / "a" / "b") == str(Path("a", "b"))
    assert runtime.display_path("/elsewhere/b") == "/elsewhere/b"


def test_file_system_without_locks_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("llava_core.runtime.fcntl.flock", refuse)
    with runtime.file_lock(tmp_path / "a", wait=False), runtime.folder_lock(tmp_path, wait=False):
        assert (tmp_path / "a").exists()


def test_half_of_a_character_is_written_as_json_has_it(tmp_path: Path) -> None:
    value = {"a": "car \ud83d", "b": "Z\u00fcrich"}
    assert runtime.read_json(runtime.write_json(tmp_path / "a.json", value)) == value
    assert runtime.read_jsonl(runtime.write_jsonl(tmp_path / "a.jsonl", [value])) == [value]
    assert runtime.fingerprint(value) != runtime.fingerprint({**value, "a": "car"})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named_and_leaves_no_half_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 3}')

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--fix", str(tmp_path / "b.json")]) == 1
    assert f"error: {tmp_path / 'b.json'}: not written: {os.strerror(code)}; free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
