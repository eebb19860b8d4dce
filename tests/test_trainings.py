"""The ways to train: learning rates, optimisers, mixed images and labels, and what a run says of it all."""

import argparse
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from as_processes import thin
from test_processes import One
from test_scripts import refused, script_of

import checkpoint
import cli
import data
import engine
import jobs
import losses
import models
import recipes
import reproduce
import teacher as teachers
from data import Batches, Split
from outputs import Outputs
from recipes import RECIPES, TRAININGS, under
from teacher import Teacher
from util import mixing, runstate
from util.mixing import Mixing
from util.runtime import Runtime, UserError
from zoo import logit_losses

CPU = torch.device("cpu")
NEW = ["benchmark", "strong"]


def rates(recipe, iterations=1):
    rate = jobs.learning_rate(recipe, iterations)
    return [rate(epoch, i) for epoch in range(recipe.epochs) for i in range(iterations)]


def student(training, **changes):
    return recipes.replace(under(RECIPES["student"], training), **changes)


# learning rates and optimisers


def test_the_benchmarks_learning_rate():
    given = rates(student("benchmark"), iterations=2)
    expected = [0.05] * 150 + [5e-3] * 30 + [5e-4] * 30 + [5e-5] * 30
    assert given == pytest.approx([rate for rate in expected for _ in range(2)])


@pytest.mark.parametrize(
    "epochs, milestones",
    [(240, [150, 180, 210]), (24, [15, 18, 21]), (5, [3, 4, 4]), (1, [1, 1, 1]), (480, [300, 360, 420])],
)
def test_milestones_scale(epochs, milestones):
    recipe = student("benchmark", epochs=epochs)
    assert recipes.milestones(recipe) == milestones
    assert rates(recipe)[0] == 0.05
    falls = [sum(epoch >= m for m in milestones) for epoch in range(epochs)]
    assert rates(recipe) == pytest.approx([0.05 * 0.1**n for n in falls])


@pytest.mark.parametrize(
    "network, rate",
    [("mobilenetv2", 0.01), ("shufflenetv1", 0.01), ("shufflenetv2", 0.01), ("mobilenet_v3_small", 0.01),
     ("shufflenet_v2_x1_0", 0.01), ("resnet20", 0.05), ("vgg8", 0.05), ("teacher", 0.05)],
)  # fmt: skip
def test_mobile_networks_are_trained_more_slowly(network, rate):
    recipe = recipes.replace(RECIPES["student"], arch=network)
    assert under(recipe, "benchmark").learning_rate == rate
    assert under(recipe, "strong").learning_rate == 0.1


def test_warm_up_and_cosine():
    given = rates(student("strong"), iterations=10)
    assert len(given) == 2000
    assert given[:50] == pytest.approx([0.1 * (k + 1) / 50 for k in range(50)])
    after = [0.05 * (1 + np.cos(np.pi * k / 1950)) for k in range(1950)]
    assert given[50:] == pytest.approx(after) and 0 < given[-1] < 1e-6
    short = rates(student("strong", epochs=20), iterations=10)  # 5 of 200 epochs: half an epoch
    assert short[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1]) and short[5] == 0.1 > short[6]
    assert rates(student("strong", epochs=1)) == [0.1]


def test_the_references_learning_rate_is_as_it_was():
    assert rates(RECIPES["student"], 3) == [0.001 * 0.1 ** (epoch // 20) for epoch in range(50) for _ in range(3)]


@pytest.mark.parametrize("training", NEW)
def test_sgd(training):
    optimiser = jobs.optimiser(student(training))([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimiser, torch.optim.SGD)
    group = optimiser.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, training == "strong", 5e-4)
    assert jobs.optimiser(RECIPES["student"]) is engine.adam


def test_what_a_training_sets():
    assert under(RECIPES["teacher"], "reference") is RECIPES["teacher"]
    benchmark, strong = (under(RECIPES["distillation_KMJ1"], name) for name in NEW)
    assert (benchmark.epochs, benchmark.batch_size) == (240, 64) and (strong.epochs, strong.batch_size) == (200, 128)
    assert benchmark.job == benchmark.checkpoint == "distillation_KMJ1_benchmark"
    assert (benchmark.soft, benchmark.alpha, benchmark.settings) == ("kd", "per epoch", {"T": 2.0})


class Learnt(torch.nn.Module):
    """An objective with a parameter of its own, whose gradient is 0."""

    def __init__(self):
        super().__init__()
        self.own = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, student, teacher, labels, alpha, mixed, gather):
        return {"loss": F.cross_entropy(student.logits, labels) + 0 * self.own}


class Linear(torch.nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(3 * 8 * 8, classes)

    def forward(self, images):
        return Outputs(logits=self.fc(images.flatten(1)))


def fit(recipe, batches, objective):
    network = Linear()
    given = list(
        engine.fit(
            network, batches, objective, alpha=torch.ones(recipe.epochs, len(batches)), runtime=Runtime(CPU, "fp32"),
            learning_rate=jobs.learning_rate(recipe, len(batches)), optimiser=jobs.optimiser(recipe),
        )
    )  # fmt: skip
    return network, given


def test_fit_is_plain_sgd_at_each_steps_learning_rate(digits):
    """Against the formula: v = 0.9 v + g + 5e-4 w; w -= lr (g + 5e-4 w + 0.9 v), of what the loss learns too."""
    recipe, batches, objective = student("strong", epochs=2), few(digits), Learnt()
    network, given = fit(recipe, batches, objective)
    rate, expected = jobs.learning_rate(recipe, 2), Linear()
    weights = [expected.fc.weight, expected.fc.bias, torch.nn.Parameter(torch.tensor(2.0))]
    velocity = [torch.zeros_like(w) for w in weights]
    for epoch in range(2):
        for i, batch in enumerate(batches.epoch(epoch)):
            loss = F.cross_entropy(expected(batch.images).logits, batch.labels) + 0 * weights[2]
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, v, g in zip(weights, velocity, gradients, strict=True):
                    g = g + 5e-4 * w
                    v.mul_(0.9).add_(g)
                    w -= rate(epoch, i) * (g + 0.9 * v)
    torch.testing.assert_close(network.fc.weight, weights[0], rtol=1e-4, atol=1e-6)
    assert objective.own.item() == pytest.approx(weights[2].item(), rel=1e-6) and objective.own.item() < 1.9999
    assert [figures["learning_rate"] for figures in given] == [rate(0, 1), rate(1, 1)]


# mixing


def few(digits, n=70, batch_size=40, **options):
    split = Split(digits.train.images[:n], digits.train.labels[:n])
    return Batches(split, digits.mean, digits.std, batch_size, CPU, shuffle=True, seed=3, **options)


def strong_batches(digits, **options):
    return few(digits, batch_size=16, augment=True, mixing=Mixing(0.2, 1.0), **options)


def same(a, b):
    assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.index.equal(b.index)
    assert a.mixed.labels.equal(b.mixed.labels) and a.mixed.part == b.mixed.part


def test_mixing_comes_from_seed_and_epoch_alone(digits):
    batches = strong_batches(digits)
    expected = list(batches.epoch(3))
    list(batches.epoch(0))
    torch.rand(5), np.random.rand(5)
    for start in (0, 2, 5):
        given = list(strong_batches(digits).epoch(3, start))
        assert len(given) == 5 - start
        for a, b in zip(given, expected[start:], strict=True):
            same(a, b)
    parts = [batch.mixed.part for batch in expected]
    assert len(set(parts)) > 3 and parts != [batch.mixed.part for batch in batches.epoch(4)]
    draw = Mixing(0.2, 1.0).draw
    assert draw(0, 3, 5, 8) == draw(0, 3, 5, 8) != draw(1, 3, 5, 8) and draw(0, 3, 5, 8)[:2] == draw(0, 3, 2, 8)


@pytest.mark.parametrize("mixing", [Mixing(0.2, 0), Mixing(0, 1.0), Mixing(0.2, 1.0)])
def test_images_and_labels_are_mixed_alike(digits, mixing):
    """Element by element, from the same batches unmixed."""
    plain = list(few(digits, batch_size=16, augment=True).epoch(2))
    mixed = list(few(digits, batch_size=16, augment=True, mixing=mixing).epoch(2))
    ways = set()
    for before, after, draw in zip(plain, mixed, mixing.draw(3, 2, 5, 8), strict=True):
        assert after.index.equal(before.index) and after.host_index.equal(before.host_index)
        own, ways = before.images.double().numpy(), ways | {draw.box is None}
        for i in range(len(own)):
            expected, others = own[i].copy(), 0
            for y in range(8):
                for x in range(8):
                    if draw.box is None:
                        expected[:, y, x] = draw.lam * own[i, :, y, x] + (1 - draw.lam) * own[i - 1, :, y, x]
                    elif draw.box[0] <= y < draw.box[1] and draw.box[2] <= x < draw.box[3]:
                        expected[:, y, x], others = own[i - 1, :, y, x], others + 1
            np.testing.assert_allclose(after.images[i].numpy(), expected, rtol=1e-5, atol=1e-5)
            of_own = draw.lam if draw.box is None else 1 - others / 64
            labels = {int(before.labels[i]): of_own, int(before.labels[i - 1]): 1 - of_own}
            if len(labels) == 2:
                assert labels[int(after.mixed.labels[i])] == pytest.approx(after.mixed.part)
                assert labels[int(after.labels[i])] == pytest.approx(1 - after.mixed.part)
            assert 0 <= after.mixed.part <= 0.5
    assert ways == {way for way, alpha in ((True, mixing.mixup), (False, mixing.cutmix)) if alpha}


def test_a_box_takes_its_part_and_is_cut_off_at_the_border():
    assert mixing._cut(0.75, 16, 15, 32) == (0.75, (8, 24, 7, 23))
    assert mixing._cut(0.75, 31, 0, 32) == (1 - 9 * 8 / 32**2, (23, 32, 0, 8))
    assert mixing._cut(1.0, 5, 5, 32).lam == 1.0


def test_how_mixing_is_drawn():
    """Both ways are as likely, lam is of their Beta distributions, boxes lie anywhere within the image."""
    draws = Mixing(0.2, 1.0).draw(0, 0, 4000, 32)
    mixup, boxes = [d.lam for d in draws if d.box is None], [d for d in draws if d.box is not None]
    assert 1850 < len(mixup) < 2150
    assert np.mean(mixup) == pytest.approx(0.5, abs=0.05)
    assert np.var(mixup) == pytest.approx(1 / (4 * 1.4), rel=0.1)  # 1 / (4 (2 alpha + 1))
    for draw in boxes:
        top, bottom, left, right = draw.box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
        assert draw.lam == 1 - (bottom - top) * (right - left) / 32**2
    covered = np.zeros((32, 32))
    for draw in boxes:
        covered[draw.box[0] : draw.box[1], draw.box[2] : draw.box[3]] += 1
    assert covered.min() > 100 and abs(covered - covered[::-1, ::-1]).max() < 0.25 * covered.max()
    squares = [d.box for d in boxes if d.box[0] > 0 and d.box[1] < 32 and d.box[2] > 0 and d.box[3] < 32]
    assert all(bottom - top == right - left for top, bottom, left, right in squares) and len(squares) > 100


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_a_mixed_batch_are_the_batch(digits, size):
    split = [list(strong_batches(digits, processes=One(rank, size)).epoch(1, 1)) for rank in range(size)]
    for number, whole in enumerate(strong_batches(digits).epoch(1, 1)):
        mine = [of_rank[number] for of_rank in split]
        for name in ("index", "host_index", "images", "labels"):
            assert torch.cat([getattr(part, name) for part in mine]).equal(getattr(whole, name)), name
        assert torch.cat([part.mixed.labels for part in mine]).equal(whole.mixed.labels)
        assert {part.mixed.part for part in mine} == {whole.mixed.part}
        assert [part.share for part in mine] == [len(part.labels) / len(whole.labels) for part in mine]


def test_streamed_images_are_mixed_alike(small):
    decoded, streamed = (data.load("folder", small[3], 8, stream=stream) for stream in (False, True))
    given = [
        list(Batches(d.train, d.mean, d.std, 16, CPU, shuffle=True, augment=True, mixing=Mixing(0.2, 1.0)).epoch(1))
        for d in (decoded, streamed)
    ]
    for a, b in zip(*given, strict=True):
        same(a, b)


def test_the_teacher_is_shown_the_mixed_images(digits, tmp_path):
    teacher = Teacher(models.build("resnet8x4", 10), Runtime(CPU, "fp32"), "", 0.0, cache_dir=tmp_path)
    batches = strong_batches(digits)
    assert teacher.source(batches, frozenset({"logits"})) is teacher and not list(tmp_path.iterdir())
    seen = []
    teacher.network.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    batch = next(batches.epoch(0))
    teacher(batch)
    assert seen[0] is batch.images


# the loss


def np_ce(logits, label, smoothing):
    """-sum over classes of target log softmax, in float64."""
    logits = logits.double().numpy()
    log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    target = [(1 - smoothing) * (c == label) + smoothing / len(logits) for c in range(len(logits))]
    return -sum(t * log for t, log in zip(target, log_p, strict=True))


def test_smoothed_and_mixed_cross_entropy():
    torch.manual_seed(0)
    logits, labels, others = torch.randn(6, 5) * 3, torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 1, 0, 2, 3, 4])
    smoothed = losses.cross_entropy(Outputs(logits), labels, smoothing=0.1)
    assert smoothed.equal(F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert smoothed.item() == pytest.approx(
        np.mean([np_ce(x, y, 0.1) for x, y in zip(logits, labels, strict=True)]), rel=1e-5
    )
    mixed = losses.cross_entropy(Outputs(logits), labels, (others, 0.3), 0.1)
    expected = [0.7 * np_ce(x, a, 0.1) + 0.3 * np_ce(x, b, 0.1) for x, a, b in zip(logits, labels, others, strict=True)]
    assert mixed.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("training, smoothing", [("reference", 0), ("benchmark", 0), ("strong", 0.1)])
def test_the_objective_smooths_and_mixes_the_hard_labels_alone(training, smoothing):
    torch.manual_seed(0)
    outputs, taught = Outputs(torch.randn(4, 5)), Outputs(torch.randn(4, 5))
    labels, others, alpha = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4]), torch.tensor(0.25)
    recipe = recipes.replace(under(RECIPES["distillation"], training), soft="dkd", settings={})
    values = losses.Objective(recipe)(outputs, taught, labels, alpha, (others, 0.4))
    a, b = (F.cross_entropy(outputs.logits, y, label_smoothing=smoothing) for y in (labels, others))
    assert values["ce"].item() == pytest.approx((0.6 * a + 0.4 * b).item(), rel=1e-6)
    assert values["dkd"].equal(logit_losses.dkd(outputs, taught, labels, 4.0, 1.0, 8.0))
    assert values["loss"].item() == pytest.approx((0.25 * values["ce"] + 0.75 * values["dkd"]).item(), rel=1e-6)
    plain = losses.Objective(recipe)(outputs, taught, labels, alpha)
    assert plain["ce"].item() == pytest.approx(a.item(), rel=1e-6)


def test_top1_counts_the_label_of_the_greater_part(digits):
    class Right(torch.nn.Module):
        """Tells the label of the greater part, as if it knew."""

        def __init__(self, batches):
            super().__init__()
            self.answers, self.w = iter([batch.labels for batch in batches.epoch(0)]), torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            return Outputs(F.one_hot(next(self.answers), 10) * self.w)

    batches = strong_batches(digits)
    objective = losses.Objective(student("strong"))
    given = engine.fit(
        Right(batches), batches, objective, alpha=torch.ones(1, 5), learning_rate=lambda e, i: 0.0,
        runtime=Runtime(CPU, "fp32"),
    )  # fmt: skip
    figures = next(given)
    assert figures["train_top1"] == 100
    total = 0.0
    for batch in batches.epoch(0):
        for label, other in zip(batch.labels.tolist(), batch.mixed.labels.tolist(), strict=True):
            logits, part = F.one_hot(torch.tensor(label), 10), batch.mixed.part
            total += (1 - part) * np_ce(logits, label, 0.1) + part * np_ce(logits, other, 0.1)
    assert figures["ce"] == pytest.approx(total / 70, rel=1e-5)


def test_a_loss_that_remembers_images_is_refused_where_they_are_mixed():
    crd = recipes.replace(RECIPES["distillation"], soft="crd", settings={})
    losses.settings_of(under(crd, "benchmark"))
    with pytest.raises(UserError, match="crd remembers single images, and --training strong shows mixtures of two"):
        losses.settings_of(under(crd, "strong"))


# the scripts


@pytest.fixture
def thin_networks(monkeypatch):
    thin(monkeypatch.setattr)


def test_runs_of_each_training_on_digits(script, tmp_path, thin_networks, monkeypatch):
    """Side by side, each with what it is made of; tested by its name."""
    digits, found, draw, drawn = ["--dataset", "digits", "--device", "cpu"], {}, Mixing.draw, []
    monkeypatch.setattr(Mixing, "draw", lambda *how: drawn.append(how) or draw(*how))
    for training in TRAININGS:
        ran = script("train.py", "--model_job", "student", "--training", training, "--epochs", 2, *digits)
        assert ran.code == 0, ran.err
        name = "student" if training == "reference" else f"student_{training}"
        found[name] = json.loads((tmp_path / "results" / "digits" / f"{name}_seed0.json").read_text())
        tested = script("test.py", "--model_job", name, *digits)
        assert tested.code == 0 and tested.out.splitlines() == ran.out.splitlines()[2:], tested.err
        assert found[name]["job"] == found[name]["name"] == name
        first, last = found[name]["epochs"]
        assert last["train_loss"] < first["train_loss"]
    plain, benchmark, strong = found.values()
    assert drawn == [(Mixing(0.2, 1.0), 0, epoch, 12, 8) for epoch in range(2)]
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints" / "digits").glob("*.pth"))
    assert checkpoints == ["resnet18.pth", "student_benchmark.pth", "student_strong.pth"]
    assert "training" not in plain["recipe"] and plain["recipe"]["scheduler_step"] == 20 and not plain["augment"]
    expected = {
        "training": "benchmark", "optimiser": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
        "schedule": "milestones", "milestones": [1, 2, 2], "warmup_epochs": 0.0, "label_smoothing": 0.0, "mixup": 0.0,
        "cutmix": 0.0, "learning_rate": 0.05, "batch_size": 64, "epochs": 2,
    }  # fmt: skip
    assert {name: benchmark["recipe"][name] for name in expected} == expected and benchmark["augment"]
    assert [epoch["learning_rate"] for epoch in benchmark["epochs"]] == pytest.approx([0.05, 0.005])
    expected = {"schedule": "cosine", "warmup_epochs": 0.05, "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0}
    assert {name: strong["recipe"][name] for name in expected} == expected and strong["augment"]
    assert not {"scheduler_step"} & (strong["recipe"].keys() | benchmark["recipe"].keys())
    # What is finished is known again, and a longer run is another.
    again = ["--model_job", "student", "--training", "strong", *digits]
    assert "finished already" in script("train.py", *again, "--epochs", 2).err
    refused(script("train.py", *again, "--epochs", 3), "recipe.epochs: 2 there, 3 now")
    refused(script("train.py", *again, "--epochs", 3, "--resume"), "student_strong_seed0.json", "2")
    assert script("train.py", *again, "--epochs", 2, "--resume").code == 0
    refused(script("test.py", "--model_job", "student_nonsense", *digits), "student_nonsense")


def test_the_whole_comparison_by_another_training(script, small, tmp_path, thin_networks):
    rows = ["teacher", "student", "distillation_LDH9"]
    flags = [*small, "--training", "strong", "--epochs", 2, "--batch_size", 20, "--learning_rate", 0.01]
    args = [*flags, "--weights", "none", "--jobs", *rows]
    ran = script("reproduce.py", *args)
    assert ran.code == 0, ran.err
    results, weights = tmp_path / "results" / "folder", tmp_path / "checkpoints" / "folder"
    assert sorted(path.stem for path in weights.glob("*.pth")) == sorted(f"{row}_strong" for row in rows)
    table = (results / "RESULTS.md").read_text()
    assert all(f"| {row}_strong |" in table for row in rows) and "training strong" in table
    assert [json.loads(path.read_text())["recipe"]["epochs"] for path in results.glob("*.json")] == [2] * 3
    assert script("reproduce.py", *args).err.count("finished already") == 3
    # A row of it is its own command's run.
    name = "distillation_LDH9_strong"
    before = (weights / f"{name}.pth").read_bytes()
    assert script("train_distillation.py", "--model_job", "distillation_LDH9", *flags, "--overwrite").code == 0
    assert (weights / f"{name}.pth").read_bytes() == before
    assert script("test_LDH.py", "--model_job", name, *small).code == 0


def test_the_missing_teacher_of_a_training_is_told_how_to_make(script, small):
    ran = script("train_distillation.py", "--training", "benchmark", *small)
    refused(ran, "teacher_benchmark.pth", "train.py --model_job teacher --training benchmark --dataset folder")


@pytest.mark.parametrize("loss, training", [("dkd", "strong"), ("kd", "benchmark"), ("vid", "strong")])
def test_any_loss_by_any_training(script, small, tmp_path, thin_networks, scaled_like_trained, loss, training):
    checkpoint.save(scaled_like_trained(models.build("teacher", 4)), tmp_path / "mine.pth")
    args = [*small, "--loss", loss, "--training", training, "--epochs", 1, "--teacher", "mine.pth"]
    ran = script("train_distillation.py", *args)
    assert ran.code == 0, ran.err
    assert (tmp_path / "checkpoints" / "folder" / f"{loss}_alpha0.7_{training}.pth").exists()


@pytest.mark.parametrize("job", ["student", "distillation_LDH"])
def test_stopped_in_mid_epoch_and_resumed_the_weights_are_the_same(
    script, small, tmp_path, thin_networks, monkeypatch, job
):
    """SGD's momentum, the learning rate of the step, and what is mixed with what."""
    flags = [*small, "--training", "strong", "--epochs", 3, "--batch_size", 8, "--learning_rate", 0.01]
    assert script("train.py", "--model_job", "teacher", "--weights", "none", *flags).code == 0
    path = tmp_path / "checkpoints" / "folder" / f"{job}_strong.pth"
    assert script(script_of(job), "--model_job", job, *flags).code == 0
    undisturbed = path.read_bytes()
    path.unlink()
    (tmp_path / "results" / "folder" / f"{job}_strong_seed0.json").unlink()
    asked = []

    def due(self):
        asked.append(self)
        self.stop = signal.SIGTERM if len(asked) in (3, 7) else 0
        return self.stop > 0

    monkeypatch.setattr(runstate.Keeper, "due", due)
    for done in ({"epoch": 0, "iteration": 3}, {"epoch": 1, "iteration": 2}):
        assert script(script_of(job), "--model_job", job, *flags, "--resume").code == 143
        position = runstate.load(path.with_suffix(".state"))["position"]
        assert {name: position[name] for name in done} == done
    if job == "student":  # with more epochs the learning rate would have been another
        refused(script("train.py", "--model_job", job, *flags, "--epochs", 4, "--resume"), "recipe.epochs: 3 there")
    assert script(script_of(job), "--model_job", job, *flags, "--resume").code == 0
    assert path.read_bytes() == undisturbed


def test_a_signal_ends_what_the_teacher_is_shown_ahead(script, small, tmp_path, thin_networks, monkeypatch):
    """And what it was shown by then is not shown again."""
    flags = [*small, "--training", "benchmark", "--epochs", 2, "--batch_size", 8, "--learning_rate", 0.01]
    assert script("train.py", "--model_job", "teacher", "--weights", "none", *flags).code == 0
    path, shown, call = tmp_path / "checkpoints" / "folder" / "distillation_benchmark.pth", [], Teacher.__call__

    def stop_at_the_second(self, batch):
        shown.append(batch)
        if stops and len(shown) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, batch)

    monkeypatch.setattr(Teacher, "__call__", stop_at_the_second)
    monkeypatch.setattr(teachers, "inference_batch", lambda device: 4)
    stops = False
    assert script("train_distillation.py", *flags).code == 0
    undisturbed, batches = path.read_bytes(), len(shown)
    shutil.rmtree(path.parent / "teacher_cache")
    path.unlink()
    (tmp_path / "results" / "folder" / "distillation_benchmark_seed0.json").unlink()
    shown.clear()
    stops = True
    assert script("train_distillation.py", *flags).code == 143 and len(shown) == 2
    assert script("train_distillation.py", *flags, "--resume").code == 0
    assert path.read_bytes() == undisturbed and len(shown) == batches


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("train.py", ["--model_job", "student", "--training", "weak"], ["--training", "weak", "strong"]),
        ("train.py", ["--model_job", "student", "--training", "benchmark", "--scheduler_step", 3],
         ["--scheduler_step: --training benchmark has a schedule of its own"]),
        ("train.py", ["--model_job", "student", "--training", "strong", "--augment"],
         ["--augment: --training strong crops and flips by itself"]),
        ("train_distillation.py", ["--training", "strong", "--scheduler_step", 3], ["--scheduler_step"]),
        ("train_distillation.py", ["--loss", "crd", "--training", "strong"], ["crd", "--training"]),
        ("reproduce.py", ["--training", "strong", "--scheduler_step", 3], ["--scheduler_step"]),
        ("reproduce.py", ["--training", "benchmark", "--augment"], ["--augment"]),
        ("reproduce.py", ["--training", "benchmark", "--teacher_augment"], ["--teacher_augment"]),
    ],
)  # fmt: skip
def test_flags_without_effect_are_refused(script, name, flags, words):
    refused(script(name, *flags), *words)


def test_flags_win_over_a_training(small):
    parser = cli.Parser()
    cli.add_training_flags(parser)
    flags = ["--training", "benchmark", "--epochs", "60", "--learning_rate", "0.2", "--batch_size", "32"]
    recipe = cli.override(RECIPES["student"], parser.parse_args(flags))
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size) == (60, 0.2, 32)
    assert recipes.described(recipe)["milestones"] == [38, 45, 53]
    assert cli.override(RECIPES["student"], parser.parse_args([])) == RECIPES["student"]


def test_identities_differ_between_trainings(digits, tmp_path):
    setup = jobs.Setup(digits, Runtime(CPU, "fp32"), tmp_path, tmp_path)
    told = [
        json.dumps(jobs.identity(student(name, epochs=5, batch_size=8, learning_rate=0.1), setup, None)) for name in NEW
    ]
    plain = jobs.identity(RECIPES["student"], setup, None)
    assert len({*told, json.dumps(plain)}) == 3
    assert list(plain["recipe"]) == [
        "job", "checkpoint", "network", "epochs", "scheduler_step", "soft", "alpha", "beta", "gamma", "learning_rate",
        "batch_size", "arch", "weight",
    ]  # fmt: skip
    # Plain values, which come back from a file as they were.
    assert all(json.loads(text) == jobs.identity(student(name, epochs=5, batch_size=8, learning_rate=0.1), setup, None)
               for text, name in zip(told, NEW, strict=True))  # fmt: skip


def test_the_list_has_the_trainings(script):
    out = script("train_distillation.py", "--list").out
    assert "training  benchmark  sgd, milestones, 240 epochs" in out and "training  strong" in out


def test_rows_by_another_training_are_all_of_the_same_epochs():
    nothing = {"epochs": None, "scheduler_step": None, "learning_rate": None, "batch_size": None}
    for job in ("teacher", "student", "distillation_KMJ1"):
        flags = argparse.Namespace(**nothing, training="benchmark")
        assert reproduce.scaled(RECIPES[job], flags) == under(RECIPES[job], "benchmark")
        flags.epochs, flags.batch_size = 20, 32
        row = reproduce.scaled(RECIPES[job], flags)
        assert (row.epochs, row.batch_size, row.learning_rate) == (20, 32, 0.05)
