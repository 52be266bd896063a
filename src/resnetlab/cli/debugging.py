"""`replay`: the batch on which a run diverged, layer by layer."""

import math
from typing import TYPE_CHECKING, Literal

from resnetlab.cli.output import Json, line, print_json, table

if TYPE_CHECKING:
    from resnetlab.divergence import LayerTrace


def replay(run: str, *, precision: Literal["fp32", "bf16", "fp16"] | None = None, json: Json = False) -> None:
    """Compute the batch on which a run diverged once more, and show what every layer does with it.

    `resnetlab train --debug-batch` keeps the batch; so does `resnetlab train --resume RUN --debug-batch` of a run that
    has diverged already: it does so again.

    Parameters
    ----------
    run
        The run directory.
    precision
        Of the arithmetic; by default the run's own. With fp32 it shows whether the precision was to blame.
    """
    from resnetlab import api

    found = api.replay(run, precision=precision)
    if json:
        print_json({**vars(found), "found": vars(found.found), "layers": [vars(layer) for layer in found.layers]})
        return
    line(str(found.found))
    table(
        f"once more, in {found.precision}: loss {found.loss:g}",
        ("layer", "largest output", "NaN or infinite", "norm of the gradient"),
        [_row(layer) for layer in found.layers],
    )


def _row(layer: "LayerTrace") -> tuple[str, ...]:
    gradient = "-" if layer.gradient is None else f"{layer.gradient:.3g}"
    bad = f"{layer.not_finite:,}" if layer.not_finite else "-"
    return layer.layer, f"{layer.largest:.4g}" if not math.isnan(layer.largest) else "nan", bad, gradient
