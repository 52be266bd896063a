"""What a run is made of, as typed, frozen data: a recipe and its parts, their JSON, and `key=value` overrides.

Every field is checked when it is set; an unknown key or a value of the wrong kind is an error that names the nearest
field. Nothing here reaches torch.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from resnetlab.errors import ResNetLabError, UsageError, did_you_mean


class Config(BaseModel):
    """A frozen record whose fields are all checked; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _split_commas(value: object) -> object:
    """Read ``a,b`` as two items, so that lists can be given on the command line; ``none`` is the empty list."""
    if isinstance(value, str):
        return [] if value in ("", "none") else [part.strip() for part in value.strip("[]()").split(",")]
    return value


ConfigT = TypeVar("ConfigT", bound=Config)
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Fractions = Annotated[tuple[Fraction, ...], BeforeValidator(_split_commas)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Rate = Annotated[float, Field(gt=0, le=1e30)]
"""A learning rate; beyond, fp32 has no room for what is computed of it."""


LEAST_SIZE, MOST_SIZE = 4, 4096
"""Sides of the images that a network may be given, in pixels."""


class ModelConfig(Config):
    """A network, completely: `models.build` makes the same layers from it anywhere."""

    name: str
    """A row of `models.ARCHITECTURES`."""
    num_classes: int = Field(10, ge=1)
    in_channels: int = Field(3, ge=1)
    image_size: int | None = Field(None, ge=1)
    """Height and width of the input in pixels. Decides an ``auto`` stem; the linear model needs it."""
    stem: Literal["auto", "imagenet", "small", "deep"] = "auto"
    """``imagenet``: 7×7/2 convolution and 3×3/2 max-pool. ``small``: 3×3/1 convolution, no pooling. ``deep``: three
    3×3 convolutions in place of the 7×7 (ResNet-C and -D, He et al. 2018, arXiv:1812.01187).
    ``auto``: small up to 64 px, else ImageNet; the CIFAR family's own stem is the small one."""
    stem_relu: bool = True
    """ReLU between the stem's batch norm and its max-pool; the tutorial's network has none."""
    stem_norm: bool = True
    """Batch norm and activation after the stem's convolution. With ``preact`` the default is false: there the first
    block begins with them; where the stem has them, the first block leaves them out."""
    stem_pool: Literal["padded", "ceil"] = "padded"
    """Max-pool of the stem: one pixel of padding (torchvision), or none and the last window cut off (Caffe, and
    TensorFlow's "SAME" at even sizes): windows one pixel further right and down; of an odd number one less."""
    width: float = Field(1.0, gt=0, le=64)
    """Multiplies the channels of every stage (Zagoruyko and Komodakis 2016, arXiv:1605.07146); the stem's too where
    it is below 1."""
    groups: int = Field(1, ge=1)
    """Groups of a bottleneck's 3×3 convolution: ResNeXt's cardinality (Xie et al. 2016, arXiv:1611.05431)."""
    base_width: int = Field(64, ge=1, le=4096)
    """Inner channels of a bottleneck, as 64ths of the usual number, for each of ``groups``: 4 in ResNeXt 32x4d; 128 in
    the wide ResNet-50-2 (arXiv:1605.07146)."""
    preact: bool = False
    """Batch norm and activation before each convolution, and none after the sum: ResNet v2 (He et al. 2016,
    arXiv:1603.05027)."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Instead of every ReLU but those inside squeeze-and-excitation: GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    or SiLU (Ramachandran et al. 2017, arXiv:1710.05941)."""
    se: int = Field(0, ge=0)
    """Squeeze-and-excitation at the end of each block's branch (Hu et al. 2017, arXiv:1709.01507): the factor by which
    it narrows the channels, 16 in the paper; 0: none."""
    blur: bool = False
    """Blur before each halving of the image, but the stem's convolution (Zhang 2019, arXiv:1904.11486): a 3×3 binomial
    filter after the max-pool, before a block's last convolution and on its shortcut."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): the probability of leaving out the last block's branch,
    image by image, in training; it grows linearly from the first block on. 0.5 in the paper."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each block's last convolution (arXiv:1605.07146, section 2.4)."""
    shortcut: Literal["auto", "A", "B", "C", "none"] = "auto"
    """Option A: zero-padded identity; B: projection where shapes change; C: projection everywhere (paper, section
    4.1). ``none``: a plain network. ``auto``: what the architecture has in the paper."""
    stride_on: Literal["3x3", "1x1"] = "3x3"
    """Which convolution of a bottleneck strides: the 3×3 (torchvision, "v1.5") or the first 1×1 (the paper)."""
    stride_unit: Literal["first", "last"] = "first"
    """Which block of a stage strides: the first from stage 2 on (the paper), or the last but in stage 4 (TF-slim)."""
    shortcut_pool: bool = False
    """Average over 2×2 pixels on a shortcut that strides, instead of taking every second one (ResNet-D,
    arXiv:1812.01187)."""
    shortcut_pad: Literal["both", "end"] = "both"
    """Option A: zeros before and after the channels (akamaster), or all of them after (fb.resnet.torch)."""
    shortcut_norm: bool = True
    """Batch norm on projections. With ``preact`` the default is false, as in the authors' code."""
    norm_place: Literal["branch", "sum"] = "branch"
    """Where a block's last batch norm is: on the branch, or after the sum (fb.resnet.torch's released ResNet-50)."""
    norm_momentum: float = Field(0.1, gt=0, le=1)
    """Share of a batch's statistics in the running ones; TensorFlow and Keras count the other share, 1 − this."""
    norm_eps: float = Field(1e-5, gt=0, le=1)
    """Added to the variance in every batch norm; 1.001e-5 in Keras."""
    norm_batch: int = Field(0, ge=0)
    """Batch norm sees at least so many images at a time in training, as on a GPU of several ("ghost" batches, Hoffer
    et al. 2017, arXiv:1705.08741); 0: all that a process has."""
    conv_bias: Literal["none", "stem", "all"] = "none"
    """Convolutions with a bias, although a batch norm follows: the first (Caffe's ResNet-50) or all (Keras)."""
    zero_init: bool = False
    """Start every residual block as the identity: the last batch norm's weight is 0 (Goyal et al. 2017,
    arXiv:1706.02677); where blocks are pre-activated, the last convolution's weights."""
    init: Literal["he", "he-in", "torch"] = "he"
    """``he``: normal, fan-out, as torchvision does; ``he-in``: fan-in, the last layer too, as akamaster does (He et al.
    2015, arXiv:1502.01852, allows both); ``torch``: PyTorch's default, as the tutorial does."""


class DataConfig(Config):
    """How images become batches."""

    size: int | None = Field(None, ge=LEAST_SIZE, le=MOST_SIZE)
    """Height and width that the network sees, in pixels. None: as the images are where their shorter side is
    64 px or less, else 224."""
    grow: Names = ()
    """Train at smaller sizes first: each size in pixels after the share of the run at which it begins, such as
    ``0:20,0.5:24,0.75:32`` (progressive resizing; Howard 2018, fast.ai). What is evaluated stays at ``size``."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How an image that is not square becomes so when it is evaluated."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    normalize: Literal["dataset", "half", "imagenet"] = "dataset"
    """Mean and standard deviation of each channel: computed from the training images, 0.5 and 0.5, or ImageNet's."""
    augment: Names = ()
    """Rows of `augment.AUGMENTATIONS`, in order, a parameter after a colon: ``crop:4,flip,cutout:8``."""
    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training images held back for validation when the data has no validation split. 0: none."""
    split_seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the splits that are made here; apart from ``seed``, so that runs of several seeds share their splits."""
    limit: int | None = Field(None, ge=1)
    """Use only this many training images, drawn in equal shares from the classes."""
    limit_test: int | None = Field(None, ge=1)
    """Score only this many test images, drawn in equal shares from the classes; the score's ``n`` says so."""
    skip_easy: float = Field(0, ge=0, le=0.5)
    """Share of each batch that is left out from half of the run on: the images whose loss was smallest when they were
    last trained on, never twice running (`easy`). Accuracies of training are then those of the others. What is easy in
    every other epoch is no longer mirrored by ``alternate``, which changes nothing that could be measured."""
    drop_last: bool = False
    """Leave out the last training batch of an epoch when it is not full."""
    memory: Literal["auto", "resident", "stream"] = "auto"
    """Hold all decoded images in memory, or decode them as they are needed. ``auto``: hold them while they fit."""
    workers: int | None = Field(None, ge=0, le=64)
    """Threads that decode images when streaming. None: as many as compute; under torchrun, a share of the cores."""
    reduced: bool = True
    """Decode training JPEGs at 1/2, 1/4 or 1/8 of their size where that is still twice the size kept: several times
    faster, nearly the same pixels. What is scored or predicted is always decoded whole."""
    skip_broken: bool = False
    """Leave out images that cannot be read, and say which, instead of refusing to start."""

    @model_validator(mode="after")
    def _growing(self) -> Self:
        shares = [share for share, _ in self.growth]
        rising = shares == sorted(set(shares)) and all(0 <= share < 1 for share in shares)  # nan is neither
        if self.grow and not (rising and shares[0] == 0):
            raise ValueError("the shares in grow must begin with 0, rise, and stay below 1, as in 0:20,0.5:24,0.75:32")
        return self

    @property
    def growth(self) -> tuple[tuple[float, int], ...]:
        """``grow`` as (share of the run, size in pixels)."""
        try:
            pairs = [(float(share), int(size)) for share, _, size in (text.partition(":") for text in self.grow)]
        except ValueError as error:
            raise ValueError("grow must be shares and sizes, as in 0:20,0.5:24,0.75:32") from error
        if any(not LEAST_SIZE <= size <= MOST_SIZE for _, size in pairs):
            raise ValueError(f"the sizes in grow must be from {LEAST_SIZE} to {MOST_SIZE} pixels")
        return tuple(pairs)


class OptimConfig(Config):
    """The optimiser and what its learning rate does over the run."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """``muon``: Muon on the filters of convolutions, SGD with Nesterov momentum on the rest (`muon`). The norm of
    filters is fixed, which matters where no batch norm follows them (pre-activated blocks, squeeze-and-excitation)."""
    lr: Rate = 0.1
    """The highest learning rate of the schedule, for a mean (not summed) loss; Muon's is about the relative change of
    a filter bank in a step."""
    norm_lr: Rate | None = None
    """Muon's: the highest learning rate of norms and biases. None: 0.1."""
    head_lr: Rate | None = None
    """Muon's: the highest learning rate of linear layers. None: 0.1."""
    filter_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Muon's: the momentum of filters; ``momentum`` is that of the rest."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    momentum_form: Literal["torch", "caffe"] = "torch"
    """Of ``sgd``: whether the learning rate multiplies the momentum (``torch``: v ← m·v + g, w ← w − lr·v) or is in it
    (``caffe``: v ← m·v + lr·g, w ← w − v). They differ after a change of the rate (Goyal et al. 2017,
    arXiv:1706.02677, section 3, remark 2)."""
    weight_decay: NonNegative = 0.0
    decay_norms: bool = True
    """Apply weight decay to biases and batch-norm parameters too (PyTorch's default, and fb.resnet.torch's); Muon does
    not."""
    schedule: Literal["constant", "step", "linear", "cosine"] = "constant"
    milestones: Fractions = ()
    """``step``: the shares of the run after which the rate is multiplied by ``gamma``."""
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: NonNegative = 0.0
    """Length of the warm-up; at most a fifth of the run."""
    warmup_factor: Fraction = 0.0
    """The rate that the warm-up starts from, as a share of ``lr``; its first step is already one step above it."""
    warmup_shape: Literal["linear", "constant"] = "linear"
    """``linear``: from ``warmup_factor`` up to 1; ``constant``: stay at ``warmup_factor``, then jump (paper, 4.2)."""
    clip: NonNegative = 0.0
    """Clip the gradient to this norm; 0: do not."""
    average: NonNegative = 0.0
    """Time constant, in epochs, of the exponential moving average of the weights that is evaluated and kept, at most a
    tenth of the run; 0: no average."""


class Recipe(Config):
    """A whole training run, as data."""

    name: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    epochs: int = Field(gt=0)
    batch_size: int = Field(128, gt=0)
    """Images in one optimiser step, over all processes together."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    views: str = "single"
    """A row of `views.VIEWS` for one more final score, beside that of the single view."""
    precise_bn: int = Field(0, ge=0)
    """After training, replace the running statistics of batch norm by plain averages over so many training batches (at
    most an epoch; with ``keep=best``, after every epoch), as the authors did for their release (Wu and Johnson 2021,
    arXiv:2105.07576). 0: keep the running ones."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights become the result: the best on the validation split, or the last."""
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    """``auto`` (cuda, xpu, mps, else cpu), or a device that torch knows."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of convolutions; weights and statistics stay in fp32. ``auto``: the fastest that the device has."""
    deterministic: bool = False
    """Only deterministic kernels, at the price of speed. On a CPU runs are deterministic as they are."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Time between checkpoints inside an epoch, in minutes; there is one after every epoch in any case."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.keep == "best" and self.data.val == 0:
            object.__setattr__(self, "keep", "last")  # nothing to choose by; a copy would be lost by Recipe(...)
        return self


def parse(kind: type[ConfigT], text: str | bytes, where: str) -> ConfigT:
    """Read a record from JSON.

    Args:
        kind: The record's class.
        text: The JSON.
        where: What the error names, for example the file.

    Raises:
        ResNetLabError: It is not such a record; the message names the field.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ResNetLabError(f"{where}: {_explain(error)}") from error


def early(settings: Sequence[str], name: str) -> str | None:
    """Return what ``settings`` give ``name`` at last, before the recipe that they change is made; None: nothing.

    What the data, the recipe or the runs depend on is needed then; `override` checks it.
    """
    values = [s.partition("=")[2] for s in settings if s.startswith(f"{name}=")]
    return values[-1] if values else None


def early_number(settings: Sequence[str], name: str, least: int = 0, most: int | None = None) -> int | None:
    """Return the same where it is a whole number from ``least`` to ``most``; None: it is not given, or another."""
    with contextlib.suppress(ValidationError):
        return TypeAdapter(Annotated[int, Field(ge=least, le=most)]).validate_python(early(settings, name))
    return None


def early_flag(settings: Sequence[str], name: str) -> bool:
    """Return the same where it is a truth value; False: it is not given, or something else."""
    with contextlib.suppress(ValidationError):
        return TypeAdapter(bool).validate_python(early(settings, name))
    return False


def as_text(value: object) -> str:
    """Write a value as a setting ``key=value`` takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the recipe with settings such as ``epochs=40`` or ``optim.lr=0.05`` applied.

    Raises:
        UsageError: A key does not exist (the nearest one is named) or a value does not fit its field.
    """
    tree = recipe.model_dump(exclude_unset=True)
    keys = dict(fields(Recipe))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f'"{setting}" is not a setting. Settings look like epochs=40 or optim.lr=0.05.')
        if key not in keys:
            raise UsageError(f'Unknown setting "{key}".{_nearest(key, keys)} `resnetlab recipes` lists them all.')
        *path, last = key.split(".")
        branch: dict[str, Any] = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = None if value.lower() == "none" and _allows_none(keys[key]) else value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error)) from error


def fields(kind: type[Config], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key below a record with its type, for example ``("optim.lr", float)``."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation


def flat(record: Config) -> dict[str, Any]:
    """Return every dotted key of a record with its value."""
    values: dict[str, Any] = {}
    for key, value in record:
        values |= {f"{key}.{k}": v for k, v in flat(value).items()} if isinstance(value, Config) else {key: value}
    return values


def nearest(word: str) -> str:
    """Return ``' Did you mean "optim.lr"?'`` for the setting whose name is nearest, or an empty string."""
    return _nearest(word, [key for key, _ in fields(Recipe)])


def _allows_none(annotation: object) -> bool:
    return type(None) in get_args(annotation)


def _nearest(key: str, keys: Iterable[str]) -> str:
    """Suggest a dotted key, also where only its section was left out: ``lr`` means ``optim.lr``."""
    keys = list(keys)
    same_leaf = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f' Did you mean "{same_leaf[0]}"?' if same_leaf else did_you_mean(key, keys)


def _explain(error: ValidationError) -> str:
    """Say in one line a field what pydantic found wrong."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        told = item["type"] in ("extra_forbidden", "missing", "json_invalid")  # the input is no value, or all of it
        given = "" if told else f" (got {repr(item['input'])[:80]})"
        hint = nearest(key) if item["type"] == "extra_forbidden" else ""
        lines.append(f"{key or 'document'}: {item['msg']}{given}.{hint}")
    return " ".join(lines)
