"""The loss at each position of a window: what context is worth."""

import numpy as np

from efficient_attn.analysis.base import Run, Table, scores

BINS = 32


def positions(run: Run) -> Table:
    """Mean loss by how many tokens of the window come before, in at most `BINS` equal bins, with the standard error."""
    losses = run.losses(run.windows(run.context))
    rows = []
    for part in np.array_split(np.arange(losses.shape[1]), min(BINS, losses.shape[1])):
        values = losses[:, part].mean(axis=1)
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        rows.append((int(part[0]) + 1, int(part[-1]) + 1, *scores(values)[:2], error))
    notes = (f"Non-overlapping windows of {run.context} tokens, {len(losses):,} of them; each starts without memory.",)
    columns = ("tokens before, from", "to", "nats", "bits", "standard error")
    return Table("Loss by position", columns, rows, plot=("tokens before, from", ("nats",)), notes=notes)
