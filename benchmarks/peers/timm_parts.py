"""timm's train script as far as its package goes, which lacks the script: its data set, loader and optimiser.

They are `create_dataset`, `create_loader` (its augmentation) and `create_optimizer_v2`; the loop is the script's with
--channels-last.
"""

from typing import Any

from peers.common import MEAN, STD, Row, main
from peers.loop import Style, rates


def optimizer(model: Any) -> Any:
    """Return the script's default: SGD with Nesterov momentum, no decay on norms and biases."""
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)


def loader(row: Row) -> Any:
    """Return the script's training loader."""
    import torch
    from timm.data import create_dataset, create_loader

    data = create_dataset("", root=str(row.data), split="train")
    return create_loader(
        data,
        input_size=(3, row.size, row.size),
        batch_size=row.batch,
        is_training=True,
        mean=MEAN,
        std=STD,
        num_workers=1,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )


if __name__ == "__main__":
    main(lambda row: rates(row, Style(channels_last=True, optimizer=optimizer, loader=loader)))
