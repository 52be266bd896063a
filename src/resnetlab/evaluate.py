"""Scoring a finished network. The only place that a test split is accepted."""

from dataclasses import replace

import numpy as np

from resnetlab.bundle import Bundle
from resnetlab.config import DataConfig
from resnetlab.errors import ResNetLabError
from resnetlab.loader import Progress, read
from resnetlab.metrics import Predictions
from resnetlab.predict import predict_store
from resnetlab.runtime import Runtime
from resnetlab.sources.dataset import Split
from resnetlab.views import view


def predict_split(
    bundle: Bundle,
    split: Split,
    runtime: Runtime,
    *,
    batch_size: int | None = None,
    views: str = "single",
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Predictions:
    """Predict a labelled split with the bundle's own preprocessing; its classes are matched by name.

    Returns:
        Predictions over the bundle's classes. `metrics.score` scores them.

    Raises:
        ResNetLabError: The split has classes that the network does not know, or images that cannot be read.
        UsageError: There are no such views, or ``batch_size`` is below 1.
    """
    preprocess = bundle.card.preprocess
    view(views, bundle.model, preprocess.size)  # what cannot be is said before the images are read
    config = DataConfig(skip_broken=skip_broken)
    split = relabel(split, bundle.card.classes)
    split = replace(split, images=split.images.with_channels(preprocess.channels))
    store = read(split, preprocess, config, "images", progress)[0]
    if len(store) == 0:
        raise ResNetLabError("There are no images to evaluate.")

    def tell(done: int) -> None:
        if progress:
            progress("evaluating", done, len(store))

    return predict_store(runtime.place(bundle.model), store, runtime, batch_size=batch_size, views=views, tell=tell)


def relabel(split: Split, classes: tuple[str, ...]) -> Split:
    """Return the split with its labels as positions in ``classes``, matched by name, never by position.

    Raises:
        ResNetLabError: An image's class is not among them.
    """
    if split.classes == classes:
        return split
    used = sorted({split.classes[i] for i in np.unique(split.labels)} - set(classes))
    if used:
        raise ResNetLabError(
            f"The network does not know {len(used)} of the classes in this data: {', '.join(used[:10])}. "
            f"It knows {', '.join(classes[:10])}{' ...' if len(classes) > 10 else ''}."
        )
    place = {name: i for i, name in enumerate(classes)}
    mapping = np.array([place.get(name, -1) for name in split.classes], dtype=np.int64)
    return replace(split, labels=mapping[split.labels], classes=classes)
