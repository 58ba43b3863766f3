"""Sums of metrics: averaged exactly over steps, over ragged batches, and across an interruption."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Sums = Mapping[str, tuple]
"""Metric -> (sum, count), numbers, or [N] of N replicas. Adding and dividing last averages exactly, whatever the weights."""


class Window:
    """Accumulates sums, fetched from the device, in float64, from one line of metrics to the next."""

    def __init__(self, totals: Mapping[str, Sequence] | None = None):
        self.totals = {name: (np.asarray(s, np.float64), np.asarray(c, np.float64)) for name, (s, c) in (totals or {}).items()}

    def add(self, sums: Sums) -> None:
        for name, (s, c) in sums.items():
            old_sum, old_count = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (old_sum + np.asarray(s, np.float64), old_count + np.asarray(c, np.float64))

    def to_json(self) -> dict[str, tuple]:
        return {name: (s.tolist(), c.tolist()) for name, (s, c) in self.totals.items()}

    def by_seed(self, name: str) -> list[float]:
        """sum / count of each replica, of the only one without replicas; not a number where nothing was counted."""
        return [float(s / c) if c else math.nan for s, c in zip(*map(np.atleast_1d, self.totals[name]))]

    def means(self, prefix: str) -> dict[str, Any]:
        """`prefix`_name -> sum / count, of replicas the mean; theirs are in the list `prefix`_name_by_seed."""
        means: dict[str, Any] = {f"{prefix}_{name}": statistics.mean(self.by_seed(name)) for name in self.totals}
        return means | {f"{prefix}_{name}_by_seed": self.by_seed(name) for name, (s, _) in self.totals.items() if s.ndim}


def first_non_finite(sums: Sums) -> str | None:
    """The first metric whose sum is infinite or not a number, in any replica."""
    return next((name for name, (s, _) in sums.items() if not np.all(np.isfinite(s))), None)
