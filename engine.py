"""The one training loop and the one evaluation. Neither knows which experiment runs."""

import base64
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Batch, Batches
from models import CifarResNet, folded
from util.processes import Processes
from util.runstate import Keeper, State
from util.runtime import Diverged, Runtime

TEST_LOSS_BATCH = 256  # Test Loss is defined over batches of this many images

Terms = dict[str, torch.Tensor]


def step_lr(base: float, epoch: int, step: int) -> float:
    """The learning rate of an epoch, counted from 0: x0.1 every `step` epochs."""
    return base * 0.1 ** (epoch // step)


def fit(
    network: CifarResNet,
    batches: Batches,
    loss: Callable[[Batch, int, int], Terms],
    learning_rate: Callable[[int], float],
    epochs: int,
    runtime: Runtime,
    title: str,
    keeper: Keeper | None = None,
) -> Iterator[dict[str, float]]:
    """Train the network with Adam; after each epoch, give that epoch's figures.

    loss: from a batch, the epoch and the iteration within it (both from 0) to named scalars, each a mean over the
        batch's images; the one named "loss" is minimised.
    keeper: keeps the run's state; where it has one, training goes on from it, mid-epoch too.
    Figures: "epoch" from 1, "train_loss" and each other scalar, as its mean over the epoch's images;
        "train_loss_over_batches", the mean over its batches of each batch's mean loss, in which the images of a short
        last batch weigh more; "learning_rate", "seconds". Those of epochs done before are in keeper.figures, to which
        each epoch's are added.
    Raises Diverged where the loss or a weight is not finite at the end of an epoch; what the keeper raises.
    """
    keeper, processes = keeper or Keeper(), runtime.processes
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate(0), fused=True)
    at = _restore(keeper.state, network, optimiser, runtime) if keeper.state else Position()
    for epoch in range(at.epoch, epochs):
        started = time.perf_counter() - at.seconds
        network.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(epoch)
        with _bar(f"{title} {epoch + 1}/{epochs}", batches, at.iteration, processes) as bar:
            for iteration, batch in enumerate(batches.epoch(epoch, at.iteration), at.iteration):
                with runtime.autocast():
                    terms = loss(batch, epoch, iteration)
                optimiser.zero_grad()
                terms["loss"].backward()
                processes.average_gradients(network, batch.share)
                optimiser.step()
                # Summed on the device and read once an epoch: the step never waits for it.
                for name, value in terms.items():
                    at.totals[name] = at.totals.get(name, 0) + value.detach().double() * len(batch.labels)
                over_batches = terms["loss"].detach().double() * batch.share / len(batches)
                at.totals["over batches"] = at.totals.get("over batches", 0) + over_batches
                bar.update(min(batches.batch_size, batches.n_images - bar.n))
                if keeper.due():
                    at.iteration, at.seconds = iteration + 1, time.perf_counter() - started
                    keeper.save(_snapshot(network, optimiser, at, processes))
        sums = _over_all(at.totals, processes)
        over_batches = sums.pop("over batches").item()
        means = dict(zip(sums, (torch.stack(list(sums.values())) / batches.n_images).tolist(), strict=True))
        _check_finite(means["loss"], network, epoch)
        figures = {
            "epoch": epoch + 1,
            "train_loss": means.pop("loss"),
            "train_loss_over_batches": over_batches,
            **means,
            "learning_rate": learning_rate(epoch),
            "seconds": time.perf_counter() - started,
        }
        at = Position(epoch + 1)
        keeper.figures.append(figures)
        yield figures
        if keeper.path:
            keeper.save(_snapshot(network, optimiser, at, processes))


def _bar(name: str, batches: Batches, iteration: int, processes: Processes) -> tqdm:
    """A bar with images/s, on a terminal only."""
    done, hidden = iteration * batches.batch_size, None if processes.main else True
    return tqdm(total=batches.n_images, initial=done, desc=name, unit="img", leave=False, disable=hidden)


@dataclass
class Position:
    """Where a run is: the epoch, the iterations of it that are done, the seconds they took, and their sums."""

    epoch: int = 0
    iteration: int = 0
    seconds: float = 0.0
    totals: Terms = field(default_factory=dict)


def _snapshot(network: CifarResNet, optimiser: torch.optim.Optimizer, at: Position, processes: Processes) -> State:
    """A copy of all that the steps to come depend on, as tensors on the CPU and plain types."""
    if not any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules()):
        processes.average_buffers(network)
    return _copied(
        {
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "position": vars(replace(at, totals=_over_all(at.totals, processes))),
            "random": torch.get_rng_state(),
        }
    )


def _copied(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value


def _over_all(totals: Terms, processes: Processes) -> Terms:
    """The sums over the images of all processes."""
    if not totals:
        return {}
    values = torch.stack(list(totals.values()))
    processes.all_reduce_sum(values)
    return dict(zip(totals, values, strict=True))


def _restore(state: State, network: CifarResNet, optimiser: torch.optim.Optimizer, runtime: Runtime) -> Position:
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["random"])
    at = Position(**state["position"])
    # The sums are of all processes, so one alone goes on with them.
    mine = float(runtime.processes.main)
    at.totals = {name: total.to(runtime.device) * mine for name, total in at.totals.items()}
    return at


def _check_finite(loss: float, network: CifarResNet, epoch: int) -> None:
    weights_finite = torch.stack([value.isfinite().all() for value in network.parameters()]).all()
    if not (abs(loss) < float("inf") and weights_finite):
        raise Diverged(f"training diverged in epoch {epoch + 1}: the loss is {loss}; try a smaller --learning_rate")


def evaluate(network: CifarResNet, batches: Batches, runtime: Runtime) -> dict[str, float]:
    """Figures of the network on the images of `batches`, which must be in order: no shuffling, no augmentation.

    top1, top5: percent. mean_ce: the plain mean of the cross-entropy over the images, in nats. test_loss: the sum over
    batches of 256 images of each batch's mean cross-entropy, divided by the number of images; whatever the size of
    `batches`. images: how many there were. With fewer than five classes top5 is 100. correct: a bit for each image in
    order, whether its class is the best, packed by numpy.packbits and written in base64.
    """
    network = folded(network).to(runtime.device)
    # For each image its cross-entropy, and whether its class is the best and among the best five. Each process fills in
    # those of its own batches; the sum over the processes only adds zeros to them.
    figures = torch.zeros(batches.n_images, 3, dtype=torch.float64, device=runtime.device)
    with torch.inference_mode(), runtime.autocast():
        for batch in batches.epoch(0):
            logits = network(batch.images).logits
            hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels.unsqueeze(1)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            figures[batch.index] = torch.stack([losses, hits[:, 0], hits.any(1)], dim=1).double()
    runtime.processes.all_reduce_sum(figures)
    per_image, top1, top5 = figures.cpu().unbind(1)
    return {
        "top1": 100 * top1.mean().item(),
        "top5": 100 * top5.mean().item(),
        "test_loss": sum(part.mean().item() for part in per_image.split(TEST_LOSS_BATCH)) / len(per_image),
        "mean_ce": per_image.mean().item(),
        "images": len(per_image),
        "correct": base64.b64encode(numpy.packbits(top1.bool().numpy())).decode(),
    }
