"""The verbs of the command line, in Python: `train`, `resume`, `load`, and what a `Run` can do."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnetlab import bundle, evaluate, loader, loggers, predict, rundir, runtime, session, sources
from resnetlab.bundle import Bundle
from resnetlab.console import Display, Quiet, Terminal
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.metrics import Predictions, Scorecard, score
from resnetlab.runtime import Runtime
from resnetlab.sources.dataset import Split
from resnetlab.sources.images import decode

DEFAULT_DATA = "digits"


@dataclass(frozen=True)
class Run:
    """A trained network and its directory (or its bundle file alone)."""

    path: Path

    @cached_property
    def bundle(self) -> Bundle:
        """The network, in evaluation mode, with its classes, preprocessing, recipe and scores."""
        return bundle.load(self.path)

    @cached_property
    def runtime(self) -> Runtime:
        """The device and precision to compute with: fp32, so that answers do not depend on the machine."""
        return runtime.setup(precision="fp32")

    def evaluate(
        self,
        data: str | None = None,
        *,
        split: str = "auto",
        batch_size: int = 250,
        skip_broken: bool = False,
        display: Display | None = None,
    ) -> Scorecard:
        """Score the network on a split of DATA.

        Args:
            data: What `train` accepts; None: the data that it was trained on.
            split: ``test``, ``val``, ``train``, or ``auto``: the test split, without one the validation split, without
                one all images (a plain folder that was not the training data is scored whole).
            batch_size: Images at a time; does not change the result.
            skip_broken: Leave out images that cannot be read instead of refusing.
            display: Where progress is shown.

        Raises:
            ResNetLabError: There is no such split, or it has classes that the network does not know.
        """
        show = display or Quiet()
        predictions = evaluate.predict_split(
            self.bundle,
            self.split(data, split),
            self.runtime,
            batch_size=batch_size,
            skip_broken=skip_broken,
            progress=show.reading,
        )
        return score(predictions)

    def split(self, data: str | None = None, split: str = "auto") -> Split:
        """Return a split of DATA, by default of the run's own, exactly as the run made it."""
        own = self._source()
        if data is None and own is None:
            raise UsageError(f"{self.path} does not say what it was trained on. Name the DATA to evaluate.")
        recipe = self.bundle.card.recipe
        source = data if data is not None else own
        assert source is not None
        dataset = sources.load(source, split_seed=recipe.data.split_seed)
        train, val, _ = loader.split(recipe.data, dataset)
        there = {"test": dataset.test, "val": val, "train": train}
        if split == "auto":
            split = next(name for name in ("test", "val", "train") if there[name] is not None)
        if split not in there:
            raise UsageError(f'There is no split "{split}". Splits are test, val and train.')
        chosen = there[split]
        if chosen is None:
            raise ResNetLabError(f"{dataset.name} has no {split} split.")
        return chosen

    def _source(self) -> str | None:
        source = self.bundle.card.data.get("source")
        return str(source) if source else None

    def predict(self, images: str | Path | NDArray[np.uint8] | Iterable[str | Path | NDArray[np.uint8]]) -> Predictions:
        """Predict image files, or decoded images (H, W, C) uint8.

        Raises:
            BrokenImage: A file cannot be read; it is named.
        """
        items = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        channels = self.bundle.card.preprocess.channels
        decoded = (i if isinstance(i, np.ndarray) else decode(Path(i), channels=channels) for i in items)
        names = [f"image {n}" if isinstance(i, np.ndarray) else str(i) for n, i in enumerate(items)]
        return predict.predict(self.bundle, decoded, names, self.runtime)


def load(run: str | Path) -> Run:
    """Open a run directory or a bundle file.

    Raises:
        ResNetLabError: There is none, or it is damaged.
    """
    opened = Run(Path(run))
    opened.bundle  # noqa: B018 - read and check it now, not at the first use
    return opened


def train(
    data: str | Path = DEFAULT_DATA,
    *,
    model: str | None = None,
    recipe: str = "default",
    out: str | Path | None = None,
    seed: int | None = None,
    val: float | None = None,
    settings: Sequence[str] = (),
    logger: str | None = None,
    watch_test: bool = False,
    skip_broken: bool = False,
    display: Display | None = None,
    **more: Any,
) -> Run:
    """Train a network and write a complete run directory.

    Args:
        data: A known name, a folder of class folders, parquet, ``cifar-10-batches-py``, or an archive of these.
        model: A row of `models.ARCHITECTURES`; None: the recipe chooses.
        recipe: A row of `recipes.RECIPES`.
        out: The run directory; None: a new one below ``runs``.
        seed: Of initialisation, order and augmentation.
        val: Share of the training images held back for validation; 0: none.
        settings: Overrides as on the command line, for example ``["optim.lr=0.05"]``.
        logger: ``tensorboard``, ``mlflow`` or ``wandb``, beside the run's own files.
        watch_test: Show the test score after every epoch; it chooses nothing.
        skip_broken: Leave out images that cannot be read instead of refusing to start.
        display: Where the run shows itself; None: the terminal.
        **more: Overrides as keywords: ``epochs=10``, ``**{"optim.lr": 0.05}``.

    Raises:
        UsageError: A name or a setting is wrong.
        ResNetLabError: The data cannot be used, the directory cannot be written, or the loss became NaN.
    """
    all_settings = [*settings, *(f"{key}={_text(value)}" for key, value in more.items())]
    if val is not None:
        all_settings.append(f"data.val={val}")
    if skip_broken:
        all_settings.append("data.skip_broken=true")
    if logger:
        loggers.check(logger)
    with _shown(display) as show:
        planned = session.plan(str(data), model, recipe, all_settings, show, seed=seed)
        name = f"{planned.dataset.name}-{planned.recipe.model.name}-{planned.recipe.name}"
        path = rundir.create(out, name) if planned.runtime.is_main else Path(out or "")
        session.Session(plan=planned, path=path, display=show, logger=logger, watch_test=watch_test).run()
    return Run(path)


def resume(run: str | Path, *, logger: str | None = None, display: Display | None = None) -> Run:
    """Go on with a run that was stopped, killed or cut off; it ends as if it never had been.

    Raises:
        ResNetLabError: It is no run, its data has changed, or another process is training in it.
    """
    path = Path(run)
    if not rundir.is_run(path):
        raise ResNetLabError(f"{path} is not a run directory, so it cannot be resumed.")
    with _shown(display) as show:
        planned = session.load_plan(path, show)
        session.Session(plan=planned, path=path, display=show, logger=logger).run()
    return Run(path)


@contextlib.contextmanager
def _shown(display: Display | None) -> Iterator[Display]:
    """Use the caller's display, or the terminal for as long as the work lasts."""
    if display is not None:
        yield display
    else:
        with Terminal() as terminal:
            yield terminal


def _text(value: object) -> str:
    """Write a Python value as a setting's text."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value)
    return str(value)
