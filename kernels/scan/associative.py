"""The scan as a parallel prefix: pairs (a, b) compose associatively (Blelloch 1990; S5, Smith et al. 2023, section 2.2)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from kernels.scan.reference import State


def compose(first, second):
    """(a1, b1) then (a2, b2): h -> a2 (a1 h + b1) + b2 = (a1 a2) h + (a2 b1 + b2)."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def scan(
    a: Inexact[Array, "B L N"] | Inexact[Array, "N"], b: State, h0: Inexact[Array, "B N"], *, reverse: bool = False
) -> State:
    """All states, in O(log L) dependent steps and O(L) work; memory several times [B, L, N]."""
    a = jnp.broadcast_to(a if a.ndim == 3 else a[None, None], b.shape)
    a_product, h = lax.associative_scan(compose, (a, b), reverse=reverse, axis=1)
    return h + a_product * h0[:, None]
