"""The frozen teacher: its outputs for a batch of images, computed live or once for all and remembered."""

import torch

from data import Batch, Batches
from models import CifarResNet, Outputs, folded
from runtime import Runtime


class Teacher:
    """A teacher in eval mode, its parameters frozen, batch norm folded into the convolutions.

    Called with a batch, it gives the outputs that a loss asks for: logits, the last feature map, and its head, through
    which a gradient reaches the student.
    """

    def __init__(self, network: CifarResNet, runtime: Runtime, sha256: str, top1: float):
        """sha256: of the checkpoint, and top1: its accuracy in percent; both are kept beside a student's figures."""
        self.network = folded(network).to(runtime.device)
        self.runtime = runtime
        self.sha256 = sha256
        self.top1 = top1
        self.logits: torch.Tensor | None = None
        self.maps: torch.Tensor | None = None

    def __call__(self, batch: Batch) -> Outputs:
        if self.logits is None:
            return self._live(batch.images)
        # Maps are kept channels last, as convolutions give them.
        layer4 = None if self.maps is None else self.maps[batch.index].permute(0, 3, 1, 2)
        return Outputs(logits=self.logits[batch.index], layer4=layer4, head=self.network.classify)

    @torch.no_grad()
    def _live(self, images: torch.Tensor) -> Outputs:
        with self.runtime.autocast():
            return self.network(images)._replace(head=self.network.classify)

    def remember(self, batches: Batches, with_maps: bool) -> None:
        """Compute the outputs for all images of `batches` once; from then on they are looked up by index.

        Only right where an image is the same in every epoch: without augmentation.
        """
        if self.logits is not None and (self.maps is not None or not with_maps):
            return
        logits, maps = [], []
        for batch in batches.epoch(0):
            outputs = self._live(batch.images)
            logits.append(outputs.logits)
            if with_maps:
                maps.append(self._storable(outputs.layer4.permute(0, 2, 3, 1)))
        self.logits = torch.cat(logits)
        self.maps = torch.cat(maps) if with_maps else None

    def _storable(self, maps: torch.Tensor) -> torch.Tensor:
        """Half precision halves the memory and keeps more digits than bf16 arithmetic gave; fp32 stays plain."""
        return maps.half() if self.runtime.precision == "bf16" else maps
