"""A few cases of the fuzzer, the same in each run; `make fuzz` runs as many as there is time for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llava_core.runtime import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the fuzzer's limits are Linux's")
def test_damaged_inputs_are_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "12", "--seconds", "120"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
