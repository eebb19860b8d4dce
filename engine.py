"""The one training loop and the one evaluation. Neither knows which experiment runs."""

import base64
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Batch, Batches, mixed_seed
from models import folded
from outputs import Outputs
from util.graphs import Graphed
from util.mixing import Mixed
from util.processes import Processes
from util.runstate import Keeper, State
from util.runtime import Diverged, Runtime, UserError, has_fused, is_out_of_memory, widest

STEPS = 3  # the purpose of random numbers, beside those of data.py and mixing.py
TEST_LOSS_BATCH = 256  # Test Loss is defined over batches of this many images

Terms = dict[str, torch.Tensor]
Figures = dict[str, float]


def step_lr(base: float, epoch: int, step: int) -> float:
    """The learning rate of an epoch, counted from 0: x0.1 every `step` epochs."""
    return base * 0.1 ** (epoch // step)


def milestone_lr(base: float, epoch: int, milestones: Sequence[int]) -> float:
    """The learning rate of an epoch, counted from 0: x0.1 at each of the milestones."""
    return base * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def cosine_lr(base: float, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step of so many, from 0: up to base in `warmup` equal parts, then a cosine to 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def optimise(
    kind: type[torch.optim.Optimizer], parameters: Iterator[torch.nn.Parameter], **options: float
) -> torch.optim.Optimizer:
    """An optimiser of that kind for the parameters, with its whole step in one piece where their device can do that."""
    parameters = list(parameters)
    return kind(parameters, fused=has_fused(kind, parameters[0].device), **options)


def adam(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam as PyTorch has it."""
    return optimise(torch.optim.Adam, parameters)


def fit(
    network: torch.nn.Module,
    batches: Batches,
    objective: torch.nn.Module,
    *,
    alpha: torch.Tensor,
    learning_rate: Callable[[int, int], float],
    runtime: Runtime,
    optimiser: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer] = adam,
    teacher: Callable[[Batch], Outputs] | None = None,
    forward: Callable[[torch.Tensor], Outputs] | None = None,
    validate: Callable[[], Figures] | None = None,
    keeper: Keeper | None = None,
    graphs: bool = False,
    title: str = "",
    start: int = 0,
) -> Iterator[Figures]:
    """Train the network, and what the objective learns; after each epoch, give that epoch's figures.

    objective: from the student's outputs, the teacher's, the labels, alpha, Batch.mixed and, of several processes, a
        function that gathers the whole batch, to named scalars, each a mean over the batch's images; the one named
        "loss" is minimised. See losses.Objective.
    alpha: the weight of the hard labels at each step, (epochs, iterations per epoch): so many epochs there are.
    learning_rate: of an epoch and an iteration in it, from 0. optimiser: made for the parameters that are trained.
    teacher: its outputs for a batch. forward: the network, compiled.
    validate: the network's figures on held-out images, asked for after every epoch and added to the epoch's.
    keeper: keeps the run's state; where it has one, training goes on from it, mid-epoch too. start: the epoch, from 0,
        to begin with where it has none. graphs: a step is one CUDA graph, see util.graphs; what the objective draws at
        each step, it draws in modules' `draw()`.
    Figures: "epoch" from 1, "train_loss" and each other scalar, as its mean over the epoch's images;
        "train_loss_over_batches", the mean over its batches of each batch's mean loss, in which the images of a short
        last batch weigh more; "train_top1" in percent; "alpha", the mean over its steps; "learning_rate", that of its
        last step; "seconds". Those of epochs done before are in keeper.figures, to which each epoch's are added.
    Raises Diverged where the loss or a weight is not finite at the end of an epoch; what the keeper raises.
    """
    keeper, processes, forward = keeper or Keeper(), runtime.processes, forward or network
    epochs, mean_alpha, alpha = len(alpha), alpha.mean(1).tolist(), alpha.to(batches.device)
    trained = torch.nn.ModuleList([network, objective])
    optimiser = optimiser(trained.parameters())
    at = _restore(keeper.state, network, objective, optimiser, runtime) if keeper.state else Position(start)
    step = Step(trained, forward, objective, optimiser, at, runtime, len(batches), graphs)
    for epoch in range(at.epoch, epochs):
        started = time.perf_counter() - at.seconds
        network.train()
        with _bar(f"{title} {epoch + 1}/{epochs}", batches, at.iteration, processes) as bar:
            for iteration, batch in enumerate(batches.epoch(epoch, at.iteration), at.iteration):
                if processes.size > 1:  # else all would drop the same, and the state keeps one process's stream alone
                    torch.manual_seed(mixed_seed(batches.seed, epoch, STEPS, iteration, processes.rank))
                step(batch, teacher and teacher(batch), alpha[epoch, iteration], learning_rate(epoch, iteration))
                bar.update(min(batches.batch_size, batches.n_images - bar.n))
                if keeper.due():
                    keeper.tell(graphs=step.graphed)
                    at.iteration, at.seconds = iteration + 1, time.perf_counter() - started
                    processes.average_buffers(trained)
                    keeper.save(_snapshot(network, objective, optimiser, at, runtime))
        # Each process normalised its own parts of the batches; what is kept has the mean of their statistics.
        processes.average_buffers(trained)
        means = at.means(batches.n_images, processes)
        _check_finite(means["train_loss"], trained, epoch)
        figures = {
            "epoch": epoch + 1,
            **means,
            "alpha": mean_alpha[epoch],
            "learning_rate": learning_rate(epoch, len(batches) - 1),
            "seconds": time.perf_counter() - started,
            **(validate() if validate else {}),
        }
        at.begin(epoch + 1)
        keeper.figures.append(figures)
        keeper.tell(graphs=step.graphed)
        yield figures
        if keeper.path and (epoch + 1 == epochs or keeper.idle()):
            keeper.save(_snapshot(network, objective, optimiser, at, runtime))


class Step:
    """One step of a training: forward, loss, backward, the optimiser's step, and the figures' sums."""

    def __init__(
        self,
        trained: torch.nn.ModuleList,
        forward: Callable[[torch.Tensor], Outputs],
        objective: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        at: "Position",
        runtime: Runtime,
        iterations: int,
        graphs: bool,
    ):
        """trained: network and objective. at: where the sums are. iterations: of an epoch. graphs: see fit."""
        self.trained, self.forward, self.objective, self.optimiser = trained, forward, objective, optimiser
        self.at, self.runtime, self.iterations, self.wide = at, runtime, iterations, widest(runtime.device)
        self.draws = [part.draw for part in objective.modules() if hasattr(part, "draw")]
        self.step = Graphed(self._step, "a step") if graphs else self._step
        # Of a graph every number that changes is a tensor on the device, which a kernel fills.
        self.number = (lambda value: torch.full((), value, device=runtime.device)) if graphs else float

    @property
    def graphed(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return getattr(self.step, "form", None) is not None

    def __call__(self, batch: Batch, taught: Outputs | None, alpha: torch.Tensor, learning_rate: float) -> None:
        """Train on a batch. taught: the teacher's outputs for it."""
        for draw in self.draws:
            draw()
        mixed = batch.mixed and batch.mixed._replace(part=self.number(batch.mixed.part))
        self.step(batch.images, batch.labels, taught, alpha, mixed, self.number(learning_rate), batch.share)

    def _step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        taught: Outputs | None,
        alpha: torch.Tensor,
        mixed: Mixed | None,
        learning_rate: torch.Tensor | float,
        share: float,
    ) -> None:
        with self.runtime.autocast():
            student = self.forward(images)
            terms = self.objective(student, taught, labels, alpha, mixed, self.runtime.processes.gathering(share))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
            if "capturable" in group:  # as Adam wants to be told; else it warns
                group["capturable"] = labels.is_cuda and torch.cuda.is_current_stream_capturing()
        self.optimiser.zero_grad()
        terms["loss"].backward()
        self.runtime.processes.average_gradients(self.trained, share)
        self.optimiser.step()
        terms["train_top1"] = 100 * (student.logits.argmax(1) == labels).to(self.wide).mean()
        self.at.add(terms, len(labels), share / self.iterations)


def _bar(name: str, batches: Batches, iteration: int, processes: Processes) -> tqdm:
    """A bar with images/s, on a terminal only."""
    done, hidden = iteration * batches.batch_size, None if processes.main else True
    return tqdm(total=batches.n_images, initial=done, desc=name, unit="img", leave=False, disable=hidden)


@dataclass
class Position:
    """Where a run is: the epoch, the iterations of it that are done, the seconds they took, the sums of its figures.

    totals: of each scalar over the images so far; over_batches: the loss over the batches so far, each divided by their
    number. Both are summed in float64, in place, and read once an epoch: the step never waits for the device. waiting:
    the steps that are not in the sums yet, where the device has no float64: these are summed on the CPU, when they are
    asked for.
    """

    epoch: int = 0
    iteration: int = 0
    seconds: float = 0.0
    totals: Terms = field(default_factory=dict)
    over_batches: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    waiting: list[tuple[Terms, int, float]] = field(default_factory=list)

    def begin(self, epoch: int) -> None:
        """Be at the beginning of that epoch."""
        self.epoch, self.iteration, self.seconds = epoch, 0, 0.0
        for total in (*self.totals.values(), self.over_batches):
            total.zero_()

    def add(self, terms: Terms, images: int, share: float) -> None:
        """Add a step's scalars, means over so many images, which are this share of the epoch's batches."""
        terms = {name: value.detach() for name, value in terms.items()}
        if widest(terms["loss"].device) == torch.float64:
            self._sum(terms, images, share)
        else:
            self.waiting.append((terms, images, share))

    def _sum(self, terms: Terms, images: int, share: float) -> None:
        if not self.totals:
            self.totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in terms.items()}
            self.over_batches = torch.zeros_like(terms["loss"], dtype=torch.float64)
        for name, value in terms.items():
            self.totals[name] += value.double() * images
        self.over_batches += terms["loss"].double() * share

    def _settle(self) -> None:
        """Sum up the steps that wait."""
        waiting, self.waiting = self.waiting, []
        for terms, images, share in waiting:
            values = torch.stack([*terms.values()]).cpu()
            self._sum(dict(zip(terms, values, strict=True)), images, share)

    def means(self, images: int, processes: Processes) -> Figures:
        """The epoch's means, over all processes and so many images."""
        sums = self.over_all(processes)
        means = {name: (total / images).item() for name, total in sums.totals.items()}
        return {"train_loss": means.pop("loss"), "train_loss_over_batches": sums.over_batches.item(), **means}

    def over_all(self, processes: Processes) -> "Position":
        """The same with the sums of all processes."""
        self._settle()
        if not self.totals:
            return self
        values = torch.stack([*self.totals.values(), self.over_batches])
        processes.all_reduce_sum(values)
        *totals, over_batches = values
        return replace(self, totals=dict(zip(self.totals, totals, strict=True)), over_batches=over_batches)


def _snapshot(
    network: torch.nn.Module,
    objective: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    at: Position,
    runtime: Runtime,
) -> State:
    """A copy of all that the steps to come depend on, as tensors on the CPU and plain types."""
    return _copied(
        {
            "network": network.state_dict(),
            "parts": objective.state_dict(),
            "optimiser": optimiser.state_dict(),
            "position": vars(at.over_all(runtime.processes)),
            "random": torch.get_rng_state(),
            "random_device": _accelerator(runtime).get_rng_state() if _accelerator(runtime) else None,
        }
    )


def _accelerator(runtime: Runtime) -> ModuleType | None:
    """What torch has for the device, where that has a random stream of its own; None for a CPU."""
    module = torch.get_device_module(runtime.device)
    return module if hasattr(module, "get_rng_state") else None


def _copied(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _restore(
    state: State,
    network: torch.nn.Module,
    objective: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    runtime: Runtime,
) -> Position:
    try:
        network.load_state_dict(state["network"])
        objective.load_state_dict(state["parts"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        if _accelerator(runtime) and state.get("random_device") is not None:  # which older states don't have
            _accelerator(runtime).set_rng_state(state["random_device"])
        at = Position(**state["position"])
        # The sums are of all processes, so one alone goes on with them.
        mine = float(runtime.processes.main)
        where = runtime.device if widest(runtime.device) == torch.float64 else "cpu"
        at.totals = {name: total.to(where) * mine for name, total in at.totals.items()}
        at.over_batches = torch.as_tensor(at.over_batches, dtype=torch.float64, device=where) * mine
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the run's state does not fit the run ({reason}); start over with --overwrite") from error
    return at


def _check_finite(loss: float, trained: torch.nn.Module, epoch: int) -> None:
    weights_finite = torch.stack([value.isfinite().all() for value in trained.parameters()]).all()
    if not (abs(loss) < float("inf") and weights_finite):
        raise Diverged(f"training diverged in epoch {epoch + 1}: the loss is {loss}; try a smaller --learning_rate")


def evaluate(
    network: torch.nn.Module, batches: Batches, runtime: Runtime, order: torch.Tensor | None = None
) -> Figures:
    """Figures of the network on the images of `batches`, which must be in order: no shuffling, no augmentation.

    order: the images' official order, int64 (N,) on the CPU, for test_loss; None for that of `batches`.
    top1, top5: percent. mean_ce: the plain mean of the cross-entropy over the images, in nats. test_loss: the sum over
    batches of 256 images of each batch's mean cross-entropy, divided by the number of images; whatever the size of
    `batches`. images: how many there were. With fewer than five classes top5 is 100. correct: a bit for each image in
    order, whether its class is the best, packed by numpy.packbits and written in base64. order: "official", if given.
    """
    network = folded(network).to(runtime.device)
    # For each image its cross-entropy, and whether its class is the best and among the best five. Each process fills in
    # those of its own batches; the sum over the processes only adds zeros to them.
    wide = widest(runtime.device)
    figures = torch.zeros(batches.n_images, 3, dtype=wide, device=runtime.device)
    with torch.inference_mode(), runtime.autocast():
        for batch in batches.epoch(0):
            logits = network(batch.images).logits
            hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels.unsqueeze(1)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            figures[batch.index] = torch.stack([losses, hits[:, 0], hits.any(1)], dim=1).to(wide)
    runtime.processes.all_reduce_sum(figures)
    per_image, top1, top5 = figures.cpu().double().unbind(1)
    in_order = per_image if order is None else per_image[order]
    return {
        "top1": 100 * top1.mean().item(),
        "top5": 100 * top5.mean().item(),
        "test_loss": sum(part.mean().item() for part in in_order.split(TEST_LOSS_BATCH)) / len(per_image),
        "mean_ce": per_image.mean().item(),
        "images": len(per_image),
        "correct": base64.b64encode(numpy.packbits(top1.bool().numpy())).decode(),
        **({} if order is None else {"order": "official"}),
    }
