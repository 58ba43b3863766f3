"""Products: the library's values and gradients; weight gradients contract one axis, small products are reduced."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kernels.matmul import batched, dot_general, inner, matmul, scaled

# shapes of both operands, contracted axes of both: Dense, DenseGeneral in and out of heads, and two that pass through
CASES = [
    ((2, 3, 4), (4, 5), ((2,), (0,))),
    ((2, 3, 4), (4, 5, 6), ((2,), (0,))),
    ((2, 3, 5, 6), (5, 6, 4), ((2, 3), (0, 1))),
    ((2, 3, 4), (5, 4), ((2,), (1,))),
    ((2, 4, 3), (4, 5), ((1,), (0,))),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "axes"), CASES)
def test_equals_the_library(x_shape, w_shape, axes):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, w_shape))

    def run(product):
        y, pullback = jax.vjp(lambda x, w: product(x, w, (axes, ((), ()))), x, w)
        return y, *pullback(jnp.sin(y))

    for ours, expected in zip(run(dot_general), run(lax.dot_general), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_weight_gradients_contract_one_axis():
    x, w = jnp.ones((2, 3, 4)), jnp.ones((4, 5))

    def contracted(product):
        trace = str(jax.make_jaxpr(jax.grad(lambda w: product(x, w).sum()))(w))
        return re.findall(r"dimension_numbers=\(\(\[([\d, ]+)\]", trace)

    assert contracted(jnp.matmul)[-1] == "0, 1"
    assert contracted(matmul)[-1] == "0"


def test_options_reach_the_product():
    x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    assert matmul(x, w, preferred_element_type=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(1, 5, 2, 3), (4, 3), (3,)])
def test_products_of_rows_equal_multiplications_and_sums(shape):
    with jax.enable_x64(True):
        x, y = (jax.random.normal(key, shape, jnp.float64) for key in jax.random.split(jax.random.key(0)))

        def run(product, *arguments):
            out, pullback = jax.vjp(product, *arguments)
            return out, *pullback(jnp.sin(out))

        for ours, plain, arguments in (
            (inner, lambda x, y: (x * y).sum(axis=-1), (x, y)),
            (scaled, lambda w, x: w[..., None] * x, (x[..., 0], y)),
        ):
            for got, expected in zip(run(ours, *arguments), run(plain, *arguments), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert inner(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


# axes, batch, M, N, K, and how each is computed: as it is, by a reduction of its rows, in two halves of its sum
SMALL = [
    ("bhqd,bhkd->bhqk", (1, 8), 128, 384, 64, "rows"),
    ("bhqk,bhkd->bhqd", (2, 4), 128, 64, 384, "rows"),
    ("bhdq,bhqk->bhdk", (1, 8), 64, 320, 63, "rows"),
    ("bhqk,bhkd->bhqd", (1, 8), 64, 64, 320, "halves"),
    ("bhqk,bhkd->bhqd", (1, 8), 64, 64, 321, "as it is"),  # an odd sum
    ("bhqk,bhkd->bhqd", (1, 2), 64, 64, 320, "as it is"),  # too few
    ("bhqd,bhkd->bhqk", (1, 1), 128, 384, 64, "as it is"),  # no batch
    ("bhqd,bhkd->bhqk", (1, 2), 512, 512, 64, "as it is"),  # large
]


@pytest.mark.parametrize(("axes", "batch", "M", "N", "K", "way"), SMALL)
def test_small_products_equal_the_librarys(axes, batch, M, N, K, way, quick_compile):
    sizes = dict(zip(axes.split("->")[1], (*batch, M, N)))
    x_axes, y_axes = axes.split("->")[0].split(",")
    sizes |= dict.fromkeys(set(x_axes) - set(sizes), K)
    rng = np.random.default_rng(0)
    shapes = [[sizes[axis] for axis in of] for of in (x_axes, y_axes, axes.split("->")[1])]
    x, y, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def run(product, x, y):
        out, pullback = jax.vjp(product, x, y)
        return out, *pullback(cotangent)

    ours = functools.partial(batched, axes, dtype=jnp.float32)
    jitted = jax.jit(run, static_argnums=0)
    for got, expected in zip(jitted(ours, x, y), jitted(functools.partial(jnp.einsum, axes), x, y), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    trace = str(jax.make_jaxpr(ours)(x, y))
    reductions = {"reduce_min": "rows", "reduce_sum": "halves"}
    expected = way if jax.default_backend() == "cpu" else "as it is"
    assert [reductions[name] for name in reductions if name in trace] == [expected] * (expected != "as it is")


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.nan, np.inf], [np.nan, -3e38, np.nan], [3e38]], ids=str)
def test_small_products_keep_nan_and_infinities(values):
    """As XLA's own products have them, and nothing beside them changes."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(9, n, 33)).astype(np.float32) for n in (64, 257))
    for value in values:
        y[:, rng.integers(257), rng.integers(33)] = value
    x[:, 5] = 0
    x[:, 40:] = np.nan if np.nan in values else x[:, 40:]
    ours, library = (functools.partial(f, "bqk,bnk->bqn") for f in (functools.partial(batched, dtype=jnp.float32), jnp.einsum))
    assert jax.default_backend() != "cpu" or "reduce_min" in str(jax.make_jaxpr(ours)(x, y))
    with jax.debug_nans(False):
        np.testing.assert_array_equal(jax.jit(ours)(x, y), jax.jit(library)(x, y))


def test_only_float32_is_reduced():
    x = jnp.ones((8, 128, 64), jnp.bfloat16)
    assert batched("bqd,bkd->bqk", x, x, jnp.float32).dtype == jnp.float32
    with jax.enable_x64(True):
        x = jnp.ones((8, 128, 64), jnp.float64)
        assert "reduce" not in str(jax.make_jaxpr(lambda x: batched("bqd,bkd->bqk", x, x, jnp.float64))(x))
