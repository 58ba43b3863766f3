"""From a configuration to the objects of a run, all checked before anything is compiled, generated or written."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_attn import divergence, models, optim, replicas, sharding, tasks
from efficient_attn.arguments import TYPE_NAMES, ConfigError, lookup, shown, suggest
from efficient_attn.config import Config, TrainConfig, normal_form, section
from efficient_attn.durations import in_steps
from efficient_attn.steps import MEMORY, Batch, TrainState, empty_memory, init_state
from efficient_attn.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run: what its configuration means.

    config: in normal form, as run.json holds it. total, eval_every, checkpoint_every: in steps.
    params: shapes and dtypes of the parameters, of one replica. state: those of the train state, of all replicas.
    mesh: devices along each axis of the mesh. specs: how the state lies on it.
    """

    config: dict[str, Any]
    task: Task
    model: nn.Module
    optimizer: optim.OptimizerConfig
    train: TrainConfig
    tx: optax.GradientTransformation
    total: int
    warmup: int
    eval_every: int
    checkpoint_every: int
    params: Any
    mesh: dict[str, int]
    state: TrainState | None
    specs: TrainState | None

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def seeds(self) -> tuple[int, ...]:
        """One of each replica."""
        return tuple(range(self.seed, self.seed + self.train.replicas))

    @property
    def data_seed(self) -> int | tuple[int, ...]:
        """What `train_batches` takes: the seed, or those of the replicas."""
        return self.seed if self.train.replicas == 1 else self.seeds

    @property
    def tokens_per_batch(self) -> int:
        rows = self.train.batch_size * self.train.replicas
        return rows * self.task.length * (2 if self.task.head == "match" else 1)

    @property
    def step_options(self) -> dict[str, Any]:
        """What `steps.train_step` takes besides model, optimiser, state and batch."""
        fields = ("label_smoothing", "accumulate", "loss_chunk")
        return {name: getattr(self.train, name) for name in fields} | {"ema": self.optimizer.ema}

    def placement(self) -> sharding.Placement:
        """The mesh of devices. Raises `ConfigError` where the devices here cannot make it."""
        return sharding.Placement(self.mesh, self.specs, self.task.length)

    def init_state(self) -> TrainState:
        """A fresh state. To be jitted."""
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example_batch(self.task, 1))
        return replicas.init(functools.partial(self._init_one, batch), self.seeds)

    def _init_one(self, batch: Batch, seed: Any) -> TrainState:
        state = init_state(self.model, self.tx, seed, batch, ema=self.optimizer.ema > 0)
        if not getattr(self.model, "has_memory", False):
            return state
        others = {"params": state.params, **state.variables}
        memory = empty_memory(self.model, others, example_batch(self.task, self.train.batch_size))
        return state.replace(variables={**state.variables, MEMORY: memory})


def make_plan(config: Config) -> Plan:
    """Build everything that a configuration (a ConfigDict, or its normal form) describes.

    Raises `ConfigError` for whatever is wrong with it. Reads no data and compiles nothing.
    """
    config = normal_form(config)
    _check_sections(config)
    task_arguments = dict(config["task"])
    task_class = lookup(tasks.TASKS, task_arguments.pop("name", None), "task.name")
    task = _construct(task_class, task_arguments, "task")
    optimizer = _construct(optim.OptimizerConfig, config["optimizer"], "optimizer")
    train = _construct(TrainConfig, config["train"], "train")
    if not isinstance(config["seed"], int) or not 0 <= config["seed"] <= 2**32 - train.replicas:
        raise ConfigError(f"seed={config['seed']!r} must be an integer of at least 0 and less than 2^32, as its replicas' must")
    layout = _construct(sharding.ShardingConfig, config.get("sharding", {}), "sharding")  # older runs have no such section
    mesh = sharding.mesh_shape(layout, jax.device_count())
    sharding.check_rows(train.batch_size, train.accumulate, mesh, "train.batch_size")
    sharding.check_rows(train.eval_batch_size or train.batch_size, 1, mesh, "train.eval_batch_size")
    if task.length >= 2**31:
        raise ConfigError(f"the task's sequences have {task.length:,} tokens; positions are int32, so at most 2^31 - 1 can be")
    sharding.check_length(task.length, mesh)
    if train.replicas > 1 and max(size for axis, size in mesh.items() if axis != "data") > 1:
        raise ConfigError(f"train.replicas={train.replicas} go with the data axis alone; set the other axes of sharding to 1")
    divergence.check(train.on_divergence, train.spike_factor, train.replicas)
    if train.loss_chunk and task.head != "lm":
        raise ConfigError(
            f"train.loss_chunk divides the positions of language models; task.name={config['task']['name']!r} is none"
        )
    if train.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("train.wandb=True needs the wandb package: pip install wandb")
    model = models.build(config["model"], task)
    if getattr(model, "has_memory", False):
        _check_memory(task, train)

    total, warmup, eval_every, checkpoint_every = _steps(task, train, optimizer)
    params = _abstract_params(model, task)
    tx = optim.build(optimizer, params, warmup=warmup, total=total)
    plan = Plan(
        config=config,
        task=task,
        model=model,
        optimizer=optimizer,
        train=train,
        tx=tx,
        total=total,
        warmup=warmup,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        params=params,
        mesh=mesh,
        state=None,
        specs=None,
    )
    state = jax.eval_shape(plan.init_state)
    return dataclasses.replace(plan, state=state, specs=sharding.state_specs(layout, mesh, state, tx))


def _steps(task: tasks.Task, train: TrainConfig, optimizer: optim.OptimizerConfig) -> tuple[int, int, int, int]:
    """The steps of the run, of its warm-up, and between evaluations and checkpoints; none but the warm-up may have none."""

    def steps(duration: str, field: str, least: int = 1) -> int:
        count = in_steps(duration, batch_size=train.batch_size, num_examples=task.sizes["train"], field=field)
        if count < least:
            raise ConfigError(f"{field}={duration!r} is less than one step")
        return count

    total, warmup = steps(train.duration, "train.duration"), steps(optimizer.warmup, "optimizer.warmup", least=0)
    return total, warmup, steps(train.eval_every, "train.eval_every"), steps(train.checkpoint_every, "train.checkpoint_every")


SECTIONS: Mapping[str, type] = {
    "name": str, "recipe": str, "seed": int, "task": dict, "model": dict, "optimizer": dict, "train": dict
}  # fmt: skip
OPTIONAL_SECTIONS: Mapping[str, type] = {"sharding": dict}
"""Those that older runs do not have."""


def _check_sections(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a configuration does not have the sections that `config.experiment` makes."""
    known = {**SECTIONS, **OPTIONAL_SECTIONS}
    if stray := [key for key in config if key not in known]:
        raise ConfigError(f"the configuration has no section {stray[0]!r}{suggest(stray[0], known)}; it has: {', '.join(known)}")
    for key, kind in known.items():
        if (key in SECTIONS or key in config) and not isinstance(config.get(key), kind):
            raise ConfigError(f"the configuration's {key} must be {TYPE_NAMES.get(kind, 'a dict')}, got {shown(config.get(key))}")


def _check_memory(task: Task, train: TrainConfig) -> None:
    """Raise `ConfigError` where rows of a batch would not continue those of the batch before, whose memory they get."""
    if not task.contiguous:
        raise ConfigError("model.mixer remembers the segment before: it needs a task of streams (lm_text, task.order='streams')")
    if train.on_divergence == "rollback":
        raise ConfigError(
            "train.on_divergence='rollback' leaves batches out, and model.mixer remembers the segment before: "
            "choose 'skip' or 'stop'"
        )


def _construct(constructor: Any, values: Mapping[str, Any], field: str) -> Any:
    try:
        return section(constructor, values, field)
    except (ValueError, TypeError, tasks.TaskError) as error:
        raise ConfigError(f"{field}: {error}") from error


def _abstract_params(model: nn.Module, task: Task) -> Any:
    """Shapes of the parameters; a mechanism that cannot take these sizes says so here."""
    batch = example_batch(task, 1)
    init = functools.partial(init_state, model, optax.identity(), 0, ema=False)
    try:
        return jax.eval_shape(init, batch).params
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the model cannot be built: {error}") from error


def example_batch(task: Task, rows: int) -> Batch:
    """The shapes and dtypes of a batch of a task."""
    inner = (2, task.length) if task.head == "match" else (task.length,)
    per_target = inner if task.head == "lm" else ()
    values = (task.channels,) if task.vocab_size is None else ()
    dtype = np.float32 if task.vocab_size is None else np.int32
    packed = {"segment_ids": jax.ShapeDtypeStruct((rows, *inner), np.int32)} if task.packed else {}
    mask = {"mask": jax.ShapeDtypeStruct((rows, *inner), np.bool_)} if task.padded else {}
    return {
        **packed,
        **mask,
        "inputs": jax.ShapeDtypeStruct((rows, *inner, *values), dtype),
        "targets": jax.ShapeDtypeStruct((rows, *per_target), np.int32),
        "weights": jax.ShapeDtypeStruct((rows, *per_target), np.float32),
    }


def num_parameters(plan: Plan) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.params))


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def mib_per_device(plan: Plan) -> dict[str, float]:
    """What each device of the mesh holds between steps, and while it takes one, but for activations and gathered parameters."""
    batch = example_batch(plan.task, plan.train.batch_size)
    params = plan.state.params, plan.specs.params
    parts = {
        "parameters": params,
        "optimizer state": (plan.state.opt_state, plan.specs.opt_state),
        "gradients": params,
        "batch": (batch, {name: sharding.batch_spec(x.shape, plan.task.length) for name, x in batch.items()}),
    }
    if plan.state.ema is not None:
        parts["average"] = params
    if plan.state.variables:
        parts["variables"] = plan.state.variables, plan.specs.variables
    return {name: sharding.nbytes_per_device(*part, plan.mesh) / 2**20 for name, part in parts.items()}


def describe(plan: Plan) -> str:
    """The parameter table and what the run will do, for people."""
    groups = optim.groups(plan.optimizer.rules, plan.params)
    rows = [("parameter", "shape", "size", "lr x", "weight decay")]
    leaves = zip(*(jax.tree.leaves(t) for t in (optim.paths(plan.params), plan.params, groups)))
    for path, leaf, group in leaves:
        decay = plan.optimizer.weight_decay if group.weight_decay is None else group.weight_decay
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((path, shape, f"{math.prod(leaf.shape):,}", f"{group.lr_mult:g}", f"{decay:g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*table, "", *_summary(plan)])


def _summary(plan: Plan) -> list[str]:
    train, task, sizes = plan.train, plan.task, plan.task.sizes
    batch = nbytes(example_batch(task, train.batch_size))
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"
    epochs = plan.total * train.batch_size / sizes["train"]
    return [
        f"task        {task.name}",
        f"splits      {sizes['train']:,} train, {sizes['valid']:,} valid, {sizes['test']:,} test; length {task.length:,}",
        f"data        {task.cost()}",
        f"parameters  {num_parameters(plan):,} ({nbytes(plan.params) / 2**20:.1f} MiB)"
        f"{f' in each of {train.replicas} replicas' if train.replicas > 1 else ''}; "
        f"train state {nbytes(plan.state) / 2**20:.1f} MiB; batch {batch / 2**20:.1f} MiB; activations come on top",
        f"devices     {mesh} of {jax.device_count()} x {jax.devices()[0].device_kind} here; "
        f"{train.batch_size} examples a step in {train.accumulate} micro-batch(es)",
        f"each        {', '.join(f'{name} {mib:.1f} MiB' for name, mib in mib_per_device(plan).items())}",
        f"run         {plan.total:,} steps = {epochs:.3g} epochs; warm-up {plan.warmup:,}"
        f"{', longer than the run: the learning rate never gets where it should' if plan.warmup > plan.total else ''}; "
        f"evaluates every {plan.eval_every:,}, saves every {plan.checkpoint_every:,}",
    ]
