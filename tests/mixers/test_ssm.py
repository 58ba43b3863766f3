"""State-space mathematics: HiPPO, discretisation, kernels, and scan = recurrence = convolution for both structured systems."""

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from efficient_attn.mixers.s4d import INITS
from efficient_attn.mixers.ssm import hippo
from efficient_attn.mixers.ssm.discretise import DISCRETISATIONS, dense_bilinear, dense_zoh
from efficient_attn.mixers.ssm.features import CHUNK, convolve, recur, recur_documents
from efficient_attn.mixers.ssm.kernels import cauchy, kernel, recurrence, vandermonde
from efficient_attn.mixers.ssm.systems import Diagonal, LowRank
from kernels.convolution import long_convolution


@pytest.fixture
def x64(quick_compile):
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    """The arrays of s4d_hippo by their names without the prefix in. or out., and its `hyper`-parameters."""
    arrays = np.load(oracle_dir / "s4d_hippo.npz")
    hyper = json.loads((oracle_dir / "s4d_hippo.json").read_text())["hyper"]
    return SimpleNamespace(hyper=hyper, **{name.split(".", 1)[1]: arrays[name].astype(np.float64) for name in arrays})


def system(name, *, E=3, N=8, low=1e-3, high=1e-1, seed=0) -> Diagonal | LowRank:
    """A system of `E` channels that starts from HiPPO-LegS, steps between `low` and `high`; float64 under x64."""
    rng = np.random.default_rng(seed)
    Lambda, P, B, _ = hippo.dplr("legs", N)
    C = rng.normal(size=(E, N // 2)) + 1j * rng.normal(size=(E, N // 2))
    Delta = np.geomspace(low, high, E)
    Lambda, P, B = (jnp.asarray(np.tile(v, (E, 1))) for v in (Lambda, P[0], B))
    if name == "low_rank":
        return LowRank(Lambda, P, B, jnp.asarray(C), jnp.asarray(Delta))
    log_A, gain = DISCRETISATIONS[name](Lambda, jnp.broadcast_to(jnp.asarray(Delta)[:, None], Lambda.shape))
    return Diagonal(log_A, gain * B, 2 * jnp.asarray(C))


SYSTEMS = ["zoh", "bilinear", "low_rank"]
STRUCTURES = ["zoh", "low_rank"]


# HiPPO


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_hippo_matrices(measure):
    """A + P^T P is normal with equal real parts, and the memory of a constant is its coefficient: A e_0 = -B."""
    A, B, P = hippo.MEASURES[measure](8)
    normal = A + P.T @ P
    symmetric = (normal + normal.T) / 2
    np.testing.assert_allclose(symmetric, symmetric[0, 0] * np.eye(8), atol=1e-12)
    np.testing.assert_allclose(A[:, 0], -B, atol=1e-12)
    assert np.all(np.linalg.eigvals(A).real < 1e-9)


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_dplr_is_unitarily_equivalent(measure):
    A, B, _ = hippo.MEASURES[measure](8)
    Lambda, P, B_tilde, V = hippo.dplr(measure, 8)
    whole = 2 * (V @ np.diag(Lambda) @ V.conj().T).real - sum(np.outer(p, p) for p in 2 * (V @ P.T).real.T)
    np.testing.assert_allclose(whole, A, atol=1e-10)
    np.testing.assert_allclose(2 * (V @ B_tilde).real, B, atol=1e-10)
    assert np.all(Lambda.imag <= 1e-12)


def test_hippo_oracle(oracle):
    A, B, P = hippo.legs(oracle.hyper["legs_N"])
    np.testing.assert_allclose(A, oracle.hippo_legs_A, atol=1e-4)
    np.testing.assert_allclose(B, oracle.hippo_legs_B, atol=1e-4)
    np.testing.assert_allclose(P[0], oracle.nplr_P, atol=1e-4)
    np.testing.assert_allclose(A + P.T @ P, oracle.nplr_normal_part, atol=1e-4)
    Lambda = hippo.diagonalised_legs_n(oracle.hyper["legs_N"])[0]
    np.testing.assert_allclose(np.sort(Lambda.imag), oracle.nplr_eigs_imag_sorted, atol=1e-4)


def test_scaled_legs_compresses_a_signal_as_the_oracle_does(x64, oracle):
    """c_k = (I - A/2k)^-1 ((I + A/2k) c_{k-1} + B/k f_k): the bilinear transform with step 1/k."""
    n = len(oracle.hippo_legs_coeffs16)
    A, B, _ = (jnp.asarray(m) for m in hippo.legs(n))
    c = jnp.zeros(n)

    @jax.jit
    def step(c, k, f):
        A_bar, B_bar = dense_bilinear(A, B, 1 / k)
        return A_bar @ c + B_bar * f

    for k, f in enumerate(oracle.hippo_signal, start=1):
        c = step(c, k, f)
    np.testing.assert_allclose(c, oracle.hippo_legs_coeffs16, atol=1e-4)


# Dense systems


DENSE = {
    "zoh": dense_zoh,
    "bilinear": dense_bilinear,
    "euler": lambda A, B, dt: dense_bilinear(A, B, dt, alpha=0.0),
    "backward_diff": lambda A, B, dt: dense_bilinear(A, B, dt, alpha=1.0),
}


@pytest.mark.parametrize("method", DENSE)
def test_dense_oracle(x64, oracle, method):
    """scipy's cont2discrete, its kernel and its simulation, by kernel, recurrence and convolution."""
    A, B, _ = (jnp.asarray(m) for m in hippo.legs(oracle.hyper["legs_N"]))
    A_bar, B_bar = DENSE[method](A, B, oracle.hyper["dt"])
    expected = {key: getattr(oracle, f"legs_{method}.{key}") for key in ("Ad", "Bd", "kernel", "y")}
    np.testing.assert_allclose(A_bar, expected["Ad"], atol=1e-4)
    np.testing.assert_allclose(B_bar, expected["Bd"], atol=1e-4)
    C, u = jnp.asarray(oracle.C_legs), jnp.asarray(oracle.u)
    K = kernel(A_bar, B_bar, C, oracle.hyper["L"])
    np.testing.assert_allclose(K, expected["kernel"], atol=1e-4)
    np.testing.assert_allclose(recurrence(A_bar, B_bar, C, u), expected["y"], atol=1e-4)
    y = long_convolution(u[None, :, None], K[None])[0, :, 0]
    np.testing.assert_allclose(y, expected["y"], atol=1e-4)


@pytest.mark.parametrize("method", DISCRETISATIONS)
def test_diagonal_discretisation_is_scipys(x64, method):
    Lambda = np.array([-0.5 + 3j, -2.0 + 0j, -0.5 - 40j])
    Delta = np.array([0.1, 0.03, 0.02])
    log_A, gain = DISCRETISATIONS[method](jnp.asarray(Lambda), jnp.asarray(Delta))
    for i, dt in enumerate(Delta):
        A_bar, B_bar, *_ = scipy.signal.cont2discrete((Lambda[i : i + 1, None], np.ones((1, 1)), np.ones((1, 1)), 0), dt, method)
        np.testing.assert_allclose(jnp.exp(log_A[i]), A_bar[0, 0], rtol=1e-12)
        np.testing.assert_allclose(gain[i], B_bar[0, 0], rtol=1e-12)


def test_bilinear_survives_an_exact_zero():
    """z = -2 gives A_bar = 0, which has no logarithm; its powers are still 1, 0, 0, ... and gradients are finite."""
    log_A, _ = DISCRETISATIONS["bilinear"](jnp.array([-2.0 + 0j]), jnp.ones(1))
    np.testing.assert_allclose(vandermonde(jnp.ones((1, 1), complex), log_A[None], 4)[0], [1, 0, 0, 0], atol=1e-6)

    def total(re):
        log_A, gain = DISCRETISATIONS["bilinear"](jax.lax.complex(re, jnp.zeros(1)), jnp.ones(1))
        return jnp.sum(vandermonde(gain[None], log_A[None], 4))

    assert np.all(np.isfinite(jax.grad(total)(jnp.array([-2.0]))))


# Structured kernels


@pytest.mark.parametrize("length", [1, 2, 63, 65, 1000])
def test_vandermonde_is_the_sum(x64, length):
    rng = np.random.default_rng(0)
    c, log_A = (rng.normal(size=(2, 5)) + 1j * rng.normal(size=(2, 5)) for _ in range(2))
    log_A = -np.abs(log_A.real) * 0.01 + 1j * log_A.imag
    expected = np.einsum("en,enl->el", c, np.exp(log_A[..., None] * np.arange(length))).real
    np.testing.assert_allclose(vandermonde(jnp.asarray(c), jnp.asarray(log_A), length), expected, rtol=0, atol=1e-10)


def test_cauchy_is_the_sum_with_its_gradients(x64):
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4)))
    x = jnp.asarray(-rng.uniform(size=(3, 4)) + 1j * rng.normal(size=(3, 4)))
    theta = jnp.linspace(0, jnp.pi, 9)
    s, c = jnp.sin(theta / 2), jnp.cos(theta / 2)
    g = jnp.asarray(rng.normal(size=(2, 3, 9)) + 1j * rng.normal(size=(2, 3, 9)))

    def by_definition(v, x, s, c):
        return jnp.sum(v[..., None] / (1j * s[None, None] - c[None, None] * x[..., None])[None], axis=2)

    def value_and_pullback(f):
        y, pullback = jax.vjp(lambda v, x: f(v, x, s, c), v, x)
        return y, *pullback(g)

    for ours, expected in zip(value_and_pullback(cauchy), value_and_pullback(by_definition), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["lin", "inv", "real"])
@pytest.mark.parametrize("method", DISCRETISATIONS)
def test_s4d_oracle(oracle, name, method):
    Lambda, B = INITS[name](2 * oracle.hyper["s4d_half_state"])
    np.testing.assert_allclose(Lambda.real, getattr(oracle, f"s4d_{name}.A_re"), atol=1e-4)
    np.testing.assert_allclose(Lambda.imag, getattr(oracle, f"s4d_{name}.A_im"), atol=1e-4)
    H = oracle.hyper["s4d_H"]
    Lambda, B = (jnp.asarray(np.tile(v, (H, 1)), jnp.complex64) for v in (Lambda, B))
    Delta = jnp.broadcast_to(jnp.asarray(oracle.dt, jnp.float32)[:, None], Lambda.shape)
    C = jnp.asarray(oracle.C_re + 1j * oracle.C_im, jnp.complex64)
    u = jnp.asarray(oracle.U.swapaxes(1, 2), jnp.float32)

    @jax.jit
    def all_forms(Lambda, B, Delta, C, u):
        log_A, gain = DISCRETISATIONS[method](Lambda, Delta)
        diagonal = Diagonal(log_A, gain * B, 2 * C)
        by_recurrence, _ = recur(diagonal, u, diagonal.zero_state(len(u)))
        return diagonal.kernel(oracle.hyper["L"]), convolve((diagonal,), u), by_recurrence

    K, by_convolution, by_recurrence = all_forms(Lambda, B, Delta, C, u)
    np.testing.assert_allclose(K, getattr(oracle, f"s4d_{name}.{method}.kernel"), atol=1e-4)
    expected = getattr(oracle, f"s4d_{name}.{method}.y").swapaxes(1, 2) - oracle.D * oracle.U.swapaxes(1, 2)
    np.testing.assert_allclose(by_convolution, expected, atol=1e-4)
    np.testing.assert_allclose(by_recurrence, expected, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_dplr_kernel_is_the_dense_one(x64, length):
    """The whole of S4's algorithm (C~, Cauchy, Woodbury, inverse FFT) against powers of the dense bilinear HiPPO-LegS."""
    low_rank = system("low_rank")
    A, B, _ = hippo.legs(8)
    V = hippo.dplr("legs", 8)[3]
    K = jax.jit(lambda value: value.kernel(length))(low_rank)
    for e in range(3):
        A_bar, B_bar = dense_bilinear(jnp.asarray(A), jnp.asarray(B), low_rank.Delta[e])
        C = 2 * (np.asarray(low_rank.C[e]) @ V.conj().T).real
        np.testing.assert_allclose(K[e], kernel(A_bar, B_bar, jnp.asarray(C), length), rtol=0, atol=1e-10)


def test_dplr_kernel_is_the_oracle(oracle):
    """scipy's bilinear HiPPO-LegS, in float32."""
    Lambda, P, B, V = hippo.dplr("legs", oracle.hyper["legs_N"])
    C = oracle.C_legs @ V
    values = [jnp.asarray(v[None], jnp.complex64) for v in (Lambda, P[0], B, C)]
    K = LowRank(*values, jnp.full(1, oracle.hyper["dt"], jnp.float32)).kernel(oracle.hyper["L"])
    np.testing.assert_allclose(K[0], getattr(oracle, "legs_bilinear.kernel"), atol=1e-4)


# Scan = recurrence = convolution


def value_and_gradients(form, value, u, g):
    def loss(value, u):
        y = form(value, u)
        return jnp.sum(y * g), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(value, u)


@pytest.mark.parametrize(("length", "chunk_boundary"), [(1, 0), (2, 0), (CHUNK - 1, 0), (CHUNK + 1, 1), (1000, 15), (16384, 256)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_recurrence_is_convolution(x64, name, length, chunk_boundary):
    """Values and all gradients, over none, one and many chunks."""
    assert length // CHUNK == chunk_boundary
    value = system(name, E=2)
    rng = np.random.default_rng(0)
    u, g = (jnp.asarray(rng.normal(size=(1, length, 2))) for _ in range(2))
    one = value_and_gradients(lambda s, u: convolve((s,), u), value, u, g)
    other = value_and_gradients(lambda s, u: recur(s, u, s.zero_state(1))[0], value, u, g)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(a))))
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", STRUCTURES)
def test_documents_equal_separate_convolutions(x64, name):
    """Both directions; documents of one token, and longer than a chunk."""
    systems = (system(name, seed=0), system(name, seed=1))
    u = jnp.asarray(np.random.default_rng(0).normal(size=(1, 80, 3)))
    bounds = [0, 1, 70, 80]
    starts = jnp.isin(jnp.arange(80), jnp.array(bounds))[None]
    for used in (systems[:1], systems):
        packed = jax.jit(recur_documents)(used, u, starts)
        for a, b in itertools.pairwise(bounds):
            np.testing.assert_allclose(packed[:, a:b], jax.jit(convolve)(used, u[:, a:b]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SYSTEMS)
def test_float32_follows_float64(name):
    """|error| / max |K| <= 4 eps (1 + l_max |Im Lambda| Delta) for the decay e^(-l Delta / 2): what rounding Lambda Delta costs.

    l_max = min(L, 2 / Delta) steps carry the kernel. S4 adds what cancels in C~ = C (I - A_bar^L): eps / (1 - e^(-L Delta / 2)).
    """
    eps, N, L = 1.2e-7, 32, 1024
    kernel_of = jax.jit(lambda value: value.kernel(L))
    with jax.enable_x64(True):
        exact = system(name, N=N, low=1e-4, high=1e-1)
        K = np.asarray(kernel_of(exact))
    narrow = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.complex64 if np.iscomplexobj(v) else jnp.float32), exact)
    K32 = np.asarray(kernel_of(narrow))
    assert K32.dtype == np.float32
    fastest = np.max(np.abs(hippo.dplr("legs", N)[0].imag))
    for e, Delta in enumerate(np.geomspace(1e-4, 1e-1, 3)):
        carried = min(L, 2 / Delta)
        bound = 4 * eps * (1 + carried * fastest * Delta)
        if name == "low_rank":
            bound += 20 * eps / -np.expm1(-L * Delta / 2)
        error = np.max(np.abs(K32[e] - K[e])) / np.max(np.abs(K[e]))
        assert error <= bound, (Delta, error, bound)


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_nan_for_steps_over_twelve_orders_of_magnitude(quick_compile, name):
    def total(log_step):
        Lambda, P, B, _ = (jnp.asarray(np.atleast_2d(v), jnp.complex64) for v in hippo.dplr("legs", 16)[:4])
        Delta = jnp.exp(log_step)
        Lambda, P, B = (jnp.tile(v, (13, 1)) for v in (Lambda, P, B))
        if name == "low_rank":
            value = LowRank(Lambda, P, B, B, Delta)
        else:
            log_A, gain = DISCRETISATIONS[name](Lambda, jnp.broadcast_to(Delta[:, None], Lambda.shape))
            value = Diagonal(log_A, gain * B, B)
        u = jnp.ones((1, 100, 13))
        y = convolve((value,), u)
        return jnp.sum(y**2) + jnp.sum(recur(value, u, value.zero_state(1))[0] ** 2), y

    (_, y), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.log(10.0) * jnp.arange(-9.0, 4.0))
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(gradient))
    assert np.all(np.abs(y[0, -1]) > 0)
