"""The one train loop: `train_and_evaluate(config, workdir)`. It knows no task, no mechanism and no model by name."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from efficient_attn import optim, preemption, sharding, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.config import MAY_CHANGE, Config, differences
from efficient_attn.display import Display, open_displays
from efficient_attn.metrics import Window, first_non_finite
from efficient_attn.plan import Plan, describe, make_plan
from efficient_attn.steps import TrainState, all_finite, eval_step, train_step
from efficient_attn.tasks.pipeline import eval_batches, train_batches

PyTree = Any


class TrainingDiverged(Exception):
    """A loss, gradient or parameter is infinite or not a number."""


class Preempted(Exception):
    """The run was asked to stop, has saved, and can be continued by the same command."""


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides the train state; saved with it, so that a resumed run logs the same numbers."""

    window: Window = dataclasses.field(default_factory=Window)
    best: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    finished: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "window": self.window.totals}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        return cls(**{**values, "window": Window(values["window"])})

    def note_evaluation(self, step: int, value: float, mode: str) -> None:
        better = math.isfinite(value) and (self.best is None or (value > self.best if mode == "max" else value < self.best))
        if better:
            self.best, self.best_step, self.evaluations_since_best = value, step, 0
        else:
            self.evaluations_since_best += 1


def train_and_evaluate(config: Config, folder: pathlib.Path, *, profile_steps: int = 0) -> tuple[TrainState, Progress]:
    """Train `config` in `folder`, from its newest whole checkpoint if it has one; returns the final state.

    Writes run.json, metrics.jsonl, checkpoints/ and tensorboard/ there. The same call on the same devices continues an
    interrupted run bit for bit. `profile_steps` > 0 also writes a profiler trace of that many steps to profile/.

    Raises:
      ConfigError: the configuration is wrong, or `folder` holds a run of another one.
      TaskError: the data are missing.
      TrainingDiverged: a loss or a gradient is not finite; the last checkpoints are intact.
      Preempted: on SIGTERM or Ctrl-C, after saving.
    """
    plan = make_plan(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir.lock(folder))
        open_run(plan, folder)
        print(describe(plan), flush=True)
        plan.task.prepare()  # before signals only set a flag: it is interruptible, and resumes, by itself
        stop = stack.enter_context(preemption.watch())
        mesh = sharding.data_mesh()
        checkpoints = Checkpoints(
            folder / "checkpoints", metric=f"valid_{plan.task.metric}", mode=plan.task.metric_mode
        )  # fmt: skip
        stack.callback(checkpoints.close)
        state, progress = restore_or_init(plan, checkpoints, mesh)
        start = int(state.step)
        metrics = workdir.MetricsFile(folder / "metrics.jsonl")
        stack.callback(metrics.close)
        metrics.truncate(start)
        displays = stack.enter_context(
            open_displays(
                folder, plan.config, start=start, total=plan.total,
                tensorboard=plan.train.tensorboard, wandb=plan.train.wandb,
            )
        )  # fmt: skip
        loop = Loop(plan, mesh, checkpoints, metrics, displays, progress, stop)
        profiler = Profiler(folder / "profile", profile_steps, start)
        return loop.run(state, profiler), progress


def open_run(plan: Plan, folder: pathlib.Path) -> None:
    """Write run.json, or check that the one in `folder` describes the same run."""
    path = folder / "run.json"
    info = workdir.run_info()
    config = plan.config
    if path.exists():
        old = workdir.read_json(path)
        changed = differences(old["config"], plan.config)
        fixed = {k: v for k, v in changed.items() if k not in MAY_CHANGE}
        if fixed:
            lines = "\n  ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in fixed.items())
            raise ConfigError(f"{folder} holds a run of another configuration; choose another --workdir.\n  {lines}")
        for field, (a, b) in changed.items():
            logging.warning("continuing with %s=%r, which was %r", field, b, a)
        for line in workdir.compare_run_info(old, info):
            logging.warning("continuing may not be bit-identical: %s", line)
    workdir.write_json(path, {**info, "config": config, "data": plan.task.name, "steps": plan.total})


def restore_or_init(plan: Plan, checkpoints: Checkpoints, mesh: Mesh) -> tuple[TrainState, Progress]:
    """The newest whole checkpoint's state and progress, or fresh ones; the state on every device of the mesh."""
    placed = sharding.replicated(mesh)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), plan.state)
    restored = checkpoints.restore_latest(abstract)
    if restored is None:
        return jax.jit(plan.init_state, out_shardings=placed)(), Progress()
    step, state, progress = restored
    print(f"continuing from step {step}", flush=True)
    return state, Progress.from_json(progress)


def evaluate(step_fn: Callable, variables: PyTree, source: Any, plan: Plan, mesh: Mesh, max_batches: int = 0) -> Window:
    """Sums of the metrics over a split (its first `max_batches` batches, if that is not 0).

    step_fn: `eval_step` bound to the model and jitted.
    """
    window = Window()
    batches = eval_batches(
        source, batch_size=plan.train.eval_batch_size or plan.train.batch_size,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    with contextlib.closing(batches):
        pending = None
        for i, batch in enumerate(batches):
            if max_batches and i >= max_batches:
                break
            sums = step_fn(variables, sharding.put_batch(batch, mesh))
            if pending is not None:
                window.add(pending)
            pending = sums
        window.add(pending)
    return window


class Profiler:
    """Traces `steps` steps, from the tenth after the start on (the first ones compile)."""

    def __init__(self, folder: pathlib.Path, steps: int, start: int):
        self.folder, self.first, self.last = folder, start + 10, start + 10 + steps
        self.enabled = steps > 0

    def at(self, step: int) -> None:
        if self.enabled and step == self.first:
            jax.profiler.start_trace(str(self.folder))
        if self.enabled and step == self.last:
            jax.profiler.stop_trace()
            print(f"profile written to {self.folder}", flush=True)


class Loop:
    """Runs the steps, and does what is due between them.

    The sums of step t are fetched while step t + 1 runs, so that the device never waits for the host; before anything is
    evaluated, saved or ended the loop catches up.
    """

    def __init__(self, plan: Plan, mesh, checkpoints, metrics, displays: list[Display], progress: Progress, stop):
        self.plan, self.mesh, self.checkpoints, self.metrics = plan, mesh, checkpoints, metrics
        self.displays, self.progress, self.stop = displays, progress, stop
        options = {"label_smoothing": plan.train.label_smoothing, "accumulate": plan.train.accumulate, "ema": plan.optimizer.ema}
        self.train_step = jax.jit(functools.partial(train_step, plan.model, plan.tx, **options), donate_argnums=0)
        self.eval_step = jax.jit(functools.partial(eval_step, plan.model))
        self.all_finite = jax.jit(all_finite)
        self.learning_rate = optim.learning_rate(plan.optimizer, plan.warmup, plan.total)
        self.valid = plan.task.source("valid")
        self.pending = None  # (step, its sums, still on the device)
        self.clock = Clock(plan.tokens_per_batch)

    def run(self, state: TrainState, profiler: Profiler) -> TrainState:
        """Steps until the run's end, a stop request, or the early-stop criterion."""
        step = int(state.step)
        batches = train_batches(
            self.plan.task.source("train"), batch_size=self.plan.train.batch_size, seed=self.plan.seed, start_step=step,
            prefetch=self.plan.train.prefetch,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        with contextlib.closing(batches):
            self.clock.start()
            return self.steps(state, batches, self.plan.total - step, profiler)

    def steps(self, state: TrainState, batches: Iterator, count: int, profiler: Profiler) -> TrainState:
        """At most `count` steps from `state` on, with all that is due between them."""
        first = int(state.step)
        for step in range(first + 1, first + count + 1):
            if self.progress.finished:
                break
            profiler.at(step - 1)
            with self.clock.waiting():
                batch = next(batches)
            state, sums = self.train_step(state, sharding.put_batch(batch, self.mesh))
            self.collect()
            self.pending = (step, sums)
            self.between_steps(step, state)
        return state

    def between_steps(self, step: int, state: TrainState) -> None:
        """Evaluate, save and stop where that is due after this step."""
        for display in self.displays:
            display.step(step)
        last = step == self.plan.total
        if last or step % self.plan.eval_every == 0:
            self.collect(state=state)
        elif self.stop or step % self.plan.checkpoint_every == 0:
            self.collect()
            self.save(step, state, None)
        if self.stop and not last:
            self.checkpoints.wait()
            raise Preempted(f"stopped by {self.stop.signal.name} after step {step}, which is saved; run again to continue")
        if last or self.progress.finished:
            self.checkpoints.wait()

    def collect(self, state: TrainState | None = None) -> None:
        """Fetch the pending step's sums and write its line if one is due; with `state`, also evaluate it and save.

        Raises `TrainingDiverged` before anything that is not finite can be saved.
        """
        if self.pending is None:
            return
        step, sums = self.pending
        self.pending = None
        self.progress.window.add(sums)
        if (bad := first_non_finite(sums)) is not None:
            raise TrainingDiverged(
                f"{bad} is not finite at step {step}; nothing of it was saved. "
                "Lower optimizer.learning_rate, clip gradients (optimizer.clip_norm) or lengthen optimizer.warmup."
            )
        line = {}
        if step % self.plan.train.log_every == 0 or step == self.plan.total:
            line = {
                **self.progress.window.means("train"), "learning_rate": float(self.learning_rate(step - 1)),
                **self.clock.lap(step),
            }  # fmt: skip
            self.progress.window = Window()
        if state is None:
            self.write(step, line)
        else:
            validation = self.evaluate(step, state)
            self.write(step, {**line, **validation})
            self.save(step, state, validation)

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Metrics on the validation split; notes whether they are the best, and whether the run should end."""
        plan, progress = self.plan, self.progress
        with self.clock.paused():
            window = evaluate(
                self.eval_step, state.evaluated(), self.valid, plan, self.mesh, plan.train.max_eval_batches
            )  # fmt: skip
        means = window.means("valid")
        value = means[f"valid_{plan.task.metric}"]
        progress.note_evaluation(step, value, plan.task.metric_mode)
        goal, patience = plan.train.early_stop, plan.train.patience
        if goal and (value >= goal if plan.task.metric_mode == "max" else value <= goal):
            progress.finished = f"valid {plan.task.metric} {value:.4g} reached early_stop={goal:g}"
        elif patience and progress.evaluations_since_best >= patience:
            progress.finished = f"no better valid {plan.task.metric} in {patience} evaluations"
        return means

    def write(self, step: int, line: dict[str, float]) -> None:
        if line:
            self.metrics.append({"step": step, **line})
            for display in self.displays:
                display.metrics(step, line)

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        with self.clock.paused():
            if not self.all_finite(state):
                raise TrainingDiverged(f"the state after step {step} is not finite; nothing of it was saved")
            self.checkpoints.save(step, state, self.progress.to_json(), metrics)


class Clock:
    """Steps and tokens a second, and the share of time spent waiting for input, since the last line of metrics.

    Evaluating and starting a save do not count.
    """

    def __init__(self, tokens_per_batch: int):
        self.tokens = tokens_per_batch
        self.began = self.waited = self.excluded = 0.0
        self.last_step: int | None = None

    def start(self) -> None:
        self.began, self.waited, self.excluded = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        """Rates since the previous lap; without rates the first time, which includes compilation."""
        seconds = time.perf_counter() - self.began - self.excluded
        steps = step - self.last_step if self.last_step is not None else 0
        waited = self.waited / max(steps, 1)
        self.last_step = step
        self.start()
        if not steps:
            return {}
        return {"steps_per_second": steps / seconds, "tokens_per_second": steps * self.tokens / seconds, "input_wait": waited}
