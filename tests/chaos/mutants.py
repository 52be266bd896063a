"""The mutation check: lines of the core, each broken on purpose, and the tests that must notice.

A test that cannot fail shows nothing. Run it by ``scripts/mutate``; a new row of `MUTANTS` is all it takes to add one.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A defect: what is broken, where, how, and who should notice."""

    what: str
    """In a few words; also its name on the command line."""
    file: str
    """Below ``src/resnetlab``."""
    fragment: str
    """Text that is in the file exactly once. A part of one line, so that formatting it anew does not lose it."""
    broken: str
    """What takes its place."""
    tests: tuple[str, ...]
    """Files of ``tests``, or ``file::function``."""


LOADER, METRICS = ("test_loader.py",), ("test_metrics.py",)
LOOP = ("test_training.py::test_the_loop_is_the_textbook_loop",)
SOFT = ("test_training.py::test_label_smoothing_and_mixing_are_soft_targets",)
LEARNS = ("test_training.py::test_it_learns_colours",)
DIVERGED = ("test_training.py::test_a_loss_that_is_not_a_number_stops_before_the_step",)
OPTIM, AUGMENT, PREPROCESS = ("test_optim.py",), ("test_augment.py",), ("test_preprocess.py",)
SPLITS = ("test_sources.py::test_hold_out_is_stratified_and_decided_by_the_seed",)
BUNDLE = ("test_bundle.py::test_every_flipped_bit_is_noticed",)
CHECKPOINT = ("test_checkpoint.py::test_every_flipped_bit_is_noticed",)
STOPPED = ("test_training.py::test_stopped_anywhere_and_restored_it_ends_bit_for_bit_the_same[4-optim0]",)
KEPT = ("test_numbers.py::test_the_best_epochs_weights_are_in_the_checkpoint",)
MEMBERS = ("test_numbers.py::test_members_count_by_their_weights",)
BETTER = ("test_numbers.py::test_of_equal_accuracy_the_smaller_loss_is_the_better_epoch",)
CHANCE = ("test_numbers.py::test_every_image_keeps_its_label_and_meets_new_chance_each_epoch",)
COMPANY = ("test_numbers.py::test_an_image_gets_the_same_answer_in_any_company",)
NAMES = ("test_numbers.py::test_labels_are_matched_by_name_never_by_position",)
IMAGES = ("test_sources_images.py",)
ARCHIVES = ("test_sources_archive.py::test_hostile_archives_do_nothing",)

MUTANTS: tuple[Mutant, ...] = (
    # The loop
    Mutant("loss summed, not averaged", "training.py", "t.recipe.label_smoothing) / batch.size",
           "t.recipe.label_smoothing)", LOOP),
    Mutant("batch norm stays in evaluation mode", "training.py", "t.network.train()", "t.network.eval()", LOOP),
    Mutant("epoch loss by steps", "training.py", "train_loss=t.loss_sum / t.images", "train_loss=t.loss_sum", LOOP),
    Mutant("sums run on", "training.py", "t.seconds = 0.0, 0, 0, 0.0", "t.seconds = 0.0, t.correct, 0, 0.0", LOOP),
    Mutant("mixed labels swapped", "training.py", "return batch.weight * loss + (1 - batch.weight) * other",
           "return batch.weight * other + (1 - batch.weight) * loss", SOFT),
    Mutant("mixed with the wrong neighbour", "training.py", "labels.roll(1), red", "labels.roll(-1), red", SOFT),
    Mutant("best epoch by the larger loss", "training.py", "(record.val_top1, -record.val_loss)",
           "(record.val_top1, record.val_loss)", BETTER),
    Mutant("average not updated", "training.py", "t.average.update_parameters(t.model)", "pass", LEARNS),
    Mutant("resume begins the epoch again", "training.py", "start=t.step - (epoch - 1) * steps", "start=0", STOPPED),
    Mutant("momentum lost on resume", "training.py", "setdefault(int(index), {})[key] = tensor",
           "setdefault(int(index), {})[key] = tensor * 0", STOPPED),
    Mutant("best weights lost on resume", "training.py", 't.best_weights = parts["best"]', "t.best_weights = {}",
           KEPT),
    Mutant("infinite loss goes on", "training.py", "if not math.isfinite(", "if math.isinf(0 * ", DIVERGED),
    Mutant("gradients not scaled by the processes", "training.py", "objective * t.runtime.world_size", "objective",
           ("test_distributed.py",)),
    # Optimiser, schedule, average
    Mutant("norms decay", "optim.py", '"weight_decay": 0.0}]', '"weight_decay": config.weight_decay}]', OPTIM),
    Mutant("cosine of half a period", "optim.py", "math.cos(math.pi * progress)", "math.cos(2 * progress)", OPTIM),
    Mutant("warm-up one step late", "optim.py", "(step + 1) / warmup", "step / warmup", OPTIM),
    Mutant("milestone one step late", "optim.py", "sum(step >= round", "sum(step > round", OPTIM),
    Mutant("linear the wrong way", "optim.py", "return c.lr * (1 - progress)", "return c.lr * progress", OPTIM),
    Mutant("average of half the time", "optim.py", "math.exp(-1 / max", "math.exp(-2 / max", OPTIM),
    Mutant("average without statistics", "optim.py", "use_buffers=True", "use_buffers=False", OPTIM),
    Mutant("filters of any length", "optim.py", "torch._foreach_div_(parameters, ", "list(",
           ("test_fast.py::test_a_step_of_muon_turns_a_filter_bank_by_about_its_rate_whatever_the_gradient",)),
    Mutant("recording moves statistics", "graphs.py", "buffer.copy_(before)", "pass", ("test_graphs.py",)),
    Mutant("clipping the other way round", "runtime.py", "if clip:", "if not clip:", ("test_runtime.py",)),
    # Augmentation
    Mutant("flip upside down", "augment.py", "images.flip(-1)", "images.flip(-2)", AUGMENT),
    Mutant("flip the others", "augment.py", "< probability, images.flip", ">= probability, images.flip", AUGMENT),
    Mutant("crop never reaches the end", "augment.py", "(u * (2 * p + 1)).long()", "(u * 2 * p).long()", AUGMENT),
    Mutant("mixup share turned round", "augment.py", "1 - weight), weight)", "weight), weight)", AUGMENT),
    Mutant("cutmix share turned round", "augment.py", "return Mixed(mixed, 1 - (bottom", "return Mixed(mixed, (bottom",
           AUGMENT),
    # Batches
    Mutant("the same order every epoch", "loader.py", 'self.seed, epoch, "order"', 'self.seed, "order"', LOADER),
    Mutant("the same chance every epoch", "loader.py", 'self.seed, epoch, "augment"', 'self.seed, "augment"', CHANCE),
    Mutant("chance by place in the batch", "loader.py", "chance[indices.to(device)]", "chance[: len(indices)]", LOADER),
    Mutant("labels of the neighbours", "loader.py", "labels=labels[rows]", "labels=labels[rows.roll(1)]", CHANCE),
    Mutant("one image left for batch norm", "loader.py", "rest < LEAST * world_size", "rest < 1", LOADER),
    Mutant("deviation without the mean", "loader.py", "square_mean - mean**2", "square_mean - mean", LOADER),
    Mutant("every process trains on all", "loader.py", "batch[runtime.rank :: runtime.world_size]",
           "batch[runtime.rank :]", LOADER),
    Mutant("evaluation skips the first image", "loader.py", "torch.arange(self.runtime.rank, len",
           "torch.arange(self.runtime.rank + 1, len", LOADER),
    # Scores
    Mutant("the least probable first", "metrics.py", "np.argsort(-self.logits", "np.argsort(self.logits", METRICS),
    Mutant("top-5 wants all five", "metrics.py", ".any(axis=1).mean()", ".all(axis=1).mean()", METRICS),
    Mutant("confusion transposed", "metrics.py", "labels * classes + predicted", "predicted * classes + labels",
           METRICS),
    Mutant("calibration gaps cancel", "metrics.py", "np.abs(gaps).sum()", "np.abs(gaps.sum())", METRICS),
    Mutant("interval of the wrong level", "metrics.py", "inv_cdf((1 + level) / 2)", "inv_cdf(level)", METRICS),
    Mutant("softmax to the base 2", "metrics.py", "np.exp(shifted)", "np.exp2(shifted)", METRICS),
    Mutant("loss from the largest logit", "metrics.py", "log_sum - wide[", "peak - wide[", METRICS),
    Mutant("recall is precision", "metrics.py", "recall=_ratio(hit, n)", "recall=_ratio(hit, say)", METRICS),
    Mutant("absent classes count", "metrics.py", "for row in per_class if row.n]", "for row in per_class]", METRICS),
    # Prediction
    Mutant("evaluation in training mode", "predict.py", "    model.eval()", "    model.train()", COMPANY),
    Mutant("scale without 255", "preprocess.py", "div_(255 * std)", "div_(std)", PREPROCESS),
    Mutant("corner, not centre", "preprocess.py", "start = (self.resize - self.size) // 2", "start = 0", PREPROCESS),
    Mutant("labels matched by position", "evaluate.py", "labels=mapping[split.labels]", "labels=split.labels", NAMES),
    Mutant("members of equal weight", "models/ensemble.py", "math.log(about.weight)", "math.log(0.5)",
           MEMBERS),
    Mutant("member normalised the wrong way", "models/ensemble.py", "(mean - own_mean)", "(own_mean - mean)",
           ("test_ensemble.py::test_the_mean_is_that_of_the_members_answers",)),
    # Data
    Mutant("held-out images stay in training", "sources/splits.py", "np.setdiff1d(np.arange(len(labels)), out), out",
           "np.arange(len(labels)), out", SPLITS),
    Mutant("the same split for every seed", "sources/splits.py", "default_rng((seed, int(label)))",
           "default_rng((0, int(label)))", SPLITS),
    Mutant("EXIF 7 not mirrored", "sources/images.py", "if turn in (2, 3, 6, 7):", "if turn in (2, 3, 6):", IMAGES),
    Mutant("16 bits divided by 256", "sources/images.py", "factor = 1 / 257", "factor = 1 / 250", IMAGES),
    Mutant("bombs judged by width alone", "sources/images.py", "if width * height > MAX_PIXELS",
           "if width > MAX_PIXELS", IMAGES),
    Mutant("only the first .. refused", "sources/archive.py", '".." in place.parts', '".." in place.parts[:1]',
           ARCHIVES),
    # Trust
    Mutant("weights not held against their checksum", "bundle.py", "if digest(tensors) != card.tensors_sha256",
           "if not digest(tensors)", BUNDLE),
    Mutant("checkpoint not held against its checksum", "checkpoint.py", 'sha256(path / name) != entry["sha256"]',
           "not sha256(path / name)", CHECKPOINT),
    Mutant("only one checkpoint kept", "checkpoint.py", "KEPT = 2", "KEPT = 1",
           ("test_checkpoint.py::test_the_newest_two_are_kept",)),
    Mutant("seeds ignore their key", "runtime.py", "digest[:8]", "digest[:0]", ("test_runtime.py",)),
    Mutant("weights that are not numbers load", "models/weights.py", "isfinite().all()", "isfinite().any()",
           ("test_models.py::test_bad_contents_are_refused",)),
    Mutant("figures rounded in the table", "rundir.py", '"" if value is None else value',
           '"" if value is None else round(value, 6)', ("test_rundir.py::test_rows_come_back_to_the_bit",)),
)  # fmt: skip


def apply(mutant: Mutant, source: Path) -> str:
    """Put a mutant into a tree (``source`` is its ``resnetlab``), and return the text that was there before.

    Raises:
        ValueError: The fragment is not there exactly once.
    """
    path = source / mutant.file
    text = path.read_text(encoding="utf-8")
    if (found := text.count(mutant.fragment)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.fragment!r} is there {found} times, not once ({mutant.what})")
    path.write_text(text.replace(mutant.fragment, mutant.broken), encoding="utf-8")
    return text


def misplaced(source: Path) -> list[str]:
    """Return, for each mutant whose fragment is not in ``source`` exactly once, a line that says so."""
    texts = {name: (source / name).read_text(encoding="utf-8") for name in {mutant.file for mutant in MUTANTS}}
    counts = [(mutant, texts[mutant.file].count(mutant.fragment)) for mutant in MUTANTS]
    return [f"{m.file}: {m.fragment!r} is there {found} times ({m.what})" for m, found in counts if found != 1]
