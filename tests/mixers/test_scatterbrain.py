"""Scatterbrain: against its dense form, exact on its support, a Performer without one, and better than either part alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.linear_attention import kernel_attention
from efficient_attn.mixers.performer import independent, orthogonal, positive_features, softmax_exponents, softmax_features
from efficient_attn.mixers.scatterbrain import REFUSES_DOCUMENTS, in_order, scatterbrain
from efficient_attn.mixers.smyrf import asymmetric, clusters
from kernels.attention import attend, masks

EMPTY = dict(look_back=0, look_ahead=-1)


pytestmark = pytest.mark.usefixtures("quick_compile")


def qkv(length: int, dtype=jnp.float32):
    return tuple(jax.random.normal(key, (2, length, 2, 4), dtype) for key in jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_dense_form_with_all_gradients(causal):
    """Blocks of 4 of 18 positions, one before and two after; the second row has 13 real positions."""
    with jax.enable_x64(True):
        q, k, v = qkv(18, jnp.float64)
        W = orthogonal(jax.random.key(1), 6, 4)
        mask = jnp.arange(18)[None] < jnp.array([[18], [13]])
        at = np.arange(18)
        support = masks.BlockLocal(4, 1, 2).allowed(at[:, None], at[None])

        def dense(q, k, v):
            phi_q, phi_k = softmax_features(q, W, is_query=True), softmax_features(k, W, is_query=False)
            x = q * q.shape[-1] ** -0.25
            top = jnp.max(jnp.einsum("blhd,md->blhm", x, W), axis=-1) - jnp.sum(x**2, axis=-1) / 2
            scale = jax.lax.stop_gradient(jnp.exp(jnp.moveaxis(top, 1, 2)))[..., None]
            estimated = jnp.einsum("bihm,bjhm->bhij", phi_q, phi_k) * scale
            weights = jnp.where(support[None, None], jnp.exp(jnp.einsum("bihd,bjhd->bhij", q, k) / 2), estimated)
            weights = jnp.where(mask[:, None, None], weights, 0)
            weights = jnp.where(jnp.tri(18, dtype=bool)[None, None], weights, 0) if causal else weights
            out = jnp.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
            return jnp.where(mask[..., None, None], out, 0)

        def ours(q, k, v):
            out = scatterbrain(q, k, v, W, block_size=4, look_back=1, look_ahead=2, causal=causal, mask=mask)
            return jnp.where(mask[..., None, None], out, 0)

        g = jax.random.normal(jax.random.key(2), v.shape, v.dtype)
        expected, expected_vjp = jax.vjp(jax.jit(dense), q, k, v)
        out, vjp = jax.vjp(jax.jit(ours), q, k, v)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(vjp(g), expected_vjp(g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
        low = [x.astype(jnp.float32) for x in (q, k, v)]
        error, dense_error = (float(jnp.max(jnp.abs(f(*low) - expected))) for f in (jax.jit(ours), jax.jit(dense)))
        assert error <= 2 * dense_error + 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_full_support_is_exact_attention(causal):
    with jax.enable_x64(True):
        q, k, v = qkv(18, jnp.float64)
        out = scatterbrain(q, k, v, independent(jax.random.key(1), 6, 4), block_size=5, look_back=3, look_ahead=3, causal=causal)
        exact = attend(q, k, v, mask=masks.Causal() if causal else masks.Full())
        np.testing.assert_allclose(out, exact, rtol=1e-10, atol=1e-10)


def test_empty_support_is_a_performer():
    with jax.enable_x64(True):
        q, k, v = qkv(18, jnp.float64)
        W = independent(jax.random.key(1), 6, 4)
        out = scatterbrain(q, k, v, W, block_size=5, **EMPTY)
        phi_q, phi_k = softmax_features(q, W, is_query=True), softmax_features(k, W, is_query=False)
        np.testing.assert_allclose(out, kernel_attention(phi_q, phi_k, v, causal=False)[0], rtol=1e-10, atol=1e-10)


def test_nearer_to_attention_than_either_part_alone():
    """Keys like the tokens beside them, so that attention is sharp near and broad far away (the paper's figure 1)."""
    W = independent(jax.random.key(1), 64, 8)
    noise = jax.random.normal(jax.random.key(0), (1, 103, 2, 8))
    smooth = sum(noise[:, i : i + 96] for i in range(8))
    q = k = 1.2 * smooth / jnp.sqrt(jnp.mean(smooth**2, axis=-1, keepdims=True))
    v = jax.random.normal(jax.random.key(2), (1, 96, 2, 8))
    exact = attend(q, k, v)
    both = jax.jit(lambda *qkv: scatterbrain(*qkv, W, block_size=8))(q, k, v)
    low_rank = jax.jit(lambda *qkv: scatterbrain(*qkv, W, block_size=8, **EMPTY))(q, k, v)
    sparse = attend(q, k, v, mask=masks.BlockLocal(8, 1, 1))
    errors = [float(jnp.mean((x - exact) ** 2)) for x in (both, low_rank, sparse)]
    assert errors[0] < 0.5 * min(errors[1:])


def test_hashed_support_is_exact_there_and_estimated_elsewhere():
    """Blocks of sorted queries and keys against the dense form; padding is in none of them."""
    module = build(dict(name="scatterbrain", num_heads=2, num_features=6, support="lsh", block_size=4, look_ahead=0))
    x = jax.random.normal(jax.random.key(0), (2, 18, 8))
    mask = jnp.ones((2, 18), bool).at[1, jnp.array([3, 4, 16, 17])].set(False)
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    params = variables["params"]
    q, k, v = (jnp.einsum("ble,ehd->blhd", x, params[n]["kernel"]) for n in ("query", "key", "value"))
    directions = jax.random.normal(jax.random.key(0), (2, 6, 1))
    places = []
    for row in range(2):
        real = mask[row : row + 1]
        orders = [clusters(y, directions, mask)[row, :, 0] for y in asymmetric(q, k, mask)]
        places.append([np.where(real, np.argsort(order, axis=-1) // 4, -9) for order in orders])
    block_q, block_k = (np.stack(side) for side in zip(*places))  # [B, H, L]
    apart = block_q[..., :, None] - block_k[..., None, :]
    exact = jnp.exp(jnp.einsum("bihd,bjhd->bhij", q, k) / 2)
    exponents = [softmax_exponents(y, variables["features"]["projection"]) for y in (q, k)]
    shift = exponents[0].max(axis=-1, keepdims=True)
    phi_q, phi_k = positive_features(exponents[0], shift), positive_features(exponents[1], jnp.zeros_like(shift))
    estimated = jnp.einsum("bihm,bjhm->bhij", phi_q * jnp.exp(shift), phi_k)
    weights = jnp.where((apart == 0) | (apart == 1), exact, estimated) * mask[:, None, None]
    expected = jnp.einsum("bhij,bjhd,hde->bie", weights / weights.sum(-1, keepdims=True), v, params["out"]["kernel"])
    out = jax.jit(module.apply)(variables, x, Context(mask=mask))
    np.testing.assert_allclose(jnp.where(mask[..., None], out - expected, 0), 0, atol=1e-5)
    trained = jax.jit(module.apply)(variables, x, Context(mask=mask, train=True), rngs={"dropout": jax.random.key(5)})
    assert float(jnp.max(jnp.abs(jnp.where(mask[..., None], trained - out, 0)))) > 1e-4  # other directions


def test_hashed_support_finds_what_weighs_most():
    """Each query weighs one key most, which may stand anywhere: sorting finds it more often than position does."""
    k = 1.5 * jax.random.normal(jax.random.key(0), (1, 96, 2, 8))
    q = k[:, ::-1]
    v = jax.random.normal(jax.random.key(2), (1, 96, 2, 8))
    W, mask, exact = independent(jax.random.key(1), 32, 8), jnp.ones((1, 96), bool), attend(q, k, v)

    def error(q, k, v, order=None):
        out = jax.jit(lambda *qkv: scatterbrain(*qkv, W, block_size=12))(q, k, v)
        out = out if order is None else in_order(out, jnp.argsort(order, axis=-1))
        return float(jnp.mean((out - exact) ** 2))

    directions = jax.random.normal(jax.random.key(3), (2, 10, 1))
    q_order, k_order = (clusters(y, directions, mask)[:, :, 0] for y in asymmetric(q, k, mask))
    hashed = error(in_order(q, q_order), in_order(k, k_order), in_order(v, k_order), q_order)
    assert hashed < 0.5 * error(q, k, v)


def test_no_product_of_length_by_length():
    """The largest arrays of the compiled backward pass at L = 4096 are far from L^2."""
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 4), jnp.float32)
    W = orthogonal(jax.random.key(0), 8, 4)
    grad = jax.jit(jax.grad(lambda q, k, v: jnp.sum(scatterbrain(q, k, v, W, block_size=32))))
    assert grad.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes < 4096**2


def test_errors_name_what_does_not_fit():
    module, x = build(dict(name="scatterbrain", num_heads=2)), jnp.zeros((1, 4, 8))
    variables = jax.jit(module.init)(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match=REFUSES_DOCUMENTS):
        module.apply(variables, x, Context(segment_ids=jnp.zeros((1, 4), jnp.int32)))
    with pytest.raises(ConfigError, match="only a causal scatterbrain decodes token by token"):
        module.apply(variables, x, Context(decode=True))
    with pytest.raises(ConfigError, match="kernel='relu' does not estimate the softmax"):
        build(dict(name="scatterbrain", num_heads=2, kernel="relu")).apply(variables, x, Context())
    with pytest.raises(ConfigError, match="support='lsh' sorts later tokens among earlier ones"):
        build(dict(name="scatterbrain", num_heads=2, support="lsh", causal=True)).apply(variables, x, Context())
    with pytest.raises(ConfigError, match=r"model.mixer.support='hash' is unknown.*local, lsh"):
        build(dict(name="scatterbrain", num_heads=2, support="hash")).apply(variables, x, Context())
    with pytest.raises(ConfigError, match="look_ahead=-1 must be at least 0"):
        build(dict(name="scatterbrain", look_ahead=-1))
