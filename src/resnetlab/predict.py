"""The only inference path: training's validation, `evaluate`, `predict` and all that follows go through here."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnetlab.bundle import Bundle
from resnetlab.loader import EvalLoader, Store
from resnetlab.metrics import Predictions
from resnetlab.runtime import Runtime


@torch.inference_mode()
def logits(
    model: nn.Module, batches: Iterable[Tensor], runtime: Runtime, tell: Callable[[int], None] | None = None
) -> Tensor:
    """Run a network over batches in evaluation mode, and leave it in the mode it was in.

    Args:
        model: On the runtime's device.
        batches: (B, C, H, W) float32 each.
        runtime: Device and precision.
        tell: Called with the number of images done after every batch.

    Returns:
        (N, classes) float32 on the CPU.
    """
    was_training = model.training
    model.eval()
    parts, done = [torch.empty(0)], 0
    try:
        for images in batches:
            with runtime.precision.autocast():
                output = model(images)
            parts.append(output.float().cpu())
            done += len(images)
            if tell:
                tell(done)
    finally:
        model.train(was_training)
    return torch.cat(parts[1:]) if len(parts) > 1 else parts[0]


def predict_store(
    model: nn.Module,
    store: Store,
    runtime: Runtime,
    *,
    batch_size: int = 250,
    tell: Callable[[int], None] | None = None,
) -> Predictions:
    """Predict a prepared split, every image once, shared among the processes of the group; all get the whole result."""
    local = logits(model, EvalLoader(store=store, batch_size=batch_size, runtime=runtime), runtime, tell)
    split = store.split
    whole = local
    if runtime.world_size > 1:
        whole = torch.zeros(len(store), len(split.classes), device=runtime.device)
        whole[runtime.rank :: runtime.world_size] = local.to(runtime.device)
        whole = runtime.sum(whole).cpu()
    return Predictions(
        logits=whole.numpy(),
        classes=split.classes,
        names=tuple(split.images.name(i) for i in range(len(store))),
        labels=split.labels,
    )


def predict(
    bundle: Bundle,
    images: Iterable[NDArray[np.uint8]],
    names: Sequence[str],
    runtime: Runtime,
    *,
    batch_size: int = 64,
) -> Predictions:
    """Predict decoded images, (H, W, C) uint8 with the bundle's number of channels, of any sizes.

    An image gets the same logits alone and in any batch, up to fp32 rounding.
    """

    def batches() -> Iterable[Tensor]:
        waiting: list[NDArray[np.uint8]] = []
        for image in images:
            waiting.append(image)
            if len(waiting) == batch_size:
                yield bundle.card.preprocess(waiting)
                waiting.clear()
        if waiting:
            yield bundle.card.preprocess(waiting)

    model = runtime.place(bundle.model)
    moved = (b.to(runtime.device).contiguous(memory_format=torch.channels_last) for b in batches())
    result = logits(model, moved, runtime)
    return Predictions(logits=result.numpy(), classes=bundle.card.classes, names=tuple(names))
