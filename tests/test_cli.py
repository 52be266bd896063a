"""The commands as a user types them: what they print, what they leave, how they refuse."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnetlab import api, ensemble, explain, loggers, recipes, runtime, session, tuning, views
from resnetlab.cli import main
from resnetlab.cli.guard import fail
from resnetlab.cli.output import line, print_json, warn
from resnetlab.cli.output import table as print_table
from resnetlab.console import Notes, Quiet

Photos = Callable[..., Path]
FAST = ["--model", "resnet20", "batch_size=16"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.raises(SystemExit) as done:
        main(["train", "--out", str(path), "epochs=2", "batch_size=128"])
    assert done.value.code == 0
    return path


def spawn(*words: str, cwd: Path) -> "subprocess.Popen[str]":
    """Start the command as its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "resnetlab", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Wait until ``condition`` holds; fail when the process ends before."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "took too long"
        time.sleep(0.02)


def ended(process: "subprocess.Popen[str]") -> int:
    """Wait for the end and return the exit status."""
    process.communicate(timeout=300)
    return process.returncode


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_train_leaves_a_complete_run_directory(digits_run: Path) -> None:
    there = {p.name for p in digits_run.iterdir()}
    expected = "model.safetensors model.json metrics.csv timing.csv scores.json config.json splits.json log.txt"
    assert there >= {*expected.split(), "curves.png", "confusion.png", "checkpoint"}
    assert not [name for name in there if name.endswith(".tmp")]
    assert [r["epoch"] for r in rows(digits_run / "metrics.csv")] == ["1", "2"]
    for picture in ("curves.png", "confusion.png"):
        with Image.open(digits_run / picture) as image:
            assert min(image.size) > 300
    card = json.loads((digits_run / "model.json").read_text())
    assert card["classes"] == [str(d) for d in range(10)]
    assert card["metrics"]["test"]["n"] == 359
    splits = json.loads((digits_run / "splits.json").read_text())
    names = [name for split in splits.values() for name in split]
    assert len(names) == len(set(names)) == 1797


def test_output_through_a_pipe_is_a_line_an_epoch_without_control_characters(command: Any, tmp_path: Path) -> None:
    status, out, err = command("train", "--out", tmp_path / "run", "epochs=2", "batch_size=128")
    assert (status, err) == (0, "")
    assert "\x1b" not in out and "\r" not in out
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 2
    for field in ("time", "train loss", "train accuracy", "val loss", "val accuracy"):
        assert field in epochs[0]
    for word in ("device", "model", "data", "recipe", "run", "test  top-1", "next"):
        assert any(line.startswith(word) for line in out.splitlines()), word


def test_the_same_command_twice_gives_the_same_bytes(command: Any, digits_run: Path, tmp_path: Path) -> None:
    command("train", "--out", tmp_path / "again", "epochs=2", "batch_size=128")
    for name in ("metrics.csv", "model.safetensors", "scores.json", "splits.json"):
        assert (tmp_path / "again" / name).read_bytes() == (digits_run / name).read_bytes(), name


def test_evaluate_gives_the_score_of_the_run_again_at_any_batch_size(command: Any, digits_run: Path) -> None:
    recorded = json.loads((digits_run / "scores.json").read_text())["test"]
    for batch_size in ("1", "64", "1000"):
        status, out, err = command("evaluate", digits_run, "--json", "--batch-size", batch_size)
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert found["confusion"] == recorded["confusion"]
        assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-6)
        assert 0 <= found["top1"] <= found["top5"] <= 1
    bundle_alone = json.loads(command("evaluate", digits_run / "model.safetensors", "--json")[1])
    assert bundle_alone["top1"] == recorded["top1"]


def test_evaluate_as_a_table(command: Any, digits_run: Path) -> None:
    status, out, _ = command("evaluate", digits_run, "--split", "val")
    assert status == 0
    assert "top-1" in out and "by class" in out and "n = 143" in out


def test_other_data_is_scored_whole_its_classes_matched_by_name(command: Any, digits_run: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    images, target = load_digits().images, load_digits().target
    for digit in (7, 3):
        (tmp_path / "set" / str(digit)).mkdir(parents=True)
        for i in np.flatnonzero(target == digit)[:20]:
            pixels = (images[i] * 15.9375).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(tmp_path / "set" / str(digit) / f"{i}.png")
    status, out, err = command("evaluate", digits_run, tmp_path / "set", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["n"] == 40
    assert {c["name"] for c in found["per_class"] if c["n"]} == {"3", "7"}
    (tmp_path / "set" / "7").rename(tmp_path / "set" / "seven")
    status, _, err = command("evaluate", digits_run, tmp_path / "set", "--json")
    assert status == 1
    assert "seven" in err


def test_predict_in_every_form(command: Any, digits_run: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    for i in range(3):
        Image.fromarray((load_digits().images[i] * 15.9).astype(np.uint8)).save(tmp_path / f"{i}.png")
    status, out, err = command("predict", digits_run, tmp_path, "--json", "--top", "2")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [Path(r["file"]).name for r in found] == ["0.png", "1.png", "2.png"]
    assert all(len(r["top"]) == 2 and r["class"] == r["top"][0]["class"] for r in found)
    assert all(r["top"][0]["probability"] >= r["top"][1]["probability"] for r in found)
    text = command("predict", digits_run, tmp_path / "*.png", "--format", "csv")[1]
    table = list(csv.DictReader(io.StringIO(text)))
    assert [r["class"] for r in table] == [r["class"] for r in found]
    one = json.loads(command("predict", digits_run, tmp_path / "1.png", "--json")[1])
    assert one[0]["probability"] == pytest.approx(found[1]["probability"], abs=1e-5)
    assert "1.png" in command("predict", digits_run, tmp_path / "1.png")[1]


def test_predict_from_standard_input(
    command: Any, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    for content in ((tmp_path / "a.png").read_bytes(), f"{tmp_path / 'a.png'}\n".encode()):
        for words in (("-", "--json", "--top", "2"), ("--json", "--top", "2", "-")):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            status, out, err = command("predict", digits_run, *words)
            assert (status, err) == (0, "")
            assert [len(row["top"]) for row in json.loads(out)] == [2]


def test_predict_names_what_it_cannot_read(command: Any, digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    status, out, err = command("predict", digits_run, tmp_path, "--json")
    assert (status, out) == (1, "")
    assert "bad.png" in err and "--skip-broken" in err
    status, out, err = command("predict", digits_run, tmp_path, "--json", "--skip-broken")
    assert status == 0
    assert len(json.loads(out)) == 1
    assert "bad.png" in err
    status, out, err = command("predict", digits_run, tmp_path / "bad.png", "--json", "--skip-broken")
    assert (status, out) == (1, "") and "None of the 1 images can be read" in err


def test_models_data_and_doctor_print_one_json_document(command: Any) -> None:
    networks = json.loads(command("models", "--json")[1])
    figures = {row["name"]: row for row in networks}
    assert figures["resnet50"]["parameters"] == 25_557_032
    assert figures["resnet20"]["parameters"] == 269_722
    assert {"name", "parameters", "macs", "layers"} <= figures["resnet18"].keys()
    digits = json.loads(command("data", "digits", "--json")[1])
    assert sum(split["images"] for split in digits["splits"]) == 1797
    doctor = json.loads(command("doctor", "--json")[1])
    assert {"torch", "device", "precision", "convolutions", "threads", "memory_bytes"} <= doctor.keys()


def test_tables_are_for_people(command: Any, tmp_path: Path) -> None:
    assert "25,557,032" in command("models")[1]
    assert "optim.lr" in command("recipes")[1]
    status, out, _ = command("data", "digits", "--out", tmp_path / "sheet.png")
    assert status == 0
    assert "problems found" in out
    with Image.open(tmp_path / "sheet.png") as image:
        assert min(image.size) > 300


@pytest.mark.parametrize("width", [40, 60])
def test_no_word_of_a_table_is_broken_in_a_narrow_terminal(
    command: Any, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    for name, words in (
        ("models", ("resnet50-tutorial", "25,557,032", "multiply-adds", "imagenet")),
        ("recipes", ("model.num_classes", "optim.warmup_epochs")),
        ("doctor", ("memory_bytes", "torch")),
    ):
        out = re.sub(r"\x1b\[[0-9;]*m", "", command(name)[1])
        for word in words:
            assert word in out, (name, word)


def test_dry_run_shows_every_setting_and_writes_nothing(command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("train", "--dry-run", "optim.lr=0.03")
    assert status == 0
    assert "optim.lr=0.03" in out and "data.augment=crop:1" in out and "to finish" in out and "parameters" in out
    assert list(tmp_path.iterdir()) == []


def test_a_flat_folder_is_split_stated_and_left_alone(command: Any, photos: Photos, tmp_path: Path) -> None:
    root = photos({"ant": 20, "bee": 20, "cat": 20})
    before = {p: p.stat().st_mtime_ns for p in [root, *root.rglob("*")]}
    status, out, _ = command("train", root, "--out", tmp_path / "run", "epochs=1", *FAST)
    assert status == 0
    assert "held out for testing" in out and "held back for validation" in out
    assert {p: p.stat().st_mtime_ns for p in [root, *root.rglob("*")]} == before


def test_a_class_that_val_lacks_does_not_shift_the_others(command: Any, photos: Photos, tmp_path: Path) -> None:
    for split, counts in (("train", {"a": 12, "bb": 12, "ccc": 12}), ("val", {"a": 6, "ccc": 6})):
        photos(counts, root=f"set/{split}")
    status, out, _ = command("train", tmp_path / "set", "--out", tmp_path / "run", "epochs=8", *FAST)
    assert status == 0
    assert "bb" in out
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["val"]
    assert [c["n"] for c in scores["per_class"]] == [6, 0, 6]
    assert scores["top1"] >= 0.9  # the colours are easy; a shifted label would halve this


@pytest.mark.parametrize(
    ("words", "status", "texts"),
    [
        (["trian"], 2, ["trian", "train"]),
        (["train", "--epoch", "3"], 2, ["--epoch", 'Did you mean "epochs"?', "without dashes"]),
        (["train", "--lr", "0.1"], 2, ['Did you mean "optim.lr"?', "without dashes"]),
        (["train", "--modle", "resnet18"], 2, ["Did you mean --model?"]),
        (["train", "--model", "resnet19"], 2, ["resnet19", 'Did you mean "resnet18"?']),
        (["train", "--recipe", "papper"], 2, ['Did you mean "paper"?']),
        (["train", "lr=0.1"], 2, ["optim.lr"]),
        (["train", "optim.lr=fast"], 2, ["optim.lr", "number"]),
        (["train", "epochs=0"], 2, ["epochs", "greater than 0"]),
        (["train", "data.augment=flop"], 2, ['Did you mean "flip"?']),
        (["train", "device=warp"], 2, ["warp", "cpu"]),
        (["train", "precision=fp16", "device=cpu"], 2, ["fp16"]),
        (["train", "--val", "1.5"], 2, ["data.val"]),
        (["train", "--logger", "tensorbord"], 2, ["tensorboard"]),
        (["train", "digits", "cifar10"], 2, ["one DATA"]),
        (["train", "nowhere/at/all"], 2, ["nowhere/at/all"]),
        (["train", "~nobody-of-that-name/photos"], 2, ["~nobody-of-that-name/photos"]),
        (["train", "data.split_seed=-1"], 2, ["data.split_seed", "greater than or equal to 0"]),
        (["train", "--model", "vgg16", "data.size=8"], 2, ["vgg16", "8 × 8 pixels", "data.size"]),
        (["train", "--out", "out\udcff"], 1, ["not UTF-8"]),
        (["train", "--dry-run", "--seeds", "0"], 2, ["--seeds", "from 1 on"]),
        (["train", "--dry-run", "--logger", "tensorbord"], 2, ["tensorboard"]),
        (["train", "--val", "0.1", "data.val=0.2"], 2, ["--val 0.1 and data.val=0.2", "leave one out"]),
        (["train", "--model", "resnet20", "model.name=resnet32"], 2, ["model.name=resnet32", "leave one out"]),
        (["predict", "nowhere", "x.png", "--top", "0"], 2, ["--top", "from 1 on"]),
        (["predict", "nowhere", "x.png", "--json", "--format", "csv"], 2, ["take one"]),
        (["train", "--out", "out\0"], 1, ["NUL"]),
        (["train", "digit"], 2, ['Did you mean "digits"?']),
        (["train", "--resume", "nowhere"], 1, ["nowhere"]),
        (["evaluate", "nowhere"], 1, ["nowhere"]),
        (["evaluate"], 2, ["run"]),
        (["predict", "nowhere", "x.png"], 1, ["nowhere"]),
        (["data", "nowhere"], 2, ["nowhere"]),
    ],
)
def test_a_mistake_gets_a_message_and_a_status_never_a_traceback(
    command: Any, tmp_path: Path, monkeypatch: Any, words: list[str], status: int, texts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = command(*words)
    assert found == status, err
    assert out == ""
    assert "Traceback" not in err
    for text in texts:
        assert text in err
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left


def test_one_class_empty_folders_and_tiny_classes_are_explained(command: Any, photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert command("train", tmp_path / "empty")[0] == 1
    status, _, err = command("train", photos({"only": 5}, root="one"))
    assert status == 1 and "class" in err
    few = photos({"many": 20, "few": 1}, root="few")
    status, _, err = command("train", few)
    assert status == 1 and '"few"' in err and "test/ folders" in err and "--val none" not in err
    status, out, _ = command("data", few, "--out", tmp_path / "sheet.png")
    assert status == 0 and 'Class "few" has 1 image left' in out
    status, _, err = command("train", photos({"many": 20, "few": 2}, root="two"))
    assert status == 1 and '"few"' in err and "--val none" in err


@pytest.mark.parametrize(
    ("verb", "table"),
    [
        ("train", recipes.RECIPES),
        ("train", loggers.LOGGERS),
        ("evaluate", views.VIEWS),
        ("predict", views.VIEWS),
        ("explain", explain.METHODS),
        ("ensemble", ensemble.RULES),
    ],
)
def test_the_help_of_a_command_names_what_there_is(command: Any, verb: str, table: dict[str, object]) -> None:
    status, out, _ = command(verb, "--help")
    assert status == 0
    words = re.findall(r"[\w-]+", out)
    assert [name for name in table if name not in words] == []


def test_an_existing_run_is_never_overwritten(command: Any, digits_run: Path) -> None:
    before = (digits_run / "model.safetensors").read_bytes()
    status, _, err = command("train", "--out", digits_run, "epochs=1")
    assert status == 1
    assert "--resume" in err
    assert (digits_run / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_broken_image_of_any_split_is_refused_before_training(
    command: Any, photos: Photos, tmp_path: Path, split: str
) -> None:
    """The header already is broken, which must not keep --skip-broken from working."""
    for name, count in (("train", 8), ("val", 4), ("test", 4)):
        photos({"a": count, "bb": count}, root=f"data/{name}")
    broken = tmp_path / "data" / split / "a" / "000.png"
    broken.write_bytes(b"")
    words = ("train", tmp_path / "data", "--out", tmp_path / "run", "epochs=1", "--model", "linear")
    status, _, err = command(*words)
    assert status == 1 and str(broken) in err and "--skip-broken" in err
    assert not (tmp_path / "run").exists()
    status, out, _ = command(*words, "--skip-broken")
    assert status == 0 and str(broken) in out
    assert command("evaluate", tmp_path / "run", "--split", split, "--json")[0] == 0  # skips what the run skipped
    status, out, _ = command("evaluate", tmp_path / "run", photos({"a": 3}, root="only a"))
    assert status == 0 and "n = 3" in out  # one class is enough to be scored


def test_the_data_of_a_run_is_gone(command: Any, photos: Photos, tmp_path: Path) -> None:
    data = photos({"a": 9, "bb": 9})
    assert command("train", data, "--out", tmp_path / "my run", "epochs=1", "--model", "linear")[0] == 0
    data.rename(tmp_path / "moved")
    for words in (("evaluate", tmp_path / "my run"), ("train", "--resume", tmp_path / "my run")):
        status, _, err = command(*words)
        assert status == 1 and "no longer at" in err and str(data) in err


def test_what_comes_next_can_be_pasted(command: Any, tmp_path: Path, photos: Photos) -> None:
    out = command("train", photos({"a": 9, "bb": 9}), "--out", tmp_path / "a b", "epochs=1", "--model", "linear")[1]
    assert f"resnetlab evaluate '{tmp_path / 'a b'}'" in out


def test_no_room_leaves_nothing(command: Any, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("resnetlab.rundir.shutil.disk_usage", lambda path: usage)
    status, _, err = command("train", photos({"a": 9, "bb": 9}), "--out", tmp_path / "run", "--model", "linear")
    assert status == 1 and "MiB free" in err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_end_the_run(
    command: Any, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise OSError("the server is away")

    words = ("train", photos({"a": 9, "bb": 9}), "--model", "linear", "epochs=2", "--logger", "tensorboard")
    monkeypatch.setattr("resnetlab.loggers.check", lambda name: None)
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda path, recipe: broken)
    status, out, _ = command(*words, "--out", tmp_path / "one")
    assert status == 0 and out.count("the server is away") == 1
    assert len(rows(tmp_path / "one" / "metrics.csv")) == 2
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", broken)
    status, _, err = command(*words, "--out", tmp_path / "two")
    assert status == 1 and "could not start: the server is away" in err


def test_val_none_trains_on_all_and_scores_the_test_split(command: Any, tmp_path: Path) -> None:
    assert command("train", "--val", "none", "--out", tmp_path / "run", "epochs=1", "batch_size=128")[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"]["train"], config["data"]["val"], config["data"]["test"]) == (1438, 0, 359)
    assert rows(tmp_path / "run" / "metrics.csv")[0]["val_loss"] == ""


def test_divergence_stops_with_the_step_and_keeps_what_was_good(command: Any, tmp_path: Path) -> None:
    status, _, err = command("train", "--out", tmp_path / "run", "epochs=9", "optim.lr=1e30", "optim.warmup_epochs=0")
    assert status == 1
    assert "epoch" in err and "optim.lr" in err and "Traceback" not in err


def test_tensorboard_events_are_written_when_asked(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    words = ("train", "--out", tmp_path / "run", "epochs=1", "batch_size=128", "--logger", "tensorboard")
    assert command(*words)[0] == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on_and_resume_ends_the_same(tmp_path: Path) -> None:
    words = ("train", "epochs=6", "batch_size=128", "--out")
    assert ended(spawn(*words, "whole", cwd=tmp_path)) == 0
    process = spawn(*words, "stopped", cwd=tmp_path)
    wait_for((tmp_path / "stopped" / "metrics.csv").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "resnetlab train --resume stopped" in err
    assert ended(spawn("train", "--resume", "stopped", cwd=tmp_path)) == 0
    for name in ("metrics.csv", "model.safetensors", "scores.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    first = spawn("train", "epochs=200", "--out", "run", cwd=tmp_path)
    wait_for((tmp_path / "run" / "metrics.csv").exists, first)
    second = spawn("train", "--resume", "run", cwd=tmp_path)
    out, err = second.communicate(timeout=60)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert second.returncode == 1, (out, err)
    assert "Another process" in err
    assert first.returncode == 143


def test_help_answers_without_torch() -> None:
    code = "import sys; sys.argv = ['resnetlab', '--help']; from resnetlab.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout


def test_of_large_images_predict_holds_only_what_the_network_reads(
    command: Any, digits_run: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, predict = list[tuple[int, ...]](), api.Run.predict

    def noted(self: api.Run, images: Any, **more: Any) -> Any:
        shapes.extend(image.shape for image in images)
        return predict(self, images, **more)

    monkeypatch.setattr(api.Run, "predict", noted)
    assert command("predict", digits_run, photos({"a": 3}, size=(300, 200)), "--json")[0] == 0
    assert shapes == [(8, 8, 1)] * 3


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--recipe", "fast", "--model", "vgg16", "data.size=32", "data.grow=none"], "needs a network with batch norm"),
        (["--model", "linear", "views=multi-scale"], "reads images of one size"),
        (["--model", "linear", "data.grow=0:4,0.5:8", "optim.name=sgd"], "reads images of one size"),
        (["--model", "fast-small", "data.size=8", "views=multi-scale"], "cannot read images of 7 × 7 pixels"),
        (["--recipe", "fast", "data.size=5000"], "data.size: Input should be less than or equal to 4096"),
        (["--recipe", "fast", "model.name=resnet21"], 'Unknown model "resnet21"'),
        (["model.num_classes=5"], "model.num_classes is what the data has, 10, and cannot be set to 5"),
        (["--model", "preresnet20", "model.zero_init=true"], "none can start as zero"),
    ],
)
def test_what_does_not_go_together_is_said_before_training_and_leaves_nothing(
    command: Any, words: list[str], text: str, tmp_path: Path
) -> None:
    status, _, err = command("train", *words, "--out", tmp_path / "run")
    assert status == 2 and text in err
    assert list(tmp_path.glob("run*")) == []


@pytest.mark.skipif(os.name != "posix", reason="a shell closes standard input")
def test_images_that_are_named_need_no_standard_input(digits_run: Path, photos: Photos) -> None:
    command = f"exec {sys.executable} -m resnetlab predict {digits_run} {{}} <&-"
    done = [
        subprocess.run(["sh", "-c", command.format(what)], capture_output=True, text=True, check=False)
        for what in (photos({"a": 1}), "-")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 1 and "Standard input is empty" in done[1].stderr


@pytest.mark.parametrize("option", ["--dry-run", "--skip-broken", "--watch-test", "--recipe=fast"])
def test_a_resumed_run_takes_no_options(command: Any, digits_run: Path, option: str) -> None:
    status, _, err = command("train", "--resume", digits_run, option)
    assert status == 2 and "no options but --logger and --debug-batch" in err


def test_a_batch_holds_an_image(command: Any, digits_run: Path) -> None:
    for size in ("0", "-1"):
        status, _, err = command("evaluate", digits_run, "--batch-size", size)
        assert status == 2 and "1 image or more" in err


def test_json_holds_no_number_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "layers": [{"largest": float("inf")}, (1.5, -float("inf"))]})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert found == {"loss": None, "layers": [{"largest": None}, [1.5, None]]}


def test_a_resumed_run_goes_on_in_its_own_precision_and_says_what_else_has_changed(tmp_path: Path) -> None:
    """Though `bench` has found another one the fastest since."""

    class Lines(Quiet):
        def line(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    device, threads = torch.device("cpu"), torch.get_num_threads()
    before = tuning.Choice(threads=threads, precision="bf16", batch=16, convolution="direct", measured="2026-11-27")
    tuning.remember(runtime.identity(device), before)
    run = api.train("digits", model="linear", out=tmp_path / "run", epochs=1, device="cpu", display=Quiet())
    tuning.remember(
        runtime.identity(device), before.model_copy(update={"precision": "fp32", "convolution": "winograd"})
    )
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(config | {"processes": 2}))
    with runtime.undisturbed():
        plan = session.load_plan(run.path, Lines())
    assert plan.runtime.precision.name == "bf16" and plan.recipe.precision == "auto"
    assert len(said) == 2 and "convolutions: direct (switched off) when the run began" in said[0]
    assert config["processes"] == 1 and "processes: 2 when the run began, now 1; the run will end otherwise" in said[1]


def test_a_run_goes_on_in_its_own_precision_though_bench_chose_other_threads(tmp_path: Path) -> None:
    device, threads = torch.device("cpu"), max(1, torch.get_num_threads() - 1)
    chosen = tuning.Choice(threads=threads, precision="bf16", batch=16, measured="2026-11-27")
    tuning.remember(runtime.identity(device), chosen)
    run = api.train("digits", model="linear", out=tmp_path / "run", epochs=1, device="cpu", display=Quiet())
    tuning.remember(runtime.identity(device), chosen.model_copy(update={"precision": "fp32"}))
    with runtime.undisturbed():
        assert session.load_plan(run.path, Quiet()).runtime.precision.name == "bf16"


def test_another_number_of_processes_is_refused_where_an_epoch_has_other_steps_then(
    command: Any, tmp_path: Path
) -> None:
    words = ("digits", "--model", "linear", "epochs=1", "data.limit=290", "batch_size=43", "--out", tmp_path / "run")
    assert command("train", *words)[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"processes": 2}))
    status, _, err = command("train", "--resume", tmp_path / "run")
    assert status == 1 and "begun in 2 processes, with 6 steps an epoch; in 1 it has 7" in err


def test_a_name_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are folders, or of a stranger's bundle."""
    hostile = "a\x1b[2Jb\x07\x9bc"
    line(hostile)
    warn(hostile)
    print_table(hostile, (hostile, "n"), [(hostile, "1")])
    Notes().line(hostile)
    fail(hostile, 1)
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err)
    assert out.count("a\\x1b[2Jb\\x07\\x9bc") == 4 and err.count("\\x1b[2J") == 3


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        main(["--version"])
    print_json(["\u8bad", "caf\udce9"])
    stream.flush()
    assert json.loads(stream.buffer.getvalue().partition(b"[")[2].join([b"[", b""])) == ["\u8bad", "caf\udce9"]


def test_bench_that_forgets_says_so_in_json(command: Any) -> None:
    assert json.loads(command("bench", "--forget", "--json")[1]) == {"forgotten": False}


def test_data_is_found_again_however_it_was_called(
    command: Any, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    photos({"a": 9, "bb": 9}, root="pets")
    monkeypatch.chdir(tmp_path)
    for number, data in enumerate(("Digits", "~/pets", "pets")):
        assert command("train", data, "--out", f"run{number}", "epochs=1", "--model", "linear")[0] == 0
    monkeypatch.chdir("/")
    for number in range(3):
        assert command("evaluate", tmp_path / f"run{number}")[0] == 0
