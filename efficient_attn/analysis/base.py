"""What every analysis shares: a run's best model with its text, the loss of every token, and a table that is also a plot."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
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
    """One result. plot: the column of x and those of y, one line for each value of the column `lines` ("" for one).

    maps: images besides, rows of queries over columns of keys, by their titles.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple]
    plot: tuple[str, tuple[str, ...]]
    lines: str = ""
    notes: tuple[str, ...] = ()
    log_x: bool = True
    maps: Mapping[str, Float[np.ndarray, "L L"]] = dataclasses.field(default_factory=dict)

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
                label = " ".join(str(part) for part in (group, y if len(ys) > 1 else None) if part is not None)
                _draw(axes, [(row[self.columns.index(x)], row[self.columns.index(y)]) for row in rows], label or y)
        if self.log_x:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=x, ylabel=", ".join(ys) if len(ys) < 3 else "", title=self.title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure

    def write(self, out: pathlib.Path, made_from: dict[str, Any]) -> None:
        """OUT.json, OUT.md and OUT.png, and OUT_maps.png where there are maps; each whole or not at all."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        workdir.write_text(out.with_suffix(".md"), self.markdown())
        workdir.write_json(out.with_suffix(".json"), {**made_from, "title": self.title, "notes": list(self.notes), "rows": rows})
        figures.save(self.figure(), out.with_suffix(".png"))
        if self.maps:
            figures.save(self._images(), out.with_name(f"{out.name}_maps.png"))

    def _images(self) -> Figure:
        """The maps, each scaled to its own largest value, a few in a row."""
        columns = min(len(self.maps), 4)
        rows = math.ceil(len(self.maps) / columns)
        figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axes in panels:
            axes.set_axis_off()
        for axes, (title, image) in zip(panels, self.maps.items()):
            axes.imshow(image, cmap="magma", interpolation="nearest")
            axes.set_title(title, fontsize=8)
        return figure

    def _column(self, name: str) -> list:
        return [row[self.columns.index(name)] for row in self.rows]


def _draw(axes: Axes, points: Sequence[tuple[Any, Any]], label: str) -> None:
    """A line through the means of y at each x, and a band from the least to the largest where seeds differ."""
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        if isinstance(y, int | float) and math.isfinite(y):
            by_x.setdefault(x, []).append(y)
    if not by_x:
        return
    (line,) = axes.plot(list(by_x), [np.mean(ys) for ys in by_x.values()], marker="o", markersize=3, label=label)
    if any(len(ys) > 1 for ys in by_x.values()):
        low, high = ([pick(ys) for ys in by_x.values()] for pick in (min, max))
        axes.fill_between(list(by_x), low, high, color=line.get_color(), alpha=0.2)


def over_seeds(tables: Mapping[int, Table]) -> Table:
    """The tables of several seeds as one: a column says whose each row is; the plot shows means and ranges."""
    first = next(iter(tables.values()))
    if len(tables) == 1:
        return first
    rows = [(seed, *row) for seed, table in tables.items() for row in table.rows]
    notes = dict.fromkeys(note for table in tables.values() for note in table.notes)
    return dataclasses.replace(first, columns=("seed", *first.columns), rows=rows, notes=tuple(notes))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's best model, and a stretch of one split's text.

    seed: of the run, or of one of its replicas. variables: parameters, and what else the model has. tokens: T + 1 consecutive
    tokens, so that T are predicted. compiled: what was compiled for a model, which the seeds of a run share.
    """

    plan: Plan
    step: int
    seed: int
    variables: Any
    split: Split
    tokens: np.ndarray
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

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
        step = self.compiled.setdefault(repr(model), jax.jit(functools.partial(_token_losses, model)))
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


def load(folder: pathlib.Path, split: Split, tokens: int) -> list[Run]:
    """The best checkpoint of the language model in `folder`, with the first `tokens` tokens of a split; of each of its seeds.

    Raises `WorkdirError` where there is none, and `AnalysisError` where the run is no language model of running text.
    """
    _, plan = evaluation.open_run(folder)
    if not hasattr(plan.task, "tokens"):
        raise AnalysisError(f"analyses are of language models on running text; the run's task is {plan.config['task']['name']}")
    plan.task.prepare()
    step, variables = evaluation.load_best(plan, folder)
    first = Run(plan, step, plan.seed, variables, split, plan.task.tokens(split)[: tokens + 1])
    if plan.train.replicas == 1:
        return [first]
    ones = [jax.tree.map(lambda x, i=i: x[i], first.variables) for i in range(plan.train.replicas)]
    return [dataclasses.replace(first, seed=seed, variables=one) for seed, one in zip(plan.seeds, ones, strict=True)]


def scores(losses: np.ndarray | float) -> tuple[float, float, float]:
    """Mean nats a token, bits a token and perplexity."""
    nats = float(np.mean(losses))
    return nats, nats / math.log(2), math.exp(min(nats, 700.0))


def doublings(first: int, last: int) -> Sequence[int]:
    return [first * 2**i for i in range(max(1, int(math.log2(last / first)) + 1))]
