"""Sums of metrics: averaged exactly over steps, over ragged batches, and across an interruption."""

import math
from collections.abc import Mapping

Sums = Mapping[str, tuple]
"""Metric -> (sum, count). Adding them and dividing last averages exactly, whatever the batches' weights."""


class Window:
    """Accumulates sums, fetched from the device, in Python floats, from one line of metrics to the next."""

    def __init__(self, totals: Mapping[str, tuple[float, float]] | None = None):
        self.totals = {name: (float(s), float(c)) for name, (s, c) in (totals or {}).items()}

    def add(self, sums: Sums) -> None:
        for name, (s, c) in sums.items():
            old_sum, old_count = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (old_sum + float(s), old_count + float(c))

    def means(self, prefix: str) -> dict[str, float]:
        """`prefix`_name -> sum / count; not a number where nothing was counted."""
        return {f"{prefix}_{name}": s / c if c else math.nan for name, (s, c) in self.totals.items()}


def first_non_finite(sums: Sums) -> str | None:
    """The first metric whose sum is infinite or not a number."""
    return next((name for name, (s, _) in sums.items() if not math.isfinite(s)), None)
