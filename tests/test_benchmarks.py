"""The benchmarks run to their end; what they measure is not tested here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from losses import LOSSES

ROOT = Path(__file__).parent.parent


def test_what_a_loss_costs(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")  # it writes beside itself
    flags = "--dataset digits --steps 1 --repeats 1 --batch_size 8 --teacher_arch resnet20 --student_arch resnet8x4"
    command = [sys.executable, "benchmarks/loss_cost.py", *flags.split()]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads((tmp_path / "benchmarks" / "loss_cost.json").read_text())
    assert measured["command"] == " ".join(command[1:])
    assert {*measured["ratio"]} >= {*LOSSES} and all(ms > 0 for ms in measured["milliseconds"].values())
    assert f"python {measured['command']}" in (tmp_path / "benchmarks" / "RESULTS.md").read_text()
