"""Parameters of one number for each channel, written so that XLA's CPU backend sums their gradients along memory.

The gradient of w [E] times x [B, L, E] sums over all but the last axis. XLA's CPU backend runs such a reduction channel by
channel, down columns of the array, an order of magnitude slower than as a product with a row of ones. The result is the same;
other backends do not care.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from kernels import mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(w: Inexact[Array, "*E"], shape: tuple[int, ...]) -> Inexact[Array, "..."]:
    """`w` repeated along the leading axes of `shape`, whose last axes are its own."""
    return jnp.broadcast_to(w.reshape((1,) * (len(shape) - w.ndim) + w.shape), shape)


def _forward(w, shape):
    return spread(w, shape), w.shape


def _backward(shape, own, g):
    if mesh.shards(mesh.SEQ) > 1:  # rows cannot be joined with positions that lie on other devices
        return (g.astype(_wide(g)).sum(axis=tuple(range(g.ndim - len(own)))).astype(g.dtype),)
    rows = g.reshape(-1, math.prod(own))
    total = lax.dot(jnp.ones((1, len(rows)), g.dtype), rows, precision=lax.Precision.HIGHEST, preferred_element_type=_wide(g))
    return (total.astype(g.dtype).reshape(own),)


def _wide(g):
    return jnp.promote_types(g.dtype, jnp.float32)


spread.defvjp(_forward, _backward)
