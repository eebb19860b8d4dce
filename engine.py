"""The one training loop and the one evaluation. Neither knows which experiment runs."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Batch, Batches
from models import CifarResNet, folded
from runtime import Diverged, Runtime

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
) -> Iterator[dict[str, float]]:
    """Train the network with Adam; after each epoch, give that epoch's figures.

    loss: from a batch, the epoch and the iteration within it (both from 0) to named scalars, each a mean over the
        batch's images; the one named "loss" is minimised.
    Figures: "epoch" from 1, "train_loss" and each other scalar, as its mean over the epoch's images, "learning_rate",
        "seconds".
    Raises Diverged where the loss or a weight is not finite at the end of an epoch.
    """
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate(0), fused=True)
    for epoch in range(epochs):
        started = time.perf_counter()
        network.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(epoch)
        totals: Terms = {}
        with tqdm(
            total=batches.n_images, desc=f"{title} {epoch + 1}/{epochs}", unit="img", leave=False, disable=None
        ) as bar:
            for iteration, batch in enumerate(batches.epoch(epoch)):
                with runtime.autocast():
                    terms = loss(batch, epoch, iteration)
                optimiser.zero_grad()
                terms["loss"].backward()
                optimiser.step()
                # Summed on the device and read once an epoch: the step never waits for it.
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0) + value.detach().double() * len(batch.labels)
                bar.update(len(batch.labels))
        means = {name: float(total) / batches.n_images for name, total in totals.items()}
        _check_finite(means["loss"], network, epoch)
        seconds = time.perf_counter() - started
        train_loss = means.pop("loss")
        yield {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            **means,
            "learning_rate": learning_rate(epoch),
            "seconds": seconds,
        }


def _check_finite(loss: float, network: CifarResNet, epoch: int) -> None:
    weights_finite = torch.stack([value.isfinite().all() for value in network.parameters()]).all()
    if not (abs(loss) < float("inf") and weights_finite):
        raise Diverged(f"training diverged in epoch {epoch + 1}: the loss is {loss}; try a smaller --learning_rate")


def evaluate(network: CifarResNet, batches: Batches, runtime: Runtime) -> dict[str, float]:
    """Figures of the network on the images of `batches`, which must be in order: no shuffling, no augmentation.

    top1, top5: percent. mean_ce: the plain mean of the cross-entropy over the images, in nats. test_loss: the sum over
    batches of 256 images of each batch's mean cross-entropy, divided by the number of images; whatever the size of
    `batches`. images: how many there were. With fewer than five classes top5 is 100.
    """
    network = folded(network).to(runtime.device)
    losses, ranks = [], []
    with torch.inference_mode(), runtime.autocast():
        for batch in batches.epoch(0):
            logits = network(batch.images).logits
            best = logits.topk(min(5, logits.shape[1])).indices
            losses.append(F.cross_entropy(logits, batch.labels, reduction="none"))
            ranks.append(best == batch.labels.unsqueeze(1))
    per_image, hits = torch.cat(losses).double().cpu(), torch.cat(ranks).double().cpu()
    return {
        "top1": 100 * hits[:, 0].mean().item(),
        "top5": 100 * hits.sum(1).mean().item(),
        "test_loss": sum(part.mean().item() for part in per_image.split(TEST_LOSS_BATCH)) / len(per_image),
        "mean_ce": per_image.mean().item(),
        "images": len(per_image),
    }
