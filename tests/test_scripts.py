"""The scripts as a user runs them: flags in, lines and files out."""

import dataclasses
import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import struct
import termios
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import write_cifar10, write_cifar100

import checkpoint
import data
import jobs
import models
import report
from images import cifar
from recipes import RECIPES, ROWS
from util.runstate import Keeper

EPOCH = r"Epoch \[(\d+)/(\d+)\], Train Loss: (\d+\.\d{8})"
TEST = r"Test Loss: (\d\.\d{8}), Top-1 test Accuracy: (\d+\.\d{8})%, Top-5 test Accuracy: (\d+\.\d{8})%"
MEAN = r"Mean test cross-entropy: (\d+\.\d{8})"
LINE = r"epoch \d/\d  loss +\d+\.\d{4}  ce .*  top-1 .*  alpha 1.000  lr 1.0e-03  [\d,]+ images/s"
TEACHER = r"Teacher Top-1: (\d+\.\d{8})%"


def losses_of(out):
    return [float(match[2]) for match in re.findall(EPOCH, out)]


def script_of(job):
    return "train_distillation.py" if RECIPES[job].distils else "train.py"


def lines_are(out, *patterns):
    lines = out.splitlines()
    assert len(lines) == len(patterns), out
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


# from beginning to end


def test_teacher_and_students(script, small, tmp_path):
    common = [*small, "--epochs", 2]
    ran = script("train.py", "--model_job", "teacher", "--weights", "none", *common)
    assert ran.code == 0, ran.err
    lines_are(ran.out, EPOCH, EPOCH, TEST, MEAN)
    lines_are(ran.err, LINE, LINE)  # and no bar where there is no terminal
    for job, tester in (("distillation", "test.py"), ("distillation_LDH6", "test_LDH.py")):
        ran = script("train_distillation.py", "--model_job", job, *common)
        lines_are(ran.out, TEACHER, EPOCH, EPOCH, TEST, MEAN)
        again = script(tester, "--model_job", job, *small)
        assert again.out.splitlines() == ran.out.splitlines()[3:]
    names = ["Distilled_resnet18.pth", "Distilled_resnet18_LDH6.pth", "resnet50.pth"]
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "folder").glob("*.pth")) == names


def test_a_student_learns_digits(script, tmp_path):
    digits = ["--dataset", "digits", "--device", "cpu"]
    ran = script("train.py", "--model_job", "student", "--epochs", 3, "--scheduler_step", 2, *digits)
    lines_are(ran.out, EPOCH, EPOCH, EPOCH, TEST, MEAN)
    losses = losses_of(ran.out)
    assert losses[2] < losses[0] / 2
    tested = re.search(TEST, ran.out)
    assert float(tested[2]) > 50

    ran = script("test.py", "--model_job", "student", *digits)
    lines_are(ran.out, TEST, MEAN)
    assert ran.out.splitlines()[0] == tested[0]

    result = json.loads((tmp_path / "results" / "digits" / "student_seed0.json").read_text())
    assert [figures["train_loss_over_batches"] for figures in result["epochs"]] == pytest.approx(losses, abs=1e-8)
    assert [figures["alpha"] for figures in result["epochs"]] == [1.0] * 3
    assert result["test"]["top1"] == pytest.approx(float(tested[2])) and result["test"]["images"] == 297
    assert result["recipe"]["epochs"] == 3 and result["recipe"]["scheduler_step"] == 2
    assert [figures["learning_rate"] for figures in result["epochs"]] == pytest.approx([1e-3, 1e-3, 1e-4])


# on the files of CIFAR-10 and CIFAR-100, in their own formats


def test_the_main_job_on_cifar100s_own_files(script, tmp_path, monkeypatch):
    """Every kind of row is trained, through the whole comparison too, from files as the official archive has them."""
    few = dataclasses.replace(cifar.KINDS["cifar100"], classes=cifar.KINDS["cifar100"].classes[:10])
    monkeypatch.setitem(cifar.KINDS, "cifar100", few)
    monkeypatch.setitem(cifar.KINDS, "cifar100", write_cifar100(tmp_path / "data", n_train=20, n_test=10))
    rows = ["teacher", "student", "distillation", "distillation_LDH5"]
    flags = ["--weights", "none", "--epochs", 1, "--batch_size", 10]
    ran = script("reproduce.py", *flags, "--jobs", *rows)
    assert ran.code == 0, ran.err
    table = (tmp_path / "results" / "RESULTS.md").read_text()
    assert table.startswith("# Results on CIFAR-100, 1 of 50 epochs") and all(f"| {job} |" in table for job in rows)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pth")) == [
        "Distilled_resnet18.pth", "Distilled_resnet18_LDH5.pth", "resnet18.pth", "resnet50.pth",
    ]  # fmt: skip
    ran = script("test_LDH.py", "--model_job", "distillation_LDH5")
    lines_are(ran.out, TEST, MEAN)


def test_the_main_job_on_cifar10s_own_files(script, tmp_path, monkeypatch):
    files = write_cifar10(tmp_path / "data", n_train=20, n_test=10, layout="archive")
    monkeypatch.setitem(cifar.KINDS, "cifar10", files)
    common = ["--dataset", "cifar10", "--epochs", 1, "--batch_size", 10]
    assert script("train.py", "--model_job", "teacher", "--weights", "none", *common).code == 0
    assert script("train.py", "--model_job", "student", *common, "--augment").code == 0
    for job in ("distillation_KMJ2", "distillation_LDH2"):
        ran = script("train_distillation.py", "--model_job", job, *common)
        assert ran.code == 0, ran.err
    assert script("test.py", "--model_job", "distillation_KMJ2", "--dataset", "cifar10").code == 0


def test_any_loss_with_any_schedule(script, small, small_teacher, tmp_path):
    """A run of a name of its own, made from what it is, which is tested by that name."""
    common = [*small, "--teacher", small_teacher, "--epochs", 1]
    settings = ["--tckd", 0, "--nckd", 2]
    ran = script("train_distillation.py", "--loss", "dkd", "--schedule", "per iteration", *settings, *common)
    assert ran.code == 0, ran.err
    name = "dkd_per_iteration_tckd0_nckd2"
    result = json.loads((tmp_path / "results" / "folder" / f"{name}_seed0.json").read_text())
    recipe = result["recipe"]
    assert (recipe["soft"], recipe["nckd"], recipe["tckd"], recipe["alpha"]) == ("dkd", 2.0, 0.0, "per iteration")
    tested = script("test.py", "--model_job", name, *small)
    assert tested.code == 0 and tested.out.splitlines() == ran.out.splitlines()[2:]
    ran = script("train_distillation.py", "--loss", "crd", "--alpha", 0.5, *common)  # which learns something itself
    assert ran.code == 0 and (tmp_path / "checkpoints" / "folder" / "crd_alpha0.5.pth").exists(), ran.err
    refused(
        script("train_distillation.py", "--loss", "kd", "--model_job", "distillation", *common), "give one of the two"
    )
    refused(script("train_distillation.py", "--loss", "kdd", *common), "kdd", "reviewkd")


def test_the_lists(script):
    ran = script("train_distillation.py", "--list")
    assert ran.code == 0
    for words in ("loss      dkd", "--nckd 8", "schedule  per epoch, descending", "job       distillation_LDH10"):
        assert words in ran.out


def test_held_out_images(script, small, small_teacher, tmp_path):
    """Their figures come after each epoch, and they are none of those that are trained on."""
    flags = ["--val_fraction", 0.3, "--epochs", 2, "--teacher", small_teacher]
    ran = script("train_distillation.py", *small, *flags)
    epochs = [line for line in ran.err.splitlines() if line.startswith("epoch")]
    assert ran.code == 0 and len(epochs) == 2 and all("val loss" in line and "val top-1" in line for line in epochs)
    result = json.loads((tmp_path / "results" / "folder" / "distillation_seed0.json").read_text())
    assert (result["data"]["train_images"], result["data"]["val_images"]) == (28, 12)
    root, model = small[3], models.build("student", 4)
    model.load_state_dict(torch.load(tmp_path / "checkpoints" / "folder" / "Distilled_resnet18.pth", weights_only=True))
    whole = data.load("folder", root, 8)
    _, val = data.held_out(whole.train, 0.3, 4)
    images = data.normalise(val.images, torch.tensor(whole.mean), torch.tensor(whole.std))
    top1 = 100 * (model.eval()(images).logits.argmax(1) == val.labels).double().mean().item()
    assert result["epochs"][1]["val_top1"] == pytest.approx(top1)
    assert "val_top1" in (tmp_path / "results" / "folder" / "distillation_seed0.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "flags, trained",
    [
        (["train.py", "--model_job", "student", "--compile", "off"], []),
        (["train.py", "--model_job", "student", "--compile", "on"], [True]),
        (["train_distillation.py", "--model_job", "distillation_LDH6", "--compile", "on"], [True]),
        # The maps of augmented images are not remembered: the teacher runs at every step.
        (["train_distillation.py", "--model_job", "distillation_LDH6", "--augment", "--compile", "on"], [False, True]),
    ],
)
def test_what_runs_at_every_step_is_compiled(script, ready, monkeypatch, flags, trained):
    asked = []
    monkeypatch.setattr(jobs, "compiled", lambda network, *shape, trained: asked.append(trained) or network)
    assert script(*flags, *ready, "--epochs", 1).code == 0
    assert asked == trained


@pytest.mark.parametrize(
    "flags, graphs",
    [
        (["train.py", "--model_job", "student"], ["a step"]),
        (["train.py", "--model_job", "student", "--cuda_graphs", "off"], []),
        (["train_distillation.py", "--model_job", "distillation_LDH6"], ["a step"]),
        (["train_distillation.py", "--model_job", "distillation_LDH6", "--augment"], ["the teacher", "a step"]),
    ],
)
def test_what_runs_at_every_step_is_a_graph_where_it_can_be(script, ready, monkeypatch, flags, graphs):
    asked = []
    monkeypatch.setattr(jobs, "possible", lambda runtime: True)
    for module in (jobs, jobs.engine):
        monkeypatch.setattr(module, "Graphed", lambda function, name: asked.append(name) or function)
    assert script(*flags, *ready, "--epochs", 1).code == 0
    assert asked == graphs


# figures


def log_softmax(x):
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


def expected_losses(recipe, root, teacher_file, epochs):
    """The losses of the reference in float64, for weights that stay as they are drawn from seed 0."""
    loaded = data.load("folder", root, 8)
    images = (loaded.train.images.permute(0, 3, 1, 2).double() / 255).numpy()
    images = (images - np.reshape(loaded.mean, (3, 1, 1))) / np.reshape(loaded.std, (3, 1, 1))
    images, labels = torch.tensor(images), loaded.train.labels.numpy()
    torch.manual_seed(0)
    student = models.build(recipe.network, 4).double().train()
    teacher = models.build("teacher", 4)
    teacher.load_state_dict(torch.load(teacher_file, weights_only=True))
    with torch.no_grad():
        s, t = student(images), teacher.double().eval()(images)
        weights, bias = teacher.fc.weight.numpy(), teacher.fc.bias.numpy()

    def ce(logits):
        return -log_softmax(logits)[np.arange(len(labels)), labels].mean()

    hard = ce(s.logits.numpy())
    if recipe.soft is None:
        return [hard] * epochs
    soft = kd = mse = s2t = 0.0
    T = recipe.settings.get("T")
    if T:
        log_s, log_t = log_softmax(s.logits.numpy() / T), log_softmax(t.logits.numpy() / T)
        soft = kd = T**2 * (np.exp(log_t) * (log_t - log_s)).sum() / len(labels)
    if recipe.network == "feature_student":
        mse = ((s.projected.numpy() - t.last_map.numpy()) ** 2).mean()
        s2t = ce(s.projected.numpy().mean((2, 3)) @ weights.T + bias)
    soft = kd if T else mse
    # one batch an epoch
    ramp = [e / (epochs - 1) for e in range(epochs)]
    alphas = {"per epoch": ramp, "per iteration": ramp, "first epoch, then per epoch": [1, *ramp[1:]]}.get(recipe.alpha)
    alphas = alphas or [recipe.alpha] * epochs
    return [a * hard + (1 - a) * soft + recipe.beta * mse + recipe.gamma * s2t for a in alphas]


@pytest.mark.parametrize("recipe", ROWS, ids=lambda row: row.job)
def test_printed_loss_is_the_formula(script, small, small_teacher, recipe):
    still = ["--learning_rate", 1e-12, "--batch_size", 40, "--epochs", 3]
    source = ["--teacher", small_teacher] if recipe.distils else []
    source += ["--weights", "none"] if recipe.job == "teacher" else []
    ran = script(script_of(recipe.job), "--model_job", recipe.job, *small, *still, *source)
    assert ran.code == 0, ran.err
    assert losses_of(ran.out) == pytest.approx(expected_losses(recipe, small[3], small_teacher, 3), abs=1e-4)


def test_flags_change_the_loss(script, small, light):
    def loss(*flags):
        args = ["--epochs", 1, "--learning_rate", 1e-12, "--batch_size", 40, "--overwrite"]
        return losses_of(script("train_distillation.py", *small, *light, *args, *flags).out)[0]

    logits = {loss(*flags) for flags in ([], ["--alpha", 0.2], ["--T", 5], ["--seed", 3], ["--schedule", "per epoch"])}
    maps = {loss("--model_job", "distillation_LDH", *flags) for flags in ([], ["--beta", 0.1], ["--gamma", 0.3])}
    assert len(logits) == 5 and len(maps) == 3


def test_runs_repeat_themselves_and_seeds_differ(script, small, tmp_path):
    def weights(seed):
        args = ["--epochs", 2, "--seed", seed, "--overwrite", *small]
        assert script("train.py", "--model_job", "student", *args).code == 0
        return (tmp_path / "checkpoints" / "folder" / f"seed{seed}" / "resnet18.pth").read_bytes()

    assert weights(1) == weights(1) != weights(2)


def test_augmented_images_are_other_images(script, small, light):
    common = [*small, *light, "--epochs", 1, "--learning_rate", 1e-12, "--batch_size", 40]
    common += ["--overwrite"]
    plain = losses_of(script("train_distillation.py", *common).out)
    augmented = script("train_distillation.py", "--augment", *common)
    assert augmented.code == 0 and losses_of(augmented.out) != plain


# mistakes


@pytest.fixture
def ready(tmp_path, small, small_teacher):
    """Flags of a folder with a teacher in it, to see afterwards that nothing was written."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(small_teacher, folder / "resnet50.pth")
    return [*small, "--checkpoint_dir", folder]


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(ran, *words):
    assert ran.code == 2, (ran.code, ran.err)
    assert ran.out == "" and len(ran.err.splitlines()) == 1, ran
    for word in words:
        assert word in ran.err
    assert "Traceback" not in ran.err


BAD_FLAGS = [
    (["--model_job", "distillation_LDH4"], "distillation_LDH4", "distillation_LDH5"),
    (["--dataset", "mnist"], "mnist", "digits"),
    (["--alpha", "1.5"], "--alpha: 1.5 is not a number from 0 to 1"),
    (["--alpha", "nan"], "--alpha"),
    (["--alpha=-0.1"], "--alpha"),
    (["--T", "0"], "--T: 0 is not a finite number above 0"),
    (["--T=-2"], "--T"),
    (["--T", "inf"], "--T"),
    (["--epochs", "0"], "--epochs: 0 is not a whole number from 1 to 100000"),
    (["--epochs", "1.5"], "--epochs"),
    (["--epochs", "2000000000"], "--epochs"),
    (["--batch_size", "0"], "--batch_size"),
    (["--scheduler_step", "0"], "--scheduler_step"),
    (["--learning_rate", "0"], "--learning_rate: 0 is not a finite number above 0"),
    (["--learning_rate=-1"], "--learning_rate"),
    (["--seed=-1"], "--seed"),
    (["--beta=-1", "--model_job", "distillation_LDH"], "--beta"),
    (["--model_job", "distillation_KMJ0", "--alpha", "0.5"], "--alpha", "distillation_KMJ0", "scheduled (per epoch)"),
    (["--model_job", "distillation_LDH9", "--alpha", "0.5"], "scheduled (per iteration)"),
    (["--model_job", "distillation_LDH5", "--T", "2"], "--T", "has no T, it has no settings"),
    (["--schedule", "constant", "--model_job", "distillation_KMJ0"], "give --alpha as well"),
    (["--schedule", "per epoch", "--alpha", "0.5"], "--alpha", "scheduled (per epoch)"),
    (["--schedule", "sometimes"], "sometimes", "per iteration"),
    (["--epochs", "9" * 400], "--epochs: 999", "... is not a whole number from 1 to 100000"),
    (["--learning_rate", "9" * 400], "--learning_rate", "is not a finite number"),
    (["--lr", "0.1"], "there is no --lr here; did you mean --learning_rate?"),
    (["--batch-size=8"], "did you mean --batch_size?"),
    (["--temperature", "4"], "did you mean --T?"),
    (["--epoch", "3"], "did you mean --epochs?"),
    (["--checkpoint", "x"], "there is no --checkpoint here"),
    (["--name", "student"], "--name: student is the name of a job"),
    (["--name", "a/b"], "--name: a/b is not a name"),
    (["--val_fraction", "1"], "--val_fraction: 1 is not a number from 0 to below 1"),
    (["--beta", "0.5"], "--beta", "no projector"),
    (["--gamma", "0"], "--gamma", "no projector"),
    (["--teacher", "nowhere.pth"], "nowhere.pth does not exist; give another file"),
    (["--data_dir", "nowhere"], "nowhere"),
    (["--image_size", "4"], "--image_size 4 is too small"),
    (["--no_such_flag"], "--no_such_flag"),
]


@pytest.mark.parametrize("case", BAD_FLAGS, ids=lambda case: " ".join(case[0]))
def test_bad_flags(script, ready, tmp_path, case):
    flags, *words = case
    before = written(tmp_path)
    refused(script("train_distillation.py", *ready, *flags), *words)
    assert written(tmp_path) == before


@pytest.mark.parametrize("name", ["train.py", "test.py", "test_LDH.py"])
def test_unknown_jobs_are_answered_with_the_list(script, name):
    known = {"train.py": ["teacher", "student"], "test.py": list(RECIPES), "test_LDH.py": ["distillation_LDH10"]}[name]
    refused(script(name, "--model_job", "nonsense"), *known)


def test_test_ldh_keeps_to_its_rows(script):
    refused(script("test_LDH.py", "--model_job", "distillation"), "distillation_LDH2")


def test_the_missing_checkpoint_is_told_how_to_make(script, small):
    ran = script("test.py", "--model_job", "distillation_LDH3", *small)
    refused(ran, "Distilled_resnet18_LDH3.pth does not exist", "train_distillation.py --model_job distillation_LDH3")


def test_how_to_make_a_checkpoint_is_the_whole_command(script, tmp_path):
    where = ("--dataset", "digits", "--checkpoint_dir", tmp_path / "my files")
    makes = f"python train.py --model_job student --dataset digits --seed 3 --checkpoint_dir '{tmp_path / 'my files'}'"
    ran = script("test.py", "--model_job", "student", "--seed", 3, *where)
    refused(ran, f"resnet18.pth does not exist; make it with: {makes}")


def test_a_teacher_of_other_classes(script, ready, tmp_path):
    torch.save(models.build("teacher", 7).state_dict(), tmp_path / "other.pth")
    refused(script("train_distillation.py", *ready, "--teacher", tmp_path / "other.pth"), "7 classes", "4")


def test_a_student_starts_from_weights_that_it_is_given(script, small, tmp_path):
    """From a trained one, whose classifier is not taken; its own default is random weights, as before."""
    flags = ["train.py", "--model_job", "student", *small, "--epochs", 1, "--learning_rate", 1e-12]
    assert script(*flags).code == 0
    trained = tmp_path / "checkpoints" / "folder" / "resnet18.pth"
    assert script(*flags, "--weights", trained, "--seed", 3, "--name", "warm").code == 0
    before, after = (
        torch.load(trained.parent / name, weights_only=True) for name in ("resnet18.pth", "seed3/warm.pth")
    )
    torch.testing.assert_close(after["layer4.1.conv1.weight"], before["layer4.1.conv1.weight"])
    assert not torch.allclose(after["fc.weight"], before["fc.weight"])


def test_imagenet_weights_without_a_network(script, small):
    ran = script("train.py", "--model_job", "teacher", *small)
    refused(ran, "resnet50-11ad3fa6.pth", "--weights FILE", "--weights none")


def test_cifar100_without_a_network(script):
    ran = script("train.py", "--model_job", "student")
    assert ran.code == 2 and "cifar-100-python.tar.gz" in ran.err.splitlines()[-1] and "Traceback" not in ran.err


@pytest.mark.parametrize("flag", ["--checkpoint_dir", "--results_dir"])
def test_a_folder_that_cannot_be_written_is_found_before_training(script, ready, tmp_path, flag):
    (tmp_path / "file").write_text("")
    refused(script("train.py", "--model_job", "student", *ready, flag, tmp_path / "file" / "x"), "file/x", flag)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_cuda(script, ready):
    refused(script("train.py", "--model_job", "student", *ready, "--device", "cuda"), "--device cuda", "--device cpu")


def test_a_batch_of_one_image(script, ready):
    ran = script("train.py", "--model_job", "student", *ready, "--batch_size", 39)
    refused(ran, "--batch_size 39 leaves 1 of 40 images")


def test_divergence_leaves_the_checkpoint_as_it_was(script, ready, tmp_path):
    student = tmp_path / "checkpoints" / "resnet18.pth"
    student.write_bytes(b"the last good one")
    ran = script("train.py", "--model_job", "student", *ready, "--learning_rate", 1e30, "--epochs", 3, "--overwrite")
    assert ran.code == 1 and "diverged" in ran.err.splitlines()[-1] and "--learning_rate" in ran.err
    assert "Traceback" not in ran.err
    assert student.read_bytes() == b"the last good one"


# what is finished stays


def files_of(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_never_replaced_unasked(script, small, tmp_path):
    folders = tmp_path / "checkpoints", tmp_path / "results"
    common = ["train.py", "--model_job", "student", *small, "--batch_size", 20]
    first = script(*common, "--epochs", 2)
    before = files_of(*folders)
    again = script(*common, "--epochs", 2)  # the very same: told, not trained
    assert again.code == 0 and "finished already" in again.err and again.out.splitlines() == first.out.splitlines()[2:]
    for flags, words in [
        (["--epochs", 1], "recipe.epochs: 2 there, 1 now"),
        (["--epochs", 2, "--learning_rate", 0.1], "recipe.learning_rate: 0.001 there, 0.1 now"),
        (["--epochs", 2, "--augment"], "augment: False there, True now"),
        (["--epochs", 2, "--val_fraction", 0.3], "train_images: 40 there, 28 now"),
    ]:
        refused(script(*common, *flags), words, "--name", "--overwrite")
    assert files_of(*folders) == before
    assert script(*common, "--epochs", 1, "--seed", 1).code == 0  # stands in a folder of its own
    assert script(*common, "--epochs", 1, "--name", "shorter").code == 0
    now = files_of(*folders)
    assert before.items() <= now.items()
    names = {"seed1/resnet18.pth", "shorter.pth", "student_seed1.json", "shorter_seed0.json"}
    assert names <= {str(path.relative_to(tmp_path)).partition("/folder/")[2] for path in now}
    assert script(*common, "--epochs", 1, "--overwrite").code == 0
    assert files_of(*folders).keys() == now.keys() and files_of(*folders) != now


def test_a_checkpoint_of_unknown_origin_is_not_replaced(script, ready, tmp_path):
    student = tmp_path / "checkpoints" / "resnet18.pth"
    torch.save(models.build("student", 4).state_dict(), student)
    before = student.read_bytes()
    refused(script("train.py", "--model_job", "student", *ready, "--epochs", 1), "resnet18.pth is there", "--overwrite")
    assert student.read_bytes() == before


def test_a_checkpoint_that_is_not_the_runs_own_is_not_replaced(script, small, tmp_path):
    """Where the result is there and the checkpoint is another's; one that is gone is made again, and that is said."""
    common = ["train.py", "--model_job", "student", *small, "--batch_size", 20, "--epochs", 1]
    assert script(*common).code == 0
    student = tmp_path / "checkpoints" / "folder" / "resnet18.pth"
    assert script(*common, "--seed", 1).code == 0
    shutil.copy(student.parent / "seed1" / student.name, student)
    before = files_of(tmp_path / "checkpoints", tmp_path / "results")
    refused(script(*common), "resnet18.pth is not the checkpoint that", "student_seed0.json", "--overwrite")
    again = [*common[3:], "--scheduler_step", 20, "--jobs", "student"]
    refused(script("reproduce.py", *again), "resnet18.pth is not the", "--checkpoint_dir")
    assert files_of(tmp_path / "checkpoints", tmp_path / "results") == before
    student.unlink()
    again = script(*common)
    assert (
        again.code == 0 and "resnet18.pth, which" in again.err and "is gone or damaged: it is trained anew" in again.err
    )


def test_the_weights_that_a_run_starts_from_are_known_by_their_content(script, small, tmp_path):
    for seed, name in enumerate(("one.pth", "other.pth")):
        torch.manual_seed(seed)
        torch.save(models.build("student", 4).state_dict(), tmp_path / name)
    common = ["train.py", "--model_job", "student", *small, "--batch_size", 20, "--epochs", 1, "--weights"]
    assert script(*common, "one.pth").code == 0
    shutil.copy("one.pth", "copy.pth")
    assert "finished already" in script(*common, "copy.pth").err
    shutil.copy("other.pth", "one.pth")
    refused(script(*common, "one.pth"), "weights: a file of sha256 ")


def test_a_finished_run_is_trained_on(script, small, tmp_path):
    """With --resume and more epochs, from its weights; a schedule over the epochs can't be stretched."""
    common = ["train.py", "--model_job", "student", *small, "--batch_size", 20]
    first = script(*common, "--epochs", 1)
    more = script(*common, "--epochs", 3, "--resume")
    assert more.code == 0 and "training on from the 1 epochs" in more.err, more.err
    assert [match[0] for match in re.findall(EPOCH, more.out)] == ["2", "3"]
    assert losses_of(more.out)[0] < losses_of(first.out)[0]
    result = json.loads((tmp_path / "results" / "folder" / "student_seed0.json").read_text())
    assert result["warm_start"]["epochs"] == 1 and [epoch["epoch"] for epoch in result["epochs"]] == [1, 2, 3]
    assert [(part["from_epoch"], part["to_epoch"]) for part in result["stretches"]] == [(0, 1), (1, 3)]
    again = script(
        "reproduce.py", *small, "--batch_size", 20, "--jobs", "student", "--epochs", 3, "--scheduler_step", 20
    )
    assert again.code == 2 and "warm_start" in again.err  # not the row's own run


def test_that_what_a_loss_learns_begins_anew_is_said(script, small, small_teacher):
    common = ["train_distillation.py", "--loss", "vid", "--alpha", 0.5, *small, "--teacher", small_teacher]
    assert script(*common, "--epochs", 1).code == 0
    more = script(*common, "--epochs", 2, "--resume")
    assert "with a fresh optimizer and what the loss learns begun anew" in more.err, more.err


def test_a_scheduled_run_is_not_trained_on(script, small, small_teacher):
    common = ["train_distillation.py", "--model_job", "distillation_KMJ0", *small, "--teacher", small_teacher]
    assert script(*common, "--epochs", 1).code == 0
    ran = script(*common, "--epochs", 2, "--resume")
    assert ran.code == 2 and "alpha of distillation_KMJ0 (per epoch)" in ran.err


def test_a_cut_result_is_one_line(script, small, tmp_path):
    common = ["train.py", "--model_job", "student", *small, "--epochs", 1]
    assert script(*common).code == 0
    (tmp_path / "results" / "folder" / "student_seed0.json").write_text('{"job": "stu')
    for flags in ([], ["--resume"]):
        refused(script(*common, *flags), "student_seed0.json is damaged")


@contextmanager
def stopped_at_a_save():
    """Here a run is stopped, as by Ctrl-C, once it has saved its state."""
    kept = Keeper.save

    def stop(self, state):
        kept(self, state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Keeper, "save", stop)
        yield


def test_a_teacher_resumes_without_its_start_weights(script, small, tmp_path):
    start = tmp_path / "start.pth"
    torch.save(models.build("teacher", 7).state_dict(), start)
    common = ["train.py", "--model_job", "teacher", *small, "--epochs", 2, "--weights", start]
    with stopped_at_a_save():
        assert script(*common).code == 130
    start.unlink()
    ran = script(*common, "--resume")
    assert ran.code == 0 and "going on after 1 epochs" in ran.err


# what a checkpoint says of itself


def test_a_file_of_any_name_is_tested_as_it_was_trained(script, small, tmp_path):
    flags = ["--dataset", "folder", "--data_dir", small[3], "--device", "cpu"]
    ran = script("train.py", "--model_job", "student", *flags, "--image_size", 8, "--epochs", 1, "--precision", "fp32")
    path = tmp_path / "best.pth"
    (tmp_path / "checkpoints" / "folder" / "resnet18.pth").rename(path)
    tested = script("test.py", "--model_job", "student", *flags, "--checkpoint", path)  # the size is the checkpoint's
    assert tested.code == 0 and tested.out == "\n".join(ran.out.splitlines()[1:]) + "\n"
    assert tested.err == "images are scaled to 8x8 pixels, as the checkpoint was trained\n"
    ran = script("test.py", "--model_job", "student", *flags, "--checkpoint", path, "--image_size", 16)
    refused(ran, "--image_size 16: the checkpoint was trained at 8")
    ran = script("test.py", "--model_job", "student", "--dataset", "digits", "--checkpoint", path)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1


def test_home_is_expanded_in_every_flag(script, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folders = ["--checkpoint_dir=~/weights", "--results_dir=~/results"]
    assert script("train.py", "--model_job", "student", *small, "--epochs", 1, *folders).code == 0
    assert (tmp_path / "home" / "weights" / "resnet18.pth").exists()
    assert (tmp_path / "home" / "results" / "student_seed0.json").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["train.py", "--model_job", "student", "--weights", "~nobody-of-this-name/a.pth"],
        ["reproduce.py", "--weights", "~nobody-of-this-name/a.pth"],
        ["compare.py", "~nobody-of-this-name/a", "b"],
        ["predict.py", "--model", "~nobody-of-this-name/a.pth", "x.png"],
    ],
    ids=lambda args: args[0],
)
def test_a_home_of_nobody_is_told(script, args):
    refused(script(*args), "~nobody-of-this-name/a", "no such home")


def test_a_network_that_gives_nan_has_no_figures(script, small, tmp_path, scaled_like_trained):
    network = scaled_like_trained(models.build("resnet20", 4))
    next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)).running_var.fill_(-1)
    checkpoint.save(network, tmp_path / "x.pth")
    flags = [*small, "--student_arch", "resnet20", "--checkpoint", "x.pth"]
    teacher = [*small, "--teacher", "x.pth", "--teacher_arch", "resnet20"]
    refused(script("test.py", "--model_job", "student", *flags), "NaN or infinite outputs")
    refused(script("train_distillation.py", "--student_arch", "resnet20", *teacher), "NaN or infinite outputs")
    ran = script("card.py", "--model_job", "student", *flags, *teacher)
    assert (
        ran.code == 2 and ran.out == "" and "NaN or infinite outputs" in ran.err and not list(tmp_path.rglob("*card*"))
    )


def test_names_of_any_letters_end_no_run_and_no_report(script, small, tmp_path, capfd):
    """A path that is no UTF-8; names of classes and files with control characters and markup; an ASCII terminal."""
    pytest.importorskip("tensorboard")
    root, odd = tmp_path / "caf\udce9", "\x1b[2J|<b>\n# x"
    shutil.copytree(small[small.index("--data_dir") + 1], root, ignore=shutil.ignore_patterns(".*"))
    for part in ("train", "test"):
        (root / part / "class0").rename(root / part / odd)
        (root / part / odd / f"{odd}.txt").write_text("")
    folders = ["--checkpoint_dir", root / "c", "--results_dir", root / "r"]
    flags = [*small, "--data_dir", root, "--epochs", 1, "--student_arch", "resnet20", "--tensorboard", *folders]
    told = [script("train.py", "--model_job", "student", *flags)]
    report.write(root / "r")
    told.append(script("compare.py", root / "r" / "student_resnet20_seed0.json", "student_resnet20", *folders[2:]))
    told.append(script("predict.py", "--model", root / "c" / "student_resnet20.pth", root / "test" / odd))
    assert [ran.code for ran in told] == [0, 2, 0] and "needs a --results_dir in UTF-8" in told[0].err, told
    assert not re.search("[\x1b\udce9]", "".join(ran.out + ran.err for ran in told))
    assert len(told[2].out.splitlines()) == 3 and "caf\\xe9" in told[2].out
    assert "caf\\xe9" in (root / "r" / "RESULTS.md").read_text()


# as processes


def test_a_last_step_that_spoils_all_writes_nothing(script, ready, tmp_path):
    """One step: its loss is that of before, and the weights after it are huge, but finite."""
    student = tmp_path / "checkpoints" / "resnet18.pth"
    student.write_bytes(b"the last good one")
    args = [*ready, "--epochs", 1, "--batch_size", 40, "--learning_rate", 1e30, "--overwrite"]
    ran = script("train.py", "--model_job", "student", *args)
    assert ran.code == 1 and "diverged" in ran.err and "Test Loss:" not in ran.out
    assert student.read_bytes() == b"the last good one"
    assert written(tmp_path / "checkpoints") == ["resnet18.pth", "resnet50.pth"]


def test_interrupt(process, ready, tmp_path):
    student = tmp_path / "checkpoints" / "resnet18.pth"
    student.write_bytes(b"the last good one")
    running = process("train.py", "--model_job", "student", *ready, "--epochs", 100000, "--overwrite")
    assert re.match(EPOCH, running.stdout.readline())
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert student.read_bytes() == b"the last good one" and not list(tmp_path.rglob("*.tmp"))


def test_a_bar_on_a_terminal(process, ready):
    master, slave = pty.openpty()
    fcntl.ioctl(
        slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0)
    )  # tqdm shows nothing on a terminal of no width
    running = process("train.py", "--model_job", "student", *ready, "--epochs", 2, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    out = running.communicate(timeout=60)[0]
    assert b"student 1/2" in shown and b"img/s" in shown
    lines_are(out, EPOCH, EPOCH, TEST, MEAN)


def replaced_while(monkeypatch, owner, name, path, content):
    """Have the file at path replaced before that function of the owner's is called."""
    function = getattr(owner, name)

    def replace_first(*args, **options):
        other = path.with_suffix(".new")
        other.write_bytes(content)
        os.replace(other, path)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, replace_first)


def test_a_result_names_the_teacher_that_was_read(script, small, light, tmp_path, monkeypatch):
    """And the next run does not learn from what was remembered of it."""
    path, good = tmp_path / "teacher.pth", Path(light[1]).read_bytes()
    torch.manual_seed(9)
    checkpoint.save(models.build("resnet20", 4), path)
    read = hashlib.sha256(path.read_bytes()).hexdigest()
    common = ["train_distillation.py", *small, "--teacher", path, *light[2:], "--batch_size", 20, "--epochs", 1]
    clean, result = ["--checkpoint_dir", "c", "--results_dir", "r"], tmp_path / "results" / "folder"
    with monkeypatch.context() as patched:
        replaced_while(patched, jobs, "evaluate", path, good)
        ran = script(*common)
    assert ran.code == 0 and "teacher.pth has changed since it was read" in ran.err
    (result,) = result.glob("*.json")
    assert json.loads(result.read_text())["teacher"]["sha256"] == read != hashlib.sha256(good).hexdigest()
    ran = script(*common, "--overwrite")
    assert ran.code == 0 and "has changed" not in ran.err
    assert ran.out == script(*common, *clean).out


@pytest.mark.parametrize("what", ["weights", "shorter"])
def test_what_a_run_starts_from_is_what_its_result_names(script, small, tmp_path, monkeypatch, what):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.pth")
        checkpoint.save(models.build("resnet20", 4), files[-1])
    common = ["train.py", "--model_job", "student", "--student_arch", "resnet20", *small, "--batch_size", 20]
    path, flags = files[0], ["--weights", files[0]]
    if what == "shorter":
        assert script(*common, "--epochs", 1).code == 0
        path, flags = tmp_path / "checkpoints" / "folder" / "student_resnet20.pth", ["--resume"]
    replaced_while(monkeypatch, torch, "manual_seed", path, files[1].read_bytes())  # before the network is built
    refused(script(*common, *flags, "--epochs", 2), f"{path.name} has changed since this run began; start it again")
