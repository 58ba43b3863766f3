"""dot_general: the library's values and gradients, and weight gradients that contract one axis."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kernels.matmul import dot_general, inner, matmul, scaled

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
