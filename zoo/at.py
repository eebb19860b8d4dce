"""AT: attention transfer, maps of the squared activations."""

import torch
import torch.nn.functional as F

from outputs import Outputs
from zoo.declared import Loss, paired_stages, same_size


def at(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """AT = sum over stages of the mean over images and positions of (Q_s - Q_t)^2; maps (B, C, H, W).

    Zagoruyko, Komodakis, "Paying More Attention to Attention" (2017), equation 2 with p = 2: Q is an image's map of
    the mean over channels of the squared activations, (H W,), divided by its Euclidean norm. The mean of squares is
    that of the authors' code; the field's table has weight 1000. Maps of different sizes are pooled to the smaller.
    Raises UserError where the networks have different stages.
    """
    pairs = [same_size(s.float(), t.detach().float()) for s, t in paired_stages(student, teacher)]
    return sum(F.mse_loss(_attention(s), _attention(t)) for s, t in pairs)


def _attention(maps: torch.Tensor) -> torch.Tensor:
    return F.normalize(maps.square().mean(1).flatten(1))


LOSSES = {
    "at": Loss(at, needs=("stages",), weight=1000.0),
}
