"""What DATA can be, what is noticed about it, and how it is split."""

import codecs
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resnetlab import moved, sources
from resnetlab.errors import ResNetLabError
from resnetlab.files import locked
from resnetlab.sources import cifar, download, load, samples, survey
from resnetlab.sources.splits import hold_out, subset


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the real machine is found, and nothing is reached but this machine."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("RESNETLAB_DATA", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RESNETLAB_MIRROR", "http://127.0.0.1:9")
    monkeypatch.chdir(home)
    return home


def png(value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value % 256, value // 256, 9)).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            start += 1
            (root / name / f"{i}.png").write_bytes(png(start))
    return root


def counts(split: Any) -> dict[str, int]:
    return dict(zip(split.classes, np.bincount(split.labels, minlength=len(split.classes)).tolist(), strict=True))


def listing(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in [root, *root.rglob("*")])


# Folders


def test_a_flat_folder_is_split_by_seed(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"dog": 30, "cat": 20})
    before = listing(root)
    dataset = load(str(root))
    assert dataset.name == "pets" and dataset.origin == str(root)
    assert dataset.train.classes == ("cat", "dog") and dataset.val is None and dataset.test is not None
    assert counts(dataset.test) == {"cat": 2, "dog": 3} and counts(dataset.train) == {"cat": 18, "dog": 27}
    assert "5 of 50 images" in dataset.notes[-1] and "seed 0" in dataset.notes[-1]
    names = [dataset.test.images.name(i) for i in range(5)]
    np.random.seed(1)
    again, other = load(str(root)).test, load(str(root), split_seed=1).test
    assert again is not None and [again.images.name(i) for i in range(5)] == names
    assert other is not None and [other.images.name(i) for i in range(5)] != names
    survey(dataset)
    assert listing(root) == before, "the user's folder is never written to"


def test_split_folders_and_nested_ones(tmp_path: Path) -> None:
    root = folder(tmp_path, {"Train/a": 3, "Train/a/deep/deeper": 2, "Train/b": 2, "VALID/a": 1, "VALID/b": 1})
    folder(root, {"testing/b": 2, "extra": 1})
    dataset = load(str(root))
    assert dataset.val and dataset.test
    assert counts(dataset.train) == {"a": 5, "b": 2}
    assert counts(dataset.val) == {"a": 1, "b": 1} and counts(dataset.test) == {"a": 0, "b": 2}
    assert any("test has no images" in note and '"a"' in note for note in dataset.notes)


def test_a_class_that_val_lacks_shifts_no_other(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "val/a": 1, "val/c": 1, "val/b": 0})
    dataset = load(str(root))
    assert dataset.val and dataset.val.labels.tolist() == [0, 2] and dataset.test is None
    assert any("val" in note and '"b"' in note for note in dataset.notes)
    assert any("no test split" in note for note in dataset.notes)
    folder(root, {"val/zebra": 1})
    with pytest.raises(ResNetLabError, match='"zebra"'):
        load(str(root))


def test_what_is_no_class_and_no_image_is_passed_over_and_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 3, "b": 3, ".ipynb_checkpoints": 1, "__MACOSX": 1, "a/.hidden": 2, "empty": 0})
    for name in ("stray.png", "a/._0.png", "a/.DS_Store", "a/Thumbs.db", "a/desktop.ini", "a/x.txt", "b/noextension"):
        (root / name).write_bytes(b"x")
    (root / "b/UPPER.JPEG").write_bytes(png(77))
    (root / "b/new.jfif").write_bytes(png(78))
    dataset = load(str(root))
    assert len(dataset.train) + len(dataset.test or ()) == 8 and dataset.train.classes == ("a", "b")
    text = " ".join(dataset.notes)
    assert '"empty"' in text
    assert "2 × file of another kind" in text and "1 × file outside the class folders" in text
    assert "7 × hidden or system" in text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX links and pipes")
def test_links_pipes_and_loops(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 5, "b": 5})
    elsewhere = folder(tmp_path / "elsewhere", {"c": 4})
    (root / "c").symlink_to(elsewhere / "c")
    (root / "a/loop").symlink_to(".")
    (root / "a/up").symlink_to("..")
    (root / "a/other").symlink_to("../b")
    (root / "a/broken.png").symlink_to("gone.png")
    (root / "a/self.png").symlink_to("self.png")
    (root / "a/twin.png").symlink_to("0.png")
    os.link(root / "b/0.png", root / "b/hard.png")
    os.mkfifo(root / "a/pipe.png")
    dataset = load(str(root))
    assert dataset.test
    assert {k: v + counts(dataset.test)[k] for k, v in counts(dataset.train).items()} == {"a": 5, "b": 5, "c": 4}
    text = dataset.notes[0]
    assert "2 × broken link" in text and "2 × second link" in text and "1 × pipe" in text and "3 × link to a f" in text


def test_names_in_every_script(tmp_path: Path) -> None:
    names = ["café", "собака", "猫", "🐱 with spaces", "قطة", "-rf"]
    root = folder(tmp_path, dict.fromkeys(names, 2))
    folder(root, {unicodedata.normalize("NFD", "café"): 2}, 50)
    os.mkdir(os.fsencode(root) + b"/b\xff")
    Path(os.fsdecode(os.fsencode(root) + b"/b\xff/1\xfe.png")).write_bytes(png(99))
    Path(os.fsdecode(os.fsencode(root) + b"/b\xff/2.png")).write_bytes(png(98))
    dataset = load(str(root))
    assert set(dataset.train.classes) == {*names, "b\\xff"}
    assert counts(dataset.train)["café"] == 3, "the two Unicode forms are one class"
    json.dumps(survey(dataset).to_dict()).encode()
    assert dataset.train.classes == tuple(sorted(dataset.train.classes))


def test_train_as_a_class_of_vehicles(tmp_path: Path) -> None:
    assert load(str(folder(tmp_path, {"car": 2, "plane": 2, "train": 2}))).train.classes == ("car", "plane", "train")


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({}, "no images in class folders"),
        ({"a": 0, "b": 0}, "no images in class folders"),
        ({"only": 3}, "one class only"),
        ({"train/a": 2, "training/a": 2}, "same split"),
        ({"test/a": 2, "val/b": 2}, 'no "train" folder'),
        ({"a": 2, "b": 1}, 'Class "b" has 1 image'),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, made: dict[str, int], match: str) -> None:
    with pytest.raises(ResNetLabError, match=match):
        load(str(folder(tmp_path, made)))


def test_data_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "flowers", {"a": 2, "b": 2})
    with pytest.raises(ResNetLabError, match='Did you mean "cifar10"') as caught:
        load("cifar-1o")
    assert all(name in str(caught.value) for name in sources.SOURCES)
    with pytest.raises(ResNetLabError, match='Did you mean "flowers"'):
        monkeypatch.chdir(tmp_path)
        load("flovers")
    for name in ("a.txt", "a.png"):
        (tmp_path / name).write_bytes(b"hello")
        with pytest.raises(ResNetLabError, match="not a data set"):
            load(str(tmp_path / name))
    with pytest.raises(ResNetLabError, match="neither a file nor a folder"):
        load(os.devnull)
    with pytest.raises(ResNetLabError):
        load("")


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 0, "b": 0})
    for i in range(10):
        (root / "ab"[i % 2] / f"{i}.png").write_bytes(png(i, mode="L"))
    dataset = load(str(root))
    assert dataset.channels == 1 and dataset.train.images[0].shape == (6, 6, 1)
    (root / "a" / "colour.png").write_bytes(png(1))
    dataset = load(str(root))
    assert dataset.channels == 3 and dataset.train.images[0].shape == (6, 6, 3)


# Splits


def test_hold_out_is_stratified_and_decided_by_the_seed() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [2, 3, 40, 500]))
    kept, held = hold_out(labels, 0.1, 7)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    assert np.bincount(labels[held]).tolist() == [1, 1, 4, 0, 50]
    np.random.seed(3)
    assert np.array_equal(hold_out(labels, 0.1, 7)[1], held) and not np.array_equal(hold_out(labels, 0.1, 8)[1], held)
    assert np.bincount(labels[hold_out(labels, 0.999, 0)[0]]).min(where=np.arange(5) != 3, initial=9) == 1
    assert len(hold_out(labels, 0, 0)[1]) == 0 and len(hold_out(labels, 0, 0)[0]) == len(labels)
    with pytest.raises(ResNetLabError, match=r'"rare" has 1 image.*test/ folders\.$'):
        hold_out(np.array([0, 0, 1]), 0.1, 0, ("often", "rare"))


def test_subset_draws_equal_shares() -> None:
    labels = np.repeat([0, 1, 2], [3, 50, 50])
    for limit, wanted in [(9, [3, 3, 3]), (23, [3, 10, 10]), (200, [3, 50, 50])]:
        rows = subset(labels, limit, 0)
        assert np.bincount(labels[rows]).tolist() == wanted and len(set(rows)) == len(rows)
    assert sorted(np.bincount(labels[subset(labels, 2, 0)], minlength=3)) == [0, 1, 1]
    assert np.array_equal(subset(labels, 9, 1), subset(labels, 9, 1))
    assert not np.array_equal(subset(labels, 9, 1), subset(labels, 9, 2))


# Parquet


def parquet(path: Path, images: list[Any], labels: list[Any], names: list[str] | None = None, **columns: str) -> Path:
    image, label = columns.get("image", "image"), columns.get("label", "label")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.array([i if i is None else {"bytes": i, "path": None} for i in images], kind)
    table = pa.table({image: rows, label: pa.array(labels, None if labels else pa.int64())})
    if names:
        features = {label: {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


PNGS = [png(i) for i in range(20)]
HALVES = [i % 2 for i in range(20)]


def test_parquet_splits_by_name_and_classes_from_the_schema(tmp_path: Path) -> None:
    names = ["cat", "dog"]
    parquet(tmp_path / "data/train-00000-of-00002.parquet", PNGS, HALVES, names, image="img", label="fine_label")
    parquet(tmp_path / "data/train-00001-of-00002.parquet", PNGS, HALVES, names, image="img", label="fine_label")
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", PNGS, HALVES, names, image="img", label="fine_label")
    parquet(tmp_path / "data/test-00000-of-00001.parquet", PNGS[:3], [-1] * 3, names, image="img", label="fine_label")
    dataset = load(str(tmp_path))
    assert dataset.val and dataset.test is None and len(dataset.train) == 40 and len(dataset.val) == 20
    assert dataset.train.classes == ("cat", "dog") and "no labels" in " ".join(dataset.notes)
    assert dataset.train.images.name(21) == "train-00001-of-00002.parquet row 1"
    assert dataset.train.images[21].shape == (6, 6, 3)
    assert dataset.train.select([21, 0]).images.name(0) == "train-00001-of-00002.parquet row 1"


def test_parquet_of_other_shapes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"data": pa.array(PNGS), "kind": ["x", "y"] * 10}), tmp_path / "one.parquet")
    dataset = load(str(tmp_path / "one.parquet"))
    assert dataset.train.classes == ("x", "y") and dataset.test and len(dataset.test) == 2
    parquet(tmp_path / "n/train.parquet", PNGS, HALVES)
    parquet(tmp_path / "n/test.parquet", PNGS, [1] * 20)
    assert load(str(tmp_path / "n")).train.classes == ("0", "1")
    parquet(tmp_path / "m/train.parquet", PNGS, HALVES, ["cat", "dog"])
    parquet(tmp_path / "m/test.parquet", PNGS, HALVES, ["dog", "cat"])
    swapped = load(str(tmp_path / "m")).test
    assert swapped and swapped.labels.tolist() == [1 - i for i in HALVES], "matched by name"


def test_parquet_with_a_dictionary_of_labels(tmp_path: Path) -> None:
    for values, classes in ((["x", "y"], ("x", "y")), ([0, 1], ("0", "1"))):
        column = pa.array(values * 10).dictionary_encode()
        pq.write_table(pa.table({"image": PNGS, "label": column}), tmp_path / "one.parquet")
        assert load(str(tmp_path / "one.parquet")).train.classes == classes


def test_a_parquet_split_without_rows_is_left_out(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", PNGS, HALVES)
    parquet(tmp_path / "test.parquet", [], [])
    assert "test has no rows and is left out." in load(str(tmp_path)).notes


def test_two_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    """ImageNet's crane is a bird and a machine."""
    names, thirds = ["crane", "dog", "crane"], [i % 3 for i in range(20)]
    parquet(tmp_path / "train.parquet", PNGS, thirds, names)
    parquet(tmp_path / "test.parquet", PNGS, thirds, names)
    dataset = load(str(tmp_path))
    assert dataset.train.classes == tuple(names) and dataset.train.labels.tolist() == thirds
    assert dataset.test and dataset.test.labels.tolist() == thirds
    for train, test in ((names, ["dog", "crane"]), (["dog", "crane"], names)):
        parquet(tmp_path / "train.parquet", PNGS, [i % len(train) for i in range(20)], train)
        parquet(tmp_path / "test.parquet", PNGS, [i % len(test) for i in range(20)], test)
        with pytest.raises(ResNetLabError, match=r'Two classes are called "crane".*test.*the same list'):
            load(str(tmp_path))


@pytest.mark.parametrize("name", ["pets_{}", "pets-{}-00000-of-00001", "{}.v2", "{}ing", "my.{}"])
def test_parquet_whose_names_say_the_split_anywhere(tmp_path: Path, name: str) -> None:
    parquet(tmp_path / f"{name.format('train')}.parquet", PNGS, HALVES)
    parquet(tmp_path / f"{name.format('test')}.parquet", PNGS[:4], HALVES[:4])
    parquet(tmp_path / "latest_contest.parquet", PNGS[:2], HALVES[:2])  # "test" is only a part of these words
    parquet(tmp_path / "speed-test/part-0.parquet", PNGS[:2], HALVES[:2])  # of a folder only its whole name counts
    with pytest.raises(ResNetLabError, match="train files lie in several folders"):
        load(str(tmp_path))
    (tmp_path / "speed-test/part-0.parquet").unlink()
    dataset = load(str(tmp_path))
    assert dataset.test and len(dataset.test) == 4 and len(dataset.train) == 22


def test_images_of_two_parquet_files_of_one_name_have_names_of_their_own(tmp_path: Path) -> None:
    """As Hugging Face's own conversion writes them."""
    parquet(tmp_path / "train/0000.parquet", PNGS, HALVES)
    parquet(tmp_path / "test/0000.parquet", PNGS, HALVES)
    dataset = load(str(tmp_path))
    assert dataset.test and not set(moved.names(dataset.train)) & set(moved.names(dataset.test))
    assert dataset.test.images.name(3) == "test/0000.parquet row 3"


def test_parquet_in_the_folder_of_a_configuration(tmp_path: Path) -> None:
    """Hugging Face's conversion has a folder for each, above those of the splits."""
    parquet(tmp_path / "default/train/0000.parquet", PNGS, HALVES)
    parquet(tmp_path / "default/test/0000.parquet", PNGS[:4], HALVES[:4])
    dataset = load(str(tmp_path))
    assert dataset.test and (len(dataset.train), len(dataset.test)) == (20, 4)
    parquet(tmp_path / "other/train/0000.parquet", PNGS, HALVES)
    with pytest.raises(ResNetLabError, match=r"several folders.*default/train, .*other/train\. Name one"):
        load(str(tmp_path))


@pytest.mark.parametrize("stray", ["._train.parquet", "__MACOSX/._train.parquet", ".ipynb_checkpoints/train.parquet"])
def test_system_files_beside_parquet_are_passed_over(tmp_path: Path, stray: str) -> None:
    for path in (tmp_path / "table" / stray, folder(tmp_path / "images", {"a": 10, "b": 10}) / stray):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7 Mac OS X")
    parquet(tmp_path / "table/train.parquet", PNGS, HALVES)
    parquet(tmp_path / "table/test.parquet", PNGS[:4], HALVES[:4])
    dataset = load(str(tmp_path / "table"))
    assert dataset.test and (len(dataset.train), len(dataset.test)) == (20, 4)
    assert load(str(tmp_path / "images")).train.classes == ("a", "b")


def test_parquet_in_folders_that_are_called_as_files(tmp_path: Path) -> None:
    """Spark and Dask write a table so."""
    parquet(tmp_path / "train.parquet/part-0.parquet", PNGS, HALVES)
    parquet(tmp_path / "test.parquet/part-0.parquet", PNGS[:4], HALVES[:4])
    dataset = load(str(tmp_path))
    assert dataset.test and len(dataset.test) == 4 and len(dataset.train) == 20


def test_ten_numbered_classes_are_cifar10s_only_where_the_folder_is_called_so(tmp_path: Path) -> None:
    tens = [i % 10 for i in range(20)]
    places = {"my-cifar10-project/digits": False, "CIFAR-10": True, "cifar10.parquet": True, "cifar10-hf": True}
    for place, taken in {**places, "datasets--uoft-cs--cifar10/snapshots/abc": True}.items():
        path = tmp_path / place
        parquet(path if path.suffix else path / "train.parquet", [png(i, (32, 32)) for i in range(20)], tens)
        assert (load(str(path)).train.classes[0] == "airplane") is taken


def test_a_folder_of_other_images_is_not_taken_for_cifar10(home: Path) -> None:
    pets, small = [f"pet {i}" for i in range(10)], [png(i, (32, 32)) for i in range(20)]
    for images, names in ((PNGS, None), (small, pets)):
        for split in ("train", "test"):
            parquet(home / f"data/cifar10/{split}.parquet", images, [i % 10 for i in range(20)], names)
        with pytest.raises(ResNetLabError, match="not on this machine"):
            load("cifar10")


def test_results_of_a_project_named_after_cifar10_are_not_in_the_way(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNETLAB_DATA", str(tmp_path / "cifar10-project/data"))
    for split in ("train", "test"):
        path = tmp_path / f"cifar10-project/data/results_{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"loss": [1.0]}), path)
    with pytest.raises(ResNetLabError, match="not on this machine"):
        load("cifar10")


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    good = parquet(tmp_path / "good.parquet", PNGS, HALVES).read_bytes()
    cases: list[tuple[Path, str]] = [
        (parquet(tmp_path / "a.parquet", PNGS, [*HALVES[:-1], 7], ["cat", "dog"]), "label 7 is out of range"),
        (parquet(tmp_path / "b.parquet", PNGS, [*HALVES[:-1], -3]), "label -3 is negative"),
        (parquet(tmp_path / "c.parquet", PNGS, [*HALVES[:-1], None]), "1 of 20 rows .* row 19.*--skip-broken"),
        (parquet(tmp_path / "d.parquet", [None, *PNGS[1:]], HALVES), "row 0"),
        (parquet(tmp_path / "e.parquet", PNGS, [i * 1000 for i in HALVES]), "identifiers"),
        (parquet(tmp_path / "f.parquet", PNGS, [0] * 20), "one class only"),
        (parquet(tmp_path / "g/test.parquet", PNGS, HALVES).parent, "none of train"),
    ]
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "h.parquet")
    pq.write_table(pa.table({"image": [b"a"], "score": [1.5]}), tmp_path / "i.parquet")
    cases += [(tmp_path / "h.parquet", "no image column"), (tmp_path / "i.parquet", "no label column")]
    pq.write_table(pa.table({"image": PNGS, "age": HALVES, "species": ["x", "y"] * 10}), tmp_path / "p.parquet")
    cases.append((tmp_path / "p.parquet", 'no label column, or several.*age: int64, species: string.*one "label"'))
    for name, values in (("q", [b"x", b"y"]), ("r", [0.5, 1.5])):
        column = pa.array(values * 10).dictionary_encode()
        pq.write_table(pa.table({"image": PNGS, "label": column}), tmp_path / f"{name}.parquet")
        cases.append((tmp_path / f"{name}.parquet", "no label column.*label: (dictionary|double)"))
    cases.append((parquet(tmp_path / "s.parquet", [], []), "no rows to train on"))
    huge = pa.array([2**63, *HALVES[1:]], pa.uint64())
    pq.write_table(pa.table({"image": PNGS, "label": huge}), tmp_path / "m.parquet")
    cases.append((tmp_path / "m.parquet", "column label.*count the classes"))
    for name, data in [("j", good[: len(good) // 2]), ("k", b""), ("l", b"PAR1" + os.urandom(500) + b"PAR1")]:
        (tmp_path / f"{name}.parquet").write_bytes(data)
        cases.append((tmp_path / f"{name}.parquet", "Cannot read"))
    for path, match in cases:
        with pytest.raises(ResNetLabError, match=match):
            load(str(path))
    for name in ("c", "d"):
        dataset = load(str(tmp_path / f"{name}.parquet"), skip_broken=True)
        assert len(dataset.train) + len(dataset.test or ()) == 19 and "left out" in dataset.notes[0]
    parquet(tmp_path / "o/one/train.parquet", PNGS, HALVES)
    parquet(tmp_path / "o/two/train.parquet", PNGS, HALVES)
    with pytest.raises(ResNetLabError, match="several folders"):
        load(str(tmp_path / "o"))


def test_the_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.environ.get("RESNETLAB_TEST_DATA")
    if not real:
        pytest.skip("RESNETLAB_TEST_DATA names no folder with real data")
    monkeypatch.setenv("RESNETLAB_DATA", f"{real}/data")
    dataset = load("cifar10")
    assert dataset.test and dataset.val is None and dataset.channels == 3 and dataset.mirrors
    assert len(dataset.train) == 50_000 and len(dataset.test) == 10_000
    assert set(counts(dataset.train).values()) == {5000} and set(counts(dataset.test).values()) == {1000}
    assert dataset.train.images[0].shape == (32, 32, 3)
    for split in (dataset.train, dataset.test):
        for row in range(0, len(split), 97):  # the files are called <class>/<number>.jpg
            assert f"({split.classes[split.labels[row]]}/" in split.images.name(row)


# CIFAR's own files


def batch(count: int, labels: list[Any], key: str = "labels", protocol: int = 2, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": data, key.encode(): labels}, protocol=protocol)


def batches(root: Path, protocol: int = 2) -> Path:
    root.mkdir(parents=True)
    for i in range(1, 6):
        (root / f"data_batch_{i}").write_bytes(batch(20, list(range(10)) * 2, protocol=protocol, seed=i))
    (root / "test_batch").write_bytes(batch(10, list(range(10)), protocol=protocol, seed=9))
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=protocol))
    return root


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_original_batches(tmp_path: Path, protocol: int) -> None:
    root = batches(tmp_path / "cifar-10-batches-py", protocol)
    for path in (root, tmp_path):
        dataset = load(str(path))
        assert dataset.name == "cifar10" and dataset.test and len(dataset.train) == 100 and len(dataset.test) == 10
        assert dataset.train.classes[9] == "truck"
    raw = np.random.default_rng(1).integers(0, 256, (20, 3072), dtype=np.uint8)
    assert np.array_equal(dataset.train.images[7], raw[7].reshape(3, 32, 32).transpose(1, 2, 0))
    assert dataset.train.images.name(7) == "train image 7"


def test_batches_as_python_2_wrote_them(tmp_path: Path) -> None:
    """The opcodes of the original files: Python 2 strings, and numpy.core."""
    root = batches(tmp_path / "cifar-10-batches-py")
    pixels = bytes(range(256)) * 12
    data = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c"
        b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + pixels
        + b"tbU\x06labels](K\x05eu."
    )
    (root / "test_batch").write_bytes(data)
    test = load(str(root)).test
    assert test and test.labels.tolist() == [5]
    assert np.array_equal(test.images[0].transpose(2, 0, 1).ravel(), np.frombuffer(pixels, np.uint8))


class _Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_hostile_batches_are_refused_and_do_nothing(tmp_path: Path) -> None:
    root = batches(tmp_path / "b")
    canary = tmp_path / "canary"
    evil = [
        pickle.dumps({b"data": _Touch(canary)}),
        b"c__builtin__\neval\n(Vopen('%s','w')\ntR." % str(canary).encode(),
        b"cbuiltins\nexec\n(Vopen('%s','w')\ntR." % str(canary).encode(),
        b"cnumpy\nload\n(V%s\ntR." % str(canary).encode(),
        b"cnumpy\nndarray\n(K\x01tR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85R.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        pickle.dumps({b"data": np.array([_Touch(canary)], dtype=object), b"labels": [1]}),
        pickle.dumps([1, 2]),
        codecs.encode("not a pickle", "utf-8"),
        b"",
        b"\x80\x02" + os.urandom(300),
    ]
    for data in evil:
        (root / "data_batch_3").write_bytes(data)
        with pytest.raises(ResNetLabError, match="data_batch_3 is not a CIFAR batch"):
            load(str(root))
    assert not canary.exists()
    wrong: list[tuple[list[Any], int, str]] = [([1, 10], 2, "outside"), ([-1, 1], 2, "outside")]
    odd: list[list[Any]] = [[1, 2], [[1], [2], [3]], [[1], [2, 3], 4], [1, 2, 2**70], [1, 2, 1.5], [True, 1, 2], []]
    for labels, count, match in [*wrong, *((labels, 3, "images .N, 3072.") for labels in odd)]:
        (root / "data_batch_3").write_bytes(batch(count, labels))
        with pytest.raises(ResNetLabError, match=match):
            load(str(root))


# Finding and downloading


class _Server(http.server.BaseHTTPRequestHandler):
    content: ClassVar[bytes] = b""
    cut: ClassVar[list[int]] = []
    ranges: ClassVar[list[str | None]] = []
    ignores_ranges: ClassVar[bool] = False
    slow: ClassVar[float] = 0.0

    def do_GET(self) -> None:
        time.sleep(self.slow)
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and not self.ignores_ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : start + (self.cut.pop(0) if self.cut else len(self.content))])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Server]]:
    """A mirror on this machine that has a small CIFAR-10 in an archive of the known name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as out:
        out.add(batches(tmp_path / "made" / "cifar-10-batches-py"), "cifar-10-batches-py")
    _Server.content, _Server.cut, _Server.ranges, _Server.ignores_ranges = stream.getvalue(), [], [], False
    _Server.slow = 0.0
    kind = cifar.KINDS[0]._replace(md5=hashlib.md5(_Server.content).hexdigest())
    monkeypatch.setattr(cifar, "KINDS", (kind, cifar.KINDS[1]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        monkeypatch.setenv("RESNETLAB_MIRROR", f"http://127.0.0.1:{httpd.server_port}/")
        yield _Server
        httpd.shutdown()
        thread.join()


def test_downloaded_once(server: type[_Server], home: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert len(load("CIFAR-10", progress=lambda done, total: seen.append((done, total))).train) == 100
    assert (len(server.content), len(server.content)) in seen
    assert len(load("cifar10").train) == 100 and len(server.ranges) == 1
    assert [p.name for p in home.rglob("[!.]*.gz*")] == ["cifar-10-python.tar.gz"]


def test_one_downloads_and_the_others_wait(server: type[_Server], home: Path) -> None:
    pytest.importorskip("fcntl")
    server.slow = 0.3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load("cifar10"), range(4)))
    assert [len(dataset.train) for dataset in found] == [100] * 4 and len(server.ranges) == 1
    assert sorted(p.name for p in home.rglob("*.gz*")) == [".cifar-10-python.tar.gz.lock", "cifar-10-python.tar.gz"]


@pytest.mark.parametrize("mirror", ["mirror", "htp://a", "http://[::1", "http://\udcff"])
def test_a_mirror_that_is_none_is_an_error(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNETLAB_MIRROR", mirror)
    with pytest.raises(ResNetLabError, match="could not be downloaded"):
        load("cifar100")


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_cut_off_download_is_continued(server: type[_Server], ignores_ranges: bool) -> None:
    server.cut[:], server.ignores_ranges = [1000, 500], ignores_ranges
    assert len(load("cifar10").train) == 100
    assert server.ranges == [None, "bytes=1000-", "bytes=500-" if ignores_ranges else "bytes=1500-"]


def test_a_download_that_keeps_breaking_continues_next_time(server: type[_Server]) -> None:
    server.cut[:] = [100] * 3
    with pytest.raises(ResNetLabError, match="broke off after 300 of"):
        load("cifar10")
    assert len(load("cifar10").train) == 100 and server.ranges[-1] == "bytes=300-"


def test_a_wrong_sum_is_not_used(server: type[_Server], home: Path) -> None:
    server.content = server.content[:-1] + b"x"
    _Server.content = server.content
    with pytest.raises(ResNetLabError, match="its MD5 is"):
        load("cifar10")
    assert not list(home.rglob("[!.]*.gz*")), "it was removed"


def test_a_whole_part_is_taken(server: type[_Server]) -> None:
    download.cache().mkdir(parents=True)
    (download.cache() / "cifar-10-python.tar.gz.part").write_bytes(server.content)
    assert len(load("cifar10").train) == 100


def test_no_network_names_places_and_ways_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNETLAB_DATA", "/nowhere/mine")
    with pytest.raises(ResNetLabError) as caught:
        load("cifar100")
    text = str(caught.value)
    for part in (
        "/nowhere/mine",
        "home/data\n",
        "huggingface",
        "http://127.0.0.1:9/",
        "RESNETLAB_DATA",
        "train digits",
        "as DATA",
    ):
        assert part in text
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ResNetLabError, match=r"MNIST(.|\n)*train digits"):
        load("mnist")


def test_found_where_others_put_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches(tmp_path / "made")
    for place in (home / "data/cifar-10-batches-py", home / ".cache/torch/datasets/cifar-10-batches-py"):
        place.parent.mkdir(parents=True, exist_ok=True)
        made.rename(place)
        assert load("cifar10").origin in (str(place), os.path.relpath(place))
        made = place
    made.rename(tmp_path / "away")
    snapshot = home / ".cache/huggingface/hub/datasets--uoft-cs--cifar10/snapshots/abc"
    tens = [i % 10 for i in range(20)]
    parquet(snapshot / "plain_text/train-00000-of-00001.parquet", [png(i, (32, 32)) for i in range(20)], tens)
    with pytest.raises(ResNetLabError, match="not on this machine"):
        load("cifar10")
    parquet(snapshot / "plain_text/test-00000-of-00001.parquet", [png(i, (32, 32)) for i in range(20)], tens)
    assert load("cifar10").train.classes[0] == "airplane"


# Packaged data sets


def test_digits() -> None:
    dataset = load("digits")
    assert dataset.test and dataset.channels == 1 and not dataset.mirrors
    assert len(dataset.train) + len(dataset.test) == 1797 and len(dataset.test) == pytest.approx(359, abs=5)
    assert dataset.train.classes == tuple("0123456789") and dataset.train.images[0].shape == (8, 8, 1)
    pixels = np.stack([dataset.train.images[i] for i in range(len(dataset.train))])
    assert pixels.min() == 0 and pixels.max() == 255 and "held out" in dataset.notes[0]


def test_a_name_goes_before_a_folder_and_says_so(home: Path) -> None:
    folder(home / "digits", {"a": 2, "b": 2})
    assert load("digits").origin == "scikit-learn" and "./digits" in load("digits").notes[-1]
    assert load("./digits").train.classes == ("a", "b")


def test_mnist_files_are_found(home: Path) -> None:
    for name, count in (("train", 30), ("t10k", 10)):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + bytes(i % 256 for i in range(count * 784))
        labels = struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count))
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            path = home / f"data/MNIST/raw/{name}-{kind}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    dataset = load("mnist")
    assert dataset.test and len(dataset.train) == 30 and len(dataset.test) == 10
    assert dataset.train.classes == tuple("0123456789") and dataset.channels == 1 and not dataset.mirrors
    assert dataset.train.images[1].ravel()[:3].tolist() == [784 % 256, 785 % 256, 786 % 256]
    assert not set(moved.names(dataset.train)) & set(moved.names(dataset.test))


def test_torchvision_files_are_read_without_decoding(home: Path) -> None:
    root = folder(home / "data/eurosat/2750", {"Forest": 10, "River": 10})
    dataset = load("eurosat")
    assert dataset.test and dataset.train.classes == ("Forest", "River") and len(dataset.test) == 2
    assert str(root) in str(Path(dataset.train.images.name(0)).absolute())


class _Downloading:
    """A data set as torchvision's EuroSAT is: what is half unpacked counts as there."""

    made: ClassVar[list[Path]] = []
    breaks: ClassVar[bool] = False

    def __init__(self, root: Path, download: bool = False) -> None:
        inner = Path(root) / "2750"
        if download and not inner.is_dir():
            self.made.append(Path(root))
            for i in range(10):
                folder(inner, {"Forest": i + 1, "River": i + 1})
                time.sleep(0.02)
                if self.breaks and i == 5:
                    raise OSError("the connection broke")
        if not inner.is_dir():
            raise RuntimeError("Dataset not found")
        self.classes = ["Forest", "River"]
        self.samples = [(path, int("River" in str(path))) for path in sorted(inner.rglob("*.png"))]


@pytest.fixture
def downloading(monkeypatch: pytest.MonkeyPatch) -> type[_Downloading]:
    from torchvision import datasets

    monkeypatch.setattr(datasets, "EuroSAT", _Downloading)
    _Downloading.made, _Downloading.breaks = [], False
    return _Downloading


def test_one_lets_torchvision_download_and_the_others_wait(downloading: type[_Downloading], home: Path) -> None:
    pytest.importorskip("fcntl")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: load("eurosat"), range(3)))
    assert [len(one.train) + len(one.test or ()) for one in found] == [20] * 3 and len(downloading.made) == 1
    assert Path(found[0].train.images.name(0)).is_file()
    assert sorted(p.name for p in download.cache().iterdir()) == [".eurosat.lock", "eurosat"]


def test_what_another_process_is_unpacking_is_waited_for(downloading: type[_Downloading], home: Path) -> None:
    pytest.importorskip("fcntl")
    inner = folder(download.cache() / "eurosat/2750", {"Forest": 1, "River": 1})
    with ThreadPoolExecutor(1) as pool:
        with locked(download.cache() / ".eurosat.lock", wait=True):
            found = pool.submit(load, "eurosat")
            time.sleep(0.2)
            folder(inner, {"Forest": 10, "River": 10})
        assert len(found.result().train) + len(found.result().test or ()) == 20
    assert not downloading.made


def test_a_cache_that_cannot_be_written_is_read(
    downloading: type[_Downloading], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("eurosat")
    monkeypatch.setattr(os, "access", lambda *_: False)
    (download.cache() / ".eurosat.lock").unlink()
    (download.cache() / ".eurosat.lock").mkdir()  # nobody can hold it
    assert load("eurosat").train.classes == ("Forest", "River") and len(downloading.made) == 1


def test_what_torchvision_left_half_unpacked_is_not_used(downloading: type[_Downloading]) -> None:
    downloading.breaks = True
    with pytest.raises(ResNetLabError, match="the connection broke"):
        load("eurosat")
    kept = download.cache() / "eurosat/EuroSAT.zip"
    kept.write_bytes(b"an archive")
    downloading.breaks = False
    dataset = load("eurosat")
    assert len(dataset.train) + len(dataset.test or ()) == 20 and kept.is_file()
    assert sorted(p.name for p in download.cache().iterdir()) == [".eurosat.lock", "eurosat"]


def test_what_somebody_put_in_the_cache_is_never_cleared_away(downloading: type[_Downloading], tmp_path: Path) -> None:
    mine = tmp_path / "disk/mine.txt"
    mine.parent.mkdir()
    mine.write_text("by hand")
    download.cache().mkdir(parents=True)
    (download.cache() / "eurosat").symlink_to(mine.parent)
    downloading.breaks = True
    for _ in range(2):
        with pytest.raises(ResNetLabError, match="the connection broke"):
            load("eurosat")
        shutil.rmtree(mine.parent / "2750", ignore_errors=True)
    downloading.breaks = False
    assert load("eurosat").train.classes == ("Forest", "River") and mine.read_text() == "by hand"


def test_every_packaged_row_names_something_in_torchvision() -> None:
    from torchvision import datasets

    assert len(sources.PACKAGED) >= 15
    assert all(hasattr(datasets, row.kind) for row in sources.PACKAGED.values())


# Survey


def test_survey_finds_what_is_wrong(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/a": 200, "train/b": 15, "train/c": 3, "test/a": 5, "test/b": 1}, 1000)
    (root / "train/a/broken.jpg").write_bytes(png(7)[:40])
    (root / "train/b/disguise.jpg").write_bytes(png(8))
    (root / "train/b/long.png").write_bytes(png(9, (50, 10)))
    (root / "train/b/copy.png").write_bytes((root / "train/a/0.png").read_bytes())
    (root / "test/a/leak.png").write_bytes((root / "train/a/1.png").read_bytes())
    (root / "train/a/again.png").write_bytes((root / "train/a/2.png").read_bytes())
    found = survey(load(str(root)))
    problems = "\n".join(found.problems)
    for part in (
        "train: " + str(root / "train/a/broken.jpg") + ": the file is",
        "test has no images of c",
        "Fewer than 10 training images: c (3)",
        "uneven, 67 to 1",
        "disguise.jpg is PNG",
        "more than 4 to 1, 1:",
        "under two classes, 1:",
        "in test and train (what is measured is partly memory), 1:",
        "twice in a split, 2:",
    ):
        assert part in problems, part
    train = found.splits[0]
    assert train.broken == 1 and train.per_class == (202, 18, 3) and train.images == 223
    assert train.smallest == (6, 6) and train.largest == (10, 50) and train.kinds == {"PNG RGB": 222}
    json.dumps(found.to_dict())
    shown = samples(load(str(root)), 4)
    assert {name: len(pixels) for name, pixels in shown.items()} == {"a": 4, "b": 4, "c": 3}


def test_channel_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((5, 9), (20, 3), (8, 8))]
    for i, pixels in enumerate(pictures):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    from resnetlab.sources.folder import read_folder

    found = sources.channel_statistics(read_folder(tmp_path).train.images)
    flat = np.concatenate([p.reshape(-1, 3) for p in pictures]) / 255
    assert found.mean == pytest.approx(flat.mean(0).tolist()) and found.std == pytest.approx(flat.std(0).tolist())
