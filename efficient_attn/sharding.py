"""Where arrays live: batches split by rows over all devices, everything else a copy on each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efficient_attn.arguments import ConfigError

PyTree = Any


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as global arrays split along their first axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def check_divisible(batch_size: int, accumulate: int, field: str) -> None:
    """Raise `ConfigError` unless every micro-batch splits evenly over all devices."""
    pieces = jax.device_count() * accumulate
    if batch_size <= 0 or batch_size % pieces:
        raise ConfigError(
            f"{field}={batch_size} must be a positive multiple of {jax.device_count()} device(s) x {accumulate} micro-batch(es)"
            f" = {pieces}; the next one is {max(1, -(-batch_size // pieces)) * pieces}"
        )
