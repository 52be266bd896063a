"""The laboratory without training: experiments as data, what a budget leaves, verdicts, the report."""

import csv
import io
import json
import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resnetlab import loader, models, rundir, seeds, sources
from resnetlab.config import override
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.lab import budget, conduct, judges, page, picture, responses, runner, tables, words
from resnetlab.lab.curves import charts
from resnetlab.lab.experiments import EXPERIMENTS, experiment
from resnetlab.lab.records import (
    HUES,
    Arm,
    ArmResult,
    Chart,
    Facts,
    Failure,
    Finding,
    Outcome,
    Plan,
    Request,
    Run,
    Series,
    Sheet,
    Trace,
)
from resnetlab.recipes import Facts as RecipeFacts
from resnetlab.recipes import recipe

CIFAR = Facts(name="cifar10", train=50_000, test=10_000, size=32, classes=10, channels=3)
DIGITS = Facts(name="digits", train=1438, test=359, size=8, classes=10, channels=1)


def request(name: str, time: str = "30m", seeds: int = 2, *settings: str) -> Request:
    return Request(experiment=name, data="cifar10", budget=time, seeds=seeds, settings=settings)


def at_speed(seconds: Callable[[Run], float]) -> budget.Measure:
    """Return a measure that says what ``seconds`` says of each run."""
    return lambda runs: [budget.Speed(seconds=seconds(run)) for run in runs]


def like_two_cores(run: Run) -> float:
    """Seconds of a step on one core of a laptop: 2,000 images/s of 16 px through half of ResNet-20."""
    settings = dict(s.split("=") for s in run.settings)
    layers = int((re.findall(r"\d+", run.model) or ["1"])[0])
    pixels, width = int(settings["data.size"]) ** 2, float(settings.get("model.width", 1))
    return int(settings["batch_size"]) * layers / 20 * pixels / 256 * width / 0.5 / 2000


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_states_its_claim_and_lists_runs_that_can_be_built(name: str) -> None:
    chosen = experiment(name)
    doc = EXPERIMENTS[name].__doc__ or ""
    assert len(doc.split()) > 30 and chosen.claim and chosen.place and chosen.caution
    assert len({arm.name for arm in chosen.arms}) == len(chosen.arms)
    assert bool(chosen.arms) or chosen.measure == "complexity"
    for arm in chosen.arms:
        base = recipe(chosen.recipe, RecipeFacts(images=50_000, size=32, mirrors=True, model=arm.model))
        filled = override(base, [*chosen.settings, *arm.settings])
        known = {"num_classes": 10, "image_size": 32}
        config = type(filled.model)(**{**filled.model.model_dump(exclude_unset=True), **known})
        assert models.cost(config, 32).parameters > 0
    assert {a for _, names in chosen.panels for a in names} <= {arm.name for arm in chosen.arms}


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if experiment(name).arms])
def test_every_cut_run_can_be_built(name: str) -> None:
    plan = budget.plan(experiment(name), request(name, "2h"), CIFAR, at_speed(lambda run: 0.1), jobs=2)
    assert plan.scale and plan.scale.short
    for run in plan.runs:
        base = recipe("paper", RecipeFacts(images=50_000, size=32, mirrors=True, model=run.model))
        chosen = override(base, run.settings)
        size = chosen.data.size or 32
        config = type(chosen.model)(**{**chosen.model.model_dump(exclude_unset=True), "image_size": size})
        assert models.cost(config, size).macs > 0
        assert chosen.model.zero_init == run.model.startswith("res")


def test_there_are_the_seven_experiments_of_the_issue() -> None:
    assert list(EXPERIMENTS) == ["degradation", "depth", "shortcuts", "responses", "complexity", "compare", "blocks"]
    with pytest.raises(UsageError, match='Did you mean "degradation"'):
        experiment("degredation")


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("2h", 7200), ("90s", 90), ("1.5h", 5400), ("1d", 86400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert budget.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-3m", "half an hour"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Budgets look like"):
        budget.seconds_of(text)


def test_runs_end_when_the_fullest_lane_does() -> None:
    assert budget.makespan([3, 3, 2, 2, 2], 2) == 7  # 3+2+2 and 3+2
    assert budget.makespan([5], 4) == 5
    assert budget.makespan([1, 2, 3], 1) == 6
    assert budget.makespan([1, 1, 3], 2) == 4  # a plan's runs start in its order, the longest not before the others


def test_a_plan_fits_its_time_and_uses_it() -> None:
    plan = budget.plan(experiment("degradation"), request("degradation"), CIFAR, at_speed(like_two_cores), jobs=2)
    assert plan.scale and len(plan.runs) == 8
    assert 0.7 * 1800 < plan.seconds <= 0.9 * 1800
    assert plan.scale.iterations >= experiment("degradation").least
    assert plan.seconds == pytest.approx(budget.makespan([run.seconds for run in plan.runs], 2))


def test_all_networks_of_a_plan_get_the_same_images_and_iterations() -> None:
    plan = budget.plan(experiment("degradation"), request("degradation"), CIFAR, at_speed(like_two_cores), jobs=2)
    shared = {tuple(s for s in run.settings if not s.startswith("model.")) for run in plan.runs}
    assert len(shared) == 1
    assert [run.seed for run in plan.runs] == [0] * 4 + [1] * 4
    assert len({run.label for run in plan.runs}) == 8


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if experiment(name).arms])
@pytest.mark.parametrize("time", ["20m", "2h", "20h", "300h"])
def test_more_time_never_means_a_smaller_experiment(name: str, time: str) -> None:
    def size(text: str) -> tuple[int, float, int]:
        plan = budget.plan(experiment(name), request(name, text), CIFAR, at_speed(like_two_cores), jobs=2)
        assert plan.scale
        return plan.scale.size, plan.scale.width, plan.scale.images

    assert size(time) <= size("2000h")
    assert size("2000h") == (32, 1.0, 50_000)


def test_full_is_the_papers_experiment() -> None:
    plan = budget.plan(experiment("depth"), request("depth", "full", 5), CIFAR, at_speed(like_two_cores), jobs=1)
    assert plan.scale
    assert (plan.scale.size, plan.scale.width, plan.scale.images, plan.scale.batch) == (32, 1, 50_000, 128)
    assert 64_000 <= plan.scale.iterations < 64_000 + 352  # whole epochs of 45,000 images
    assert "resnet1202" in {run.model for run in plan.runs}
    assert plan.words == ()


def test_a_plan_says_in_words_what_was_cut() -> None:
    plan = budget.plan(experiment("depth"), request("depth"), CIFAR, at_speed(like_two_cores), jobs=2)
    told = " ".join(plan.words)
    for part in ("ResNet-1202 is trained with --budget full only", "16 × 16 pixels instead of 32 × 32", "0.5 times",
                 "of 50,000 training images", "instead of 64,000 of 128", "2 seeds"):  # fmt: skip
        assert part in told


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    slow = at_speed(lambda run: 10.0)
    with pytest.raises(ResNetLabError, match=r"does not fit into 5m here: its smallest version.* takes about .* h"):
        budget.plan(experiment("depth"), request("depth", "5m"), CIFAR, slow, jobs=1)


def test_settings_by_hand_are_what_is_done_and_what_is_told() -> None:
    never = at_speed(lambda run: pytest.fail("nothing needs to be measured"))
    asked = request("degradation", "30m", 1, "epochs=3", "data.size=12", "batch_size=32", "data.limit=320")
    plan = budget.plan(experiment("degradation"), asked, CIFAR, never, jobs=1)
    assert plan.scale
    assert (plan.scale.size, plan.scale.images, plan.scale.iterations) == (12, 320, 27)
    chosen = override(recipe("paper", RecipeFacts(images=50_000, size=32, mirrors=True)), plan.runs[0].settings)
    assert (chosen.epochs, chosen.data.size, chosen.batch_size, chosen.data.limit) == (3, 12, 32, 320)
    with pytest.raises(UsageError, match='Did you mean "epochs"'):
        budget.plan(experiment("depth"), request("depth", "30m", 1, "epoch=3"), CIFAR, never, jobs=1)
    with pytest.raises(UsageError, match="chooses networks and seeds itself"):
        budget.plan(experiment("depth"), request("depth", "30m", 1, "seed=3"), CIFAR, never, jobs=1)


@pytest.mark.parametrize(
    "given",
    [
        ("data.size=none", "data.limit=none", "data.limit_test=none"),
        ("data.size=32", "data.limit=60000", "data.limit_test=20000"),
    ],
)
def test_none_by_hand_is_all_and_more_than_all_is_all(given: Sequence[str]) -> None:
    asked = request("degradation", "30m", 5, "epochs=182", *given)
    plan = budget.plan(experiment("degradation"), asked, CIFAR, lambda runs: [], jobs=1)
    assert plan.scale and (plan.scale.size, plan.scale.images, plan.scale.test) == (32, 50_000, 10_000)
    assert not any(word in " ".join(plan.words) for word in ("pixels", "training images", "test images"))


@pytest.mark.parametrize(("images", "drop_last"), [(640, False), (641, False), (642, False), (642, True), (30, True)])
def test_an_epoch_is_planned_with_the_iterations_that_it_has(images: int, drop_last: bool) -> None:
    given = ("epochs=1", f"data.limit={images}", "batch_size=64", "data.val=0", f"data.drop_last={drop_last}")
    plan = budget.plan(experiment("depth"), request("depth", "30m", 1, *given), CIFAR, lambda runs: [], jobs=1)
    assert plan.scale and plan.scale.iterations == loader.steps_per_epoch(images, 64, drop_last, 1)


def test_small_images_are_not_made_smaller_and_a_width_is_multiplied() -> None:
    plan = budget.plan(experiment("blocks"), request("blocks", "1h"), DIGITS, at_speed(lambda run: 0.02), jobs=4)
    assert plan.scale and plan.scale.size == 8
    wide = next(run for run in plan.runs if run.arm == "twice as wide")
    usual = next(run for run in plan.runs if run.arm == "GELU")
    if plan.scale.width == 1:
        assert "model.width=2" in wide.settings
    else:
        assert "model.width=1" in wide.settings and "model.width=0.5" in usual.settings
    compared = budget.plan(experiment("compare"), request("compare", "1h"), DIGITS, at_speed(lambda run: 0.02), jobs=4)
    assert compared.scale and compared.scale.size == 32  # VGG takes no less


def test_a_width_by_hand_is_multiplied_too_and_held_back_images_are_no_iterations() -> None:
    never = at_speed(lambda run: pytest.fail("nothing needs to be measured"))
    given = ("epochs=1", "model.width=0.5", "data.val=0")

    def settings(name: str, arm: str) -> list[str]:
        plan = budget.plan(experiment(name), request(name, "1h", 1, *given), CIFAR, never, jobs=1)
        assert plan.scale and plan.scale.iterations == -(-plan.scale.images // plan.scale.batch)
        return [s for s in next(run.settings for run in plan.runs if run.arm == arm) if "width" in s]

    assert settings("blocks", "twice as wide") == ["model.width=1"]
    assert settings("blocks", "GELU") == ["model.width=0.5"]
    assert settings("compare", "VGG-16") == []
    own = CIFAR.model_copy(update={"val": 5_000})
    plan = budget.plan(experiment("blocks"), request("blocks", "1h", 1, "epochs=1"), own, never, jobs=1)
    assert plan.scale and plan.scale.iterations == -(-plan.scale.images // plan.scale.batch)


def test_without_a_test_split_it_is_said_what_stands_in_for_it() -> None:
    facts = DIGITS.model_copy(update={"test": 0, "val": 359})
    plan = budget.plan(experiment("depth"), request("depth"), facts, at_speed(lambda run: 0.02), jobs=4)
    assert "The data has no test split: its validation split stands in for it." in plan.words
    arms = tuple(replace(r, arm=a) for r, a in zip(degraded(), experiment("degradation").arms, strict=True))
    shown = Outcome(experiment=experiment("degradation"), plan=plan, path="", command="", machine="", arms=arms)
    assert "on 100 images of its validation split, as the data has no test split" in words.figures(shown).caption


@pytest.mark.parametrize(
    ("given", "told"), [((), True), (("model.zero_init=1",), True), (("model.zero_init=false",), False)]
)
def test_it_is_told_how_the_blocks_really_start(given: Sequence[str], told: bool) -> None:
    asked = request("depth", "30m", 1, *given)
    plan = budget.plan(experiment("depth"), asked, CIFAR, at_speed(like_two_cores), jobs=2)
    assert [s for s in plan.runs[0].settings if "zero_init" in s] == list(given or [budget.SHORT_START])
    assert any("start as the identity" in word for word in plan.words) == told == bool(responses._words(plan))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("blocks", "model.activation=relu", "model.activation is what sets GELU apart from the others: leave it out"),
        ("shortcuts", "model.shortcut=B", "model.shortcut is what sets A: zero-padded apart from the others"),
        (
            "degradation",
            "model.shortcut=B",
            "plain-20 is a plain network: it has no shortcuts. Leave out model.shortcut",
        ),
    ],
)
def test_what_sets_networks_apart_cannot_be_set_for_all(name: str, given: str, message: str) -> None:
    never = at_speed(lambda run: pytest.fail("nothing needs to be measured"))
    with pytest.raises(UsageError, match=re.escape(message)):
        budget.plan(experiment(name), request(name, "30m", 1, given), CIFAR, never, jobs=1)


@pytest.mark.parametrize(("test", "kind"), [(359, "test"), (0, "validation")])
def test_responses_say_which_images_they_are_of(test: int, kind: str, tmp_path: Path) -> None:
    facts = DIGITS.model_copy(update={"test": test, "val": 359})
    plan = budget.plan(experiment("responses"), request("responses"), facts, at_speed(lambda run: 0.02), jobs=4)
    assert f"{kind} images" in responses.measure(plan, tmp_path).sheets[0].caption


def test_what_would_leave_nothing_to_score_is_refused() -> None:
    facts, asked = DIGITS.model_copy(update={"test": 0, "val": 359}), request("depth", "30m", 1, "data.val=0")
    with pytest.raises(UsageError, match=r"data\.val=0 leaves nothing to score: the data has no test split"):
        budget.plan(experiment("depth"), asked, facts, at_speed(lambda run: 0.02), jobs=1)


def test_scoring_a_validation_split_of_the_data_takes_time_unless_there_is_none_to_be() -> None:
    def seconds(val: int, *given: str) -> float:
        facts, asked = CIFAR.model_copy(update={"val": val}), request("depth", "full", 1, *given)
        plan = budget.plan(experiment("depth"), asked, facts, at_speed(lambda run: 1.28), jobs=1)
        assert plan.scale
        return plan.runs[0].seconds / plan.scale.epochs

    assert seconds(50_000) - seconds(0, "data.val=0") == pytest.approx(50_000 * 0.01 / budget.EVAL, rel=0.01)
    assert seconds(50_000, "data.val=0") == seconds(0, "data.val=0")


def result(name: str, training: Sequence[float], test: Sequence[float]) -> ArmResult:
    """Return an arm whose runs end with these errors, a run a seed."""
    traces = tuple(
        Trace(seed=i, label=f"{name}-{i}", iterations=(10, 20), training=(0.9, a), held_out=(0.9, b), test=b, n=100,
              seconds=12.0, images_per_second=100.0)
        for i, (a, b) in enumerate(zip(training, test, strict=True))
    )  # fmt: skip
    spread = seeds.spread
    return ArmResult(arm=Arm(name=name, model="plain20"), traces=traces, parameters=1000, macs=10**6,
                     training=spread(training, 1.0), test=spread(test, 1.0))  # fmt: skip


def degraded(plain56: Sequence[float] = (0.5, 0.6)) -> tuple[ArmResult, ...]:
    return (
        result("plain-20", (0.3, 0.4), (0.35, 0.45)),
        result("plain-56", plain56, plain56),
        result("ResNet-20", (0.2, 0.3), (0.3, 0.35)),
        result("ResNet-56", (0.15, 0.25), (0.29, 0.34)),
    )


def test_the_claim_holds_where_every_seed_says_so_and_not_otherwise() -> None:
    def first(plain56: Sequence[float]) -> bool | None:
        return judges.degradation({one.arm.name: one for one in degraded(plain56)})[0].held

    assert all(v.held for v in judges.degradation({one.arm.name: one for one in degraded()}))
    assert first((0.2, 0.3)) is False
    assert first((0.9, 0.35)) is first((0.1, 0.45)) is None  # the seeds disagree
    alone = judges.degradation({"plain-20": degraded()[0]})
    assert {v.held for v in alone} == {None}


def test_a_fall_needs_every_step() -> None:
    def fall(*means: float) -> bool | None:
        found = {str(i): result(str(i), (m, m), (m, m)) for i, m in enumerate(means)}
        return judges.falling(found, list(found), "test", "it falls").held

    assert fall(0.3, 0.2, 0.1) is True
    assert fall(0.3, 0.1, 0.2) is None
    assert fall(0.1, 0.2, 0.3) is False


def test_a_training_error_is_that_of_the_end() -> None:
    def trained(name: str, *errors: float) -> ArmResult:
        one = result(name, errors[-1:], (0.5,))
        return replace(one, traces=(replace(one.traces[0], training=errors),))

    found = {"a": trained("a", 0.1, 0.5), "b": trained("b", 0.3, 0.4)}
    assert judges.above(found, "a", "b", "training").held is True


def test_1202_layers_are_held_to_generalise_less_than_110() -> None:
    found = {name: result(name, (0.1,), (test,)) for name, test in (("ResNet-110", 0.2), ("ResNet-1202", 0.3))}
    assert judges.depth(found)[-1].held is True


@pytest.fixture
def outcome() -> Outcome:
    """A finished experiment, made up."""
    chosen = experiment("degradation")
    plan = budget.plan(chosen, request("degradation"), CIFAR, at_speed(like_two_cores), jobs=2)
    arms = tuple(replace(r, arm=a) for r, a in zip(degraded(), chosen.arms, strict=True))
    judged = tuple(judges.degradation({one.arm.name: one for one in arms}))
    return Outcome(experiment=chosen, plan=plan, path="lab/degradation", command="resnetlab lab degradation cifar10",
                   machine="a machine", arms=arms, verdicts=judged, seconds=96.0)  # fmt: skip


def test_the_page_says_whether_the_claim_held_beside_the_papers_figures(outcome: Outcome) -> None:
    shown = page.render(outcome)
    for part in (
        "The claim held in what was measured here",
        "6.97",
        "figures 1 and 6",
        "do not allow one to conclude",
        "16 × 16 pixels instead",
        "resnetlab lab degradation cifar10",
        "iteration 20",
        "55.00 ± 7.07",
        "Lines are means over 2 seeds; the picture beside this page also shows their range.",
    ):
        assert part in shown, part
    assert "<script src" not in shown and "http://" not in shown.replace("http://www.w3.org", "")


def test_the_page_names_what_failed_and_what_is_missing(outcome: Outcome) -> None:
    broken = replace(outcome, failures=(Failure(label="plain-56-seed1", reason="<b>NaN</b>"),), missing=("x-seed0",))
    shown = page.render(broken)
    assert "plain-56-seed1 failed: &lt;b&gt;NaN" in shown and "Not finished yet: x-seed0" in shown
    assert broken.to_dict()["complete"] is False
    json.dumps(broken.to_dict())


def test_an_experiment_of_which_nothing_finished_still_has_a_page(outcome: Outcome) -> None:
    empty = replace(outcome, arms=tuple(ArmResult(arm=one.arm, traces=()) for one in outcome.arms), verdicts=())
    assert "Nothing was finished" in page.render(empty)
    assert picture.draw(empty) is None


def test_the_picture_and_the_tables_hold_what_was_measured(outcome: Outcome, tmp_path: Path) -> None:
    assert picture.write(outcome, tmp_path / "figure.png")
    paths = {p.name: list(csv.DictReader(p.read_text().splitlines())) for p in tables.write(outcome, tmp_path)}
    assert len(paths["curves.csv"]) == 4 * 2 * 2 and len(paths["runs.csv"]) == 8
    assert paths["curves.csv"][1] == {"network": "plain-20", "seed": "0", "iteration": "20", "training error": "0.3",
                                      "held-back error": "0.35"}  # fmt: skip


def test_lines_are_means_over_the_seeds_with_their_range(outcome: Outcome) -> None:
    training = charts(outcome.arms)[0]
    assert training.x == (10, 20)
    assert training.series[0].y == pytest.approx((90, 35))
    assert (training.series[0].low[1], training.series[0].high[1]) == pytest.approx((30, 40))


def test_every_line_has_a_colour_of_its_own_on_the_page_and_in_the_picture(outcome: Outcome) -> None:
    style = files("resnetlab.report").joinpath("page.css").read_text("utf-8")
    of_lines, of_keys = (
        re.findall(rf"{start}run(\d+){pseudo} {{ {name}: ([^;]+); }}", style)
        for start, pseudo, name in ((r"\.", "", "color"), (r"\.key\.", "::before", "border-color"))
    )
    assert sorted(of_lines) == sorted(of_keys)
    assert len({colour for _, colour in of_lines}) == len(of_lines) == HUES == len(set(picture.COLOURS))
    assert all(len(row().arms) <= HUES for row in EXPERIMENTS.values())
    many = tuple(replace(outcome.arms[0], arm=Arm(name=f"net {i}", model="resnet20")) for i in range(HUES))
    assert sorted(line.colour for line in charts(many)[0].series) == list(range(HUES))


def test_measured_tables_and_charts_are_shown(outcome: Outcome, tmp_path: Path) -> None:
    sheet = Sheet(name="costs", title="Costs", columns=("network", "bytes", "share"), rows=(("a", 3 << 20, None),),
                  forms={"bytes": "bytes", "share": "percent"})  # fmt: skip
    line = Series(name="ResNet-20", colour=0, y=(0.5, None))
    chart = Chart(title="Responses", unit="layer", label="std", x=(1, 2), series=(line,), form="number")
    seen = replace(outcome, finding=Finding(charts=(chart,), sheets=(sheet,)))
    shown = page.render(seen)
    assert "3\N{NO-BREAK SPACE}MiB" in shown and "layer 2" in shown
    assert "Lines are means over 2 seeds." in shown, "the picture has the chart without ranges alone"
    assert picture.draw(seen) is not None
    assert [p.name for p in tables.write(seen, tmp_path)][-1] == "costs.csv"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(0.1234, "percent", "12.34 %"), (272_474, "quantity", "272,474"), (15.3, ".1f G", "15.3 G"), (None, "", "–"),
     (2 << 30, "bytes", "2.00 GiB"), ("x", "percent", "x"), (1234, "", "1,234")],
)  # fmt: skip
def test_values_are_written_for_people(value: object, form: str, text: str) -> None:
    assert words.write(value, form).replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = budget.plan(experiment("blocks"), request("blocks"), CIFAR, at_speed(like_two_cores), jobs=2)
    assert Plan.model_validate_json(json.dumps(plan.model_dump(mode="json"))) == plan


def test_the_data_is_looked_up_as_its_runs_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    table = pa.table({"image": [png.getvalue()] * 40 + [None], "label": [0, 1] * 20 + [0]})
    pq.write_table(table, tmp_path / "images.parquet")
    asked = Request(experiment="depth", data=str(tmp_path), budget="full", seeds=1)
    with pytest.raises(ResNetLabError, match="have no image"):
        conduct._facts(asked)
    load = Mock(side_effect=sources.load)
    monkeypatch.setattr(sources, "load", load)
    facts = conduct._facts(asked.model_copy(update={"settings": ("data.skip_broken=true", "data.split_seed=3")}))
    assert facts.train + facts.test == 40 and load.call_args.kwargs["split_seed"] == 3


def test_the_command_lists_experiments_and_refuses_what_is_none(command: Any, tmp_path: Path) -> None:
    status, out, _ = command("lab")
    assert status == 0 and all(name in out for name in EXPERIMENTS)
    assert [row["name"] for row in json.loads(command("lab", "--json")[1])] == list(EXPERIMENTS)
    for line, message in (
        (("degradtion",), "Did you mean"),
        (("depth", "--budget", "soon"), "Budgets look like"),
        (("depth", "--seeds", "0"), "from 1 to 100"),
        (("depth", "--jobs", "0"), "from 1 on"),
        (("depth", "--runs", "x"), "trains its own networks"),
        (("depth", "digits", "more"), "one NAME and one DATA"),
        (("depth", "nowhere"), "no data set"),
        (("responses", "--runs", "nowhere"), "not the directory of an experiment"),
    ):
        status, out, err = command("lab", *line, "--out", tmp_path / "lab")
        assert (status, out) == (2, ""), line
        assert message in err, line
    assert not (tmp_path / "lab").exists()


def test_a_directory_of_something_else_is_left_alone(command: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, err = command("lab", "depth", "--out", tmp_path)
    assert status == 1 and "is not empty, and holds no experiment" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_directory_is_for_one_lab_at_a_time(command: Any, tmp_path: Path) -> None:
    (tmp_path / "lab.json").write_text("{}")
    with rundir.locked(tmp_path):
        status, _, err = command("lab", "depth", "--out", tmp_path)
    assert status == 1 and "Another experiment is running in" in err


def test_a_run_takes_the_gpu_that_the_fewest_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def popen(*_: Any, env: dict[str, str], **__: Any) -> Mock:
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return Mock()

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(threading, "Thread", Mock())
    plan = Mock()
    plan.request.data = "digits"
    made = runner.Runner(
        plan=plan, path=tmp_path, recipe="paper", board=Mock(), jobs=2, threads=1, command="", devices=("0", "1")
    )
    made.states = [runner.State(run=Mock(label=label, model_dump=lambda **_: {})) for label in "abcd"]
    a, b, c, d = made.states
    made._start(a)
    made._start(b)
    a.ended = "done"
    made._start(c)
    b.ended = "done"
    made._start(d)
    for state in made.states:
        assert state.stderr is not None
        state.stderr.close()
    assert given == ["0", "1", "0", "1"]
