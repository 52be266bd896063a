"""ResNetLab as a user runs it: the recipe `paper` (SGD, crops, mirroring) on the folder, every choice left at auto.

How threads wait is what the command chooses; the peers' wait as PyTorch's do.

Its step has the data in it: it is read from the running loop. Its epoch is the second: the folder is read and its
pictures decoded once, before the first, and kept where they fit in memory. ``prepare`` is the seconds of that, and
``read`` images a second of that epoch and the reading together, as the peers read in every epoch; ``spins`` is what the
command has chosen, 0 where another program wanted a core.
"""

import os
import statistics

from peers.common import Row, batch_of, clock, main, peak, rate


def rates(row: Row) -> dict[str, float]:
    """Measure reading the data, a training step, an epoch, and inference."""
    from resnetlab import threads

    threads.choose_waiting()  # before torch is loaded
    from resnetlab import predict, session, training
    from resnetlab.console import Quiet
    from resnetlab.training import EpochEnd

    settings = [f"batch_size={row.batch}", f"data.size={row.size}", "epochs=2", "data.val=0", "data.drop_last=true"]
    begun = clock()
    plan = session.plan(str(row.data), row.network, "paper", settings, Quiet())
    prepare = clock() - begun
    state = training.start(plan.recipe, plan.prepared, plan.runtime)
    steps: list[float] = []
    begun = clock()
    ends = [begun]
    for event in training.run(state):
        if isinstance(event, EpochEnd):
            ends.append(clock())
        else:
            steps.append(clock() - begun)
        begun = clock()
    images, second = row.batch * state.loader.steps, ends[2] - ends[1]
    found = {"step": row.batch / statistics.median(steps[state.loader.steps :]), "epoch": images / second}
    found |= {"read": images / (prepare + second), "prepare": prepare, "peak": peak()}
    found |= {"spins": float(os.environ.get(threads.SPINS, 0))}
    batch = batch_of(row)[0].contiguous(memory_format=_channels_last())
    work = rate(lambda: predict.logits(state.model, [batch], plan.runtime), row.batch, row.tries)
    return {**found, "inference": work}


def _channels_last() -> object:
    import torch

    return torch.channels_last


if __name__ == "__main__":
    main(rates)
