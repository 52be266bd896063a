"""The plain PyTorch training loop that several peers differ from in a line or two."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peers.common import Row, batch_of, epoch_rate, network, peak, pictures, rate


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the loop is written."""

    bf16: bool = False
    channels_last: bool = False
    read_every_step: bool = False
    """Fetch the loss and count the hits after every batch."""
    workers: int = 0
    optimizer: Callable[[Any], Any] | None = None
    """None: SGD with momentum and weight decay."""
    loader: Callable[[Row], Any] | None = None
    """None: torchvision's ImageFolder and PyTorch's DataLoader."""


def rates(row: Row, style: Style) -> dict[str, float]:
    """Measure a training step, an epoch with its data, and inference."""
    import torch

    layout = torch.channels_last if style.channels_last else torch.contiguous_format
    model = network(row).to(memory_format=layout)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    optimizer = style.optimizer(model) if style.optimizer else sgd
    criterion = torch.nn.CrossEntropyLoss()
    read = [0.0, 0.0]

    def step(images: Any, labels: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=style.bf16):
            outputs = model(images.to(memory_format=layout))
            loss = criterion(outputs.float(), labels)
        loss.backward()
        optimizer.step()
        if style.read_every_step:
            read[0] += loss.item()
            read[1] += int((outputs.argmax(1) == labels).sum())

    def epoch() -> None:
        for images, labels in loader:
            step(images, labels)

    @torch.inference_mode()
    def infer() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=style.bf16):
            model(images.to(memory_format=layout))

    loader = style.loader(row) if style.loader else _loader(row, style.workers)
    images, labels = batch_of(row)
    model.train()
    found = {"step": rate(lambda: step(images, labels), row.batch, row.tries)}
    found |= {"epoch": epoch_rate(epoch, len(loader) * row.batch), "peak": peak()}
    model.eval()
    return {**found, "inference": rate(infer, row.batch, row.tries)}


def _loader(row: Row, workers: int) -> Any:
    import torch

    data = pictures(row)
    return torch.utils.data.DataLoader(data, row.batch, shuffle=True, drop_last=True, num_workers=workers)
