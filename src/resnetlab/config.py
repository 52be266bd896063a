"""What a run is made of, as typed, frozen data: a recipe and its parts, their JSON, and `key=value` overrides.

Every field is checked when it is set; an unknown key or a value of the wrong kind is an error that names the nearest
field. Nothing here reaches torch.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

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
NonNegative = Annotated[float, Field(ge=0)]


class ModelConfig(Config):
    """A network, completely: `models.build` makes the same layers from it anywhere."""

    name: str
    """A row of `models.ARCHITECTURES`."""
    num_classes: int = Field(10, ge=1)
    in_channels: int = Field(3, ge=1)
    image_size: int | None = Field(None, ge=1)
    """Height and width of the input in pixels. Decides an ``auto`` stem; the linear model needs it."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """``imagenet``: 7×7/2 convolution and 3×3/2 max-pool. ``small``: 3×3/1 convolution, no pooling.
    ``auto``: small up to 64 px, else ImageNet; the CIFAR family's own stem is the small one."""
    stem_relu: bool = True
    """ReLU between the stem's batch norm and its max-pool; the tutorial's network has none."""
    shortcut: Literal["auto", "A", "B", "C", "none"] = "auto"
    """Option A: zero-padded identity; B: projection where shapes change; C: projection everywhere (paper, section
    4.1). ``none``: a plain network. ``auto``: what the architecture has in the paper."""
    stride_on: Literal["3x3", "1x1"] = "3x3"
    """Which convolution of a bottleneck strides: the 3×3 (torchvision, "v1.5") or the first 1×1 (the paper)."""
    zero_init: bool = False
    """Start every residual block as the identity: the last batch norm's weight is 0 (Goyal et al. 2017)."""
    init: Literal["he", "torch"] = "he"
    """``he``: normal, fan-out, as torchvision does; ``torch``: PyTorch's default, as the tutorial does."""


class DataConfig(Config):
    """How images become batches."""

    size: int | None = Field(None, ge=4, le=4096)
    """Height and width that the network sees, in pixels. None: as the images are up to 64 px, else 224."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How an image that is not square becomes so when it is evaluated."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    normalize: Literal["dataset", "half", "imagenet"] = "dataset"
    """Mean and standard deviation of each channel: computed from the training images, 0.5 and 0.5, or ImageNet's."""
    augment: Names = ()
    """Rows of `augment.AUGMENTATIONS`, in order, a parameter after a colon: ``crop:4,flip,cutout:8``."""
    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training images held back for validation when the data has no validation split. 0: none."""
    split_seed: int = 0
    """Seed of the splits that are made here; apart from ``seed``, so that runs of several seeds share their splits."""
    limit: int | None = Field(None, ge=1)
    """Use only this many training images, drawn in equal shares from the classes."""
    limit_test: int | None = Field(None, ge=1)
    """Score only this many test images, drawn in equal shares from the classes; the score's ``n`` says so."""
    drop_last: bool = False
    """Leave out the last training batch of an epoch when it is not full."""
    memory: Literal["auto", "resident", "stream"] = "auto"
    """Hold all decoded images in memory, or decode them as they are needed. ``auto``: hold them while they fit."""
    workers: int | None = Field(None, ge=0, le=64)
    """Threads that decode images when streaming. None: one for each core."""
    skip_broken: bool = False
    """Leave out images that cannot be read, and say which, instead of refusing to start."""


class OptimConfig(Config):
    """The optimiser and what its learning rate does over the run."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    """The highest learning rate of the schedule, for a mean (not summed) loss."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    decay_norms: bool = True
    """Apply weight decay to biases and batch-norm parameters too (PyTorch's default, and fb.resnet.torch's)."""
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
