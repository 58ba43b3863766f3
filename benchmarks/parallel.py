"""What a mesh of devices changes, and what it must not: python -m benchmarks.parallel --out=results/cpu/parallel.json

    equality     a small model (attention, Mamba, mixture of experts) trained on one device and on meshes of eight, from the same
                 seed and batches: the largest difference of the losses (AdamW) and of the parameters (SGD)
    gradients    of every parameter at the first step, on one device and on meshes of eight: the largest difference of an array
                 over its largest entry, since SGD moves some parameters (step sizes of Mamba) by little more than rounding
    processes    `equality` on two processes of four devices each, over gloo on this machine
    memory       temporary bytes of each device for causal attention and the selective scan, forward and backward, by shards
    collectives  what the partitioner makes of a language model of 125M parameters on eight devices: counted from the compiled
                 program, with the bytes that each device holds

Eight devices are forced on the CPU: figures are exact in bytes and counts, and say nothing about time.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_attn import distributed, optim, sharding, workdir
from efficient_attn.config import experiment
from efficient_attn.plan import example_batch, make_plan, mib_per_device, num_parameters
from efficient_attn.steps import train_step
from efficient_attn.tasks.pipeline import train_batches
from kernels.attention import attend, masks
from kernels.scan import selective_scan

SECTIONS = ("equality", "gradients", "processes", "memory", "collectives")
CHOSEN = flags.DEFINE_multi_enum("section", list(SECTIONS), SECTIONS, "What to measure; all by default.")
CHOSEN_MESHES = flags.DEFINE_list("meshes", None, "Of `equality` and `processes`: which meshes; all by default.")
STEPS = flags.DEFINE_integer("steps", 20, "Steps of training.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 65_536, "Length of the sequences of `memory`.")
WIDTH = flags.DEFINE_integer("width", 768, "Width of the language model of `collectives`; 768 makes 125M parameters.")
DEPTH = flags.DEFINE_integer("depth", 12, "Its depth.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
CHILD = flags.DEFINE_list("child", None, "Used by `processes` itself: port, process, file of results.")

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "model": dict(data=2, model=4),
    "seq": dict(data=2, seq=4),
    "expert": dict(data=2, expert=4),
    "data-fsdp-model": dict(data=2, fsdp=2, model=2),
    "fsdp-expert-seq": dict(data=1, fsdp=2, expert=2, seq=2),
}

RULES = (
    (r".*/(query|key|value)/kernel", ("fsdp", "model")),
    (r".*/mixer/out/kernel", ("model", None, "fsdp")),
    (r"layer_0/mlp/up/kernel", ("fsdp", "model")),
    (r"layer_0/mlp/down/kernel", ("model", "fsdp")),
    (r"layer_1/mlp/up/kernel", ("expert", "fsdp", "model")),
    (r"layer_1/mlp/down/kernel", ("expert", "model", "fsdp")),
    (r".*", "fsdp"),
)


def small_plan(algorithm: str, mesh: dict[str, int]):
    recipe = dict(
        model=dict(
            depth=2, width=32, positions=dict(name="learned"), feed_forward_width=64,
            mixer=(dict(name="softmax", num_heads=4), dict(name="mamba", state_dim=4)),
            experts=(dict(name="none"), dict(name="top_k", num_experts=4, k=2, capacity_factor=1.5)),
        ),
        optimizer=dict(algorithm=algorithm, learning_rate={"adamw": 3e-3, "sgd": 0.05}[algorithm], clip_norm=1.0),
        train=dict(batch_size=8, duration="1000 steps"),
        sharding=dict(rules=RULES, min_size=0, **{"data": 1, **mesh}),
    )  # fmt: skip
    task = dict(name="multi_query_recall", length=32, vocab_size=64, num_pairs=4, num_examples=10_000)
    return make_plan(experiment(name="parallel", task=task, recipes={"a": recipe}, recipe="a"))


def trained(plan, placement, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The losses of so many steps and the parameters after them; on the first device where there is no placement."""
    step = functools.partial(train_step, plan.model, plan.tx)
    rows = placement.rows() if placement else {}
    batches = train_batches(plan.task.source("train"), batch_size=plan.train.batch_size, seed=0, **rows)
    if placement is None:
        state, step = jax.jit(plan.init_state)(), jax.jit(step, donate_argnums=0)
    else:
        state = jax.jit(plan.init_state, out_shardings=placement.state)()
        step = jax.jit(step, donate_argnums=0, out_shardings=(placement.state, placement.whole))
    losses = []
    for _ in range(steps):
        batch = next(batches)
        state, sums = step(state, placement.put(batch) if placement else batch)
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
    batches.close()
    params = multihost_utils.process_allgather(state.params, tiled=True) if jax.process_count() > 1 else state.params
    return np.array(losses), [np.asarray(x) for x in jax.tree.leaves(params)]


def on_mesh(algorithm: str, name: str, steps: int):
    plan = small_plan(algorithm, MESHES[name])
    placement = plan.placement()
    with jax.set_mesh(placement.mesh):
        return trained(plan, placement, steps)


def difference(one, other) -> dict[str, float]:
    return {
        "losses": float(np.max(np.abs(one[0] - other[0]))),
        "parameters": max(float(np.max(np.abs(a - b))) for a, b in zip(one[1], other[1], strict=True)),
    }


def equality(meshes: list[str], steps: int) -> dict:
    found = {}
    for algorithm in ("adamw", "sgd"):
        alone = trained(small_plan(algorithm, {}), None, steps)
        for name in meshes:
            found.setdefault(name, {})[algorithm] = difference(alone, on_mesh(algorithm, name, steps))
            print(name, algorithm, found[name][algorithm], flush=True)
    return found


def keep_gradients(plan):
    """The plan with an optimiser that changes nothing and whose state is the gradients of the last step."""
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, _, params: (jax.tree.map(jnp.zeros_like, grads), grads)
    )
    plan = dataclasses.replace(plan, tx=tx)
    plan = dataclasses.replace(plan, state=jax.eval_shape(plan.init_state))
    layout = sharding.ShardingConfig(**plan.config["sharding"])
    return dataclasses.replace(plan, specs=sharding.state_specs(layout, plan.mesh, plan.state, tx))


def first_gradients(plan, placement) -> dict[str, np.ndarray]:
    """By path, at the first batch; on the first device where there is no placement."""
    step = functools.partial(train_step, plan.model, plan.tx)
    batch = next(batches := train_batches(plan.task.source("train"), batch_size=plan.train.batch_size, seed=0))
    batches.close()
    if placement is None:
        state, _ = jax.jit(step)(jax.jit(plan.init_state)(), batch)
    else:
        with jax.set_mesh(placement.mesh):
            state = jax.jit(plan.init_state, out_shardings=placement.state)()
            state, _ = jax.jit(step, out_shardings=(placement.state, placement.whole))(state, placement.put(batch))
    return dict(zip(jax.tree.leaves(optim.paths(state.opt_state)), map(np.asarray, jax.tree.leaves(state.opt_state))))


def gradients(meshes: list[str]) -> dict:
    alone = first_gradients(keep_gradients(small_plan("sgd", {})), None)
    zero = 1e-7 * max(np.max(np.abs(x)) for x in alone.values())  # below it a gradient is rounding: that of a bias of keys
    found = {}
    for name in meshes:
        plan = keep_gradients(small_plan("sgd", MESHES[name]))
        spread = first_gradients(plan, plan.placement())
        largest = {path: np.max(np.abs(x)) for path, x in alone.items() if np.max(np.abs(x)) > zero}
        errors = {path: float(np.max(np.abs(spread[path] - alone[path])) / size) for path, size in largest.items()}
        worst = max(errors, key=errors.get)
        found[name] = {"arrays": len(errors), "largest": errors[worst], "of": worst}
        print(name, "gradients", found[name], flush=True)
    return found


def processes(meshes: list[str], steps: int) -> dict:
    """`equality` between one device and two processes of four devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "results.npz"
        command = [sys.executable, "-m", "benchmarks.parallel", f"--steps={steps}", f"--meshes={','.join(meshes)}"]
        env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        children = [subprocess.Popen([*command, f"--child={port},{i},{file}"], env=env) for i in range(2)]
        if any(child.wait() for child in children):
            raise RuntimeError(f"a process of {command} failed; see above")
        results = dict(np.load(file))
    found = {}
    for algorithm in ("adamw", "sgd"):
        alone = trained(small_plan(algorithm, {}), None, steps)
        for name in meshes:
            key = f"{algorithm}/{name}"
            params = [results[f"{key}/{i}"] for i in range(len(alone[1]))]
            found.setdefault(name, {})[algorithm] = difference(alone, (results[f"{key}/losses"], params))
            print(name, algorithm, "in two processes", found[name][algorithm], flush=True)
    return found


def child(port: str, process: str, file: str, meshes: list[str], steps: int) -> None:
    """One of the two processes; the first writes what all of them made."""
    distributed.initialize(f"localhost:{port}", 2, int(process))
    results = {}
    for algorithm in ("adamw", "sgd"):
        for name in meshes:
            losses, params = on_mesh(algorithm, name, steps)
            results |= {f"{algorithm}/{name}/losses": losses}
            results |= {f"{algorithm}/{name}/{i}": x for i, x in enumerate(params)}
    if distributed.is_first():
        np.savez(file, **results)


def memory(tokens: int) -> dict:
    """Temporary MiB of each device."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    qkv = dict.fromkeys("qkv", shape((1, tokens, 2, 64)))
    s6 = dict.fromkeys(("u", "delta"), shape((1, tokens, 64))) | dict.fromkeys("BC", shape((1, tokens, 16)))
    ops = {
        "causal attention": (qkv, lambda q, k, v: attend(q, k, v, mask=masks.Causal())),
        "selective scan": (s6 | {"A": shape((64, 16))}, lambda **arrays: selective_scan(**arrays)[0]),
    }
    found = {name: {n: temporary(*op, n) / 2**20 for n in (1, 2, 4, 8)} for name, op in ops.items()}
    for name, by_shards in found.items():
        print(f"{name}, {tokens:,} tokens:", {n: f"{mib:.1f} MiB" for n, mib in by_shards.items()}, flush=True)
    return found


def temporary(arrays: dict, op, shards: int) -> int:
    """Bytes of temporary memory of each device for the gradient of a sum of squares."""
    mesh = jax.make_mesh((shards,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])

    def spec(x):
        return PartitionSpec(None, "seq") if len(x.shape) > 2 else PartitionSpec()

    placed = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))) for k, x in arrays.items()}
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(lambda arrays: jnp.sum(op(**arrays) ** 2)), out_shardings={k: x.sharding for k, x in placed.items()}
        )
        return gradient.lower(placed).compile().memory_analysis().temp_size_in_bytes


def language_model(width: int, depth: int, mesh: dict[str, int]):
    recipe = dict(
        model=dict(
            depth=depth, width=width, mixer=dict(name="softmax", num_heads=max(1, width // 64), use_bias=False),
            feed_forward_width=4 * width, use_bias=False, remat="full", norm="rms",
        ),
        train=dict(batch_size=8, duration="1000 steps"),
        sharding={"data": 1, **mesh},
    )  # fmt: skip
    task = dict(name="multi_query_recall", length=1024, vocab_size=25_600, num_pairs=64, num_examples=10_000)
    return make_plan(experiment(name="parallel", task=task, recipes={"a": recipe}, recipe="a"))


def collectives(width: int, depth: int) -> dict:
    found = {}
    for name, mesh in {"fsdp 8": dict(fsdp=8), "fsdp 4, seq 2": dict(fsdp=4, seq=2)}.items():
        plan = language_model(width, depth, mesh)
        counts = counted(compiled_step(plan).as_text(), largest_matrix(plan))
        found[name] = {"parameters": num_parameters(plan), "MiB a device": mib_per_device(plan), "collectives": counts}
        print(name, json.dumps(found[name], indent=1), flush=True)
    return found


def largest_matrix(plan) -> int:
    return max(math.prod(x.shape) for x in jax.tree.leaves(plan.params))


def compiled_step(plan):
    placement = plan.placement()
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.sharding(x.shape))
        for k, x in example_batch(plan.task, plan.train.batch_size).items()
    }
    step = functools.partial(train_step, plan.model, plan.tx)
    with jax.set_mesh(placement.mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placement.state, placement.whole))
        return jitted.lower(placement.abstract(plan.state), batch).compile()


_COLLECTIVE = re.compile(
    r"%(\S+) = (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ELEMENT = re.compile(r"%(\S+) = \S+ get-tuple-element\(%(\S+)\), index=(\d+)")


def counted(program: str, full: int) -> dict[str, dict[str, int]]:
    """For each kind of collective in a compiled program: arrays, and how many numbers they have on a device.

    XLA's CPU backend writes a reduce-scatter as an all-reduce of which each device uses its slice alone; those are counted apart.
    full: numbers of the largest parameter.
    """
    lines = program.splitlines()
    elements = {(m[2], int(m[3])): m[1] for m in map(_ELEMENT.search, lines) if m}
    found: dict[str, collections.Counter] = {}
    for line in lines:
        if match := _COLLECTIVE.search(line):
            name, shapes, kind = match.groups()
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)]
            for i, size in enumerate(sizes):
                is_cut = kind == "all-reduce" and _is_cut(elements.get((name, i), name), lines)
                counter = found.setdefault("all-reduce, then a slice" if is_cut else kind, collections.Counter())
                counter.update({"arrays": 1, "numbers": size})
                counter["largest"] = max(counter["largest"], size)
    return {kind: dict(counter) for kind, counter in sorted(found.items())} | {"largest parameter": full}


def _is_cut(name: str, lines: list[str]) -> bool:
    """Whether every use of an array takes the part that belongs to the device."""
    users = [line for line in lines if re.search(rf"[(, ]%{re.escape(name)}[,)]", line.partition(" = ")[2])]
    return bool(users) and all("partition-id" in line for line in users)


def main(_):
    meshes = CHOSEN_MESHES.value or list(MESHES)
    if CHILD.value:
        child(*CHILD.value, meshes, STEPS.value)
        return
    sections = {
        "equality": lambda: equality(meshes, STEPS.value),
        "gradients": lambda: gradients(meshes),
        "processes": lambda: processes(meshes, STEPS.value),
        "memory": lambda: memory(TOKENS.value),
        "collectives": lambda: collectives(WIDTH.value, DEPTH.value),
    }
    result: dict[str, Any] = {}
    for name in CHOSEN.value:
        result[name] = sections[name]()
        if OUT.value:  # after each section: the whole takes a while
            pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
            workdir.write_json(pathlib.Path(OUT.value), {**json.loads(json.dumps(result)), **workdir.run_info()})


if __name__ == "__main__":
    app.run(main)
