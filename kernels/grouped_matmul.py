"""Blocks of rows times one of several weight matrices each: the product inside a mixture of experts without dropped tokens.

`jax.lax.ragged_dot` is the same product on unpadded groups, but off TPU JAX lowers it to every row times every matrix, with as
many copies of the rows as there are matrices.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "N b K"], w: Float[Array, "X K F"], group: Int[Array, "N"], used: Int[Array, ""]
) -> Float[Array, "N b F"]:
    """y[i] = x[i] w[group[i]] for i < used, and 0 for the blocks after them, which cost nothing.

    x: N blocks of b rows. w: X matrices. group: which of them a block is multiplied by, in [0, X).
    used: how many blocks count, at most N; known only at run time.

    One product of matrices after the other, so that no block's weights are ever copied. Reverse-mode gradients, of x and w, cost
    two such passes; those of w are added up in float32 (float64 for float64). There is no forward mode.
    """
    return _products(x, w, group, used)


def _products(x, w, group, used):
    def body(i, y):
        return y.at[i].set(x[i] @ w[group[i]])

    return lax.fori_loop(0, used, body, jnp.zeros((*x.shape[:2], w.shape[-1]), jnp.result_type(x, w)))


def _forward(x, w, group, used):
    return _products(x, w, group, used), (x, w, group, used)


def _backward(residuals, dy):
    x, w, group, used = residuals
    sums = jnp.promote_types(w.dtype, jnp.float32)

    def body(i, dw):
        return dw.at[group[i]].add(jnp.matmul(x[i].T, dy[i], preferred_element_type=sums))

    dx = _products(dy, jnp.swapaxes(w, 1, 2), group, used)
    dw = lax.fori_loop(0, used, body, jnp.zeros(w.shape, sums))
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)
