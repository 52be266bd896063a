"""Labels that are perhaps wrong, by confident learning (Northcutt et al. 2021), through cleanlab."""

import contextlib
import io
import logging
import warnings

import numpy as np

from resnetlab import analysis
from resnetlab.metrics import Predictions
from resnetlab.report.records import Suspect

HINT = 'Install cleanlab to look for labels that are perhaps wrong: pip install "resnetlab[report]"'
TRUSTED = 0.8
"""Accuracy below which the page warns of what a network says of labels."""
FEWEST = 5
"""Images of a class below which nothing can be said of it."""


def suspects(predictions: Predictions | None) -> tuple[tuple[Suspect, ...], str]:
    """Return the images whose labels the network contradicts most, most suspect first, and a sentence for the reader.

    The network must not have been trained on them.
    """
    if predictions is None or predictions.labels is None:
        return (), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cleanlab.filter import find_label_issues
    except ImportError:
        return (), HINT
    present, labels = np.unique(predictions.labels, return_inverse=True)
    if len(present) < 2 or np.bincount(labels).min() < FEWEST:
        return (), f"Not looked for: that needs two classes, and {FEWEST} images of each."
    probabilities = predictions.probabilities().astype(np.float64)[:, present]
    probabilities /= np.maximum(probabilities.sum(axis=1, keepdims=True), 1e-300)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("cleanlab").setLevel(logging.ERROR)
        ranked = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    called, plain = analysis.called(predictions), predictions.probabilities()
    found = tuple(
        Suspect(index=int(i), suggested=int(called[i]), confidence=float(plain[i, predictions.labels[i]]))
        for i in ranked
    )
    if not found:
        return (), "cleanlab finds no label that the network contradicts strongly."
    accuracy = float((called == predictions.labels).mean())
    weak = (
        f" With an accuracy of {accuracy:.0%} it is wrong more often than most labels are."
        if accuracy < TRUSTED
        else ""
    )
    return found, (
        f"cleanlab suspects {len(found):,} of {len(predictions.names):,} labels, the most suspect first. It goes by "
        f"this network alone: look before you correct.{weak}"
    )
