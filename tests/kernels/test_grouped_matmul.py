"""grouped_matmul against one matrix for each block, looked up: values, gradients, unused blocks, precision, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import grouped_matmul

N, b, K, F, X, USED = 7, 3, 5, 4, 3, 5
GROUP = jnp.array([2, 0, 2, 2, 0, 1, 1], jnp.int32)


def dense(x, w, group, used):
    y = jnp.einsum("nbk,nkf->nbf", x, w[group])
    return jnp.where((jnp.arange(x.shape[0]) < used)[:, None, None], y, 0)


def inputs(dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((N, b, K), (X, K, F), (N, b, F)))


@pytest.mark.parametrize("used", [0, USED, N])
def test_values_and_gradients(used):
    with jax.enable_x64(True):
        x, w, dy = inputs(jnp.float64)

        def both(f):
            y, pullback = jax.vjp(lambda x, w: f(x, w, GROUP, jnp.int32(used)), x, w)
            return y, *pullback(dy)

        for ours, theirs in zip(jax.jit(lambda: both(grouped_matmul))(), both(dense)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_runs_under_vmap():
    x, w, _ = inputs(jnp.float32)
    used = jnp.array([2, USED], jnp.int32)
    y = jax.vmap(grouped_matmul, (None, None, None, 0))(x, w, GROUP, used)
    for row, count in zip(y, used):
        np.testing.assert_allclose(row, dense(x, w, GROUP, count), atol=1e-6)


def test_weight_gradients_are_added_up_in_float32():
    """2,000 blocks of ones: bfloat16 would stop counting at 256."""
    x, w = jnp.ones((2000, 1, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    group = jnp.zeros(2000, jnp.int32)
    dw = jax.grad(lambda w: jnp.sum(grouped_matmul(x, w, group, jnp.int32(2000)).astype(jnp.float32)))(w)
    assert dw.dtype == jnp.bfloat16 and float(dw[0, 0, 0]) == 2000


def test_memory_does_not_grow_with_the_number_of_matrices():
    """`lax.ragged_dot` keeps a copy of the rows for each matrix."""

    def temporaries(num_matrices):
        x, w = jnp.zeros((64, 16, 32)), jnp.zeros((num_matrices, 32, 32))
        group = jnp.zeros(64, jnp.int32)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(grouped_matmul(x, w, group, jnp.int32(64)) ** 2)))
        return gradient.lower(x).compile().memory_analysis().temp_size_in_bytes

    rows = 64 * 16 * 32 * 4
    assert temporaries(16) - temporaries(2) < rows
