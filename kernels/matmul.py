"""Products written as XLA's CPU backend computes them, or their gradients, fastest: by weight matrices, and of rows by rows.

The weight gradient of x [B, L, E] times w [E, F] contracts the two axes (B, L). XLA brings a product with two contracted axes
to matrix form by copying the cotangent, together with whatever elementwise function made it (the derivative of a GELU, say),
in transposed order, which on CPU costs several times the product itself. Flattened to [B L, E] first, one axis is contracted
and nothing is copied. The result is the same; other backends do not care.
"""

import math

from jax import lax
from jaxtyping import Array, Inexact

from kernels import mesh


def matmul(x: Inexact[Array, "*batch K"], w: Inexact[Array, "K F"], **options) -> Inexact[Array, "*batch F"]:
    """x w over the last axis of x; `options` go to `lax.dot_general`."""
    return dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), **options)


def dot_general(lhs: Inexact[Array, "..."], rhs: Inexact[Array, "..."], dimension_numbers, **options) -> Inexact[Array, "..."]:
    """`lax.dot_general`, flattened to a product of matrices where it contracts the last axes of `lhs` with the first of `rhs`.

    Made to be the `dot_general` of `flax.linen.Dense` and `DenseGeneral`. Other contractions pass through unchanged. Flattening
    joins axes that a mesh may split separately: nothing is flattened where the sequence axis is.
    """
    (lhs_axes, rhs_axes), (lhs_batch, _) = dimension_numbers
    n = len(lhs_axes)
    is_by_weights = tuple(lhs_axes) == tuple(range(lhs.ndim - n, lhs.ndim)) and tuple(rhs_axes) == tuple(range(n))
    if not is_by_weights or lhs_batch or mesh.shards(mesh.SEQ) > 1:
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    rows, columns = lhs.shape[: lhs.ndim - n], rhs.shape[n:]
    contracted = math.prod(rhs.shape[:n])
    x, w = lhs.reshape(math.prod(rows), contracted), rhs.reshape(contracted, math.prod(columns))
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), **options).reshape(*rows, *columns)


def inner(x: Inexact[Array, "*rows D"], y: Inexact[Array, "*rows D"]) -> Inexact[Array, "*rows"]:
    """The inner product of each row of x with that of y, summed and returned in their type.

    `(x * y).sum(-1)` is the same, but takes the CPU backend of jaxlib 0.10.2 many times as long where a leading axis has size 1.
    """
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(x, y, (((x.ndim - 1,), (y.ndim - 1,)), (rows, rows)), precision=lax.Precision.HIGHEST)


def scaled(weight: Inexact[Array, "*rows"], x: Inexact[Array, "*rows D"]) -> Inexact[Array, "*rows D"]:
    """`weight[..., None] * x`, whose gradient with respect to the weights is `inner`."""
    rows = tuple(range(weight.ndim))
    return lax.dot_general(weight, x, (((), ()), (rows, rows)), precision=lax.Precision.HIGHEST)
