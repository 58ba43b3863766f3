"""What far context is worth: the loss of the last tokens when the first ones are shuffled, replaced or dropped."""

from collections.abc import Callable, Mapping

import numpy as np

from efficient_attn.analysis.base import Run, Table

STEPS = 8
WINDOWS = 64


def _shuffle(windows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.permuted(windows[:, :n], axis=1), windows[:, n:]], axis=1)


def _replace(windows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """The first n tokens of another window instead."""
    return np.concatenate([np.roll(windows, 1, axis=0)[:, :n], windows[:, n:]], axis=1)


def _drop(windows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return windows[:, n:]


PERTURBATIONS: Mapping[str, Callable] = {"shuffle": _shuffle, "replace": _replace, "drop": _drop}
"""(windows [n, L + 1], how many tokens, generator) -> the same windows with their first tokens perturbed."""


def perturbation(run: Run) -> Table:
    """The change in the loss of the last quarter of windows of L tokens against how many of the first ones are perturbed.

    Sun et al. 2021 (arXiv 2109.09115, section 4): where the curve is flat, the order or the content of tokens that far away, or
    their presence, tells the model nothing. The targets and the tokens next to them are the same at every point.
    """
    windows = run.windows(run.context, count=WINDOWS)
    L, targets = run.context, max(1, run.context // 4)
    base = run.losses(windows)[:, -targets:].mean(axis=1)
    rows = []
    for name, perturb in PERTURBATIONS.items():
        rng = np.random.default_rng(0)
        for n in sorted({(L - targets) * i // STEPS for i in range(STEPS + 1)}):
            change = run.losses(perturb(windows, n, rng))[:, -targets:].mean(axis=1) - base if n else 0 * base
            error = float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else float("nan")
            rows.append((name, n, L - targets - n, float(change.mean()), error, float((base + change).mean())))
    notes = (f"{len(windows)} windows of {L} tokens; the loss is that of the last {targets}. Seed 0. Memory starts empty.",)
    columns = ("perturbation", "first tokens perturbed", "intact before targets", "change in nats", "standard error", "nats")
    plot = ("first tokens perturbed", ("change in nats",))
    return Table("Context perturbation", columns, rows, plot, lines="perturbation", notes=notes, log_x=False)
