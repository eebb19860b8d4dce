"""The table and the plots, from made-up runs against figures worked out by hand."""

import csv
import json
from dataclasses import asdict

import pytest
from matplotlib.image import imread

import report
from recipes import RECIPES
from util.runtime import UserError

CIFAR = {"train_images": 50000, "test_images": 10000, "classes": 100, "image_size": 32}
DIGITS = {"train_images": 1437, "test_images": 360, "classes": 10, "image_size": 8}


def put(folder, job, top1, seed=0, dataset="cifar100", data=CIFAR, epochs=None, **more):
    """Write one run's JSON as a training run does; give its path."""
    recipe = {key: value for key, value in asdict(RECIPES[job]).items() if key != "reference"}
    recipe["epochs"] = epochs or recipe["epochs"]
    run = {
        "job": job,
        "seed": seed,
        "dataset": dataset,
        "data": data,
        "recipe": recipe,
        "teacher_top1": 69.87 if RECIPES[job].distils else None,
        "epochs": [
            {"epoch": e, "train_loss": 4 / e, "train_top1": 100 - 99 / e, "learning_rate": 0.001, "seconds": 1.5}
            for e in range(1, recipe["epochs"] + 1)
        ],
        "test": {"top1": top1, "top5": 85.0, "test_loss": 0.01058444, "mean_ce": 2.7096, "images": data["test_images"]},
        "seconds": 1612.34,
        "images_per_second": 4083.1,
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "device": "a CPU, 2 threads",
        "precision": "bf16",
        "command": "reproduce.py --seeds 0 1 2",
        **more,
    }
    path = folder / f"{job}_seed{seed}.json"
    path.write_text(json.dumps(run))
    return path


def table(folder):
    """The table of RESULTS.md: job -> column -> cell."""
    lines = [line.split("|") for line in report_text(folder).splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line[1:-1]] for line in lines]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def report_text(folder):
    report.write(folder)
    return (folder / "RESULTS.md").read_text()


def test_single_runs(tmp_path):
    for job, top1 in {"distillation_LDH6": 67.32, "student": 59.22, "teacher": 69.87}.items():
        put(tmp_path, job, top1)
    rows = table(tmp_path)
    assert list(rows) == ["teacher", "student", "distillation_LDH6"]  # the order of the recipes, not of the files
    assert rows["distillation_LDH6"] == {
        "job": "distillation_LDH6",
        "top-1": "67.32",
        "top-5": "85.00",
        "Test Loss": "0.01058444",
        "mean CE": "2.7096",
        "epochs": "50",
        "seconds": "1,612.3",
        "images/s": "4,083",
        "gain": "+8.10",
        "reference top-1": "67.32",
        "reference top-5": "89.10",
        "reference Test Loss": "0.00675732",
    }
    assert rows["teacher"]["gain"] == rows["student"]["gain"] == ""


def test_heading(tmp_path):
    put(tmp_path, "student", 59.0)
    put(tmp_path, "teacher", 69.0, device="a GPU", command="train.py --model_job teacher")
    text = report_text(tmp_path)
    assert "cifar100, 50,000 training and 10,000 test images of 32x32 pixels, 100 classes" in text
    assert "- Device: a GPU; a CPU, 2 threads\n" in text
    assert "- Precision: bf16\n" in text
    assert "- Versions: python 3.11.7, torch 2.15.0\n" in text
    assert "    python train.py --model_job teacher\n    python reproduce.py --seeds 0 1 2\n" in text


def test_several_seeds(tmp_path):
    put(tmp_path, "teacher", 70.0)
    for seed, top1 in enumerate([59.0, 60.0, 61.0]):
        put(tmp_path, "student", top1, seed)
    for seed, top1 in enumerate([60.0, 62.0, 64.0]):
        put(tmp_path, "distillation", top1, seed)
    rows = table(tmp_path)
    assert rows["student"]["top-1"] == "60.00 ± 1.00"
    assert rows["distillation"]["top-1"] == "62.00 ± 2.00"
    assert rows["distillation"]["gain"] == "+2.00 ± 1.00"  # of 1, 2, 3; unpaired it would be ± 2.24
    assert [row["seeds"] for row in rows.values()] == ["1", "3", "3"]
    assert rows["teacher"]["top-1"] == "70.00"


def test_gain_only_over_seeds_that_both_have(tmp_path):
    put(tmp_path, "student", 59.0, seed=0)
    put(tmp_path, "student", 10.0, seed=7)
    put(tmp_path, "distillation", 58.5, seed=0)
    put(tmp_path, "distillation", 90.0, seed=1)
    put(tmp_path, "distillation_LDH", 60.0, seed=3)
    rows = table(tmp_path)
    assert rows["distillation"]["gain"] == "-0.50 (seeds in common: 1)"
    assert rows["distillation_LDH"]["gain"] == ""


def test_no_student(tmp_path):
    put(tmp_path, "distillation", 60.0)
    assert table(tmp_path)["distillation"]["gain"] == ""
    assert "The student on hard labels alone did not run" in report_text(tmp_path)


def test_noise(tmp_path):
    put(tmp_path, "student", 50.0)
    rows = report.read(tmp_path)
    assert report.standard_error(rows) == pytest.approx(0.5)  # 100 sqrt(0.5 * 0.5 / 10,000)
    assert report.noise(rows) == pytest.approx(1.41421356)
    text = report_text(tmp_path)
    assert "10,000 test images is 0.50 points" in text and "1.41 points, are noise" in text
    assert "40 batches for 10,000 images, so about mean CE / 250" in text


def test_noise_is_never_nothing(tmp_path):
    put(tmp_path, "student", 100.0)
    assert report.standard_error(report.read(tmp_path)) > 0


@pytest.mark.parametrize(
    ("top1", "words"), [(51.3, "+1.30 points of top-1, not more than"), (51.6, "points of top-1, more than")]
)
def test_findings(tmp_path, top1, words):
    put(tmp_path, "teacher", 99.0)
    put(tmp_path, "student", 50.0)
    put(tmp_path, "distillation_KMJ0", top1)
    put(tmp_path, "distillation_KMJ1", 1.0)
    text = report_text(tmp_path).partition("## What it shows")[2]
    assert f"(3) by mean top-1: distillation_KMJ0, {top1:.2f} %" in text
    assert words in text and "That is one seed" in text and "flatters" in text


def test_findings_where_nothing_gains(tmp_path):
    put(tmp_path, "teacher", 60.0)
    assert report.findings(report.read(tmp_path)) == ["Only the teacher ran: there is nothing to compare it with."]
    put(tmp_path, "student", 50.0)
    assert "No distilled row ran, so there is no gain to tell." in report.findings(report.read(tmp_path))
    put(tmp_path, "distillation", 49.0)
    assert report.findings(report.read(tmp_path))[-1] == "No distilled row is above the student on hard labels alone."


def test_shortened_runs_are_said_to_be(tmp_path):
    put(tmp_path, "student", 50.0)
    assert "Not the reference's" not in report_text(tmp_path)
    put(tmp_path, "distillation", 50.0, epochs=2)
    put(tmp_path, "teacher", 50.0, augment=True, weights="none")
    text = report_text(tmp_path)
    assert "- Not the reference's recipe: distillation ran with epochs 2 instead of 50.\n" in text
    assert "teacher ran with augmented images, a teacher that starts from the weights none instead of imagenet" in text
    assert "do not compare with the reference" in text


def test_digits_are_said_to_be_a_check(tmp_path):
    put(tmp_path, "student", 97.0, dataset="digits", data=DIGITS)
    assert "reference top-1" not in table(tmp_path)["student"]
    assert report_text(tmp_path).splitlines()[0] == "**This is a check of the pipeline, not a result.**"


@pytest.mark.parametrize(
    "data", [{**CIFAR, "train_images": 512}, {**CIFAR, "image_size": 64}, {**CIFAR, "classes": 10}]
)
def test_mixed_data_are_refused(tmp_path, data):
    put(tmp_path, "student", 59.0)
    put(tmp_path, "teacher", 59.0, data=data)
    with pytest.raises(UserError, match="student_seed0.json and .*teacher_seed0.json are of different data"):
        report.write(tmp_path)


def test_mixed_data_sets_are_refused(tmp_path):
    put(tmp_path, "student", 59.0)
    put(tmp_path, "teacher", 59.0, dataset="tiny_imagenet")
    with pytest.raises(UserError, match="different data"):
        report.write(tmp_path)


def test_damaged_results_are_named(tmp_path):
    put(tmp_path, "student", 59.0)
    path = put(tmp_path, "teacher", 59.0)
    whole = path.read_text()
    report.write(tmp_path)
    before = (tmp_path / "RESULTS.md").read_bytes()
    for text in (whole[:-40], "", "[]", whole.replace('"top5"', '"top7"'), whole.replace("85.0", "NaN")):
        path.write_text(text)
        with pytest.raises(UserError, match="teacher_seed0.json is"):
            report.write(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="teacher_seed0.json is damaged"):
        report.write(tmp_path)
    assert (tmp_path / "RESULTS.md").read_bytes() == before


def test_files_that_are_not_what_their_name_says_are_named(tmp_path):
    path = put(tmp_path, "student", 59.0)
    text = path.read_text()
    path.rename(tmp_path / "student_seed0_old.json")
    with pytest.raises(UserError, match="student_seed0_old.json holds student with seed 0"):
        report.write(tmp_path)
    path = path.with_name("student_seed0_old.json")
    path.rename(tmp_path / "gone_seed0.json").write_text(json.dumps({**json.loads(text), "job": "gone"}))
    with pytest.raises(UserError, match="the job gone, which recipes.py does not have"):
        report.write(tmp_path)


def test_no_results(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no results"):
            report.write(folder)


def test_csv(tmp_path):
    put(tmp_path, "distillation_KMJ0", 60.25, seed=10)
    put(tmp_path, "distillation_KMJ0", 60.5, seed=2)
    put(tmp_path, "student", 59.0, device='odd, "quoted"')
    report.write(tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["job"], line["seed"], line["top1"]) for line in lines] == [
        ("student", "0", "59.0"),
        ("distillation_KMJ0", "2", "60.5"),
        ("distillation_KMJ0", "10", "60.25"),
    ]
    assert lines[0]["device"] == 'odd, "quoted"' and lines[0]["teacher_top1"] == "" and lines[0]["soft"] == ""
    assert lines[1] == {
        "job": "distillation_KMJ0", "seed": "2", "dataset": "cifar100", "top1": "60.5", "top5": "85.0",
        "test_loss": "0.01058444", "mean_ce": "2.7096", "epochs": "50", "seconds": "1612.34",
        "images_per_second": "4083.1", "precision": "bf16", "device": "a CPU, 2 threads", "teacher_top1": "69.87",
        "soft": "kd", "alpha": "per epoch", "T": "2.0", "beta": "0.0", "gamma": "0.0", "scheduler_step": "20",
        "learning_rate": "0.001", "batch_size": "256",
    }  # fmt: skip


def test_plots(tmp_path):
    put(tmp_path, "student", 59.0, epochs=1)  # a single run of a single epoch
    written = report.write(tmp_path)
    assert [path.name for path in written] == ["RESULTS.md", "results.csv", "top1.png", "curves.png"]
    few = imread(tmp_path / "top1.png").shape
    for job, row in RECIPES.items():
        for seed in range(2):
            put(tmp_path, job, row.reference.top1 + seed, seed)
    report.write(tmp_path)
    many, curves = imread(tmp_path / "top1.png"), imread(tmp_path / "curves.png")
    assert few[1] == many.shape[1] == curves.shape[1] == 1200
    assert few[0] < many.shape[0] and curves.shape[0] == 900
    assert many.std() > 0.1 and curves.std() > 0.05  # something is drawn
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_curves_are_means_over_seeds():
    runs = [{"epochs": [{"loss": 1.0}, {"loss": 3.0}]}, {"epochs": [{"loss": 2.0}, {"loss": 5.0}]}]
    assert report._mean_curve(runs, "loss") == [1.5, 4.0]
