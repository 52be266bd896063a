"""Lightning's Trainer over the plain loop: torchvision's ImageFolder, DataLoader, fp32."""

import warnings
from typing import Any

from peers.common import Row, batch_of, clock, main, network, peak, pictures, rate, step_rate


def rates(row: Row) -> dict[str, float]:
    """Measure an epoch of `Trainer.fit`, its steps without the data, and inference."""
    import lightning
    import torch

    warnings.filterwarnings("ignore")

    class Clock(lightning.Callback):
        """Times steps and the epoch."""

        def __init__(self) -> None:
            self.steps: list[float] = []
            self.epoch = self.begun = 0.0

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.epoch = clock()

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            self.begun = clock()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.steps.append(clock() - self.begun)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.epoch = clock() - self.epoch

    class Module(lightning.LightningModule):
        """The network with its loss and optimiser."""

        def __init__(self) -> None:
            super().__init__()
            self.model = network(row)

        def training_step(self, batch: Any, index: int) -> Any:
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    loader = torch.utils.data.DataLoader(pictures(row), row.batch, shuffle=True, drop_last=True)
    watch, module = Clock(), Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[watch], **quiet).fit(module, loader)
    found = {"step": step_rate(watch.steps, row.batch), "peak": peak()}
    images, _ = batch_of(row)
    model = module.model.eval()
    with torch.inference_mode():
        inference = rate(lambda: model(images), row.batch, row.tries)
    return {**found, "epoch": len(loader) * row.batch / watch.epoch, "inference": inference}


if __name__ == "__main__":
    main(rates)
