"""What a claim is held against: functions of error rates that return verdicts, with the figures behind them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from resnetlab.lab.records import ArmResult, Verdict

if TYPE_CHECKING:
    from resnetlab.seeds import Spread

Results = Mapping[str, ArmResult]
Measure = Literal["training", "test"]


def above(results: Results, high: str, low: str, measure: Measure, *, or_equal: bool = False) -> Verdict:
    """Hold "the error of ``high`` is above that of ``low``" against every seed that both finished.

    It held where the means say so and every seed does; where the seeds disagree, nothing is decided.
    """
    relation = "at or above" if or_equal else "above"
    claim = f"The {measure} error of {high} is {relation} that of {low}."
    first, second = (_by_seed(results.get(name), measure) for name in (high, low))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return Verdict(claim=claim, held=None, why="Not both of them finished.")
    a, b = (sum(values[s] for s in seeds) / len(seeds) for values in (first, second))
    agree = sum(first[s] >= second[s] if or_equal else first[s] > second[s] for s in seeds)
    mean_says = a >= b if or_equal else a > b
    held = True if mean_says and agree == len(seeds) else False if not mean_says and agree == 0 else None
    counted = f"so in {agree} of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    why = f"{percent(a)} against {percent(b)}, {counted}{_luck(len(seeds)) if held and len(seeds) > 1 else ''}."
    return Verdict(claim=claim, held=held, why=why)


def falling(results: Results, names: Sequence[str], measure: Measure, claim: str) -> Verdict:
    """Hold "the error falls from each of these to the next" against the means; it needs all of them."""
    spreads = [_spread(results.get(name), measure) for name in names]
    done = [(name, s.mean) for name, s in zip(names, spreads, strict=True) if s is not None]
    if len(done) < len(names):
        return Verdict(claim=claim, held=None, why="Not all of them finished.")
    steps = sum(b[1] < a[1] for a, b in pairwise(done))
    listed = ", ".join(f"{name} {percent(mean)}" for name, mean in done)
    why = f"{listed}: it falls in {steps} of {len(done) - 1} steps."
    held = True if steps == len(done) - 1 else None if done[-1][1] < done[0][1] else False
    return Verdict(claim=claim, held=held, why=why)


def better_than(results: Results, base: str, others: Sequence[str], measure: Measure = "test") -> tuple[Verdict, ...]:
    """Hold "this error is below the base's" for each of several networks."""
    return tuple(above(results, base, name, measure) for name in others)


def degradation(results: Results) -> tuple[Verdict, ...]:
    """Figure 6: depth harms plain networks already in training, and does not harm residual ones."""
    return (
        above(results, "plain-56", "plain-20", "training"),
        above(results, "ResNet-20", "ResNet-56", "training", or_equal=True),
        above(results, "plain-56", "ResNet-56", "training"),
        above(results, "plain-56", "plain-20", "test"),
        above(results, "ResNet-20", "ResNet-56", "test", or_equal=True),
    )


def depth(results: Results) -> tuple[Verdict, ...]:
    """Table 6: deeper is better up to 110 layers; 1,202 layers train as well and generalise less."""
    names = [name for name in ("ResNet-20", "ResNet-32", "ResNet-44", "ResNet-56", "ResNet-110") if name in results]
    found = [
        falling(results, names, "test", "Test error falls with every step of depth from 20 to 110 layers."),
        falling(results, names, "training", "Training error falls with every step of depth from 20 to 110 layers."),
    ]
    if "ResNet-1202" in results:
        found.append(above(results, "ResNet-1202", "ResNet-110", "test"))
    return tuple(found)


def shortcuts(results: Results) -> tuple[Verdict, ...]:
    """Table 3's order: C a little better than B, B than A, all of them far better than none."""
    return (
        *better_than(results, "plain-32, no shortcuts", ("A: zero-padded", "B: projections where shapes change")),
        above(results, "A: zero-padded", "B: projections where shapes change", "test", or_equal=True),
        above(results, "B: projections where shapes change", "C: projections everywhere", "test", or_equal=True),
    )


def compare(results: Results) -> tuple[Verdict, ...]:
    """A linear softmax does badly; residual networks do best."""
    others = [name for name in results if name != "linear softmax"]
    return (
        *better_than(results, "linear softmax", others),
        above(results, "VGG-16", "ResNet-18", "test"),
        above(results, "GoogLeNet", "ResNet-18", "test"),
    )


def blocks(base: str) -> Callable[[Results], tuple[Verdict, ...]]:
    """Each idea against the plain old block."""
    return lambda results: better_than(results, base, [name for name in results if name != base])


def percent(share: float) -> str:
    """Write an error for people: ``12.34 %``."""
    return f"{share:.2%}".replace("%", "\N{NO-BREAK SPACE}%")


def _luck(seeds: int) -> str:
    return f" (by chance alone, all seeds agree in this direction once in {2**seeds})"


def _by_seed(result: ArmResult | None, measure: Measure) -> dict[int, float]:
    """Return the error of each finished run."""
    if result is None:
        return {}
    if measure == "training":
        return {t.seed: t.training[-1] for t in result.traces if t.training}
    return {t.seed: t.test for t in result.traces if t.test is not None}


def _spread(result: ArmResult | None, measure: Measure) -> "Spread | None":
    return None if result is None else result.training if measure == "training" else result.test
