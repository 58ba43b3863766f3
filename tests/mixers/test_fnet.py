"""FNet: the transform by its matrices of cosines and sines, its inverse, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build

pytestmark = pytest.mark.usefixtures("quick_compile")


def by_matrices(x: np.ndarray) -> np.ndarray:
    """Re(W_L x W_E) with W_N[n, k] = exp(-2 pi i n k / N)."""

    def matrix(size):
        return np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)

    return (matrix(x.shape[1]) @ x @ matrix(x.shape[2])).real


@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 2, 4), (2, 17, 6), (1, 24, 8)])
def test_is_the_real_part_of_two_transforms(shape):
    x = np.random.default_rng(sum(shape)).normal(size=shape)
    with jax.enable_x64(True):
        mixer = build(dict(name="fnet"), dtype=jnp.float64)
        y = jax.jit(lambda x: mixer.apply({}, x, Context()))(jnp.asarray(x))
    np.testing.assert_allclose(y, by_matrices(x), rtol=0, atol=1e-10)


def test_gradient_is_the_transform_of_the_cotangent():
    """The map is real, linear and symmetric."""
    x, g = np.random.default_rng(0).normal(size=(2, 1, 9, 4))
    with jax.enable_x64(True):
        mixer = build(dict(name="fnet"), dtype=jnp.float64)
        _, pullback = jax.vjp(lambda x: mixer.apply({}, x, Context()), jnp.asarray(x))
        (dx,) = pullback(jnp.asarray(g))
    np.testing.assert_allclose(dx, by_matrices(g), rtol=0, atol=1e-10)


def test_padding_counts_as_zeros():
    x = np.random.default_rng(1).normal(size=(2, 12, 4)).astype(np.float32)
    mask = np.arange(12)[None] < np.array([[12], [7]])
    y = build(dict(name="fnet")).apply({}, jnp.asarray(x), Context(mask=jnp.asarray(mask)))
    np.testing.assert_allclose(y, by_matrices(np.where(mask[..., None], x, 0)), rtol=0, atol=1e-4)


def test_what_it_refuses():
    x = jnp.zeros((1, 4, 4))
    with pytest.raises(ConfigError, match="no causal form"):
        build(dict(name="fnet", causal=True))
    with pytest.raises(ValueError, match="does not decode"):
        build(dict(name="fnet")).apply({}, x, Context(decode=True))
    with pytest.raises(ValueError, match="packed documents"):
        build(dict(name="fnet")).apply({}, x, Context(segment_ids=jnp.zeros((1, 4), jnp.int32)))
