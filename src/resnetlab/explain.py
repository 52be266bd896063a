"""Where in an image a network saw its evidence for a class. One function a method, all alike, listed in `METHODS`.

The caller's network is never touched: every method works on a twin that shares its weights and nothing else, so that
modes, hooks, gradients and flags stay as they are whatever happens, also while others predict with it.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.bundle import Bundle
from resnetlab.errors import ResNetLabError, UsageError, unknown
from resnetlab.metrics import Heatmap
from resnetlab.models import Ensemble
from resnetlab.models.fast import FastResNet
from resnetlab.models.resnet import ResNet
from resnetlab.preprocess import to_tensor
from resnetlab.runtime import Runtime

Method = Callable[[nn.Module, Tensor, Tensor, str | None], Tensor]
"""``(model, images (B, C, H, W) float32, targets (B,) int64, stage) -> heatmaps (B, H, W) float32 in [0, 1]``.

The largest value of a map is 1, unless it is 0 everywhere: then nothing speaks for the class. ``stage`` None is the
last stage. Raises UsageError where the network has no such stage, or the method looks at none.
"""

STEPS = 32
"""Points on the way from the mean colour to the image, of integrated gradients."""
WINDOWS = 5
"""Occlusion's window is one fifth of the image's side, and moves by half of itself."""
AT_ONCE = 64
"""Images in one pass of the methods that look at many variants of an image."""


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor, stage: str | None) -> Tensor:
    """Weight a stage's feature maps by their mean gradient, and keep what is positive (Selvaraju et al. 2017)."""
    methods = _need("torchcam.methods", "grad-cam")

    def compute(network: nn.Module, name: str, x: Tensor, classes: list[int]) -> Tensor:
        with methods.GradCAM(network, name) as cam:
            scores = network(x.requires_grad_())
            return _only(cam(classes, scores, normalized=False))

    return _class_activation(compute, model, images, targets, stage)


def score_cam(model: nn.Module, images: Tensor, targets: Tensor, stage: str | None) -> Tensor:
    """Weight each feature map by the score of the image seen through it alone (Wang et al. 2020).

    No gradients, but a forward pass for every channel of the stage: 2,048 of them an image for ResNet-50's last.
    """
    methods = _need("torchcam.methods", "score-cam")

    def compute(network: nn.Module, name: str, x: Tensor, classes: list[int]) -> Tensor:
        with torch.no_grad(), methods.ScoreCAM(network, name, batch_size=AT_ONCE) as cam:
            network(x)
            return _only(cam(classes, normalized=False))

    return _class_activation(compute, model, images, targets, stage)


def eigen_cam(model: nn.Module, images: Tensor, targets: Tensor, stage: str | None) -> Tensor:
    """Project a stage's feature maps onto their first principal direction (Muhammad and Yeasin 2020).

    It shows what the stage responds to most, whatever the class: the targets make no difference. torchcam has no
    Eigen-CAM; it is one singular value decomposition.
    """

    def compute(network: nn.Module, name: str, x: Tensor, classes: list[int]) -> Tensor:
        seen: list[Tensor] = []
        hook = network.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            with torch.no_grad():
                network(x)
        finally:
            hook.remove()
        features = seen[0].float()
        flat = features.flatten(2).transpose(1, 2)  # (B, h · w, C)
        first = torch.linalg.svd(flat, full_matrices=False).Vh[:, 0]  # (B, C)
        # Behind a ReLU its entries have one sign (Perron and Frobenius), but which one is left to chance.
        return torch.einsum("bpc,bc->bp", flat, first).abs().view(len(x), *features.shape[2:])

    return _class_activation(compute, model, images, targets, stage)


def occlusion(model: nn.Module, images: Tensor, targets: Tensor, stage: str | None) -> Tensor:
    """Hide a window of the image behind the mean colour, and see how far the class's logit falls (Zeiler, Fergus 2014).

    The window has a fifth of the image's side and moves by half of itself.
    """
    attr = _need("captum.attr", "occlusion")
    _refuse_stage(stage, "occlusion")
    channels, size = images.shape[1], images.shape[-1]
    window = min(size, max(2, size // WINDOWS))
    with torch.no_grad():
        falls: Tensor = attr.Occlusion(_twin(model)).attribute(
            images,
            sliding_window_shapes=(channels, window, window),
            strides=(channels, max(1, window // 2), max(1, window // 2)),
            target=targets,
            perturbations_per_eval=max(1, AT_ONCE // len(images)),
        )
    return _finish(falls.mean(1), size)


def integrated_gradients(model: nn.Module, images: Tensor, targets: Tensor, stage: str | None) -> Tensor:
    """Add up the gradient on the way from the mean colour to the image, times the way (Sundararajan et al. 2017)."""
    attr = _need("captum.attr", "integrated-gradients")
    _refuse_stage(stage, "integrated-gradients")
    inputs = images.detach().clone().requires_grad_()
    shares: Tensor = attr.IntegratedGradients(_twin(model)).attribute(
        inputs, target=targets, n_steps=STEPS, internal_batch_size=max(AT_ONCE, len(images))
    )
    return _finish(shares.detach().sum(1), images.shape[-1])


METHODS: dict[str, Method] = {
    "grad-cam": grad_cam,
    "score-cam": score_cam,
    "eigen-cam": eigen_cam,
    "occlusion": occlusion,
    "integrated-gradients": integrated_gradients,
}
"""Every method by its name."""


def explain(
    bundle: Bundle,
    images: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    runtime: Runtime,
    *,
    method: str = "grad-cam",
    stage: str | None = None,
    target: str | None = None,
    batch_size: int = 16,
) -> list[Heatmap]:
    """Explain decoded images, (H, W, C) uint8 with the bundle's number of channels, of any sizes.

    Args:
        bundle: The network. An ensemble's map is the weighted mean of its members'.
        images: What it is shown.
        names: One an image.
        runtime: Device; the arithmetic is fp32 in any case.
        method: A row of `METHODS`.
        stage: One of `stages`; None: the last. Only for the methods that look at feature maps.
        target: The class to explain; None: for each image the most probable.
        batch_size: Images at a time.

    Raises:
        UsageError: There is no such method, stage or class.
        ResNetLabError: The method's library is not installed; the message holds the command.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    classes = bundle.card.classes
    if target is not None and target not in classes:
        raise unknown("class", target, classes)
    model, preprocess = runtime.place(_twin(bundle.model)), bundle.card.preprocess
    maps: list[Heatmap] = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        crops = torch.stack([preprocess.crop(preprocess.square(to_tensor(image))) for image in images[rows]])
        batch = preprocess.normalize(crops.to(runtime.device))
        with torch.no_grad():
            probabilities = model(batch.contiguous(memory_format=torch.channels_last)).softmax(1)
        chosen = probabilities.argmax(1) if target is None else torch.full((len(batch),), classes.index(target))
        values = METHODS[method](model, batch, chosen.to(runtime.device), stage).cpu().numpy()
        for number, (name, label) in enumerate(zip(names[rows], chosen.tolist(), strict=True)):
            maps.append(
                Heatmap(
                    values=values[number],
                    pixels=crops[number].permute(1, 2, 0).numpy(),
                    method=method,
                    stage=_stage_shown(method, model, stage),
                    target=classes[label],
                    probability=float(probabilities[number, label]),
                    name=name,
                )
            )
    return maps


def stages(model: nn.Module) -> list[str]:
    """Return the names of the parts whose feature maps can be looked at, in order; an ensemble's are its members'."""
    if isinstance(model, Ensemble):
        return list(dict.fromkeys(name for network in model.members for name in stages(network)))
    if isinstance(model, ResNet | FastResNet):
        return list(model.stage_channels)
    children = [name for name, _ in model.named_children()]
    return children[: children.index("avgpool")] if "avgpool" in children else []


def _stage_shown(method: str, model: nn.Module, stage: str | None) -> str | None:
    """Return the stage to write down: the one that was asked for, or the last."""
    return (stage or stages(model)[-1]) if method in ("grad-cam", "score-cam", "eigen-cam") else None


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that shares the weights' memory and nothing else.

    Its parameters are tensors of their own that need no gradient, it has no hooks, and nothing in it works in place
    (hooks must see what a layer gave, not what the next one made of it).
    """
    known: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shared = tensor.detach()
        known[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    for module in model.modules():
        known |= {id(hooks): type(hooks)() for name, hooks in vars(module).items() if name.endswith("_hooks")}
    twin = copy.deepcopy(model, known).eval()
    for module in twin.modules():
        if getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010 - mypy takes a module's attributes for tensors
    return twin


Compute = Callable[[nn.Module, str, Tensor, list[int]], Tensor]
"""``(network, stage, images, classes) -> maps (B, h, w)`` at the stage's own size."""


def _class_activation(compute: Compute, model: nn.Module, images: Tensor, targets: Tensor, stage: str | None) -> Tensor:
    """Compute maps from feature maps: of a network's stage, or of each member of an ensemble, and then their mean."""
    twin = _twin(model)
    size = images.shape[-1]
    if not isinstance(twin, Ensemble):
        return _finish(compute(twin, _find(twin, stage), images.detach().clone(), targets.tolist()), size)
    total = torch.zeros(len(images), size, size, device=images.device)
    for about, network, own in twin.parts(images.detach().clone()):
        classes = [about.order[label] if about.order else label for label in targets.tolist()]
        total += about.weight * _finish(compute(network, _find(network, stage), own.clone(), classes), size)
    return _finish(total, size)


def _find(network: nn.Module, stage: str | None) -> str:
    """Return the stage to look at."""
    names = stages(network)
    if not names:
        raise UsageError(
            "This network has no feature maps to look at. Explain it with --method occlusion or integrated-gradients."
        )
    if stage is not None and stage not in names:
        raise unknown("stage", stage, names)
    return stage or names[-1]


def _refuse_stage(stage: str | None, method: str) -> None:
    if stage is not None:
        raise UsageError(f"The method {method} looks at pixels, not at a stage: leave out --stage {stage}.")


def _only(maps: list[Tensor]) -> Tensor:
    return maps[0].detach()


def _finish(maps: Tensor, size: int) -> Tensor:
    """Bring maps (B, h, w) to the image's size, keep what speaks for the class, and scale each to a maximum of 1."""
    maps = maps.detach().float().unsqueeze(1)
    if maps.shape[-1] != size:
        maps = F.interpolate(maps, (size, size), mode="bilinear", align_corners=False)
    maps = maps.squeeze(1).nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    peak = maps.amax((1, 2), keepdim=True)
    return torch.where(peak > 0, maps / peak.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def _need(module: str, method: str) -> ModuleType:
    """Import a part of a library that comes with an extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ResNetLabError(
            f'--method {method} needs the package {package}: pip install "resnetlab[explain]"'
        ) from error
