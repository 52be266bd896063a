"""`explain`, `report`, `compare` and `ensemble`: looking into runs, and making one of several."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnetlab.cli.output import Json, line, print_json, stdin, table, warn
from resnetlab.cli.tables import show_comparison

if TYPE_CHECKING:
    from resnetlab.metrics import Heatmap


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
    found = inputs.gather(images, stdin(), warn)
    preprocess = opened.bundle.card.preprocess
    good, broken = inputs.read(found, preprocess.channels, keep=preprocess.square_pixels)
    if broken:
        raise broken[0]
    maps = opened.explain([image for _, image in good], method=method, stage=stage, target=target)
    maps = [replace(shown, name=name) for shown, (name, _) in zip(maps, good, strict=True)]
    paths = heatmap.write(maps, out)
    if json:
        rows = zip(maps, paths, strict=True)
        print_json([{**_facts(m), "picture": str(p), "values": str(p.with_suffix(".npy"))} for m, p in rows])
        return
    table(
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


def report(run: str, *, data: str | None = None, out: Path | None = None) -> None:
    """Make one page of a run that opens anywhere: curves, confusions, calibration, mistakes, network, data.

    Parameters
    ----------
    run
        A run directory, or the model.safetensors in it.
    data
        Where the run's data lies now, if not where it lay.
    out
        The page; by default report.html in the run directory. The mistakes go beside it: errors.csv, or NAME-errors.csv
        for a page of another name.
    """
    from resnetlab import api
    from resnetlab.console import Terminal

    opened = api.load(run)
    with Terminal() as terminal:
        page = opened.report(out, data=data, display=terminal)
        terminal.line(f"report {page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")


def compare(*runs: str, data: str | None = None, out: Path = Path("compare.html"), json: Json = False) -> None:
    """Compare runs on the same test images: scores with intervals, costs, McNemar's test, what changed.

    Parameters
    ----------
    runs
        Run directories, or bundles.
    data
        Data in place of their own. It is divided as each run divided its own, and its test split is scored (without
        one, validation); images in one piece are not scored whole.
    out
        The page (not with --json).
    """
    from resnetlab import api
    from resnetlab.console import Terminal

    if json:
        print_json(api.compare(runs, data=data).to_dict())
        return
    with Terminal() as terminal:
        found = api.compare(runs, out, data=data, display=terminal)
    show_comparison(found)
    line(f"page  {out}")


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
