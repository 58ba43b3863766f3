"""The mesh that an op is traced under (`jax.set_mesh`), and how the arrays of a model lie on it.

    ROWS   data, fsdp and expert: a batch is split by rows over all three
    SEQ    a sequence is split into stretches of equal length
    MODEL  heads and channels

Without a mesh, or where an axis has one device, everything here is the identity: there is one code path for one device and for
many. Inside `jax.shard_map` an axis belongs to the program of each device, and counts as absent.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Shaped

ROWS = ("data", "fsdp", "expert")
SEQ = "seq"
MODEL = "model"

FREE = PartitionSpec.UNCONSTRAINED
"""Instead of an axis in `constrain`: as the partitioner likes."""

Axes = str | tuple[str, ...]


def shards(axes: Axes) -> int:
    """Into how many parts the partitioner splits what lies along these axes of the mesh; 1 without a mesh."""
    return math.prod(_sizes().get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes))


def _sizes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def along(size: int, axes: Axes) -> Axes | None:
    """`axes` of the mesh where they divide an array's axis of `size` evenly, else None: a copy on each device."""
    present = tuple(axis for axis in ([axes] if isinstance(axes, str) else axes) if axis in _sizes())
    if not present or size % shards(present):
        return None
    return present if len(present) > 1 else present[0]


def constrain(x: Shaped[Array, "..."], *axes: Any) -> Shaped[Array, "..."]:
    """`x` laid out along these axes of the mesh, one for each of its own (None: whole; `FREE`), where they divide it evenly."""
    if not _sizes():
        return x
    spec = (a if a in (None, FREE) else along(n, a) for n, a in zip(x.shape, axes, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def map_shards(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`fn` as the program of each device (`jax.shard_map` over the axes that split anything); gradients of copies are added."""
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=set(_sizes()), check_vma=False)
