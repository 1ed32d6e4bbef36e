from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_root import make_training_root

from llava_core.config import load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import CheckpointError
from llava_core.train import state as state_module
from llava_core.train.launch import launch
from llava_core.train.processes import free_port
from llava_core.train.state import States

ROOT = Path(state_module.__file__).parents[2]


def tensors(step: int, size: int = 64) -> Iterator[tuple[str, torch.Tensor]]:
    for k in range(3):
        yield f"weights/{k}", torch.full((2, size), step + k / 4)
        yield f"exp_avg/{k}", torch.full((size,), -step + k / 4, dtype=torch.bfloat16)


def save(states: States, step: int, size: int = 64) -> bool:
    return states.save(step, step * 1.5, lambda: tensors(step, size))


def assert_is(state: state_module.State | None, step: int) -> None:
    assert state is not None
    assert (state.step, state.seconds) == (step, step * 1.5)
    assert sorted(state.names) == sorted(name for name, _ in tensors(step))
    for name, tensor in tensors(step):
        assert torch.equal(state.read(name, tensor.shape), tensor)


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> States:
    monkeypatch.setattr(state_module, "FILE_BYTES", 1000)  # several files per state
    return States(tmp_path / "states", 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_two_states_remain(states: States) -> None:
    assert states.newest() is None
    for step in (9, 10, 11):
        assert save(states, step)
    assert names(states.folder) == ["10", "11"]
    assert len(list((states.folder / "11").glob("*.safetensors"))) > 1
    assert_is(states.newest(), 11)
    states.remove()
    assert not states.folder.exists()
    assert states.newest() is None


def test_missing_name_and_other_shape_are_errors(states: States) -> None:
    save(states, 1)
    state = states.newest()
    with pytest.raises(CheckpointError, match=r"states/1: weights/9 is missing; fix: .*--resume never"):
        state.read("weights/9", (2, 64))
    with pytest.raises(CheckpointError, match=r"weights/0 has shape \(2, 64\), not \(64, 2\)"):
        state.read("weights/0", (64, 2))


def test_one_flipped_bit_is_found(states: States, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save(states, step)
    draw = random.Random(0)
    for path in sorted((states.folder / "2").iterdir()):
        content = path.read_bytes()
        for position in draw.sample(range(8 * len(content)), 150):
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            assert_is(states.newest(), 1)
            assert f"states/2/{path.name}" in capsys.readouterr().err
        path.write_bytes(content)
    assert_is(states.newest(), 2)


@pytest.mark.parametrize("damage", ["empty", "cut", "missing", "renamed"])
@pytest.mark.parametrize("name", ["manifest.json", "000-00000.safetensors"])
def test_damaged_state_is_named_and_skipped(
    states: States, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    for step in (1, 2):
        save(states, step)
    path = states.folder / "2" / name
    if damage == "missing":
        path.unlink()
    elif damage == "renamed":
        path.parent.rename(path.parent.with_name("3"))
        name = "manifest.json"
    else:
        path.write_bytes(path.read_bytes()[: -2 if damage == "cut" else 0])
    assert_is(states.newest(), 1)
    assert f"states/{3 if damage == 'renamed' else 2}/{name}" in (error := capsys.readouterr().err)
    assert "using step 1" in error
    assert save(states, 2)  # the resumed run reaches the step of the damaged state again
    assert names(states.folder) == ["1", "2"]
    assert_is(states.newest(), 2)


def test_all_states_damaged_is_an_error(states: States) -> None:
    for step in (1, 2):
        save(states, step)
        (states.folder / str(step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"states/2/manifest.json.*states/1/manifest.json.*--resume never"):
        states.newest()
    assert names(states.folder) == ["1", "2"]


def test_second_save_of_a_step_keeps_the_first(states: States, monkeypatch: pytest.MonkeyPatch) -> None:
    save(states, 1)
    monkeypatch.setattr(state_module, "_write_files", None)
    assert save(states, 1)


def test_unfinished_folder_is_removed_at_start(states: States) -> None:
    save(states, 1)
    shutil.copytree(states.folder / "1", states.folder / "2.writing")
    assert_is(states.newest(), 1)
    assert names(states.folder) == ["1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs Linux and root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("kib", "saved", "left"), [(200, [True, False, False], [1]), (120, [True, True, True], [2, 3])]
)
def test_full_disk_loses_nothing(
    small_disk: Path, capsys: pytest.CaptureFixture[str], kib: int, saved: list[bool], left: list[int]
) -> None:
    """Room for 1.5 states: the first one stays. Room for 2.5: the oldest makes room if a newer one is valid."""
    states, size = States(small_disk / "states", 3), kib * 1024 // 30  # 30 bytes for each of the `size`
    assert [save(states, step, size) for step in (1, 2, 3)] == saved
    assert names(states.folder) == [str(step) for step in left]
    assert states.newest().step == left[-1]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == saved.count(False)
    assert all("No space left" in line and "the run goes on" in line for line in errors)


def test_full_disk_leaves_out_metrics_rows(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord(small_disk)
    record.log({"step": 1})
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 290 * 1024)
    for step in range(2, 9):
        record.log({"step": step, "text": "x" * 3000})  # the first that does not fit is a short write
    filler.unlink()
    record.log({"step": 9})
    steps = [row["step"] for row in record.metrics()]
    assert steps[0] == 1
    assert steps[-1] == 9
    assert 2 < len(steps) < 9
    assert len(capsys.readouterr().err.splitlines()) == 1  # one warning, no damaged line


@pytest.mark.slow
def test_run_ends_on_a_disk_of_one_and_a_half_states(
    small_disk: Path, workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_training_root(workspace)
    overrides = {"train.epochs": 2, "train.global_batch": 8, "train.max_length": 96, "train.learning_rate": 1e-3}
    config = load_experiment("finetune", "mini", overrides)
    undisturbed = launch(config)
    state = 12 * undisturbed.summary["trainable_parameters"]  # bytes: a weight and two moments in fp32
    undisturbed.path.rename(workspace / "kept")
    subprocess.run(["mount", "-o", f"remount,size={state * 3 // 2}", str(small_disk)], check=True)
    undisturbed.path.symlink_to(small_disk)
    capfd.readouterr()
    record = launch(config)
    assert capfd.readouterr().err.count("the state was not saved") == 4  # of step 1 it was, and the run goes on
    assert record.summary["final_loss"] == RunRecord(workspace / "kept").summary["final_loss"]
    files = [path.relative_to(record.checkpoint) for path in record.checkpoint.rglob("*.safetensors")]
    assert files
    for file in files:
        assert (record.checkpoint / file).read_bytes() == (workspace / "kept" / "checkpoint" / file).read_bytes()


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import test_state
from llava_core.train.state import States

states, draw, inside, last = States(Path(sys.argv[1]), 2), random.Random(1), 0, 0
test_state.save(states, 1)
for _ in range(24):
    start = states.newest().step
    test_state.assert_is(states.newest(), start)
    assert start >= last, (start, last)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        began = time.monotonic()
        for step in range(start + 1, 10**6):
            assert test_state.save(states, step)
            os.write(write, b"%d %f " % (step, time.monotonic() - began))
    first = os.read(read, 65536)
    time.sleep(draw.uniform(0, 2 * float(first.split()[1])))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(write)
    last = max(map(int, (first + os.fdopen(read, "rb").read()).split()[::2]))
    inside += any(states.folder.glob("*.writing"))
print(last, inside)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_inside_save_leaves_a_valid_state(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "states")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{Path(__file__).parent}"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    last, inside = map(int, answer.stdout.split())
    assert last > 24
    assert inside > 5


RANK = """
import errno, sys
from pathlib import Path
from torch import distributed as dist
import test_state
from llava_core.train import state

dist.init_process_group("gloo")
states, saved = state.States(Path(sys.argv[1]), 2), [True]
test_state.assert_is(states.newest(), 1)  # written by one process
saved = [test_state.save(states, 2)]
if dist.get_rank() == 1:  # the second file of one rank does not fit
    real, state.FILE_BYTES = state.save_file, 1
    def save_file(tensors, path):
        if "00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)
    state.save_file = save_file
saved.append(test_state.save(states, 3))
print(saved, states.newest().step)
"""


@pytest.mark.slow
def test_two_ranks_agree_and_one_process_reads_their_state(states: States) -> None:
    save(states, 1)
    port = str(free_port())
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{Path(__file__).parent}"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    command = [sys.executable, "-c", textwrap.dedent(RANK), str(states.folder)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(k)}, stdout=-1, stderr=-1, text=True) for k in (0, 1)
    ]
    output = [process.communicate(timeout=60) for process in ranks]
    assert [out for out, _ in output] == ["[True, False] 2\n"] * 2, output
    assert "No space left" in output[0][1]
    assert names(states.folder) == ["2"]  # the oldest made room once
    assert len(list(states.folder.glob("2/001-*"))) == 1
    assert_is(states.newest(), 2)
