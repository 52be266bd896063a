"""Batches: every image once, the same whatever the storage, the threads, the processes, or a resume."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import colours
from resnetlab import loader as module
from resnetlab import sources
from resnetlab.augment import pipeline
from resnetlab.config import DataConfig
from resnetlab.errors import ResNetLabError
from resnetlab.loader import Batch, EvalLoader, Prepared, TrainLoader, prepare, read, typical_shape
from resnetlab.preprocess import Preprocess
from resnetlab.runtime import Runtime, setup
from resnetlab.sources.dataset import Dataset
from resnetlab.sources.images import ArrayImages


def loader(
    prepared: Prepared,
    augment: tuple[str, ...] = (),
    *,
    batch_size: int = 16,
    drop_last: bool = False,
    runtime: Runtime | None = None,
) -> TrainLoader:
    return TrainLoader(
        store=prepared.train,
        pipeline=pipeline(augment),
        batch_size=batch_size,
        drop_last=drop_last,
        seed=7,
        runtime=runtime or setup("cpu", "fp32"),
    )


def test_an_epoch_shows_every_image_once_and_another_epoch_in_another_order(tiny: Dataset) -> None:
    prepared = prepare(DataConfig(val=0), tiny)
    epochs = [torch.cat([b.images for b in loader(prepared).epoch(e)]) for e in (1, 2)]
    flat = [sorted(map(tuple, e.flatten(1).tolist())) for e in epochs]
    assert len(flat[0]) == 60
    assert flat[0] == flat[1]
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize(
    "augment", [(), ("crop:1", "flip", "cutout:3"), ("color", "erase"), ("flip", "mixup"), ("cutmix",)]
)
def test_memory_mode_and_workers_do_not_change_a_bit(tiny: Dataset, augment: tuple[str, ...]) -> None:
    runs = [
        list(loader(prepare(DataConfig(memory=memory, workers=workers, size=16), tiny), augment).epoch(3))
        for memory, workers in (("resident", None), ("stream", 1), ("stream", 5))
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert a.weight == b.weight


def test_photographs_keep_a_margin_for_zoom_and_stream_to_the_same_bits(photos: Callable[..., Path]) -> None:
    dataset = sources.load(str(photos({"ant": 12, "bee": 12}, size=(90, 120))))
    config = DataConfig(size=70, augment=("zoom", "flip"), val=0.2)
    resident, stream = (prepare(config.model_copy(update={"memory": m}), dataset) for m in ("resident", "stream"))
    assert resident.preprocess.resize == 80
    assert resident.preprocess == stream.preprocess
    a, b = (list(loader(p, ("zoom", "flip"), batch_size=4).epoch(1)) for p in (resident, stream))
    assert all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
    assert a[0].images.shape == (4, 3, 70, 70)


def test_streaming_leaves_no_other_thread_with_fewer_threads_of_pytorch(tiny: Dataset) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        list(loader(prepare(DataConfig(memory="stream", workers=2, val=0), tiny)).epoch(1))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_starting_inside_an_epoch_gives_the_rest_of_it(tiny: Dataset) -> None:
    whole = list(loader(prepare(DataConfig(), tiny), ("crop:1", "flip")).epoch(2))
    rest = list(loader(prepare(DataConfig(), tiny), ("crop:1", "flip")).epoch(2, start=2))
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))


def test_processes_share_every_batch(tiny: Dataset) -> None:
    prepared, base = prepare(DataConfig(val=0), tiny), setup("cpu", "fp32")
    alone = list(loader(prepared, ("crop:1",)).epoch(1))
    ranks = [
        list(loader(prepared, ("crop:1",), runtime=replace(base, rank=r, world_size=3)).epoch(1)) for r in range(3)
    ]
    for step, batch in enumerate(alone):
        parts: list[Batch] = [ranks[r][step] for r in range(3)]
        assert {p.size for p in parts} == {batch.size} == {len(batch.labels)}
        for r, part in enumerate(parts):
            assert torch.equal(part.images, batch.images[r::3])


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "steps"), [(16, False, 4), (16, True, 3), (60, True, 1), (100, True, 1), (59, False, 1)]
)
def test_the_last_batch(tiny: Dataset, batch_size: int, drop_last: bool, steps: int) -> None:
    prepared = prepare(DataConfig(val=0), tiny)
    batches = list(loader(prepared, batch_size=batch_size, drop_last=drop_last).epoch(1))
    assert len(batches) == steps  # 59: batch norm cannot train on the single image that is left


def test_statistics_are_those_of_the_training_images(tiny: Dataset) -> None:
    prepared = prepare(DataConfig(val=0), tiny)
    pixels = np.stack([tiny.train.images[i] for i in range(60)]) / 255
    np.testing.assert_allclose(prepared.preprocess.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(prepared.preprocess.std, pixels.std((0, 1, 2)), rtol=1e-6)
    batch = torch.cat([b.images for b in loader(prepared).epoch(1)])
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert (batch.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_a_channel_that_does_not_vary_deviates_by_one_value() -> None:
    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    pixels[..., 0] = 200
    flat = replace(colours(6, seed=0), images=ArrayImages(pixels, "flat"))
    _, mean, std = read(flat, Preprocess(size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3), DataConfig(), "x")
    assert mean == pytest.approx((200 / 255, 0, 0))
    assert std == pytest.approx((1 / 255,) * 3)


def test_what_is_covered_has_the_value_nearest_to_the_mean_colour(tiny: Dataset) -> None:
    prepared = prepare(DataConfig(val=0, normalize="half"), tiny)
    covered = next(iter(loader(prepared, ("cutout:16",)).epoch(1))).images
    assert torch.allclose(covered, torch.tensor((128 / 255 - 0.5) / 0.5))


def test_validation_is_held_back_stratified_and_disjoint(tiny: Dataset) -> None:
    prepared = prepare(DataConfig(val=0.2), tiny)
    assert prepared.val is not None
    train, val = prepared.train.split, prepared.val.split
    assert len(train) == 48
    assert np.bincount(val.labels).tolist() == [4, 4, 4]
    seen = {train.images[i].tobytes() for i in range(len(train))}
    assert not any(val.images[i].tobytes() in seen for i in range(len(val)))
    assert any("held back" in note for note in prepared.notes)


def test_the_datas_own_validation_split_is_used_whole(tiny: Dataset) -> None:
    own = replace(tiny, val=colours(9, seed=5))
    prepared = prepare(DataConfig(val=0.2), own)
    assert prepared.val is not None
    assert (len(prepared.train), len(prepared.val)) == (60, 9)
    assert prepare(DataConfig(val=0), own).val is None


def test_limit_takes_equal_shares(tiny: Dataset) -> None:
    prepared = prepare(DataConfig(val=0, limit=15), tiny)
    assert np.bincount(prepared.train.split.labels).tolist() == [5, 5, 5]


def test_the_split_seed_says_which_test_images_a_limit_takes(tiny: Dataset) -> None:
    def taken(seed: int) -> list[str]:
        part = module.test_split(DataConfig(limit_test=9, split_seed=seed), tiny)
        assert part is not None
        return [part.images.name(i) for i in range(len(part))]

    assert len(taken(1)) == 9
    assert taken(1) == taken(1) != taken(2)


def test_the_typical_shape_is_the_median_of_heights_and_of_widths(photos: Callable[..., Path]) -> None:
    for name, size in {"ant": (20, 30), "bee": (24, 28), "wasp": (400, 20)}.items():
        root = photos({name: 4}, size=size)
    assert typical_shape(sources.load(str(root)).train) == (24, 28)


def test_evaluation_goes_through_in_order(tiny: Dataset) -> None:
    prepared = prepare(DataConfig(val=0), tiny)
    batches = list(EvalLoader(store=prepared.train, batch_size=7, runtime=setup("cpu", "fp32")))
    expected = prepared.preprocess([tiny.train.images[i] for i in range(60)])
    assert torch.equal(torch.cat(batches), expected)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_process_that_there_is_no_image_for_gets_an_empty_batch(
    tiny: Dataset, memory: Literal["resident", "stream"]
) -> None:
    store = prepare(DataConfig(val=0.05, memory=memory), tiny).val
    assert store is not None and len(store) == 3
    ranks = [replace(setup("cpu", "fp32"), rank=rank, world_size=4) for rank in range(4)]
    found = [list(EvalLoader(store=store, batch_size=7, runtime=one)) for one in ranks]
    assert [[len(images) for images in batches] for batches in found] == [[1], [1], [1], [0]]
    assert found[3][0].shape[1:] == found[0][0].shape[1:]


def test_broken_images_are_refused_by_name_or_left_out_when_asked(photos: Callable[..., Path]) -> None:
    root = photos({"ant": 10, "bee": 10})
    (root / "ant" / "000.png").write_bytes((root / "ant" / "000.png").read_bytes()[:60])
    (root / "bee" / "001.png").write_bytes(b"")
    dataset = sources.load(str(root))
    with pytest.raises(ResNetLabError, match="--skip-broken") as raised:
        prepare(DataConfig(), dataset)
    assert str(raised.value).startswith("2 of 20 images cannot be read")
    assert "000.png" in str(raised.value) and "001.png" in str(raised.value)
    prepared = prepare(DataConfig(skip_broken=True), dataset)
    assert any("Left out" in note and "000.png" in note and "001.png" in note for note in prepared.notes)


def test_broken_images_of_all_splits_are_refused_together(photos: Callable[..., Path]) -> None:
    for split in ("train", "val", "test"):
        root = photos({"ant": 4, "bee": 4}, root=f"set/{split}").parent
        (root / split / "bee" / "002.png").write_bytes(b"")
    with pytest.raises(ResNetLabError, match=r"^3 of 24 images cannot be read[^$]*--skip-broken") as raised:
        prepare(DataConfig(), sources.load(str(root)))
    assert all(f"{split}/bee/002.png" in str(raised.value) for split in ("train", "val", "test"))


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_resume_meets_the_same_mixed_batches(tiny: Dataset, mix: str) -> None:
    config = DataConfig(val=0, augment=("flip", "crop:1", mix))
    batches = loader(prepare(config, tiny), batch_size=16, augment=config.augment)
    whole = list(batches.epoch(3))
    assert len({batch.weight for batch in whole}) > 1
    for start in range(1, 4):
        for before, after in zip(whole[start:], batches.epoch(3, start=start), strict=True):
            assert torch.equal(before.images, after.images)
            assert torch.equal(before.labels, after.labels)
            assert before.weight == after.weight


def jpegs(folder: Path, *, large: bool = True) -> Dataset:
    """Write and read smooth photographs of two classes, the same in train and test."""
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for index in range(12):
            coarse = Image.fromarray(chance.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            place = folder / split / "ab"[index % 2] / f"{index}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((240, 200) if large else (60, 50), Image.Resampling.BICUBIC).save(place, quality=92)
    return sources.load(str(folder))


def test_large_training_jpegs_are_decoded_smaller_with_nearly_the_same_pixels(tmp_path: Path) -> None:
    data = jpegs(tmp_path / "large")
    whole = prepare(DataConfig(val=0, size=32, reduced=False), data)
    reduced = prepare(DataConfig(val=0, size=32), data)
    assert whole.train.pixels is not None and reduced.train.pixels is not None
    difference = (whole.train.pixels.float() - reduced.train.pixels.float()).abs()
    assert 0 < difference.mean() < 1 and difference.max() <= 8  # of 255
    assert any("data.reduced=false" in note for note in reduced.notes)
    assert not any("data.reduced" in note for note in whole.notes)


def test_small_training_jpegs_and_all_that_is_scored_are_decoded_whole(tmp_path: Path) -> None:
    small = jpegs(tmp_path / "small", large=False)
    pixels = [prepare(DataConfig(val=0, size=32, reduced=r), small).train.pixels for r in (False, True)]
    assert pixels[0] is not None and pixels[1] is not None and torch.equal(pixels[0], pixels[1])
    large = jpegs(tmp_path / "large")
    prepared = prepare(DataConfig(val=0.25, size=32), large)
    assert prepared.val is not None and prepared.val.at_least is None
    assert large.test is not None and read(large.test, prepared.preprocess, DataConfig(), "x")[0].at_least is None


def test_streamed_jpegs_are_those_held_in_memory_bit_for_bit(tmp_path: Path) -> None:
    data = jpegs(tmp_path)
    kinds = (("resident", None), ("stream", 1), ("stream", 3))
    held, *streamed = (
        [b.images for b in loader(prepare(DataConfig(val=0, size=32, memory=m, workers=w), data)).epoch(2)]
        for m, w in kinds
    )
    for batches in streamed:
        assert all(torch.equal(a, b) for a, b in zip(held, batches, strict=True))


def test_under_torchrun_a_process_decodes_with_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert module._decoders() == torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert module._decoders() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert module._decoders() == 1
