"""A run that is killed with -9 at a random moment and started again has the rows and weights of an undisturbed one."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_root import make_training_root

from llava_core import runtime
from llava_core.record import RunRecord

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TIMES = {"tflops", "tokens_per_s", "samples_per_s", "data_wait", "seconds"}
SETTINGS = {"train.epochs": 2, "train.global_batch": 8, "train.max_length": 96, "train.learning_rate": 1e-3}
LORA = {"train.adapters": {"r": 4, "alpha": 8, "dropout": 0.1}}
TWO = {"scale.parallel.kind": "fsdp2", "scale.parallel.processes": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 1": ("pretrain", {}),
    "stage 2": ("finetune", {}),
    "LoRA": ("finetune", LORA),
    "stage 1, two ranks": ("pretrain", TWO),
    "stage 2, two ranks": ("finetune", TWO),
    "LoRA, two ranks": ("finetune", LORA | TWO),
}
MOMENTS = [  # 21, of which the suite without -m slow takes every 5th
    *((kind, moment, seed) for kind in list(RUNS)[:3] for moment in ("any", "save") for seed in (1, 2)),
    *((kind, moment, 1) for kind in list(RUNS)[3:] for moment in ("any", "save")),
    ("stage 2, two ranks", "any", 2), ("LoRA, two ranks", "save", 2), ("stage 2, two ranks", "one goes on", 1),
]  # fmt: skip
# Has imported everything; starts the run of each line of its input in a process, kills it if told so, and awaits it.
STARTER = """
import json, os, signal, sys, traceback
import transformers.models.clip.modeling_clip, transformers.models.llama.modeling_llama
from llava_core.config import load_experiment
from llava_core.train import launch, trainer
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries print
for line in sys.stdin:
    if (child := os.fork()) == 0:
        try:
            name, overrides = json.loads(line)
            launch.launch(load_experiment(name, "mini", overrides))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, file=answers, flush=True)
    if "kill" in sys.stdin.readline():
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
"""


class Starter:
    """Starts runs in a root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = os.environ | {"LLAVA_ROOT": str(root), "PYTHONPATH": str(runtime.ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER], cwd=root, env=environment, stdin=-1, stdout=-1, text=True
        )

    def _say(self, text: str) -> int:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, kind: str, kill_after: Callable[[], None] | None = None) -> int:
        """Run to the end, or kill the run when `kill_after` returns; the process's status, which is 0 at the end."""
        name, overrides = RUNS[kind]
        self._say(json.dumps([name, SETTINGS | overrides]))
        if kill_after is None:
            return self._say("wait")
        try:
            kill_after()
        finally:
            status = self._say("kill")
        return status

    @functools.cache  # noqa: B019
    def undisturbed(self, kind: str) -> RunRecord:
        """The record of a run that nothing disturbs."""
        self.forget()
        assert self.run(kind) == 0
        (record,) = self.records()
        record.path.rename(kept := self.root / f"{kind}, undisturbed")
        return RunRecord(kept)

    def records(self) -> list[RunRecord]:
        """All except those that another run starts from."""
        records = [RunRecord(path.parent) for path in self.root.glob("runs/*/mini/*/config.yaml")]
        return [record for record in records if record.config.experiment.train.global_batch == 8]

    def forget(self) -> None:
        for record in self.records():
            shutil.rmtree(record.path)

    def processes(self) -> list[str]:
        """Command lines of the ranks that train in this root."""
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.append(path.read_text().replace("\0", " "))
            except OSError:
                continue  # it has ended
        return [c for c in commands if str(self.root / "runs") in c]


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    root = tmp_path_factory.mktemp("root")
    (root / "configs").symlink_to(runtime.ROOT / "configs")
    make_training_root(root)
    starter = Starter(root)
    yield starter
    starter.process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("kind", "moment", "seed"),
    [pytest.param(*m, marks=[pytest.mark.slow] if k % 5 else []) for k, m in enumerate(MOMENTS)],
)
def test_killed_run_resumes_to_the_same_weights(starter: Starter, kind: str, moment: str, seed: int) -> None:
    expected = starter.undisturbed(kind)
    starter.forget()
    steps, step_s = expected.summary["steps"], expected.summary["seconds"] / expected.summary["steps"]
    record = RunRecord(starter.root / "runs" / RUNS[kind][0] / "mini" / expected.environment["run"])
    draw = random.Random(f"{kind} {moment} {seed}")
    step = draw.randint(1, steps - 1) if moment == "save" else draw.randint(0, steps if moment == "any" else steps - 1)

    def reached() -> bool:
        if moment == "save":  # a small state may be complete before anybody sees `<step>.writing`
            return any(int(path.stem) >= step for path in (record.path / "states").glob("[0-9]*"))
        return any(row["step"] == step for row in record.metrics())

    def wait() -> None:
        end = time.monotonic() + 300
        while not reached():
            assert time.monotonic() < end
        time.sleep(draw.uniform(0, 0.005 if moment == "save" else step_s))

    assert starter.run(kind, wait) == 9 or (moment, step) == ("any", steps)
    end = time.monotonic() + 5
    while left := starter.processes():
        assert time.monotonic() < end, left
        time.sleep(0.05)

    assert starter.run("stage 2" if moment == "one goes on" else kind) == 0
    exact, rtol = "two" not in kind, 1e-5 if moment == "one goes on" else 1e-6
    # killed before its first state, a run begins again and says so with the ranks that it has now
    left_out = {*TIMES, *(["global_batch"] if moment == "one goes on" else [])}
    rows, others = (
        [{k: v for k, v in row.items() if k not in left_out} for row in x.metrics()] for x in (expected, record)
    )
    assert [r["step"] for r in others] == [r["step"] for r in rows]
    for row, other in zip(rows, others, strict=True):
        assert other == {
            k: pytest.approx(v, rel=0 if exact else rtol) if isinstance(v, float) else v for k, v in row.items()
        }
    files, resumed = ({p.relative_to(x.checkpoint): p for p in x.checkpoint.rglob("*.*")} for x in (expected, record))
    assert files.keys() == resumed.keys()
    for name, path in files.items():
        if exact:
            assert path.read_bytes() == resumed[name].read_bytes(), name
        elif path.suffix == ".safetensors":
            torch.testing.assert_close(load_file(path), load_file(resumed[name]), rtol=rtol, atol=1e-7)
    assert not (record.path / "states").exists()
