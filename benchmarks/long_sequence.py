"""Path-X on a CPU: steps at length 16,384, their loss and gradients against a dense reference, and the peak memory.

    python -m benchmarks.long_sequence --recipe=s5 --out=results/cpu/pathx_s5.json
    python -m benchmarks.long_sequence --recipe=transformer --out=results/cpu/pathx_transformer.json

Three forms of the same step of configs/lra_pathx.py, on the same generated images: as the loop runs it; with the `reference`
implementation of the mixer's kernel (a step-by-step recurrence, dense L x L attention); and as accumulated micro-batches.
Dropout is off and norms are layer norms, so that all three are the same function.
"""

import functools
import json
import pathlib
import resource
import time

import jax
import numpy as np
import optax
from absl import app, flags

from configs import lra_pathx
from efficient_attn import workdir
from efficient_attn.plan import make_plan
from efficient_attn.steps import init_state, train_step
from efficient_attn.tasks.pipeline import train_batches

RECIPE = flags.DEFINE_enum("recipe", "s5", sorted(lra_pathx.RECIPES), "Recipe of configs/lra_pathx.py.")
RESOLUTION = flags.DEFINE_integer("resolution", 128, "Images are this many pixels square.")
DEPTH = flags.DEFINE_integer("depth", 2, "Layers.")
WIDTH = flags.DEFINE_integer("width", 32, "Channels.")
ROWS = flags.DEFINE_integer("rows", 2, "Images a batch; also the number of micro-batches.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps to time.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def plan_with(implementation):
    config = lra_pathx.get_config(RECIPE.value)
    config.task.resolution, config.task.num_examples = RESOLUTION.value, 64
    model = config.model
    model.depth, model.width, model.norm, model.dropout, model.embed_dropout = DEPTH.value, WIDTH.value, "layer", 0.0, 0.0
    model.mixer.dropout, model.mixer.implementation = 0.0, implementation
    if RECIPE.value == "s5":
        model.mixer.state_dim, model.mixer.blocks = 32, 4
    config.train.batch_size = ROWS.value
    return make_plan(config)


def gradients(plan, batch, accumulate: int = 1):
    """Loss and gradient of one step: with SGD at rate 1 the update is minus the gradient. Also seconds, and bytes compiled."""
    tx = optax.sgd(1.0)
    state = init_state(plan.model, tx, 0, batch, ema=False)
    step = jax.jit(functools.partial(train_step, plan.model, tx, accumulate=accumulate))
    compiled = step.lower(state, batch).compile()
    seconds = []
    for _ in range(STEPS.value):
        start = time.perf_counter()
        new, sums = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - start)
    gradient = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, new.params)
    memory = compiled.memory_analysis()
    return float(sums["loss"][0] / sums["loss"][1]), gradient, float(np.median(seconds)), memory.temp_size_in_bytes


def relative_error(a, b) -> float:
    """Largest difference of two gradients, relative to the largest entry of each array."""
    errors = jax.tree.map(lambda x, y: np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-12), a, b)
    return float(max(jax.tree.leaves(errors)))


def main(_):
    plan = plan_with(None)
    plan.task.prepare()
    batches = train_batches(plan.task.source("train"), batch_size=ROWS.value, seed=0)
    batch = next(batches)
    batches.close()
    loss, gradient, seconds, temp = gradients(plan, batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"length": plan.task.length, "loss": loss, "seconds_per_step": seconds, "temp_bytes": temp, "peak_rss_bytes": peak}
    for name, other, accumulate in (("reference", plan_with("reference"), 1), ("micro_batches", plan, ROWS.value)):
        other_loss, other_gradient, other_seconds, other_temp = gradients(other, batch, accumulate)
        result[name] = {
            "loss_difference": abs(other_loss - loss),
            "gradient_relative_error": relative_error(gradient, other_gradient),
            "seconds_per_step": other_seconds,
            "temp_bytes": other_temp,
        }
    flags_used = {f.name: f.value for f in (RECIPE, RESOLUTION, DEPTH, WIDTH, ROWS, STEPS)}
    print(json.dumps(result, indent=1))
    if OUT.value:
        pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(pathlib.Path(OUT.value), {**result, "flags": flags_used, **workdir.run_info()})


if __name__ == "__main__":
    app.run(main)
