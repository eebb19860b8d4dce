"""The suites: their runs, their table against figures worked out by hand, their plots, and one suite run for real."""

import json
import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from as_processes import thin
from matplotlib.image import imread
from test_report import CIFAR, TEN, put
from test_scripts import refused

import checkpoint
import losses
import models
import report
from losses import LOSSES
from recipes import RECIPES, Claim, described, under
from report import plots, results, suite
from util import runtime
from zoo import suites
from zoo.suites import SUITES

CLAIM = {"top1": 70.0, "source": "A paper", "epochs": 240}


# What they are


@pytest.mark.parametrize("name", SUITES)
def test_the_runs_are_recipes(name):
    for recipe in SUITES[name].runs.values():
        losses.settings_of(recipe)
        assert losses.alpha_schedule(recipe.alpha, 3, 2).shape == (3, 2)
    assert list(SUITES[name].runs)[0] == "student" and list(SUITES[name].runs)[1].startswith("kd")


def test_each_run_has_a_name_of_its_own():
    found = [
        suites.run_of(recipe, name, run, suites.label(name, networks, training)).job
        for name, entry in SUITES.items()
        for networks, training in {((), entry.training or "reference"), (("vgg13", "vgg8"), "strong")}
        for run, recipe in entry.runs.items()
    ]
    assert len({*found, *RECIPES}) == len(found) + len(RECIPES)
    assert {"benchmark_dkd", "losses_mse_vgg13_vgg8_strong", "schedules_kd_per_epoch_descending"} <= {*found}


def test_labels():
    assert suites.label("benchmark", ("resnet56", "resnet20"), "benchmark") == "benchmark"
    assert suites.label("losses", (None, None), "reference") == "losses"
    assert suites.label("losses", (None, "timm:vit_tiny"), "benchmark") == "losses_timm_vit_tiny_benchmark"


def test_every_loss_is_in_the_losses_once():
    runs = SUITES["losses"].runs
    assert {recipe.soft for recipe in runs.values()} == {None, *LOSSES} and len(runs) == 1 + len(LOSSES)


def test_claims_are_the_benchmarks_alone():
    kd = SUITES["benchmark"].runs["kd"]
    assert suites.run_of(kd, "benchmark", "kd", "benchmark").claimed == Claim(70.66, "Tian et al. 2020, table 1", 240)
    assert suites.run_of(kd, "losses", "kd", "losses").claimed is None
    assert {*SUITES["benchmark"].runs} == {*suites.CLAIMS} - {"teacher"}


# The table


def put_run(folder, loss, top1, seed=0, **more):
    """One run of the benchmark: its row is named by the loss and, where it is a schedule, by alpha."""
    alpha = more.pop("alpha", 0.7)
    recipe = under(replace(RECIPES["student"], soft=loss, alpha=alpha), "benchmark")
    name = f"{loss or 'student'}_{alpha}" if isinstance(alpha, str) else loss or "student"
    values = {**described(recipe), "arch": "resnet20", **more.pop("recipe", {})}
    defaults = {"data": CIFAR, "suite": "benchmark", "claimed": CLAIM, "peak_memory": 3 << 20, "augment": True}
    return put(folder, f"benchmark_{name}", top1, seed, recipe=values, **{**defaults, **more})


def rows_of(folder):
    """The first table of SUITE.md: loss -> column -> cell."""
    text = suite.markdown(suite.suites_of(results.read(folder)))
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line[1:-1]] for line in lines]
    return text, {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def test_the_table(tmp_path):
    for seed, more in enumerate([0.0, 1.0, 2.0]):
        put_run(tmp_path, None, 60 + more, seed, val={"seconds": 7.82})
        put_run(tmp_path, "kd", 62 + more, seed, val={"seconds": 15.64})
        put_run(tmp_path, "crd", 63 + 2 * more, seed, val={"seconds": 31.28}, extra_parameters=16640)
    text, rows = rows_of(tmp_path)
    assert list(rows) == ["student alone", "kd", "crd"]
    # 50,000 images are 782 batches of 64. Of 3, 4, 5 against the student, 1, 2, 3 against kd. Rows and seeds leave
    # squares of 4/3 and 4 degrees of freedom: 4 ± 2.7764 sqrt(1/3 2/3), of the one spread in both columns.
    assert rows["crd"] == {
        "loss": "crd",
        "claimed": "70.00 (A paper)",
        "top-1": "65.00 ± 2.00",
        "seeds": "3",
        "epochs": "240",
        "to the claim": "-5.00",
        "to the student alone": "+4.00 [+2.69, +5.31]",
        "to kd": "+2.00 [+0.69, +3.31]",
        "cost, kd's is 1": "1.05",
        "parameters of the loss": "16,640",
    }
    assert rows["student alone"]["cost, kd's is 1"] == "0.99" and rows["kd"]["to kd"] == ""
    assert "fewer epochs" not in text and "trained otherwise" not in text
    assert "- Training: benchmark, 240 epochs, batches of 64, learning rate 0.05, random crop and flip\n" in text


@pytest.mark.parametrize("more", [{"recipe": {"arch": "vgg8"}}, {"recipe": {"batch_size": 128}}, None])
def test_cost_is_told_where_it_was_measured_alone(tmp_path, monkeypatch, more):
    """For another student or batch, and where the benchmark is not beside the report, the plot has top-1 alone."""
    if more is None:
        monkeypatch.setattr(suite, "COSTS", tmp_path / "none.json")
    suite.measured_costs.cache_clear()
    for loss in (None, "kd"):
        put_run(tmp_path, loss, 60.0, **(more or {}))
    text, rows = rows_of(tmp_path)
    suite.measured_costs.cache_clear()
    assert "cost, kd's is 1" not in rows["kd"] and "no table" in text and "loss_cost.py" not in text
    assert "(benchmark_top1.png)" in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_differences_are_tested(tmp_path, seeds):
    data = {**TEN, "test_images": 20}
    for seed in range(seeds):
        for loss, count in ((None, 4), ("kd", 10), ("dkd", 11)):
            put_run(tmp_path, loss, None, seed, data=data, right=np.arange(20) < count, dataset="folder")
    text, rows = rows_of(tmp_path)
    cells = [rows["kd"]["to the student alone"], rows["dkd"]["to the student alone"], rows["dkd"]["to kd"]]
    if seeds == 1:  # what the images say, and no judgement
        ps = ["over images, McNemar p 0.0312", "over images, McNemar p 0.0156", "over images, McNemar p 1.0000"]
        assert "over test images, one seed" in text and "Holm" not in text
    else:  # 2 / 2^6, 2 / 2^7 and 1, by Holm over all three
        ps = ["p 0.0625", "p 0.0469", "p 1.0000"]
        assert "Holm's correction over all 3 differences" in text
    assert [cell.partition("] " if seeds == 1 else "], ")[2] for cell in cells] == ps


def test_a_difference_has_one_answer_in_all_columns(tmp_path):
    rng = np.random.default_rng(0)
    data = {"dataset": "folder", "data": {**TEN, "test_images": 200}}
    for seed in range(2):
        for loss, alpha in ((None, 0.7), ("kd", 0.7), ("kd", "per epoch"), ("dkd", 0.7), ("dkd", "per epoch")):
            put_run(tmp_path, loss, None, seed, alpha=alpha, right=rng.random(200) < 0.5, **data)
    (found,), cells = suite.suites_of(results.read(tmp_path)), rows_of(tmp_path)[1]
    assert len({each.spread for each in found.judged.values()}) == 1
    assert cells["kd, per epoch"]["to kd"] == cells["kd, per epoch"]["to its constant"] != ""
    # Four to the student, three to kd, and dkd's schedule to its constant; the same pair in two columns is one.
    assert len(found.judged) == 8 and "over all 8 differences" in rows_of(tmp_path)[0]


def test_shortened_runs_are_marked_and_not_compared_with_whole_ones(tmp_path):
    put_run(tmp_path, None, 69.0)
    put_run(tmp_path, "kd", 70.0)
    put_run(tmp_path, "rld", 71.0)
    put_run(tmp_path, "dkd", 65.0, epochs=60)
    put_run(tmp_path, "at", 65.0, epochs=60, claimed=None)
    text, rows = rows_of(tmp_path)
    assert (
        rows["dkd"]["epochs"] == "60 of 240" and rows["at"]["epochs"] == "60 of 240" and rows["kd"]["epochs"] == "240"
    )
    assert (rows["rld"]["to kd"], rows["dkd"]["to kd"], rows["dkd"]["to the student alone"]) == ("+1.00", "", "")
    assert "**Trained for fewer epochs than what is claimed: dkd.**" in text
    assert "Not compared with kd, as they were trained otherwise: at (training), dkd (training)." in text


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("teacher", {"teacher": {"sha256": "another"}}),
        ("training images", {"data": {**CIFAR, "train_images": 25000, "val_images": 25000}}),
        ("precision", {"precision": "fp32"}),
        ("batch norm", {"batch_norm": "each process's part"}),
        ("stem", {"stem": "standard"}),
        ("initial weights", {"weights": "imagenet"}),
        ("augmentation", {"augment": False}),
        ("network", {"recipe": {"arch": "resnet32"}}),
        ("training", {"recipe": {"weight_decay": 1e-4}}),
        ("seeds", {"seed": 1}),
    ],
)
def test_what_was_trained_otherwise_is_not_compared(tmp_path, what, more):
    put_run(tmp_path, None, 69.0)
    put_run(tmp_path, "kd", 70.0)
    put_run(tmp_path, "dkd", 71.0, **more)
    text, rows = rows_of(tmp_path)
    assert "to kd" not in rows["dkd"] and f"Not compared with kd, as they were trained otherwise: dkd ({what})." in text
    # A teacher is nothing that the student alone could have in common with it.
    assert bool(rows["dkd"]["to the student alone"]) == (what == "teacher")


def test_a_row_whose_own_seeds_were_not_trained_alike_is_told(tmp_path):
    put_run(tmp_path, "kd", 70.0)
    put_run(tmp_path, "dkd", 65.0, epochs=30)
    put_run(tmp_path, "dkd", 71.0, seed=1)
    text, rows = rows_of(tmp_path)
    assert rows["dkd"]["to the claim"] == "" and rows["kd"]["to the claim"] == "+0.00"
    assert "**Not trained alike in all of its own seeds: dkd.**" in text


def test_a_shorter_run_has_no_gain_in_the_map_of_schedules(tmp_path, monkeypatch):
    put_run(tmp_path, "kd", 60.0)
    put_run(tmp_path, "kd", 50.0, alpha="cosine", epochs=30)
    drawn = []
    monkeypatch.setattr(plots, "_png", drawn.append)
    plots.schedules_plot(*suite.suites_of(results.read(tmp_path)))
    assert drawn[0].axes[0].images[0].get_array().filled(-1).tolist() == [[0, -1]]


def test_what_is_said_in_two_ways_is_alike(tmp_path):
    put_run(tmp_path, "kd", 70.0, teacher={"sha256": "ab", "normalisation": None})
    put_run(tmp_path, "dkd", 71.0, weights="none")  # of an older version, and --weights none as given
    assert rows_of(tmp_path)[1]["dkd"]["to kd"].startswith("+1.00")


def test_each_seed_may_have_a_teacher_of_its_own(tmp_path):
    for seed in (0, 1):
        put_run(tmp_path, "kd", 70.0, seed, teacher={"sha256": f"of seed {seed}"})
    put_run(tmp_path, "dkd", 71.0, teacher={"sha256": "of seed 0"})
    assert rows_of(tmp_path)[1]["dkd"]["to kd"].startswith("+1.00")


def test_claims_stand_beside_cifar100_only(tmp_path):
    put_run(tmp_path, "kd", 62.0, dataset="digits", data={**CIFAR, "test_images": 297})
    text, rows = rows_of(tmp_path)
    assert "claimed" not in rows["kd"] and "A paper" not in text and "check of the pipeline" in text
    assert "Nothing is compared with the student alone, which did not run." in text


def test_without_a_constant_kd_nothing_is_compared_with_it(tmp_path):
    put_run(tmp_path, "kd", 62.0, alpha="cosine")
    assert "Nothing is compared with kd with a constant alpha, which did not run." in rows_of(tmp_path)[0]


def test_a_claim_of_the_best_epoch_is_told(tmp_path):
    put_run(tmp_path, "kd", 70.0)
    assert "best epoch" not in rows_of(tmp_path)[0]
    put_run(tmp_path, "dkd", 71.0, claimed={**CLAIM, "best": True})
    text, rows = rows_of(tmp_path)
    assert rows["dkd"]["claimed"] == "70.00, best epoch (A paper)" and rows["kd"]["claimed"] == "70.00 (A paper)"
    assert "- best epoch: claimed of the epoch that is best on the test images; measured of the last." in text


def test_settings(tmp_path):
    put_run(tmp_path, "dkd", 62.0, recipe={"T": 4.0, "nckd": 2.0, "weight": 0.5})
    assert "- Settings: dkd (alpha 0.7, T 4.0, nckd 2.0, weight 0.5)." in rows_of(tmp_path)[0]


def test_a_suite_of_its_teacher_alone_has_no_table_yet(tmp_path):
    """As where it is stopped after the teacher."""
    put(tmp_path, "teacher", 75.0, suite="losses")
    assert [path.name for path in report.write(tmp_path)] == ["results.csv"]


def test_suites_stand_apart(tmp_path):
    put(tmp_path, "student", 59.0)
    put_run(tmp_path, "kd", 60.0)
    put_run(tmp_path, "dkd", 60.0, suite="losses")
    put_run(tmp_path, None, 72.0, suite="losses", recipe={"network": "teacher", "arch": "resnet56"})
    found = suite.suites_of(results.read(tmp_path))
    assert [(each.name, [each.label(row) for row in each]) for each in found] == [
        ("benchmark", ["kd"]),
        ("losses", ["teacher", "dkd"]),
    ]
    names = {path.name for path in report.write(tmp_path)}
    assert names == {"RESULTS.md", "results.csv", "top1.png", "curves.png", "SUITE.md"} | {
        "benchmark_cost.png",
        "losses_cost.png",
    }
    assert "dkd" not in (tmp_path / "RESULTS.md").read_text()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5


def test_a_folder_of_suites_alone(tmp_path):
    put_run(tmp_path, "kd", 60.0)
    assert {path.name for path in report.write(tmp_path)} == {"results.csv", "SUITE.md", "benchmark_cost.png"}
    with pytest.raises(runtime.UserError, match="leave --claims off"):
        report.write(tmp_path, with_claims=True)


# The plots


def test_names_in_the_plot_do_not_overlap(tmp_path, monkeypatch):
    for i, loss in enumerate([None, *LOSSES]):
        put_run(tmp_path, loss, 65 + 0.02 * i if loss else 60, val={"seconds": 15 + 0.01 * i if loss else 9})
    drawn = []
    monkeypatch.setattr(plots, "_png", drawn.append)
    (found,) = suite.suites_of(results.read(tmp_path))
    plots.cost_plot(found)
    axes = drawn[0].axes[0]
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert {*boxes} == {"student alone", *LOSSES}
    for name, box in boxes.items():
        assert not box.count_overlaps([other for key, other in boxes.items() if key != name])
        assert axes.get_window_extent().count_contains(box.corners()) == 4


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_map_of_schedules(tmp_path, monkeypatch, seeds):
    right = np.arange(20) < 10
    data = {"dataset": "folder", "data": {**TEN, "test_images": 20}}
    for seed in range(seeds):
        put_run(tmp_path, "kd", None, seed, right=right, **data)
        put_run(tmp_path, "kd", None, seed, right=np.arange(20) < 17, alpha="per epoch", **data)
        put_run(tmp_path, "dkd", None, seed, right=right, alpha="cosine", **data)
        put_run(tmp_path, "dkd", None, seed, right=right, alpha="per epoch", **data)
    drawn = []
    monkeypatch.setattr(plots, "_png", drawn.append)
    (found,) = suite.suites_of(results.read(tmp_path))
    plots.schedules_plot(found)
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["constant 0.7", "cosine", "per epoch"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["kd", "dkd"]
    texts = {text.get_position(): text for text in axes.texts}
    assert {*texts} == {(0, 0), (2, 0), (1, 1), (2, 1)}
    # 100 sqrt(0.85 * 0.15 / 20)
    assert texts[2, 0].get_text() == ("85.00\n± 7.98 (one run)" if seeds == 1 else "85.00\n± 0.00")
    # Three times 2 / 2^7; one seed is not judged.
    assert texts[2, 0].get_weight() == ("bold" if seeds == 2 else "normal") and texts[0, 0].get_weight() == "normal"
    assert ("bold" in axes.get_xlabel()) == (seeds == 2)
    values = axes.images[0].get_array()
    assert values.filled(-1).tolist() == [[0, -1, pytest.approx(35)], [-1, -1, -1]]
    # The table tells the same.
    text, rows = rows_of(tmp_path)
    cells = {row: cells["to its constant"] for row, cells in rows.items()}
    assert cells.pop("kd, per epoch").startswith("+35.00 [") and {*cells.values()} == {""}
    told = "], p 0.0469" if seeds == 2 else "] over images, McNemar p 0.0156"
    assert rows["kd, per epoch"]["to its constant"].endswith(told)
    assert "- to its constant: to the row of the same loss with a constant alpha." in text


def test_plots_are_files(tmp_path):
    put_run(tmp_path, "kd", 60.0)
    put_run(tmp_path, "kd", 61.0, alpha="per epoch")
    assert [path.name for path in report.write(tmp_path)][-1] == "benchmark_schedules.png"
    assert imread(tmp_path / "benchmark_schedules.png").shape[1] == 1200


# For real


def test_a_suite_from_beginning_to_end(script, small, tmp_path, monkeypatch):
    thin(monkeypatch.setattr)
    teacher = tmp_path / "my_teacher.pth"
    checkpoint.save(models.build("teacher", 4), teacher)
    command = ["reproduce.py", *small, "--suite", "losses", "--jobs", "fitnet", "student", "kd", "mse"]
    command += ["--teacher", teacher, "--epochs", 1, "--batch_size", 20, "--seeds", 1, 0]
    ran = script(*command)
    assert ran.code == 0, ran.err
    titles = [line for line in ran.err.splitlines() if line.endswith(": 1 epochs")]
    jobs = ["losses_student", "losses_kd", "losses_mse", "losses_fitnet"]
    assert titles == [f"{job}, seed {seed}: 1 epochs" for seed in (1, 0) for job in jobs]
    folder = tmp_path / "results" / "folder"
    found = {job: json.loads((folder / f"{job}_seed0.json").read_text()) for job in jobs}
    assert {run["suite"] for run in found.values()} == {"losses"} and found["losses_kd"]["claimed"] is None
    assert [run["extra_parameters"] > 0 for run in found.values()] == [False, False, True, True]
    assert all(run["peak_memory"] > 1 << 20 for run in found.values())
    text = (folder / "SUITE.md").read_text()
    assert "| student alone |" in text and "| fitnet |" in text and not (folder / "RESULTS.md").exists()
    assert script(*command).err.count("finished already") == 8


def test_a_suites_teacher_is_trained_where_there_is_none(script, small, tmp_path, monkeypatch):
    thin(monkeypatch.setattr)
    command = ["reproduce.py", *small, "--suite", "schedules", "--jobs", "kd_per_epoch"]
    command += ["--weights", "none", "--epochs", 1, "--batch_size", 20]
    ran = script(*command)
    assert ran.code == 0 and "teacher, seed 0: 2 epochs" in ran.err, ran.err
    assert json.loads((tmp_path / "results/folder/teacher_seed0.json").read_text())["suite"] == "schedules"
    ran = script(*command)
    assert ran.code == 0 and "teacher, seed 0" not in ran.err


def test_a_suite_goes_on_after_a_run_that_diverges(script, small, monkeypatch):
    thin(monkeypatch.setattr)
    runs = {"student": replace(RECIPES["student"], learning_rate=1e30), "other": RECIPES["student"]}
    monkeypatch.setitem(SUITES, "losses", replace(SUITES["losses"], runs=runs))
    ran = script("reproduce.py", *small, "--suite", "losses", "--epochs", 1, "--batch_size", 20)
    assert ran.code == 1 and "losses_other, seed 0: 1 epochs" in ran.err and "teacher" not in ran.err
    assert ran.err.splitlines()[-1].startswith("reproduce.py: error: training diverged: losses_student, seed 0;")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--jobs", "nonsense"], ["there is no nonsense", "reviewkd"]),
        (["--training", "strong"], ["--training", "the suite benchmark has its own (benchmark)"]),
        (["--student_arch", "vgg8"], ["--student_arch", "resnet20"]),
        (["--scheduler_step", "3"], ["--scheduler_step", "leave the flag away"]),
    ],
)
def test_bad_flags(script, flags, words):
    refused(script("reproduce.py", "--suite", "benchmark", *flags), *words)


def test_a_teacher_that_is_there_is_not_to_be_trained(script, small_teacher):
    ran = script("reproduce.py", "--teacher", small_teacher, "--jobs", "teacher", "student")
    refused(ran, "--teacher and --jobs teacher")


def test_what_a_training_can_not_have_is_left_out_and_named(script, small, tmp_path):
    checkpoint.save(models.build("resnet20", 3), tmp_path / "other.pth")  # of other classes, which is found out later
    teacher = ["--teacher", tmp_path / "other.pth", "--teacher_arch", "resnet20"]
    command = ["reproduce.py", *small, "--suite", "losses", "--training", "strong", *teacher]
    ran = script(*command)
    assert ran.code == 2 and "left out: losses_crd_resnet20_strong: crd remembers" in ran.err
    refused(script(*command, "--jobs", "crd"), "losses_crd_resnet20_strong: crd remembers")


def test_what_a_pair_can_not_have_is_left_out_and_named(script, small, tmp_path, monkeypatch):
    """The runs after it are made, and the table has them."""
    some = {name: SUITES["losses"].runs[name] for name in ("student", "at", "sp")}
    monkeypatch.setitem(SUITES, "losses", replace(SUITES["losses"], runs=some))
    networks = ["--teacher_arch", "resnet8x4", "--student_arch", "vgg8"]
    command = ["reproduce.py", *small, "--suite", "losses", *networks, "--weights", "none", "--epochs", 1]
    ran = script(*command)
    assert ran.code == 0, ran.err
    assert "left out: losses_at_resnet8x4_vgg8: this loss compares stage by stage" in ran.err
    table = (tmp_path / "results" / "folder" / "SUITE.md").read_text()
    assert "| sp |" in table and "| at |" not in table
    again = script(*command, "--jobs", "sp", "at")
    assert again.code == 2 and "epochs" not in again.err and "this loss compares stage by stage" in again.err


def test_peak_memory():
    device = torch.device("cpu")
    runtime.begin_peak_memory(device)
    before = runtime.peak_memory(device)
    with mmap.mmap(-1, 50 << 20) as held:  # of the system, as torch's allocator may have some left
        held.write(bytes(1 << 20) * 50)
    assert 40 << 20 < runtime.peak_memory(device) - before < 200 << 20
