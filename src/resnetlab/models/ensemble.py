"""Several networks as one: a batch in, one row of logits an image out.

An ensemble of six networks of two depths is what won ILSVRC 2015 (paper, section 4.1 and table 5: 3.57 % top-5 error).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resnetlab.config import Config, Fraction, ModelConfig

Combine = Literal["probabilities", "logits"]
"""What is averaged over the members."""


class Member(Config):
    """One network of an ensemble, and how it differs from the ensemble in what it reads and says."""

    model: ModelConfig
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]
    """Its own preprocessing's channel means, of values in [0, 1]."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=3)]
    weight: Fraction
    """Its share of the mean."""
    order: tuple[int, ...] = ()
    """For each class of the ensemble, its position among the member's logits; empty: the same order."""
    source: str = ""
    """The run that it came from, for people."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(self.mean) != self.model.in_channels or len(self.std) != self.model.in_channels:
            raise ValueError(f"mean and std must have {self.model.in_channels} values, one a channel")
        if self.order and sorted(self.order) != list(range(self.model.num_classes)):
            raise ValueError(f"order must name each of {self.model.num_classes} classes once")
        return self


class Ensemble(nn.Module):
    """Networks that read the same batch, each with its own weight in the mean.

    Args:
        networks: In the order of ``members``.
        members: What each is.
        combine: ``probabilities``: the logits are the log of the weighted mean probability, so that their softmax is
            that mean. ``logits``: the weighted mean of the logits (a geometric mean of the probabilities).
        mean: Channel means that the batch was normalised with.
        std: Its standard deviations.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        members: Sequence[Member],
        combine: Combine,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks)
        self.config = members[0].model
        self.about = tuple(members)
        self.combine = combine
        self.mean, self.std = tuple(mean), tuple(std)

    def parts(self, images: Tensor) -> Iterator[tuple[Member, nn.Module, Tensor]]:
        """Yield each member that has a weight, its network, and the batch as it reads it (B, C, H, W)."""
        for about, network in zip(self.about, self.members, strict=True):
            if about.weight > 0:
                yield about, network, self._renormalized(images, about)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), normalised as the ensemble's preprocessing does, to logits (B, classes) in fp32."""
        rows = []
        for about, network, own in self.parts(images):
            logits: Tensor = network(own).float()
            if about.order:
                logits = logits[:, list(about.order)]
            if self.combine == "logits":
                rows.append(logits * about.weight)
            else:
                rows.append(logits.log_softmax(1) + math.log(about.weight))
        members = torch.stack(rows)  # (members, B, classes)
        return members.sum(0) if self.combine == "logits" else members.logsumexp(0)

    def _renormalized(self, images: Tensor, about: Member) -> Tensor:
        """Turn ``(x - mean) / std`` with the ensemble's figures into the same with a member's."""
        if (about.mean, about.std) == (self.mean, self.std):
            return images
        figures = (self.mean, self.std, about.mean, about.std)
        mean, std, own_mean, own_std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in figures)
        return (images * std + (mean - own_mean)) / own_std
