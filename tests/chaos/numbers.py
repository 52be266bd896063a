"""R12, R13 and the numbers that must not lie: NaN, too little memory, memory that grows, runs that differ."""

import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chaos import commands, injected, kills
from chaos.record import Bench, Result, Row, Tally
from resnetlab import checkpoint, divergence, training
from resnetlab.recipes import RECIPES
from resnetlab.rundir import CHECKPOINTS

SHORT = ("digits", "data.limit=160", "data.limit_test=60", "--model=resnet20", "batch_size=32", "precision=fp32")
LAYER = "layer2.0.conv2"
PLACES = ("loss", "output", "gradient", "weights", "input")


def poison(place: str, value: float, step: int) -> None:
    """Let the loss, a layer's output, its gradient, its weights or the input be no number in a step, from 0."""
    real = training._step

    def poisoned(t: Any, batch: Any, epoch: int) -> None:
        undo: list[Any] = []
        layer = t.model.get_submodule(LAYER)
        if t.step == step:
            if place == "output":
                undo.append(layer.register_forward_hook(lambda module, inputs, output: output * value))
            elif place == "gradient":
                undo.append(layer.weight.register_hook(lambda gradient: gradient * value))
            elif place == "weights":
                with torch.no_grad():
                    layer.weight[0, 0, 0, 0] = value
            elif place == "input":
                batch.images[0, 0, 0, 0] = value
            elif place == "loss":
                undo.append(t.model.fc.register_forward_hook(lambda module, inputs, output: output * value))
        try:
            real(t, batch, epoch)
        finally:
            for handle in undo:
                handle.remove()

    setattr(training, "_step", poisoned)  # noqa: B010 - a module's names are not assigned to


def not_a_number(bench: Bench) -> Result:
    """Put NaN or infinity in every place, early, at an epoch's last step and later; with and without --debug-batch."""
    steps, values = (1, 4, 6), (float("nan"), float("inf"))
    cases = [(p, v, s, d) for s in steps for v in values for p in PLACES for d in (False, True)]
    cases = cases if bench.size == "full" else cases[:10:2] + cases[13:20:6]
    tally = Tally(bench, of=len(cases))
    for place, value, step, debug in cases:
        run, output = bench.folder / "run", bench.folder / "output.txt"
        words = ["train", *SHORT, "epochs=2", "optim.average=0.5", "--out", str(run), *(["--debug-batch"] * debug)]
        code, text = commands.run(words, output, arm=partial(poison, place, value, step))
        wrong = _wrong(run, code, text, place, step, debug)
        tally.add(f"{value} in the {place} of step {step + 1}" + (", --debug-batch" if debug else ""), wrong)
        shutil.rmtree(run)
        output.unlink()
    return tally.result("places: " + ", ".join(PLACES) + "; steps 2, 5 (the epoch's last) and 7 of 10")


def _wrong(run: Path, code: int | None, text: str, place: str, step: int, debug: bool) -> str | None:
    epoch, index = divmod(step, 5)
    said = " ".join(text.split())
    late = place == "gradient" and not debug  # noticed when the next step reads the weights, or the epoch ends
    named = f"epoch {epoch + 1}, step {index + 1} of 5" in said or (late and "made so by" in said)
    layer = {"input": "the images", "loss": "fc", "weights": LAYER}.get(place, LAYER)
    if code != 1 or "Traceback" in text or "became" not in said or not named or layer not in said:
        return f"ended with {code}: {said[-350:]}"
    if "on a batch of" not in said:
        return "the batch is not named"
    saved = [checkpoint.load_newest(run / CHECKPOINTS, lambda line: None)]
    if any(divergence.non_finite(c.tensors) for c in saved if c is not None):
        return "a checkpoint with NaN was saved"
    if debug and place != "weights" and not (run / divergence.FILE).is_file():
        return "the batch was not kept"
    if (run / "model.safetensors").is_file():
        from resnetlab import bundle

        if divergence.non_finite(bundle.load(run).model.state_dict()):
            return "a bundle with NaN was saved"
    return None


def limit_memory(mib: int) -> None:
    """Leave this process ``mib`` MiB of address space more than it begins with, as ``ulimit -v`` does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def out_of_memory(bench: Bench) -> Result:
    """Give a run too little memory, by more and less; training with the size that is proposed must then do.

    With much less than 250 MiB (about 150 are needed whatever the batch) oneDNN now and then crashes by itself.
    """
    tries = (300,) if bench.size == "ci" else (250, 275, 300, 325, 350, 400)
    tally, proposals = Tally(bench, of=len(tries)), []
    for mib in tries:
        output = bench.folder / "output.txt"
        words = ["train", "digits", "--model=resnet20", "data.size=32", "epochs=1", "data.val=0", "precision=fp32"]
        words += ["data.limit_test=30", "optim.name=sgd", "--out"]
        arm = partial(limit_memory, mib)
        code, text = commands.run([*words, bench.folder / "big", "batch_size=500"], output, arm=arm)
        found = " ".join(text.split()).partition("Out of memory with batch_size=500 at 32 px. batch_size=")[2]
        size = found.split(" ")[0]
        wrong = None if code == 1 and size.isdigit() and "Traceback" not in text else f"{code}: {text[-300:]}"
        if not wrong:
            proposals.append(f"{size} with {mib} MiB")
            more = (f"batch_size={size}", f"data.limit={3 * int(size) + 20}")
            code, text = commands.run([*words, bench.folder / "small", *more], output, arm=arm)
            wrong = f"with the proposed batch_size={size} it ended with {code}: {text[-200:]}" if code else None
        tally.add(f"{mib} MiB", wrong)
        for name in ("big", "small"):
            shutil.rmtree(bench.folder / name, ignore_errors=True)
        output.unlink()
    return tally.result("proposed instead of 500: " + ", ".join(proposals))


def watch_memory(path: str) -> None:
    """Write the resident memory of this process, in MiB, after every epoch to a file."""
    real = training._finish_epoch

    def watched(*args: Any) -> Any:
        done = real(*args)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        with open(path, "a") as file:
            file.write(f"{resident / 2**20:.2f}\n")
        return done

    setattr(training, "_finish_epoch", watched)  # noqa: B010


def flat_memory(bench: Bench) -> Result:
    """Train many epochs of digits and look at the memory after each: from a tenth of the run on it may not grow."""
    epochs, size = bench.pick(20, 200), bench.pick(160, 1438)
    words = ["train", "digits", f"data.limit={size}", f"epochs={epochs}", "--model=resnet20", "batch_size=64"]
    words += ["--out", str(bench.folder / "run"), "optim.average=0.5"]
    log, tally = bench.folder / "memory.txt", Tally(bench, of=1)
    code, text = commands.run(words, bench.folder / "o.txt", arm=partial(watch_memory, str(log)), seconds=3000)
    values = [float(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if code != 0 or len(values) != epochs:
        tally.add("run", f"ended with {code}: {text[-200:]}")
        return tally.result()
    settled = values[epochs // 10 :]
    half = len(settled) // 2
    growth = sum(settled[half:]) / len(settled[half:]) - sum(settled[:half]) / half
    tally.add(f"{epochs} epochs", f"it grew by {growth:.1f} MiB" if growth > 4 else None)
    return tally.result(
        f"{epochs} epochs of {size:,} digits: {settled[0]:.0f} MiB after epoch {epochs // 10}, {settled[-1]:.0f} MiB "
        f"at the end; the second half holds {growth:+.2f} MiB on average over the first"
    )


def same_twice(bench: Bench) -> Result:
    """Run every recipe twice by the same command, the second time elsewhere and with other threads decoding."""
    tally = Tally(bench, of=len(RECIPES) * 2 if bench.size == "full" else len(RECIPES))
    for name in RECIPES:
        words = ["train", "digits", "--recipe", name, "--model=resnet20", "data.size=16", "epochs=2", "batch_size=32"]
        words += ["data.limit=160", "data.limit_test=60", "--out"]
        for more in ((), ("data.memory=stream", "data.workers=3")) if bench.size == "full" else ((),):
            output = bench.folder / "output.txt"
            for run in ("a", "b"):
                extra = more if run == "b" else ()
                code, text = commands.run([*words, bench.folder / run, *extra], output)
                if code:
                    break
            wrong = f"ended with {code}: {text[-200:]}" if code else _different(bench.folder)
            tally.add(" ".join(("recipe", name, *more)), wrong)
            for run in ("a", "b"):
                shutil.rmtree(bench.folder / run, ignore_errors=True)
            output.unlink()
    return tally.result(f"recipes: {', '.join(RECIPES)}")


def _different(folder: Path) -> str | None:
    names = ("metrics.csv", "scores.json", "splits.json")
    wrong = [n for n in names if (folder / "a" / n).read_bytes() != (folder / "b" / n).read_bytes()]
    return f"{', '.join(wrong)} differ" if wrong else None


def workers(bench: Bench) -> Result:
    """Stop a streaming run and go on with another number of threads, or from memory: the end is the same."""
    from chaos.pictures import class_folders

    data = class_folders(bench.folder / "photos", {"blue": 40, "green": 40, "red": 40})
    words = (str(data), *kills.SMALL, "data.size=16", "data.augment=crop:2,flip", "data.memory=stream")
    expected = kills.reference(bench, (*words, "data.workers=1"))
    changes = (
        [(1, 4), (2, None)]
        if bench.size == "ci"
        else [(a, b) for a in (0, 1, 2, 4) for b in (0, 1, 3, 8, None) if a != b]
    )
    tally, chance = Tally(bench, of=len(changes)), bench.chance("workers")
    for before, after in changes:
        run, output = bench.folder / "run", bench.folder / "output.txt"
        arm = partial(injected.kill_at, "step", chance.randrange(1, 7), 0.0)
        commands.run(kills.train((*words, f"data.workers={before}"), run), output, arm=arm)
        other = partial(other_workers, after)
        code, text = commands.run(kills.train((), run), output, arm=other)
        wrong = f"ended with {code}: {text[-200:]}" if code else commands.differences(run, expected, weights_only=True)
        tally.add(f"{before} threads, then {'from memory' if after is None else after}", wrong)
        shutil.rmtree(run)
        output.unlink()
    return tally.result()


def other_workers(count: int | None) -> None:
    """Decode with another number of threads than the recipe says, or hold all images in memory (None)."""
    from resnetlab import loader

    real = loader.prepare

    def prepare(config: Any, *rest: Any) -> Any:
        changes = {"memory": "resident"} if count is None else {"workers": count}
        return real(config.model_copy(update=changes), *rest)

    setattr(loader, "prepare", prepare)  # noqa: B010


ROWS = (
    Row(
        id="R2",
        part="workers",
        fault="Killed, and resumed with another number of decoding threads, or with the images in memory",
        check="weights, optimiser, metrics and scores equal those of the undisturbed run to the byte",
        run=workers,
    ),
    Row(
        id="R12",
        part="training",
        fault="NaN or infinity in the loss, a layer's output, its gradient, its weights, the input, at a step",
        check="exit 1; epoch, step, layer and batch are named; no checkpoint or bundle holds a NaN; with "
        "`--debug-batch` the batch is kept for `resnetlab replay`",
        run=not_a_number,
    ),
    Row(
        id="R13",
        part="cpu",
        fault="Memory runs out in a step (RLIMIT_AS, as `ulimit -v`)",
        check="exit 1 and a batch size is proposed; training with that size and that limit goes through",
        run=out_of_memory,
    ),
    Row(
        id="N1",
        part="twice",
        fault="The same command twice, for every recipe",
        check="metrics.csv, scores.json and splits.json are the same to the byte",
        run=same_twice,
    ),
    Row(
        id="N2",
        part="memory",
        fault="A long run: 200 epochs of digits (ci: fewer)",
        check="resident memory of the second half is at most 4 MiB above that of the first",
        run=flat_memory,
    ),
)
