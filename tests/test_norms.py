"""Batch norm, shortcut and activation in one against PyTorch's, one after the other."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnetlab import models, norms
from resnetlab.config import ModelConfig
from resnetlab.native import functions
from resnetlab.norms import norm_act

NHWC = torch.channels_last
ERROR = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Of all values together, relative to their norm; in bf16 that of rounding the results."""
PRECISIONS = [
    pytest.param(dtype, marks=pytest.mark.skipif(missing, reason=f"no compiled functions for {dtype}"))
    for dtype in ERROR
    for missing in [not functions.offers("norm_forward_relu", functions.NAMES[dtype])]
]
precisions = pytest.mark.parametrize("dtype", PRECISIONS)


def images(dtype: torch.dtype, *shape: int, mean: float = 3.0) -> Tensor:
    return (2 * torch.randn(*shape) + mean).to(dtype).contiguous(memory_format=NHWC)


def prepared(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=0.4, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def in_one(norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether it is computed in one: then a single function lies between input and output."""
    return "NormAct" in str(norm_act(copy.deepcopy(norm), act, x.detach().requires_grad_(), shortcut).grad_fn)


def passes(norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor | None, slope: Tensor) -> list[Tensor]:
    """Return the output, all gradients, and the running statistics."""
    inputs = [x.clone().requires_grad_()] + ([] if shortcut is None else [shortcut.clone().requires_grad_()])
    out = norm_act(norm, act, *inputs)
    gradients = torch.autograd.grad(out, [*inputs, *norm.parameters()], slope.to(out))
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    return [out.detach(), *gradients, norm.running_mean, norm.running_var]


@precisions
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("summed", [True, False], ids=["shortcut", "alone"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.ReLU(inplace=True)], ids=["gelu", "relu", "relu in place"])
def test_results_gradients_and_statistics_are_those_of_the_parts(
    act: nn.Module, summed: bool, affine: bool, threads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ours, x = prepared(48, affine), images(dtype, 6, 48, 15, 17)
    exact = copy.deepcopy(ours).double()
    norms.adopt(ours)
    shortcut = images(dtype, 6, 48, 15, 17, mean=0) if summed else None
    assert in_one(ours, act, x, shortcut)
    slope, before = torch.randn(x.shape), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = passes(ours, act, x, shortcut, slope)
    finally:
        torch.set_num_threads(before)
    expected = passes(exact, act, x.double(), None if shortcut is None else shortcut.double(), slope)
    assert found[0].dtype is dtype and found[0].is_contiguous(memory_format=NHWC)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < ERROR[dtype]
    assert ours.num_batches_tracked == exact.num_batches_tracked == 1


@precisions
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("summed", [True, False], ids=["shortcut", "alone"])
@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU()], ids=["gelu", "relu"])
def test_evaluation_without_gradients_gives_what_the_parts_give(
    act: nn.Module, summed: bool, affine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ours, x = prepared(48, affine).eval(), images(dtype, 6, 48, 15, 17)
    assert ours.running_mean is not None and ours.running_var is not None
    nn.init.normal_(ours.running_mean)
    nn.init.uniform_(ours.running_var, 0.5, 2)
    exact = copy.deepcopy(ours).double()
    norms.adopt(ours)
    shortcut = images(dtype, 6, 48, 15, 17, mean=0) if summed else None
    called: list[str] = []
    before = functions.call

    def noted(function: str, *arguments: Any) -> Any:
        called.append(function)
        return before(function, *arguments)

    monkeypatch.setattr(functions, "call", noted)
    with torch.inference_mode():
        found = norm_act(ours, act, x, shortcut)
    assert any(name.startswith("norm_evaluate_") for name in called)
    assert found.dtype is dtype and found.is_contiguous(memory_format=NHWC)
    expected = norm_act(exact, act, x.double(), None if shortcut is None else shortcut.double()).detach()
    assert float((found - expected).norm() / expected.norm()) < ERROR[dtype]
    assert ours.num_batches_tracked == 0
    with_gradients = norm_act(ours, act, x, shortcut).detach()
    assert float((with_gradients - found).norm() / found.norm()) < 2 * ERROR[dtype]


@precisions
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = prepared(32), images(dtype, 9, 32, 11, 13)
    norms.adopt(norm)
    slope, before, found = torch.randn(x.shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(passes(copy.deepcopy(norm), nn.GELU(), x, x, slope))
            with torch.no_grad():
                found[-1].append(norm_act(copy.deepcopy(norm).eval(), nn.GELU(), x, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@precisions
def test_a_variance_small_beside_the_mean_survives(dtype: torch.dtype) -> None:
    norm = prepared(16, affine=False)
    norms.adopt(norm)
    x = (
        (1000 + 8 * (torch.arange(64) % 2))
        .to(dtype)
        .view(4, 1, 4, 4)
        .expand(4, 16, 4, 4)
        .contiguous(memory_format=NHWC)
    )
    out = norm_act(norm, nn.ReLU(), x)
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 1], abs=1e-4)


@precisions
def test_nan_and_infinity_reach_the_output(dtype: torch.dtype) -> None:
    for act in (nn.GELU(), nn.ReLU()):
        for value in (float("nan"), float("inf")):
            norm, x = prepared(16), images(dtype, 2, 16, 3, 3)
            norms.adopt(norm)
            x[1, 5, 2, 1] = value
            out = norm_act(norm, act, x)
            assert out[:, 5].isnan().any() and not out[:, :5].isnan().any()


@precisions
def test_a_nan_hands_its_gradient_on_as_in_pytorch(dtype: torch.dtype) -> None:
    for act in (nn.GELU(), nn.ReLU()):
        norm, x, shortcut = prepared(16), images(dtype, 2, 16, 3, 3), images(dtype, 2, 16, 3, 3)
        shortcut[1, 5, 2, 1] = torch.nan
        shortcut.requires_grad_()
        (plain,) = torch.autograd.grad(norm_act(copy.deepcopy(norm), act, x, shortcut).sum(), shortcut)
        norms.adopt(norm)
        (ours,) = torch.autograd.grad(norm_act(norm, act, x, shortcut).sum(), shortcut)
        torch.testing.assert_close(ours[1, 5, 2, 1], plain[1, 5, 2, 1], equal_nan=True)


def test_extreme_values_of_the_activation() -> None:
    if not functions.offers("norm_forward_gelu", "fp32"):
        pytest.skip("no compiled functions")
    torch.manual_seed(0)
    norm, shift = prepared(16, affine=False), torch.linspace(-60, 60, 2 * 16 * 50 * 50).view(2, 16, 50, 50)
    norms.adopt(norm)
    shift = shift.contiguous(memory_format=NHWC).requires_grad_()
    x = torch.randn(2, 16, 50, 50).contiguous(memory_format=NHWC)
    normed = copy.deepcopy(norm).double()(x.double()) + shift.double()
    out = norm_act(norm, nn.GELU(), x, shift)
    torch.testing.assert_close(out.double(), nn.functional.gelu(normed), atol=2e-6, rtol=1e-6)
    slopes = (torch.autograd.grad(y.sum(), shift)[0] for y in (out, nn.functional.gelu(normed)))
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-6)


def test_what_does_not_suit_is_pytorchs() -> None:
    norm, x = prepared(16), images(torch.float32, 4, 16, 5, 5)
    assert not in_one(norm, nn.ReLU(), x), "it was not adopted"
    norms.adopt(norm)
    hooked, still = copy.deepcopy(norm), copy.deepcopy(norm)
    hooked.register_forward_hook(lambda *given: None)
    cases: list[tuple[nn.Module, nn.Module, Tensor, Tensor | None]] = [
        (hooked, nn.ReLU(), x, None),
        (still.eval(), nn.ReLU(), x, None),
        (copy.deepcopy(norm).bfloat16(), nn.ReLU(), x.bfloat16(), None),
        (norm, nn.SiLU(), x, None),
        (norm, nn.GELU("tanh"), x, None),
        (norm, nn.ReLU(), x.contiguous(), None),
        (norm, nn.ReLU(), x, x.double()),
        (norm, nn.ReLU(), x, x[:1]),
        (copy.deepcopy(norm).to("meta"), nn.ReLU(), x.to("meta"), None),
        (nn.Identity(), nn.ReLU(), x, x),
    ]
    for module, act, given, shortcut in cases:
        assert not in_one(module, act, given, shortcut)
    with functions.plain():
        assert not in_one(norm, nn.ReLU(), x)
    leaf = x.clone().requires_grad_()
    out = norm_act(copy.deepcopy(norm), nn.ReLU(), leaf)
    with functions.plain():
        torch.autograd.grad(out.sum(), leaf)  # begun in one, it ends so
    odd = prepared(12)
    norms.adopt(odd)
    assert not in_one(odd, nn.ReLU(), images(torch.float32, 4, 12, 5, 5))
    with pytest.raises((RuntimeError, NotImplementedError)):  # statistics that lie on another device
        norm_act(copy.deepcopy(norm).to("meta"), nn.ReLU(), x)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm_act(norm, nn.ReLU(), x[:1, :, :1, :1])


@precisions
@pytest.mark.parametrize("name", ["resnet20", "preresnet20", "resnet18", "fast-small"])
def test_a_network_trains_as_it_did(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name, num_classes=4, image_size=16)).to(memory_format=NHWC)
    x, labels = images(torch.float32, 16, 3, 16, 16), torch.arange(16) % 4

    def losses(network: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        found = []
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = nn.functional.cross_entropy(network(x).float(), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    theirs = losses(copy.deepcopy(model))
    norms.adopt(model)
    used: list[Any] = []
    before = norms._NormAct.apply

    def counted(*given: Any) -> Any:
        used.append(given)
        return before(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms._NormAct, "apply", counted)
        ours = losses(model)
    assert len(used) >= 4 * 6
    assert ours == pytest.approx(
        theirs, rel=2e-3 if dtype is torch.float32 else 0.05
    )  # batch norm makes much of rounding
