"""RoPE rescaled to a longer context and trained there for a little while: position interpolation, NTK, YaRN, and none of them."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp

from efficient_attn.analysis.base import AnalysisError, Run, Table, doublings, scores
from efficient_attn.analysis.extrapolation import LONGEST, SCALINGS, is_rotary, with_rotation
from efficient_attn.plan import Plan, make_plan
from efficient_attn.steps import train_step
from efficient_attn.tasks.pipeline import train_batches

FACTOR = 4
SHARE = 0.1
"""Steps, and the learning rate, as fractions of those of the training."""


def fine_tuning(run: Run) -> Table:
    """Loss in windows of L to 16 L after fine-tuning at 4 L, for a tenth of the steps at a tenth of the learning rate.

    Each batch has as many tokens as in training. The rotation is that of a factor of 4 at every length (Chen et al. 2023,
    section 3.3; Peng et al. 2023, section 4.1).
    """
    L = run.context
    if not is_rotary(run.plan.config["model"]):
        raise AnalysisError("fine-tuning rescales rotary positions; the run's model has none, or has them rescaled")
    rows = []
    for name, change in SCALINGS.items():
        config = with_rotation(run.plan.config["model"], lambda r, change=change: change(r, float(FACTOR), L))
        plan = _longer(run.plan, config)
        tuned = dataclasses.replace(run, variables={"params": _trained(plan, run)})
        for length in doublings(L, LONGEST * L):
            losses = tuned.losses(run.windows(length), plan.model)
            rows.append((name, length, length // L, losses.size, *scores(losses)))
    notes = (f"Trained at {L}, fine-tuned at {FACTOR * L} tokens for {plan.total} steps of {plan.tokens_per_batch} tokens.",)
    columns = ("positions", "length", "times trained", "tokens", "nats", "bits", "perplexity")
    return Table("Fine-tuned to longer contexts", columns, rows, ("length", ("nats",)), lines="positions", notes=notes)


def _longer(plan: Plan, model: dict) -> Plan:
    """The plan of the fine-tuning, of one seed."""
    config = copy.deepcopy(plan.config)
    config["model"] = model
    config["task"]["context"] *= FACTOR
    config["train"]["batch_size"] = max(1, config["train"]["batch_size"] // FACTOR)
    config["train"] |= dict(replicas=1, duration=f"{max(1, round(SHARE * plan.total))} steps")
    config["optimizer"] |= dict(learning_rate=SHARE * config["optimizer"]["learning_rate"], warmup="0 steps")
    return make_plan(config)


def _trained(plan: Plan, run: Run):
    """The run's parameters after the steps of `plan`; its seed draws the batches."""
    params = jax.tree.map(jnp.copy, run.variables["params"])
    state = dataclasses.replace(jax.jit(plan.init_state)(), params=params)
    step = run.compiled.setdefault(
        f"train {plan.model!r}", jax.jit(functools.partial(train_step, plan.model, plan.tx, **plan.step_options))
    )
    batches = train_batches(plan.task.source("train"), batch_size=plan.train.batch_size, seed=run.seed)
    for _, batch in zip(range(plan.total), batches):
        state, _ = step(state, batch)
    batches.close()
    return state.params
