"""What a network costs and what it is worth: operations, speed; accuracy, calibration, classes."""

import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import Batches
from util.runtime import Runtime, synchronize

BINS = 15  # of the calibration error
BATCH = 64  # images at once where images/s are measured
SECONDS = 3.0  # that each speed is measured for, at least
WARM_UP = 3  # passes that don't count
LOST_MOST = 10  # classes


def cost(network: nn.Module, image_size: int, runtime: Runtime) -> dict[str, float]:
    """multiply_adds of one image; latency_ms of one image alone; images_per_second in batches of BATCH.

    network: folded, on the runtime's device. Times are medians of repeats over SECONDS.
    """
    one = _noise(1, image_size, runtime)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(one)
    return {
        "multiply_adds": counter.get_total_flops() // 2,
        "latency_ms": 1000 * _seconds(network, one, runtime),
        "images_per_second": BATCH / _seconds(network, _noise(BATCH, image_size, runtime), runtime),
    }


def _noise(n: int, image_size: int, runtime: Runtime) -> torch.Tensor:
    images = torch.randn(n, 3, image_size, image_size, device=runtime.device)
    return images.to(memory_format=torch.channels_last)


def _seconds(network: nn.Module, images: torch.Tensor, runtime: Runtime) -> float:
    """Of one forward pass, the median."""
    times: list[float] = []
    with torch.inference_mode(), runtime.autocast():
        while sum(times) < SECONDS or len(times) < WARM_UP + 5:
            started = time.perf_counter()
            network(images)
            synchronize(runtime.device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


def logits_of(network: nn.Module, batches: Batches, runtime: Runtime) -> torch.Tensor:
    """Logits float32 (N, classes) of all images, on the CPU."""
    with torch.inference_mode(), runtime.autocast():
        return torch.cat([network(batch.images).logits.float().cpu() for batch in batches.epoch(0)])


def worth(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """top1, top5 in percent, and ece, see `calibration_error`."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(1).double().mean().item()
    return {"top1": 100 * top1, "top5": 100 * top5, "ece": calibration_error(logits, labels)}


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The expected calibration error, in points of percent: how far a confidence is from how often it is right.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3: images are put into BINS bins of equal
    width by their best class's probability, and each bin's |accuracy - mean confidence| counts by its images.
    """
    confidence, best = logits.double().softmax(1).max(1)
    right = (best == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return 100 * gaps.abs().sum().item() / len(labels)


def lost_most(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> list[tuple[int, int, float, float]]:
    """The classes where the student is right less often than the teacher, the worst first, LOST_MOST at most.

    Of each its number, its images, and the top-1 on these of teacher and student, in percent. From logits of both.
    """
    images = torch.bincount(labels, minlength=student.shape[1])
    rights = [
        torch.bincount(labels[logits.argmax(1) == labels], minlength=len(images)) for logits in (teacher, student)
    ]
    of_teacher, of_student = (100 * right / images.clamp(min=1) for right in rights)
    order = (of_student - of_teacher).sort(stable=True).indices.tolist()
    rows = [(k, int(images[k]), float(of_teacher[k]), float(of_student[k])) for k in order]
    return [row for row in rows if row[3] < row[2]][:LOST_MOST]
