"""Error rates over the iterations, as lines: the mean over the seeds, with the smallest and the largest."""

from collections.abc import Sequence

from resnetlab.lab.records import HUES, ArmResult, Chart, Series


def charts(arms: Sequence[ArmResult]) -> tuple[Chart, ...]:
    """Return training and held-out error over the iterations, a line an arm: its mean over the seeds."""
    done = [one for one in arms if one.traces]
    if not done:
        return ()
    x = max((one.traces[0].iterations for one in done), key=len)
    titles = (("training", "Training error"), ("held_out", "Error on held-back images"))
    return tuple(
        Chart(
            title=title,
            unit="iteration",
            label="error (%)",
            x=x,
            series=tuple(
                _series(one.arm.name, arms.index(one) % HUES, [getattr(t, key) for t in one.traces], len(x))
                for one in done
            ),
        )
        for key, title in titles
    )


def _series(name: str, colour: int, curves: Sequence[Sequence[float | None]], length: int) -> Series:
    """Return the mean over the seeds, with the smallest and the largest, in percent."""
    mean: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for i in range(length):
        values = [100 * v for curve in curves if i < len(curve) and (v := curve[i]) is not None]
        mean.append(sum(values) / len(values) if values else None)
        low.append(min(values, default=None))
        high.append(max(values, default=None))
    band = len(curves) > 1
    return Series(
        name=name, colour=colour, y=tuple(mean), low=tuple(low) if band else (), high=tuple(high) if band else ()
    )
