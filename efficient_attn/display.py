"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere; TensorBoard and wandb if asked."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Scalars = Mapping[str, Any]


@runtime_checkable
class Display(Protocol):
    """Told of every line of metrics, and now and then of the step."""

    def step(self, step: int) -> None: ...

    def metrics(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


def summary(scalars: Scalars) -> str:
    """One short line of the numbers that people watch."""
    shown = [f"{name} {_short(value)}" for name, value in scalars.items() if name in _WATCHED or name.startswith("valid_")]
    return "  ".join(shown)


_WATCHED = ("train_loss", "train_accuracy", "learning_rate", "steps_per_second", "tokens_per_second", "input_wait")


def compact(scalars: Scalars) -> str:
    """The training numbers in the width that a progress bar leaves on an 80-column terminal."""
    return " ".join(f"{label} {_short(scalars[name])}" for name, label in _LABELS.items() if name in scalars)


_LABELS = {"train_loss": "loss", "train_accuracy": "acc", "steps_per_second": "step/s", "tokens_per_second": "tok/s"}


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class PlainLines:
    """A line a metrics line, with the time left."""

    def __init__(self, start: int, total: int):
        self.start, self.total, self.began = start, total, time.monotonic()

    def step(self, step: int) -> None:
        """Nothing: lines come with metrics."""

    def metrics(self, step: int, scalars: Scalars) -> None:
        done = step - self.start
        left = (self.total - step) * (time.monotonic() - self.began) / done if done > 0 else math.nan
        eta = f"  {left / 60:.1f} min left" if step < self.total and math.isfinite(left) else ""
        print(f"step {step}/{self.total}  {summary(scalars)}{eta}", flush=True)

    def close(self) -> None:
        """Nothing to release."""


class Bar:
    """A rich progress bar; evaluations stay on the screen as lines above it."""

    def __init__(self, start: int, total: int, console: Console):
        columns = [
            BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[line]}")
        ]  # fmt: skip
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("train", completed=start, total=total, line="compiling")
        self.progress.start()

    def step(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def metrics(self, step: int, scalars: Scalars) -> None:
        training = {k: v for k, v in scalars.items() if not k.startswith("valid_")}
        if training:
            self.progress.update(self.task, line=compact(training))
        if len(training) < len(scalars):
            self.progress.console.print(f"step {step}  {summary(scalars)}", highlight=False)

    def close(self) -> None:
        self.progress.stop()


class TensorBoard:
    """Scalars as TensorBoard events; what an earlier attempt wrote from `start` on is purged."""

    def __init__(self, folder: pathlib.Path, start: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def step(self, step: int) -> None:
        """Nothing: scalars come with metrics."""

    def metrics(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Scalars to wandb (an optional dependency); the run keeps its id across resumes."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
        import wandb

        self.run = wandb.init(
            project="efficient-attn", id=workdir.name, dir=str(workdir), config=dict(config), resume="allow"
        )  # fmt: skip

    def step(self, step: int) -> None:
        """Nothing: scalars come with metrics."""

    def metrics(self, step: int, scalars: Scalars) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


@contextlib.contextmanager
def open_displays(
    workdir: pathlib.Path, config: Mapping[str, Any], *, start: int, total: int, tensorboard: bool, wandb: bool
) -> Iterator[list[Display]]:
    """The displays of a run, closed in the end however it ends."""
    console = Console(file=sys.stdout)
    displays: list[Display] = []
    try:
        if tensorboard:
            displays.append(TensorBoard(workdir / "tensorboard", start))
        if wandb:
            displays.append(WeightsAndBiases(workdir, config))
        displays.append(Bar(start, total, console) if console.is_terminal else PlainLines(start, total))
        yield displays
    finally:
        for display in displays:
            display.close()
        logging.flush()
