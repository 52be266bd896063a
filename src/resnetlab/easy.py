"""Leaving out what is learned already: the images of each batch with the smallest loss when they were last trained on.

Images of a large loss are most of the gradient (Jiang et al. 2019, "Selective Backprop", arXiv:1910.00762). There, and
in airbench96_faster, a forward pass of this step, by the network or by a smaller one, tells which those are; here what
an image cost one epoch ago does, which costs nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FROM = 0.5
"""Share of the run from which on images are left out: before, next to none is learned."""


@dataclass(kw_only=True)
class Easy:
    """The last loss of every training image, and who is left out for it."""

    share: float
    """Of each batch, 0 to 0.5."""
    begins: int
    """The first epoch, from 1, in which images are left out."""
    loss: Tensor
    """(N,) float32: each image's when it was last trained on, augmented as it was; infinite: that showed another."""
    epoch: Tensor
    """(N,) int32: when that was; 0: never."""

    @classmethod
    def of(cls, images: int, share: float, epochs: int) -> "Easy":
        """Begin a run of ``epochs`` on so many images."""
        return cls(
            share=share,
            begins=max(2, 1 + round(FROM * epochs)),  # in the first epoch no loss is known
            loss=torch.zeros(images),
            epoch=torch.zeros(images, dtype=torch.int32),
        )

    def rest(self, batch: Tensor, epoch: int) -> Tensor:
        """Return what is left of a batch of an epoch: (B,) int64 indices, in their order.

        Nothing is left out twice running, so that no loss is old. Within an epoch an image is in one batch only: it
        does not matter how many of them have been trained on.
        """
        if epoch < self.begins:
            return batch
        known = (self.epoch[batch] == epoch - 1) & self.loss[batch].isfinite()
        loss = self.loss[batch].masked_fill(~known, torch.inf)
        left_out = loss.argsort(stable=True)[: round(self.share * len(batch))]
        stays = torch.ones(len(batch), dtype=torch.bool)
        stays[left_out[known[left_out]]] = False
        return batch[stays]

    def note(self, batch: Tensor, losses: Tensor, epoch: int) -> None:
        """Take down the losses (B,) of the images ``batch`` (B,), trained on in ``epoch``."""
        self.loss[batch] = losses.float().cpu()
        self.epoch[batch] = epoch
