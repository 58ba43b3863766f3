"""The test score of a run: the checkpoint that was best on validation, scored once."""

import functools
import pathlib
from typing import Any

import jax

from efficient_attn import sharding, workdir
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.plan import Plan, make_plan
from efficient_attn.steps import eval_step
from efficient_attn.training import evaluate


def score_once(folder: pathlib.Path) -> dict[str, Any]:
    """Score the best checkpoint in `folder` on the test split and store it in eval.json; stored scores are returned as they are.

    The result names the step, its validation metrics and the checkpoint rule. Raises `WorkdirError` where `folder` holds no
    run, or none that was ever evaluated.
    """
    stored = folder / "eval.json"
    if stored.exists():
        return workdir.read_json(stored)
    if not (folder / "run.json").exists():
        raise workdir.WorkdirError(f"{folder} holds no run (no run.json); give the --workdir of a train.py run")
    plan = make_plan(workdir.read_json(folder / "run.json")["config"])
    result = {"data": plan.task.name, "split": "test", **score_best(plan, folder)}
    workdir.write_json(stored, result)
    return result


def score_best(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """Test metrics of the best checkpoint, with its step and validation metrics."""
    mesh = sharding.data_mesh()
    metric = f"valid_{plan.task.metric}"
    checkpoints = Checkpoints(folder / "checkpoints", metric=metric, mode=plan.task.metric_mode, read_only=True)
    placed = sharding.replicated(mesh)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), plan.state)
    restored = checkpoints.restore_best(abstract)
    if restored is None:
        raise workdir.WorkdirError(f"{folder} has no evaluated checkpoint yet; train until the first evaluation")
    step, state, _ = restored
    plan.task.prepare()
    step_fn = jax.jit(functools.partial(eval_step, plan.model))
    window = evaluate(step_fn, state.evaluated(), plan.task.source("test"), plan, mesh)
    validation = checkpoints.metrics(step)
    checkpoints.close()
    return {"step": step, **window.means("test"), **validation, "selected_by": f"best {metric}"}
