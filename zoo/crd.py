"""CRD: contrastive representation distillation, its embeddings and its memory of images."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from util.bounds import COUNT, FRACTION, POSITIVE
from util.runtime import send
from zoo.declared import Loss, Setting, in_float32, pooled


class Contrast(nn.Module):
    """Embeddings of both networks' pooled last maps, and those remembered of each training image, M in number.

    bank_student, bank_teacher: (M, dimension), normalised once an image has been seen, random before. labels: (M,), -1
    for an image not seen yet. log_z: (2,), the logarithms of the constants Z of the student's and of the teacher's
    embeddings, infinite before the first batch. drawn: the images among which a batch's negatives are.
    """

    def __init__(self, student: Shapes, teacher: Shapes, dimension: int, negatives: int, **_):
        super().__init__()
        self.embed_student = nn.Linear(student.last_map[0], dimension)
        self.embed_teacher = nn.Linear(teacher.last_map[0], dimension)
        n, bound = student.n_images, math.sqrt(3 / dimension)  # so that their squared norms are 1 on average
        self.register_buffer("bank_student", torch.empty(n, dimension).uniform_(-bound, bound))
        self.register_buffer("bank_teacher", torch.empty(n, dimension).uniform_(-bound, bound))
        self.register_buffer("labels", torch.full((n,), -1))
        self.register_buffer("log_z", torch.full((2,), math.inf))
        self.register_buffer("drawn", torch.arange(min(n, negatives)), persistent=False)

    def draw(self) -> None:
        """Draw for a batch, in place, from torch's global generator on the CPU."""
        self.drawn.copy_(send(torch.randperm(len(self.labels))[: len(self.drawn)], self.drawn.device))

    @torch.no_grad()
    def normalise(self, log_z: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> None:
        """Set that element of log_z from its first batch: products (B,) and (B, N), where those left out are -inf."""
        products = torch.cat([positive, negative.flatten()])
        mean = products.logsumexp(0) - products.isfinite().sum().log()
        # Without asking whether it is set, for which the step would wait.
        log_z.copy_(torch.where(log_z.isfinite(), log_z, mean + math.log(len(self.labels))))

    @torch.no_grad()
    def remember(self, index: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, momentum: float) -> None:
        """Bring the banks of these images, (B,), towards their embeddings now, (B, dimension) each."""
        for bank, new in ((self.bank_student, student), (self.bank_teacher, teacher)):
            bank[index] = F.normalize(momentum * bank[index] + (1 - momentum) * new)


@in_float32
def crd(
    student: Outputs,
    teacher: Outputs,
    labels: torch.Tensor,
    T: float,
    negatives: int,
    bank_momentum: float,
    parts: Contrast,
    **_,
) -> torch.Tensor:
    """CRD = sum over both networks of the mean over images of -log h(positive) - sum over negatives of log(1 - h).

    Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020), equations 10 to 19: the pooled last
    feature map of each network, embedded linearly in 128 dimensions and normalised, is told, among remembered
    embeddings of the other network, to that of the same image from those of N negatives: h = p / (p + N / M) of M
    images, p = exp(product / T) / Z, Z the mean of the first batch's exp times M. What is remembered follows with
    bank_momentum. Published: N 16384, T 0.07, momentum 0.5, weight 0.8; negatives of other classes. Here a batch draws
    once for all its images, from torch's global generator, and an image's negatives are those drawn of other classes
    than its own, as far as classes have been seen, with their mean times N.
    """
    s = F.normalize(parts.embed_student(pooled(student.last_map)))
    t = F.normalize(parts.embed_teacher(pooled(teacher.last_map.detach())))
    parts.labels[teacher.index] = labels
    other = parts.labels[parts.drawn] != labels.unsqueeze(1)
    log_ratio = math.log(negatives / len(parts.labels))
    total = 0
    for anchor, bank, log_z in ((s, parts.bank_teacher, parts.log_z[0]), (t, parts.bank_student, parts.log_z[1])):
        positive = (anchor * bank[teacher.index]).sum(1) / T
        negative = (anchor @ bank[parts.drawn].T / T).masked_fill(~other, -math.inf)
        parts.normalise(log_z, positive, negative)
        told = -F.logsigmoid(positive - log_z - log_ratio)
        refused = -F.logsigmoid(log_ratio + log_z - negative).sum(1) / other.sum(1).clamp(min=1)
        total = total + (told + negatives * refused).mean()
    parts.remember(teacher.index, s, t, bank_momentum)
    return total


LOSSES = {
    "crd": Loss(
        crd,
        needs=("last_map",),
        settings={
            "T": Setting(0.07, POSITIVE, "temperature"),
            "negatives": Setting(16384, COUNT, "negatives for each image"),
            "bank_momentum": Setting(0.5, FRACTION, "what stays of a remembered embedding when a new one comes"),
            "dimension": Setting(128, COUNT, "of the embeddings"),
        },
        weight=0.8,
        parts=Contrast,
        compares_images=True,
        remembers=True,
    ),
}
