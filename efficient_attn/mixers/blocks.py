"""Sequences cut into blocks of equal length, for mechanisms that summarise or sort them."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def in_blocks(x: Shaped[Array, "B L *D"], size: int) -> Shaped[Array, "B n size *D"]:
    """[B, L, ...] as [B, ceil(L / size), size, ...], the last block filled up with 0 (False)."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])
