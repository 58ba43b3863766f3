"""Random feature attention: its features as estimates, its gate against the recurrence, and what both tend to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.linear_attention import kernel_attention
from efficient_attn.mixers.performer import independent, positive_features, softmax_exponents
from efficient_attn.mixers.rfa import fourier_features, normalised

DRAWS = 12_000


pytestmark = pytest.mark.usefixtures("quick_compile")


def samples(one) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), DRAWS)), np.float64)


def product(W, x, y):
    """phi(x) . phi(y) of two vectors [D] by W [M, D]."""
    phi = [fourier_features(z[None, None, None], W[None]) for z in (x, y)]
    return jnp.sum(phi[0] * phi[1])


def test_features_are_unbiased():
    """E phi(x) . phi(y) = exp(-|sigma (x - y)|^2 / 2), sigma one number for each channel."""
    x, y, sigma = (jax.random.normal(key, (6,)) for key in jax.random.split(jax.random.key(1), 3))
    x, y = (normalised(z[None, None, None])[0, 0, 0] for z in (x, y))
    estimates = samples(lambda key: product(sigma[None] * independent(key, 16, 6), x, y))
    exact = float(jnp.exp(-jnp.sum((sigma * (x - y)) ** 2) / 2))
    assert 0.05 < exact < 0.95
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / DRAWS**0.5


def test_positive_features_vary_less_where_the_kernel_is_small_and_more_where_it_is_large():
    """The published order (Choromanski et al. 2021, lemma 2 and figure 2) of two estimates of exp(x . y)."""
    x = jnp.array([1.0, -0.5, 0.8, 0.3])
    scale = len(x) ** 0.25  # which softmax_exponents takes out

    def positive(W, x, y):
        phi = [positive_features(softmax_exponents(scale * z[None, None, None], W), jnp.zeros((1, 1, 1, 1)), 0.0) for z in (x, y)]
        return jnp.sum(phi[0] * phi[1])

    def trigonometric(W, x, y):
        return jnp.exp((jnp.sum(x**2) + jnp.sum(y**2)) / 2) * product(W, x, y)

    errors = {}
    for name, y in (("small", -x), ("large", x)):
        exact = float(jnp.exp(x @ y))
        for estimate in (positive, trigonometric):
            drawn = samples(lambda key, estimate=estimate, y=y: estimate(independent(key, 16, 4), x, y))
            assert abs(drawn.mean() - exact) < 4 * drawn.std() / DRAWS**0.5 + 1e-5
            errors[name, estimate] = np.mean((drawn - exact) ** 2)
    assert errors["small", positive] < 0.2 * errors["small", trigonometric]
    assert errors["large", trigonometric] < 0.2 * errors["large", positive]


def recurrence(phi_q, phi_k, v, g, mask):
    """Equation 7, token by token, on [L, H, ...]."""

    def step(carry, at_t):
        (S, z), (phi_q, phi_k, v, g, is_real) = carry, at_t
        new_S = g[:, None, None] * S + (1 - g)[:, None, None] * phi_k[:, :, None] * v[:, None, :]
        new_z = g[:, None] * z + (1 - g)[:, None] * phi_k
        S, z = jnp.where(is_real, new_S, S), jnp.where(is_real, new_z, z)
        return (S, z), jnp.einsum("hm,hmp->hp", phi_q, S) / jnp.einsum("hm,hm->h", phi_q, z)[:, None]

    start = (jnp.zeros((*phi_k.shape[1:], v.shape[-1])), jnp.zeros(phi_k.shape[1:]))
    return jax.lax.scan(step, start, (phi_q, phi_k, v, g, mask))[1]


def operands(length=70, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, length, 3, 4), dtype) for key in keys[:3])
    W = jax.random.normal(keys[3], (3, 32, 4), dtype)
    return q, k, v, W


def test_gate_equals_the_recurrence_with_all_gradients():
    """The third head's gate is nearly shut and nearly open in turn; some tokens are padding."""
    with jax.enable_x64(True):
        q, k, v, W = operands()
        gate = jnp.sin(jnp.arange(70.0))[None, :, None] * jnp.array([1.0, 5.0, 30.0])[None, None] + jnp.zeros((2, 70, 3))
        mask = jnp.ones((2, 70), bool).at[1, 3:5].set(False).at[1, 60:].set(False)

        def features(q, k):
            return fourier_features(normalised(q), W), fourier_features(normalised(k), W)

        def linear(q, k, v, gate):
            out, _ = kernel_attention(*features(q, k), v, causal=True, mask=mask, forgetting=jax.nn.softplus(-gate))
            return out

        def expected(q, k, v, gate):
            return jax.vmap(recurrence)(*features(q, k), v, jax.nn.sigmoid(gate), mask)

        g = jax.random.normal(jax.random.key(5), v.shape, v.dtype)
        out, vjp = jax.vjp(jax.jit(linear), q, k, v, gate)
        due, due_vjp = jax.vjp(jax.jit(expected), q, k, v, gate)
        np.testing.assert_allclose(out, due, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(vjp(g), due_vjp(g), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10 * float(jnp.max(jnp.abs(theirs))))
        low = [x.astype(jnp.float32) for x in (q, k, v, gate)]
        error, dense_error = (float(jnp.max(jnp.abs(f(*low) - due))) for f in (jax.jit(linear), jax.jit(expected)))
        assert error <= 2 * dense_error + 1e-6


def test_a_gate_that_forgets_nothing_is_the_ungated_form():
    with jax.enable_x64(True):
        q, k, v, W = operands()
        phi_q, phi_k = fourier_features(normalised(q), W), fourier_features(normalised(k), W)
        plain, _ = kernel_attention(phi_q, phi_k, v, causal=True)
        gated = jax.jit(lambda f: kernel_attention(phi_q, phi_k, v, causal=True, forgetting=f)[0])(jnp.full((2, 70, 3), 1e-13))
        np.testing.assert_allclose(gated, plain, rtol=0, atol=1e-9)


def test_small_sums_of_weights_count_as_the_floor():
    """One key whose estimated weight is negative: nothing is divided by it."""
    phi_q, phi_k = jnp.ones((1, 1, 1, 2)), jnp.array([[[[0.3, -0.5]]]])
    out, _ = kernel_attention(phi_q, phi_k, jnp.ones((1, 1, 1, 3)), causal=True, floor=0.5)
    np.testing.assert_allclose(out, -0.2 / 0.5, rtol=1e-6)


def test_a_gate_that_is_nearly_open_keeps_averaging():
    """The layer's sums hold 1e-4 of what is written, and divide by as little: its output is a mean of values all the same."""
    module = build(dict(name="rfa_gate", causal=True, num_heads=1, head_dim=8, num_features=64, use_bias=False))
    x = jnp.ones((1, 20, 8)) + 0.1 * jax.random.normal(jax.random.key(0), (1, 20, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    params = variables["params"] | {"gate": {"kernel": jnp.zeros((8, 1)), "bias": jnp.full(1, 9.0)}}
    out = jax.jit(module.apply)({**variables, "params": params}, x, Context())
    values = jnp.einsum("ble,ehd,hdf->blf", x, params["value"]["kernel"], params["out"]["kernel"])
    means = jnp.cumsum(values, axis=1) / jnp.arange(1, 21)[None, :, None]
    np.testing.assert_allclose(out, means, atol=0.1 * float(jnp.abs(means).max()))


def test_many_features_approach_attention_by_distances_of_unit_vectors():
    """exp(-|sigma (q - k)|^2 / 2), sigma another number for each head and channel."""
    module = build(dict(name="rfa", num_heads=2, num_features=4096))
    x = jax.random.normal(jax.random.key(0), (1, 20, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    sigma = jnp.array([[[0.5, 1.0, 1.5, 2.0]], [[1.0, 0.1, 1.0, 0.1]]])
    params = {**variables["params"], "sigma": sigma}
    q, k, v = (jnp.einsum("ble,ehd->blhd", x, params[n]["kernel"]) for n in ("query", "key", "value"))
    apart = normalised(q)[:, :, None] - normalised(k)[:, None]  # [B, i, j, H, D]
    weights = jnp.exp(-jnp.sum((jnp.moveaxis(sigma, 1, 0)[None, None] * apart) ** 2, axis=-1) / 2)
    weights = weights / weights.sum(axis=2, keepdims=True)
    exact = jnp.einsum("bijh,bjhd,hde->bie", weights, v, params["out"]["kernel"])
    out = jax.jit(module.apply)({**variables, "params": params}, x, Context())
    np.testing.assert_allclose(out, exact, rtol=0, atol=0.05)


def test_training_redraws_at_every_pass_and_evaluation_does_not():
    module = build(dict(name="rfa", num_heads=2))
    x = jnp.ones((1, 5, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())

    @jax.jit
    def train(variables, key):
        return module.apply(variables, x, Context(train=True), rngs={"dropout": key}, mutable=["features"])[1]

    first = train(variables, jax.random.key(2))
    second = train({**variables, **first}, jax.random.key(3))
    drawn = [np.asarray(v["features"]["projection"]) for v in (variables, first, second)]
    assert drawn[0].shape == (2, 4, 4)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])


def test_state_does_not_grow_with_the_length_and_errors_name_what_does_not_fit():
    mixer = dict(name="rfa_gate", causal=True, num_heads=2, num_features=3)
    assert state_size(mixer, 10, 8) == state_size(mixer, 10_000, 8) == 4 * 2 * (5 * 6 + 1)
    with pytest.raises(ConfigError, match="'rfa_gate' has no bidirectional form"):
        build(dict(name="rfa_gate"))
    with pytest.raises(ConfigError, match="num_features=0; at least 1"):
        jax.eval_shape(
            build(dict(name="rfa", num_heads=2, num_features=0)).init, jax.random.key(0), jnp.zeros((1, 4, 8)), Context()
        )
