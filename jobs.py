"""One job: from a recipe to a tested checkpoint and a result on the disk."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy
import torch
import torchvision

import checkpoint
import engine
import losses
import models
from data import Batch, Batches, Dataset, Split
from recipes import RECIPES, Recipe
from teacher import Teacher
from util.files import remove_leftovers, sha256, write_json
from util.runstate import Keeper, refuse_difference
from util.runtime import Diverged, Runtime, UserError, compiled, inference_batch, say


@dataclass(frozen=True)
class Setup:
    """What a job runs in: the data set, the hardware, the folders it writes to, and the choices that no row makes.

    seed: of the weights and of the data's order. augment: random crop and flip of the training images. weights: the
    teacher's start, see checkpoint.start_teacher. compile_mode: "auto", "on" or "off", see forward_of.
    mode: "new", "resume" or "overwrite", what to do with the state of an unfinished run, see runstate.Keeper.begin.
    sync_bn: of several processes on CUDA, batch norm takes its statistics over all parts of a batch.
    """

    dataset: Dataset
    runtime: Runtime
    checkpoint_dir: Path
    results_dir: Path
    seed: int = 0
    augment: bool = False
    weights: str = "imagenet"
    compile_mode: str = "auto"
    mode: str = "new"
    sync_bn: bool = True


def train(recipe: Recipe, setup: Setup, teacher: Teacher | None = None) -> None:
    """Train a recipe's network, save it, test it; print the lines of both and write the result.

    teacher: for the rows that distil.
    Raises Diverged (no checkpoint is written), Stopped (a signal came; the run's state is saved), UserError (a bad
    combination, a full disk, a run state in the way or of other settings, a run that another process is making).
    """
    processes = setup.runtime.processes
    _check_batches(recipe, setup.dataset, processes.size)
    keeper = Keeper(state_path(recipe, setup), identity(recipe, setup, teacher), processes)
    with keeper.locked():
        if processes.main:
            remove_leftovers(checkpoint_path(recipe, setup))
        keeper.begin(setup.mode)
        if setup.mode == "resume" and keeper.state is None and is_finished(recipe, setup, teacher):
            say(f"{recipe.job}, seed {setup.seed}: finished already")
            return
        try:
            network = _trained(recipe, setup, teacher, keeper)
            figures = evaluate(network, setup.dataset, plain(setup.runtime))
            if not math.isfinite(figures["mean_ce"]):  # the last step alone spoilt it
                raise Diverged(f"training diverged: the Test Loss is {figures['test_loss']}")
        except Diverged:
            keeper.finish()  # such a run can't go on
            raise
        if processes.main:
            checkpoint.save(network, checkpoint_path(recipe, setup))
        print_figures(figures)
        if processes.main:
            write_json(_result(recipe, setup, teacher, keeper.figures, figures), result_path(recipe, setup))
        keeper.finish()


def _result(
    recipe: Recipe, setup: Setup, teacher: Teacher | None, epochs: list[dict[str, float]], figures: dict[str, float]
) -> dict:
    """What is kept of a finished run: what it was, and the figures of its epochs and of its test."""
    seconds = sum(epoch["seconds"] for epoch in epochs)
    path = checkpoint_path(recipe, setup)
    return {
        **identity(recipe, setup, teacher),
        "teacher_top1": teacher and teacher.top1,
        "epochs": epochs,
        "test": figures,
        "seconds": seconds,
        "images_per_second": recipe.epochs * len(setup.dataset.train.labels) / seconds,
        "checkpoint": path.name,
        "checkpoint_sha256": sha256(path),
        "versions": versions(),
        "device": setup.runtime.describe(),
        "processes": setup.runtime.processes.size,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _trained(recipe: Recipe, setup: Setup, teacher: Teacher | None, keeper: Keeper) -> models.CifarResNet:
    """The network after its training, from wherever the keeper's state is; prints a line an epoch."""
    dataset, device, processes = setup.dataset, setup.runtime.device, setup.runtime.processes
    torch.manual_seed(setup.seed)
    network = models.build(recipe.network, dataset.num_classes)
    if recipe.network == "teacher":
        with processes.first_on_its_machine():
            checkpoint.start_teacher(network, setup.weights)
    if _batch_norm(setup) == "whole batch" and processes.size > 1:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif processes.size > 1 and setup.sync_bn:
        say("batch norm: on a CPU each process normalises its own part of a batch; SyncBatchNorm needs CUDA")
    network = network.to(device, memory_format=torch.channels_last)
    batches = Batches(
        dataset.train, dataset.mean, dataset.std, recipe.batch_size, device,
        shuffle=True, seed=setup.seed, augment=setup.augment, processes=processes,
    )  # fmt: skip
    loss = batch_loss(recipe, forward_of(network, batches, setup.runtime, setup.compile_mode), teacher, batches)
    if keeper.state:
        at = keeper.state["position"]
        say(f"{recipe.job}: going on after {at['epoch']} epochs and {at['iteration']} batches")
    with keeper.listening():
        for figures in engine.fit(
            network,
            batches,
            loss,
            lambda epoch: engine.step_lr(recipe.learning_rate, epoch, recipe.scheduler_step),
            recipe.epochs,
            setup.runtime,
            recipe.job,
            keeper,
        ):
            loss = figures["train_loss_over_batches"]
            print(f"Epoch [{figures['epoch']}/{recipe.epochs}], Train Loss: {loss:.8f}", flush=True)
    return network


def _batch_norm(setup: Setup) -> str:
    """What batch norm takes its statistics over; torch's SyncBatchNorm works on CUDA alone."""
    size = setup.runtime.processes.size
    if size == 1 or (setup.sync_bn and setup.runtime.device.type == "cuda"):
        return "whole batch"
    return f"each of {size} parts of a batch"


def is_finished(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> bool:
    """Whether this very run is on the disk, its result and the checkpoint that the result is about.

    Raises UserError where a result of other settings is in its place.
    """
    result, weights = result_path(recipe, setup), checkpoint_path(recipe, setup)
    if not (result.exists() and weights.exists()):
        return False
    found = json.loads(result.read_text())
    advice = "choose another --results_dir and --checkpoint_dir, or delete it"
    refuse_difference(found, identity(recipe, setup, teacher), result, advice)
    return found["checkpoint_sha256"] == sha256(weights)


def forward_of(
    network: models.CifarResNet, batches: Batches, runtime: Runtime, compile_mode: str
) -> Callable[[torch.Tensor], models.Outputs]:
    """What to call for the network's outputs in training: the network, or it compiled, on the very same weights.

    "auto" compiles where that was measured to pay for itself, so far nowhere: on a CPU neither network gains by it, and
    on CUDA it is still to be measured.
    """
    if compile_mode != "on":
        return network
    images = batches.batch_size // runtime.processes.size
    return compiled(network, (images, 3, batches.size, batches.size), runtime)


def batch_loss(
    recipe: Recipe, forward: Callable[[torch.Tensor], models.Outputs], teacher: Teacher | None, batches: Batches
) -> Callable[[Batch, int, int], engine.Terms]:
    """The function that engine.fit minimises: from a batch, its epoch and its iteration to the loss and its terms."""
    objective = losses.objective(recipe)
    alpha = losses.alpha_schedule(recipe.alpha, recipe.epochs, len(batches)).to(batches.device)
    targets = teacher and teacher.source(batches, recipe.compares_maps)

    def loss(batch: Batch, epoch: int, iteration: int) -> engine.Terms:
        student = forward(batch.images)
        terms = objective(student, targets and targets(batch), batch.labels, alpha[epoch, iteration])
        terms["alpha"] = alpha[epoch, iteration]
        terms["train_top1"] = 100 * (student.logits.argmax(1) == batch.labels).double().mean()
        return terms

    return loss


def test(network: models.CifarResNet, dataset: Dataset, runtime: Runtime) -> dict[str, float]:
    """Test the network on the data set's test images; print the figures and give them."""
    figures = evaluate(network, dataset, runtime)
    print_figures(figures)
    return figures


def print_figures(figures: dict[str, float]) -> None:
    """The lines of a test."""
    print(
        f"Test Loss: {figures['test_loss']:.8f}, Top-1 test Accuracy: {figures['top1']:.8f}%, "
        f"Top-5 test Accuracy: {figures['top5']:.8f}%"
    )
    print(f"Mean test cross-entropy: {figures['mean_ce']:.8f}", flush=True)


def evaluate(network: models.CifarResNet, dataset: Dataset, runtime: Runtime) -> dict[str, float]:
    """engine.evaluate on the data set's test images."""
    return engine.evaluate(network, in_order(dataset.test, dataset, runtime), runtime)


def in_order(split: Split, dataset: Dataset, runtime: Runtime) -> Batches:
    """All images of the split, in order, in batches for inference."""
    device = runtime.device
    return Batches(split, dataset.mean, dataset.std, inference_batch(device), device, processes=runtime.processes)


def plain(runtime: Runtime) -> Runtime:
    """The same device in fp32: figures are tested in it whatever the training's precision."""
    return replace(runtime, precision="fp32")


def load_network(job: str, folder: Path, dataset: Dataset, file: Path | None = None) -> models.CifarResNet:
    """The trained network of a job, from `file` or from its checkpoint in the folder. Raises UserError."""
    recipe = RECIPES[job]
    script = "train_distillation.py" if recipe.distils else "train.py"
    flags = "" if dataset.name == "cifar100" else f" --dataset {dataset.name}"
    path = file or folder / f"{recipe.checkpoint}.pth"
    network = models.build(recipe.network, dataset.num_classes)
    hint = f"make it with: python {script} --model_job {job}{flags}"
    return checkpoint.load(network, recipe.network, path, hint)


def make_teacher(network: models.CifarResNet, path: Path, setup: Setup, cache: str, rows: list[Recipe]) -> Teacher:
    """The frozen teacher, tested once, so that nobody distils from a dead one unknowingly; prints its top-1.

    cache: "auto" remembers the teacher's outputs where that saves time, "off" runs it at every step. rows: those that
    will be distilled.
    """
    top1 = evaluate(network, setup.dataset, plain(setup.runtime))["top1"]
    print(f"Teacher Top-1: {top1:.8f}%", flush=True)
    cache_dir = setup.checkpoint_dir / "teacher_cache" if cache == "auto" else None
    return Teacher(network, setup.runtime, sha256(path), top1, cache_dir, any(row.compares_maps for row in rows))


def identity(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> dict:
    """What makes two runs the same run: a result of the same identity need not be made again."""
    dataset = setup.dataset
    row = {key: value for key, value in asdict(recipe).items() if key != "reference"}
    return {
        "job": recipe.job,
        "dataset": dataset.name,
        "data": {
            "train_images": len(dataset.train.labels),
            "test_images": len(dataset.test.labels),
            "classes": dataset.num_classes,
            "image_size": dataset.image_size,
            "fingerprint": dataset.fingerprint,
            "test_fingerprint": dataset.test_fingerprint,
        },
        "seed": setup.seed,
        "augment": setup.augment,
        "precision": setup.runtime.precision,
        "batch_norm": _batch_norm(setup),
        "recipe": row,
        "weights": setup.weights if recipe.network == "teacher" else None,
        "teacher": teacher and {"sha256": teacher.sha256},
    }


def checkpoint_path(recipe: Recipe, setup: Setup) -> Path:
    """Where a run's checkpoint is kept."""
    return setup.checkpoint_dir / f"{recipe.checkpoint}.pth"


def state_path(recipe: Recipe, setup: Setup) -> Path:
    """Where the state of a run is kept while it is not finished."""
    return setup.checkpoint_dir / f"{recipe.checkpoint}.state"


def result_path(recipe: Recipe, setup: Setup) -> Path:
    """Where a run's result is kept."""
    return setup.results_dir / f"{recipe.job}_seed{setup.seed}.json"


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


def _check_batches(recipe: Recipe, dataset: Dataset, processes: int) -> None:
    """Refuse a batch of which a process would get no image, or one on which batch norm has nothing to normalise."""
    n = len(dataset.train.labels)
    smallest = (n % recipe.batch_size or min(n, recipe.batch_size)) // processes
    needed = 2 if math.ceil(dataset.image_size / 8) == 1 else 1  # values a channel; two are needed
    if smallest < needed:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--batch_size {recipe.batch_size} leaves {smallest} of {n} images{each} in the last batch, too few for "
            f"batch norm at {dataset.image_size}x{dataset.image_size} pixels; choose another --batch_size"
        )
