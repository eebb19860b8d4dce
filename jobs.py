"""One job: from a recipe to a tested checkpoint and a result. Owns every path, and what "the same run" is."""

import functools
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import checkpoint
import engine
import losses
import models
from data import Batches, Dataset, Split, subset
from outputs import Outputs
from recipes import RECIPES, TRAININGS, Recipe, described, milestones, warmup_epochs
from report.results import Result, epochs_csv
from teacher import Normalisation, Teacher
from util import environment, parsed, runstate
from util.convolution import replace_all
from util.files import ensure_writable, remove_leftovers, replacing, sha256
from util.graphs import Graphed, possible
from util.mixing import Mixing
from util.processes import restarted, torchrun
from util.runstate import Keeper, differences, refuse_difference
from util.runtime import (
    Diverged,
    Runtime,
    UserError,
    begin_peak_memory,
    compiled,
    inference_batch,
    peak_memory,
    say,
)
from util.scalars import Scalars
from zoo import library_models


@dataclass(frozen=True)
class Setup:
    """What a job runs in: the data set, the runtime, the folders it writes to, and the choices that no row makes.

    seed: of the weights and of the data's order. name: of this run, where it is not to have its job's. augment: random
    crop and flip of the training images, which a recipe's training may have by itself. weights: what the network starts
    from, see start_of. weights_key: the set of weights that is taken of several in a file. compile: the network that is
    trained, and a teacher that runs at every step. cuda_graphs: a step on CUDA is one CUDA graph, see util.graphs.
    stem: of the networks, as models.build has it, or "auto", by the images' size. mode: "new", "resume" or "overwrite",
    see OnDisk. sync_bn: of several processes on CUDA, batch norm takes its statistics over all parts of a batch.
    tensorboard: write the figures for it, too.
    overwrites: whether --overwrite and --name are there to advise.
    """

    dataset: Dataset
    runtime: Runtime
    checkpoint_dir: Path
    results_dir: Path
    seed: int = 0
    name: str | None = None
    augment: bool = False
    weights: str = "auto"
    weights_key: str | None = None
    compile: bool = False
    cuda_graphs: bool = True
    stem: str = "auto"
    mode: str = "new"
    sync_bn: bool = True
    tensorboard: bool = False
    overwrites: bool = True


class Paths(NamedTuple):
    """Where a run's files are. checkpoint: its weights; state: of the unfinished run; result: its JSON."""

    checkpoint: Path
    state: Path
    result: Path

    @property
    def epochs(self) -> Path:
        """The figures of each epoch, as CSV."""
        return self.result.with_suffix(".csv")

    @property
    def scalars(self) -> Path:
        """The folder of the figures for TensorBoard."""
        return self.result.parent / "tensorboard" / self.result.stem


class Trained(NamedTuple):
    """A network from a checkpoint, and what the file says of it; None where it says nothing.

    sha256: of the file's bytes that they are from. given: the normalisation of its images, where the user tells it.
    stem: which it was built with, where the file fits either; else None. key: of the set of weights in the file, where
    the user tells it. unsure: its file does not tell whether it has transform_input, see `settled`.
    """

    network: nn.Module
    about: dict[str, Any] | None
    sha256: str
    given: Normalisation | None = None
    stem: str | None = None
    key: str | None = None
    unsure: bool = False

    @property
    def normalisation(self) -> Normalisation | None:
        """Mean and standard deviation of its images' channels, as given, or where the checkpoint tells them."""
        return self.given or (self.about and (tuple(self.about["mean"]), tuple(self.about["std"])))


ADVICE = "give this run a --name of its own or other folders, or replace that one with --overwrite"
OTHER_FOLDERS = "give other --checkpoint_dir and --results_dir, or move that run away"  # of a script without these two


def checkpoint_path(recipe: Recipe, folder: Path, seed: int = 0, name: str | None = None) -> Path:
    """Where a run's checkpoint is in the folder of the checkpoints: those of seed 0 there, others in seed<k>/."""
    return (folder / f"seed{seed}" if seed else folder) / f"{name or recipe.checkpoint}.pth"


def default_dir(name: str, dataset: str) -> Path:
    """Where the "checkpoints" or the "results" of a data set go unless the user says it."""
    return Path(name) if dataset == "cifar100" else Path(name, dataset)


def paths(recipe: Recipe, setup: Setup) -> Paths:
    """Where the files of this run are."""
    weights = checkpoint_path(recipe, setup.checkpoint_dir, setup.seed, setup.name)
    result = setup.results_dir / f"{setup.name or recipe.job}_seed{setup.seed}.json"
    return Paths(weights, weights.with_name(f"{weights.stem}.state"), result)


def identity(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> dict[str, Any]:
    """What makes two runs the same run: a result of the same identity need not be made again."""
    dataset = setup.dataset
    data = {
        "train_images": len(dataset.train.labels),
        "test_images": len(dataset.test.labels),
        "classes": dataset.num_classes,
        "image_size": dataset.image_size,
        "fingerprint": dataset.fingerprint,
        "test_fingerprint": dataset.test_fingerprint,
        "val_images": len(dataset.val.labels) if dataset.val else 0,
    }
    return {
        "job": recipe.job,
        "dataset": dataset.name,
        "data": data,
        "seed": setup.seed,
        "augment": _augments(recipe, setup),
        "precision": setup.runtime.precision,
        "batch_norm": _batch_norm(setup),
        "recipe": described(replace(recipe, settings=losses.settings_of(recipe), weight=losses.weight_of(recipe))),
        "stem": stem_of(recipe, setup),
        "weights": _content_of(start_of(recipe, setup), setup.weights_key),
        "teacher": teacher and teacher.identity,
        "warm_start": None,
    }


def stem_of(recipe: Recipe, setup: Setup) -> str:
    """The stem of the network that is trained: as torchvision's for its weights where it starts from any."""
    auto = "transform_input" if start_of(recipe, setup) not in (None, "none") else "auto"
    stem = auto if setup.stem == "auto" else setup.stem
    return models.stem_of(recipe.built, stem, setup.dataset.image_size)


def start_of(recipe: Recipe, setup: Setup) -> str | None:
    """What the network's weights start from, see checkpoint.start; None for a student unless it is told."""
    if setup.weights != "auto":
        return setup.weights
    if recipe.network != "teacher":
        return None
    return "imagenet" if checkpoint.imagenet_url(recipe.built) else "none"


def _content_of(start: str | None, key: str | None) -> str | None:
    """What a network starts from: of a file its content, wherever it lies, and the key of the set of weights in it."""
    file = _file_of(start)
    return _file_told(sha256(file), key) if file and file.is_file() else start


def _file_told(digest: str, key: str | None) -> str:
    return f"a file of sha256 {digest}{f', {key}' if key else ''}"


def _file_of(start: str | None) -> Path | None:
    return None if start in (None, "none", "imagenet") else Path(start).expanduser()


def _untold(recipe: Recipe, setup: Setup) -> tuple[str, ...]:
    """What of the identity only the disk can tell: the warm start, and the weights where their file is gone."""
    file = _file_of(start_of(recipe, setup))
    return ("warm_start", "weights") if file and not file.is_file() else ("warm_start",)


def _is_damaged(path: Path) -> bool:
    try:
        checkpoint.read(path, "")
    except UserError:
        return True
    return False


def _digest(path: Path) -> str | None:
    """The file's SHA-256; None where there is none. Raises UserError."""
    try:
        return sha256(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


@dataclass(frozen=True)
class OnDisk:
    """What lies on the disk for a run, as `on_disk` reads it before anything is changed.

    state: the run is unfinished. result: it is finished. another: what lies there is another run's, and why. Nothing
    lies there where all three are missing. shorter: that other run's result, where it differs in having fewer epochs
    alone. lost: a line to say where the run's checkpoint is gone or damaged. digests: of the checkpoint and the result,
    None for a missing file.

    What a run does by what lies there and by its mode:

                     new           resume         overwrite     restarted by torchrun
        nothing      starts        starts         starts        starts
        unfinished   is refused    goes on        starts over   goes on
        finished     prints it     prints it      starts over   prints it
        another's    is refused    is refused *   starts over   as its flags say

    * It trains on from a finished run of fewer epochs.
    A restarted run does this with what the same torchrun began or finished, and otherwise what its flags say: so it
    never finishes what --overwrite is to replace, nor goes on with what its first start was refused for.
    """

    digests: dict[str, str | None]
    state: dict[str, Any] | None = None
    result: Result | None = None
    another: str = ""
    shorter: Result | None = None
    lost: str = ""

    def is_of(self, torchrun: str, mode: str) -> bool:
        """Whether a run that this torchrun started in this mode began or finished it."""
        if self.state:
            begun = self.state.get("begun", {})
            return (begun.get("torchrun"), begun.get("mode")) == (torchrun, mode)
        return bool(self.result and torchrun and self.result.torchrun == torchrun)

    def taken(self, mode: str, state: Path) -> "OnDisk":
        """What of it a run in this mode starts from. Raises UserError where the run is refused. state: its file."""
        if mode == "overwrite":
            return OnDisk(self.digests)
        if self.another and not (self.shorter and mode == "resume"):
            raise UserError(self.another)
        if self.state and mode == "new":
            raise UserError(
                f"{state} is the state of a run that was not finished: go on with --resume, or start over with "
                "--overwrite"
            )
        return self


def on_disk(recipe: Recipe, setup: Setup, now: dict[str, Any]) -> OnDisk:
    """Read what lies on the disk for the run of this identity. Raises UserError for a file that can't be read."""
    there, untold = paths(recipe, setup), _untold(recipe, setup)
    advice = ADVICE if setup.overwrites else OTHER_FOLDERS
    digests = {"checkpoint": _digest(there.checkpoint), "result": _digest(there.result)}
    shorter = None
    try:
        if state := runstate.find(there.state):
            _refuse_other_state(state, recipe, setup, now, untold)
            _refuse_newcomers(state, there, digests, advice)
            return OnDisk(digests, state=state)
        if not digests["result"]:
            if digests["checkpoint"]:
                _refuse_other_checkpoint(there, now, advice, untold)
            return OnDisk(digests)
        result = Result.read(there.result)
        is_whole = digests["checkpoint"] == result.checkpoint_sha256
        differ = differences(asdict(result), now).keys() - {*untold}
        if differ == {"recipe.epochs"} and result.recipe["epochs"] < recipe.epochs:
            if scheduled := _scheduled(recipe):
                advice = f"{scheduled} depends on the number of epochs, so more can't be added; {advice}"
            elif is_whole:
                shorter = result
        refuse_difference(asdict(result), now, there.result, advice, untold)
        if is_whole:
            return OnDisk(digests, result=result)
        if digests["checkpoint"] and not _is_damaged(there.checkpoint):
            raise UserError(f"{there.checkpoint} is not the checkpoint that {there.result} tells of; {advice}")
    except UserError as error:
        return OnDisk(digests, another=str(error), shorter=shorter)
    return OnDisk(
        digests, lost=f"{there.checkpoint}, which {there.result} tells of, is gone or damaged: it is trained anew"
    )


def _refuse_other_state(
    state: dict[str, Any], recipe: Recipe, setup: Setup, now: dict[str, Any], untold: tuple[str, ...]
) -> None:
    """Raise UserError for another run's state. One of fewer epochs is this run's where nothing depends on them."""
    path, epochs = paths(recipe, setup).state, () if _scheduled(recipe) else ("recipe.epochs",)
    advice = "give the same, or " + ("start over with --overwrite" if setup.overwrites else "move it away")
    runstate.ensure_whole(state, path)
    refuse_difference(state["identity"], now, path, advice, (*epochs, *untold))
    before = state["identity"]["recipe"].get("epochs")
    if not (parsed.whole(1)(before) and before <= recipe.epochs):
        found = f"recipe.epochs: {before} there, {recipe.epochs} now"
        raise UserError(f"{path} comes from other settings ({found}); {advice}")


def _refuse_newcomers(state: dict[str, Any], there: Paths, digests: dict[str, str | None], advice: str) -> None:
    """Raise UserError for a checkpoint or a result that the state's run neither found when it began nor wrote."""
    if "begun" not in state:  # an older state does not tell
        return
    replaces, run = state["begun"]["replaces"], state["identity"]
    if digests["result"] not in (None, replaces["result"]):
        refuse_difference(asdict(Result.read(there.result)), run, there.result, advice)
    if digests["checkpoint"] not in (None, replaces["checkpoint"]):
        _refuse_other_checkpoint(there, run, advice)


def _refuse_other_checkpoint(there: Paths, run: dict[str, Any], advice: str, may_differ: tuple[str, ...] = ()) -> None:
    _, about = checkpoint.read(there.checkpoint, advice)
    if not (about and "run" in about):
        raise UserError(f"{there.checkpoint} is there, and no result tells its run; {advice}")
    refuse_difference(about["run"], run, there.checkpoint, advice, may_differ)
    before = about["run"].get("warm_start")
    if before and before != run["warm_start"]:
        raise UserError(f"{there.checkpoint} was trained on from a finished run of {before['epochs']} epochs; {advice}")


def train(recipe: Recipe, setup: Setup, teacher: Teacher | None = None) -> None:
    """Train a recipe's network, save it, test it; print the lines of both and write the result.

    teacher: for the rows that distil. A run that is finished is told of, not made again, but with mode "overwrite".
    Raises Diverged (no checkpoint is written), Stopped (a signal came; the run's state is saved), UserError (a bad
    combination, a full disk, other work in the way, a run that another process is making).
    """
    processes, there = setup.runtime.processes, paths(recipe, setup)
    _check_batches(recipe, setup)
    if recipe.arch:
        _pixels_of_last_map(recipe, setup)  # refuses images that are too small for it
    ensure_writable(there.checkpoint.parent, "--checkpoint_dir")
    ensure_writable(there.result.parent, "--results_dir")
    run = identity(recipe, setup, teacher)
    keeper = Keeper(there.state, run, processes)
    with keeper.locked(there.result):
        if processes.main:
            for path in (there.checkpoint, there.epochs, there.result):
                remove_leftovers(path)
        left = on_disk(recipe, setup, run)
        again = processes.broadcast(restarted() and left.is_of(torchrun(), setup.mode))
        left = left.taken("resume" if again else setup.mode, there.state)
        if left.result:
            say(f"{there.result.stem}: finished already, see {there.result}; --overwrite trains it anew")
            print_figures(left.result.test)
            show(left.result, there, setup)
            return
        if left.lost:
            say(left.lost)
        if shorter := left.shorter:
            run["warm_start"] = {"epochs": len(shorter.epochs), "checkpoint_sha256": shorter.checkpoint_sha256}
        if left.state:
            run |= {name: left.state["identity"].get(name) for name in _untold(recipe, setup)}
        keeper.begin(left.state, torchrun=torchrun(), mode=setup.mode, replaces=left.digests)
        with closing(_scalars(there, setup)) as scalars:
            try:
                network, costs = _trained(recipe, setup, teacher, keeper, shorter, scalars)
                figures = evaluate(network, setup.dataset, plain(setup.runtime))
                if not math.isfinite(figures["mean_ce"]):  # the last step alone spoilt it
                    raise Diverged(f"training diverged: the Test Loss is {figures['test_loss']}")
            except Diverged:
                keeper.finish()  # such a run can't go on
                raise
            print_figures(figures)
            scalars.add(recipe.epochs, _of_test(figures))
        with keeper.finishing():
            if processes.main:
                _refuse_changes(there, left.digests)
                digest = checkpoint.save(network, there.checkpoint, about(recipe, setup, run))
                _write_result(_result(recipe, setup, teacher, run, keeper, figures, costs, digest), there)


def show(done: Result, there: Paths, setup: Setup) -> None:
    """Write the figures of a finished run for TensorBoard, where that is asked for."""
    with closing(_scalars(there, setup)) as scalars:
        for figures in done.epochs:
            scalars.add(figures["epoch"], _of_epoch(figures, done.data["train_images"]))
        scalars.add(len(done.epochs), _of_test(done.test))


def _scalars(there: Paths, setup: Setup) -> Scalars:
    return Scalars(there.scalars if setup.tensorboard and setup.runtime.processes.main else None)


def _of_epoch(figures: engine.Figures, images: int) -> engine.Figures:
    """An epoch's figures under TensorBoard's names, which are their own but for the loss."""
    shown = {"loss" if name == "train_loss" else name: value for name, value in figures.items()}
    del shown["epoch"]
    seconds = shown.pop("seconds", None)  # which an older result does not tell
    return shown | ({"images_per_second": images / seconds} if seconds else {})


def _of_test(figures: engine.Figures) -> engine.Figures:
    """The figures of the test, as far as they are curves' ends."""
    return {name if name == "test_loss" else f"test_{name}": figures[name] for name in ("top1", "top5", "test_loss")}


def _refuse_changes(there: Paths, digests: dict[str, str | None]) -> None:
    """Raise UserError where another run has written the checkpoint or the result since, as it can without locks."""
    for name, before in digests.items():
        path = getattr(there, name)
        if _digest(path) not in (None, before):
            raise UserError(f"another run has written {path} meanwhile; move it away")


def _write_result(result: Result, there: Paths) -> None:
    with replacing(there.epochs) as file:
        file.write(epochs_csv(result).encode())
    result.write(there.result)


def _scheduled(recipe: Recipe) -> str:
    """What depends on the number of epochs, in words; "" where nothing does."""
    if isinstance(recipe.alpha, str):
        return f"the alpha of {recipe.job} ({recipe.alpha})"
    return "" if TRAININGS[recipe.training].schedule == "step" else f"the learning rate of {recipe.job}"


def _augments(recipe: Recipe, setup: Setup) -> bool:
    return setup.augment or TRAININGS[recipe.training].augment


def about(recipe: Recipe, setup: Setup, run: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's figures depend on besides its weights, to be kept in it."""
    dataset = setup.dataset
    return {
        "job": recipe.job,
        "network": recipe.built,
        "stem": stem_of(recipe, setup),
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "run": run,
    }


def _result(
    recipe: Recipe,
    setup: Setup,
    teacher: Teacher | None,
    run: dict[str, Any],
    keeper: Keeper,
    figures: engine.Figures,
    costs: dict[str, int],
    digest: str,
) -> Result:
    """What is kept of a finished run: what it was, what it took, and the figures of its epochs and of its test."""
    there, epochs = paths(recipe, setup), keeper.figures
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return Result(
        **run,
        name=setup.name or recipe.job,
        teacher_top1=teacher and teacher.top1,
        epochs=epochs,
        test=figures,
        seconds=seconds,
        images_per_second=recipe.epochs * len(setup.dataset.train.labels) / seconds,
        checkpoint=there.checkpoint.name,
        checkpoint_sha256=digest,
        versions=environment.versions(),
        device=setup.runtime.describe(),
        processes=setup.runtime.processes.size,
        stretches=keeper.trained(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        torchrun=torchrun(),
        suite=recipe.suite,
        claimed=recipe.claimed and recipe.claimed._asdict(),
        **costs,
    )


def _trained(
    recipe: Recipe, setup: Setup, teacher: Teacher | None, keeper: Keeper, shorter: Result | None, scalars: Scalars
) -> tuple[nn.Module, dict[str, int]]:
    """The network after its training, and its costs by their names in Result; prints a line an epoch.

    It starts from wherever the keeper's state is.
    """
    dataset, runtime, processes = setup.dataset, setup.runtime, setup.runtime.processes
    begin_peak_memory(runtime.device)
    (network, digest), training = _fresh(recipe, setup, keeper, shorter), TRAININGS[recipe.training]
    batches = Batches(
        dataset.train, dataset.mean, dataset.std, recipe.batch_size, runtime.device,
        shuffle=True, seed=setup.seed, augment=_augments(recipe, setup),
        mixing=Mixing(training.mixup, training.cutmix) if training.mixes else None, processes=processes,
    )  # fmt: skip
    if isinstance(network, models.ReusingStudent) and not keeper.state:
        network.take_classifier(teacher.network)
    source, objective = aim(recipe, network, teacher, batches, keeper.heed)
    if _synchronises(setup):
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    graphs = setup.cuda_graphs and possible(runtime)
    if source is teacher and teacher:  # which then runs at every step
        forward = forward_of(teacher.network, batches, runtime, trained=False) if setup.compile else teacher.network
        teacher.forward = Graphed(forward, "the teacher") if graphs else forward
    if keeper.state:
        at = keeper.state["position"]
        say(f"{recipe.job}: going on after {at['epoch']} epochs and {at['iteration']} batches")
    elif shorter:
        keeper.figures.extend(shorter.epochs)
        keeper.stretches.extend(shorter.all_stretches)
    images = len(dataset.train.labels)
    for figures in keeper.figures:
        scalars.add(figures["epoch"], _of_epoch(figures, images))
    forward = forward_of(network, batches, runtime) if setup.compile else network
    facts = _facts(setup, digest) | {"compiled": getattr(forward, "compiled", False)}
    keeper.begin_stretch(facts, len(keeper.figures))
    with keeper.listening():
        for figures in engine.fit(
            network,
            batches,
            objective,
            alpha=losses.alpha_schedule(recipe.alpha, recipe.epochs, len(batches)),
            learning_rate=learning_rate(recipe, len(batches)),
            optimiser=optimiser(recipe),
            runtime=runtime,
            teacher=source,
            forward=forward,
            validate=validation(network, dataset, runtime),
            keeper=keeper,
            graphs=graphs,
            title=recipe.job,
            start=len(shorter.epochs) if shorter else 0,
        ):
            loss = figures["train_loss_over_batches"]
            print(f"Epoch [{figures['epoch']}/{recipe.epochs}], Train Loss: {loss:.8f}", flush=True)
            say(epoch_line(figures, recipe.epochs, images))
            scalars.add(figures["epoch"], _of_epoch(figures, images))
    return network, {"extra_parameters": _learnt(objective, network), "peak_memory": peak_memory(runtime.device)}


def _facts(setup: Setup, digest: str | None) -> dict[str, Any]:
    """What this process computes with. digest: of the file of weights that the network starts from."""
    commit, changed = environment.commit()
    return {
        "commit": commit,
        "changed": changed,
        "device": setup.runtime.describe(),
        "versions": environment.versions(),
        "processes": setup.runtime.processes.size,
        "weights_sha256": digest,
    }


def _learnt(objective: losses.Objective, network: nn.Module) -> int:
    """How many parameters the loss brings: the objective's, and those of a projector or a transfer in the network."""
    owners = [objective, *filter(None, [getattr(network, name, None) for name in ("proj", "transfer")])]
    return sum(value.numel() for owner in owners for value in owner.parameters())


def learning_rate(recipe: Recipe, iterations: int) -> Callable[[int, int], float]:
    """The learning rate of an epoch and an iteration in it, of so many, both from 0."""
    base, schedule = recipe.learning_rate, TRAININGS[recipe.training].schedule
    if schedule == "cosine":
        steps, warmup = recipe.epochs * iterations, round(warmup_epochs(recipe) * iterations)
        return lambda epoch, iteration: engine.cosine_lr(base, epoch * iterations + iteration, steps, warmup)
    if schedule == "milestones":
        falls = milestones(recipe)
        return lambda epoch, _: engine.milestone_lr(base, epoch, falls)
    return lambda epoch, _: engine.step_lr(base, epoch, recipe.scheduler_step)


def optimiser(recipe: Recipe) -> Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]:
    """What makes the recipe's optimiser for parameters; its learning rate is set at every step."""
    training = TRAININGS[recipe.training]
    if training.optimiser == "adam":
        return engine.adam
    names = ("momentum", "nesterov", "weight_decay")
    options = {name: getattr(training, name) for name in names}
    return functools.partial(engine.optimise, torch.optim.SGD, **options)


def _fresh(recipe: Recipe, setup: Setup, keeper: Keeper, shorter: Result | None) -> tuple[nn.Module, str | None]:
    """The network as its training starts, on its device, and the SHA-256 of the file that its weights come from.

    One that goes on gets its weights from the state later.
    """
    runtime, processes, digest = setup.runtime, setup.runtime.processes, None
    torch.manual_seed(setup.seed)
    network = models.build(recipe.built, setup.dataset.num_classes, stem_of(recipe, setup))
    if shorter and not keeper.state:
        path = paths(recipe, setup).checkpoint
        state, _, digest = checkpoint.read_hashed(path, ADVICE, recipe.built)
        if digest != shorter.checkpoint_sha256:
            raise UserError(f"{path} has changed since this run began; start it again")
        anew = "a fresh optimizer" + " and what the loss learns begun anew" * bool(shorter.extra_parameters)
        say(f"{recipe.job}: training on from the {len(shorter.epochs)} epochs of {path}, with {anew}")
        checkpoint.fill(network, recipe.built, state, path)
    elif (start := start_of(recipe, setup)) and not keeper.state:
        with processes.first_on_its_machine():
            digest = checkpoint.start(network, start, recipe.built, stem_of(recipe, setup), setup.weights_key)
        if _file_of(start) and keeper.identity["weights"] != _file_told(digest, setup.weights_key):
            raise UserError(f"--weights {start} has changed since this run began; start it again")
    if runtime.device.type == "cpu":
        replace_all(network)
    if _synchronises(setup):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif processes.size > 1 and setup.sync_bn:
        say("batch norm: without CUDA each process normalises its own part of a batch; SyncBatchNorm needs it")
    return network.to(runtime.device, memory_format=torch.channels_last), digest


def aim(
    recipe: Recipe,
    network: nn.Module,
    teacher: Teacher | None,
    batches: Batches,
    heed: Callable[[], None] = lambda: None,
) -> tuple[Callable | None, losses.Objective]:
    """What engine.fit asks for the teacher's outputs, None without a teacher, and what it minimises.

    heed: see Teacher.source.
    """
    if teacher is None:
        return None, losses.Objective(recipe)
    objective = _objective(recipe, network, teacher, batches.size, batches.n_images).to(batches.device)
    if batches.device.type == "cpu":
        replace_all(objective)
    return teacher.source(batches, losses.needs_of(recipe), heed), objective


def _objective(recipe: Recipe, network: nn.Module, teacher: Teacher, size: int, n_images: int) -> losses.Objective:
    return losses.Objective(recipe, *(models.shapes(net, size, n_images) for net in (network, teacher.network)))


def refuse_unsuited(recipe: Recipe, setup: Setup, teacher: Teacher) -> None:
    """Raise Unsuited for a loss that the recipe's network and this teacher can't have, as `train` would."""
    size, n_images = setup.dataset.image_size, len(setup.dataset.train.labels)
    network = models.build(recipe.built, setup.dataset.num_classes, stem_of(recipe, setup))
    _objective(recipe, network, teacher, size, n_images)


def validation(network: nn.Module, dataset: Dataset, runtime: Runtime) -> Callable[[], engine.Figures] | None:
    """The network's figures on the held-out images, to be asked for after each epoch; None where there are none."""
    if dataset.val is None:
        return None
    held_out = in_order(dataset.val, dataset, runtime)

    def figures() -> engine.Figures:
        tested = engine.evaluate(network, held_out, plain(runtime))
        return {"val_loss": tested["mean_ce"], "val_top1": tested["top1"]}

    return figures


def epoch_line(figures: engine.Figures, epochs: int, images: int) -> str:
    """An epoch's figures in one line whose columns stand under those of the line before."""
    others = ("epoch", "train_loss", "train_loss_over_batches", "train_top1", "alpha", "learning_rate", "seconds")
    terms = {name: value for name, value in figures.items() if name not in others}
    val = {name: terms.pop(name) for name in ("val_loss", "val_top1") if name in terms}
    parts = [f"epoch {figures['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {figures['train_loss']:8.4f}"]
    parts += [f"{name} {value:8.4f}" for name, value in terms.items()]
    parts += [f"top-1 {figures['train_top1']:6.2f}"]
    parts += [f"val loss {val['val_loss']:7.4f}  val top-1 {val['val_top1']:6.2f}"] if val else []
    parts += [f"alpha {figures['alpha']:.3f}", f"lr {figures['learning_rate']:.1e}"]
    return "  ".join([*parts, f"{images / figures['seconds']:,.0f} images/s"])


def _batch_norm(setup: Setup) -> str:
    """What batch norm takes its statistics over."""
    size = setup.runtime.processes.size
    return "whole batch" if size == 1 or _synchronises(setup) else f"each of {size} parts of a batch"


def _synchronises(setup: Setup) -> bool:
    """Whether batch norm's statistics are those of several processes; torch's SyncBatchNorm works on CUDA alone."""
    return setup.runtime.processes.size > 1 and setup.sync_bn and setup.runtime.device.type == "cuda"


def forward_of(
    network: nn.Module, batches: Batches, runtime: Runtime, *, trained: bool = True
) -> Callable[[torch.Tensor], Outputs]:
    """The network compiled for the batches, on the very same weights."""
    images = batches.batch_size // runtime.processes.size
    return compiled(network, (images, 3, batches.size, batches.size), runtime, trained=trained)


def test(trained: Trained, dataset: Dataset, runtime: Runtime) -> engine.Figures:
    """Test the network on the data set's test images; print the figures and give them."""
    figures = evaluate(trained.network, dataset, runtime, trained.normalisation)
    ensure_finite(figures["mean_ce"])
    print_figures(figures)
    return figures


def ensure_finite(figure: float) -> None:
    """Raise UserError where a figure of a trained network's outputs is not finite."""
    if not math.isfinite(figure):
        raise UserError(
            "the network gives NaN or infinite outputs for the test images: its weights are damaged, or the mean and "
            "standard deviation of its images are wrong; use another checkpoint"
        )


def print_figures(figures: engine.Figures) -> None:
    """The lines of a test."""
    print(
        f"Test Loss: {figures['test_loss']:.8f}, Top-1 test Accuracy: {figures['top1']:.8f}%, "
        f"Top-5 test Accuracy: {figures['top5']:.8f}%"
    )
    print(f"Mean test cross-entropy: {figures['mean_ce']:.8f}", flush=True)


def evaluate(
    network: nn.Module, dataset: Dataset, runtime: Runtime, normalisation: Normalisation | None = None
) -> engine.Figures:
    """engine.evaluate on the data set's test images, normalised so, or else as the data set is."""
    batches = in_order(dataset.test, dataset, runtime, normalisation)
    return engine.evaluate(network, batches, runtime, dataset.official_order)


def in_order(split: Split, dataset: Dataset, runtime: Runtime, normalisation: Normalisation | None = None) -> Batches:
    """All images of the split, in order, in batches for inference."""
    device = runtime.device
    mean, std = normalisation or (dataset.mean, dataset.std)
    return Batches(split, mean, std, inference_batch(device), device, processes=runtime.processes)


def plain(runtime: Runtime) -> Runtime:
    """The same device in fp32: figures are tested in it whatever the training's precision."""
    return replace(runtime, precision="fp32")


def recipe_named(name: str, where: Path, choices: tuple[str, ...], seed: int = 0) -> Recipe:
    """What is known of the run of that name: a row of recipes.py, or what its checkpoint says.

    where: the checkpoint, or the folder of the checkpoints. choices: the rows that may be named. Raises UserError.
    """
    if name in choices:
        return RECIPES[name]
    run = Recipe(name, name, "student", 1, 1)
    path = where if where.is_file() else checkpoint_path(run, where, seed)
    if name not in RECIPES and Path(name).name == name and path.is_file():
        _, about = checkpoint.read(path, ADVICE)
        if about:
            return of_network(run, about["network"])
    jobs = ", ".join(choices)
    raise UserError(f"--model_job {name}: no such job, nor a run of that name in {where}; the jobs are {jobs}")


def of_network(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the network of that name, one in models.NETWORKS or any other."""
    return replace(recipe, network=name, arch=None) if name in models.NETWORKS else replace(recipe, arch=name)


def load(
    recipe: Recipe,
    path: Path,
    dataset: str = "cifar100",
    stem: str = "auto",
    image_size: int | None = None,
    key: str | None = None,
) -> Trained:
    """The trained network of a recipe, from its checkpoint. Raises UserError.

    dataset: a name, for the command that would make a checkpoint that is missing. stem, image_size: as the user has
    them, for a checkpoint that does not show its stem. key: of the set of weights, see checkpoint.read.
    """
    hint, kind = _how_to_make(recipe, path, dataset), recipe.built
    state, about, digest = checkpoint.read_hashed(path, hint, kind, key)
    if about and models.without_projector(about["network"]) != models.without_projector(kind):
        needed = models.TITLES.get(models.canonical(kind), kind)
        raise UserError(f"{path} holds a {about['network']}, not the {needed} needed here")
    if about and kind == "feature_student":  # whose file may have no projector
        kind = models.canonical(about["network"])
    holds = checkpoint.describe(state)
    told = holds.stem or (about and about.get("stem"))
    unsure = not about and stem == "auto" and library_models.transforms(kind)
    stem = told or models.stem_of(kind, stem, image_size or 32)
    classes = len(about["classes"]) if about else checkpoint.classes_in(state, kind, stem)
    if classes is None:
        raise UserError(f"{path} holds a {holds.title}, and says nothing of its classes")
    if not any(value.ndim and len(value) == classes for value in state.values()):
        raise UserError(f"{path} is damaged: it names {classes} classes, and no weight in it is of so many; {hint}")
    network = models.build(kind, classes, stem)
    checkpoint.fill(network, kind, state, path)
    shows = told or not (models.has_both_stems(kind) or stem == "transform_input")
    return Trained(network, about, digest, stem=None if shows else stem, key=key, unsure=unsure)


def _how_to_make(recipe: Recipe, path: Path, dataset: str) -> str:
    """What to do where the recipe's checkpoint is not at that path."""
    if path.stem != recipe.checkpoint:  # a file of the user's own
        return "give another file"
    script = "train_distillation.py" if recipe.distils else "train.py"
    # Other networks and trainings have added to the name of the row.
    job = max((row for row in RECIPES if f"{recipe.job}_".startswith(f"{row}_")), key=len, default=recipe.job)
    flags = ["--model_job", job]
    arch, _, reused = (recipe.arch or "").partition("+")
    if arch:
        flags += ["--teacher_arch" if recipe.network == "teacher" else "--student_arch", arch]
    if reused:
        flags += ["--teacher_arch", reused]
    if recipe.training != "reference":
        flags += ["--training", recipe.training]
    if dataset != "cifar100":
        flags += ["--dataset", dataset]
    folder, seed = path.parent, re.fullmatch(r"seed([1-9][0-9]*)", path.parent.name)
    if seed:
        folder, flags = folder.parent, [*flags, "--seed", seed[1]]
    if folder != default_dir("checkpoints", dataset):
        flags += ["--checkpoint_dir", str(folder)]
    return f"make it with: python {script} {shlex.join(flags)}"


def check_fit(trained: Trained, dataset: Dataset, path: Path) -> None:
    """Refuse a network of other classes than the data set's, or of another image size. Raises UserError."""
    classes = trained.network.num_classes
    if classes != dataset.num_classes:
        raise UserError(f"{path} tells {classes} classes apart, the data set has {dataset.num_classes}")
    if trained.about is None:
        return
    for ours, theirs in zip(dataset.classes, trained.about["classes"], strict=True):
        if ours != theirs:
            raise UserError(f"{path} was trained on other classes: {theirs} stands where the data set has {ours}")


COMPARED = 512  # training images by which transform_input is found


def settled(trained: Trained, dataset: Dataset, runtime: Runtime, path: Path) -> Trained:
    """The network with or without transform_input, which its file does not tell: as more training images are right.

    Raises UserError where there are no training images.
    """
    if not trained.unsure:
        return trained
    name, tell = (
        trained.network.network_name,
        "--stem transform_input or --stem standard tells which it was trained with",
    )
    if dataset.train is None:
        raise UserError(
            f"{path} does not say whether its {name} has transform_input, as torchvision's with weights; {tell}"
        )
    other = models.build(name, trained.network.num_classes, "transform_input")
    other.load_state_dict(trained.network.state_dict())
    n = len(dataset.train.labels)
    few = subset(dataset.train, torch.linspace(0, n - 1, min(n, COMPARED)).long())
    batches = in_order(few, dataset, plain(runtime), trained.normalisation)
    without, with_it = (engine.evaluate(network, batches, plain(runtime)) for network in (trained.network, other))
    better = (with_it["top1"], -with_it["mean_ce"]) > (without["top1"], -without["mean_ce"])
    say(
        f"{path}: taken {'with' if better else 'without'} transform_input: of {len(few.labels)} training images "
        f"{with_it['top1']:.1f} % are right with it, {without['top1']:.1f} % without; {tell}"
    )
    if not better:
        return trained._replace(unsure=False)
    return trained._replace(network=other, stem="transform_input", unsure=False)


AT_CHANCE = 0.05  # of the way from guessing to being always right; a teacher below it is told of


def make_teacher(trained: Trained, path: Path, setup: Setup, cache: bool, rows: list[Recipe]) -> Teacher:
    """The frozen teacher, tested once, so that nobody distils from a dead one unknowingly; prints its top-1.

    cache: remember the teacher's outputs where that saves time, or run it at every step. rows: those that will be
    distilled. Raises UserError for a teacher of other classes.
    """
    dataset = setup.dataset
    check_fit(trained, dataset, path)
    if trained.about and trained.about["image_size"] != dataset.image_size:
        own, size = trained.about["image_size"], dataset.image_size
        say(f"the teacher was trained on images of {own}x{own} pixels and is shown images of {size}x{size}")
    trained = settled(trained, dataset, setup.runtime, path)
    number, processes = int(trained.sha256[:15], 16), setup.runtime.processes
    if processes.all_reduce_max(processes.broadcast(number) != number):
        raise UserError(f"{path} has changed while the processes read it; start again")
    figures = evaluate(trained.network, dataset, plain(setup.runtime), trained.normalisation)
    ensure_finite(figures["mean_ce"])
    top1 = figures["top1"]
    with suppress(OSError):
        if not path.is_file() or sha256(path) != trained.sha256:
            say(f"{path} has changed since it was read: the teacher is the one that was read ({trained.sha256[:8]})")
    print(f"Teacher Top-1: {top1:.8f}%", flush=True)
    chance = 100 / dataset.num_classes
    if top1 < chance + AT_CHANCE * (100 - chance):
        say(
            f"the teacher is right for {top1:.2f} % of the test images, hardly more than by chance: untrained, or fed "
            "wrongly? See --teacher_mean and --teacher_std, --image_size, and the order of its classes"
        )
    return Teacher(
        trained.network,
        setup.runtime,
        trained.sha256,
        top1,
        cache_dir=setup.checkpoint_dir / "teacher_cache" if cache else None,
        needs=frozenset().union(*map(losses.needs_of, rows)),
        shown=(dataset.mean, dataset.std),
        normalisation=trained.normalisation,
        given=trained.given,
        stem=trained.stem,
        key=trained.key,
    )


def _check_batches(recipe: Recipe, setup: Setup) -> None:
    """Refuse a batch of which a process would get no image, or one on which batch norm has nothing to normalise."""
    size, processes = setup.dataset.image_size, setup.runtime.processes.size
    n = len(setup.dataset.train.labels)
    smallest = (n % recipe.batch_size or min(n, recipe.batch_size)) // processes
    # Of one image a channel needs two values at least.
    if smallest > 1 or (smallest and _pixels_of_last_map(recipe, setup) > 1):
        return
    each = f" for each of {processes} processes" if processes > 1 else ""
    raise UserError(
        f"--batch_size {recipe.batch_size} leaves {smallest} of {n} images{each} in the last batch, too few for "
        f"batch norm at {size}x{size} pixels; choose another --batch_size"
    )


def _pixels_of_last_map(recipe: Recipe, setup: Setup) -> int:
    network = models.build(recipe.built, setup.dataset.num_classes, stem_of(recipe, setup))
    last_map = models.shapes(network, setup.dataset.image_size, 1).last_map
    return last_map[1] * last_map[2] if last_map else 2
