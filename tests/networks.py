"""Networks as several test modules want them."""

from typing import Any

from torch import nn

from resnetlab.models import create_model
from resnetlab.models.complexity import ShapesOnly
from resnetlab.models.resnet import ResNet


def hollow(name: str, **fields: Any) -> ResNet:
    """Build a network whose tensors have shapes and no content."""
    with ShapesOnly():
        model = create_model(name, **fields)
    assert isinstance(model, ResNet)
    return model


def randomise(model: nn.Module) -> None:
    """Give every batch norm statistics and weights of its own; convolutions keep their scale."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
