"""The table and the plots, from made-up runs against figures worked out by hand."""

import ast
import base64
import csv
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib.image import imread
from matplotlib.text import Text

import report
from recipes import RECIPES, described, under
from report import findings, plots, results, side_by_side, statistics, table
from report.results import Result
from util.runtime import UserError

ROOT = Path(__file__).resolve().parent.parent
CIFAR = {"train_images": 50000, "test_images": 10000, "classes": 100, "image_size": 32}
DIGITS = {"train_images": 1500, "test_images": 297, "classes": 10, "image_size": 8}
TEN = {"train_images": 90, "test_images": 10, "classes": 2, "image_size": 8, "test_fingerprint": "ten"}

STUDENT, KD, LDH6 = "student", "distillation", "distillation_LDH6"


def put(folder, job, top1, seed=0, dataset="cifar100", data=CIFAR, epochs=None, recipe=(), val=(), right=None, **more):
    """Write one run's JSON as a training run does; give its path. right: of each test image, whether it was right."""
    values = {**(described(RECIPES[job]) if job in RECIPES else {}), **dict(recipe)}
    values["epochs"] = epochs or values["epochs"]
    test = {
        "top1": top1,
        "top5": max(85.0, top1 or 0.0),
        "test_loss": 0.01058444,
        "mean_ce": 2.7096,
        "images": data["test_images"],
    }
    if right is not None:
        top1 = 100 * np.mean(right)
        test |= {"top1": top1, "top5": max(85.0, top1), "correct": base64.b64encode(np.packbits(right)).decode()}
    run = {
        "job": job,
        "name": job,
        "seed": seed,
        "dataset": dataset,
        "data": data,
        "augment": False,
        "recipe": values,
        "weights": None,
        "teacher": {"sha256": "ab"} if values["soft"] else None,
        "teacher_top1": 69.87 if values["soft"] else None,
        "epochs": [
            {
                "epoch": e,
                "train_loss": 4 / e,
                "train_loss_over_batches": 4.1 / e,
                "train_top1": 100 - 99 / e,
                "alpha": 0.7,
                "learning_rate": 0.001,
                "seconds": 1.5,
                **dict(val),
            }
            for e in range(1, values["epochs"] + 1)
        ],
        "test": test,
        "seconds": 1612.34,
        "images_per_second": 4083.1,
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "device": "a CPU, 2 threads",
        "precision": "bf16",
        "command": "reproduce.py --seeds 0 1 2",
        **more,
    }
    path = folder / f"{run['name']}_seed{seed}.json"
    path.write_text(json.dumps(run))
    return path


def put_images(folder, job, right, seed=0, **more):
    """One run on as many images as `right` has marks: "x" for each that was right, in order."""
    marks = np.array([mark == "x" for mark in right])
    data = {**TEN, "test_images": len(marks)}
    return put(folder, job, None, seed, dataset="folder", data=data, right=marks, **more)


def rows_of(folder):
    """The table of RESULTS.md: job -> column -> cell."""
    return rows_of_text(report_text(folder))


def rows_of_text(text):
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line[1:-1]] for line in lines]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def report_text(folder, **options):
    return table.markdown(results.read(folder), **options)


# The table


def test_single_runs(tmp_path):
    for job, top1 in {LDH6: 67.32, STUDENT: 59.22, "teacher": 69.87}.items():
        put(tmp_path, job, top1)
    rows = rows_of(tmp_path)
    assert list(rows) == ["teacher", STUDENT, LDH6]  # the order of the recipes, not of the files
    assert rows[LDH6] == {
        "job": LDH6,
        "top-1": "67.32",
        "top-5": "85.00",
        "Test Loss": "0.01058444",
        "mean CE": "2.7096",
        "epochs": "50",
        "gain": "+8.10",
        "reference top-1": "67.32",
        "reference top-5": "89.10",
        "reference Test Loss": "0.00675732",
    }
    assert rows["teacher"]["gain"] == rows[STUDENT]["gain"] == ""
    assert f"No test against the student: {LDH6}; results must tell" in report_text(tmp_path)


def test_heading(tmp_path):
    put(tmp_path, STUDENT, 59.0)
    put(tmp_path, "teacher", 69.0, device="a GPU", command="train.py --model_job teacher")
    for job, seed in ((KD, 0), (LDH6, 0), (LDH6, 1)):
        put(tmp_path, job, 60.0, seed, command=f"reproduce.py --epochs 9 --jobs {job} --seeds {seed}")
    text = report_text(tmp_path)
    assert "cifar100, 50,000 training and 10,000 test images of 32x32 pixels, 100 classes" in text
    assert "- Device: a GPU; a CPU, 2 threads (an older result tells only the device on which its run ended)\n" in text
    assert "- Precision: bf16\n" in text
    assert "- Versions: python 3.11.7, torch 2.15.0\n" in text
    assert "    python train.py --model_job teacher\n    python reproduce.py --seeds 0 1 2\n" in text
    assert f"    python reproduce.py --epochs 9 --jobs {KD} {LDH6} --seeds 0\n" in text
    assert f"    python reproduce.py --epochs 9 --jobs {LDH6} --seeds 1\n" in text


def stretch(start, end, device, **more):
    return {"from_epoch": start, "from_batch": 0, "to_epoch": end, "to_batch": 0, "device": device, **more}


def test_the_heading_has_all_stretches(tmp_path):
    parts = [
        stretch(0, 30, "one", commit="a" * 40, changed=False),
        stretch(30, 40, "one", commit="b" * 40, changed=True),
    ]
    parts.append(stretch(40, 50, "another", commit=None, changed=None))
    put(tmp_path, STUDENT, 59.0, device="another", stretches=parts)
    text = report_text(tmp_path)
    assert "- Device: one, from epoch 41 on another\n" in text
    assert "- Code: aaaaaaa; bbbbbbb and changes\n" in text


def test_no_table_has_seconds(tmp_path):
    """A run can't know whether other work ran beside it."""
    put(tmp_path, STUDENT, 59.0, suite="benchmark")
    put(tmp_path, KD, 59.0)
    report.write(tmp_path)
    for name in ("RESULTS.md", "SUITE.md", "results.csv"):
        text = (tmp_path / name).read_text()
        assert not [word for word in ("1612", "1,612", "4083", "4,083", "1.5", "MiB") if word in text], name


def test_several_seeds(tmp_path):
    put(tmp_path, "teacher", 70.0)
    for seed, top1 in enumerate([59.0, 60.0, 61.0]):
        put(tmp_path, STUDENT, top1, seed)
    for seed, top1 in enumerate([60.0, 62.0, 64.0]):
        put(tmp_path, KD, top1, seed)
    rows = rows_of(tmp_path)
    assert rows[STUDENT]["top-1"] == "60.00 ± 1.00"
    assert rows[KD]["top-1"] == "62.00 ± 2.00"
    # Of 1, 2, 3: a standard deviation of 1, t of 2 degrees of freedom 4.3027, and 4.3027 / sqrt(3) = 2.4841.
    assert rows[KD]["gain"] == "+2.00 [-0.48, +4.48]"
    assert [row["seeds"] for row in rows.values()] == ["1", "3", "3"]
    assert rows["teacher"]["top-1"] == "70.00"


def test_gain_only_over_seeds_that_both_have(tmp_path):
    put(tmp_path, STUDENT, 59.0, seed=0)
    put(tmp_path, STUDENT, 10.0, seed=7)
    put(tmp_path, KD, 58.5, seed=0)
    put(tmp_path, KD, 90.0, seed=1)
    put(tmp_path, "distillation_LDH", 60.0, seed=3)
    rows = rows_of(tmp_path)
    assert rows[KD]["gain"] == "-0.50 (seeds in common: 1)"
    assert rows["distillation_LDH"]["gain"] == ""


def test_no_student(tmp_path):
    put(tmp_path, KD, 60.0)
    assert rows_of(tmp_path)[KD]["gain"] == ""
    assert "The student on hard labels alone did not run" in report_text(tmp_path)


def test_noise(tmp_path):
    put(tmp_path, STUDENT, 50.0)
    rows = results.read(tmp_path)
    assert statistics.standard_error(rows) == pytest.approx(0.5)  # 100 sqrt(0.5 * 0.5 / 10,000)
    assert statistics.noise(rows) == pytest.approx(1.41421356)
    text = report_text(tmp_path)
    assert "Over test images alone, the standard error of one top-1 on 10,000 of them is 0.50 points" in text
    assert "40 batches for 10,000 images, so about mean CE / 250" in text


def test_noise_is_never_nothing(tmp_path):
    put(tmp_path, STUDENT, 100.0)
    assert statistics.standard_error(results.read(tmp_path)) > 0


def test_one_seed_is_not_judged(tmp_path):
    put_images(tmp_path, STUDENT, "xxxx------")
    put_images(tmp_path, KD, "xxxx-xxxxx")  # 5 to 0
    put_images(tmp_path, LDH6, "xxxxxxxxxx")  # 6 to 0
    put_images(tmp_path, "teacher", "xxxxxxxxx-")
    rows, text = rows_of(tmp_path), report_text(tmp_path, with_claims=True)
    assert [row["McNemar p (these two runs)"] for row in rows.values()] == ["", "", "0.0625", "0.0312"]
    assert rows[LDH6]["gain"].startswith("+60.00 [+") and rows[LDH6]["gain"].endswith("] over images")
    assert "- over images: the 95 % interval over test images, one seed" in text
    assert "points (95 % interval over test images, one seed, +" in text and "beyond noise" not in rows[LDH6]
    assert "p" not in rows[LDH6] and not [words for words in ("Above the student", "after Holm") if words in text]


def test_several_seeds_are_judged(tmp_path):
    for seed in range(2):
        put_images(tmp_path, STUDENT, "xxxx------", seed)
        put_images(tmp_path, KD, "xxxx-xxxxx", seed)
        put_images(tmp_path, LDH6, "xxxxxxxxxx", seed)
    rows = rows_of(tmp_path)
    # 2 / 2^5 and 2 / 2^6, no spread over seeds; by Holm the smaller is doubled.
    assert [row["p"] for row in rows.values()] == ["", "0.0625", "0.0625"]
    assert [row["beyond noise"] for row in rows.values()] == ["", "no", "no"]
    for seed in range(2):
        (tmp_path / f"distillation_seed{seed}.json").unlink()
    assert rows_of(tmp_path)[LDH6]["beyond noise"] == "yes"
    assert "Holm's correction over all 1 differences compared here" in report_text(tmp_path)


def test_mcnemar_of_each_seed_is_shown(tmp_path):
    put_images(tmp_path, STUDENT, "xxxx------")
    put_images(tmp_path, STUDENT, "xxxx------", seed=1)
    put_images(tmp_path, KD, "xxxxxxxxxx")
    put_images(tmp_path, KD, "xxxx------", seed=1)
    assert rows_of(tmp_path)[KD]["McNemar p (these two runs)"] == "0.0312, 1.0000"


def test_shortened_runs_are_said_to_be(tmp_path):
    put(tmp_path, STUDENT, 50.0)
    assert "Not the reference's" not in report_text(tmp_path)
    put(tmp_path, KD, 50.0, epochs=2)
    put(tmp_path, "teacher", 50.0, augment=True, weights="none")
    put(tmp_path, LDH6, 50.0, seed=3, warm_start={"epochs": 20, "checkpoint_sha256": "ab"})
    put(tmp_path, LDH6, 50.0, seed=4)
    anew = {"epochs": 20, "checkpoint_sha256": "ab"}
    put(tmp_path, "distillation_LDH9", 50.0, weights="imagenet", warm_start=anew, extra_parameters=7)
    text = report_text(tmp_path)
    assert "distillation_LDH9 ran with a student that starts from the weights imagenet instead of random ones" in text
    assert "20 epochs, with a fresh optimiser and what its loss learns begun anew" in text
    assert "- Not the reference's recipe: distillation ran with epochs 2 instead of 50.\n" in text
    assert "teacher ran with augmented images, a teacher that starts from the weights none instead of imagenet" in text
    assert f"{LDH6} (seed 3) ran with a start from a finished run of 20 epochs" in text
    assert "do not compare with the reference" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"teacher": {"sha256": "cdef" * 16}},
            "teacher in all rows**, which they differ by as well: the one of 69.87 % (ab): distillation; the one of",
        ),
        (
            {"precision": "fp32"},
            "precision in all rows**, which they differ by as well: bf16: student, distillation; fp32: ",
        ),
        ({"batch_norm": "each part"}, "batch norm in all rows"),
        ({"stem": "standard"}, "stem in all rows"),
    ],
)
def test_what_the_students_were_not_trained_with_alike_is_told(tmp_path, more, words):
    put(tmp_path, "teacher", 70.0, weights="imagenet", stem="standard")
    put(tmp_path, STUDENT, 59.0)
    put(tmp_path, KD, 60.0)
    put(tmp_path, LDH6, 61.0)
    assert "Not the same" not in report_text(tmp_path)
    put(tmp_path, LDH6, 61.0, **more)
    assert f"- **Not the same {words}" in report_text(tmp_path)


def test_an_older_result_departs_in_nothing(tmp_path):
    old = {"T": None, "alpha": 1}  # as results had it for a row without a temperature
    path = put(tmp_path, STUDENT, 50.0, recipe=old)
    run = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in run.items() if key != "name"}))
    assert "Not the reference's" not in report_text(tmp_path)


def test_runs_with_names_of_their_own(tmp_path):
    put(tmp_path, LDH6, 67.0)
    put(tmp_path, STUDENT, 59.0)
    put(tmp_path, KD, 61.0, recipe={"alpha": 0.5, "margin": 3.0}, name="a_half")
    put(tmp_path, KD, 60.0, name="b")
    new = {**described(RECIPES[STUDENT]), "soft": "rkd", "alpha": 0.9}
    put(tmp_path, "my_row", 62.0, recipe=new)
    rows, text = rows_of(tmp_path), report_text(tmp_path)
    assert list(rows) == [STUDENT, LDH6, "a_half", "b", "my_row"]
    assert rows["a_half"]["gain"] == "+2.00" and rows["a_half"]["reference top-1"] == ""
    assert "- a_half is distillation with alpha 0.5 instead of 0.7, margin 3.0.\n" in text
    assert "- b is distillation as recipes.py has it.\n" in text
    assert "- my_row is no row of recipes.py; it ran with network student" in text
    assert "Not the reference's recipe" not in text


def test_runs_of_different_jobs_under_one_name_are_refused(tmp_path):
    put(tmp_path, KD, 61.0, name="mine")
    put(tmp_path, STUDENT, 61.0, seed=1, name="mine")
    with pytest.raises(UserError, match="mine is the name of runs of different jobs"):
        report.write(tmp_path)


def test_held_out_images(tmp_path):
    put(tmp_path, STUDENT, 59.0)
    assert "All rows trained on all 50,000 training images." in report_text(tmp_path)
    data = {**CIFAR, "train_images": 45000, "val_images": 5000}
    for seed, loss in enumerate([1.0, 2.0]):
        put(tmp_path, KD, 60.0, seed, data=data, val={"val_loss": loss, "val_top1": 55.0})
    rows, text = rows_of(tmp_path), report_text(tmp_path)
    assert rows[KD]["val loss"] == "1.5000 ± 0.7071" and rows[KD]["val top-1"] == "55.00 ± 0.00"
    assert rows[STUDENT]["val loss"] == ""
    assert "- Held out: 5,000 of 50,000 training images (distillation).\n- None held out: student.\n" in text
    (tmp_path / "student_seed0.json").unlink()
    text = report_text(tmp_path)
    assert "- Held out: 5,000 of 50,000 training images (all rows).\n" in text and "Not the reference's data" in text


def test_digits_are_said_to_be_a_check(tmp_path):
    put(tmp_path, STUDENT, 97.0, dataset="digits", data=DIGITS)
    assert "reference top-1" not in rows_of(tmp_path)[STUDENT]
    assert report_text(tmp_path).splitlines()[0] == "**This is a check of the pipeline, not a result.**"


def test_csv(tmp_path):
    put(tmp_path, "distillation_KMJ0", 60.25, seed=10)
    put(tmp_path, "distillation_KMJ0", 60.5, seed=2, val={"val_loss": 1.5, "val_top1": 55.0})
    put(tmp_path, STUDENT, 59.0, device='odd, "quoted"')
    report.write(tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["job"], line["seed"], line["top1"]) for line in lines] == [
        (STUDENT, "0", "59.0"),
        ("distillation_KMJ0", "2", "60.5"),
        ("distillation_KMJ0", "10", "60.25"),
    ]
    assert lines[0]["device"] == 'odd, "quoted"' and lines[0]["teacher_top1"] == "" and lines[0]["soft"] == ""
    assert lines[0]["T"] == ""  # the student's recipe has none
    assert lines[1] == {
        "job": "distillation_KMJ0", "name": "distillation_KMJ0", "seed": "2", "dataset": "cifar100", "top1": "60.5",
        "top5": "85.0", "test_loss": "0.01058444", "mean_ce": "2.7096", "val_images": "0", "val_loss": "1.5",
        "val_top1": "55.0", "epochs": "50", "precision": "bf16",
        "device": "a CPU, 2 threads", "teacher_top1": "69.87", "network": "student", "soft": "kd",
        "alpha": "per epoch", "T": "2.0", "beta": "0.0", "gamma": "0.0", "scheduler_step": "20",
        "learning_rate": "0.001", "batch_size": "256", "arch": "", "weight": "1.0",
    }  # fmt: skip


# Results on the disk


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = put(tmp_path, KD, 60.0, right=np.arange(10000) % 5 < 3, unknown=1)
    run = Result.read(path)
    run.write(path)
    assert Result.read(path) == run
    assert not hasattr(run, "unknown") and run.data["val_images"] == 0 and run.warm_start is None
    assert run.right.tolist()[:6] == [True, True, True, False, False, True] and len(run.right) == 10000


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": "0"}, "seed"),
        ({"seed": True}, "seed"),
        ({"teacher_top1": "high"}, "teacher_top1"),
        ({"seconds": None}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
        ({"seed": -1}, "seed"),
        ({"job": "a\n# forged"}, "job"),
        ({"suite": "../x"}, "suite"),
        ({"data": {**CIFAR, "val_images": -1}}, "val_images"),
        ({"recipe": {**described(RECIPES[STUDENT]), "epochs": 10**14}}, "epochs"),
        ({"recipe": {**described(RECIPES[STUDENT]), "<b>": 1}}, "recipe"),
        ({"recipe": {**described(RECIPES[STUDENT]), "batch_size": 0}}, "recipe"),
        ({"recipe": {**described(RECIPES[STUDENT]), "alpha": -1.0}}, "recipe"),
        ({"recipe": {**described(RECIPES[STUDENT]), "T": {"a": 1}}}, "recipe"),
        ({"epochs": [{"epoch": 1, "train_loss": 1.0, "train_top1": 1.0, "kd": "x"}]}, "kd"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"teacher_top1": 101.0}, "teacher_top1"),
        ({"epochs": [{"epoch": 1, "train_loss": 1.0, "train_top1": 101.0}]}, "train_top1"),
        ({"epochs": [{"epoch": e, "train_loss": 1.0, "train_top1": 1.0} for e in (1, 3, 2)]}, "epochs"),
        ({"epochs": [{"epoch": 1, "train_loss": 1.0, "train_top1": 1.0, "a\nb": 1.0}]}, "epochs"),
        ({"test": {"top1": 50.0, "top5": 40.0, "test_loss": 0.1, "mean_ce": 1.0}}, "top5"),
        ({"test": {"top1": 50.0, "top5": 60.0, "test_loss": 0.1, "mean_ce": 1.0, "images": 7}}, "images"),
        ({"test": {"top1": 50.0, "top5": 60.0, "test_loss": -0.1, "mean_ce": 1.0}}, "test_loss"),
        ({"epochs": []}, "epochs"),
        ({"epochs": [{"epoch": 1, "train_loss": 1.0}]}, "train_top1"),
        ({"recipe": {"network": "student"}}, "soft"),
        ({"data": {**CIFAR, "test_images": 0}}, "test_images"),
        ({"test": {"top1": 101.0, "top5": 101.0, "test_loss": 0.1, "mean_ce": 1.0}}, "top1"),
        ({"test": {"top1": 50.0, "top5": 90.0, "test_loss": 0.1, "mean_ce": 1.0, "correct": "?"}}, "correct"),
        ({"test": {"top1": 0.0, "top5": 90.0, "test_loss": 0.1, "mean_ce": 1.0, "correct": "AAAA"}}, "correct"),
    ],
)
def test_a_flaw_is_named(tmp_path, change, part):
    path = put(tmp_path, STUDENT, 59.0)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=rf"is no whole result \({part} is missing or wrong\)"):
        Result.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, json.loads("[" * 60 + "]" * 60)])
@pytest.mark.parametrize("part", ["seconds", "recipe", "notes"])
def test_numbers_are_finite_wherever_they_are(tmp_path, part, value):
    path = put(tmp_path, STUDENT, 59.0)
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, part: {**run["recipe"], "T": value} if part == "recipe" else value}))
    with pytest.raises(UserError, match="is damaged"):
        Result.read(path)


def test_text_from_elsewhere_is_no_markup(tmp_path):
    text = "CPU\n\n# forged | <script>alert(1)</script> `x` [a](b) \x1b[2J \udce9"
    more = {"device": text, "command": text, "versions": {"torch": text}, "batch_norm": text}
    put_images(tmp_path, STUDENT, "x-", **more)
    put_images(tmp_path, KD, "xx", claimed={"top1": 1.0, "source": text, "epochs": 1})
    put_images(tmp_path, "suite_kd", "xx", suite="suite", recipe=described(RECIPES[KD]), **more)
    report.write(tmp_path)
    for path in tmp_path.glob("*.md"):
        page = path.read_text(encoding="utf-8")
        outside = [line for line in page.splitlines() if not line.startswith("    ")]  # of code
        assert "forged" in page and not any(line.lstrip().startswith("# forged") for line in page.splitlines())
        assert not re.search(r"<script|(?<!\\)`x|(?<!\\)\[a|\x1b|\udce9", "\n".join(outside)), path
    assert "\x1b" not in side_by_side.text(
        {name: Result.read(tmp_path / f"{name}_seed0.json") for name in (STUDENT, KD)}
    )


def test_which_images_were_right_agrees_with_the_top1(tmp_path):
    path = put_images(tmp_path, STUDENT, "xx--------")
    path.write_text(path.read_text().replace('"top1": 20.0', '"top1": 30.0'))
    with pytest.raises(UserError, match="correct is missing or wrong"):
        Result.read(path)


def test_epochs_as_csv(tmp_path):
    path = put(tmp_path, STUDENT, 59.0, epochs=2)
    run = Result.read(path)
    run.epochs[1]["mse"] = 0.5
    assert results.epochs_csv(run).splitlines() == [
        "epoch,train_loss,train_loss_over_batches,train_top1,alpha,learning_rate,seconds,mse",
        "1,4.0,4.1,1.0,0.7,0.001,1.5,",
        "2,2.0,2.05,50.5,0.7,0.001,1.5,0.5",
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"data": {**CIFAR, "train_images": 512}},
        {"data": {**CIFAR, "image_size": 64}},
        {"data": {**CIFAR, "classes": 10}},
        {"dataset": "tiny_imagenet"},
        {"data": {**CIFAR, "fingerprint": "relabelled", "test_fingerprint": "of the test"}},
        {"data": {**CIFAR, "fingerprint": "others", "test_fingerprint": "others"}},
    ],
)
def test_mixed_data_are_refused(tmp_path, more):
    put(tmp_path, STUDENT, 59.0, data={**CIFAR, "fingerprint": "of all", "test_fingerprint": "of the test"})
    put(tmp_path, "teacher", 59.0, **more)
    with pytest.raises(UserError, match="student_seed0.json and .*teacher_seed0.json are of different data"):
        report.write(tmp_path)


def test_damaged_results_are_named(tmp_path):
    put(tmp_path, STUDENT, 59.0)
    path = put(tmp_path, "teacher", 59.0)
    whole = path.read_text()
    report.write(tmp_path)
    before = (tmp_path / "RESULTS.md").read_bytes()
    for text in (whole[:-40], "", "[]", "[" * 100_000, whole.replace('"top5"', '"top7"'), whole.replace("85.0", "NaN")):
        path.write_text(text)
        with pytest.raises(UserError, match="teacher_seed0.json is"):
            report.write(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="teacher_seed0.json is damaged"):
        report.write(tmp_path)
    path.write_text(whole.replace('"teacher": null', '"teacher": {}'))
    with pytest.raises(UserError, match="no whole result .teacher is missing or wrong"):
        report.write(tmp_path)
    path.write_text(whole[:-1] + ', "suite": "../elsewhere"}')  # where a plot would be written
    with pytest.raises(UserError, match="no whole result .suite is missing or wrong"):
        report.write(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "student_seed5.json").write_text("{}")
    with pytest.raises(UserError, match="student_seed5.json is no whole result .*; .*teacher_seed0.json is damaged"):
        report.write(tmp_path)
    assert (tmp_path / "RESULTS.md").read_bytes() == before


def test_files_that_are_not_what_their_name_says_are_named(tmp_path):
    path = put(tmp_path, STUDENT, 59.0)
    path = path.rename(tmp_path / "student_seed0_old.json")
    with pytest.raises(UserError, match="student_seed0_old.json holds student with seed 0"):
        report.write(tmp_path)
    path.unlink()
    put(tmp_path, STUDENT, 59.0, name=KD)
    with pytest.raises(UserError, match="distillation_seed0.json is of the job student"):
        report.write(tmp_path)


def test_no_results(tmp_path):
    (tmp_path / "._student_seed0.json").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves beside a copied file
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no results"):
            report.write(folder)


def test_in_a_finally_no_other_exception_is_hidden(tmp_path, capfd):
    def fail():
        try:
            raise KeyboardInterrupt
        finally:
            assert report.try_write(tmp_path) == []

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert capfd.readouterr().err == ""  # nothing was to be written yet
    (tmp_path / "student_seed0.json").write_text("{")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "no table and no plots: " in (said := capfd.readouterr().err) and said.count("\n") == 1
    put(tmp_path, STUDENT, 59.0)
    assert len(report.try_write(tmp_path)) == 4


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package_is_told_of(tmp_path, monkeypatch, package):
    put(tmp_path, STUDENT, 59.0)
    report.require()
    monkeypatch.setitem(sys.modules, package, None)
    for ask in (report.require, lambda: report.write(tmp_path)):
        with pytest.raises(UserError, match=f"need {package}, not installed: pip install -r requirements.txt"):
            ask()


def test_command(tmp_path):
    put(tmp_path, STUDENT, 59.0)
    command = [sys.executable, "-m", "report", str(tmp_path), "--claims"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"wrote {tmp_path / name}" for name in ("RESULTS.md", "results.csv", "top1.png", "curves.png")
    ]
    assert "## The reference's claims" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize("args", [[], ["nowhere"], ["~nobody-of-this-name"], [".", "--claim"]])
def test_a_wrong_command_is_answered_in_a_line(tmp_path, monkeypatch, capfd, args):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, STUDENT, 59.0)
    monkeypatch.setattr(sys, "argv", ["report", *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("report", run_name="__main__")
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and err.startswith("report: error: ") and err.count("\n") == 1 and not out


def test_the_report_imports_nothing_but_recipes_and_util():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    for path in (ROOT / "report").glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        assert {name.partition(".")[0] for name in names} & ours <= {"recipes", "util", "report"}, path


# Statistics, against figures worked out by hand


def marks(text):
    return np.array([mark == "x" for mark in text])


def test_mcnemar():
    assert statistics.mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert statistics.mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert statistics.mcnemar(4, 4) == statistics.mcnemar(0, 0) == 1
    assert statistics.discordant(marks("xx-xx"), marks("x-x--")) == (3, 1)


def test_sign_test_counts_each_image_once():
    pair = marks("xxxxxx--"), marks("------x-")
    assert statistics.sign_test([pair]) == statistics.mcnemar(6, 1)
    assert statistics.sign_test([pair, pair, pair]) == statistics.mcnemar(6, 1)  # no surer by the same images again
    other = marks("--------"), marks("xx------")  # takes back two of the six
    assert statistics.sign_test([pair, other]) == statistics.mcnemar(4, 1)


def test_wilson():
    # 8 of 10: middle (0.8 + 0.19207) / 1.38415 = 0.71674, half 1.95996 sqrt(0.016 + 0.0096036) / 1.38415 = 0.22657
    assert statistics.wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert statistics.wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)  # z^2 / (n + z^2)


def test_newcombe():
    # 50 pairs, 36 both right, 12 only ours, 2 only theirs: 96 % against 76 %, Wilson's limits 0.86540, 0.98896 and
    # 0.62589, 0.85702; a d - b c = -24 and the product of the margins 48 * 2 * 38 * 12 = 43,776, so phi = -0.114708.
    # below: sqrt(0.09460^2 + 2 * 0.114708 * 0.09460 * 0.09702 + 0.09702^2) = 0.14307, and 20 - 14.307 = 5.693
    # above: sqrt(0.02896^2 + 2 * 0.114708 * 0.02896 * 0.13411 + 0.13411^2) = 0.14043, and 20 + 14.043 = 34.043
    ours = marks("x" * 36 + "x" * 12 + "-" * 2)
    theirs = marks("x" * 36 + "-" * 12 + "x" * 2)
    assert statistics.newcombe(ours, theirs) == pytest.approx((5.693, 34.043), abs=2e-3)
    assert statistics.newcombe(theirs, ours) == pytest.approx((-34.043, -5.693), abs=2e-3)


def test_newcombe_with_a_correction_of_the_correlation():
    # 20 pairs, 10 both, 4 only ours, 1 only theirs, 5 neither: a d - b c - n / 2 = 50 - 4 - 10 = 36 over
    # sqrt(14 * 6 * 11 * 9) = 91.19, phi = 0.39477. Wilson of 14: 0.48102, 0.85452; of 11: 0.34209, 0.74180.
    # below: sqrt(0.21898^2 - 2 * 0.39477 * 0.21898 * 0.19180 + 0.19180^2) = 0.22710
    # above: sqrt(0.15452^2 - 2 * 0.39477 * 0.15452 * 0.20791 + 0.20791^2) = 0.20430
    ours = marks("x" * 10 + "x" * 4 + "-" + "-" * 5)
    theirs = marks("x" * 10 + "-" * 4 + "x" + "-" * 5)
    assert statistics.newcombe(ours, theirs) == pytest.approx((-7.710, 35.430), abs=2e-3)


def test_newcombe_of_equal_networks():
    low, high = statistics.newcombe(marks("xxxx----"), marks("xxxx----"))
    assert low == pytest.approx(-high) and 0 < high < 30


def test_newcombe_where_all_of_one_are_right():
    # No correlation can be told. 4 of 4 are at least 4 / (4 + z^2) = 0.51011, 2 of 4 are 0.5 -+ 0.34996.
    # below: sqrt(0.48989^2 + 0.34996^2) = 0.60205; above: 0.34996
    found = statistics.newcombe(marks("xxxx"), marks("xx--"))
    assert found == pytest.approx((50 - 60.205, 50 + 34.996), abs=2e-3)


def test_t():
    # Of two degrees of freedom p = 1 - t / sqrt(t^2 + 2); here t = 2 sqrt(3), that of 1, 2, 3.
    assert statistics.t_interval(2.0, 3**-0.5, 2) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert statistics.t_test(2.0, 3**-0.5, 2) == pytest.approx(1 - (12 / 14) ** 0.5)
    assert statistics.t_test(1.0, 0.0, 1) == 0 and statistics.t_test(0.0, 0.0, 1) == 1


def seeded(tmp_path, **tops):
    """Rows with these top-1s, one for each seed from 0; None where a seed did not run."""
    for job, values in tops.items():
        for seed, top1 in enumerate(values):
            if top1 is not None:
                put(tmp_path, job, top1, seed)
    return results.read(tmp_path)


def gains(rows, baseline=STUDENT):
    """Each other row against the baseline, judged together."""
    found = statistics.judge(rows, [(name, baseline) for name in rows if name != baseline])
    return {name: comparison for (name, _), comparison in found.items()}


def test_the_spread_of_two_rows_is_the_paired_t_tests(tmp_path):
    ours, theirs = [61.0, 63.5, 62.0], [60.0, 61.0, 61.9]
    found = gains(seeded(tmp_path, student=theirs, distillation=ours))[KD]
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.over_seeds and found.interval == pytest.approx((expected.low, expected.high))


def test_the_spread_of_several_rows_is_that_of_all(tmp_path):
    """Rows 1 3, 2 5, 4 4: by hand the squares of what row and seed leave are 7/3, and 2 degrees of freedom are left."""
    rows = seeded(tmp_path, student=[1.0, 3.0], distillation=[2.0, 5.0], distillation_LDH6=[4.0, 4.0])
    assert statistics.Blocks(rows).spread == statistics.Spread(pytest.approx((7 / 6) ** 0.5), 2)
    found = gains(rows)
    half = 4.302653 * (7 / 6) ** 0.5  # times sqrt(2 / 2 seeds)
    assert found[KD].interval == pytest.approx((1.5 - half, 1.5 + half), abs=1e-4)
    assert found[LDH6].interval == pytest.approx((2 - half, 2 + half), abs=1e-4)


def test_a_row_of_one_seed_takes_the_spread_and_the_worth_of_seeds_from_the_others(tmp_path):
    rows = seeded(tmp_path, student=[60.0, 61.0], distillation=[61.0, 62.2], distillation_LDH6=[65.0, None])
    found = gains(rows)[LDH6]
    # Student and kd, 60 61 and 61 62.2, have a mean of 60.5 at seed 0, and the student half of 1.1 less: 59.95. They
    # leave squares of 4 times 0.05^2, one degree of freedom. 65 less 59.95 has a variance of 1 + 1/2 + 1/4 runs.
    half = 12.706205 * 0.1 * 1.75**0.5
    assert found.gain == pytest.approx(5.05) and found.gains == {0: 5.0} and found.over_seeds
    assert found.interval == pytest.approx((5.05 - half, 5.05 + half), abs=1e-4)
    assert statistics.Blocks(results.Rows({name: rows[name] for name in (STUDENT, LDH6)})).spread is None


def test_a_pair_has_one_answer_among_all_that_a_table_compares(tmp_path):
    rng = np.random.default_rng(0)
    for job in (STUDENT, KD, LDH6, "distillation_LDH"):
        for seed in range(2):
            put_images(tmp_path, job, "".join(rng.choice(["x", "-"], 100)), seed)
    rows = results.read(tmp_path)
    pairs = [(KD, STUDENT), (LDH6, STUDENT), (STUDENT, LDH6), (LDH6, KD), ("distillation_LDH", KD)]
    found = statistics.judge(rows, pairs)
    one, reverse = found[LDH6, STUDENT], found[STUDENT, LDH6]
    assert one.adjusted == reverse.adjusted and one.interval == pytest.approx([-end for end in reverse.interval[::-1]])
    assert {each.spread for each in found.values()} == {statistics.Blocks(rows).spread}
    ps = [found[pair].p for pair in pairs if pair != (STUDENT, LDH6)]
    assert [found[pair].adjusted for pair in pairs if pair != (STUDENT, LDH6)] == statistics.holm(ps)


def test_a_row_whose_runs_lie_further_apart_is_named_and_judged_by_itself(tmp_path):
    tops = {job: [60.0, 60.2] for job in RECIPES if job != "teacher"} | {KD: [62.0, 66.0]}
    rows = seeded(tmp_path, **tops)
    # 8 of 8.22 squares are kd's; its share has the beta distribution of 1/2 and 11/2, and there are twelve rows.
    name, p = statistics.uneven(rows)
    assert name == KD and p == pytest.approx(12 * scipy.stats.beta.sf(8 / 8.22, 0.5, 5.5))
    expected = scipy.stats.ttest_rel(*(tops[job] for job in (KD, STUDENT))).confidence_interval(0.95)
    found = gains(rows)
    assert found[KD].interval == pytest.approx((expected.low, expected.high)) and found[LDH6].spread.freedom == 11
    assert "**The runs of distillation lie further apart than other rows'** (Cochran's C, p <0.0001)" in report_text(
        tmp_path
    )
    put(tmp_path, KD, 62.2, 1)
    assert statistics.uneven(results.read(tmp_path))[1] == 1 and "Cochran" not in report_text(tmp_path)


def test_what_so_few_seeds_can_show():
    # Two rows of 3 seeds, no correction: the power of the t test, from its noncentral distribution.
    found = statistics.chance_to_find(1.0, 0.4, 4, 1)
    limit = scipy.stats.t.ppf(0.975, 4)
    assert found == pytest.approx(scipy.stats.nct.sf(limit, 4, 2.5) + scipy.stats.nct.cdf(-limit, 4, 2.5))
    assert statistics.chance_to_find(statistics.smallest_to_find(0.4, 4, 7), 0.4, 4, 7) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("freedom", [1, 2, 6, 24])
@pytest.mark.parametrize("comparisons", [1, 2, 13])
def test_what_seeds_can_show_is_a_probability_that_grows_with_the_gain(freedom, comparisons):
    found = [statistics.chance_to_find(gain / 4, 0.05, freedom, comparisons) for gain in range(30)]
    assert found == sorted(found) and found[0] == pytest.approx(0.05 / comparisons, rel=0.02) and found[-1] <= 1
    smallest = statistics.smallest_to_find(0.05, freedom, comparisons)
    assert statistics.chance_to_find(smallest, 0.05, freedom, comparisons) == pytest.approx(0.8, abs=2e-3)


def test_equal_gains_by_chance_have_an_interval(tmp_path):
    for seed in range(2):
        put_images(tmp_path, STUDENT, "xx" * 20 + "-" * 20, seed)
        put_images(tmp_path, KD, "xx" * 20 + "xx" + "-" * 18, seed)
    low, high = gains(results.read(tmp_path))[KD].interval
    assert low < 100 / 30 - 0.1 and high > 100 / 30 + 0.1


def test_the_table_names_the_students_that_its_gains_are_over(tmp_path):
    for name, rate in {"mine": 0.1, "fast": 0.5}.items():
        put(tmp_path, STUDENT, 59.0, recipe={"learning_rate": rate}, name=name).rename(tmp_path / f"{name}_seed0.json")
    put(tmp_path, KD, 60.0, recipe={"learning_rate": 0.1})
    assert "gain: over the student (mine), in points" in report_text(tmp_path)
    put(tmp_path, "distillation_KMJ1", 61.0, recipe={"learning_rate": 0.5, "epochs": 50, "scheduler_step": 20})
    assert "(mine for distillation; fast for distillation_KMJ1), in" in report_text(tmp_path)


def test_rows_trained_for_other_epochs_are_named(tmp_path):
    put(tmp_path, STUDENT, 59.0, epochs=10)
    put(tmp_path, KD, 60.0, epochs=10)
    assert "**Not trained" not in report_text(tmp_path)
    put(tmp_path, LDH6, 62.0, epochs=3)
    assert "**Not trained as long as the student it is compared with: distillation_LDH6.**" in report_text(tmp_path)
    put(tmp_path, LDH6, 62.0, 1, epochs=10)
    assert "**Not trained alike in all of its own seeds: distillation_LDH6.**" in report_text(tmp_path)


@pytest.mark.parametrize(
    ("gain", "seeds", "images", "within"), [(0, 8, 40, True), (0, 2, 40, False), (1, 8, 40, False)]
)
def test_within_the_margin_however_few_the_images(gain, seeds, images, within):
    """Of 0.1 points' standard error over seeds, and of what so many images' lets be."""
    error, image_error = 0.15 * (8 / seeds) ** 2, 0.1 * (40 / images) ** 0.5
    spread = statistics.Spread(0.4, 7)
    found = statistics.Comparison({}, gain, {}, spread, error, image_error)
    assert found.within_margin == within
    # 0.5 points are fewer images than one, so nothing is within them for sure.
    assert not statistics.Comparison({}, 0.0, {}, spread, error, 0.5).within_margin
    assert not statistics.Comparison({}, 0.0, {}).within_margin


def test_intervals_of_rows(tmp_path):
    """Over seeds by the spread of all students, sqrt((2 + 0.5) / 2); of one run over its test images."""
    rows = seeded(tmp_path, student=[60.0, 62.0], distillation=[61.0, 62.0], teacher=[70.0])
    found, half = statistics.own_intervals(rows), 4.302653 * 1.25**0.5 / 2**0.5
    assert found[STUDENT] == pytest.approx((61 - half, 61 + half), abs=1e-4)
    assert found[KD] == pytest.approx((61.5 - half, 61.5 + half), abs=1e-4)
    assert found["teacher"] == pytest.approx((69.0948, 70.8904), abs=1e-3)


def test_holm():
    # Sorted 0.01, 0.02, 0.03, 0.04 by 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and never less than the one before.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1, 1] and statistics.holm([]) == []


def test_a_difference_must_hold_for_other_images(tmp_path):
    for seed in range(3):  # the same image more in each seed: no seed tells more than the first
        put_images(tmp_path, STUDENT, "x---------", seed)
        put_images(tmp_path, KD, "xx--------", seed)
    found = gains(results.read(tmp_path))
    assert found[KD].gain == pytest.approx(10) and found[KD].p == 1  # the t test alone would say 0


def test_a_difference_must_hold_for_other_seeds(tmp_path):
    for seed, marks in enumerate(("xxxxxxxxxx", "x---------")):
        put_images(tmp_path, STUDENT, "x---------", seed)
        put_images(tmp_path, LDH6, marks, seed)
    found = gains(results.read(tmp_path))
    assert found[LDH6].mcnemar[0] == pytest.approx(2 / 2**9)
    assert found[LDH6].p == pytest.approx(0.5)  # gains of 90 and 0: t = 1 of one degree of freedom


def test_rows_that_do_not_tell_their_images_are_not_paired(tmp_path):
    for seed in range(2):
        put_images(tmp_path, STUDENT, "x---------", seed)
        path = put_images(tmp_path, KD, "xxxxxxxxxx", seed)
    assert gains(results.read(tmp_path))[KD].p is not None
    path.write_text(path.read_text().replace('"test_fingerprint": "ten"', '"of": "ten"'))
    found = gains(results.read(tmp_path))[KD]
    assert found.gain == 90 and found.p is found.beyond_noise is None and [*found.mcnemar] == [0]


def put_kind(folder, job, arch, right, training="reference", seed=0):
    recipe = {**described(RECIPES[job]), "arch": arch, "training": training}
    name = "_".join(filter(None, [job, arch, training * (training != "reference")]))
    return put_images(folder, name, right, seed, recipe=recipe)


def test_a_row_is_held_against_the_student_of_its_network_and_training(tmp_path):
    for seed in range(2):
        put_images(tmp_path, STUDENT, "x---------", seed)
        put_images(tmp_path, KD, "xx--------", seed)
        put_kind(tmp_path, STUDENT, "resnet20", "xxxx------", "strong", seed)
        put_kind(tmp_path, KD, "resnet20", "xxxxxxxxx-", "strong", seed)
        put_kind(tmp_path, LDH6, "vgg8", "xxxxxxxxxx", seed=seed)
        put_kind(
            tmp_path, "distillation_KMJ0", "resnet20+resnet50", "x---------", "strong", seed
        )  # as simkd's students
    rows = results.read(tmp_path)
    judged = statistics.judge(rows, statistics.student_pairs(rows))
    found = statistics.gains_on_student(rows, judged)
    assert {name: round(gain.gain) for name, gain in found.items()} == {
        KD: 10,
        "distillation_resnet20_strong": 50,
        "distillation_KMJ0_resnet20+resnet50_strong": -30,
    }
    assert found["distillation_resnet20_strong"].adjusted == pytest.approx(3 * 2 / 2**5)  # as one of three
    facts = findings.findings(rows, judged)
    assert facts[0].startswith("Best of the students of resnet18, reference (2) by mean top-1: distillation, 20.00 %.")
    assert "distillation_resnet20_strong, 90.00 %. Its gain on the student in top-1 is +50.00 points" in facts[1]
    assert facts[2].startswith("Best of the students of vgg8") and "did not run, so there is no gain" in facts[2]
    assert "gain: over the student of the same network and training" in report_text(tmp_path)


def test_a_student_alone_with_a_name_of_its_own_is_the_baseline(tmp_path):
    """Under its job's own name before others; of several others that which was trained alike."""
    put_images(tmp_path, STUDENT, "xxxx......", name="mine")
    put_images(tmp_path, KD, "xxxxxx....")
    assert rows_of(tmp_path)[KD]["gain"].startswith("+20.00") and "did not run" not in report_text(tmp_path)
    assert findings.claim_pairs(results.read(tmp_path)) == [(KD, "mine")]
    put_images(tmp_path, STUDENT, "xxxxx.....", name="short", epochs=5)
    put_images(tmp_path, KD, "xxxxxx....", name="kd_short", epochs=5)
    put_images(tmp_path, KD, "xxxxxxx...", name="kd_shorter", epochs=3)
    found = {name: row["gain"].partition(" ")[0] for name, row in rows_of(tmp_path).items()}
    assert found == {"mine": "", "short": "", KD: "+20.00", "kd_short": "+10.00", "kd_shorter": ""}
    assert "No student on hard labels alone was trained as it was" in report_text(tmp_path)
    assert ("kd_short", "short") not in findings.claim_pairs(results.read(tmp_path))  # no row of the reference's
    put_images(tmp_path, STUDENT, "xxx.......")
    assert rows_of(tmp_path)["kd_short"]["gain"].startswith("+30.00")


def test_the_benchmarks_older_runs_are_said_to_have_nesterovs_momentum(tmp_path):
    """They are of another kind than those with plain momentum."""
    for job, nesterov in (("student_benchmark", True), ("kd_benchmark", True), ("dkd_benchmark", False)):
        recipe = described(under(RECIPES[STUDENT], "benchmark")) | {"nesterov": nesterov}
        put(tmp_path, job, 60.0, recipe=recipe | {"soft": None if "student" in job else job[:-10]})
    rows = results.read(tmp_path)
    assert rows.kind("student_benchmark") == ("resnet18", "benchmark, with Nesterov's momentum")
    assert statistics.student_pairs(rows) == [("kd_benchmark", "student_benchmark")]
    assert "resnet18, benchmark, with Nesterov's momentum" in report_text(tmp_path)


@pytest.mark.parametrize(
    "dataset, more, words",
    [
        ("cifar100", {}, "CIFAR-100"),
        ("folder", {"data": {**CIFAR, "fingerprint": "2121847cf1c0da7715cf4b2d71a7d5d9"}}, "CIFAR-100"),
        ("folder", {"command": "train.py --data_dir 'my # photos/' --seed 0"}, "my  photos"),
        ("folder", {"command": "train.py"}, "folder"),
    ],
)
def test_tables_and_plots_are_titled_by_their_data(tmp_path, dataset, more, words):
    put(tmp_path, STUDENT, 59.0, dataset=dataset, epochs=10, **more)
    put(tmp_path, "distillation_KMJ1", 59.0, dataset=dataset, epochs=12, **more)
    rows = results.read(tmp_path)
    assert report_text(tmp_path).startswith(f"# Results on {words}, 10 of 50 or 12 of 60 epochs, 1 seed\n")
    assert plots._title(rows, "Top-1") == f"Top-1: {words}, 10 of 50 or 12 of 60 epochs, 1 seed"
    assert rows_of(tmp_path)["distillation_KMJ1"]["epochs"] == "12 of 60"


def test_a_row_that_was_chosen_by_test_figures_is_marked(tmp_path, monkeypatch):
    put(tmp_path, STUDENT, 59.0)
    rows = results.read(tmp_path)
    assert "†" not in report_text(tmp_path) + plots._marked(rows, "epoch")
    put(tmp_path, "distillation_LDH10", 66.0)
    text, rows = report_text(tmp_path), results.read(tmp_path)
    assert "| distillation_LDH10 † | 66.00" in text and f"- {results.CHOSEN_NOTE}\n" in text
    assert plots._marked(rows, "epoch") == f"epoch\n{results.CHOSEN_NOTE}"


def drawn(monkeypatch):
    """All texts of the next plot."""
    found = []
    monkeypatch.setattr(plots, "_png", lambda figure: found.extend(figure.findobj(match=Text)) or b"")
    return lambda: {text.get_text() for text in found}


@pytest.mark.parametrize(
    "official, dataset, words",
    [
        ((True, True), "cifar100", "by about 1 %; it is the official files'.\n"),
        ((True, False), "cifar100", "by about 1 %; it is not the official files' order of distillation.\n"),
        ((False, False), "cifar100", "by about 1 %; it is not the official files' order.\n"),
        ((False, False), "folder", "by about 1 %.\n"),
    ],
)
def test_the_order_behind_a_test_loss_is_told(tmp_path, official, dataset, words):
    for job, ordered in zip((STUDENT, KD), official, strict=True):
        path = put(tmp_path, job, 59.0, dataset=dataset)
        run = json.loads(path.read_text())
        run["test"] |= {"order": "official"} if ordered else {}
        path.write_text(json.dumps(run))
    assert words in report_text(tmp_path)


def test_a_teacher_without_a_row_is_drawn(tmp_path, monkeypatch):
    put(tmp_path, STUDENT, 59.0, dataset="folder")
    put(tmp_path, KD, 60.0, dataset="folder", teacher_top1=60.5)
    texts = drawn(monkeypatch)
    plots.top1_plot(results.read(tmp_path))
    assert "teacher, 60.50" in texts()
    put(tmp_path, KD, 60.0, dataset="folder", teacher_top1=95.0)
    plots.top1_plot(results.read(tmp_path))
    assert "teacher, 95.00, off this axis" in texts()
    put(tmp_path, "distillation_KMJ1", 60.0, dataset="folder", teacher_top1=96.0)
    plots.top1_plot(results.read(tmp_path))
    assert "teacher, 95.00 and 96.00, off this axis" in texts()  # one text: two would lie upon each other


def test_one_test_image_has_a_plot(tmp_path):
    for job in (STUDENT, KD):
        for seed in range(2):
            put_images(tmp_path, job, "-", seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.top1_plot(results.read(tmp_path))


def test_the_references_diamonds_say_how_long_it_was_trained(tmp_path, monkeypatch):
    for job in (STUDENT, "distillation_KMJ1"):
        put(tmp_path, job, 59.5, epochs=10)
    texts = drawn(monkeypatch)
    plots.top1_plot(results.read(tmp_path))
    assert "reference, 50 or 60 epochs, one run" in texts()


def test_a_students_name_does_not_matter(tmp_path, monkeypatch):
    put_kind(tmp_path, "teacher", "resnet56", "x---------", "strong")
    put_kind(tmp_path, STUDENT, "resnet20", "x---------", "strong")
    put_kind(tmp_path, KD, "resnet20", "xx--------", "strong")
    assert "Its gain on the student in top-1 is +10.00 points" in report_text(tmp_path)
    drawn = []
    monkeypatch.setattr(plots, "_png", drawn.append)
    plots.top1_plot(results.read(tmp_path))
    texts = {text.get_text(): text.get_ha() for text in drawn[0].axes[0].texts}
    assert {texts["teacher"], texts["student"]} == {"left", "right"}  # apart, though at the same place
    order = ["teacher_resnet56_strong", "student_resnet20_strong", "distillation_resnet20_strong"]
    assert list(results.read(tmp_path)) == order


# Sentences


def facts_of(folder):
    rows = results.read(folder)
    return findings.findings(rows, statistics.judge(rows, statistics.student_pairs(rows)))


def test_findings_without_images(tmp_path):
    put(tmp_path, "teacher", 99.0)
    put(tmp_path, STUDENT, 50.0)
    put(tmp_path, "distillation_KMJ0", 51.6)
    put(tmp_path, "distillation_KMJ1", 1.0)
    text = report_text(tmp_path).partition("## What it shows")[2]
    assert "(3) by mean top-1: distillation_KMJ0, 51.60 %" in text
    assert "Its gain on the student in top-1 is +1.60 points." in text and "That is one seed" in text
    assert "flatters" in text and "test images are few" not in text


def test_findings_with_images(tmp_path):
    for seed in range(2):
        put_images(tmp_path, STUDENT, "xxxxxxx---------------", seed)
        put_images(tmp_path, LDH6, "xxxxxxxxxxxxxxxxxxxxxx", seed)
        put_images(tmp_path, KD, "xxxxxxxx--------------", seed)
        put_images(tmp_path, "distillation_KMJ0", "----------------------", seed)
    facts = " ".join(facts_of(tmp_path))
    assert (
        "is +68.18 points (95 % interval +" in facts and "beyond noise (p 0.0002 after Holm)" in facts
    )  # 3 * 2 / 2^15
    assert f"Above the student beyond noise: {LDH6}." in facts
    assert "Below the student beyond noise: distillation_KMJ0." in facts  # 2 * 2 / 2^7
    assert "Not told from the student by these test images and seeds: distillation." in facts


def test_what_few_images_can_show(tmp_path):
    right = np.arange(297) < 280
    data = {**DIGITS, "test_fingerprint": "digits"}
    put(tmp_path, STUDENT, None, dataset="digits", data=data, right=right)
    put(tmp_path, KD, None, dataset="digits", data=data, right=right)
    (fact,) = [fact for fact in facts_of(tmp_path) if "are few" in fact]
    assert "297 test images are few: one image is 0.34 points" in fact
    assert "less than 6 images, 2.02 points" in fact and "as one of" not in fact  # 2 / 2^6 < 0.05 < 2 / 2^5
    put(tmp_path, LDH6, None, dataset="digits", data=data, right=right)
    (fact,) = [fact for fact in facts_of(tmp_path) if "are few" in fact]
    assert "as one of 2 differences, by less than 7, 2.36 points" in fact  # 2 * 2 / 2^7 < 0.05


def test_findings_where_nothing_gains(tmp_path):
    put(tmp_path, "teacher", 60.0)
    assert facts_of(tmp_path) == ["Only the teacher ran: there is nothing to compare it with."]
    put(tmp_path, STUDENT, 50.0)
    assert "No distilled row ran, so there is no gain to tell." in facts_of(tmp_path)
    put(tmp_path, KD, 49.0)
    facts = facts_of(tmp_path)
    assert facts[-1] == "No distilled row is above the student on hard labels alone."


def put_claimed(folder, more=(), seeds=2):
    """All rows: of 400 images the student has 100 right, LDH6 160, and each other 130, or as many as `more` says."""
    right = dict.fromkeys(RECIPES, 130) | {STUDENT: 100, LDH6: 160} | dict(more)
    for job, count in right.items():
        for seed in range(seeds):
            put_images(folder, job, "x" * count + "-" * (400 - count), seed)
    return claims_of(folder)


def claims_of(folder):
    rows = results.read(folder)
    return findings.claims(rows, statistics.judge(rows, [*statistics.student_pairs(rows), *findings.claim_pairs(rows)]))


def test_claims_that_hold(tmp_path):
    found = put_claimed(tmp_path)
    assert [claim.verdict for claim in found] == ["yes", "yes", "yes", "yes"]
    assert len(found[0].evidence) == 7 and len(found[3].evidence) == 11
    assert found[0].evidence[0].startswith("distillation_LDH against student: +7.50 points (95 % interval +")
    assert "2 seeds, p <0.0001 after Holm, beyond noise" in found[0].evidence[0]
    text = report_text(tmp_path, with_claims=True)
    assert "**distillation_LDH6 is the best of the students: yes.**\n\n- student against distillation_LDH6: -15" in text


def test_claims_that_do_not_hold(tmp_path):
    found = put_claimed(tmp_path, {"distillation_LDH": 60, "distillation_LDH9": 220, "distillation_KMJ0": 200})
    assert [claim.verdict for claim in found] == ["no", "no", "no", "no"]


def test_claims_that_are_not_settled(tmp_path):
    found = put_claimed(tmp_path, {"distillation_LDH": 101, "distillation_LDH9": 161})
    assert [claim.verdict for claim in found] == ["not settled", "not settled", "yes", "not settled"]
    for path in tmp_path.glob("distillation_KMJ0_*.json"):
        path.unlink()
    claim = claims_of(tmp_path)[2]
    assert claim.verdict == "not settled"
    assert claim.evidence[-1] == "no run to compare with distillation: distillation_KMJ0"


@pytest.mark.parametrize("more", [{}, {"distillation_LDH": 60, "distillation_LDH9": 220, "distillation_KMJ0": 200}])
def test_one_seed_settles_no_claim(tmp_path, more):
    found = put_claimed(tmp_path, more, seeds=1)
    assert [claim.verdict for claim in found] == ["not settled"] * 4
    assert found[0].evidence[0].endswith(", 1 seed, not judged")


def test_a_row_of_one_seed_settles_a_claim_where_others_tell_how_far_seeds_lie_apart(tmp_path):
    put_claimed(tmp_path)
    (tmp_path / "distillation_KMJ2_seed1.json").unlink()
    assert claims_of(tmp_path)[1].verdict == "yes"


def test_claims_are_judged_as_the_table_judges(tmp_path):
    found = put_claimed(tmp_path, {"distillation_LDH": 109, KD: 109})
    (p,) = {row["p"] for name, row in rows_of_text(report_text(tmp_path, with_claims=True)).items() if name == KD}
    assert f"p {p} after Holm" in found[0].evidence[0] and f"p {p} after Holm" in found[3].evidence[0]


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("initial weights", {"weights": "imagenet"}),
        ("precision", {"precision": "fp32"}),
        ("augmentation", {"augment": True}),
        ("training images", {"data": {**TEN, "test_images": 400, "train_images": 80, "val_images": 10}}),
        ("epochs", {"epochs": 20}),
        ("batches", {"recipe": {**described(RECIPES[LDH6]), "batch_size": 8}}),
    ],
)
def test_what_was_trained_otherwise_settles_no_claim(tmp_path, what, more):
    put_claimed(tmp_path)
    right = np.arange(400) < 160
    options = {"dataset": "folder", "data": {**TEN, "test_images": 400}, "right": right}
    for seed in range(2):
        put(tmp_path, LDH6, None, seed, **{**options, **more})
    above, best, *_ = claims_of(tmp_path)
    assert (above.verdict, best.verdict) == ("not settled", "not settled")
    assert f"not trained as student was, so not compared with it: {LDH6} ({what})" in above.evidence


def test_students_of_another_teacher_settle_no_claim(tmp_path):
    put_claimed(tmp_path)
    options = {"dataset": "folder", "data": {**TEN, "test_images": 400}, "right": np.arange(400) < 160}
    for seed in range(2):
        put(tmp_path, LDH6, None, seed, teacher={"sha256": "another"}, **options)
    above, best, *_ = claims_of(tmp_path)
    assert (above.verdict, best.verdict) == ("yes", "not settled")  # the student alone has no teacher


def test_shortened_rows_in_proportion_settle_claims(tmp_path):
    put_claimed(tmp_path)
    options = {"dataset": "folder", "data": {**TEN, "test_images": 400}}
    right = dict.fromkeys(RECIPES, 130) | {STUDENT: 100, LDH6: 160}
    for job, row in RECIPES.items():
        for seed in range(2):
            epochs = max(1, round(row.epochs * 3 / 50))
            put(tmp_path, job, None, seed, epochs=epochs, right=np.arange(400) < right[job], **options)
    assert [claim.verdict for claim in claims_of(tmp_path)] == ["yes"] * 4


def test_claims_where_nothing_is_to_compare_with(tmp_path):
    put(tmp_path, KD, 60.0)
    assert [claim.verdict for claim in claims_of(tmp_path)] == ["not settled"] * 4


# Plots


def test_plots(tmp_path):
    put(tmp_path, STUDENT, 59.0, epochs=1)  # a single run of a single epoch
    written = report.write(tmp_path)
    assert [path.name for path in written] == ["RESULTS.md", "results.csv", "top1.png", "curves.png"]
    few = imread(tmp_path / "top1.png").shape
    for job, row in RECIPES.items():
        for seed in range(2):
            put(tmp_path, job, row.reference.top1 + seed, seed, val={"val_loss": 2.0, "val_top1": 50.0})
    put(tmp_path, KD, 60.0, name="$x_$" + "long " * 20)
    report.write(tmp_path)
    many, curves = imread(tmp_path / "top1.png"), imread(tmp_path / "curves.png")
    assert few[1] == many.shape[1] == curves.shape[1] == 1200
    assert few[0] < many.shape[0] and curves.shape[0] == 1100
    assert many.std() > 0.1 and curves.std() > 0.05  # something is drawn
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_top1_is_shown_around_the_rows_that_lie_together(tmp_path):
    put(tmp_path, STUDENT, 64.0, dataset="folder")
    put(tmp_path, KD, 66.0, dataset="folder")
    put(tmp_path, "teacher", 67.0, dataset="folder")
    low, high = plots._shown_range(results.read(tmp_path))
    assert 60 < low < 63 and 68 < high < 70
    put(tmp_path, "teacher", 90.0, dataset="folder")
    low, high = plots._shown_range(results.read(tmp_path))
    assert 60 < low < 63 and 67 < high < 70
    put(tmp_path, KD, 72.0, seed=1, dataset="folder")  # two seeds' interval is 38 points long to each side
    low, high = plots._shown_range(results.read(tmp_path))
    assert 54 < low < 63 and 72 < high < 82


def test_the_best_student_is_never_off_the_axis(tmp_path):
    for job in RECIPES:
        put(tmp_path, job, 60.0, dataset="folder")
    put(tmp_path, LDH6, 80.0, dataset="folder")
    put(tmp_path, KD, 1.0, dataset="folder")  # a row that is dead
    low, high = plots._shown_range(results.read(tmp_path))
    assert 40 < low < 60 and 80 < high < 90


def test_the_references_diamonds_are_only_beside_its_own_data(tmp_path):
    put(tmp_path, STUDENT, 59.0)
    assert plots._reference(results.read(tmp_path), STUDENT) == 59.22
    put(tmp_path, STUDENT, 59.0, data={**CIFAR, "train_images": 49000, "val_images": 1000})
    assert plots._reference(results.read(tmp_path), STUDENT) is None


def test_each_row_has_a_look_of_its_own(tmp_path):
    for job in RECIPES:
        put(tmp_path, job, 60.0)
    for soft in ("rkd", "crd"):
        put(tmp_path, f"row_{soft}", 60.0, recipe={**described(RECIPES[STUDENT]), "soft": soft})
    looks = plots._looks(results.read(tmp_path))
    assert len({look.colour for look in looks.values()}) == len(looks) == 15
    families = {LDH6: {LDH6, "distillation_LDH5", "distillation_LDH9", "distillation_LDH10"}, "row_rkd": {"row_rkd"}}
    for name, family in families.items():  # told apart without colours: by marks, and within a family by line styles
        assert {other for other, look in looks.items() if look.mark == looks[name].mark} == family
        assert len({looks[other].style for other in family}) == len(family)


def test_curves_are_means_over_seeds(tmp_path):
    runs = [Result.read(put(tmp_path, STUDENT, 59.0, seed, epochs=2 + seed)) for seed in range(2)]
    runs[1].epochs[0]["train_loss"] = 8.0
    assert plots._mean_curve(runs, "train_loss") == [6.0, 2.0]


def test_learning_rate_drops(tmp_path):
    run = Result.read(put(tmp_path, STUDENT, 59.0, epochs=3))
    run.epochs[2]["learning_rate"] = 0.0001
    assert plots._drops(results.Rows({STUDENT: {0: run}})) == [2.5]
    run.recipe["schedule"] = "cosine"  # falls at every step: no lines over the whole plot
    assert plots._drops(results.Rows({STUDENT: {0: run}})) == []
