"""What --tensorboard writes, as TensorBoard itself reads it."""

import json
import sys
import threading
from pathlib import Path

import pytest
from as_processes import thin
from test_scripts import refused

import checkpoint
import jobs
import models
import report
from recipes import RECIPES
from util import files, scalars
from util.processes import Processes
from util.runtime import Runtime, UserError
from util.scalars import Scalars

loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason="needs tensorboard")
STUDENT = ["--model_job", "student", "--tensorboard", "--batch_size", 20]


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch):
    thin(monkeypatch.setattr)


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of each name, every point that is in the folder's files, in their order."""
    found = {}
    for path in sorted(folder.iterdir()):
        for event in loader.LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def steps(folder):
    return [step for step, _ in points(folder)["loss"]]


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results" / "folder"


def test_every_figure_is_under_its_name(script, small, results, tmp_path):
    checkpoint.save(models.build("teacher", 4), tmp_path / "teacher.pth")
    flags = ["--teacher", tmp_path / "teacher.pth", "--epochs", 2, "--val_fraction", 0.2, "--tensorboard", "--seed", 3]
    ran = script("train_distillation.py", "--model_job", "distillation_LDH", *flags, *small)
    assert ran.code == 0, ran.err
    assert "tensor" not in ran.err.lower() and "warn" not in ran.err.lower(), (
        ran.err
    )  # none of the packages' own remarks
    result = json.loads((results / "distillation_LDH_seed3.json").read_text())
    expected = {}
    for figures in result["epochs"]:
        figures = {"loss": figures.pop("train_loss"), **figures}
        step = figures.pop("epoch")
        figures["images_per_second"] = result["data"]["train_images"] / figures.pop("seconds")
        for name, value in figures.items():
            expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    test = {f"test_{name.removeprefix('test_')}": result["test"][name] for name in ("top1", "top5", "test_loss")}
    expected |= {name: [(2, pytest.approx(value, rel=1e-6))] for name, value in test.items()}
    assert points(results / "tensorboard" / "distillation_LDH_seed3") == expected
    terms = {"loss", "ce", "kd", "mse", "train_top1", "val_loss", "val_top1", "alpha", "learning_rate"}
    assert terms | {"images_per_second"} <= expected.keys()


def test_a_run_that_goes_on_has_each_point_once(script, small, results, monkeypatch):
    say = jobs.say

    def hang_up(line):
        if line.startswith("epoch 2/3"):
            raise KeyboardInterrupt
        say(line)

    folder = results / "tensorboard" / "student_seed0"
    monkeypatch.setattr(jobs, "say", hang_up)
    assert script("train.py", *STUDENT, "--epochs", 3, *small).code == 130
    assert steps(folder) == [1]
    monkeypatch.setattr(jobs, "say", say)
    assert script("train.py", *STUDENT, "--epochs", 3, "--resume", *small).code == 0
    assert steps(folder) == [1, 2, 3]
    assert script("train.py", *STUDENT, "--epochs", 4, "--resume", *small).code == 0  # more epochs of a finished one
    found = points(folder)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["test_top1"]] == [4]
    mine = folder / "mine.txt"
    mine.write_text("")
    assert script("train.py", *STUDENT, "--epochs", 1, "--overwrite", *small).code == 0
    mine.unlink()
    assert steps(folder) == [1]


def test_a_finished_run_is_shown_too(script, small, results, monkeypatch):
    monkeypatch.setattr(report, "try_write", lambda folder: [])
    without = [flag for flag in STUDENT if flag != "--tensorboard"]
    assert script("train.py", *without, "--epochs", 1, *small).code == 0
    assert not (results / "tensorboard").exists()
    ran = script("train.py", *STUDENT, "--epochs", 1, *small)
    assert "finished already" in ran.err and steps(results / "tensorboard" / "student_seed0") == [1]
    expected = points(results / "tensorboard" / "student_seed0")
    (folder,) = (results / "tensorboard").iterdir()
    for path in folder.iterdir():
        path.unlink()
    flags = ["--jobs", "student", "--epochs", 1, "--batch_size", 20, "--tensorboard"]
    ran = script("reproduce.py", *flags, "--scheduler_step", RECIPES["student"].scheduler_step, *small)
    assert "finished already" in ran.err and points(folder) == expected


def test_an_older_result_without_seconds():
    older = {"epoch": 1, "train_loss": 2.0, "train_top1": 50.0}
    assert jobs._of_epoch(older, 10) == {"loss": 2.0, "train_top1": 50.0}


@pytest.mark.parametrize("name", ["train.py", "reproduce.py"])
def test_a_missing_package_is_told_of_before_any_training(script, small, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = STUDENT if name == "train.py" else ["--jobs", "student", "--tensorboard"]
    ran = script(name, *flags, "--epochs", 1, *small)
    refused(ran, "--tensorboard needs the package tensorboard; pip install tensorboard")
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_writes(digits, tmp_path):
    there = jobs.Paths(tmp_path / "a.pth", tmp_path / "a.state", tmp_path / "a.json")
    for rank in (1, 0):
        runtime = Runtime("cpu", "fp32", Processes(rank, 2))
        given = jobs._scalars(there, jobs.Setup(digits, runtime, tmp_path, tmp_path, tensorboard=True))
        given.add(1, {"loss": 1.0})
        given.close()
        assert there.scalars.exists() == (rank == 0)
    assert points(there.scalars) == {"loss": [(1, 1.0)]}


def test_a_tensorboard_that_is_open_forgets_what_was_there(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = Scalars(tmp_path)
    for step in (1, 2, 3):
        first.add(step, {"loss": step})
    reader = accumulator.EventAccumulator(str(tmp_path))
    assert [event.step for event in reader.Reload().Scalars("loss")] == [1, 2, 3]
    first.close()
    again = Scalars(tmp_path)
    again.add(1, {"loss": 7.0})
    assert [(event.step, event.value) for event in reader.Reload().Scalars("loss")] == [(1, 7.0)]
    again.close()
    Scalars(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 2  # the last one's, and an empty one


def test_a_full_disk_costs_a_line(tmp_path, monkeypatch, capfd):
    threads = threading.active_count()
    given = Scalars(tmp_path)

    def full(folder, flag):
        raise UserError(f"cannot write to {folder}: No space left on device")

    monkeypatch.setattr(files, "ensure_writable", full)
    for step in (1, 2):
        given.add(step, {"loss": 1.0})
    assert threading.active_count() == threads  # the writer's own would complain after 120 s, of a folder that is gone
    given.close()
    assert capfd.readouterr().err.count("going on without figures for TensorBoard: cannot write to") == 1
    with pytest.raises(UserError, match="cannot write"):
        scalars.Scalars(tmp_path)
