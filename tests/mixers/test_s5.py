"""S5 against its own equations, and the matrices it starts from against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context
from efficient_attn.mixers.s5 import C_INITIALISERS, S5
from efficient_attn.mixers.ssm.activations import ACTIVATIONS
from efficient_attn.mixers.ssm.discretise import zoh
from efficient_attn.mixers.ssm.hippo import block_diagonal_legs_n, diagonalised_legs_n, legs

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_hippo_legs_closed_form():
    expected = [[-1, 0, 0], [-np.sqrt(3), -2, 0], [-np.sqrt(5), -np.sqrt(15), -3]]
    np.testing.assert_allclose(legs(3)[0], expected, rtol=1e-12)


def test_legs_n_eigendecomposition():
    eigenvalues, V = diagonalised_legs_n(8)
    p = np.sqrt(np.arange(8) + 0.5)
    np.testing.assert_allclose(V @ np.diag(eigenvalues) @ V.conj().T, legs(8)[0] + np.outer(p, p), atol=1e-10)
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-12)
    np.testing.assert_allclose(np.sort(eigenvalues.imag), np.sort(-eigenvalues.imag), atol=1e-10)


def test_blocks_keep_one_of_each_conjugate_pair():
    eigenvalues, V = block_diagonal_legs_n(12, 3, conjugate_pairs=True)
    assert eigenvalues.shape == (6,) and V.shape == (12, 6)
    half = diagonalised_legs_n(4)[0][:2]
    np.testing.assert_allclose(eigenvalues, np.tile(half, 3))
    np.testing.assert_allclose(V.conj().T @ V, np.eye(6), atol=1e-12)
    with pytest.raises(ValueError, match="state_dim=12 must split into blocks=4 blocks of equal even size"):
        block_diagonal_legs_n(12, 4, conjugate_pairs=True)


def test_zero_order_hold_is_the_exact_integral():
    """exp of the block matrix [[A, B], [0, 0]] holds both A_bar and B_bar."""
    rng = np.random.default_rng(0)
    Lambda, B, Delta = -rng.uniform(0.1, 1, 3) + 1j * rng.normal(size=3), rng.normal(size=(3, 2)) + 0j, rng.uniform(0.01, 1, 3)
    with jax.enable_x64(True):
        log_A_bar, gain = zoh(jnp.asarray(Lambda), jnp.asarray(Delta))
        A_bar, B_bar = jnp.exp(log_A_bar), gain[:, None] * B
    for i in range(3):
        block = np.zeros((3, 3), complex)
        block[0] = [Lambda[i] * Delta[i], *(B[i] * Delta[i])]
        exact = scipy.linalg.expm(block)
        np.testing.assert_allclose(A_bar[i], exact[0, 0], rtol=1e-10)
        np.testing.assert_allclose(B_bar[i], exact[0, 1:], rtol=1e-10)


def by_hand(parameters, x, causal: bool):
    """The recurrence of eq. (7) in float64 NumPy, a position at a time; both directions unless `causal`."""
    p = {k: np.asarray(v, np.float64) for k, v in parameters.items() if k != "gate"}
    Lambda, step = p["Lambda_re"] + 1j * p["Lambda_im"], np.exp(p["log_step"])
    B, C = p["B"][..., 0] + 1j * p["B"][..., 1], p["C"][..., 0] + 1j * p["C"][..., 1]
    A_bar = np.exp(Lambda * step)
    B_bar = ((A_bar - 1) / Lambda)[:, None] * B

    def run(u):
        state, states = np.zeros_like(Lambda), []
        for u_t in u:
            state = A_bar * state + B_bar @ u_t
            states.append(state)
        return np.stack(states)

    outputs = []
    for u in np.asarray(x, np.float64):
        states = run(u) if causal else np.concatenate([run(u), run(u[::-1])[::-1]], axis=-1)
        outputs.append(2 * (states @ C.T).real + p["D"] * u)
    return np.stack(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("C_init", C_INITIALISERS)
def test_layer_equals_the_recurrence(causal, C_init):
    module = S5(state_dim=12, blocks=3, causal=causal, C_init=C_init, activation="gelu")
    x = jax.random.normal(jax.random.key(0), (2, 33, 6))
    variables = module.init(jax.random.key(1), x, Context())
    y = module.apply(variables, x, Context())
    expected = jax.nn.gelu(jnp.asarray(by_hand(variables["params"], x, causal), jnp.float32))
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_published_initial_scales():
    """B is V^-1 times a LeCun normal of fan-in n; steps are log-uniform; D is standard normal."""
    p = S5(state_dim=64, blocks=4).init(jax.random.key(0), jnp.zeros((1, 4, 256)), Context())["params"]
    assert p["B"].shape == (32, 256, 2) and p["C"].shape == (256, 64, 2)
    np.testing.assert_allclose(np.mean(np.sum(p["B"] ** 2, axis=-1)), 1 / 64, rtol=0.1)
    np.testing.assert_allclose(np.std(p["D"]), 1.0, rtol=0.2)
    steps = np.exp(p["log_step"])
    assert 0.001 <= steps.min() < 0.004 and 0.025 < steps.max() <= 0.1
    # LeCun normal of a [E, n, 2] array has fan-in n * E, as in the released code; the row-wise one has fan-in n
    np.testing.assert_allclose(np.mean(np.sum(p["C"] ** 2, axis=-1)), 2 / (64 * 256), rtol=0.1)
    rows = S5(state_dim=64, blocks=4, C_init="trunc_standard_normal").init(jax.random.key(0), jnp.zeros((1, 4, 256)), Context())
    np.testing.assert_allclose(np.mean(np.sum(rows["params"]["C"] ** 2, axis=-1)), 2 / 64, rtol=0.1)


def test_clipped_eigenvalues_cannot_grow():
    module = S5(state_dim=8, clip_eigs=True, activation="gelu", causal=True)
    x = jnp.ones((1, 2000, 4))
    variables = module.init(jax.random.key(0), x, Context())
    variables["params"]["Lambda_re"] = jnp.full(4, 5.0)
    assert np.all(np.isfinite(module.apply(variables, x, Context())))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_drops_whole_channels_only_in_training(activation):
    module = S5(state_dim=8, activation=activation, dropout=0.5)
    x = 0.1 * jax.random.normal(jax.random.key(0), (3, 9, 64))  # a GELU of much below zero is exactly zero
    variables = module.init(jax.random.key(1), x, Context())
    y = module.apply(variables, x, Context(train=True), rngs={"dropout": jax.random.key(2)})
    dropped = np.all(np.asarray(y) == 0, axis=1)
    assert 0.3 < dropped.mean() < 0.9
    assert not np.any(np.asarray(y)[~np.broadcast_to(dropped[:, None], y.shape)] == 0)
    assert not np.any(module.apply(variables, x, Context()) == 0)


def test_unknown_initialiser_is_named():
    with pytest.raises(ConfigError, match=r"model.mixer.C_init='zeros' is unknown"):
        S5(state_dim=8, C_init="zeros").init(jax.random.key(0), jnp.zeros((1, 4, 4)), Context())
