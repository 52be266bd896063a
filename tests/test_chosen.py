"""Which images `evaluate` scores: the run's own split wherever its data lies, and what is said where that is unsure."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resnetlab import api, chosen, moved
from resnetlab.console import Quiet
from resnetlab.errors import ResNetLabError
from resnetlab.sources.dataset import Dataset

Photos = Callable[..., Path]


@pytest.fixture
def trained(command: Any, photos: Photos, tmp_path: Path) -> tuple[Path, Path]:
    """A run, and the folder of class folders that it was trained on."""
    data = photos({"ant": 20, "bee": 20, "cat": 20})
    assert command("train", data, "--out", tmp_path / "run", "epochs=1", "--model", "linear")[0] == 0
    return tmp_path / "run", data


def scored(run: Path, data: Path | None, split: str = "auto") -> tuple[set[str], tuple[str, ...]]:
    """Return the names of the images that would be scored, from their class folders on, and the notes."""
    found = chosen.choose(api.load(run).bundle, str(run), None if data is None else str(data), split)
    return {"/".join(Path(name).parts[-2:]) for name in moved.names(found.split)}, found.notes


def test_data_that_moved_is_divided_as_the_run_divided_it(command: Any, trained: tuple[Path, Path]) -> None:
    run, data = trained
    recorded = json.loads((run / "scores.json").read_text())
    before = {split: scored(run, None, split)[0] for split in ("train", "val", "test")}
    data.rename(data.with_name("elsewhere"))
    for split, expected in before.items():
        names, notes = scored(run, data.with_name("elsewhere"), split)
        assert names == expected
        assert len(notes) == 1 and "as the run divided it" in notes[0]
    status, out, err = command("evaluate", run, data.with_name("elsewhere"), "--json")
    assert status == 0
    assert json.loads(out)["confusion"] == recorded["test"]["confusion"]
    assert "6 images are scored" in err
    assert "--split all" in err
    assert json.loads(command("evaluate", run, data.with_name("elsewhere"), "--json", "--split", "all")[1])["n"] == 60


def test_a_copy_with_a_few_images_more_still_gives_the_same_split(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    shutil.copytree(data, tmp_path / "copy")
    shutil.copy(data / "ant" / "000.png", tmp_path / "copy" / "ant" / "new.png")
    assert scored(run, tmp_path / "copy")[0] == scored(run, None)[0]


def test_training_does_not_go_on_where_an_image_has_another_name(photos: Any, tmp_path: Path) -> None:
    """As many images, but the drawn splits would be others: what was trained on would be scored."""
    here = photos({"a": 20, "b": 20})
    run = api.train(str(here), model="linear", out=tmp_path / "run", epochs=1, display=Quiet())
    api.resume(run.path, display=Quiet())
    (here / "a" / "000.png").rename(here / "a" / "zzz.png")
    with pytest.raises(ResNetLabError, match=r"was trained on it: .*zzz\.png is new\."):
        api.resume(run.path, display=Quiet())


def test_own_data_that_grew_does_not_move_training_images_into_the_test_split(
    trained: tuple[Path, Path],
) -> None:
    run, data = trained
    before, silent = scored(run, None)
    assert silent == ()
    for i in range(7):
        shutil.copy(data / "ant" / "000.png", data / "ant" / f"new{i}.png")
    now, notes = scored(run, None)
    assert now == before
    assert "has changed since the run" in notes[0]


def test_training_images_among_others_are_counted_and_said(trained: tuple[Path, Path]) -> None:
    run, data = trained
    (data / "cat" / "019.png").unlink()
    elsewhere = data.rename(data.with_name("elsewhere"))
    names, notes = scored(run, elsewhere)
    assert len(names) == 59
    assert len(notes) == 1 and "of the 59 images scored are named as images that the network was trained on" in notes[0]


def test_the_folder_of_a_split_is_known_to_be_trained_on(
    photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photos({"train/ant": 20, "train/bee": 20, "test/ant": 9, "test/bee": 9})
    run = api.train(str(data), model="linear", out=tmp_path / "run", epochs=1, display=Quiet()).path
    shutil.copytree(data, tmp_path / "copy")
    monkeypatch.chdir(data)
    for place in (data, tmp_path / "copy", Path()):
        names, notes = scored(run, place / "train")
        assert len(names) == 40 and len(notes) == 1 and "36 of the 40 images scored are named as images" in notes[0]
        assert [len(found) for found in scored(run, place / "test")] == [18, 0]


def test_own_data_that_shrank_says_that_its_splits_are_gone(trained: tuple[Path, Path]) -> None:
    run, data = trained
    for image in (data / "ant").glob("00*.png"):
        image.unlink()
    _, notes = scored(run, None)
    assert "images of its splits are gone" in notes[0]


def test_other_data_is_taken_as_it_is(trained: tuple[Path, Path], photos: Photos) -> None:
    run, _ = trained
    other = photos({"ant": 4, "bee": 4}, root="other")
    for image in other.glob("*/*.png"):
        image.rename(image.with_stem(f"other {image.stem}"))
    names, notes = scored(run, other)
    assert (len(names), notes) == (8, ())
    assert scored(run, other, "all")[0] == names


def test_a_test_table_is_not_taken_for_training_images_where_both_files_have_one_name(tmp_path: Path) -> None:
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for split, count in (("train", 60), ("test", 12)):
        images = []
        for pixels in rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8):
            Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
            images.append(stream.getvalue())
        (data / split).mkdir(parents=True)
        labels = [i % 2 for i in range(count)]
        pq.write_table(pa.table({"image": images, "label": labels}), data / split / "0000.parquet")
    run = api.train(str(data), model="linear", out=tmp_path / "run", epochs=1, display=Quiet()).path
    data.rename(tmp_path / "moved")
    found = chosen.choose(api.load(run).bundle, str(run), str(tmp_path / "moved"), "auto")
    assert moved.names(found.split) == [f"test/0000.parquet row {i}" for i in range(12)]
    assert len(found.notes) == 1 and "as the run divided it" in found.notes[0]


def test_a_bundle_alone_knows_no_names(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "model.safetensors", alone)
    data.rename(data.with_name("elsewhere"))
    assert len(scored(alone / "model.safetensors", data.with_name("elsewhere"))[0]) == 60


def test_names_are_compared_below_their_common_folder(tiny: Dataset) -> None:
    names = {split: moved.names(getattr(tiny, split)) for split in ("train", "test")}
    assert moved.recognise({}, tiny).splits == {}
    assert set(moved.recognise({"test": names["test"]}, tiny).splits) == {"test"}
    assert moved.recognise({"test": [*names["test"], "one more"]}, tiny).splits == {}
