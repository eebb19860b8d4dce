"""The whole comparison: all rows, going on, seeds, and what must not be mixed."""

import csv
import json
import shutil

import pytest
import torch.nn.functional as F
from as_processes import thin
from test_scripts import refused, stopped_at_a_save

import losses
from losses import Loss
from recipes import RECIPES, Recipe

SHORT = ["--weights", "none", "--epochs", 1, "--batch_size", 20]


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "checkpoints" / "folder", tmp_path / "results" / "folder"


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def test_all_rows_and_again(script, small, folders, monkeypatch):
    thin(monkeypatch.setattr)
    weights, results = folders
    ran = script("reproduce.py", *small, *SHORT)
    assert ran.code == 0, ran.err
    assert {path.stem for path in weights.glob("*.pth")} == {row.checkpoint for row in RECIPES.values()}
    assert {path.name for path in results.iterdir()} == {
        *(f"{job}_seed0.{kind}" for job in RECIPES for kind in ("json", "csv")),
        *("RESULTS.md", "results.csv", "top1.png", "curves.png"),
    }
    with open(results / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == list(RECIPES)
    assert [int(row["epochs"]) for row in rows] == [2] + [1] * 12
    for row in rows:
        result = json.loads((results / f"{row['job']}_seed0.json").read_text())
        assert float(row["top1"]) == pytest.approx(result["test"]["top1"])

    # What is finished is left as it is; what is missing is made again, just as it was.
    before = times(weights)
    lost = results / "distillation_LDH2_seed0.json"
    result = json.loads(lost.read_text())
    lost.unlink()
    (weights / "Distilled_resnet18_KMJ1.pth").write_bytes(b"damaged")
    ran = script("reproduce.py", *small, *SHORT)
    assert ran.code == 0 and ran.err.count("finished already") == 11
    changed = {name for name, time in times(weights).items() if time != before[name]}
    assert changed == {"Distilled_resnet18_LDH2.pth", "Distilled_resnet18_KMJ1.pth"}
    again = json.loads(lost.read_text())
    assert again["test"] == result["test"] and again["checkpoint_sha256"] == result["checkpoint_sha256"]

    # Other settings are not mixed into the table.
    before = times(weights), times(results)
    ran = script("reproduce.py", *small, *SHORT, "--epochs", 2, "--jobs", "student")
    assert ran.code == 2 and "student_seed0.json comes from other settings (recipe.epochs: 1 there, 2 now)" in ran.err
    assert times(weights) == before[0]


def test_rows_are_the_scripts_runs(script, small, folders, small_teacher):
    """A row of the comparison is what its own command gives."""
    weights, results = folders
    weights.mkdir(parents=True)
    shutil.copy(small_teacher, weights / "resnet50.pth")
    jobs = ["student", "distillation_LDH9"]
    assert script("reproduce.py", *small, "--epochs", 2, "--jobs", *jobs).code == 0
    hashes = [json.loads((results / f"{job}_seed0.json").read_text())["checkpoint_sha256"] for job in jobs]
    flags = ["--epochs", 2, "--scheduler_step", 1]
    assert script("train.py", "--model_job", "student", *small, *flags).code == 0
    assert script("train_distillation.py", "--model_job", "distillation_LDH9", *small, *flags).code == 0
    again = [json.loads((results / f"{job}_seed0.json").read_text())["checkpoint_sha256"] for job in jobs]
    assert again == hashes


def test_seeds(script, small, folders, small_teacher):
    weights, results = folders
    weights.mkdir(parents=True)
    shutil.copy(small_teacher, weights / "resnet50.pth")
    args = ["--jobs", "student", "distillation", "--seeds", 0, 2, "--epochs", 1]
    assert script("reproduce.py", *small, *args).code == 0
    names = ["Distilled_resnet18.pth", "resnet18.pth"]
    assert sorted(path.name for path in (weights / "seed2").iterdir()) == names
    assert (weights / "resnet18.pth").read_bytes() != (weights / "seed2" / "resnet18.pth").read_bytes()
    assert "±" in (results / "RESULTS.md").read_text()


def test_a_mistake_is_told_in_a_line_and_changes_no_table(script, small, folders, small_teacher):
    _, results = folders
    assert script("reproduce.py", *small, *SHORT, "--jobs", "student").code == 0
    (results / "RESULTS.md").write_text("as it was")
    ran = script("reproduce.py", *small, *SHORT, "--jobs", "student", "distillation")  # no teacher is there
    assert ran.code == 2 and (results / "RESULTS.md").read_text() == "as it was"
    assert len([line for line in ran.err.splitlines() if "wrote" in line]) == 0
    given = ["--teacher", small_teacher, "--jobs", "student"]
    for flags, words in [
        (["--teacher_epochs", 2], "--teacher_epochs"),
        (["--teacher_augment"], "--teacher_augment"),
        (["--weights", "none"], "--weights"),
    ]:
        refused(script("reproduce.py", *small, *given, *flags), words, "no teacher is trained")
    refused(
        script("reproduce.py", *small, "--teacher", "nofile.pth", "--jobs", "student"), "there is no file nofile.pth"
    )


def test_a_state_of_other_settings_is_told_of_without_flags_that_are_not_there(script, small, folders):
    weights, _ = folders
    with stopped_at_a_save():
        assert script("reproduce.py", *small, *SHORT, "--jobs", "student", "--epochs", 3).code == 130
    state = (weights / "resnet18.state").read_bytes()
    ran = script("reproduce.py", *small, *SHORT, "--jobs", "student", "--epochs", 3, "--learning_rate", 0.1)
    assert ran.code == 2 and "recipe.learning_rate" in ran.err and "give the same, or move it away" in ran.err
    assert "--overwrite" not in ran.err and (weights / "resnet18.state").read_bytes() == state


def test_the_gain_of_another_network_is_over_its_own_student(script, small, folders, small_teacher):
    flags = [*small, "--student_arch", "resnet20", "--teacher", small_teacher, "--training", "strong", "--epochs", 1]
    assert script("reproduce.py", *flags, "--jobs", "student", "distillation").code == 0
    text = (folders[1] / "RESULTS.md").read_text()
    assert "| student_resnet20_strong |" in text and "did not run" not in text


def test_a_teacher_from_elsewhere_is_not_overwritten(script, small, folders, small_teacher):
    weights, results = folders
    weights.mkdir(parents=True)
    shutil.copy(small_teacher, weights / "resnet50.pth")
    ran = script("reproduce.py", *small, *SHORT)
    assert ran.code == 2 and "resnet50.pth is there" in ran.err and "--jobs student distillation" in ran.err
    assert (weights / "resnet50.pth").read_bytes() == small_teacher.read_bytes()


def test_students_of_another_teacher_are_not_mixed(script, small, folders, small_teacher, tmp_path):
    weights, _ = folders
    weights.mkdir(parents=True)
    shutil.copy(small_teacher, weights / "resnet50.pth")
    args = [*small, "--jobs", "distillation", "--epochs", 1]
    assert script("reproduce.py", *args).code == 0
    other = tmp_path / "other"
    assert script("train.py", "--model_job", "teacher", *small, *SHORT, "--checkpoint_dir", other).code == 0
    shutil.copy(other / "resnet50.pth", weights / "resnet50.pth")
    ran = script("reproduce.py", *args)
    assert ran.code == 2 and "comes from other settings (teacher.sha256" in ran.err


def test_distilling_needs_a_teacher(script, small):
    """Told before anything is trained."""
    ran = script("reproduce.py", *small, "--jobs", "student", "distillation")
    assert "Epoch" not in ran.out
    refused(ran, "resnet50.pth does not exist", "train.py --model_job teacher")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--jobs", "nonsense"], ["nonsense", "distillation_LDH10"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--epochs", "0"], ["--epochs"]),
    ],
)
def test_bad_flags(script, flags, words):
    refused(script("reproduce.py", *flags), *words)


def test_one_more_row_with_one_more_loss(script, small, folders, small_teacher, monkeypatch):
    """As the README says: a row and a function, and nothing else."""

    def logit_mse(student, teacher, labels):
        return F.mse_loss(student.logits, teacher.logits)

    row = Recipe("distillation_more", "Distilled_resnet18_more", "student", 50, 20, soft="logit_mse", alpha=0.5)
    monkeypatch.setitem(losses.LOSSES, "logit_mse", Loss(logit_mse))
    monkeypatch.setitem(RECIPES, row.job, row)
    weights, results = folders
    weights.mkdir(parents=True)
    shutil.copy(small_teacher, weights / "resnet50.pth")
    assert script("reproduce.py", *small, "--epochs", 1, "--jobs", "student", row.job).code == 0
    assert f"| {row.job} |" in (results / "RESULTS.md").read_text()
    figures = json.loads((results / f"{row.job}_seed0.json").read_text())["epochs"][0]
    expected = 0.5 * figures["ce"] + 0.5 * figures["logit_mse"]
    assert figures["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_shrink_in_proportion(script):
    import argparse

    from reproduce import scaled

    def shape(job, **flags):
        nothing = {"epochs": None, "scheduler_step": None, "learning_rate": None, "batch_size": None}
        nothing["training"] = "reference"
        row = scaled(RECIPES[job], argparse.Namespace(**{**nothing, **flags}))
        return row.epochs, row.scheduler_step

    assert shape("teacher") == (100, 25) and shape("distillation_KMJ1") == (60, 20)
    assert shape("teacher", epochs=10) == (20, 5) and shape("student", epochs=10) == (10, 4)
    assert shape("distillation_KMJ1", epochs=10) == (12, 4)
    assert shape("teacher", epochs=100, scheduler_step=4) == (200, 5)
    assert shape("student", epochs=1) == (1, 1)


def test_epochs_of_the_teacher_alone(script, small, tmp_path):
    flags = [
        "--weights",
        "none",
        "--batch_size",
        10,
        "--epochs",
        1,
        "--teacher_epochs",
        3,
        "--jobs",
        "teacher",
        "student",
    ]
    assert script("reproduce.py", *small, *flags).code == 0
    results = tmp_path / "results" / "folder"
    epochs = {
        job: len(json.loads((results / f"{job}_seed0.json").read_text())["epochs"]) for job in ("teacher", "student")
    }
    assert epochs == {"teacher": 3, "student": 1}
