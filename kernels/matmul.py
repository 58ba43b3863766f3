"""Products written as XLA's CPU backend computes them, or their gradients, fastest: by weights, in batches, of rows by rows.

The weight gradient of x [B, L, E] times w [E, F] contracts the two axes (B, L). XLA brings a product with two contracted axes
to matrix form by copying the cotangent, together with whatever elementwise function made it (the derivative of a GELU, say),
in transposed order, which on CPU costs several times the product itself. Flattened to [B L, E] first, one axis is contracted
and nothing is copied. The result is the same; other backends do not care.
"""

import functools
import math

import jax
import jax.numpy as jnp
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


PART = 2**15
"""About how many elements of a reduction XLA's CPU backend takes for one part (YNNPACK's `make_split_factors`)."""

LOWEST = float(jnp.finfo(jnp.float32).min)


def batched(axes: str, x: Inexact[Array, "..."], y: Inexact[Array, "..."], dtype) -> Inexact[Array, "*batch M N"]:
    """`jnp.einsum(axes, x, y)` in `dtype`, a batch of products of matrices; on CPU all cores share small ones.

    XLA's CPU backend (jaxlib 0.10.2) parts a large product of matrices among cores, but not a batch of small ones: they run on
    one core, one after the other. A product that is reduced is computed part by part of the reduction, and these go to all
    cores. So small products are reduced, in a way that changes nothing, or, where there are few of them, the summed axis is cut
    in two and both products are added. `python -m benchmarks.small_products` measures what it gives.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    of_x, of_y, out = axes.replace("->", ",").split(",")
    size = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    (k,) = (set(of_x) & set(of_y)) - set(out)
    M, N, total = (math.prod(size[axis] for axis in of) for of in (set(out) - set(of_y), set(out) - set(of_x), out))
    is_small = total > M * N and _is_left_to_one_core(M, N, size[k])
    if jax.default_backend() != "cpu" or dtype != jnp.float32 or not is_small:
        return product(axes, x, y)
    if total > PART:
        return _reduced(product(axes, x, y))
    if 2 * total > PART and size[k] % 2 == 0:
        x, y = (v.reshape(*v.shape[: (at := of.index(k))], 2, -1, *v.shape[at + 1 :]) for v, of in ((x, of_x), (y, of_y)))
        halves = f"{of_x},{of_y}->".replace(k, "Z" + k) + f"{out[:-2]}Z{out[-2:]}"
        return product(halves, x, y).sum(axis=-3)
    return product(axes, x, y)


def _is_left_to_one_core(M: int, N: int, K: int) -> bool:
    """Whether YNNPACK leaves a product of M x K by K x N in one part: about the rule of its `choose_split_factors`."""
    return M * N < 2**17 and (M + N - max(M, N) / 2) * min(K, 1024) < 2**16


@jax.custom_jvp
def _reduced(x: Inexact[Array, "*rows N"]) -> Inexact[Array, "*rows N"]:
    """x, by way of a reduction; differentiated as what it is, the identity.

    Each row is reduced to a number that no other is below, and x is the larger one. YNNPACK's minimum and maximum give their
    second operand where one is NaN (on x86): in this order NaN and infinities stay where they are, and change nothing else.
    Computed by other means, a NaN becomes all of its row.
    """
    floor = jnp.minimum(x, LOWEST).min(axis=-1, keepdims=True)
    return jnp.maximum(floor, x)


@_reduced.defjvp
def _reduced_jvp(primals, tangents):
    return _reduced(*primals), *tangents


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
