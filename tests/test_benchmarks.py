"""The benchmarks run to their end; what they measure is not tested here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def calibration():
    spec = importlib.util.spec_from_file_location("calibration", ROOT / "benchmarks" / "calibration.py")
    module = sys.modules["calibration"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("table", "seeds"),
    [("the thirteen rows", (1,)), ("schedules", (1,)), ("the thirteen rows", (3, 1)), ("benchmark", (2,))],
)
def test_tables_without_differences_seldom_say_that_there_are_any(calibration, table, seeds):
    """The quick form of calibration.py. From one seed nothing is said, and no interval is called one over seeds."""
    found = calibration.calibrate(calibration.Kind(table, seeds, images=2000), 30, 0)
    assert found["wrong"] <= (0.2 if max(seeds) > 1 else 0)
    assert found["covering"] is None if seeds == (1,) else 0.9 < found["covering"] < 0.995


def test_few_images_do_not_make_rows_alike(calibration):
    better = {f"distillation_KMJ{i}": 1.0 for i in range(3)}
    kind = calibration.Kind("the thirteen rows", (3,), claims=True, images=2000, gains=better)
    assert calibration.calibrate(kind, 10, 0)["within"] == 0
