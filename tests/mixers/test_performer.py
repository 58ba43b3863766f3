"""Performer: its features against an independent implementation and as estimates, and their redrawing in training."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.linear_attention import kernel_attention
from efficient_attn.mixers.performer import (
    independent,
    orthogonal,
    positive_features,
    relu_features,
    softmax_exponents,
    softmax_features,
)
from efficient_attn.models.encoder import Classifier
from efficient_attn.steps import eval_step, init_state, train_step
from kernels.attention import attend, masks

TOLERANCE = {False: 1e-4, True: 2e-3}  # the oracle adds 1e-6 to causal sums of keys: its folder states both
DRAWS = 12_000


pytestmark = pytest.mark.usefixtures("quick_compile")


def load(oracle_dir):
    hyper = json.loads((oracle_dir / "performer_favor.json").read_text())["hyper"]
    return hyper, {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "performer_favor.npz").items()}


def test_softmax_kernel_against_the_oracle(oracle_dir):
    """With the oracle's shifts: it takes those of queries before |x|^2 / 2 is subtracted, and one shift for all keys."""
    hyper, a = load(oracle_dir)
    q, k, v = (jnp.moveaxis(a[f"in.{name}"], 1, 2) for name in "qkv")
    W, size = a["in.projection"], hyper["head_dim"]
    assert W.shape == (hyper["features"], size)

    def features(x, axes):
        exponents = softmax_exponents(x, W)
        shift = jnp.max(exponents + jnp.sum(x**2, axis=-1, keepdims=True) / (2 * size**0.5), axis=axes, keepdims=True)
        return positive_features(exponents, jnp.broadcast_to(shift, (*x.shape[:3], 1)), hyper["kernel_epsilon"])

    phi_q, phi_k = features(q, (3,)), features(k, (1, 3))
    np.testing.assert_allclose(jnp.moveaxis(phi_q, 1, 2), a["out.phi_q"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(jnp.moveaxis(phi_k, 1, 2), a["out.phi_k"], rtol=0, atol=1e-4)
    for causal, name in ((False, "out.y"), (True, "out.y_causal")):
        out, _ = kernel_attention(phi_q, phi_k, v, causal=causal)
        np.testing.assert_allclose(jnp.moveaxis(out, 1, 2), a[name], rtol=0, atol=TOLERANCE[causal])


def test_relu_kernel_against_the_oracle(oracle_dir):
    _, a = load(oracle_dir)
    q, k, v = (jnp.moveaxis(a[f"in.{name}"], 1, 2) for name in "qkv")
    phi_q, phi_k = (relu_features(x, a["in.projection"], is_query=is_query) for x, is_query in ((q, True), (k, False)))
    np.testing.assert_allclose(jnp.moveaxis(phi_q, 1, 2), a["out.phi_relu_q"], rtol=0, atol=1e-4)
    out, _ = kernel_attention(phi_q, phi_k, v, causal=False)
    np.testing.assert_allclose(jnp.moveaxis(out, 1, 2), a["out.y_relu"], rtol=0, atol=1e-4)


def estimates(draw, x, y, num_features: int) -> np.ndarray:
    """phi(x) . phi(y) without epsilon, for many projections."""

    def one(key):
        W = draw(key, num_features, len(x))
        phi = [positive_features(softmax_exponents(z[None, None, None], W), jnp.zeros((1, 1, 1, 1)), 0.0) for z in (x, y)]
        return jnp.sum(phi[0] * phi[1])

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), DRAWS)), np.float64)


def test_features_are_unbiased_and_orthogonal_ones_vary_less(oracle_dir):
    """The bias of QR without its signs, 1.42 for 1.28 by the oracle's own note, would be some 20 standard errors."""
    hyper, a = load(oracle_dir)
    x, y = a["in.x1"], a["in.x2"]
    exact = float(jnp.exp(x @ y / len(x) ** 0.5))
    spread = {}
    for draw in (orthogonal, independent):
        samples = estimates(draw, x, y, hyper["features"])
        assert abs(samples.mean() - exact) < 4 * samples.std() / DRAWS**0.5
        spread[draw] = samples.var()
    assert spread[orthogonal] < 0.97 * spread[independent]


def test_orthogonal_blocks_have_haar_signs_and_gaussian_norms():
    W = jax.vmap(lambda key: orthogonal(key, 6, 4))(jax.random.split(jax.random.key(0), 4000))
    gram = jnp.einsum("nid,njd->nij", W, W)
    np.testing.assert_allclose(gram[:, :4, :4] * (1 - jnp.eye(4))[None], 0, atol=1e-4)
    assert float(jnp.max(jnp.abs(gram[:, 4:, :4]))) > 0.1  # another block
    np.testing.assert_allclose(jnp.mean(jnp.sum(W**2, -1), 0), 4.0, atol=4 * (2 * 4 / 4000) ** 0.5)
    np.testing.assert_allclose(jnp.mean(W, 0), 0, atol=4 / 4000**0.5)


@pytest.mark.parametrize("causal", [False, True])
def test_many_features_approach_softmax_attention(causal):
    q, k, v = (0.6 * jax.random.normal(key, (1, 33, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    W = orthogonal(jax.random.key(1), 4096, 4)
    phi_q, phi_k = (softmax_features(x, W, is_query=is_query) for x, is_query in ((q, True), (k, False)))
    out, _ = kernel_attention(phi_q, phi_k, v, causal=causal)
    exact = attend(q, k, v, mask=masks.Causal() if causal else masks.Full())
    few, _ = kernel_attention(phi_q[..., :8], phi_k[..., :8], v, causal=causal)
    error, coarse = (float(jnp.sqrt(jnp.mean((x - exact) ** 2))) for x in (out, few))
    assert error < 0.02 and coarse > 3 * error


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_quadratic_form_with_all_gradients(causal):
    with jax.enable_x64(True):
        q, k, v, g = (jax.random.normal(key, (2, 70, 2, 4), jnp.float64) for key in jax.random.split(jax.random.key(0), 4))
        W = orthogonal(jax.random.key(1), 12, 4)

        def dense(q, k, v):
            phi_q, phi_k = softmax_features(q, W, is_query=True), softmax_features(k, W, is_query=False)
            weights = jnp.einsum("bihm,bjhm->bhij", phi_q, phi_k)
            weights = jnp.where(jnp.tri(70, dtype=bool)[None, None], weights, 0) if causal else weights
            return jnp.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)

        def linear(q, k, v):
            phi_q, phi_k = softmax_features(q, W, is_query=True), softmax_features(k, W, is_query=False)
            return kernel_attention(phi_q, phi_k, v, causal=causal)[0]

        expected, expected_vjp = jax.vjp(jax.jit(dense), q, k, v)
        out, vjp = jax.vjp(jax.jit(linear), q, k, v)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(vjp(g), expected_vjp(g), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
        low = [x.astype(jnp.float32) for x in (q, k, v)]
        error, dense_error = (float(jnp.max(jnp.abs(f(*low) - expected))) for f in (jax.jit(linear), jax.jit(dense)))
        assert error <= 2 * dense_error + 1e-6


def test_large_keys_and_queries_stay_finite():
    q, k, v = (100 * jax.random.normal(key, (1, 9, 2, 16)) for key in jax.random.split(jax.random.key(0), 3))
    W = orthogonal(jax.random.key(1), 32, 16)

    def loss(q, k, v):
        phi_q, phi_k = softmax_features(q, W, is_query=True), softmax_features(k, W, is_query=False)
        return jnp.sum(kernel_attention(phi_q, phi_k, v, causal=True)[0] ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value) and all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize(
    "every, accumulate, remat, redrawn",
    [(2, 1, "none", [False, False, True, False]), (2, 2, "full", [False, True, True, True]), (0, 1, "none", [False] * 4)],
)
def test_training_redraws_the_projection(every, accumulate, remat, redrawn):
    """In which of the first four steps, of one or two passes each; evaluation never does."""
    mixer = dict(name="performer", num_heads=2, num_features=4, redraw_every=every)
    model = Classifier(vocab_size=9, num_outputs=3, length=6, depth=1, width=8, mixer=mixer, remat=remat)
    inputs = jax.random.randint(jax.random.key(0), (4, 6), 1, 9)
    batch = dict(inputs=inputs, mask=inputs > 0, targets=inputs[:, 0] % 3, weights=jnp.ones(4))
    tx = optax.adam(1e-3)
    state = jax.jit(lambda: init_state(model, tx, 0, batch, ema=False))()
    step = jax.jit(lambda state: train_step(model, tx, state, batch, accumulate=accumulate)[0])
    evaluate = jax.jit(lambda state: eval_step(model, state.evaluated(), batch)[0]["loss"][0])
    drawn = []
    for _ in range(5):
        drawn.append(np.asarray(state.variables["features"]["layer_0"]["mixer"]["projection"]))
        assert evaluate(state) == evaluate(state)
        state = step(state)
    assert [not np.array_equal(a, b) for a, b in itertools.pairwise(drawn)] == redrawn


def test_errors_name_what_does_not_fit():
    def init(**arguments):
        module = build(dict(name="performer", num_heads=2, **arguments))
        return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context()))

    with pytest.raises(ConfigError, match="num_features=0 goes with kernel='relu'"):
        init(num_features=0)
    with pytest.raises(ConfigError, match=r"model.mixer.kernel='cos' is unknown.*relu, softmax"):
        init(kernel="cos")
    with pytest.raises(ConfigError, match="redraw_every=-1 must be at least 0"):
        init(redraw_every=-1)
    assert "features" not in init(kernel="relu", num_features=0)
