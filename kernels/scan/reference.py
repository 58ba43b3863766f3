"""The specification of the scan: h_t = a_t h_{t-1} + b_t, one step after another with `lax.scan`."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

State = Inexact[Array, "B L N"]  # every implementation works on one flat state axis, all arrays of one dtype


def scan(
    a: Inexact[Array, "B L N"] | Inexact[Array, "N"], b: State, h0: Inexact[Array, "B N"], *, reverse: bool = False
) -> State:
    """All states h [B, L, N] from `h0`; `reverse` runs from the last position to the first. Memory O(B L N)."""

    def step(h, inputs):
        a_t, b_t = inputs if a.ndim == 3 else (a[None], inputs)
        h = a_t * h + b_t
        return h, h

    b = jnp.moveaxis(b, 1, 0)
    inputs = (jnp.moveaxis(a, 1, 0), b) if a.ndim == 3 else b
    _, h = lax.scan(step, h0, inputs, reverse=reverse)
    return jnp.moveaxis(h, 0, 1)


def gate(a: Inexact[Array, "*shape"], reset: jax.Array | None, reverse: bool) -> Inexact[Array, "..."]:
    """The decay with document boundaries in it: 0 where the state would cross one (`reset` [B, L]: a document starts here).

    Forward, the state entering a start is dropped. In reverse the state crosses the same boundary one position earlier: it
    leaves the start and enters the position before it.
    """
    if reset is None:
        return a
    if reverse:
        reset = jnp.pad(reset[:, 1:], ((0, 0), (0, 1)))
    a = a if a.ndim == 3 else a[None, None]
    return jnp.where(reset[:, :, None], jnp.zeros((), a.dtype), a)
