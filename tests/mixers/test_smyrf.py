"""SMYRF: the asymmetric transformation, clusters, the softmax they stand for, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.smyrf import asymmetric, clusters, smyrf_attention

pytestmark = pytest.mark.usefixtures("quick_compile")


def draw(B, L, H, D, dtype=jnp.float32):
    return tuple(jax.random.normal(key, (B, L, H, D), dtype) for key in jax.random.split(jax.random.key(0), 3))


def test_distances_order_as_products():
    with jax.enable_x64(True):
        q, k, _ = draw(2, 20, 2, 4, jnp.float64)
        mask = jnp.arange(20)[None] < jnp.array([[20], [11]])
        F, G = asymmetric(q, k, mask)
        lengths = jnp.sum(F**2, axis=-1)[1, :11], jnp.sum(G**2, axis=-1)[1, :11]
        M2 = sum(jnp.max(jnp.sum(x[1, :11] ** 2, axis=-1), axis=0) for x in (q, k))
        for length in lengths:
            np.testing.assert_allclose(length, jnp.broadcast_to(M2, (11, 2)), rtol=1e-10)
        distances = jnp.sum((F[:, :, None] - G[:, None]) ** 2, axis=-1)[1, :11, :11]
        products = jnp.sum(q[:, :, None] * k[:, None], axis=-1)[1, :11, :11]
        np.testing.assert_allclose(distances, 2 * (M2[None, None] - products), rtol=1e-10)


def test_larger_products_meet_more_often():
    L, rounds = 64, 2000
    q, k, _ = draw(1, L, 1, 8)
    mask = jnp.ones((1, L), bool)
    directions = jax.random.normal(jax.random.key(1), (1, 10, rounds))
    places = [jnp.argsort(clusters(x, directions, mask), axis=-1)[0, 0] // 8 for x in asymmetric(q, k, mask)]
    meet = np.asarray(jnp.mean(places[0][:, :, None] == places[1][:, None, :], axis=0)).ravel()
    order = np.argsort(np.asarray(jnp.einsum("blhd,bshd->ls", q, k)).ravel())
    rates = [meet[part].mean() for part in np.array_split(order, 4)]
    assert np.all(np.diff(rates) > 0) and rates[-1] > 1.3 * rates[0]
    np.testing.assert_allclose(meet.mean(), 1 / 8, rtol=1e-6)  # balanced: a query always has one cluster of keys in eight


def dense(q, k, v, q_order, k_order, *, cluster_size, mask):
    """[L, L] tables: weights exp(score) times the number of rounds in which the pair meets."""
    q_at, k_at = (jnp.argsort(order, axis=-1) // cluster_size for order in (q_order, k_order))
    meet = jnp.sum(q_at[..., :, None] == k_at[..., None, :], axis=2) * mask[:, None, None, :]
    weights = meet * jnp.exp(jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5)
    return jnp.einsum("bhij,bjhd->bihd", weights / weights.sum(axis=-1, keepdims=True), v), meet


def test_equals_the_softmax_over_what_the_rounds_see():
    B, L, H, D = 2, 22, 2, 4
    with jax.enable_x64(True):
        q, k, v = draw(B, L, H, D, jnp.float64)
        mask = jnp.arange(L)[None] < jnp.array([[L], [15]])
        directions = jax.random.normal(jax.random.key(1), (H, D + 2, 3))
        orders = tuple(clusters(x, directions, mask) for x in asymmetric(q, k, mask))
        real = mask[..., None, None].astype(jnp.float64)

        def fast(*qkv):
            return real * smyrf_attention(*qkv, *orders, cluster_size=5, mask=mask)

        def slow(*qkv):
            out, meet = dense(*qkv, *orders, cluster_size=5, mask=mask)
            return jnp.where(real > 0, out, 0), meet

        out, (expected, meet) = jax.jit(fast)(q, k, v), jax.jit(slow)(q, k, v)
        assert int(meet.max()) > 1 and int(meet[0].min()) == 0
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)
        q1, k1, v1 = (x[:1] for x in (q, k, v))  # gradients where every row has keys

        def of_first(f):
            orders1 = tuple(order[:1] for order in orders)
            return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a, *orders1))), argnums=(0, 1, 2)))(q1, k1, v1)

        ours = of_first(lambda *a: smyrf_attention(*a, cluster_size=5))
        theirs = of_first(lambda *a: dense(*a, cluster_size=5, mask=mask[:1])[0])
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_one_cluster_is_softmax_attention():
    q, k, v = draw(2, 13, 2, 4)
    orders = (jnp.broadcast_to(jnp.arange(13, dtype=jnp.int32)[::-1], (2, 2, 1, 13)),) * 2
    out = jax.jit(lambda *qkv: smyrf_attention(*qkv, *orders, cluster_size=13))(q, k, v)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), rtol=0, atol=1e-5)


def test_padding_is_as_if_it_were_not_there():
    module = build(dict(name="smyrf", num_heads=2, cluster_size=6, rounds=2))
    x = jax.random.normal(jax.random.key(0), (2, 40, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    y = jax.jit(module.apply)(variables, x, Context(mask=jnp.arange(40)[None] < jnp.array([[40], [27]])))
    short = jax.jit(module.apply)(variables, x[1:, :27], Context())
    np.testing.assert_allclose(y[1, :27], short[0], rtol=0, atol=1e-5)


def test_memory_grows_with_the_length_alone():
    def temporary(length: int) -> int:
        module = build(dict(name="smyrf", num_heads=1, cluster_size=16, rounds=2))
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context()), x)
        step = jax.jit(jax.grad(lambda v, x: jnp.sum(module.apply(v, x, Context())), argnums=1))
        return step.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.5 * temporary(1024)


def test_errors_name_what_is_wrong():
    x = jnp.zeros((1, 8, 8))
    with pytest.raises(ConfigError, match="rounds=0 must be at least 1"):
        build(dict(name="smyrf", rounds=0)).init(jax.random.key(0), x, Context())
    with pytest.raises(ConfigError, match="mixer 'smyrf' has no causal form"):
        build(dict(name="smyrf", causal=True))
