"""long_convolution against the definition, its gradients, its float32 error, and the 2-D form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels.convolution import fast_length, long_convolution, separable_convolution


@pytest.fixture
def x64(quick_compile):
    with jax.enable_x64(True):
        yield


def by_definition(u, kernel, ahead=None):
    L = u.shape[1]
    y = np.zeros_like(u)
    for t in range(L):
        for s in range(L):
            lag = t - s
            k, j = (kernel, lag) if lag >= 0 else (ahead, -lag - 1)
            if k is not None and j < k.shape[1]:
                y[:, t] += k[:, j] * u[:, s]
    return y


def arrays(L, K, M, B=2, E=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, L, E)), rng.normal(size=(E, K)), rng.normal(size=(E, M))


# lengths of the input, of the kernel, and of the kernel ahead
CASES = [(1, 1, 1), (2, 2, 2), (13, 13, 13), (16, 5, 3), (9, 20, 31), (7, 7, 1)]


@pytest.mark.parametrize(("L", "K", "M"), CASES)
def test_equals_the_definition(x64, L, K, M):
    u, k, ahead = arrays(L, K, M)
    np.testing.assert_allclose(long_convolution(jnp.asarray(u), jnp.asarray(k)), by_definition(u, k), rtol=0, atol=1e-12)
    both = long_convolution(jnp.asarray(u), jnp.asarray(k), ahead=jnp.asarray(ahead))
    np.testing.assert_allclose(both, by_definition(u, k, ahead), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("L", "K", "M"), [(1, 1, 1), (13, 13, 13), (9, 4, 20)])
def test_gradients_are_finite_differences(x64, L, K, M):
    u, k, ahead = map(jnp.asarray, arrays(L, K, M))

    def as_jax(u, k, ahead):
        return long_convolution(jnp.asarray(u), jnp.asarray(k), ahead=jnp.asarray(ahead))

    check_grads(as_jax, (u, k, ahead), order=1, modes=["rev"])


def test_causal_form_reads_no_future_but_for_rounding():
    """An FFT rounds every output by all inputs: what lies ahead moves the past by eps, not by its value."""
    u, k, _ = (jnp.asarray(x, jnp.float32) for x in arrays(64, 64, 1))
    y, z = long_convolution(u, k), long_convolution(u.at[:, 40:].set(0.0), k)
    np.testing.assert_allclose(y[:, :40], z[:, :40], rtol=0, atol=2e-5)
    assert np.max(np.abs(y[:, 40:] - z[:, 40:])) > 1


@pytest.mark.parametrize("L", [63, 1000])
def test_float32_follows_float64(L):
    """At most twice the error of the direct sum in float32, plus 1e-6 of the output's scale."""
    u, k, _ = arrays(L, L, 1, B=1, E=2)
    exact = np.stack([np.convolve(u[0, :, e], k[e])[:L] for e in range(2)], axis=-1)
    u, k = u.astype(np.float32), k.astype(np.float32)
    exact32 = np.stack([np.convolve(u[0, :, e].astype(float), k[e].astype(float))[:L] for e in range(2)], axis=-1)
    direct = np.stack([np.convolve(u[0, :, e], k[e])[:L] for e in range(2)], axis=-1)
    ours = np.asarray(long_convolution(jnp.asarray(u), jnp.asarray(k)))[0]
    scale = np.max(np.abs(exact))
    assert np.max(np.abs(ours - exact32)) <= 2 * np.max(np.abs(direct - exact32)) + 1e-6 * scale


def test_dtype_is_that_of_the_input_and_shapes_are_checked():
    u, k, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays(8, 8, 8))
    assert long_convolution(u, k).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"kernel \(2, 8\) must be \[E, K\] with the E=3 channels of u \(2, 8, 3\)"):
        long_convolution(u, k[:2])


def test_fast_length():
    assert [fast_length(n) for n in (1, 2, 7, 11, 129, 2048, 4001)] == [2, 2, 8, 12, 144, 2048, 4050]


def test_separable_convolution_is_the_oracle(oracle_dir):
    """scipy's 2-D convolution with an outer product of kernels, causal along both axes."""
    case = np.load(oracle_dir / "s4nd_2d.npz")
    assert json.loads((oracle_dir / "s4nd_2d.json").read_text())["oracle"] == "scipy.signal.convolve2d"
    image = jnp.asarray(case["in.u"])[None, :, :, None]
    rows, columns = (jnp.asarray(case[f"in.k_{axis}"])[None] for axis in ("rows", "cols"))
    y = separable_convolution(image, (rows,), (columns,))
    np.testing.assert_allclose(y[0, :, :, 0], case["out.y"], rtol=0, atol=1e-4)


def test_separable_convolution_is_two_sided_along_both_axes(x64):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 4, 5, 1))
    rows, columns = ([rng.normal(size=(1, n)) for _ in range(2)] for n in (4, 5))

    def toeplitz(kernels, n):
        """The matrix of one axis: entry [t, s] weighs s in t."""
        return by_definition(np.eye(n)[:, :, None], *kernels)[:, :, 0].T

    expected = toeplitz(rows, 4) @ image[0, :, :, 0] @ toeplitz(columns, 5).T
    ours = separable_convolution(jnp.asarray(image), tuple(map(jnp.asarray, rows)), tuple(map(jnp.asarray, columns)))
    np.testing.assert_allclose(ours[0, :, :, 0], expected, rtol=0, atol=1e-12)
