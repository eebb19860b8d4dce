"""Several processes compute what one computes, under torchrun, by gloo on the CPU."""

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from as_processes import FORKS, as_torchrun, environments, thin

import cli
import data
import engine
import jobs
import losses
import models
from data import Batches, Split
from losses import LOSSES
from outputs import Outputs
from recipes import RECIPES
from teacher import Teacher
from util import processes
from util.processes import Processes
from util.runtime import Runtime, UserError
from zoo import suites

CPU = torch.device("cpu")
HERE = Path(__file__).parent
LOSS = re.compile(r"Epoch \[(\d+)/\d+\], Train Loss: (\S+)")


@pytest.fixture
def finished(tmp_path):
    """Run a script as n processes, with changes (see as_processes.py): all that they print."""

    def run(n, *args, **options):
        running = as_torchrun(n, *args, cwd=tmp_path, **options)
        outs, errs = zip(*(process.communicate() for process in running), strict=True)
        assert [process.returncode for process in running] == [0] * n, errs
        return "".join(outs), "".join(errs)

    return run


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch):
    thin(monkeypatch.setattr)


@pytest.fixture
def thin_teacher(tmp_path, scaled_like_trained):
    torch.manual_seed(5)
    torch.save(scaled_like_trained(models.build("teacher", 4)).state_dict(), tmp_path / "resnet50.pth")
    return tmp_path / "resnet50.pth"


def losses_in(out):
    return {int(epoch): float(loss) for epoch, loss in LOSS.findall(out)}


def weights(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("job, batch_size", [("student", 12), ("distillation_LDH", 11)])
def test_two_processes_train_as_one(finished, small, thin_teacher, tmp_path, job, batch_size):
    """40 images in batches of 12, the last of 4; or of 11, whose parts are of 6 and 5, and of the last of 4 and 3.

    In float32 Adam makes a whole step of a gradient that is nothing but rounding. The student here has such a weight
    with uneven parts, so its parts are even; that the weights of uneven ones are right is shown in float64 below.
    """
    script = "train.py" if job == "student" else "train_distillation.py"
    args = [script, "--model_job", job, *small, "--epochs", 3, "--batch_size", batch_size, "--learning_rate", 1e-4]
    args += [] if job == "student" else ["--teacher", thin_teacher]
    runs = {}
    for n in (1, 2):
        flags = ["--checkpoint_dir", tmp_path / str(n), "--results_dir", tmp_path / str(n)]
        out, err = finished(n, *args, *flags, changes="thin,frozen_bn")
        assert out.count("Epoch") == 3 and out.count("Test Loss") == 1  # the main process alone speaks
        runs[n] = losses_in(out)
    assert runs[2] == pytest.approx(runs[1], rel=1e-5)
    name = f"{RECIPES[job].checkpoint}.pth"
    one, two = weights(tmp_path / "1" / name), weights(tmp_path / "2" / name)
    start = models.build(RECIPES[job].network, 4).state_dict()
    for key, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[key], value, rtol=1e-2, atol=2e-4)
    assert not one["conv1.weight"].equal(start["conv1.weight"])
    assert not list(tmp_path.glob("*/*.state*"))


def test_reproduce_as_two_processes(finished, small, tmp_path):
    args = ["reproduce.py", *small, "--weights", "none", "--epochs", 1, "--batch_size", 20, "--jobs", "teacher"]
    args += ["distillation", "distillation_LDH6", "--results_dir", tmp_path]
    out, _ = finished(2, *args)
    assert out.count("Epoch") == 4 and out.count("Teacher Top-1") == 1  # the teacher has two epochs
    assert len(list(tmp_path.glob("*_seed0.json"))) == 3 and (tmp_path / "RESULTS.md").exists()
    out, err = finished(2, *args)
    assert "Epoch" not in out and err.count("finished already") == 3


def test_testing_gives_exactly_the_same_figures(finished, tmp_path):
    """297 digits are two batches, one for each of two processes, and none for the third of three."""
    torch.manual_seed(0)
    folder = tmp_path / "checkpoints" / "digits"
    folder.mkdir(parents=True)
    for kind, name in (("student", "resnet18"), ("feature_student", "Distilled_resnet18_LDH6")):
        torch.save(models.build(kind, 10).state_dict(), folder / f"{name}.pth")
    for script, job in (("test.py", "student"), ("test_LDH.py", "distillation_LDH6")):
        printed = {n: finished(n, script, "--model_job", job, "--dataset", "digits")[0] for n in (1, 2, 3)}
        assert "Top-1" in printed[1] and printed[1] == printed[2] == printed[3]


def test_under_torchrun_a_run_that_lost_a_process_goes_on_and_stops_at_a_signal(finished, small, tmp_path):
    """Killed in its third epoch of five steps, when the state of the second is there; stopped, and gone on with."""
    args = ["train.py", "--model_job", "student", *small, "--epochs", 20, "--batch_size", 8]
    folders = {name: ["--checkpoint_dir", tmp_path / name, "--results_dir", tmp_path / name] for name in ("a", "b")}
    expected, _ = finished(2, *args, *folders["a"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", HERE / "as_processes.py", "thin,die"]
    command += [*args, *folders["b"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    running = subprocess.Popen([str(part) for part in command], **pipes)
    out = [running.stdout.readline() for _ in range(3)]  # the third is of the processes started anew
    running.send_signal(signal.SIGTERM)
    rest, err = running.communicate(timeout=120)
    assert running.returncode != 0 and "going on after 2 epochs" in err and "--resume" in err
    assert (tmp_path / "b" / "resnet18.state").exists() and not (tmp_path / "b" / "resnet18.pth").exists()
    end, _ = finished(2, *args, *folders["b"], "--resume")
    assert losses_in("".join(out) + rest + end) == losses_in(expected)
    one, two = (weights(tmp_path / name / "resnet18.pth") for name in folders)
    assert all(value.equal(two[key]) for key, value in one.items())


def test_a_users_mistake_is_one_line(small, tmp_path):
    running = as_torchrun(2, "train_distillation.py", *small, "--alpha", 7, cwd=tmp_path)
    errs = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [2, 2]
    assert errs[0].count("error: argument --alpha") == 1 and errs[1] == ""


def test_an_error_of_one_process_ends_all_with_one_line(small, tmp_path):
    args = ["train.py", "--model_job", "student", *small, "--epochs", 2, "--batch_size", 8]
    running = as_torchrun(2, *args, cwd=tmp_path, changes="thin,fail")
    errs = "".join(process.communicate()[1] for process in running)
    assert [process.returncode for process in running] == [1, 2]
    assert errs.count("error") == 1 and "train.py: error: an image of mine is damaged" in errs


def test_a_memory_of_images_is_refused_before_anything_is_done(script, monkeypatch):
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    for name, value in environments(2)[0].items():
        monkeypatch.setenv(name, value)
    suite, words = (
        ["reproduce.py", "--suite", "losses", "--dataset", "digits"],
        "crd remembers single images, and each of",
    )
    for command in (["train_distillation.py", "--loss", "crd"], [*suite, "--jobs", "crd"]):
        ran = script(*command)
        assert ran.code == 2 and f": {words}" in ran.err and "can't meet" not in ran.err
    assert f"left out: losses_crd: {words}" in script(*suite).err


# parts


class One(Processes):
    """One of several, without the others."""

    def all_reduce_sum(self, tensor):
        pass


def parts(digits, size, n=50, batch_size=16, **options):
    split = Split(digits.train.images[:n], digits.train.labels[:n])
    given = (Batches(split, digits.mean, digits.std, batch_size, CPU, processes=One(rank, size), **options)
             for rank in range(size))  # fmt: skip
    return [list(batches.epoch(2, 1)) for batches in given]


class Sent(One):
    """Remembers what it would send to the others."""

    def all_reduce_sum(self, tensor):
        self.sent = tensor.clone()


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradients_of_uneven_parts_add_up_to_the_whole_batchs(digits, size):
    torch.manual_seed(0)
    network = models.build("student", 10).double().eval()  # batch norm's statistics would be of a part

    def gradient(rank, size):
        batches = Batches(
            Split(digits.train.images[:11], digits.train.labels[:11]), digits.mean, digits.std, 11, CPU,
            shuffle=True, processes=Sent(rank, size),
        )  # fmt: skip
        batch = next(batches.epoch(0))
        network.zero_grad()
        F.cross_entropy(network(batch.images.double()).logits, batch.labels).backward()
        batches.processes.average_gradients(network, batch.share)
        alone = torch.cat([value.grad.flatten() for value in network.parameters()])
        return alone if size == 1 else batches.processes.sent

    whole = gradient(0, 1)
    torch.testing.assert_close(sum(gradient(rank, size) for rank in range(size)), whole, rtol=1e-9, atol=1e-12)


def save_gradients(path, environment=None):
    """With each loss, at its published weight, a step on a batch of 11: its gradients and figures, into the file.

    Batch norm is as in a test: else it would be that of a part.
    """
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    where = Runtime(CPU, "fp32", processes.join("cpu"))
    digits, found = data.load("digits"), {}
    split = Split(digits.train.images[:11], digits.train.labels[:11])
    batches = Batches(split, digits.mean, digits.std, 11, CPU, shuffle=True, processes=where.processes)
    torch.manual_seed(0)
    teacher = Teacher(models.build("resnet8x4", 10).eval(), where, "sha", 50.0)
    for name in NO_MEMORY:
        row = cli.of_arch(suites.published(name), "resnet20", RECIPES["teacher"])
        torch.manual_seed(1)
        network = models.build("resnet20+resnet8x4" if name == "simkd" else "resnet20", 10).eval()
        source, objective = jobs.aim(row, network, teacher, batches)
        trained, at = torch.nn.ModuleList([network, objective.eval()]), engine.Position()
        optimiser = torch.optim.SGD(trained.parameters(), lr=0.0)
        step = engine.Step(trained, network, objective, optimiser, at, where, 1, graphs=False)
        batch = next(batches.epoch(0))
        step(batch, source(batch), torch.tensor(0.0), 0.0)
        gradients = {key: value.grad for key, value in trained.named_parameters() if value.grad is not None}
        found[name] = gradients, at.means(11, where.processes)
    torch.save(found, path)
    processes.leave()


NO_MEMORY = [name for name, loss in LOSSES.items() if not loss.remembers]


@pytest.fixture(scope="module")
def as_one_and_as_several(tmp_path_factory):
    """Whatever save_gradients found in one process, and in each of several, whose parts of the batch are uneven."""
    folder, n = tmp_path_factory.mktemp("gradients"), 3
    paths = [folder / f"{rank}.pt" for rank in range(n)]
    running = [FORKS.Process(target=save_gradients, args=given) for given in zip(paths, environments(n), strict=True)]
    for process in running:
        process.start()
    save_gradients(folder / "alone.pt")
    for process in running:
        process.join(60)
        process.kill()
    return [weights(path) for path in (folder / "alone.pt", *paths)]


@pytest.mark.parametrize("name", NO_MEMORY)
def test_each_loss_has_the_gradients_and_figures_of_one_process(as_one_and_as_several, name):
    (expected, figures), *several = [found[name] for found in as_one_and_as_several]
    for gradients, given in several:
        assert given == pytest.approx(figures, rel=1e-4) and gradients.keys() == expected.keys()
        largest = max(value.abs().max().item() for value in expected.values())
        for key, value in gradients.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5 * largest)


def dropped(digits, rank, size, start=0):
    """What a network drops in three epochs of four steps, from epoch `start` on, if it is that process of so many."""
    given = []

    class Network(torch.nn.Linear):
        def forward(self, images):
            given.append(F.dropout(torch.ones(64)))
            return Outputs(super().forward(images.flatten(1)))

    split, where = Split(digits.train.images[:8], digits.train.labels[:8]), One(rank, size)
    batches = Batches(split, digits.mean, digits.std, 2, CPU, shuffle=True, seed=1, processes=where)
    torch.manual_seed(1)
    list(engine.fit(
        Network(192, 10), batches, losses.Objective(RECIPES["student"]), alpha=torch.ones(3, 4), start=start,
        learning_rate=lambda *_: 0.1, runtime=Runtime(CPU, "fp32", where),
    ))  # fmt: skip
    return torch.stack(given)


def test_each_process_drops_its_own_and_the_same_when_the_run_goes_on(digits):
    both = torch.cat([dropped(digits, rank, 2) for rank in (0, 1)])
    assert len(both) == 24 and len(both.unique(dim=0)) == 24
    assert dropped(digits, 1, 2, start=2).equal(both[-4:])


def test_one_process_drops_by_the_seed_alone(digits):
    torch.manual_seed(1)
    torch.nn.Linear(192, 10)
    expected = torch.stack([F.dropout(torch.ones(64)) for _ in range(12)])
    assert dropped(digits, 0, 1).equal(expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_the_parts_of_a_batch_are_the_batch(digits, size, augment):
    options = {"shuffle": True, "seed": 3, "augment": augment}
    whole = parts(digits, 1, **options)[0]
    split = parts(digits, size, **options)
    for number, batch in enumerate(whole):
        mine = [of_rank[number] for of_rank in split]
        assert torch.cat([part.index for part in mine]).equal(batch.index)
        assert torch.cat([part.images for part in mine]).equal(batch.images)
        assert torch.cat([part.labels for part in mine]).equal(batch.labels)
        assert sum(part.share for part in mine) == pytest.approx(1)
        assert [part.share for part in mine] == [len(part.labels) / len(batch.labels) for part in mine]


def test_in_order_each_image_is_given_once(digits):
    indices = [batch.index for of_rank in parts(digits, 3) for batch in of_rank]
    assert torch.cat(indices).sort().values.equal(torch.arange(16, 50))  # from batch 1 on
    assert {len(index) for index in indices} == {16, 2}


@pytest.mark.parametrize("processes, batch_size, words", [(8, 3, "for each of 8 processes"), (1, 39, "leaves 1 of 40")])
def test_a_part_too_small_is_refused(processes, batch_size, words):
    split = Split(torch.zeros(40, 8, 8, 3, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    images = data.Dataset("folder", split, split, ("a",), (0.5,) * 3, (0.5,) * 3)
    recipe = jobs.replace(RECIPES["student"], batch_size=batch_size)
    setup = jobs.Setup(images, Runtime(CPU, "fp32", Processes(0, processes)), Path("x"), Path("x"))
    with pytest.raises(UserError, match=words):
        jobs.train(recipe, setup)


def test_sync_batch_norm_keeps_the_keys_and_folds(scaled_like_trained):
    network = scaled_like_trained(models.build("student", 4)).eval()
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(models.build("student", 4))
    synced.load_state_dict(network.state_dict())
    folded = models.folded(synced)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in folded.modules())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(images).logits, network(images).logits, rtol=1e-4, atol=1e-4)
