"""What every analysis shares: a run's best model with its text, the loss of every token, and a table that is also a plot."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from efficient_attn import evaluation, workdir
from efficient_attn.mixers.context import Context
from efficient_attn.plan import Plan
from efficient_attn.reporting import figures
from efficient_attn.steps import MEMORY
from efficient_attn.tasks.base import Split

TOKENS_AT_A_TIME = 2**13


class AnalysisError(workdir.WorkdirError):
    """The analysis does not go with this run. The message says why."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One result. plot: the column of x and those of y, one line for each value of the column `lines` ("" for one)."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple]
    plot: tuple[str, tuple[str, ...]]
    lines: str = ""
    notes: tuple[str, ...] = ()
    log_x: bool = True

    def markdown(self) -> str:
        cells = [self.columns, ("---",) * len(self.columns), *([_cell(v) for v in row] for row in self.rows)]
        return "\n".join([f"# {self.title}", "", *(f"| {' | '.join(row)} |" for row in cells), "", *self.notes, ""])

    def figure(self) -> Figure:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        x, ys = self.plot
        groups = list(dict.fromkeys(self._column(self.lines))) if self.lines else [None]
        for group in groups:
            rows = [row for row in self.rows if group is None or row[self.columns.index(self.lines)] == group]
            for y in ys:
                pairs = [(row[self.columns.index(x)], row[self.columns.index(y)]) for row in rows]
                pairs = [(a, b) for a, b in pairs if isinstance(b, int | float) and math.isfinite(b)]
                label = " ".join(str(part) for part in (group, y if len(ys) > 1 else None) if part is not None)
                axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=label or y) if pairs else None
        if self.log_x:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=x, ylabel=", ".join(ys) if len(ys) < 3 else "", title=self.title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure

    def write(self, out: pathlib.Path, made_from: dict[str, Any]) -> None:
        """OUT.json, OUT.md and OUT.png, each whole or not at all."""
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        workdir.write_json(out.with_suffix(".json"), {**made_from, "title": self.title, "notes": list(self.notes), "rows": rows})
        aside = out.with_name(f".{out.name}.md.tmp")
        aside.write_text(self.markdown())
        aside.replace(out.with_suffix(".md"))
        figures.save(self.figure(), out.with_suffix(".png"))

    def _column(self, name: str) -> list:
        return [row[self.columns.index(name)] for row in self.rows]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's best model, and a stretch of one split's text.

    variables: parameters, and what else the model has. tokens: T + 1 consecutive tokens, so that T are predicted.
    """

    plan: Plan
    step: int
    variables: Any
    split: Split
    tokens: np.ndarray

    @property
    def context(self) -> int:
        """L, the length that the model was trained on."""
        return self.plan.task.length

    @property
    def has_memory(self) -> bool:
        return getattr(self.plan.model, "has_memory", False)

    def windows(self, length: int, stride: int | None = None, count: int = 0) -> Int[np.ndarray, "n T"]:
        """Every window of `length` + 1 tokens, a stride (by default `length`) apart; `count` > 0 takes so many, evenly spread.

        Raises `AnalysisError` where the text is shorter.
        """
        starts = np.arange(0, len(self.tokens) - length, stride or length)
        if not len(starts):
            raise AnalysisError(f"{len(self.tokens):,} tokens hold no window of {length:,}; give --tokens={length + 1} or more")
        if 0 < count < len(starts):
            starts = starts[np.arange(count) * len(starts) // count]
        return self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)

    def losses(self, windows: Int[np.ndarray, "n T"], model: nn.Module | None = None) -> Float[np.ndarray, "n t"]:
        """The negative log-likelihood, in nats, of every token of each window but its first.

        A model with memory reads a window in segments of the trained length, each continuing the last; others at once.
        """
        model, length = model or self.plan.model, windows.shape[1] - 1
        rows = max(1, min(len(windows), TOKENS_AT_A_TIME // length))
        segment = self.context if self.has_memory else length
        step = jax.jit(functools.partial(_token_losses, model))
        out = []
        for start in range(0, len(windows), rows):
            chunk = windows[start : start + rows]
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], rows - len(chunk), axis=0)])
            memory, parts = {}, []
            for at in range(0, length, segment):
                loss, memory = step({**self.variables, **memory}, jnp.asarray(padded[:, at : at + segment + 1]))
                parts.append(np.asarray(loss))
            out.append(np.concatenate(parts, axis=1)[: len(chunk)])
        return np.concatenate(out)


def _token_losses(model: nn.Module, variables: Any, tokens: Int[jax.Array, "B T"]) -> tuple[Float[jax.Array, "B t"], Any]:
    logits, memory = model.apply(variables, tokens[:, :-1], Context(), mutable=[MEMORY])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0], dict(memory)


def load(folder: pathlib.Path, split: Split, tokens: int) -> Run:
    """The best checkpoint of the language model in `folder`, with the first `tokens` tokens of a split.

    Raises `WorkdirError` where there is none, and `AnalysisError` where the run is no language model of running text.
    """
    _, plan = evaluation.open_run(folder)
    if not hasattr(plan.task, "tokens"):
        raise AnalysisError(f"analyses are of language models on running text; the run's task is {plan.config['task']['name']}")
    if plan.train.replicas > 1:
        raise AnalysisError("analyses are of one model; this run trained several seeds as one program (train.replicas)")
    plan.task.prepare()
    checkpoints = evaluation.open_checkpoints(plan, folder)
    step, state = evaluation.restore_best(checkpoints, plan, folder)
    checkpoints.close()
    return Run(plan, step, state.evaluated(), split, plan.task.tokens(split)[: tokens + 1])


def scores(losses: np.ndarray | float) -> tuple[float, float, float]:
    """Mean nats a token, bits a token and perplexity."""
    nats = float(np.mean(losses))
    return nats, nats / math.log(2), math.exp(min(nats, 700.0))


def doublings(first: int, last: int) -> Sequence[int]:
    return [first * 2**i for i in range(max(1, int(math.log2(last / first)) + 1))]
