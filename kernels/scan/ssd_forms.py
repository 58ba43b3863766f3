"""The state-space dual form of Mamba-2 (Dao & Gu 2024, section 6) and its specification, on arrays that are ready for them.

Both compute h_t = exp(l_t) h_{t-1} + x_t B_t^T and y_t = h_t C_t with one log-decay l_t <= 0 for each head, a state [P, N], and
B and C shared by the R heads of each of G groups; `log_decay=None` is l = 0. Unrolled, that is attention without a softmax,

    y_t = sum_{s <= t} exp(l_{s+1} + ... + l_t) (C_t . B_s) x_s,

which `dual` evaluates by products of matrices inside chunks of Q steps, carrying one state from chunk to chunk. Stretches of
chunks are computed one after the other, and once more in the backward pass: what they keep between the two is their state, and
their scores stay in the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Q = 64  # steps in a chunk
SCORES = {"cpu": 2**19}
"""Scores of a stretch, by platform: 2 MiB of each array; measured with `benchmarks.scan_cost` up to 64K steps."""
SCORES_ELSEWHERE = 2**26  # to fill a device; not measured on any
NOTHING = -1e30
"""A log-decay that lets nothing through, of which many may be added; lower ones, -inf among them, are taken for it."""

X = Float[Array, "B L G R P"]
LogDecay = Float[Array, "B L G R"] | None
BC = Float[Array, "B L G N"]
State = Float[Array, "B G R P N"]


def _einsum(formula, *operands):
    return jnp.einsum(formula, *operands, precision=lax.Precision.HIGHEST)


def on_steps(form):
    """`form` as the entry calls every implementation: (x, dt, log_decay, B, C, D, h0) -> y in the type of x, h_last.

    x [B, L, G, R, P], B and C in any type, dt [B, L, G, R] what x is multiplied by where it is written, D [G, R] or None.
    """

    def run(x, dt, log_decay, B, C, D, h0):
        full, B, C = (v.astype(h0.dtype) for v in (x, B, C))
        y, last = form(full * dt[..., None], log_decay, B, C, h0)
        return (y if D is None else y + D[None, None, :, :, None] * full).astype(x.dtype), last

    return run


def recurrence(x: X, log_decay: LogDecay, B: BC, C: BC, h0: State) -> tuple[X, State]:
    """y and h_last, one step after another: the specification."""

    def step(h, at_t):
        x, log_decay, B, C = at_t
        h = h if log_decay is None else jnp.exp(log_decay)[..., None, None] * h
        h = h + _einsum("bgrp,bgn->bgrpn", x, B)
        return h, _einsum("bgrpn,bgn->bgrp", h, C)

    last, y = lax.scan(step, h0, jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, log_decay, B, C)))
    return jnp.moveaxis(y, 0, 1), last


def dual(x: X, log_decay: LogDecay, B: BC, C: BC, h0: State, *, scores: int | None = None) -> tuple[X, State]:
    """The same in chunks, as many together as have `scores` scores. Memory O(L) beside the scores of a stretch."""
    batch, length, groups, heads, _ = x.shape
    scores = SCORES.get(jax.default_backend(), SCORES_ELSEWHERE) if scores is None else scores
    size = min(Q, length)
    chunks = -(-length // size)
    stretches = -(-chunks // max(1, scores // (batch * groups * heads * size**2)))
    steps = -(-chunks // stretches) * size
    x, log_decay, B, C = (_padded(v, stretches * steps) for v in (x, log_decay, B, C))
    if stretches == 1:
        y, last = _stretch(size, x, log_decay, B, C, h0)
        return y[:, :length], last

    def in_turn(v):
        return None if v is None else jnp.moveaxis(v.reshape(batch, stretches, steps, *v.shape[2:]), 1, 0)

    def step(h, stretch):
        y, h = jax.checkpoint(functools.partial(_stretch, size))(*stretch, h)
        return h, y

    last, y = lax.scan(step, h0, tuple(map(in_turn, (x, log_decay, B, C))))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *y.shape[3:])[:, :length], last


def _padded(v, length: int):
    """With steps that write nothing and keep the state."""
    return None if v is None else jnp.pad(v, ((0, 0), (0, length - v.shape[1]), *((0, 0),) * (v.ndim - 2)))


def _stretch(size: int, x: X, log_decay: LogDecay, B: BC, C: BC, h0: State) -> tuple[X, State]:
    """y and h_last of whole chunks of `size` steps."""
    batch = x.shape[0]
    x, log_decay, B, C = jax.tree.map(lambda v: v.reshape(batch, -1, size, *v.shape[2:]), (x, log_decay, B, C))
    if log_decay is None:
        decay = jnp.tri(size, size + 1, 1, x.dtype)[None, None, None, None]
    else:
        decay = _decays(jnp.moveaxis(log_decay, 2, -1))  # [B, c, G, R, Q, Q + 1]
    written = _einsum("bcjgrp,bcjgn->bcgrpn", x * _in_time(decay[..., -1, 1:]), B)
    before, last = _carry(jnp.broadcast_to(decay[..., -1, 0], written.shape[:4]), written, h0)
    scores = _einsum("bcign,bcjgn->bcgij", C, B)
    inside = _einsum("bcgrij,bcjgrp->bcigrp", scores[:, :, :, None] * decay[..., 1:], x)
    y = inside + _einsum("bcign,bcgrpn->bcigrp", C, before) * _in_time(decay[..., 0])
    return y.reshape(batch, -1, *y.shape[3:]), last


def _in_time(decay: Float[Array, "B c G R Q"]) -> Float[Array, "B c Q G R 1"]:
    return jnp.moveaxis(decay, -1, 2)[..., None]


def _decays(log_decay: Float[Array, "*batch Q"]) -> Float[Array, "*batch Q Q1"]:
    """exp(l_j + ... + l_i) at [i, j]: what is left at step i of a state before step j; 0 where j > i + 1.

    Each sum is taken by itself, as a product by two triangles of ones: the difference of two cumulative sums would lose the
    small decays behind a large one.
    """
    steps = log_decay.shape[-1]
    i, k, j = jnp.arange(steps)[:, None], jnp.arange(steps), jnp.arange(steps + 1)[None, :]
    ones = (k[:, None] >= j).astype(log_decay.dtype)
    log_decay = jnp.where(log_decay < NOTHING, NOTHING, log_decay)
    sums = _einsum("...ik,kj->...ij", jnp.where(k[None, :] <= i, log_decay[..., None, :], 0), ones)
    return jnp.where(j <= i + 1, jnp.exp(sums), 0)


def _carry(decay: Float[Array, "B c G R"], written: Float[Array, "B c G R P N"], h0: State):
    """The state before each chunk [B, c, G, R, P, N], and the last one."""

    def step(h, at_chunk):
        decay, written = at_chunk
        return decay[..., None, None] * h + written, h

    last, before = lax.scan(step, h0, (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(written, 1, 0)))
    return jnp.moveaxis(before, 0, 1), last
