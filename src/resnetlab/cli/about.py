"""`models`, `recipes`, `data` and `doctor`: what there is to work with."""

from pathlib import Path
from typing import Any

from resnetlab.cli.output import Json, cell, line, print_json, table
from resnetlab.cli.tables import show_survey


def models(*, json: Json = False) -> None:
    """List the networks: parameters, multiply-adds and layers, at the size and classes that each was designed for."""
    from dataclasses import asdict

    from resnetlab import catalogue

    def count() -> list[catalogue.Description]:
        from resnetlab import models as networks

        return networks.rows()

    rows = catalogue.rows(count)
    if json:
        print_json([asdict(row) for row in rows])
        return
    table(
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


def recipes() -> None:
    """List the recipes, and every key that can be set with key=value."""
    from resnetlab.config import Recipe, fields, flat
    from resnetlab.recipes import RECIPES, Facts

    for name, function in RECIPES.items():
        line(f"{name}: {(function.__doc__ or '').splitlines()[0]}")
    facts = Facts(images=50_000, size=32, mirrors=True)
    columns = {name: flat(function(facts)) for name, function in RECIPES.items()}
    table(
        "keys, with each recipe's values for CIFAR-10 on a CPU",
        ("key", *columns),
        [(key, *(cell(values[key]) for values in columns.values())) for key, _ in fields(Recipe)],
    )


def data(data: str = "digits", *, out: Path = Path("contact-sheet.png"), json: Json = False) -> None:
    """Describe a data set: classes, counts, sizes, channel statistics, a contact sheet, and what is wrong with it.

    Parameters
    ----------
    data
        What `train` accepts.
    out
        Where the contact sheet is written (not with --json).
    """
    from dataclasses import replace

    from resnetlab import sources
    from resnetlab.console import Terminal

    try:
        dataset = sources.load(data, skip_broken=True)
    except sources.TooFew as error:
        dataset = sources.load(data, skip_broken=True, hold_out_test=False)
        dataset = replace(dataset, notes=(*dataset.notes, str(error)))
    if json:
        print_json(sources.survey(dataset).to_dict())
        return
    with Terminal() as terminal:
        found = sources.survey(dataset, progress=lambda done, total: terminal.reading("looking", done, total))
    show_survey(found, dataset, out)


def doctor(*, json: Json = False) -> None:
    """Show what a run would run on: versions, device, precision, threads, memory, and where data is looked for."""
    import platform

    import torch

    from resnetlab import runtime, sources
    from resnetlab.threads import cores

    found = runtime.setup()
    facts: dict[str, Any] = {
        **runtime.versions(),
        "system": platform.platform(),
        "device": str(found.device),
        "machine": runtime.machine(found.device),
        "precision": found.precision.name,
        "cpu_bf16": runtime.cpu_has_bf16(),
        "convolutions": found.convolutions,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "memory_bytes": runtime.total_memory(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "data_places": [str(place) for place in sources.places()],
    }
    if json:
        print_json(facts)
    else:
        table("doctor", ("what", "value"), [(k, cell(v)) for k, v in facts.items()])
