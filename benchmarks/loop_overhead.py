"""What the loop costs over a bare jitted step: seconds a step of each, in alternating blocks, and the difference.

    python -m benchmarks.loop_overhead --pairs=20 --out=results/cpu/loop_overhead.json

Both run the same compiled train step on the same batches, in a process set up as train.py sets its own up. The bare loop holds
its batches on the device, dispatches the steps and blocks on the last; the real loop reads, shuffles and puts each batch,
fetches the metrics of every step, and writes a line every 50. Blocks of `--steps` steps alternate A B A B; the overhead is the
median of the paired differences, with a 95 % bootstrap interval.
"""

import functools
import json
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from configs import quickstart
from efficient_attn import allocator, preemption, workdir
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.display import PlainLines
from efficient_attn.plan import make_plan
from efficient_attn.steps import train_step
from efficient_attn.tasks.pipeline import train_batches
from efficient_attn.timing import Profiler
from efficient_attn.training import Loop, Progress

PAIRS = flags.DEFINE_integer("pairs", 20, "Pairs of blocks.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 20, "Steps a block.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 160, "Width of the model; sets how long a step takes.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def make_config():
    config = quickstart.get_config()
    config.model.width = WIDTH.value
    config.train.batch_size = 64
    config.train.eval_every = config.train.checkpoint_every = "1000000 steps"
    config.train.duration = "1000000 steps"
    config.train.tensorboard = False
    return config


class Bare:
    """The train step alone, on batches that already lie on the device."""

    def __init__(self, plan, placement):
        self.step = jax.jit(functools.partial(train_step, plan.model, plan.tx), donate_argnums=0)
        batches = train_batches(plan.task.source("train"), batch_size=plan.train.batch_size, seed=0)
        self.batches = [placement.put(next(batches)) for _ in range(8)]
        batches.close()
        self.state = jax.jit(plan.init_state)()

    def block(self, steps: int) -> float:
        start = time.perf_counter()
        for i in range(steps):
            self.state, sums = self.step(self.state, self.batches[i % 8])
        jax.block_until_ready((self.state, sums))
        return (time.perf_counter() - start) / steps


class Whole:
    """The train loop, a block of steps at a time."""

    def __init__(self, plan, placement, folder: pathlib.Path):
        checkpoints = Checkpoints(folder / "checkpoints", metric="valid_accuracy", mode="max")
        metrics = workdir.MetricsFile(folder / "metrics.jsonl")
        displays = [PlainLines(0, plan.total)]
        self.loop = Loop(plan, placement, checkpoints, metrics, displays, Progress(), preemption.StopRequest())
        self.waits, self.folder, self.plan = [], folder, plan
        self.state = jax.jit(plan.init_state, out_shardings=placement.state)()
        self.batches = train_batches(plan.task.source("train"), batch_size=plan.train.batch_size, seed=0)

    def block(self, steps: int) -> float:
        start = time.perf_counter()
        self.state = self.loop.steps(self.state, self.batches, steps, Profiler(self.folder, 0, 0, 0))
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def main(_):
    allocator.compute_in_callers_thread()
    plan = make_plan(make_config())
    placement = plan.placement()
    with tempfile.TemporaryDirectory() as folder:
        bare, whole = Bare(plan, placement), Whole(plan, placement, pathlib.Path(folder))
        for runner in (bare, whole):
            runner.block(STEPS.value)  # compile, and fill the read-ahead
        times = np.array([[bare.block(STEPS.value), whole.block(STEPS.value)] for _ in range(PAIRS.value)])
    overhead = times[:, 1] - times[:, 0]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(overhead, (10_000, len(overhead))), axis=1)
    result = {
        "bare_ms": 1e3 * np.median(times[:, 0]),
        "loop_ms": 1e3 * np.median(times[:, 1]),
        "overhead_ms": 1e3 * np.median(overhead),
        "overhead_ms_95": [1e3 * q for q in np.quantile(medians, [0.025, 0.975])],
        "pairs": PAIRS.value,
        "steps_per_block": STEPS.value,
        **workdir.run_info(),
    }
    print(json.dumps({k: v for k, v in result.items() if "ms" in k or k in ("pairs", "steps_per_block")}, indent=1))
    if OUT.value:
        pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(pathlib.Path(OUT.value), result)


if __name__ == "__main__":
    app.run(main)
