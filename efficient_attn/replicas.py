"""Several seeds trained as one program: the pure functions of `steps` under `jax.vmap`.

With `train.replicas` = N > 1 every array of the train state but `step` has a leading axis N, one entry a seed; a training batch
is [B, N, ...], rows first, so that it is split over devices as any other; all replicas are evaluated on the same batch; sums of
metrics are [N]. One replica is the plain function, the same program as ever.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from efficient_attn.steps import TrainState

AXES = TrainState(step=None, params=0, opt_state=0, variables=0, ema=0, rng=0)


def init(one: Callable, seeds: Sequence[int]) -> TrainState:
    """The states of all seeds; `one`: seed -> state."""
    if len(seeds) == 1:
        return one(seeds[0])
    return jax.vmap(one, out_axes=AXES)(jnp.asarray(seeds, jnp.uint32))


def train(step: Callable, count: int) -> Callable:
    """(states, batch) -> (states, sums) of `count` replicas; `step` is that of one."""
    return step if count == 1 else jax.vmap(step, in_axes=(AXES, 1), out_axes=(AXES, 0))


def evaluate(step: Callable, count: int) -> Callable:
    """(variables, batch) -> sums of `count` replicas; `step` is that of one."""
    return step if count == 1 else jax.vmap(step, in_axes=(0, None))
