"""The command line: parse, call one function of `api`, show what it returned. Heavy imports wait for their command."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError

from resnetlab import __version__
from resnetlab.errors import ResNetLabError, UsageError

if TYPE_CHECKING:
    from resnetlab.metrics import Heatmap

app = App(
    name="resnetlab",
    help="Train, evaluate and use residual networks on CIFAR-10 or on your own images.",
    version=__version__,
    help_format="plaintext",
)

Json = Annotated[bool, Parameter(negative="", help="Print one JSON document on stdout, and nothing else.")]


@app.command
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
        default, tutorial or paper.
    out
        The run directory; by default a new one below runs/.
    seed
        Of initialisation, order and augmentation.
    seeds
        Train so many runs, of seeds from --seed on, and say mean and spread; again: go on with what is unfinished.
    val
        Share of the training images held back for validation, or none.
    resume
        Go on with this run, exactly where it was stopped.
    logger
        Also report to tensorboard, mlflow or wandb.
    dry_run
        Show the resolved run, measure a few steps, say how long it would take; write nothing.
    skip_broken
        Leave out images that cannot be read instead of refusing to start.
    watch_test
        Show the test score after every epoch too, as the tutorial does; it chooses nothing.
    """
    from resnetlab import api

    data, settings = _data_and_settings(words)
    if resume is not None:
        if words or model or out or seed is not None or seeds is not None or val:
            raise UsageError("--resume goes on with a run as it is: it takes no DATA, options or settings.")
        api.resume(resume, logger=logger)
        return
    if val is not None:
        settings.append(f"data.val={'0' if val.lower() == 'none' else val}")
    if skip_broken:
        settings.append("data.skip_broken=true")
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
    }
    if seeds is not None:
        from resnetlab.seeds import train_seeds

        train_seeds(data, count=seeds, **options)
        return
    api.train(data, **options)


def _data_and_settings(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """Tell DATA from ``key=value``; an existing path is DATA whatever its name."""
    settings = [w for w in words if "=" in w and not Path(w).exists()]
    data = [w for w in words if w not in settings]
    if len(data) > 1:
        raise UsageError(
            f"There can be one DATA, but these were given: {', '.join(data)}. Settings look like epochs=40."
        )
    return (data[0] if data else "digits"), settings


def _show_dry_run(data: str, model: str | None, recipe: str, settings: list[str], seed: int | None) -> None:
    from resnetlab import session
    from resnetlab.config import fields, flat
    from resnetlab.console import Terminal, duration

    with Terminal() as terminal:
        plan = session.plan(data, model, recipe, settings, terminal, seed=seed)
        for line in session.header(plan, Path("(none: a dry run)")):
            terminal.line(line)
        cost = session.dry_run(plan)
        values = flat(plan.recipe)
        for key, _ in fields(type(plan.recipe)):
            terminal.line(f"  {key}={_setting(values[key])}")
        terminal.line(
            f"cost    {cost['steps']:,} steps of {cost['seconds_per_step']:.3f} s ({cost['images_per_second']:,.0f} "
            f"images/s), peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB: "
            f"about {duration(cost['seconds_to_finish'])} to finish"
        )


def _setting(value: object) -> str:
    """Write a value as ``key=value`` takes it."""
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value)
    return "none" if value is None else str(value)


@app.command
def evaluate(
    run: str,
    data: str | None = None,
    *,
    split: Literal["auto", "test", "val", "train"] = "auto",
    views: str = "single",
    batch_size: int = 250,
    skip_broken: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Score a trained network on labelled images, by default on the test split of its own data.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    data
        What `train` accepts. Classes are matched by name.
    split
        Which split of DATA to score.
    views
        What the network is shown of each image: single, flip, 10-crop, multi-scale or shift; answers are averaged.
    batch_size
        Images at a time; does not change the result.
    skip_broken
        Leave out images that cannot be read instead of refusing.
    """
    from resnetlab import api
    from resnetlab.console import Quiet, Terminal

    opened = api.load(run)
    if json:
        result = opened.evaluate(
            data, split=split, views=views, batch_size=batch_size, skip_broken=skip_broken, display=Quiet()
        )
        _print_json(result.to_dict())
        return
    with Terminal() as terminal:
        result = opened.evaluate(
            data, split=split, views=views, batch_size=batch_size, skip_broken=skip_broken, display=terminal
        )
    low, high = result.top1_interval
    _table(
        f"{run} on {data or opened.bundle.card.data.get('name', 'its data')}: n = {result.n:,}",
        ("measure", "value"),
        [
            ("top-1", f"{result.top1:.2%}  (95 % interval {low:.2%} to {high:.2%})"),
            ("top-5", f"{result.top5:.2%}"),
            ("loss", f"{result.loss:.4f}"),
            ("balanced accuracy", f"{result.balanced_accuracy:.2%}"),
            ("macro F1", f"{result.macro_f1:.4f}"),
            ("calibration error", f"{result.calibration_error:.4f}"),
        ],
    )
    _table(
        "by class",
        ("class", "images", "precision", "recall", "F1"),
        [(c.name, f"{c.n:,}", f"{c.precision:.2%}", f"{c.recall:.2%}", f"{c.f1:.4f}") for c in result.per_class],
    )


@app.command
def predict(
    run: str,
    *images: str,
    top: int = 3,
    views: str = "single",
    format: Literal["table", "json", "csv"] = "table",
    json: Json = False,
    skip_broken: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Say what is in images: files, folders, globs, or - for an image (or a list of paths) on standard input.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    images
        Files, folders (searched through), patterns such as 'photos/*.jpg', or -.
    top
        How many classes to show for each image.
    views
        What the network is shown of each image: single, flip, 10-crop, multi-scale or shift; answers are averaged.
    format
        table, json or csv.
    skip_broken
        Predict the readable images although others are not.
    """
    from resnetlab import api, inputs
    from resnetlab.metrics import answers

    opened = api.load(run)
    found = inputs.gather(images, sys.stdin.buffer)
    good, broken = inputs.read(found, opened.bundle.card.preprocess.channels)
    for error in broken:
        print(f"resnetlab: {error}", file=sys.stderr)  # noqa: T201
    if broken and not skip_broken:
        raise ResNetLabError(
            f"{len(broken)} of {len(found)} images cannot be read; nothing was predicted. "
            "--skip-broken predicts the rest."
        )
    if said := opened.note_on(views):
        print(f"resnetlab: note: {said}", file=sys.stderr)  # noqa: T201
    predictions = opened.predict([image for _, image in good], views=views)
    rows = answers(predictions, [name for name, _ in good], max(1, top))
    if json or format == "json":
        _print_json(rows)
    elif format == "csv":
        _print_csv(rows)
    else:
        _table(
            f"{len(rows)} images",
            ("image", "class", "probability", "next"),
            [(r["file"], r["class"], f"{r['probability']:.1%}", _others(r)) for r in rows],
        )


@app.command
def explain(
    run: str,
    *images: str,
    method: str = "grad-cam",
    stage: str | None = None,
    target: str | None = None,
    out: Path = Path("explanations"),
    json: Json = False,
) -> None:
    """Show where in images the network sees its evidence: pictures and arrays of heatmaps.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    images
        Files, folders (searched through), patterns such as 'photos/*.jpg', or -.
    method
        grad-cam, score-cam, eigen-cam, occlusion or integrated-gradients.
    stage
        Whose feature maps the CAM methods look at, for example layer3; by default the last stage's.
    target
        The class to explain; by default, for each image, the most probable.
    out
        The folder for a .png and a .npy an image; files in it are never replaced.
    """
    from resnetlab import api, inputs
    from resnetlab.report import heatmap

    opened = api.load(run)
    good, broken = inputs.read(inputs.gather(images, sys.stdin.buffer), opened.bundle.card.preprocess.channels)
    if broken:
        raise broken[0]
    maps = opened.explain([image for _, image in good], method=method, stage=stage, target=target)
    maps = [replace(found, name=name) for found, (name, _) in zip(maps, good, strict=True)]
    paths = heatmap.write(maps, out)
    if json:
        rows = zip(maps, paths, strict=True)
        _print_json([{**_facts(m), "picture": str(p), "values": str(p.with_suffix(".npy"))} for m, p in rows])
        return
    _table(
        f"{len(maps)} images by {method}" + (f" of {maps[0].stage}" if maps[0].stage else ""),
        ("image", "class", "probability", "picture"),
        [(m.name, m.target, f"{m.probability:.1%}", str(p)) for m, p in zip(maps, paths, strict=True)],
    )


def _facts(found: "Heatmap") -> dict[str, Any]:
    """Return what a heatmap is of, JSON-able."""
    return {
        "file": found.name,
        "class": found.target,
        "probability": found.probability,
        "method": found.method,
        "stage": found.stage,
    }


@app.command
def serve(run: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Try a network in the browser, or use it over HTTP: a page, and an API that answers as `predict` does.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    host
        Address to listen on; by default only this machine can reach it.
    port
        Port to listen on; 0 takes any that is free.
    """
    from resnetlab import api
    from resnetlab import serve as server
    from resnetlab.console import Terminal

    server.check()
    opened = api.load(run)
    terminal = Terminal()
    card = opened.bundle.card
    terminal.line(f"serve {run}: {card.model.name}, {len(card.classes)} classes, image side {card.preprocess.size} px")
    opened.serve(host=host, port=port, display=terminal)


@app.command
def report(run: str, *, data: str | None = None, out: Path | None = None) -> None:
    """Make one page of a run that opens anywhere: curves, confusions, calibration, mistakes, network, data.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    data
        Where the run's data lies now, if not where it lay.
    out
        The page; by default report.html in the run directory.
    """
    from resnetlab import api
    from resnetlab.console import Terminal

    opened = api.load(run)
    with Terminal() as terminal:
        page = opened.report(out, data=data, display=terminal)
        terminal.line(f"report {page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")


@app.command
def compare(*runs: str, data: str | None = None, out: Path = Path("compare.html"), json: Json = False) -> None:
    """Compare runs on the same test images: scores with intervals, costs, McNemar's test, what changed.

    Parameters
    ----------
    runs
        Run directories, or bundles.
    data
        What to score them on; by default the test split of their own data.
    out
        The page (not with --json).
    """
    from resnetlab import api
    from resnetlab.console import Terminal

    if json:
        _print_json(api.compare(runs, data=data).to_dict())
        return
    with Terminal() as terminal:
        found = api.compare(runs, out, data=data, display=terminal)
    _show_comparison(found)
    _line(f"page  {out}")


@app.command
def ensemble(*runs: str, out: Path | None = None, combine: str = "probabilities") -> None:
    """Make one run of several: resnetlab ensemble RUN RUN... [--out DIR] [--combine RULE]

    The result is a run that evaluate, predict, explain and the others accept.

    Parameters
    ----------
    runs
        Run directories, or the model.safetensors in them.
    out
        The new run's directory; by default a new one below runs/.
    combine
        probabilities or logits: the mean of those; weighted: the mean of probabilities with weights fitted on the
        validation split; soup: the mean of the networks' weights, one network.
    """
    from resnetlab import api

    api.combine(runs, out, how=combine)


@app.command
def models(*, json: Json = False) -> None:
    """List the networks: parameters, multiply-adds and layers, at the size and classes that each was designed for."""
    from dataclasses import asdict

    from resnetlab import models as networks

    rows = networks.rows()
    if json:
        _print_json([asdict(row) for row in rows])
        return
    _table(
        "networks (parameters and multiply-adds at the given input size and number of classes)",
        ("name", "family", "block", "layers", "parameters", "multiply-adds", "input", "classes"),
        [
            (
                r.name,
                r.family,
                r.block or "-",
                str(r.layers),
                f"{r.parameters:,}",
                f"{r.macs / 1e6:,.1f} M",
                f"{r.image_size} px",
                str(r.num_classes),
            )
            for r in rows
        ],
    )


@app.command
def recipes() -> None:
    """List the recipes, and every key that can be set with key=value."""
    from resnetlab.config import Recipe, fields, flat
    from resnetlab.recipes import RECIPES, Facts

    for name, function in RECIPES.items():
        _line(f"{name}: {(function.__doc__ or '').splitlines()[0]}")
    facts = Facts(images=50_000, size=32, mirrors=True)
    columns = {name: flat(function(facts)) for name, function in RECIPES.items()}
    _table(
        "keys, with each recipe's values for CIFAR-10",
        ("key", *columns),
        [(key, *(_value(values[key]) for values in columns.values())) for key, _ in fields(Recipe)],
    )


@app.command
def data(data: str = "digits", *, out: Path = Path("contact-sheet.png"), json: Json = False) -> None:
    """Describe a data set: classes, counts, sizes, channel statistics, a contact sheet, and what is wrong with it.

    Parameters
    ----------
    data
        What `train` accepts.
    out
        Where the contact sheet is written (not with --json).
    """
    from resnetlab import sources
    from resnetlab.console import Terminal

    if json:
        _print_json(sources.survey(sources.load(data, skip_broken=True)).to_dict())
        return
    with Terminal() as terminal:
        dataset = sources.load(data, skip_broken=True)
        found = sources.survey(dataset, progress=lambda done, total: terminal.reading("looking", done, total))
    _show_survey(found, dataset, out)


@app.command
def doctor(*, json: Json = False) -> None:
    """Show what ResNetLab runs on: versions, device, precision, threads, memory, and where it looks for data."""
    import platform

    import torch

    from resnetlab import runtime, sources

    device = runtime.choose_device()
    facts: dict[str, Any] = {
        **runtime.versions(),
        "system": platform.platform(),
        "device": str(device),
        "machine": runtime.machine(device),
        "precision": runtime.choose_precision("auto", device),
        "cpu_bf16": runtime.cpu_has_bf16(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_bytes": runtime.total_memory(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "data_places": [str(place) for place in sources.places()],
    }
    if json:
        _print_json(facts)
    else:
        _table("doctor", ("what", "value"), [(k, _value(v)) for k, v in facts.items()])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a failure that is explained, 2 wrong usage, 130 interrupted."""
    # Read when torch loads its thread pool. Threads that spin while they wait starve each other as soon as another
    # program wants a core: an epoch of digits took 18 s instead of 0.9 s on two cores with one of them busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = _stdin_last([w for w in words if w != "--debug"])
    sys.exit(_guarded(lambda: app(words, exit_on_error=False, print_error=False), debug))


def _stdin_last(words: list[str]) -> list[str]:
    """Move a lone ``-`` to the end, behind ``--``: anywhere else it is taken for an option without a name."""
    if "-" not in words or "--" in words:
        return words
    return [*(w for w in words if w != "-"), "--", "-"]


def _explained(error: CycloptsError) -> str:
    """Return the message, with how settings are written where an unknown option of `train` is one: ``--epoch 3``."""
    if not isinstance(error, UnknownOptionError) or tuple(error.command_chain or ()) != ("train",):
        return str(error)
    from resnetlab.config import Recipe, fields, nearest

    option = error.token.keyword or error.token.value
    word = option.lstrip("-").partition("=")[0].replace("-", "_")
    leaves = {key.rpartition(".")[2] for key, _ in fields(Recipe)}
    if "Did you mean" in str(error) and word not in leaves:
        return str(error)
    return f"Unknown option: {option}.{nearest(word)} Settings are written without dashes, such as epochs=40."


def _guarded(work: Callable[[], object], debug: bool) -> int:
    """Run a command; turn what goes wrong into a message and an exit status. ``--debug`` shows tracebacks."""
    try:
        work()
    except CycloptsError as error:
        return _fail(_explained(error), 2)
    except ResNetLabError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:  # a file or folder that became unreadable under our hands
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.", 1)
    except MemoryError:
        return _fail("Out of memory. Try a smaller batch_size or data.size, or data.memory=stream.", 1)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"resnetlab: {message}", file=sys.stderr)  # noqa: T201
    return status


def _line(text: str) -> None:
    print(text)  # noqa: T201


def _print_json(value: object) -> None:
    import json

    _line(json.dumps(value, indent=2, ensure_ascii=False))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    """Print predictions as CSV: file, class, probability, then class and probability of each further place."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    places = max((len(r["top"]) for r in rows), default=1)
    writer.writerow(
        ["file", "class", "probability", *(f"{k}_{n}" for n in range(2, places + 1) for k in ("class", "probability"))]
    )
    for r in rows:
        writer.writerow([r["file"], *(value for t in r["top"] for value in (t["class"], t["probability"]))])


def _others(row: dict[str, Any]) -> str:
    return ", ".join(f"{t['class']} {t['probability']:.1%}" for t in row["top"][1:])


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value) or "none"
    return "-" if value is None else str(value)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table; numbers stand to the right. Through a pipe it has no control characters."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        figures = number > 0 and all(row[number][:1].isdigit() or row[number] == "-" for row in rows)
        table.add_column(column, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _show_comparison(found: Any) -> None:
    """Print the tables of a comparison."""
    from resnetlab.report import comparison
    from resnetlab.report.html import duration, quantity

    rows = [(one, one.run.score) for _, one in comparison.ranked(found) if one.run.score]
    _table(
        f"{found.split} split, n = {len(found.runs[0].predictions.names):,}",
        ("run", "top-1", "95 % interval", "loss", "parameters", "multiply-adds", "epochs", "training time"),
        [
            (
                one.name,
                f"{score.top1:.2%}",
                f"{score.top1_interval[0]:.2%} to {score.top1_interval[1]:.2%}",
                f"{score.loss:.4f}",
                quantity(one.origin.parameters),
                quantity(one.origin.macs),
                str(len(one.run.epochs) or "-"),
                duration(one.seconds) if one.seconds else "-",
            )
            for one, score in rows
        ],
    )
    for duel in found.duels:
        _line(comparison.verdict(found, duel))
    changed = [(key, *(_value(value) for value in values)) for key, values in found.changed.items()]
    if changed:
        _table("what changed", ("setting", *(one.name for one in found.runs)), changed)
    else:
        _line("The recipes are the same.")


def _show_survey(found: Any, dataset: Any, out: Path) -> None:
    """Print what `data` found, and write the contact sheet."""
    from resnetlab import report, sources

    _line(f"{found.name} ({found.origin}): {len(found.classes)} classes, {found.channels} channels")
    for note in found.notes:
        _line(f"note: {note}")
    size = "{0[0]}×{0[1]}".format
    _table(
        "splits (height×width in pixels)",
        ("split", "images", "broken", "smallest", "median", "largest", "formats"),
        [
            (
                s.name,
                f"{s.images:,}",
                f"{s.broken:,}",
                size(s.smallest),
                size(s.median),
                size(s.largest),
                ", ".join(f"{kind} {n:,}" for kind, n in s.kinds.items()),
            )
            for s in found.splits
        ],
    )
    _table(
        "images by class",
        ("class", *(s.name for s in found.splits)),
        [(name, *(f"{s.per_class[i]:,}" for s in found.splits)) for i, name in enumerate(found.classes)],
    )
    mean, std = (" ".join(f"{v:.4f}" for v in values) for values in (found.statistics.mean, found.statistics.std))
    _line(f"training pixels in [0, 1]: mean {mean}, std {std}")
    _line(f"{len(found.problems)} problems found" + (":" if found.problems else "."))
    for problem in found.problems:
        _line(f"  {problem}")
    shown = [(name, image) for name, images in sources.samples(dataset, 10).items() for image in images][:400]
    sheet = report.contact_sheet([image for _, image in shown], [name for name, _ in shown], f"{found.name}: train")
    report.save(sheet, out)
    _line(f"contact sheet: {out}")
