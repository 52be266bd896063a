"""Every mistake of a run as a table for other programs, beside its page."""

import csv
import io
from pathlib import Path

from resnetlab import analysis
from resnetlab.files import write_atomic
from resnetlab.metrics import Predictions, cross_entropy

COLUMNS = ("file", "true", "predicted", "probability", "loss")


def write_errors(predictions: Predictions, path: Path) -> Path:
    """Write the images that are called wrongly, highest loss first: what they are, and what they were called.

    Raises:
        ResNetLabError: The disk is full or the directory cannot be written.
    """
    labels, called = analysis.truth(predictions), analysis.called(predictions)
    losses, probabilities = cross_entropy(predictions.logits, labels), predictions.probabilities()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for i in analysis.mistakes(predictions).tolist():
        true, said = predictions.classes[labels[i]], predictions.classes[called[i]]
        rows.writerow([predictions.names[i], true, said, f"{probabilities[i, called[i]]:.6f}", f"{losses[i]:.6f}"])
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
    return path
