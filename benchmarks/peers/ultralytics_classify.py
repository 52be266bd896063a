"""Ultralytics' classification trainer with our network instead of its own: its data, augmentation, loop, average."""

import os
import tempfile
from typing import Any

from peers.common import CLASSES, Row, batch_of, clock, main, network, peak, rate, step_rate

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
os.environ.setdefault("YOLO_OFFLINE", "true")


def rates(row: Row) -> dict[str, float]:
    """Measure an epoch of its trainer, its steps without the data, and inference."""
    import torch
    from ultralytics import SETTINGS
    from ultralytics.models.yolo.classify import ClassificationTrainer
    from ultralytics.nn.tasks import ClassificationModel

    SETTINGS.update(mlflow=False, tensorboard=False)  # they may be installed, and would be reported to
    model = network(row)

    class Trainer(ClassificationTrainer):
        """Their trainer; only the network is ours."""

        def setup_model(self) -> None:
            self.model = ClassificationModel("yolov8n-cls.yaml", nc=CLASSES, verbose=False)
            model.f, model.i, model.type, model.np = -1, 0, "resnet", sum(p.numel() for p in model.parameters())
            self.model.model, self.model.save = torch.nn.Sequential(model), []
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)

    with tempfile.TemporaryDirectory() as folder:
        options = {"data": str(row.data), "epochs": 1, "imgsz": row.size, "batch": row.batch, "device": "cpu"}
        options |= {
            "model": "yolov8n-cls.yaml",
            "workers": 0,
            "project": folder,
            "optimizer": "SGD",
            "val": False,
            "save": False,
            "plots": False,
        }
        trainer = Trainer(overrides={**options, "verbose": False, "amp": False, "exist_ok": True, "warmup_epochs": 0})
        steps: list[float] = []
        marks = {"step": 0.0, "epoch": 0.0, "end": 0.0}
        trainer.add_callback("on_train_epoch_start", lambda t: marks.update(epoch=clock()))
        trainer.add_callback("on_train_epoch_end", lambda t: marks.update(end=clock()))
        trainer.add_callback("on_train_batch_start", lambda t: marks.update(step=clock()))
        trainer.add_callback("on_train_batch_end", lambda t: steps.append(clock() - marks["step"]))
        trainer.validate = trainer.final_eval = lambda *_: ({}, 0.0)
        trainer.train()
    found = {"step": step_rate(steps, row.batch), "peak": peak()}
    found["epoch"] = row.images / (marks["end"] - marks["epoch"])
    return {**found, "inference": _inference(model.eval(), row)}


def _inference(model: Any, row: Row) -> float:
    import torch

    images, _ = batch_of(row)
    with torch.inference_mode():
        return rate(lambda: model(images), row.batch, row.tries)


if __name__ == "__main__":
    main(rates)
