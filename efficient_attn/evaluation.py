"""The test score of a run: the checkpoint that was best on validation, scored once."""

import functools
import os
import pathlib
from typing import Any

import jax
from absl import logging

from efficient_attn import replicas, runs, sharding, workdir
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.plan import Plan, make_plan
from efficient_attn.steps import TrainState, eval_step
from efficient_attn.training import evaluate


def score_once(folder: pathlib.Path) -> dict[str, Any]:
    """Score the best checkpoint in `folder` on the test split and store it in eval.json; its stored score is returned as it is.

    Where the run has trained on since to a better step, that is scored, and the old score goes to eval.previous.json. The result
    names the step, its validation metrics and the checkpoint rule. Raises `WorkdirError` where `folder` holds no run, or none
    that was ever evaluated.
    """
    run, plan = open_run(folder)
    if run["data"] != plan.task.name:
        raise workdir.WorkdirError(f"the run's data were {run['data']} and are now {plan.task.name}; restore them to score it")
    stored, found = folder / "eval.json", runs.read(folder)
    if found.state in (runs.State.UNFINISHED, runs.State.RUNNING):
        logging.warning("the run is %s (%s): its best is the best so far", found.state, found.why)
    if stored.exists():
        old = workdir.read_json(stored)
        better = runs.better_step(found, type(plan.task))
        if better is None:
            return old
        if better != _best_step(plan, folder):
            logging.warning("step %d was better than the stored score's %d, but has no whole checkpoint", better, old["step"])
            return old
        logging.warning("the score of step %d is stored, but the best is now step %d, which is scored", old["step"], better)
    result = {"data": plan.task.name, "split": "test", **score_best(plan, folder), "evaluated_until": found.last_evaluation}
    if stored.exists():
        os.replace(stored, folder / "eval.previous.json")
    workdir.write_json(stored, result)
    return result


def open_run(folder: pathlib.Path) -> tuple[dict[str, Any], Plan]:
    """What run.json of a run's folder records, and the plan of its configuration. Raises `WorkdirError` where there is no run."""
    if not (folder / "run.json").exists():
        raise workdir.WorkdirError(f"{folder} holds no run (no run.json); give the --workdir of a train.py run")
    run = workdir.read_json(folder / "run.json")
    return run, make_plan({**run["config"], "sharding": sharding.for_devices_here(run["config"])})


def open_checkpoints(plan: Plan, folder: pathlib.Path) -> Checkpoints:
    metric = f"valid_{plan.task.metric}"
    return Checkpoints(folder / "checkpoints", metric=metric, mode=plan.task.metric_mode, read_only=True)


def _best_step(plan: Plan, folder: pathlib.Path) -> int | None:
    checkpoints = open_checkpoints(plan, folder)
    best = checkpoints.best_step()
    checkpoints.close()
    return best


def restore_best(checkpoints: Checkpoints, plan: Plan, folder: pathlib.Path) -> tuple[int, TrainState]:
    """The step and state of the best checkpoint, on the plan's devices. Raises `WorkdirError` where none is whole."""
    restored = checkpoints.restore_best(plan.placement().abstract(plan.state))
    if restored is None:
        what = "no checkpoint that is whole" if checkpoints.steps() else "no checkpoint yet; train until the first evaluation"
        raise workdir.WorkdirError(f"{folder} has {what}")
    step, state, _ = restored
    return step, state


def load_best(plan: Plan, folder: pathlib.Path) -> tuple[int, Any]:
    """The step of the best checkpoint and the model's variables there, with an axis of replicas first where there are any.

    Raises `WorkdirError` where no checkpoint is whole.
    """
    checkpoints = open_checkpoints(plan, folder)
    step, state = restore_best(checkpoints, plan, folder)
    checkpoints.close()
    return step, state.evaluated()


def score_best(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """Test metrics of the best checkpoint, with its step and validation metrics."""
    placement = plan.placement()
    checkpoints = open_checkpoints(plan, folder)
    step, state = restore_best(checkpoints, plan, folder)
    plan.task.prepare()
    step_fn = jax.jit(
        replicas.evaluate(functools.partial(eval_step, plan.model, loss_chunk=plan.train.loss_chunk), plan.train.replicas),
        out_shardings=placement.whole,
    )
    with jax.set_mesh(placement.mesh):
        window = evaluate(step_fn, state.evaluated(), plan.task.source("test"), plan, placement)
    validation = checkpoints.metrics(step)
    checkpoints.close()
    return {"step": step, **window.means("test"), **validation, "selected_by": f"best valid_{plan.task.metric}"}
