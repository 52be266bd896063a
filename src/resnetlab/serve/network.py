"""What the service asks of a network, and how a bundle answers: through the same functions as `resnetlab predict`."""

import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor

from resnetlab import explain, predict, runtime
from resnetlab.bundle import Bundle
from resnetlab.metrics import Floats, Heatmap
from resnetlab.preprocess import Preprocess, to_tensor
from resnetlab.sources.dataset import Pixels
from resnetlab.views import view

Box = tuple[float, float, float, float]
METHODS = {"grad-cam": "torchcam", "eigen-cam": "torch", "integrated-gradients": "captum", "occlusion": "captum"}
"""Methods of `explain.METHODS` that are served, each with the package it needs, the page's choice first. Not score-cam:
a pass for each of 2,048 channels keeps a server busy for minutes."""


class Predictor(Protocol):
    """Anything that can be served."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def channels(self) -> int:
        """Of the images that it reads: 1 or 3."""
        ...

    @property
    def methods(self) -> tuple[str, ...]:
        """How it can be explained."""
        ...

    def prepare(self, image: Pixels) -> Any:
        """Make a decoded image, (H, W, C) uint8, small and ready. Called from several threads at once."""
        ...

    def logits(self, prepared: list[Any]) -> Floats:
        """Compute prepared images: (N, classes). Called from one thread."""
        ...

    def explain(self, image: Pixels, method: str, stage: str | None, target: str | None) -> tuple[Heatmap, Box]:
        """Explain a decoded image, while others may be computed. See `explain.explain`, and `seen`."""
        ...


class BundlePredictor:
    """A bundle (an ensemble is one too), computed in fp32."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.runtime = runtime.setup(precision="fp32")
        self.model = self.runtime.place(bundle.model)
        self.look = view("single", bundle.model)
        there = [name for name, needs in METHODS.items() if importlib.util.find_spec(needs)]
        maps = explain.stages(bundle.model)  # of features, which the linear model has none of
        self.methods = tuple(name for name in there if maps or not name.endswith("-cam"))

    @property
    def name(self) -> str:
        """The network's and its data's name."""
        data = self.bundle.card.data.get("name")
        return f"{self.bundle.card.model.name} on {data}" if data else self.bundle.card.model.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.bundle.card.classes

    @property
    def channels(self) -> int:
        """Of the images that it reads."""
        return self.bundle.card.preprocess.channels

    def prepare(self, image: Pixels) -> Tensor:
        """Return the square that the network looks at, (C, resize, resize) uint8."""
        return self.bundle.card.preprocess.square(to_tensor(image))

    def logits(self, prepared: list[Tensor]) -> Floats:
        """Compute prepared images as `predict.predict` computes a batch of them."""
        batch = torch.stack(prepared)
        preprocess = self.bundle.card.preprocess
        found = predict.view_logits(self.model, [batch], preprocess, self.look, self.runtime)
        result: Floats = predict.numbers(found).numpy()
        return result

    def explain(self, image: Pixels, method: str, stage: str | None, target: str | None) -> tuple[Heatmap, Box]:
        """Explain a decoded image. `explain.explain` works on a copy, so that batches may be computed meanwhile."""
        found = explain.explain(
            self.bundle, [image], ["image"], self.runtime, method=method, stage=stage, target=target
        )
        return found[0], seen(self.bundle.card.preprocess, *image.shape[:2])


def seen(preprocess: Preprocess, height: int, width: int) -> Box:
    """Return the part of an image that the network reads: left, top, right and bottom as shares of width and height.

    With a border added (``fit="pad"``) it is more than the image: below 0 and above 1.
    """
    share = preprocess.size / preprocess.resize
    side = {"crop": min(height, width), "pad": max(height, width)}.get(preprocess.fit)
    across, down = (share * (side / length if side else 1.0) for length in (width, height))
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2
