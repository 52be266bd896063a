"""`evaluate` and `predict`: what a run knows about images."""

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from resnetlab.cli.output import Json, print_csv, print_json, stdin, table, warn
from resnetlab.cli.tables import show_score
from resnetlab.errors import ResNetLabError, UsageError


def evaluate(
    run: str,
    data: str | None = None,
    *,
    split: Literal["auto", "test", "val", "train", "all"] = "auto",
    views: str = "single",
    batch_size: int | None = None,
    skip_broken: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Score a trained network on labelled images, by default on the test split of its own data.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    data
        What `train` accepts; by default the run's own. Classes are matched by name. Where it holds the images that
        the run was trained on, it is divided as the run divided it.
    split
        Which split of DATA to score. auto: test, without one val, without that all of it. all: every image of data that
        has no splits.
    views
        What the network is shown of each image: single, flip, 10-crop, multi-scale, diagonal or shift; answers are
        averaged.
    batch_size
        Images at a time, by default what suits this machine; does not change the result.
    skip_broken
        Leave out images that cannot be read instead of refusing.
    """
    from resnetlab import api
    from resnetlab.console import Notes, Terminal

    opened = api.load(run)
    if json:
        result = opened.evaluate(
            data, split=split, views=views, batch_size=batch_size, skip_broken=skip_broken, display=Notes()
        )
        print_json(result.to_dict())
        return
    with Terminal() as terminal:
        result = opened.evaluate(
            data, split=split, views=views, batch_size=batch_size, skip_broken=skip_broken, display=terminal
        )
    show_score(f"{run} on {data or opened.bundle.card.data.get('name', 'its data')}", result)


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
        What the network is shown of each image: single, flip, 10-crop, multi-scale, diagonal or shift; answers are
        averaged.
    format
        table, json or csv.
    skip_broken
        Predict the readable images although others are not.
    """
    from resnetlab import api, inputs
    from resnetlab.metrics import answers

    if top < 1:
        raise UsageError(f"--top takes a number of classes from 1 on, not {top}.")
    if json and format == "csv":
        raise UsageError("--json and --format csv are two answers; take one.")
    opened = api.load(run)
    found = inputs.gather(images, stdin(), warn)
    preprocess = opened.bundle.card.preprocess
    good, broken = inputs.read(found, preprocess.channels, keep=preprocess.square_pixels)
    for error in broken:
        warn(str(error))
    if broken and not skip_broken:
        raise ResNetLabError(
            f"{len(broken)} of {len(found)} images cannot be read; nothing was predicted. "
            "--skip-broken predicts the rest."
        )
    if not good:
        raise ResNetLabError(f"None of the {len(found)} images can be read.")
    if said := opened.note_on(views):
        warn(f"note: {said}")
    predictions = opened.predict([image for _, image in good], views=views)
    rows = answers(predictions, [name for name, _ in good], top)
    if json or format == "json":
        print_json(rows)
    elif format == "csv":
        print_csv(rows)
    else:
        table(
            f"{len(rows)} images",
            ("image", "class", "probability", "next"),
            [(r["file"], r["class"], f"{r['probability']:.1%}", _others(r)) for r in rows],
        )


def _others(row: dict[str, Any]) -> str:
    return ", ".join(f"{t['class']} {t['probability']:.1%}" for t in row["top"][1:])
