"""Where arrays live: `config.sharding` is a mesh of devices, and rules that lay parameters and optimiser state out on it.

XLA's partitioner does the rest. A batch is split by rows over data, fsdp and expert, and its sequences over seq; a rule names,
for the parameters it matches, the axis of the mesh along each of their own:

    data    copies of the model                                  fsdp    parameters, gathered layer by layer (ZeRO stage 3)
    model   heads and hidden channels (tensor parallelism)       expert  the networks of a mixture of experts
    seq     stretches of one sequence (`kernels.attention.ring`, `kernels.scan.carried`)
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import MEMORY
from efficient_attn.optim import paths
from kernels.mesh import MODEL, ROWS, SEQ

PyTree = Any
MeshShape = Mapping[str, int]

AXES = (*ROWS, SEQ, MODEL)
"""The mesh's axes, from the slowest links to the fastest: neighbouring devices share a sequence, and within it a layer."""


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """`config.sharding`.

    data, fsdp, expert, seq, model: devices along each axis of the mesh; one of them may be -1, all that are left.
    rules: (regular expression, layout) pairs; for each parameter the first whose expression matches the whole of its
        '/'-joined path counts. A layout is a tuple with an axis of the mesh (or several, or None) for each of the parameter's
        own, or the name of one axis, to be laid along the largest of the parameter's own that it divides, if any. A parameter
        without a rule is an error, so is an unused rule.
    min_size: with a name alone, arrays of fewer numbers stay whole: gathering them costs more than they weigh.

    Optimiser state and averages lie as the parameters they belong to, the memory of streams as the rows of the batch; the model's
    other variables go by the rules' names alone.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    seq: int = 1
    model: int = 1
    rules: Sequence = ((".*", "fsdp"),)
    min_size: int = 2**12


def mesh_shape(config: ShardingConfig, devices: int) -> dict[str, int]:
    """Devices along each of `AXES`, with -1 filled in for so many devices. Raises `ConfigError`."""
    shape = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in shape.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ConfigError(f"sharding.{axis}={size!r} must be a number of devices of at least 1, or -1 for all that are left")
    open_axes = [axis for axis, size in shape.items() if size == -1]
    if len(open_axes) > 1:
        raise ConfigError(f"sharding: {' and '.join(open_axes)} are both -1; give all but one of them a number of devices")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if open_axes:
        if devices % fixed:
            raise ConfigError(
                f"sharding: {_product(shape)} does not divide the {devices} device(s) here, of which "
                f"sharding.{open_axes[0]}=-1 takes the rest; for a mesh of other devices give that a number, too"
            )
        shape[open_axes[0]] = devices // fixed
    return shape


def for_devices_here(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.sharding` of a run (its configuration, in normal form) where the devices here can make its mesh.

    Else one of all of them along fsdp, or, where they do not divide the batches, along model: then each has all rows.
    Replicas lie along data alone.
    """
    section, train = config.get("sharding", {}), config["train"]
    sizes = train["batch_size"] // train.get("accumulate", 1), train.get("eval_batch_size") or train["batch_size"]
    others = [{"data": -1}] if train.get("replicas", 1) > 1 else [{"data": 1, "fsdp": -1}, {"data": 1, "model": -1}]
    if _fits(section, sizes):
        return dict(section)
    placed = next((other for other in others if _fits(other, sizes)), others[-1])
    logging.warning(
        "the run's mesh is for other devices than the %d here, which now lie along %s", jax.device_count(), [*placed][-1]
    )
    return placed


def _fits(section: Mapping[str, Any], batch_sizes: Iterable[int]) -> bool:
    """Whether the devices here make such a mesh, and those that share rows divide the batches."""
    try:
        shape = mesh_shape(ShardingConfig(**{axis: section[axis] for axis in AXES if axis in section}), jax.device_count())
    except ConfigError:
        return False
    return math.prod(shape.values()) == jax.device_count() and not any(size % row_shards(shape) for size in batch_sizes)


def make_mesh(shape: MeshShape) -> Mesh:
    """The mesh of this shape over all devices of all processes. Raises `ConfigError` where their number is another."""
    needed = math.prod(shape.values())
    if needed != jax.device_count():
        raise ConfigError(
            f"sharding: {_product(shape)} needs {needed} device(s), but there are {jax.device_count()} in "
            f"{jax.process_count()} process(es); set one axis to -1 to take what is there"
        )
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _product(shape: MeshShape) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in shape.items() if size not in (1, -1)) or "one device"


def row_shards(shape: MeshShape) -> int:
    return math.prod(shape[axis] for axis in ROWS)


def check_rows(batch_size: int, accumulate: int, shape: MeshShape, field: str) -> None:
    """Raise `ConfigError` unless every micro-batch splits evenly over the devices that share its rows."""
    shards = row_shards(shape)
    pieces = shards * accumulate
    if batch_size <= 0 or batch_size % pieces:
        raise ConfigError(
            f"{field}={batch_size} must be a positive multiple of {shards} device(s) along {', '.join(ROWS)} x {accumulate} "
            f"micro-batch(es) = {pieces}; the next one is {max(1, -(-batch_size // pieces)) * pieces}"
        )


def check_length(length: int, shape: MeshShape) -> None:
    """Raise `ConfigError` unless the sequences split evenly over the devices that share one."""
    if length % shape[SEQ]:
        raise ConfigError(
            f"sharding.seq={shape[SEQ]} does not divide the task's sequences of {length}: give it a divisor, or a task of "
            f"length {-(-length // shape[SEQ]) * shape[SEQ]}"
        )


def state_specs(config: ShardingConfig, shape: MeshShape, state: PyTree, tx: optax.GradientTransformation) -> PyTree:
    """The `PartitionSpec` of each array of a train state (its shapes), in a tree of the same structure.

    Raises `ConfigError` for a rule that is wrong or unused, and for a parameter without one.
    """
    rules = _Rules(config, shape)
    layouts = jax.tree.map(rules.find, paths(state.params))
    rules.check_all_used(jax.tree.leaves(paths(state.params)))

    def of_params(tree):
        return jax.tree.map(lambda path, layout, x: rules.spec(path, layout, x.shape), paths(tree), layouts, tree)

    def beside(x, param, layout):  # statistics of a parameter may have another shape than it
        is_like = isinstance(layout, str) or x.shape == param.shape
        return rules.spec("optimizer state", layout, x.shape) if is_like else PartitionSpec()

    def whole(x):
        return PartitionSpec()

    def of_variables(name, tree):
        if name == MEMORY:  # [B, ...], and of several replicas [N, B, ...]
            rows = PartitionSpec(*(None,) * (state.rng.ndim - 1), ROWS)
            return jax.tree.map(lambda x: rows, tree)
        return jax.tree.map(lambda x: rules.spec(name, rules.by_name, x.shape), tree)

    return state.replace(
        step=PartitionSpec(),
        params=of_params(state.params),
        opt_state=optax.tree.map_params(tx, beside, state.opt_state, state.params, layouts, transform_non_params=whole),
        variables={name: of_variables(name, tree) for name, tree in state.variables.items()},
        ema=None if state.ema is None else of_params(state.ema),
        rng=PartitionSpec(),
    )


class _Layout(tuple):
    """A layout by axis, as a leaf of a tree."""

    __slots__ = ()


class _Rules:
    """`config.rules`, checked against the mesh."""

    def __init__(self, config: ShardingConfig, shape: MeshShape):
        self.shape, self.min_size = shape, config.min_size
        self.compiled = [self._compile(i, rule) for i, rule in enumerate(config.rules)]
        self.used: set[int] = set()

    @property
    def by_name(self) -> str | _Layout:
        """The layout of arrays that no rule speaks of: that of the last rule, if it is a name."""
        last = self.compiled[-1][1] if self.compiled else _Layout()
        return last if isinstance(last, str) else _Layout()

    def _compile(self, i: int, rule: Any) -> tuple[re.Pattern, str | _Layout]:
        field = f"sharding.rules[{i}]"
        try:
            pattern, layout = rule
            compiled = re.compile(pattern)
        except (TypeError, ValueError, re.error) as error:
            raise ConfigError(f"{field}={rule!r} must be (regular expression, layout): {error}") from error
        if isinstance(layout, str):
            self._check_axes(field, [layout])
            return compiled, layout
        if not isinstance(layout, Sequence):
            raise ConfigError(f"{field}: layout {layout!r} must be the name of an axis, or a tuple of names and None")
        entries = [tuple(entry) if isinstance(entry, list | tuple) else entry for entry in layout]
        self._check_axes(field, _names(entries))
        return compiled, _Layout(entries)

    def _check_axes(self, field: str, names: Iterable[Any]) -> None:
        names = list(names)
        for name in names:
            if name not in AXES:
                raise ConfigError(f"{field} names the axis {name!r}; the mesh has {', '.join(AXES)}")
            if names.count(name) > 1:
                raise ConfigError(f"{field} names the axis {name!r} twice")

    def find(self, path: str) -> str | _Layout:
        for i, (pattern, layout) in enumerate(self.compiled):
            if pattern.fullmatch(path):
                self.used.add(i)
                return layout
        raise ConfigError(f"sharding.rules: no rule matches parameter {path!r}; end the table with (r'.*', 'fsdp')")

    def check_all_used(self, known: list[str]) -> None:
        unused = [pattern.pattern for i, (pattern, _) in enumerate(self.compiled) if i not in self.used]
        if unused:
            lines = "\n  ".join(known)
            raise ConfigError(f"sharding.rules: {unused} match no parameter that an earlier rule left; paths are\n  {lines}")

    def spec(self, path: str, layout: str | _Layout, shape: tuple[int, ...]) -> PartitionSpec:
        if isinstance(layout, str):
            return self._largest(layout, shape)
        if len(layout) > len(shape):
            raise ConfigError(f"sharding.rules: {path} has shape {shape}, fewer axes than its layout {tuple(layout)}")
        for size, entry in zip(shape, layout):
            devices = math.prod(self.shape[name] for name in _names([entry]))
            if size % devices:
                raise ConfigError(
                    f"sharding.rules: {path} has shape {shape}; its axis of {size} does not split over the {devices} of {entry}"
                )
        return PartitionSpec(*layout)

    def _largest(self, axis: str, shape: tuple[int, ...]) -> PartitionSpec:
        devices = self.shape[axis]
        divisible = [i for i, size in enumerate(shape) if size % devices == 0]
        if devices == 1 or not divisible or math.prod(shape) < self.min_size:
            return PartitionSpec()
        at = max(divisible, key=lambda i: shape[i])
        return PartitionSpec(*(axis if i == at else None for i in range(len(shape))))


def _names(entries: Iterable[Any]) -> list[Any]:
    """The axes that the entries of a layout name."""
    return [name for entry in entries if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))]


def batch_spec(shape: Sequence[int], length: int) -> PartitionSpec:
    """Of an array of a batch: its rows, and along the first later axis that has the sequence's length, its positions."""
    at = next((i for i in range(1, len(shape)) if shape[i] == length), None)
    return PartitionSpec(*(ROWS if i == 0 else SEQ if i == at else None for i in range(len(shape))))


def nbytes_per_device(tree: PyTree, specs: PyTree, shape: MeshShape) -> int:
    """Bytes that each device holds of the arrays of a tree (or their shapes), laid out by `specs`."""

    def count(x, spec):
        return math.prod(x.shape) * x.dtype.itemsize // math.prod(shape[name] for name in _names(spec))

    return sum(jax.tree.leaves(jax.tree.map(count, tree, specs)))


class Placement:
    """The mesh of a run, and what lies where on it.

    mesh: to be entered with `jax.set_mesh`, so that ops know it.
    state: the `NamedSharding` of each array of the train state. whole: that of an array of which each device has a copy.
    """

    def __init__(self, shape: MeshShape, specs: PyTree, length: int):
        self.mesh, self.length = make_mesh(shape), length
        self.state = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        owners = np.array([device.process_index for device in self.mesh.devices.flat])
        self.group, self.groups = _row_group(owners.reshape(row_shards(shape), -1), jax.process_index())

    def abstract(self, state: PyTree) -> PyTree:
        """The shapes of a train state with their shardings."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.state)

    def rows(self) -> dict[str, int]:
        """What `tasks.pipeline` gives this process to read: of its groups of processes that read the same rows, which one."""
        return {"process_index": self.group, "process_count": self.groups}

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a global batch, as global arrays."""
        return {name: self._put(x) for name, x in batch.items()}

    def _put(self, x: np.ndarray) -> jax.Array:
        first, shape = self.group * len(x), (self.groups * len(x), *x.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return x[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, self.sharding(shape), part)

    def sharding(self, shape: Sequence[int]) -> NamedSharding:
        """That of an array of a batch."""
        return NamedSharding(self.mesh, batch_spec(shape, self.length))


def _row_group(owners: Int[np.ndarray, "rows _"], process: int) -> tuple[int, int]:
    """(i, n): the devices of a process hold the i-th of n contiguous, equal parts of a batch's rows.

    owners: the process of each device; those in one row of this array share rows of the batch. Processes that share rows (a
    sequence or a layer spans them) have the same i; where the rows of a process are no such part, it reads all of them.
    """
    own = np.flatnonzero((owners == process).any(axis=1))
    first, count, total = int(own[0]), len(own), len(owners)
    if own[-1] - first + 1 != count or total % count or first % count:
        return 0, 1
    return first // count, total // count
