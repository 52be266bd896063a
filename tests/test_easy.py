"""Leaving out the easiest images: who, when, and that a stop loses nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from resnetlab import training
from resnetlab.config import DataConfig, ModelConfig, OptimConfig, Recipe
from resnetlab.easy import Easy
from resnetlab.loader import prepare
from resnetlab.metrics import StepRecord
from resnetlab.runtime import setup
from resnetlab.sources.dataset import Dataset
from resnetlab.training import EpochEnd, Training


def easy(share: float = 0.5) -> Easy:
    found = Easy.of(8, share, epochs=4)
    found.note(torch.arange(8), torch.tensor([0.8, 0.1, 0.7, 0.2, 0.6, 0.3, 0.5, 0.4]), epoch=2)
    return found


def rest(found: Easy, batch: list[int], epoch: int) -> list[int]:
    return found.rest(torch.tensor(batch), epoch).tolist()


def test_the_smallest_losses_of_the_batch_are_left_out_in_the_second_half() -> None:
    assert rest(easy(), [7, 6, 5, 4, 3, 2, 1, 0], 3) == [6, 4, 2, 0]
    assert rest(easy(0.25), [0, 2, 4, 6], 3) == [0, 2, 4]
    assert rest(easy(), [7, 6, 5, 4], 2) == [7, 6, 5, 4]


def test_in_a_first_epoch_nothing_is_left_out() -> None:
    assert rest(Easy.of(8, 0.5, epochs=1), list(range(8)), 1) == list(range(8))


def test_nobody_is_left_out_twice_running() -> None:
    found = easy()
    stayed = found.rest(torch.arange(8), 3)
    found.note(stayed, torch.zeros(4), 3)
    assert rest(found, list(range(8)), 4) == [1, 3, 5, 7], "those left out before, although the others cost nothing now"


def test_what_is_left_does_not_depend_on_how_much_of_the_epoch_is_done() -> None:
    found = easy()
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])
    before = found.rest(second, 3)
    found.note(found.rest(first, 3), torch.tensor([9.0, 9.0]), 3)
    assert torch.equal(found.rest(second, 3), before)


def start(dataset: Dataset, batch_size: int = 16, **changes: Any) -> Training:
    chosen = Recipe(
        name="test",
        model=ModelConfig(name="resnet20", num_classes=3, image_size=8),
        data=DataConfig(augment=("crop:1", "flip"), val=0.2, **changes),
        optim=OptimConfig(lr=0.05, momentum=0.9),
        epochs=4,
        batch_size=batch_size,
        seed=3,
    )
    return training.start(chosen, prepare(chosen.data, dataset), setup("cpu", "fp32"))


def test_steps_stay_and_images_become_fewer(tiny: Dataset) -> None:
    steps = [event for event in training.run(start(tiny, skip_easy=0.25)) if isinstance(event, StepRecord)]
    assert [s.images for s in steps] == [16, 32, 48] * 2 + [12, 24, 36] * 2


def test_a_batch_that_would_become_too_small_for_batch_norm_stays_whole(tiny: Dataset) -> None:
    steps = [e for e in training.run(start(tiny, batch_size=15, skip_easy=0.5)) if isinstance(e, StepRecord)]
    assert [s.images for s in steps[8:12]] == [7, 14, 21, 24], "the last three of 48 images stay three"


def weights(t: Training) -> dict[str, Tensor]:
    return t.result.state_dict()


@pytest.mark.parametrize("stop_after", [2, 6, 7, 8, 9, 11])
def test_stopped_anywhere_and_restored_it_ends_bit_for_bit_the_same(tiny: Dataset, stop_after: int) -> None:
    whole, t, again = (start(tiny, skip_easy=0.5) for _ in range(3))
    for event in training.run(t):
        if t.step >= stop_after and isinstance(event, StepRecord):
            break
    training.restore(again, training.checkpoint(t))
    ends = [[e.record for e in training.run(run) if isinstance(e, EpochEnd)] for run in (whole, again)]
    assert ends[0][-1] == ends[1][-1]
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())


def test_an_image_that_showed_another_is_not_known_to_be_easy() -> None:
    found = easy()
    found.loss[[1, 3]] = torch.inf  # of two mixed images these had the smaller share
    assert rest(found, [0, 1, 2, 3], 3) == [1, 3]
    found.loss[:] = torch.inf
    assert rest(found, [0, 1, 2, 3], 3) == [0, 1, 2, 3]
