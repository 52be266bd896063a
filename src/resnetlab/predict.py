"""The only inference path: training's validation, `evaluate`, `predict` and all that follows go through here.

The views of an image that a prediction may be averaged over are rows of `views.VIEWS`.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnetlab.bundle import Bundle
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.loader import EvalLoader, Store
from resnetlab.metrics import Predictions
from resnetlab.preprocess import Preprocess, to_tensor
from resnetlab.runtime import Runtime
from resnetlab.views import View, view


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


def view_logits(
    model: nn.Module,
    batches: Iterable[Tensor],
    preprocess: Preprocess,
    look: View,
    runtime: Runtime,
    tell: Callable[[int], None] | None = None,
) -> Tensor:
    """Run a network over several views of each image; an image's logits are the weighted mean of its views'.

    Args:
        model: On the runtime's device.
        batches: (B, C, resize, resize) uint8 each.
        preprocess: What made those squares, and what makes views of them.
        look: A row of `views.VIEWS`.
        runtime: Device and precision.
        tell: Called with the number of images done after every batch.

    Returns:
        (N, classes) float32 on the CPU; (0,) where there are no images.
    """
    rows, done = [], 0
    for squares in batches:
        mean: Tensor | None = None
        for images, weight in look(squares.to(runtime.device), preprocess):
            fitting = max(1, len(images) * preprocess.size**2 // images.shape[-1] ** 2)  # no more pixels than one view
            chunks = torch.split(images.contiguous(memory_format=torch.channels_last), fitting)
            share = logits(model, chunks, runtime) * weight
            mean = share if mean is None else mean + share
        assert mean is not None
        rows.append(mean)
        done += len(squares)
        if tell:
            tell(done)
    return torch.cat(rows) if rows else torch.empty(0)


def numbers(found: Tensor) -> Tensor:
    """Return logits (N, classes) as they are.

    Raises:
        ResNetLabError: One of them is NaN or infinite.
    """
    if bad := int((~found.isfinite()).any(dim=-1).sum()):
        raise ResNetLabError(
            f"The network's answers to {bad:,} of {len(found):,} images are not numbers (NaN or infinite): its weights "
            "are far too large, as after a step at too high a rate. Train it again with a lower optim.lr, or with "
            "precision=fp32."
        )
    return found


def predict_store(
    model: nn.Module,
    store: Store,
    runtime: Runtime,
    *,
    batch_size: int | None = None,
    views: str = "single",
    tell: Callable[[int], None] | None = None,
) -> Predictions:
    """Predict a prepared split, every image once, shared among the processes of the group; all get the whole result.

    ``batch_size`` is by default the runtime's.

    Raises:
        UsageError: There are no such views (`views.VIEWS`), the network cannot read them, or ``batch_size`` is below 1.
        ResNetLabError: The network's answers are not numbers.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"A batch holds 1 image or more, not {batch_size}.")
    look = view(views, model, store.preprocess.size)
    loader = EvalLoader(store=store, batch_size=batch_size or runtime.batch, runtime=runtime)
    local = view_logits(model, loader.squares(), store.preprocess, look, runtime, tell)
    split = store.split
    whole = local
    if runtime.world_size > 1:
        whole = torch.zeros(len(store), len(split.classes), device=runtime.device)
        whole[runtime.rank :: runtime.world_size] = local.to(runtime.device)
        whole = runtime.sum(whole).cpu()
    return Predictions(
        logits=numbers(whole).numpy(),
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
    views: str = "single",
) -> Predictions:
    """Predict decoded images, (H, W, C) uint8 with the bundle's number of channels, of any sizes.

    An image gets the same logits alone and in any batch, up to fp32 rounding.

    Raises:
        UsageError: There are no such views (`views.VIEWS`), or the network cannot read them.
        ResNetLabError: The network's answers are not numbers.
    """
    preprocess = bundle.card.preprocess
    look = view(views, bundle.model, preprocess.size)

    def batches() -> Iterable[Tensor]:
        waiting: list[Tensor] = []
        for image in images:
            waiting.append(preprocess.square(to_tensor(image)))
            if len(waiting) == batch_size:
                yield torch.stack(waiting)
                waiting.clear()
        if waiting:
            yield torch.stack(waiting)

    result = view_logits(runtime.place(bundle.model), batches(), preprocess, look, runtime)
    classes = bundle.card.classes
    return Predictions(logits=numbers(result.view(-1, len(classes))).numpy(), classes=classes, names=tuple(names))
