"""Gradients of convolutions that stride over one pixel's width, beside those in double precision."""

import copy

import pytest
import torch
from torch import nn

from resnetlab import models, narrow
from resnetlab.config import ModelConfig
from resnetlab.runtime import Precision, Runtime

CPU = torch.device("cpu")


def litter(values: int) -> None:
    """Leave NaN where the next tensors of about this size will lie."""
    for size in (values, 2 * values, values // 2):
        torch.full((size,), torch.nan)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [2, 3, 7])
@pytest.mark.parametrize("height", [1, 2, 3, 8])
@pytest.mark.parametrize(("stride", "width"), [(2, 1), (3, 2)])
def test_gradients_in_bf16_are_those_of_the_convolution(
    stride: int, width: int, height: int, kernel: int, groups: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 48, kernel, stride, kernel // 2, groups=groups).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(conv).double()
    narrow.adopt(conv)
    x = torch.randn(64, 64, height, width).bfloat16().requires_grad_()
    for _ in range(3):
        conv.zero_grad()
        x.grad = None
        litter(conv.weight.numel())
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        assert out.dtype is torch.bfloat16
        slope = torch.randn(out.shape)
        out.backward(slope.bfloat16())
        doubled = x.detach().double().requires_grad_()
        exact.zero_grad()
        exact(doubled).backward(slope.bfloat16().double())
        for ours, theirs in ((x, doubled), *zip(conv.parameters(), exact.parameters(), strict=True)):
            assert ours.grad is not None and theirs.grad is not None
            assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.01


def test_only_what_strides_is_changed_and_only_there() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=2)])
    plain = copy.deepcopy(model[0])
    narrow.adopt(model)
    assert [type(module) for module in model] == [narrow.NarrowConv2d, nn.Conv2d, nn.Conv2d]
    for width, autocast in ((2, True), (1, False)):
        x = torch.randn(4, 8, 5, width)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(model[0](x), plain(x))


def test_a_network_for_photographs_learns_from_thumbnails() -> None:
    """Stage 4 reads 16 px as one."""
    precision = Precision("bf16", CPU)
    torch.manual_seed(0)
    model = models.build(ModelConfig(name="resnet18", num_classes=10, image_size=16, stem="imagenet"))
    Runtime(device=CPU, precision=precision).place(model)
    images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 10
    for _ in range(3):
        litter(model.get_submodule("layer4.0.conv1").weight.numel())  # type: ignore[operator]
        with precision.autocast():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        assert max(norms) < 100
        model.zero_grad()
