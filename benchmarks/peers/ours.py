"""ResNetLab as a user runs it: the recipe `paper` (SGD, crops, mirroring) on the folder, every choice left at auto.

Its step has the data in it: it is read from the running loop. Reading the folder (once, before the first epoch) is
apart, as ``prepare`` in seconds.
"""

import statistics
import time

from peers.common import Row, batch_of, main, peak, rate


def rates(row: Row) -> dict[str, float]:
    """Measure reading the data, a training step, an epoch, and inference."""
    from resnetlab import predict, session, training
    from resnetlab.console import Quiet
    from resnetlab.training import EpochEnd

    settings = [f"batch_size={row.batch}", f"data.size={row.size}", "epochs=2", "data.val=0", "data.drop_last=true"]
    begun = time.perf_counter()
    plan = session.plan(str(row.data), row.network, "paper", settings, Quiet())
    prepare = time.perf_counter() - begun
    state = training.start(plan.recipe, plan.prepared, plan.runtime)
    steps, epochs, begun = [], [], time.perf_counter()
    for event in training.run(state):
        if isinstance(event, EpochEnd):
            epochs.append(event.timing.images_per_second)
        else:
            steps.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    found = {"step": row.batch / statistics.median(steps[1:]), "epoch": epochs[-1], "peak": peak(), "prepare": prepare}
    images = batch_of(row)[0].contiguous(memory_format=_channels_last())
    work = rate(lambda: predict.logits(state.model, [images], plan.runtime), row.batch, row.tries)
    return {**found, "inference": work}


def _channels_last() -> object:
    import torch

    return torch.channels_last


if __name__ == "__main__":
    main(rates)
