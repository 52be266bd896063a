"""`train`: everything that makes a run from data."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from resnetlab.errors import UsageError


def train(
    *words: str,
    model: str | None = None,
    recipe: str = "default",
    out: Path | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    val: str | None = None,
    resume: Path | None = None,
    logger: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    skip_broken: Annotated[bool, Parameter(negative="")] = False,
    watch_test: Annotated[bool, Parameter(negative="")] = False,
    debug_batch: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a network: resnetlab train [DATA] [--model M] [--recipe R] [key=value ...]

    DATA is a known name (cifar10, digits, ...), a folder of class folders, parquet, or an archive of these; without
    it, the 1,797 handwritten digits that come along. `resnetlab recipes` lists recipes and keys.

    Parameters
    ----------
    words
        DATA, and settings such as epochs=40 optim.lr=0.05.
    model
        The network (`resnetlab models` lists them); by default the recipe's choice for the data.
    recipe
        default, fast, tutorial or paper.
    out
        The run directory; by default a new one below runs/.
    seed
        Of initialisation, order and augmentation.
    seeds
        Train so many runs, of seeds from --seed on, and say mean and spread; again: go on with what is unfinished.
    val
        Share of the training images held back for validation where the data has no validation split (by default 0.1);
        none: no validation at all.
    resume
        Go on with this run, exactly where it was stopped.
    logger
        Also report to tensorboard, mlflow or wandb.
    dry_run
        Show the resolved run, measure a few steps, say how long it would take (one run of --seeds); write nothing.
    skip_broken
        Leave out images that cannot be read instead of refusing to start.
    watch_test
        Show the test score after every epoch too, as the tutorial does; it chooses nothing.
    debug_batch
        Watch the gradients too, and keep the batch on which the run diverges, for `resnetlab replay`.
    """
    data, settings = _data_and_settings(words)
    _compile_ahead(settings)
    from resnetlab import api, loggers
    from resnetlab.seeds import check_count, train_seeds

    if resume is not None:
        given = (*words, model, out, val, dry_run, skip_broken, watch_test, recipe != "default")
        if any(given) or seed is not None or seeds is not None:
            raise UsageError(
                "--resume goes on with a run as it is: it takes no DATA or settings, and no options but --logger and "
                "--debug-batch."
            )
        api.resume(resume, logger=logger, debug_batch=debug_batch)
        return
    _refuse_twice({"model": model, "seed": seed, "val": val}, settings)
    if val is not None:
        settings.append(f"data.val={'0' if val.lower() == 'none' else val}")
    if skip_broken:
        settings.append("data.skip_broken=true")
    if seeds is not None:
        check_count(seeds)
    if logger:
        loggers.check(logger)
    if dry_run:
        _show_dry_run(data, model, recipe, settings, seed)
        return
    options: dict[str, Any] = {
        "model": model,
        "recipe": recipe,
        "out": out,
        "seed": seed,
        "settings": settings,
        "logger": logger,
        "watch_test": watch_test,
        "debug_batch": debug_batch,
    }
    if seeds is not None:
        train_seeds(data, count=seeds, **options)
        return
    api.train(data, **options)


def _refuse_twice(flags: dict[str, object], settings: list[str]) -> None:
    """Refuse what is given both as a flag and as a setting: nobody can say which was meant."""
    from resnetlab.config import early

    keys = {"model": "model.name", "val": "data.val"}
    for flag, value in flags.items():
        key = keys.get(flag, flag)
        if value is not None and (other := early(settings, key)) is not None:
            raise UsageError(f"--{flag} {value} and {key}={other} say the same thing twice; leave one out.")


def _data_and_settings(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """Tell DATA from ``key=value``; an existing path is DATA whatever its name."""
    settings = [w for w in words if "=" in w and not Path(w).exists()]
    data = [w for w in words if w not in settings]
    if len(data) > 1:
        raise UsageError(
            f"There can be one DATA, but these were given: {', '.join(data)}. Settings look like epochs=40."
        )
    return (data[0] if data else "digits"), settings


def _compile_ahead(settings: list[str]) -> None:
    """Begin to compile what a run on a CPU will call, before PyTorch takes seconds to import.

    Only PyTorch knows of a GPU, where it is compiled for nothing, once.
    """
    from resnetlab.config import early
    from resnetlab.native import build

    if early(settings, "device") in (None, "auto", "cpu"):
        precision = early(settings, "precision") or "auto"
        build.begin(build.likely_precision() if precision == "auto" else precision)


def _show_dry_run(data: str, model: str | None, recipe: str, settings: list[str], seed: int | None) -> None:
    from resnetlab import session
    from resnetlab.config import as_text, fields, flat
    from resnetlab.console import Terminal, duration

    with Terminal() as terminal:
        plan = session.plan(data, model, recipe, settings, terminal, seed=seed)
        for line in session.header(plan, Path("(none: a dry run)")):
            terminal.line(line)
        cost = session.dry_run(plan)
        values = flat(plan.recipe)
        for key, _ in fields(type(plan.recipe)):
            terminal.line(f"  {key}={as_text(values[key])}")
        terminal.line(
            f"cost    {cost['steps']:,} steps of {cost['seconds_per_step']:.3f} s ({cost['images_per_second']:,.0f} "
            f"images/s), peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB: "
            f"about {duration(cost['seconds_to_finish'])} to finish"
        )
