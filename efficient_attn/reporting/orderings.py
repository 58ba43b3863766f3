"""Published orderings, tested on our figures: seeds in pairs, the mean of their differences against its standard deviation."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from efficient_attn.reporting.summary import Figure, Summary
from efficient_attn.tables import Ordering, Place

MARGIN = 2.0
"""An ordering shows where the mean difference is more than so many standard deviations of the differences."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """differences: worse minus better by seed, so that positive ones agree; () where not both figures have all their seeds."""

    ordering: Ordering
    unit: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.differences) if len(self.differences) > 1 else None

    @property
    def says(self) -> str:
        if not self.differences:
            return "not run"
        if self.sd is None:
            return "one seed: not tested"
        if abs(self.mean) <= MARGIN * self.sd:
            return "does not show"
        return "shows" if self.mean > 0 else "the other way round"


def judge(summary: Summary) -> list[Verdict]:
    """One verdict for each ordering of the table whose sections are in `summary`."""
    figures: dict[Place, Figure] = {(section.name, f.row, f.column): f for section in summary.sections for f in section}
    return [
        _verdict(ordering, figures)
        for ordering in summary.table.orderings
        if {ordering.better[0], ordering.worse[0]} <= {section.name for section in summary.sections}
    ]


def _verdict(ordering: Ordering, figures: Mapping[Place, Figure]) -> Verdict:
    better, worse = figures[ordering.better], figures[ordering.worse]
    sign = 1.0 if better.metric.better == "min" else -1.0
    pairs = zip(_by_seed(better), _by_seed(worse), strict=True) if _seeds(better) == _seeds(worse) != () else ()
    return Verdict(ordering, better.metric.unit, tuple(sign * (w - b) for b, w in pairs))


def _seeds(figure: Figure) -> Sequence[int]:
    """The seeds of a figure that lacks none."""
    if figure.chosen is None or len(figure.scores) < figure.expected:
        return ()
    return tuple(sorted(seed for cell, _ in figure.chosen.members for seed in cell.seeds))


def _by_seed(figure: Figure) -> list[float]:
    seeds = [seed for cell, _ in figure.chosen.members for seed in cell.seeds]
    return [score for _, score in sorted(zip(seeds, figure.scores, strict=True))]
