"""On a GPU: what is computed there is what a CPU computes, and no step waits for it. Skipped where there is none."""

import copy
import json
import re
import signal

import pytest
import torch
from as_processes import Started, thin
from test_devices import ROWS
from test_scripts import EPOCH, TEST, losses_of

import engine
import jobs
import models
import teacher as teachers
from data import Batches, Split
from losses import LOSSES
from recipes import RECIPES, under
from teacher import Teacher
from util import runtime
from util.graphs import WARM_UP, Graphed
from util.mixing import Mixing
from util.runtime import Runtime

DEVICE = runtime.accelerator()
CPU = Runtime(torch.device("cpu"), "fp32")
BOTH = frozenset({"logits", "last_map"})
N = 40

pytestmark = pytest.mark.skipif(DEVICE is None, reason="needs a GPU")
cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.job)


@pytest.fixture(scope="module")
def gpu():
    return runtime.choose(DEVICE, "fp32")


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch):
    thin(monkeypatch.setattr)


def batches_of(digits, where, n=N, batch_size=16, **options):
    split = Split(digits.train.images[:n], digits.train.labels[:n])
    return Batches(split, digits.mean, digits.std, batch_size, where.device, **{"shuffle": True, **options})


def built(name, change=lambda network: network):
    torch.manual_seed(4)
    return change(models.build(name, 10))


@pytest.fixture
def teach(scaled_like_trained, tmp_path):
    """A teacher on a device, with a cache in a folder of its own: teach(where)."""
    return lambda where, **options: Teacher(
        built("teacher", scaled_like_trained), where, "sha", 50.0, cache_dir=tmp_path / where.device.type, **options
    )


def started(row, where, network, digits, teach, **options):
    """What engine.fit is given for the row on that device."""
    batches = batches_of(digits, where, **options)
    network = copy.deepcopy(network).to(where.device, memory_format=torch.channels_last)
    torch.manual_seed(6)  # of the loss's learnt parts
    source, objective = jobs.aim(row, network, teach(where) if row.distils else None, batches)
    return network, batches, objective, source


def epoch(row, where, network, digits, teach, steps=3, **options):
    """The figures of a training of an epoch on that device, and the network."""
    network, batches, objective, source = started(row, where, network, digits, teach, **options)
    (figures,) = engine.fit(
        network,
        batches,
        objective,
        alpha=torch.full((1, len(batches)), 0.6),
        learning_rate=lambda epoch, iteration: 1e-3,
        runtime=where,
        teacher=source,
    )
    figures.pop("seconds")
    return figures, network


@rows
def test_a_row_s_gradient_is_the_cpu_s(row, digits, gpu, teach, scaled_like_trained):
    network, found = built(row.built, scaled_like_trained), []
    for where in (CPU, gpu):
        trained, batches, objective, source = started(row, where, network, digits, teach)
        batch, alpha = next(batches.epoch(0)), torch.tensor(0.6, device=where.device)
        terms = objective(trained(batch.images), source and source(batch), batch.labels, alpha)
        terms["loss"].backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in trained.parameters() if p.grad is not None])
        found.append(({name: value.item() for name, value in terms.items()}, gradients))
    (expected, gradient), (given, ours) = found
    assert given == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert (ours - gradient).norm() < 5e-3 * gradient.norm()


@pytest.mark.parametrize("job", ["student", "distillation", "distillation_LDH", "distillation_LDH6"])
def test_an_epoch_is_the_cpu_s(job, digits, gpu, teach):
    row, network = RECIPES[job], built(RECIPES[job].built)
    (expected, theirs), (found, ours) = (epoch(row, where, network, digits, teach) for where in (CPU, gpu))
    expected.pop("train_top1"), found.pop("train_top1")  # of 40 images, one of which may lie between two classes
    assert found == pytest.approx(expected, rel=5e-3)
    for mine, its in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine.cpu(), its, rtol=1e-2, atol=1e-3)


def test_a_test_is_the_cpu_s(digits, gpu, scaled_like_trained):
    network = built("student", scaled_like_trained)
    expected, found = (
        engine.evaluate(network, batches_of(digits, where, shuffle=False), where) for where in (CPU, gpu)
    )
    assert found.pop("correct") == expected.pop("correct")
    assert found == pytest.approx(expected, rel=1e-4)


@cuda
@rows
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(row, precision, digits, teach):
    check_no_wait(row, Runtime(torch.device("cuda", 0), precision), digits, teach)


@cuda
@pytest.mark.parametrize("row", [RECIPES["student"], RECIPES["distillation"]], ids=lambda row: row.job)
@pytest.mark.parametrize("training", ["reference", "benchmark", "strong"])
def test_a_step_on_augmented_images_never_waits(row, training, digits, teach):
    mixing = Mixing(0.2, 1.0) if training == "strong" else None
    where = Runtime(torch.device("cuda", 0), "bf16")
    check_no_wait(under(row, training), where, digits, teach, augment=True, mixing=mixing)


@cuda
def test_to_wait_for_the_device_can_be_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_wait(row, where, digits, teach, **options):
    """Train the row for an epoch; to wait for the device is an error from its first loss to its last step.

    An epoch's beginning may wait, and its end, which reads the figures.
    """
    network, batches, objective, source = started(row, where, built(row.built), digits, teach, **options)
    steps, forward = [], objective.forward

    def watched(*given):
        torch.cuda.set_sync_debug_mode("error")
        steps.append(1)
        return forward(*given)

    objective.forward = watched
    means = engine.Position.means

    def read(at, *given):
        torch.cuda.set_sync_debug_mode("default")
        return means(at, *given)

    alpha, rate = torch.full((1, len(batches)), 0.6), jobs.learning_rate(row, len(batches))
    options = {"alpha": alpha, "learning_rate": rate, "optimiser": jobs.optimiser(row), "teacher": source}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.Position, "means", read)
            next(engine.fit(network, batches, objective, runtime=where, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == len(batches)


@pytest.mark.parametrize("augment", [False, True])
def test_the_order_is_the_cpu_s(digits, gpu, augment):
    theirs, ours = (batches_of(digits, where, augment=augment).epoch(2) for where in (CPU, gpu))
    for its, mine in zip(theirs, ours, strict=True):
        assert its.index.equal(mine.index.cpu()) and its.labels.equal(mine.labels.cpu())
        torch.testing.assert_close(its.images, mine.images.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_outputs_are_remembered_on_the_host_and_on_the_device(digits, gpu, teach, monkeypatch, free):
    monkeypatch.setattr(teachers, "free_memory", lambda device: free)
    teacher, batches = teach(gpu), batches_of(digits, gpu)
    source = teacher.source(batches, BOTH)
    assert source is not teacher
    for batch in batches.epoch(0):
        given, live = source(batch), teacher(batch)
        for mine, its in ((given.logits, live.logits), (given.last_map, live.last_map)):
            assert mine.device == gpu.device
            torch.testing.assert_close(mine.float(), its.float(), rtol=1e-3, atol=1e-3)


def test_views_are_remembered(digits, gpu, teach):
    teacher, batches = teach(gpu), batches_of(digits, gpu, augment=True)
    source = teacher.source(batches, frozenset({"logits"}))
    assert source is not teacher
    for number in (0, 1):
        for batch in batches.epoch(number):
            torch.testing.assert_close(source(batch).logits, teacher(batch).logits, rtol=1e-3, atol=1e-3)


def test_images_that_do_not_fit_the_device(digits, gpu, monkeypatch):
    whole = [batch.images for batch in batches_of(digits, gpu, augment=True).epoch(0)]
    monkeypatch.setattr("data.free_memory", lambda device: 1)
    batches = batches_of(digits, gpu, augment=True)
    assert batches.images is None
    for expected, batch in zip(whole, batches.epoch(0), strict=True):
        torch.testing.assert_close(batch.images, expected)


# the scripts


@pytest.fixture
def on_gpu(small):
    """As `small`, on the GPU and in the precision that it is given by itself."""
    return [*small, "--device", "auto", "--precision", "auto"]


def test_all_rows(script, on_gpu, tmp_path):
    ran = script("reproduce.py", *on_gpu, "--weights", "none", "--epochs", 2, "--batch_size", 16)
    assert ran.code == 0 and "CUDA graph" not in ran.err, ran.err
    results = [json.loads(path.read_text()) for path in (tmp_path / "results" / "folder").glob("*.json")]
    assert {result["job"] for result in results} == {*RECIPES}
    assert {result["device"] for result in results} == {runtime.choose(DEVICE).describe()}
    if DEVICE == "cuda":
        assert all(result["peak_memory"] > 0 for result in results)


@pytest.fixture
def teacher_file(tmp_path, scaled_like_trained):
    path = tmp_path / "resnet50.pth"
    torch.save(scaled_like_trained(models.build("teacher", 4)).state_dict(), path)
    return path


def test_all_losses(script, on_gpu, teacher_file, tmp_path):
    flags = ["--suite", "losses", "--teacher", teacher_file, "--epochs", 2, "--batch_size", 16]
    ran = script("reproduce.py", *on_gpu, *flags)
    assert ran.code == 0 and "CUDA graph" not in ran.err, ran.err
    results = [json.loads(path.read_text()) for path in (tmp_path / "results" / "folder").glob("*.json")]
    assert len(results) == 1 + len(LOSSES)


@pytest.mark.parametrize("training", ["benchmark", "strong"])
def test_other_trainings(script, on_gpu, teacher_file, training):
    flags = ["--training", training, "--jobs", "student", "distillation", "--learning_rate", 0.001]
    ran = script("reproduce.py", *on_gpu, *flags, "--teacher", teacher_file, "--epochs", 2, "--batch_size", 16)
    assert ran.code == 0 and "CUDA graph" not in ran.err, ran.err


def test_a_checkpoint_tests_the_same_on_both(script, on_gpu, small):
    assert script("train.py", "--model_job", "student", *on_gpu, "--epochs", 2, "--batch_size", 16).code == 0
    here, there = (script("test.py", "--model_job", "student", *flags) for flags in (small, on_gpu))
    assert here.code == there.code == 0, there.err
    ours, theirs = ([*map(float, re.search(TEST, ran.out).groups())] for ran in (there, here))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.fixture
def distilling(on_gpu, teacher_file):
    """The flags of a feature row, its teacher among them."""
    return ["--model_job", "distillation_LDH6", *on_gpu, "--teacher", teacher_file, "--epochs", 2, "--batch_size", 16]


def test_images_streamed(script, distilling):
    ran = script("train_distillation.py", *distilling, "--stream", "--augment")
    assert ran.code == 0, ran.err


def test_a_compiled_teacher_gives_what_it_gives(digits, gpu, teach):
    """Over enough steps that a CUDA graph is replayed."""
    teacher, batches = teach(gpu), batches_of(digits, gpu, augment=True)
    expected = [teacher(batch) for number in range(3) for batch in batches.epoch(number)]
    teacher.forward = jobs.forward_of(teacher.network, batches, gpu, trained=False)
    given = (teacher(batch) for number in range(3) for batch in batches.epoch(number))
    for found, its in zip(given, expected, strict=True):
        torch.testing.assert_close(found.logits, its.logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.last_map, its.last_map, rtol=1e-3, atol=1e-3)


def test_compiled(script, distilling):
    """Over enough steps that CUDA graphs are replayed."""
    flags = [*distilling, "--precision", "fp32", "--epochs", 6, "--learning_rate", 1e-4]
    plain, ran = (script("train_distillation.py", *flags, "--compile", how, "--name", how) for how in ("off", "on"))
    assert ran.code == 0 and "torch.compile failed" not in ran.err and "CUDA graph" not in ran.err, ran.err
    assert losses_of(ran.out) == pytest.approx(losses_of(plain.out), rel=0.01)


@cuda
@pytest.mark.parametrize(
    "flags",
    [
        ["--model_job", "distillation_LDH6"],
        ["--model_job", "distillation_LDH6", "--augment"],  # a live teacher
        ["--model_job", "distillation", "--training", "strong"],  # mixed images, a learning rate of each step
        ["--loss", "dkd", "--schedule", "per iteration", "--training", "benchmark"],
        ["--loss", "crd", "--alpha", 0.5, "--negatives", 16],  # draws at each step
        ["--loss", "reviewkd", "--alpha", 0.5],
    ],
    ids=lambda flags: " ".join(map(str, flags[1:])),
)
def test_a_graph_trains_as_steps_one_by_one(script, on_gpu, teacher_file, flags):
    """Over enough steps that it is replayed, a short batch between them, and a part of them after a stop."""
    common = [*on_gpu, "--teacher", teacher_file, "--batch_size", 16, "--precision", "fp32"]
    flags = ["train_distillation.py", *flags, *common, "--epochs", 5, "--learning_rate", 1e-4]
    plain, ran = (script(*flags, "--cuda_graphs", how, "--name", how) for how in ("off", "on"))
    assert ran.code == 0 and "CUDA graph" not in ran.err, ran.err
    assert losses_of(ran.out) == pytest.approx(losses_of(plain.out), rel=0.01)


@cuda
def test_a_graph_is_replayed_and_shows_what_cannot_be_recorded(capfd):
    calls, total = [], torch.zeros((), device="cuda")

    def step(value):
        calls.append(value)
        total.add_(value.sum())

    values = [torch.full((4,), float(k), device="cuda") for k in range(8)]
    whole, waiting = Graphed(step, "a sum"), Graphed(lambda value: value.sum().item(), "a wait")
    for value in values:
        whole(value)
    assert total.item() == 4 * sum(range(8)) and len(calls) == WARM_UP + 1
    assert [waiting(value) for value in values] == [4.0 * k for k in range(8)]
    assert capfd.readouterr().err.startswith("a wait can't be a CUDA graph (")
    whole(values[7])
    assert total.item() == 4 * (sum(range(8)) + 7)


def test_a_run_stopped_goes_on(on_gpu, tmp_path):
    command = ["train.py", "--model_job", "student", *on_gpu, "--epochs", 4000, "--batch_size", 8]
    for flags, word in ([], "--resume"), (["--resume"], "going on after"):
        running = Started(*command, *flags, cwd=tmp_path)
        assert re.match(EPOCH, running.stdout.readline())
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
        assert word in err, err


def test_predicted(script, on_gpu, tmp_path):
    assert script("train.py", "--model_job", "student", *on_gpu, "--epochs", 1, "--batch_size", 16).code == 0
    checkpoint, images = tmp_path / "checkpoints" / "folder" / "resnet18.pth", on_gpu[3] / "test"
    theirs, ours = (script("predict.py", "--model", checkpoint, "--device", name, images) for name in ("cpu", "auto"))
    assert ours.code == 0 and [line.split()[:2] for line in ours.out.splitlines()] == [
        line.split()[:2] for line in theirs.out.splitlines()
    ]
