"""The selective scan without [B, L, E, N]: what is kept for the backward pass is one state for every K steps.

Forward, the state runs through single steps whose body is two vector loops over [B, N, E] and one product by C, small enough
to stay in cache. Backward, chunk by chunk from the last to the first, the states of K steps are computed again from the one
kept, and the adjoint runs back through them. With p_t = a_t h_{t-1}, x_t = dt_t u_t, g_t = dloss/dy_t and
lambda_t = dloss/dh_t in total,

    lambda_t = a_{t+1} lambda_{t+1} + C_t g_t       dB_t = lambda_t . x_t       dC_t = g_t . h_t = g_t . p_t + (g_t . x_t) B_t
    dx_t = B_t . lambda_t                           d(dt_t) = A . (lambda_t p_t)                dA = sum_t dt_t lambda_t p_t

(Gu & Dao 2023, section 3.3.2, for the recomputation; the formulas are the chain rule). Discretisation, D and the gate are
differentiated by JAX inside the chunk, so that nothing of size [B, L, E] exists but the inputs, the output and their gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.scan.selective_reference import Inputs, State, decay, discretise, output, read

K = 32  # steps between kept states, which take N / K times the memory of u; 8 to 32 are equally fast on CPU, more is slower


class Steps(NamedTuple):
    """What varies in time, one chunk of it, time first: dt, x = dt u [T, B, G, F], B, C [T, B, G, N], keep [T, B] or None."""

    dt: Array
    x: Array
    B: Array
    C: Array
    keep: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan(softplus: bool, reverse: bool, inputs: Inputs, keep) -> tuple[Float[Array, "B L G F"], State]:
    """y [B, L, G, F] and h_last [B, G, N, F], as `selective_reference.scan`."""
    y, last, _ = _run(softplus, reverse, inputs, keep)
    return y, last


def _forward(softplus, reverse, inputs, keep):
    y, last, kept = _run(softplus, reverse, inputs, keep)
    return (y, last), (inputs, keep, kept)


def _run(softplus, reverse, inputs: Inputs, keep):
    """y, h_last, and the state before each chunk [chunks, B, G, N, F]."""
    length = inputs.u.shape[1]
    dtype = inputs.h0.dtype

    def chunk(carry, index, start, size):
        h, y, kept = carry
        u, delta, B, C, z, keep_t = _cut((inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, keep), start, size, dtype)
        dt, x = discretise(softplus, u, delta, inputs.delta_bias)
        after, y_t = lax.scan(functools.partial(_step, inputs.A), h, Steps(dt, x, B, C, keep_t), reverse=reverse)
        y = _put(y, output(y_t, u, inputs.D, z), start)
        return after, y, lax.dynamic_update_index_in_dim(kept, h, index, 0)

    kept = jnp.zeros((-(-length // K), *inputs.h0.shape), dtype)
    carry = (inputs.h0, jnp.zeros_like(inputs.u), kept)
    last, y, kept = _over_chunks(chunk, carry, length, reverse=reverse, backwards=False)
    return y, last, kept


def _step(A, h: State, at_t: Steps):
    h = _previous(A, h, at_t) + at_t.B[..., None] * at_t.x[..., None, :]
    return h, read(h, at_t.C)


def _previous(A, h: State, at_t: Steps) -> State:
    """p_t = a_t h_{t-1}."""
    return decay(A, at_t.dt, at_t.keep) * h


def _backward(softplus, reverse, residuals, cotangents):
    inputs, keep, kept = residuals
    g, g_last = cotangents
    dtype = g_last.dtype
    in_time = (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z)

    def chunk(carry, index, start, size):
        adjoint, sums, gradients = carry
        u, delta, B, C, z, g_t, keep_t = _cut((*in_time, g, keep), start, size, dtype)
        (dt, x), through_inputs = jax.vjp(functools.partial(discretise, softplus), u, delta, inputs.delta_bias)
        steps = Steps(dt, x, B, C, keep_t)
        previous, y = _recompute(inputs.A, lax.dynamic_index_in_dim(kept, index, 0, keepdims=False), steps, reverse)
        _, through_output = jax.vjp(output, y, u, inputs.D, z)
        dy, du_skip, dD, dz = through_output(g_t)
        adjoint, d, dA = _adjoint(inputs.A, adjoint, previous, dy, steps, reverse)
        du, ddelta, dbias = through_inputs((d.dt, d.x))
        sums = jax.tree.map(jnp.add, sums, (dA, dD, dbias))
        gradients = jax.tree.map(lambda whole, part: _put(whole, part, start), gradients, (du + du_skip, ddelta, d.B, d.C, dz))
        return adjoint, sums, gradients

    sums = jax.tree.map(jnp.zeros_like, (inputs.A, inputs.D, inputs.delta_bias))
    carry = (g_last, sums, jax.tree.map(jnp.zeros_like, in_time))
    dh0, sums, gradients = _over_chunks(chunk, carry, inputs.u.shape[1], reverse=reverse, backwards=True)
    (dA, dD, dbias), (du, ddelta, dB, dC, dz) = sums, gradients
    return Inputs(du, ddelta, dA, dB, dC, dD, dz, dbias, dh0), None


scan.defvjp(_forward, _backward)


def _recompute(A, h: State, steps: Steps, reverse: bool):
    """p_t [T, B, G, N, F] and C h_t of a chunk, from the state before it."""

    def step(h, at_t):
        previous = _previous(A, h, at_t)
        h = previous + at_t.B[..., None] * at_t.x[..., None, :]
        return h, (previous, read(h, at_t.C))

    return lax.scan(step, h, steps, reverse=reverse)[1]


def _adjoint(A, adjoint: State, previous, g, steps: Steps, reverse: bool):
    """a_t lambda_t before the chunk, the gradients of `steps` (none for keep), and of A, from a_t lambda_t after the chunk."""
    ones = jnp.ones(steps.B.shape[1:], A.dtype)

    def step(carry, inputs):
        adjoint, dA = carry
        previous, g, at_t = inputs
        adjoint = adjoint + at_t.C[..., None] * g[..., None, :]
        both = adjoint * previous
        d = Steps(
            dt=read(both * A[None], ones),
            x=read(adjoint, at_t.B),
            B=_over_channels(adjoint, at_t.x),
            C=_over_channels(previous, g),
            keep=None,
        )
        return (decay(A, at_t.dt, at_t.keep) * adjoint, dA + at_t.dt[..., None, :] * both), d

    (adjoint, dA), d = lax.scan(step, (adjoint, jnp.zeros_like(adjoint)), (previous, g, steps), reverse=not reverse)
    dC = d.C + jnp.sum(steps.x * g, axis=-1, keepdims=True) * steps.B
    return adjoint, d._replace(C=dC), dA.sum(axis=0)


def _over_channels(h: State, x: Float[Array, "B G F"]) -> Float[Array, "B G N"]:
    return jnp.einsum("bgnf,bgf->bgn", h, x, precision=lax.Precision.HIGHEST)


def _over_chunks(chunk, carry, length: int, *, reverse: bool, backwards: bool):
    """carry = chunk(carry, index, start, size) for every chunk of K positions, in the scan's time order or `backwards`.

    The scan meets chunk 0 first, at the sequence's end if `reverse`, and last the shorter one that the length leaves over: its
    bounds are static too, so that nothing is padded.
    """
    whole, rest = divmod(length, K)

    def one(i, carry):
        index = whole - 1 - i if backwards else i
        return chunk(carry, index, length - (index + 1) * K if reverse else index * K, K)

    def full(carry):
        return lax.fori_loop(0, whole, one, carry) if whole else carry

    def remainder(carry):
        return chunk(carry, whole, 0 if reverse else whole * K, rest) if rest else carry

    return full(remainder(carry)) if backwards else remainder(full(carry))


def _cut(arrays, start, size: int, dtype):
    """Positions [start, start + size) of [B, L, ...] arrays, time first, in the state's type."""
    return jax.tree.map(lambda v: jnp.moveaxis(lax.dynamic_slice_in_dim(v, start, size, 1), 1, 0).astype(dtype), arrays)


def _put(whole, part, start):
    """`whole` [B, L, ...] with the time-first `part` written at `start`."""
    return lax.dynamic_update_slice_in_dim(whole, jnp.moveaxis(part, 0, 1).astype(whole.dtype), start, 1)
