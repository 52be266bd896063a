"""Batches: images decoded once (or as needed), shuffled, augmented and normalised a whole batch at a time.

What an image looks like in an epoch depends on (seed, epoch, its index) alone: not on where it is stored, how many
threads decode it, which batch or process it falls to, or whether the run was resumed. Mixes of two images (mixup,
cutmix) depend on the batch too, as its images are each other's partners and its first image draws their share; the
batches of an epoch are those of (seed, epoch, batch size, processes), so a resume meets the same.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnetlab.augment import Pipeline, pipeline
from resnetlab.config import DataConfig
from resnetlab.easy import Easy
from resnetlab.errors import ResNetLabError
from resnetlab.preprocess import Preprocess, fit_to, to_tensor
from resnetlab.runtime import Runtime, free_memory, keyed_generator, total_memory
from resnetlab.sources import copies
from resnetlab.sources.dataset import Dataset, Pixels, Split
from resnetlab.sources.decoded import FEWEST, SMALL, decoded
from resnetlab.sources.images import ArrayImages, BrokenImage, refusal, refuse_or_drop, scan
from resnetlab.sources.splits import hold_out, subset
from resnetlab.threads import cores, processes

Make = Callable[[Tensor], Tensor]
"""Indices (B,) → what is read of these images, (B, C, height, width); safe to call from several threads at once."""
Progress = Callable[[str, int, int], None]
"""``(what, done, total)``, called now and then while images are read."""

SHARE_OF_MEMORY = 0.25
"""Decoded images are held in memory, and a GPU's, while they take no more than this share of it."""
AHEAD = 2
"""Batches that are being decoded while another one is trained on."""
LEAST = 2
"""Images that each process needs in a batch, for batch norm."""
REDUCED = 2
"""A JPEG that is decoded at reduced size for training stays at least so many times as large as what is kept of it."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one optimiser step reads."""

    images: Tensor
    """(B, C, size, size) float32, normalised, channels last."""
    labels: Tensor
    """(B,) int64."""
    weight: float = 1.0
    """Share of its own label in each image; the next image's label (``labels.roll(1)``) has the rest."""
    size: int = 0
    """Images in the step over all processes."""
    indices: Tensor | None = None
    """(B,) int64: which images of the split these are."""
    everywhere: Tensor | None = None
    """(size,) int64: the same of all processes; process r of n has those at r, r + n, ..."""


class Store:
    """A split's images as uint8 squares (C, resize, resize), held in memory or decoded when asked for."""

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        pixels: Tensor | None,
        workers: int | None,
        at_least: tuple[int, int] | None = None,
    ) -> None:
        self.split = split
        self.preprocess = preprocess
        self.labels = torch.from_numpy(split.labels)
        self.pixels = pixels
        self.workers = workers
        self.at_least = at_least
        """Down to which height and width JPEGs may be decoded smaller; None: whole, as for all that is scored."""
        self.left_out: tuple[BrokenImage, ...] = ()
        """The images that could not be read."""

    def __len__(self) -> int:
        return len(self.split)

    def near(self, runtime: Runtime) -> "Store":
        """Return the same images in a GPU's memory, where they are squares held in memory and take little of it."""
        side = self.preprocess.resize
        if self.pixels is None or self.pixels.shape[-2:] != (side, side):
            return self
        if self.pixels.nbytes > SHARE_OF_MEMORY * free_memory(runtime.device):
            return self
        moved = Store(self.split, self.preprocess, self.pixels.to(runtime.device), self.workers, self.at_least)
        moved.left_out = self.left_out
        return moved

    def squares(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``: (B, C, resize, resize) uint8."""
        if self.pixels is not None:
            return self.preprocess.square(self.pixels[indices.to(self.pixels.device)])
        if not len(indices):  # of a process that there is no image for
            return torch.empty(0, self.preprocess.channels, *[self.preprocess.resize] * 2, dtype=torch.uint8)
        decoded = (self.split.images.read(i, self.at_least) for i in indices.tolist())
        return torch.stack([self.preprocess.square(to_tensor(image)).contiguous() for image in decoded])

    def stream(self, batches: Iterator[tuple[Tensor, Make]]) -> Iterator[Tensor]:
        """Yield what is made of each batch of indices; where images are decoded, threads run ahead of the reader."""
        if self.pixels is not None:
            yield from (make(indices) for indices, make in batches)
            return
        workers = _decoders() if self.workers is None else max(1, self.workers)
        waiting: deque[list[Future[Tensor]]] = deque()
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for indices, make in batches:
                    waiting.append([pool.submit(make, part) for part in indices.chunk(workers)])
                    if len(waiting) > AHEAD:
                        yield _joined(waiting.popleft())
                while waiting:
                    yield _joined(waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(torch.get_num_threads())  # PyTorch gives the last number set to all new threads


def _decoders() -> int:
    """Return how many threads decode where nobody says: as many as compute, under torchrun a share of the cores.

    torchrun leaves one thread to each process, which could not decode as fast as a GPU trains.
    """
    return max(1, cores() // processes()) if processes() > 1 else torch.get_num_threads()


def _joined(parts: list[Future[Tensor]]) -> Tensor:
    """Wait for the parts of a batch and join them, in the memory format that they have."""
    return torch.cat([part.result() for part in parts])


@dataclass(frozen=True, kw_only=True)
class TrainLoader:
    """Endless epochs of shuffled, augmented batches."""

    store: Store
    pipeline: Pipeline
    batch_size: int
    drop_last: bool
    seed: int
    runtime: Runtime
    sizes: Callable[[int], int] | None = None
    """The height and width of the images at a step of the run, from 0; None: the transform's, always."""
    easy: Easy | None = None
    """Which images are left out of their batches, where any are."""

    @property
    def steps(self) -> int:
        """Return the optimiser steps in an epoch."""
        return steps_per_epoch(len(self.store), self.batch_size, self.drop_last, self.runtime.world_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``start`` on; each process gets its share of every batch."""
        n, device, runtime = len(self.store), self.runtime.device, self.runtime
        order = torch.randperm(n, generator=keyed_generator(self.seed, epoch, "order"))
        chance = torch.rand(n, max(1, self.pipeline.draws), generator=keyed_generator(self.seed, epoch, "augment"))
        for column in self.pipeline.alternating:
            first = torch.rand(n, generator=keyed_generator(self.seed, "alternate", column))
            chance[:, column] = (first + epoch % 2 / 2) % 1
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, self.steps)]
        batches = [self._without_easy(batch, epoch) for batch in batches]
        chance, labels = chance.to(device), self.store.labels.to(device)
        begun = (epoch - 1) * self.steps + start
        sizes = [self.sizes(begun + i) if self.sizes else self.store.preprocess.size for i in range(len(batches))]
        looks = [partial(self._look, chance, size) for size in sizes]
        mine = [batch[runtime.rank :: runtime.world_size] for batch in batches]
        here = device.type == "cpu"  # then a photograph is augmented by the thread that decodes it
        made = self.store.stream(zip(mine, looks if here else repeat(self.store.squares), strict=False))
        for batch, indices, look, images in zip(batches, mine, looks, made, strict=True):
            images = images if here else look(indices, images)
            rows = indices.to(device)
            mixed = self.pipeline.pairs(images, chance[rows])
            yield Batch(
                images=mixed.images.contiguous(memory_format=torch.channels_last),
                labels=labels[rows],
                weight=mixed.weight,
                size=len(batch),
                indices=indices,
                everywhere=batch,
            )

    def _look(self, chance: Tensor, size: int, indices: Tensor, squares: Tensor | None = None) -> Tensor:
        """Augment images and normalise them.

        Args:
            chance: The random numbers of all images in this epoch: (N, draws), on the device.
            size: Height and width that are wanted.
            indices: (B,) int64.
            squares: (B, C, resize, resize) uint8; None: read them.

        Returns:
            (B, C, size, size) float32 on the device of ``chance``.
        """
        device, preprocess = chance.device, self.store.preprocess
        squares = self.store.squares(indices) if squares is None else squares
        fill = torch.tensor([round(255 * m) for m in preprocess.mean], dtype=torch.uint8, device=device)
        images = self.pipeline.pixels(squares.to(device), chance[indices.to(device)], fill, preprocess.size)
        images = images if self.pipeline.resizes else preprocess.crop(images)
        if images.shape[-1] != size:
            images = torch.nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return preprocess.normalize(images).contiguous(memory_format=torch.channels_last)

    def _without_easy(self, batch: Tensor, epoch: int) -> Tensor:
        """Return what is trained on of a batch: all of it, where the rest would be too small for batch norm."""
        left = self.easy.rest(batch, epoch) if self.easy else batch
        return left if len(left) >= LEAST * self.runtime.world_size else batch


def steps_per_epoch(images: int, batch_size: int, drop_last: bool, world_size: int) -> int:
    """Return the optimiser steps in an epoch. A rest too small for batch norm (one image a process) is left out."""
    whole, rest = divmod(images, batch_size)
    too_few = rest < LEAST * world_size
    return whole + bool(rest and not (whole and (drop_last or too_few)))


@dataclass(frozen=True, kw_only=True)
class EvalLoader:
    """One pass over a split, in order, every image once, none augmented."""

    store: Store
    batch_size: int
    runtime: Runtime

    def squares(self) -> Iterator[Tensor]:
        """Yield (B, C, resize, resize) uint8 batches of this process's images: rank, rank + world size, ..."""
        mine = torch.arange(self.runtime.rank, len(self.store), self.runtime.world_size)
        for squares in self.store.stream((part, self.store.squares) for part in torch.split(mine, self.batch_size)):
            yield squares.to(self.runtime.device)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the same images as the network reads them: (B, C, size, size) float32."""
        preprocess = self.store.preprocess
        for squares in self.squares():
            images = preprocess.normalize(preprocess.crop(squares))
            yield images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The images of a run, all of them read once, and the transform that goes with them."""

    train: Store
    val: Store | None
    test: Split | None
    """The test images that can be read; nothing but that was looked at."""
    preprocess: Preprocess
    notes: tuple[str, ...]


def prepare(config: DataConfig, dataset: Dataset, progress: Progress | None = None) -> Prepared:
    """Make the splits that ``config`` asks for, read every image once, fix the transform.

    The channel statistics are those of the training images as the network sees them, square but not augmented.

    Raises:
        ResNetLabError: Images are broken and ``config.skip_broken`` is not set, or a class is too small to split.
    """
    dataset = _in_memory(config, dataset, progress)
    train, val, notes = split(config, dataset)
    if len(train) == 0:
        raise ResNetLabError(f"{dataset.name}: there are no training images.")
    height, width = typical_shape(train)
    margin = pipeline(config.augment).resizes
    preprocess = fit_to(config, height=height, width=width, channels=dataset.channels, margin=margin)
    lenient = config.model_copy(update={"skip_broken": True})  # the broken ones of all splits are refused together
    at_least = (REDUCED * preprocess.resize,) * 2 if config.reduced and max(height, width) > SMALL else None
    store, mean, std = read(train, preprocess, lenient, "training images", progress, at_least)
    if at_least and min(height, width) >= 2 * at_least[0]:
        notes += ("Large training JPEGs are decoded at 1/2 to 1/8 of their size (data.reduced=false: whole).",)
    if config.normalize == "dataset":
        preprocess = preprocess.model_copy(update={"mean": mean, "std": std})
        store.preprocess = preprocess
    val_store = read(val, preprocess, lenient, "validation images", progress)[0] if val else None
    test, unreadable = _readable(dataset.test, progress)
    if dropped := [*store.left_out, *(val_store.left_out if val_store else ()), *unreadable]:
        if not config.skip_broken:
            raise refusal(dropped, sum(len(part) for part in (train, val, dataset.test) if part))
        more = f" and {len(dropped) - 10:,} more" if len(dropped) > 10 else ""
        names = ", ".join(error.name for error in dropped[:10])
        notes += (f"Left out, as they cannot be read, {len(dropped):,}: {names}{more}.",)
    notes += tuple(copies.notes({"train": store.split, "val": val_store.split if val_store else None, "test": test}))
    return Prepared(train=store, val=val_store, test=test, preprocess=preprocess, notes=notes)


def _in_memory(config: DataConfig, dataset: Dataset, progress: Progress | None) -> Dataset:
    """Return the data set with its small images decoded, from the cache where they lie there.

    All splits or none: that an image is in two of them is found where both are decoded, or neither (`sources.copies`).
    """
    names = {"train": "training images", "val": "validation images", "test": "test images"}
    parts: dict[str, Any] = {name: part for name in names if (part := getattr(dataset, name))}
    few = config.limit is not None and config.limit < len(dataset.train)
    if config.memory == "stream" or few or max(map(len, parts.values()), default=0) < FEWEST:
        return dataset
    for name, part in parts.items():
        tell = partial(progress, names[name]) if progress else None
        parts[name] = replace(part, images=decoded(part.images, tell))
    if not all(isinstance(part.images, ArrayImages) for part in parts.values()):
        return dataset
    return replace(dataset, **parts)


def _readable(test: Split | None, progress: Progress | None) -> tuple[Split | None, list[BrokenImage]]:
    """Return the test images that can be read, and the others: said before hours of training, not after."""
    if test is None or isinstance(test.images, ArrayImages):
        return test, []
    tell = partial(progress, "test images") if progress else None
    _, broken = scan(test.images, lambda index, pixels: None, at_least=(1, 1), progress=tell)
    return refuse_or_drop(test, broken, skip_broken=True), broken


def split(config: DataConfig, dataset: Dataset) -> tuple[Split, Split | None, tuple[str, ...]]:
    """Return the training and validation splits: the data set's own, or one held back from training by seed."""
    train, val, notes = dataset.train, dataset.val, dataset.notes
    if config.limit and config.limit < len(train):
        train = train.select(subset(train.labels, config.limit, config.split_seed))
        notes += (f"Training on {len(train)} of {len(dataset.train)} images (data.limit).",)
    if config.val == 0:
        return train, None, notes
    if val is None:
        instead = ", or train without validation: --val none"
        kept, held = hold_out(train.labels, config.val, config.split_seed, train.classes, instead=instead)
        train, val = train.select(kept), train.select(held)
        notes += (f"{len(val)} training images are held back for validation (split seed {config.split_seed}).",)
        train, copied = copies.apart(train, val)
        notes += (copied,) if copied else ()
    return train, val, notes


def test_split(config: DataConfig, dataset: Dataset) -> Split | None:
    """Return the test split, or the part of it that ``config.limit_test`` asks for."""
    test = dataset.test
    if test is None or config.limit_test is None or config.limit_test >= len(test):
        return test
    return test.select(subset(test.labels, config.limit_test, config.split_seed))


def typical_shape(split: Split) -> tuple[int, int]:
    """Return the median height and width over at most 500 images spread over the split, broken ones left out."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(500, len(split))).astype(int))
    shapes = [shape for i in rows if (shape := _shape(split, int(i)))]
    if not shapes:  # reading them all will name the broken ones
        return 1, 1
    heights, widths = zip(*shapes, strict=True)
    return int(np.median(heights)), int(np.median(widths))


def _shape(split: Split, index: int) -> tuple[int, int] | None:
    """Return an image's height and width; None where its header cannot be read, which `scan` reports later."""
    try:
        return split.images.shape(index)
    except BrokenImage:
        return None


def read(
    split: Split,
    preprocess: Preprocess,
    config: DataConfig,
    what: str,
    progress: Progress | None = None,
    at_least: tuple[int, int] | None = None,
) -> tuple[Store, tuple[float, ...], tuple[float, ...]]:
    """Decode every image of a split once: to find the broken ones, for the statistics, and to keep them if they fit.

    Args:
        split: The images.
        preprocess: What makes squares of them.
        config: Whether they are kept in memory, how many threads decode, whether broken ones are left out.
        what: What ``progress`` is told is read.
        progress: Is told how many are done.
        at_least: Let JPEGs be decoded smaller, down to this height and width (see `Images.read`); for training only.

    Returns:
        The store, and mean and standard deviation of each channel over all pixels, of values in [0, 1].
    """
    square_size = preprocess.resize**2
    native = _same_small_shape(split, preprocess)
    each = preprocess.channels * (native[0] * native[1] if native else square_size)
    fits = each * len(split) * processes() <= SHARE_OF_MEMORY * total_memory()
    keep = config.memory == "resident" or (config.memory == "auto" and fits)

    if keep and isinstance(split.images, ArrayImages) and native == (preprocess.resize,) * 2:  # squares already
        pixels = torch.from_numpy(split.images.pixels).permute(0, 3, 1, 2).contiguous()
        sums = [_sums(part) for part in torch.split(pixels, 1000)]
        return Store(split, preprocess, pixels, config.workers, at_least), *_statistics(sums, len(pixels) * square_size)

    def visit(index: int, pixels: Pixels) -> tuple[Tensor | None, Tensor]:
        image = to_tensor(pixels)
        square = preprocess.square(image).contiguous()
        return (image.contiguous() if native else square) if keep else None, _sums(square[None])

    results, broken = scan(
        split.images, visit, at_least=at_least, progress=partial(progress, what) if progress else None
    )
    split = refuse_or_drop(split, broken, skip_broken=config.skip_broken)
    mean, std = _statistics([sums for _, sums in results], len(results) * square_size)
    kept = torch.stack([image for image, _ in results if image is not None]) if keep else None
    store = Store(split, preprocess, kept, config.workers, at_least)
    store.left_out = tuple(broken)
    return store, mean, std


def _sums(squares: Tensor) -> Tensor:
    """Sum each channel's values, and their squares, over uint8 images (N, C, H, W): (2, C) int64, so exact."""
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in squares.transpose(0, 1).flatten(1)])
    values = torch.arange(256)
    return torch.stack([(counts * values).sum(1), (counts * values**2).sum(1)])


def _statistics(sums: list[Tensor], pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, of values in [0, 1], from the sums over so many pixels."""
    mean, square_mean = torch.stack(sums).sum(0).double() / pixels
    std = (square_mean - mean**2).clamp(min=1.0).sqrt()  # a constant channel must not divide by zero
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _same_small_shape(split: Split, preprocess: Preprocess) -> tuple[int, int] | None:
    """Return the shape of all images where it is one and holds fewer pixels than the square: they are kept as such."""
    shapes = filter(None, (_shape(split, i) for i in range(len(split))))
    first = next(shapes, None)
    if first is None or first[0] * first[1] > preprocess.resize**2:
        return None
    return first if all(shape == first for shape in shapes) else None
