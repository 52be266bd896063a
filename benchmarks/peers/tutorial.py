"""The tutorial's loop, from its description: Adam as it comes, the loss and the hits read after every batch."""

from typing import Any

from peers.common import Row, main
from peers.loop import Style, rates


def adam(model: Any) -> Any:
    """Return Adam with its defaults."""
    import torch

    return torch.optim.Adam(model.parameters())


def loader(row: Row) -> Any:
    """Return its loader: ToTensor, Normalize with 0.5, then Resize of the tensor; no augmentation, no workers."""
    import torch
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    steps += [transforms.Resize((row.size, row.size), antialias=True)]
    pictures = datasets.ImageFolder(str(row.data / "train"), transforms.Compose(steps))
    return torch.utils.data.DataLoader(pictures, batch_size=row.batch, shuffle=True, drop_last=True)


if __name__ == "__main__":
    main(lambda row: rates(row, Style(read_every_step=True, optimizer=adam, loader=loader)))
