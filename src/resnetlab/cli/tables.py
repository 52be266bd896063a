"""What commands print for people, from the records that they got."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnetlab.cli.output import cell, line, table

if TYPE_CHECKING:
    from resnetlab.metrics import Scorecard


def show_score(title: str, result: "Scorecard") -> None:
    """Print a score, whole and by class."""
    low, high = result.top1_interval
    table(
        f"{title}: n = {result.n:,}",
        ("measure", "value"),
        [
            ("top-1", f"{result.top1:.2%}"),
            ("its 95 % interval", f"{low:.2%} to {high:.2%}"),
            ("top-5", f"{result.top5:.2%}"),
            ("loss", f"{result.loss:.4f}"),
            ("balanced accuracy", f"{result.balanced_accuracy:.2%}"),
            ("macro F1", f"{result.macro_f1:.4f}"),
            ("calibration error", f"{result.calibration_error:.4f}"),
        ],
    )
    table(
        "by class",
        ("class", "images", "precision", "recall", "F1"),
        [(c.name, f"{c.n:,}", f"{c.precision:.2%}", f"{c.recall:.2%}", f"{c.f1:.4f}") for c in result.per_class],
    )


def show_comparison(found: Any) -> None:
    """Print the tables of a comparison."""
    from resnetlab.report import comparison
    from resnetlab.report.html import duration, quantity

    rows = [(one, one.run.score) for _, one in comparison.ranked(found) if one.run.score]
    table(
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
        line(comparison.verdict(found, duel))
    changed = [(key, *(cell(value) for value in values)) for key, values in found.changed.items()]
    if changed:
        table("what changed", ("setting", *(one.name for one in found.runs)), changed)
    else:
        line("The recipes are the same.")


def show_survey(found: Any, dataset: Any, out: Path) -> None:
    """Print what `data` found, and write the contact sheet."""
    from resnetlab import report, sources

    line(f"{found.name} ({found.origin}): {len(found.classes)} classes, {found.channels} channels")
    for note in found.notes:
        line(f"note: {note}")
    size = "{0[0]}×{0[1]}".format
    table(
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
    table(
        "images by class",
        ("class", *(s.name for s in found.splits)),
        [(name, *(f"{s.per_class[i]:,}" for s in found.splits)) for i, name in enumerate(found.classes)],
    )
    mean, std = (" ".join(f"{v:.4f}" for v in values) for values in (found.statistics.mean, found.statistics.std))
    line(f"training pixels in [0, 1]: mean {mean}, std {std}")
    line(f"{len(found.problems)} problems found" + (":" if found.problems else "."))
    for problem in found.problems:
        line(f"  {problem}")
    shown = [(name, image) for name, images in sources.samples(dataset, 10).items() for image in images][:400]
    sheet = report.contact_sheet([image for _, image in shown], [name for name, _ in shown], f"{found.name}: train")
    report.save(sheet, out)
    line(f"contact sheet: {out}")
