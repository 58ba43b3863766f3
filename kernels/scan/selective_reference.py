"""The specification of the selective scan, one step after another with `lax.scan`, and the parts every form of it shares.

All forms work on the arrays of `Inputs`: channels E in G groups of F that share B and C, and a state [B, G, N, F] with the
channels last, so that its long loops run over adjacent numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.channels import spread
from kernels.scan import associative
from kernels.scan.reference import gate

State = Float[Array, "B G N F"]


class Inputs(NamedTuple):
    """u, delta, z [B, L, G, F], A [G, N, F], B, C [B, L, G, N], D, delta_bias [G, F], h0 [B, G, N, F].

    D, z and delta_bias may be None. A, D, delta_bias and h0 have the state's type, the others any.
    """

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    delta_bias: Array | None
    h0: Array


def discretise(softplus: bool, u, delta, delta_bias):
    """dt = softplus(delta + delta_bias) and dt u, over any leading axes (Gu & Dao 2023, algorithm 2; B_bar = dt B, not ZOH's)."""
    dt = delta if delta_bias is None else delta + spread(delta_bias, delta.shape)
    dt = jax.nn.softplus(dt) if softplus else dt
    return dt, dt * u


def output(y, u, D, z):
    """(y + D u) silu(z), over any leading axes."""
    y = y if D is None else y + spread(D, u.shape) * u
    return y if z is None else y * jax.nn.silu(z)


def decay(A: Float[Array, "G N F"], dt: Float[Array, "*batch G F"], keep: Float[Array, "*batch"] | None):
    """exp(dt A), zero where `keep` is: [*batch, G, N, F]."""
    a = jnp.exp(dt[..., None, :] * _trailing(A, dt[..., None, :]))
    return a if keep is None else a * keep[..., None, None, None]


def keeps(reset, reverse: bool, dtype) -> Float[Array, "B L"] | None:
    """0 where a document boundary lets no state through, else 1 (see `reference.gate`); None without documents."""
    if reset is None:
        return None
    return gate(jnp.ones((*reset.shape, 1), dtype), reset, reverse)[..., 0]


def read(h: Float[Array, "*batch G N F"], C: Float[Array, "*batch G N"]) -> Float[Array, "*batch G F"]:
    """y = C h: the sum over the N states of a channel, as a product of matrices, which is what XLA's CPU backend does fast."""
    return jnp.einsum("...gnf,...gn->...gf", h, C, precision=lax.Precision.HIGHEST)


def scan(softplus: bool, reverse: bool, inputs: Inputs, keep) -> tuple[Float[Array, "B L G F"], State]:
    """y and h_last of h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t + D u_t, gated by silu(z_t)."""
    u, delta, A, B, C, D, z, delta_bias, h0 = jax.tree.map(lambda v: v.astype(inputs.h0.dtype), inputs)
    dt, x = discretise(softplus, u, delta, delta_bias)

    def step(h, at_t):
        dt, x, B, C, keep = at_t
        h = decay(A, dt, keep) * h + B[..., None] * x[..., None, :]
        return h, read(h, C)

    steps = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (dt, x, B, C, keep))
    last, y = lax.scan(step, h0, steps, reverse=reverse)
    return output(jnp.moveaxis(y, 0, 1), u, D, z), last


def parallel_prefix(softplus: bool, reverse: bool, inputs: Inputs, keep) -> tuple[Float[Array, "B L G F"], State]:
    """The same by `lax.associative_scan`: O(log L) dependent steps, and several arrays of [B, L, E, N] in memory."""
    u, delta, A, B, C, D, z, delta_bias, h0 = jax.tree.map(lambda v: v.astype(inputs.h0.dtype), inputs)
    dt, x = discretise(softplus, u, delta, delta_bias)
    a, b = decay(A, dt, keep), B[..., None] * x[..., None, :]
    batch, length = u.shape[:2]
    h = associative.scan(a.reshape(batch, length, -1), b.reshape(batch, length, -1), h0.reshape(batch, -1), reverse=reverse)
    h = h.reshape(a.shape)
    return output(read(h, C), u, D, z), h[:, 0 if reverse else -1]


def _trailing(small, large):
    """`small` with leading axes of size 1, as many as `large` has."""
    return small.reshape((1,) * (large.ndim - small.ndim) + small.shape)
