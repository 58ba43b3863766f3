"""The one train loop: `train_and_evaluate(config, workdir)`. It knows no task, no mechanism and no model by name."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from efficient_attn import allocator, distributed, divergence, optim, preemption, replicas, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.checkpoints import CheckpointError, Checkpoints
from efficient_attn.config import Config, TrainConfig, differences, may_change
from efficient_attn.display import Display, open_displays
from efficient_attn.distributed import PeerLost
from efficient_attn.divergence import Guard, TrainingDiverged
from efficient_attn.metrics import Window, first_non_finite
from efficient_attn.plan import Plan, describe, make_plan
from efficient_attn.preemption import Preempted
from efficient_attn.sharding import Placement
from efficient_attn.steps import TrainState, all_finite, eval_step, train_step
from efficient_attn.tasks.base import Task
from efficient_attn.tasks.pipeline import eval_batches, train_batches
from efficient_attn.timing import Clock, Profiler

PyTree = Any


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides the train state; saved with it, so that a resumed run logs the same numbers.

    best, best_step: of the validation metric, the mean over replicas. reached: the best that all replicas were at together.
    """

    window: Window = dataclasses.field(default_factory=Window)
    best: float | None = None
    best_step: int | None = None
    reached: float | None = None
    evaluations_since_best: int = 0
    finished: str = ""
    guard: Guard = dataclasses.field(default_factory=Guard)

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "window": self.window.to_json(), "guard": self.guard.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        return cls(**{**values, "window": Window(values["window"]), "guard": Guard(**values.get("guard", {}))})

    def note_evaluation(self, step: int, values: Sequence[float], mode: str) -> None:
        """values: the validation metric of each replica."""

        def better(value: float, best: float | None) -> bool:
            return math.isfinite(value) and (best is None or (value > best if mode == "max" else value < best))

        value, worst = statistics.mean(values), min(values) if mode == "max" else max(values)
        if better(worst, self.reached):
            self.reached = worst
        if better(value, self.best):
            self.best, self.best_step, self.evaluations_since_best = value, step, 0
        else:
            self.evaluations_since_best += 1

    def why_finished(self, task: Task | type[Task], train: TrainConfig) -> str:
        """Which criterion of the configuration ends the run early; empty while none does."""
        metric, mode, goal, patience = task.metric, task.metric_mode, train.early_stop, train.patience
        if goal and self.reached is not None and (self.reached >= goal if mode == "max" else self.reached <= goal):
            return f"valid {metric} {self.reached:.4g} reached early_stop={goal:g}"
        if patience and self.evaluations_since_best >= patience:
            return f"no better valid {metric} in {patience} evaluations"
        return ""


def train_and_evaluate(config: Config, folder: pathlib.Path, *, profile_steps: int = 0) -> tuple[TrainState, Progress]:
    """Train `config` in `folder`, from its newest whole checkpoint if it has one; returns the final state.

    Writes run.json, metrics.jsonl, checkpoints/ and tensorboard/ there. The same call on the same devices continues an
    interrupted run bit for bit. `profile_steps` > 0 also writes a profiler trace of that many steps to profile/.

    Raises:
      ConfigError: the configuration is wrong, or `folder` holds a run of another one.
      TaskError: the data are missing.
      TrainingDiverged: a loss or a gradient is not finite, and the policy is to stop; the last checkpoints are intact.
      Preempted: on SIGTERM or Ctrl-C, after saving what there is to save.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(preemption.watch())
        plan = make_plan(config)
        placement = plan.placement()
        distributed.check_alike("the configuration", json.dumps(plan.config, sort_keys=True))

        def claim_folder():
            stack.enter_context(workdir.lock(folder))
            open_run(plan, folder)
            print(describe(plan), flush=True)

        distributed.by_first(claim_folder)
        distributed.by_first(plan.task.prepare)  # interruptible at any moment: it resumes by itself
        if not distributed.is_first():
            plan.task.prepare()  # where it does not see what the first process made
        stop.defer()
        checkpoints = Checkpoints(
            folder / "checkpoints", metric=f"valid_{plan.task.metric}", mode=plan.task.metric_mode
        )  # fmt: skip
        stack.push(lambda kind, *_: None if kind is PeerLost else checkpoints.close())  # a save would wait for the lost one
        stack.enter_context(distributed.together())
        state, progress = restore_or_init(plan, checkpoints, placement)
        start = int(state.step)
        metrics, displays = (
            stack.enter_context(open_outputs(plan, folder, start)) if distributed.is_first() else (None, [])
        )  # fmt: skip
        loop = Loop(plan, placement, checkpoints, metrics, displays, progress, stop)
        profiler = Profiler(folder / "profile", profile_steps, start, plan.total)
        stack.callback(profiler.close)
        with jax.set_mesh(placement.mesh):
            return loop.run(state, profiler), loop.progress


@contextlib.contextmanager
def open_outputs(plan: Plan, folder: pathlib.Path, start: int) -> Iterator[tuple[workdir.MetricsFile, list[Display]]]:
    """Where lines of metrics go, from step `start` on: metrics.jsonl, and the displays."""
    with contextlib.closing(workdir.MetricsFile(folder / "metrics.jsonl")) as metrics:
        metrics.truncate(start)
        with open_displays(
            folder, plan.config, start=start, total=plan.total, tensorboard=plan.train.tensorboard, wandb=plan.train.wandb
        ) as displays:
            yield metrics, displays


def open_run(plan: Plan, folder: pathlib.Path) -> None:
    """Write run.json, or check that the one in `folder` describes the same run."""
    path = folder / "run.json"
    info = workdir.run_info()
    config = plan.config
    if path.exists():
        old = workdir.read_json(path)
        if old["data"] != plan.task.name:
            raise ConfigError(f"the data of {folder} were {old['data']} and are now {plan.task.name}; choose another --workdir")
        changed = differences(old["config"], plan.config)
        fixed = {k: v for k, v in changed.items() if not may_change(k)}
        if fixed and has_started(folder):
            lines = "\n  ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in fixed.items())
            raise ConfigError(f"{folder} holds a run of another configuration; choose another --workdir.\n  {lines}")
        for field, (a, b) in changed.items():
            logging.warning("continuing with %s=%r, which was %r", field, b, a)
        for line in workdir.compare_run_info({k: v for k, v in old.items() if k in info}, info):
            logging.warning("continuing may not be bit-identical: %s", line)
    workdir.write_json(path, {**info, "config": config, "data": plan.task.name, "steps": plan.total})


def has_started(folder: pathlib.Path) -> bool:
    """Whether a run in `folder` has left anything that another configuration must not mix with."""
    metrics = folder / "metrics.jsonl"
    return (folder / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def restore_or_init(plan: Plan, checkpoints: Checkpoints, placement: Placement) -> tuple[TrainState, Progress]:
    """The newest whole checkpoint's state and progress, or fresh ones; the state laid out on the mesh."""
    had_steps = bool(checkpoints.steps()) or any(checkpoints.directory.glob("*.damaged*"))
    restored = checkpoints.restore_latest(placement.abstract(plan.state))
    if restored is None and had_steps:
        raise CheckpointError(
            f"no checkpoint in {checkpoints.directory} is whole; the rest of the folder is as it was. "
            "Choose another --workdir to start over."
        )
    if restored is None:
        return jax.jit(plan.init_state, out_shardings=placement.state)(), Progress()
    step, state, saved = restored
    if distributed.is_first():
        print(f"continuing from step {step}", flush=True)
    progress = Progress.from_json(saved)
    progress.finished = progress.why_finished(plan.task, plan.train)  # the criteria may have changed
    return state, progress


def evaluate(step_fn: Callable, variables: PyTree, source: Any, plan: Plan, placement: Placement, max_batches: int = 0) -> Window:
    """Sums of the metrics over a split (its first `max_batches` batches, if that is not 0).

    A model with memory starts with none, and carries it from each batch to the next.

    step_fn: `eval_step` bound to the model and jitted.
    """
    window, memory = Window(), {}
    batches = eval_batches(
        source, batch_size=plan.train.eval_batch_size or plan.train.batch_size, **placement.rows()
    )  # fmt: skip
    with contextlib.closing(batches):
        pending = None
        for i, batch in enumerate(batches):
            if max_batches and i >= max_batches:
                break
            sums, memory = step_fn(*allocator.ready(({**variables, **memory}, placement.put(batch))))
            if pending is not None:
                window.add(jax.device_get(pending))
            pending = sums
        window.add(jax.device_get(pending))
    return window


class Loop:
    """Runs the steps, and does what is due between them.

    The sums of step t are fetched while step t + 1 runs, so that the device never waits for the host (on a CPU, which is both,
    one comes after the other); before anything is evaluated, saved or ended the loop catches up.
    """

    def __init__(self, plan: Plan, placement: Placement, checkpoints, metrics, displays: list[Display], progress: Progress, stop):
        self.plan, self.placement, self.checkpoints, self.metrics = plan, placement, checkpoints, metrics
        self.displays, self.progress, self.stop = displays, progress, stop
        step = replicas.train(functools.partial(train_step, plan.model, plan.tx, **plan.step_options), plan.train.replicas)
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(placement.state, placement.whole))
        score = functools.partial(eval_step, plan.model, loss_chunk=plan.train.loss_chunk)
        score = replicas.evaluate(score, plan.train.replicas)
        self.eval_step = jax.jit(score, out_shardings=placement.whole)
        self.all_finite = jax.jit(all_finite, out_shardings=placement.whole)
        self.learning_rate = optim.learning_rate(plan.optimizer, plan.warmup, plan.total)
        self.valid = plan.task.source("valid")
        self.pending = None  # (step, its sums, still on the device)
        self.clock = Clock(plan.tokens_per_batch)

    def run(self, state: TrainState, profiler: Profiler) -> TrainState:
        """Steps until the run's end, a stop request, or the early-stop criterion; over again where a rollback says so."""
        while True:
            try:
                return self.run_from(state, profiler)
            except TrainingDiverged as error:
                state = self.roll_back(error)

    def run_from(self, state: TrainState, profiler: Profiler) -> TrainState:
        step = int(state.step)
        batches = train_batches(
            self.plan.task.source("train"), batch_size=self.plan.train.batch_size, seed=self.plan.data_seed,
            start_step=step + self.progress.guard.batch_offset, prefetch=self.plan.train.prefetch, **self.placement.rows(),
        )  # fmt: skip
        with contextlib.closing(batches):
            self.clock.start()
            return self.steps(state, batches, self.plan.total - step, profiler)

    def limit(self, step: int) -> tuple[np.float32, ...]:
        """What the gradient norm of `step` must stay below for it to be taken, where steps may be skipped."""
        train = self.plan.train
        return (np.float32(self.progress.guard.limit(step, train.spike_factor)),) if train.on_divergence == "skip" else ()

    def roll_back(self, error: TrainingDiverged) -> TrainState:
        """The state of the last whole checkpoint, with another key; the batches since are left out. Or raises `error`."""
        train, guard = self.plan.train, self.progress.guard
        if train.on_divergence != "rollback" or guard.rollbacks >= train.max_divergences:
            tried = f"after {guard.rollbacks} rollbacks (train.max_divergences): " if guard.rollbacks else ""
            has_memory = getattr(self.plan.model, "has_memory", False)
            advice = divergence.advice(train.on_divergence, train.replicas, self.plan.optimizer.clip_norm, has_memory)
            raise TrainingDiverged(f"{tried}{error}; nothing of it was saved. {advice}.", error.step) from error
        self.pending = None
        self.checkpoints.wait()
        state, self.progress = restore_or_init(self.plan, self.checkpoints, self.placement)
        start = int(state.step)
        self.progress.guard = guard.rolled_back(self.progress.guard, start, error.step)
        if self.metrics is not None:
            self.metrics.truncate(start)
        logging.warning("rollback %d to step %d, with other batches: %s", self.progress.guard.rollbacks, start, error)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), self.progress.guard.rollbacks)
        return state.replace(rng=jax.random.key_data(key))

    def steps(self, state: TrainState, batches: Iterator, count: int, profiler: Profiler) -> TrainState:
        """At most `count` steps from `state` on, with all that is due between them."""
        first = int(state.step)
        for step in range(first + 1, first + count + 1):
            if self.progress.finished:
                break
            profiler.at(step - 1)
            with self.clock.waiting():
                batch = next(batches)
            state, batch = allocator.ready((state, self.placement.put(batch)))
            state, sums = self.train_step(state, batch, *self.limit(step))
            self.clock.dispatched += 1
            self.collect()
            self.pending = (step, sums)
            self.between_steps(step, state)
        return state

    def between_steps(self, step: int, state: TrainState) -> None:
        """Evaluate, save and stop where that is due after this step."""
        for display in self.displays:
            display.step(step)
        last, stopping = step == self.plan.total, self.stop.reached()
        if last or step % self.plan.eval_every == 0:
            self.collect(state=state)
        elif stopping or step % self.plan.checkpoint_every == 0:
            self.collect()
            self.save(step, state, None)
        if stopping and not last:
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
        step, sums = self.pending[0], jax.device_get(self.pending[1])
        self.pending = None
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            allocator.keep_freed()
        if wrong := self.progress.guard.note(step, sums, self.plan.train.spike_factor, self.plan.train.max_divergences):
            raise TrainingDiverged(wrong, step)
        self.progress.window.add({name: value for name, value in sums.items() if name != "skipped"})
        line = {}
        if step % self.plan.train.log_every == 0 or step == self.plan.total:
            line = {
                **self.progress.window.means("train"),
                "learning_rate": float(self.learning_rate(step - 1 - self.progress.guard.skipped)),
                **self.progress.guard.counts(), **self.clock.lap(),
            }  # fmt: skip
            self.progress.window = Window()
        if state is None:
            self.write(step, line)
        else:
            validation = self.evaluate(step, state)
            self.write(step, {**line, **validation})
            self.save(step, state, validation)

    def evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
        """Metrics on the validation split; notes whether they are the best, and whether the run should end.

        Raises `TrainingDiverged` where they are not finite, or, where steps are skipped, has the one that ranks be no number.
        """
        plan, progress = self.plan, self.progress
        with self.clock.paused():
            window = evaluate(
                self.eval_step, state.evaluated(), self.valid, plan, self.placement, plan.train.max_eval_batches
            )  # fmt: skip
        means, values = window.means("valid"), window.by_seed(plan.task.metric)
        if bad := first_non_finite(window.totals):
            wrong = f"valid {bad} is not finite at step {step}"
            if plan.train.on_divergence != "skip":
                raise TrainingDiverged(wrong, step)
            logging.warning("%s; it counts as no better than any other", wrong)
            means[f"valid_{plan.task.metric}"], values = math.nan, [math.nan]
        progress.note_evaluation(step, values, plan.task.metric_mode)
        progress.finished = progress.why_finished(plan.task, plan.train)
        return means

    def write(self, step: int, line: dict[str, Any]) -> None:
        if line and self.metrics is not None:
            self.metrics.append({"step": step, **line})
            scalars = {name: value for name, value in line.items() if not isinstance(value, list)}
            for display in self.displays:
                display.metrics(step, scalars)

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        with self.clock.paused():
            if not self.all_finite(state):
                raise TrainingDiverged(f"the state after step {step} is not finite", step)
            self.checkpoints.save(step, state, self.progress.to_json(), metrics)
