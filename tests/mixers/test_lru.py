"""LRU against its recurrence, and its initial values against the paper's lemmas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.mixers import Context
from efficient_attn.mixers.lru import LRU, ring

pytestmark = pytest.mark.usefixtures("quick_compile")


def by_hand(p, x, causal):
    """Both directions of x_k = Lambda x_{k-1} + gamma B u_k in float64, y = Re(C x) + D u."""
    p = {k: np.asarray(v, np.float64) for k, v in p.items()}
    Lambda = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    B, C = (p[k] @ np.array([1, 1j]) for k in ("B", "C"))
    B = np.exp(p["gamma_log"])[:, None] * B

    def run(u):
        state, states = np.zeros_like(Lambda), []
        for u_k in u:
            state = Lambda * state + B @ u_k
            states.append(state)
        return np.stack(states)

    outputs = []
    for u in np.asarray(x, np.float64):
        states = run(u) if causal else np.concatenate([run(u), run(u[::-1])[::-1]], axis=-1)
        outputs.append((states @ C.T).real + p["D"] * u)
    return np.stack(outputs)


@pytest.mark.parametrize("causal", [True, False])
def test_layer_equals_the_recurrence(causal):
    module = LRU(state_dim=6, causal=causal, activation="gelu")
    x = jax.random.normal(jax.random.key(0), (2, 21, 4))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    expected = jax.nn.gelu(jnp.asarray(by_hand(variables["params"], x, causal), jnp.float32))
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x, Context()), expected, rtol=0, atol=2e-5)


def test_initial_values_lie_on_the_ring():
    """Uniform over the ring's area, so squared radii are uniform; phases uniform; gamma = sqrt(1 - |Lambda|^2)."""
    module = LRU(state_dim=4000, r_min=0.5, r_max=0.9, max_phase=1.0)
    p = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, 3)), Context())["params"]
    radius, phase = np.exp(-np.exp(p["nu_log"])), np.exp(p["theta_log"])
    assert radius.min() >= 0.5 and radius.max() <= 0.9 and phase.min() > 0 and phase.max() <= 1.0
    quarters = np.quantile(radius**2, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quarters, 0.25 + 0.56 * np.array([0.25, 0.5, 0.75]), atol=0.02)
    np.testing.assert_allclose(np.quantile(phase, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    np.testing.assert_allclose(np.exp(p["gamma_log"]), np.sqrt(1 - radius**2), rtol=1e-4)
    assert p["B"].shape == (4000, 3, 2) and p["C"].shape == (3, 8000, 2)
    np.testing.assert_allclose(np.mean(np.sum(p["B"] ** 2, axis=-1)), 1 / 3, rtol=0.05)
    np.testing.assert_allclose(np.mean(np.sum(p["C"] ** 2, axis=-1)), 2 / 4000, rtol=0.05)


def test_a_full_disc_has_finite_parameters():
    """r_min = 0 and r_max = 1 touch both ends of the logarithms."""
    assert np.all(np.isfinite(ring(jax.random.key(0), (10_000,), 0.0, 1.0)))


def test_normalised_states_of_white_noise_have_the_inputs_variance():
    """Equation 7, at slow and at fast decay alike."""
    module = LRU(state_dim=512, causal=True, r_min=0.9, r_max=0.99)
    u = jax.random.normal(jax.random.key(0), (4, 1500, 1))
    variables = jax.jit(module.init)(jax.random.key(1), u, Context())
    p = variables["params"]
    Lambda = jnp.exp(jax.lax.complex(-jnp.exp(p["nu_log"]), jnp.exp(p["theta_log"])))
    drive = (jnp.exp(p["gamma_log"])[None, None] * u).astype(jnp.complex64)
    states = module.apply(variables, Lambda, drive, Context(), method="states")[:, 500:]
    np.testing.assert_allclose(np.mean(np.abs(states) ** 2), 1.0, rtol=0.1)


def test_ring_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"r_min=0.9, r_max=0.5, max_phase=6.28 must satisfy 0 <= r_min < r_max <= 1"):
        LRU(r_min=0.9, r_max=0.5).init(jax.random.key(0), jnp.zeros((1, 2, 3)), Context())
