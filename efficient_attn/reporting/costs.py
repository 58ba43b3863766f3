"""What a training step of a run needs: parameters, floating-point operations a token, and memory of the compiled step."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, TypedDict

import jax

from efficient_attn import sharding, workdir
from efficient_attn.mixers import MIXERS, state_size
from efficient_attn.plan import Plan, example_batch, make_plan, num_parameters
from efficient_attn.reporting import flops
from efficient_attn.steps import train_step

FILE = "costs.json"


class Cost(TypedDict):
    """flops_per_token: of a training step, as `reporting.flops` counts; a bound from below where flops_loops is not 0.
    step_bytes: arguments and temporaries of the compiled step, by XLA's own analysis for the backend it was compiled on.
    state_bytes: what a sequence of the task's length leaves behind for decoding (`mixers.state_size`), over all layers; None
    where a mixer does not decode.
    """

    parameters: int
    flops_per_token: float
    flops_loops: int
    step_bytes: int
    state_bytes: int | None
    backend: str


Costs = Mapping[pathlib.Path, Cost]


def measure(config: Mapping[str, Any]) -> Cost:
    """The cost of a configuration in normal form, of one seed on the devices here. Compiles its training step, which takes
    seconds to minutes; runs nothing.
    """
    alone = {**config, "train": {**config["train"], "replicas": 1}}
    plan = make_plan({**alone, "sharding": sharding.for_devices_here(alone)})
    step = functools.partial(train_step, plan.model, plan.tx, **plan.step_options)
    batch = example_batch(plan.task, plan.train.batch_size)
    counted = flops.of(step, plan.state, batch)
    memory = jax.jit(step, donate_argnums=0).lower(plan.state, batch).compile().memory_analysis()
    return Cost(
        parameters=num_parameters(plan), flops_per_token=counted.count / plan.tokens_per_batch, flops_loops=counted.loops,
        step_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes, state_bytes=state_of(plan),
        backend=jax.default_backend(),
    )  # fmt: skip


def state_of(plan: Plan) -> int | None:
    """Bytes that decoding keeps of one sequence, over all layers."""
    model = plan.config["model"]
    mixers = model.get("mixer", {})
    cycle = mixers if isinstance(mixers, list) else [mixers]
    if not all(mixer.get("causal") and MIXERS[mixer["name"]].decode for mixer in cycle):
        return None
    layers = [cycle[i % len(cycle)] for i in range(model["depth"])]
    return sum(state_size(mixer, plan.task.length, model["width"]) for mixer in layers)


def read(root: pathlib.Path) -> dict[pathlib.Path, Cost]:
    """By folder, what `costs.json` in `root` holds; empty where there is none."""
    path = root / FILE
    return {root / name: cost for name, cost in workdir.read_json(path).items()} if path.exists() else {}


def write(root: pathlib.Path, costs: Costs) -> None:
    workdir.write_json(root / FILE, {str(folder.relative_to(root)): dict(cost) for folder, cost in sorted(costs.items())})
