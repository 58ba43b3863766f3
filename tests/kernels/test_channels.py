"""spread: a broadcast whose gradient is a sum over everything but the parameter's own axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.channels import spread


@pytest.mark.parametrize("own", [(3,), (2, 3), ()])
def test_value_and_gradient_are_those_of_a_broadcast(own):
    with jax.enable_x64(True):
        shape = (4, 5, *own)
        w, x = jax.random.normal(jax.random.key(0), own, jnp.float64), jax.random.normal(jax.random.key(1), shape, jnp.float64)
        np.testing.assert_array_equal(spread(w, shape), np.broadcast_to(w, shape))
        gradient = jax.grad(lambda w: jnp.sum(jnp.sin(spread(w, shape) * x)))(w)
        expected = (jnp.cos(np.broadcast_to(w, shape) * x) * x).sum(axis=(0, 1))
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_the_gradient_of_bfloat16_is_summed_in_float32():
    w = jnp.ones(2, jnp.bfloat16)
    gradient = jax.grad(lambda w: jnp.sum(spread(w, (1000, 2)).astype(jnp.float32)))(w)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, 1000)  # one by one, bfloat16 would stop at 256
