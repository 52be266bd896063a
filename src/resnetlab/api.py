"""The verbs of the command line, in Python: `train`, `resume`, `load`, and what a `Run` can do."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from resnetlab import (
    assembly,
    bundle,
    chosen,
    ensemble,
    evaluate,
    explain,
    loggers,
    models,
    predict,
    rundir,
    session,
)
from resnetlab.bundle import Bundle
from resnetlab.config import as_text
from resnetlab.console import Display, Quiet, Terminal
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.metrics import Heatmap, Predictions, Scorecard, score
from resnetlab.recipes import HALVED
from resnetlab.runtime import Runtime, leave_group, lost_group, setup, undisturbed
from resnetlab.session import Replay
from resnetlab.sources.dataset import Split
from resnetlab.sources.images import decode
from resnetlab.views import note

if TYPE_CHECKING:
    from resnetlab.report.records import Comparison
    from resnetlab.serve.limits import Limits

DEFAULT_DATA = "digits"
TRAINING = threading.Lock()
"""Held while this process trains: initial weights and dropout are drawn from PyTorch's one generator, so that two runs
at once would not be what their seeds say."""


@dataclass(frozen=True)
class Run:
    """A trained network and its directory (or its bundle file alone)."""

    path: Path

    @cached_property
    def bundle(self) -> Bundle:
        """The network, in evaluation mode, with its classes, preprocessing, recipe and scores."""
        with undisturbed():
            return bundle.load(self.path)

    @property
    def runtime(self) -> Runtime:
        """The device and precision to compute with: fp32, so that answers do not depend on the machine."""
        return setup(precision="fp32")

    @undisturbed()
    def evaluate(
        self,
        data: str | None = None,
        *,
        split: str = "auto",
        views: str = "single",
        batch_size: int | None = None,
        skip_broken: bool = False,
        display: Display | None = None,
    ) -> Scorecard:
        """Score the network on a split of DATA.

        Args:
            data: What `train` accepts; None: the data that it was trained on. Where the images are those that it was
                trained on, moved elsewhere, they are divided as the run divided them.
            split: ``test``, ``val``, ``train``, or ``auto``: the test split, without one the validation split, without
                one all images (a plain folder that was not the training data is scored whole); ``all``: whole anyhow.
            views: A row of `views.VIEWS`: what the network is shown of an image before its answers are averaged.
            batch_size: Images at a time, by default what suits this machine; does not change the result.
            skip_broken: Leave out images that cannot be read instead of refusing.
            display: Where progress is shown.

        Raises:
            ResNetLabError: There is no such split, or it has classes that the network does not know.
        """
        show = display or Quiet()
        if said := self.note_on(views):
            show.line(f"note: {said}")
        picked = chosen.choose(self.bundle, str(self.path), data, split, skip_broken=skip_broken)
        for said in picked.notes:
            show.line(f"note: {said}")
        predictions = evaluate.predict_split(
            self.bundle,
            picked.split,
            self.runtime,
            batch_size=batch_size,
            views=views,
            skip_broken=picked.skip_broken,
            progress=show.reading,
        )
        if left_out := len(picked.split) - len(predictions.names):
            show.line(f"note: {left_out:,} of {len(picked.split):,} images cannot be read and were left out.")
        return score(predictions)

    def note_on(self, views: str) -> str | None:
        """Return what a person should know before the network is shown these views, if anything."""
        card = self.bundle.card
        alike = models.ARCHITECTURES[card.model.name].mirrors_alike and card.preprocess.size % HALVED == 0
        return None if alike else note(views, card.recipe.data.augment)

    def split(self, data: str | None = None, split: str = "auto", *, skip_broken: bool = False) -> Split:
        """Return a split of DATA, by default of the run's own, exactly as the run made it: see `chosen.choose`."""
        return chosen.choose(self.bundle, str(self.path), data, split, skip_broken=skip_broken).split

    @undisturbed()
    def report(
        self, path: str | Path | None = None, *, data: str | None = None, display: Display | None = None
    ) -> Path:
        """Write one page that shows the run, complete in itself, and where its data is there a table of its mistakes.

        The table lies beside the page, as ``errors.csv``, or ``NAME-errors.csv`` for a page of another name.

        Args:
            path: The page; None: ``report.html`` in the run directory.
            data: Where the run's data lies now; None: where it lay.
            display: Where progress is shown.

        Raises:
            UsageError: ``path`` is a folder.
            ResNetLabError: The run's files are damaged, or the page cannot be written.
        """
        from resnetlab import study
        from resnetlab.report import page, table

        target = Path(path) if path is not None else self.bundle.path.parent / page.PAGE
        _refuse_folder(target)
        found = study.collect(self.bundle, self.runtime, display or Quiet(), data=data)
        if found.predictions is not None:
            table.write_errors(found.predictions, page.errors(target))
        return page.write(found, target)

    @undisturbed()
    def predict(
        self,
        images: str | Path | NDArray[np.uint8] | Iterable[str | Path | NDArray[np.uint8]],
        *,
        views: str = "single",
    ) -> Predictions:
        """Predict image files, or decoded images (H, W, C) uint8, over the views of a row of `views.VIEWS`.

        Raises:
            BrokenImage: A file cannot be read; it is named.
            UsageError: There are no such views.
        """
        decoded, names = self._decoded(images)
        return predict.predict(self.bundle, decoded, names, self.runtime, views=views)

    @undisturbed()
    def explain(
        self,
        images: str | Path | NDArray[np.uint8] | Iterable[str | Path | NDArray[np.uint8]],
        *,
        method: str = "grad-cam",
        stage: str | None = None,
        target: str | None = None,
    ) -> list[Heatmap]:
        """Show where in each image the network sees its evidence for a class.

        Args:
            images: As `predict` takes them.
            method: A row of `explain.METHODS`.
            stage: For the methods that look at feature maps: of which stage, for example ``layer3``; None: the last.
            target: The class; None: for each image the most probable.

        Raises:
            BrokenImage: A file cannot be read; it is named.
            UsageError: There is no such method, stage or class.
            ResNetLabError: The method's library is missing; the message holds the command that installs it.
        """
        decoded, names = self._decoded(images)
        return explain.explain(
            self.bundle, list(decoded), names, self.runtime, method=method, stage=stage, target=target
        )

    def _decoded(
        self, images: str | Path | NDArray[np.uint8] | Iterable[str | Path | NDArray[np.uint8]]
    ) -> tuple[Iterable[NDArray[np.uint8]], list[str]]:
        """Return images decoded one by one as they are asked for, and their names."""
        items = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        channels = self.bundle.card.preprocess.channels
        decoded = (i if isinstance(i, np.ndarray) else decode(Path(i), channels=channels) for i in items)
        return decoded, [f"image {n}" if isinstance(i, np.ndarray) else str(i) for n, i in enumerate(items)]

    @undisturbed()
    def serve(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        limits: "Limits | None" = None,
        display: Display | None = None,
    ) -> None:
        """Serve a web page and an HTTP API over the network, until SIGTERM or Ctrl-C.

        Args:
            host: Address to listen on; the default can be reached from this machine only.
            port: 0: any that is free.
            limits: What is taken on; None: the defaults.
            display: Told where it is, and that it stopped.

        Raises:
            UsageError: The address is none, or not this machine's.
            ResNetLabError: The port is taken, or the extra "serve" is not installed.
        """
        from resnetlab import serve

        folder = self.path if self.path.is_dir() else self.path.parent
        tell = (display or Quiet()).line
        serve.run(self.bundle, host=host, port=port, report=folder / "report.html", limits=limits, tell=tell)


@undisturbed()
def replay(run: str | Path, *, precision: str | None = None) -> Replay:
    """Compute the batch on which a run diverged once more (`train` and `resume` keep it with ``debug_batch``).

    Args:
        run: The run directory.
        precision: Of the arithmetic; None: the run's own.

    Raises:
        ResNetLabError: No batch was kept, or it is damaged.
    """
    return session.replay(Path(run), precision)


@undisturbed()
def compare(
    runs: Sequence[str | Path | Run],
    out: str | Path | None = None,
    *,
    data: str | None = None,
    display: Display | None = None,
) -> "Comparison":
    """Score runs on the same images, test them in pairs, and find what was done differently.

    Args:
        runs: Two to eight runs or bundles.
        out: Where to write the page that shows it; None: nowhere.
        data: In place of their own data; divided as the runs divided theirs. The test split is scored, without one
            validation; its images must be the same for all.
        display: Where progress is shown.

    Raises:
        UsageError: There are fewer than two runs, or too many.
        ResNetLabError: They were not scored on the same images.
    """
    from resnetlab.report import comparison as page
    from resnetlab.study import comparison

    if out is not None:
        _refuse_folder(Path(out))
    opened = [run if isinstance(run, Run) else load(run) for run in runs]
    machine = opened[0].runtime if opened else setup(precision="fp32")
    found = comparison.compare([run.bundle for run in opened], machine, display or Quiet(), data=data)
    if out is not None:
        page.write(found, Path(out))
    return found


def _refuse_folder(page: Path) -> None:
    """Say it before minutes of work where a page cannot be written because a folder has its name."""
    if page.is_dir():
        raise UsageError(f"{page} is a folder. Name the page's file, for example {page / 'page.html'}.")


def load(run: str | Path) -> Run:
    """Open a run directory or a bundle file.

    Raises:
        ResNetLabError: There is none, or it is damaged.
    """
    opened = Run(Path(run).absolute())  # the caller may change the working directory
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
    debug_batch: bool = False,
    display: Display | None = None,
    **more: Any,
) -> Run:
    """Train a network and write a complete run directory; one at a time in a process.

    Args:
        data: A known name, a folder of class folders, parquet, ``cifar-10-batches-py``, or an archive of these.
        model: A row of `models.ARCHITECTURES`; None: the recipe chooses.
        recipe: A row of `recipes.RECIPES`.
        out: The run directory; None: a new one below ``runs``. When torchrun starts its processes again, the run
            that is there is resumed.
        seed: Of initialisation, order and augmentation.
        val: Share of the training images held back for validation where the data has no validation split of its own;
            None: the recipe's, a tenth; 0: no validation, not even with a split that is there.
        settings: Overrides as on the command line, for example ``["optim.lr=0.05"]``.
        logger: ``tensorboard``, ``mlflow`` or ``wandb``, beside the run's own files.
        watch_test: Show the test score after every epoch; it chooses nothing.
        skip_broken: Leave out images that cannot be read instead of refusing to start.
        debug_batch: Watch the gradients too, and keep the batch on which the run diverges, for `replay`.
        display: Where the run shows itself; None: the terminal.
        **more: Overrides as keywords: ``epochs=10``, ``**{"optim.lr": 0.05}``.

    Raises:
        UsageError: A name or a setting is wrong.
        ResNetLabError: The data cannot be used, the directory cannot be written, the loss became NaN, or this process
            is training another network.
        Interrupted: A signal came; the run is saved, and `resume` goes on with it.
    """
    if out is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and rundir.is_run(Path(out)):
        return resume(out, logger=logger, debug_batch=debug_batch, display=display)  # by torchrun, again
    all_settings = [*settings, *(f"{key}={as_text(value)}" for key, value in more.items())]
    if val is not None:
        all_settings.append(f"data.val={val}")
    if skip_broken:
        all_settings.append("data.skip_broken=true")
    if logger:
        loggers.check(logger)
    with _one_at_a_time(), _shown(display) as show:
        planned = session.plan(str(data), model, recipe, all_settings, show, seed=seed)
        name = f"{planned.dataset.name}-{planned.recipe.model.name}-{planned.recipe.name}"
        path = Path(planned.runtime.share(str(rundir.create(out, name)) if planned.runtime.is_main else ""))
        session.Session(
            plan=planned,
            path=path,
            display=show,
            logger=logger,
            watch_test=watch_test,
            debug_batch=debug_batch,
        ).run()
    return Run(path.absolute())


def combine(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    how: str = "probabilities",
    display: Display | None = None,
) -> Run:
    """Make one run of several, an ensemble or the mean of their weights, and score it on the data of the first.

    Args:
        runs: Run directories or bundles, none of them an ensemble. Their classes are the same and they read images
            alike, but for mean and deviation; for ``soup`` these, the network and the classes' order are the same too.
        out: The new run's directory; None: a new one below ``runs``.
        how: A row of `ensemble.RULES`: ``probabilities``, ``logits``, ``weighted`` or ``soup``.
        display: Where it is shown; None: the terminal.

    Raises:
        UsageError: There is no such rule, or there are fewer than two runs.
        ResNetLabError: The runs do not go together; the message names the difference.
    """
    opened = [load(run) for run in runs]
    ensemble.check([run.bundle for run in opened], how)
    with _shown(display) as show:
        work = assembly.Assembly(
            bundles=[run.bundle for run in opened],
            splits=[partial(run.split, None) for run in opened],
            machine=setup(precision="fp32"),
            display=show,
        )
        kind = "soup" if how == "soup" else "ensemble"
        name = f"{opened[0].bundle.card.data.get('name', 'data')}-{kind}-of-{len(opened)}"
        with assembly.new_directory(out, name) as path:
            work.make(how, path)
    return Run(path.absolute())


def resume(
    run: str | Path, *, logger: str | None = None, debug_batch: bool = False, display: Display | None = None
) -> Run:
    """Go on with a run that was stopped, killed or cut off; it ends as if it never had been.

    On a CPU that is to the bit, on a GPU with ``deterministic=true``.

    Raises:
        ResNetLabError: It is no run, its data has changed, or another process is training in it.
        Interrupted: A signal came; the run is saved, and can be resumed again.
    """
    path = Path(run)
    if logger:
        loggers.check(logger)
    if not rundir.is_run(path):
        raise ResNetLabError(f"{path} is not a run directory, so it cannot be resumed.")
    with _one_at_a_time(), _shown(display) as show:
        planned = session.load_plan(path, show)
        session.Session(plan=planned, path=path, display=show, logger=logger, debug_batch=debug_batch).run()
    return Run(path.absolute())


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    if not TRAINING.acquire(blocking=False):
        raise ResNetLabError("This process is training another network already. Wait for it, or start a process each.")
    try:
        yield
    finally:
        TRAINING.release()


@contextlib.contextmanager
def _shown(display: Display | None) -> Iterator[Display]:
    """Use the caller's display, or the terminal for as long as the work lasts; of several processes one speaks.

    Afterwards PyTorch is as the caller had it, and this process is in no group.

    Raises:
        ResNetLabError: A process of the group was lost before training began (`failures` explains it after that).
    """
    try:
        with undisturbed(), _display(display) as show:
            yield show
    except RuntimeError as error:
        if not lost_group(error):
            raise
        raise ResNetLabError("Another process of this run has ended or no longer answers. Start all again.") from error
    finally:
        leave_group()


@contextlib.contextmanager
def _display(display: Display | None) -> Iterator[Display]:
    if display is not None:
        yield display
    elif os.environ.get("RANK", "0") != "0":
        yield Quiet()
    else:
        with Terminal() as terminal:
            yield terminal
