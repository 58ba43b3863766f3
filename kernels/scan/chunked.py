"""The scan in two passes over chunks of T steps, written so that XLA turns it into a few long vector loops.

With P_t = a_1 ... a_t inside a chunk and s_t the states of a chunk that starts from zero,

    pass 1   s_t = a_t s_{t-1} + b_t           T unrolled steps, all chunks at once
    carry    H_c = P_T H_{c-1} + s_T           the same recurrence, T times shorter
    pass 2   h_t = s_t + P_t H_{c-1}

The work is 3 multiply-adds an element instead of 1, none of it sequential beyond T steps but the short carry, and nothing of
size [B, L, N] exists but `b`, `h` and, where it varies in time, `a`: a time-invariant `a` [N] stays [N], and P_t are its powers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from kernels.scan import reference
from kernels.scan.reference import State

T = 16  # steps unrolled in a chunk: 8 and 16 are equally fast (benchmarks/scan.py), 32 compiles slowly


def scan(
    a: Inexact[Array, "B L N"] | Inexact[Array, "N"], b: State, h0: Inexact[Array, "B N"], *, reverse: bool = False
) -> State:
    """All states. A length that is not a multiple of T is padded where the scan arrives last."""
    B, L, N = b.shape
    if L <= T:
        return reference.scan(a, b, h0, reverse=reverse)
    pad = ((0, 0), (-L % T, 0) if reverse else (0, -L % T), (0, 0))
    b = jnp.pad(b, pad).reshape(B, -1, T, N)
    if a.ndim == 3:
        a = jnp.pad(a, pad).reshape(B, -1, T, N)
    h = _two_pass(a, b, h0, reverse).reshape(B, -1, N)
    return h[:, -L:] if reverse else h[:, :L]


def _two_pass(a, b: Inexact[Array, "B c T N"], h0: Inexact[Array, "B N"], reverse: bool) -> Inexact[Array, "B c T N"]:
    order = range(T)[::-1] if reverse else range(T)
    decay = [a[:, :, t] if a.ndim == 4 else a[None, None] for t in order]  # each [B, c, N], or [1, 1, N]
    states, powers = [b[:, :, order[0]]], [decay[0]]
    for a_t, t in zip(decay[1:], order[1:]):
        states.append(a_t * states[-1] + b[:, :, t])
        powers.append(a_t * powers[-1])
    whole_chunk = powers[-1] if a.ndim == 4 else powers[-1][0, 0]
    carry = reference.scan(whole_chunk, states[-1], h0, reverse=reverse)
    ahead = [carry[:, 1:], h0[:, None]] if reverse else [h0[:, None], carry[:, :-1]]
    ahead = jnp.concatenate(ahead, axis=1)
    h = [s + P * ahead for s, P in zip(states, powers)]
    return jnp.stack(h[::-1] if reverse else h, axis=2)
