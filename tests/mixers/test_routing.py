"""Routing Transformer: an independent implementation, attention cluster by cluster, online k-means, cost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.routing import commitment, members, routing_attention, unit, updated

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("name", ["routing_kmeans_shared_causal", "routing_kmeans_qk_bidir"])
def test_oracle(oracle_dir, name):
    hyper = json.loads((oracle_dir / f"{name}.json").read_text())["hyper"]
    arrays = {key: jnp.asarray(x) for key, x in np.load(oracle_dir / f"{name}.npz").items()}
    shared, mu = hyper["shared_qk"], arrays["in.centroids"]
    q, k, v = (jnp.moveaxis(arrays[f"in.{part}"], 1, 2) for part in "qkv")
    k = unit(q) if shared else k
    assert mu.shape[1] == hyper["clusters"]
    q_members = members(q, mu, hyper["window"])
    np.testing.assert_array_equal(q_members, np.sort(arrays["aux.members"], axis=-1))
    k_members = q_members if shared else members(k, mu, hyper["window"])
    out = jax.jit(routing_attention, static_argnames=("causal", "shared"))(
        q, k, v, q_members, k_members, causal=hyper["causal"], shared=shared
    )
    np.testing.assert_allclose(jnp.moveaxis(out, 1, 2), arrays["out.y"], rtol=0, atol=TOLERANCE)
    tokens = q if shared else jnp.concatenate([q, k], axis=1)
    np.testing.assert_allclose(1e-4 * commitment(tokens, mu), arrays["out.aux_loss"], rtol=1e-4)


def one_by_one(q, k, v, q_members, k_members, *, causal, shared, mask):
    """Each cluster from its [L, L] table, then the mean over the clusters in which a token found something."""
    B, L, H, D = q.shape
    total, count = jnp.zeros((B, H, L, D), q.dtype), jnp.zeros((B, H, L), q.dtype)
    for c in range(q_members.shape[2]):
        is_q, is_k = (jnp.any(m[:, :, c, :, None] == jnp.arange(L)[None, None, None], axis=2) for m in (q_members, k_members))
        allowed = is_q[..., :, None] & is_k[..., None, :] & (mask[:, None, :, None] == mask[:, None, None, :])
        allowed &= ~jnp.eye(L, dtype=bool)[None, None] if shared else True
        allowed &= jnp.tri(L, dtype=bool)[None, None] if causal else True
        weights = jnp.where(allowed, jnp.exp(jnp.einsum("bihd,bjhd->bhij", q, k) * D**-0.5), 0)
        sums = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bhij,bjhd->bhid", weights / jnp.where(sums > 0, sums, 1), v)
        finds = sums[..., 0] > 0
        if shared:
            out, finds = jnp.where(finds[..., None], out, jnp.moveaxis(v, 2, 1)), is_q
        total, count = total + jnp.where((finds & is_q)[..., None], out, 0), count + (finds & is_q)
    return jnp.moveaxis(total / jnp.maximum(count, 1)[..., None], 1, 2), count


@pytest.mark.parametrize("causal, shared", [(True, True), (False, False)])
def test_equals_attention_cluster_by_cluster(causal, shared):
    B, L, H, K, D = 2, 23, 2, 4, 3
    with jax.enable_x64(True):
        q, k, v, dy = (jax.random.normal(key, (B, L, H, D), jnp.float64) for key in jax.random.split(jax.random.key(0), 4))
        k = q if shared else k
        mask = jnp.arange(L)[None, :] < jnp.array([[L], [15]])
        mu = unit(jax.random.normal(jax.random.key(1), (H, K, D), jnp.float64))
        at = members(q, mu, 7, mask), members(k, mu, 7, mask)
        options = dict(causal=causal, shared=shared, mask=mask)
        out, vjp = jax.vjp(jax.jit(lambda *qkv: routing_attention(*qkv, *at, **options)), q, k, v)
        expected, expected_vjp, count = jax.vjp(jax.jit(lambda *qkv: one_by_one(*qkv, *at, **options)), q, k, v, has_aux=True)
        assert int(count.max()) > 1 and int(count.min()) == 0
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)
        for ours, theirs in zip(jax.jit(vjp)(dy), jax.jit(expected_vjp)(dy)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_one_cluster_of_everything_is_softmax_attention():
    q, k, v = (jax.random.normal(key, (2, 13, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    at = members(q, unit(jax.random.normal(jax.random.key(1), (2, 1, 4))), 13)
    out = jax.jit(lambda *qkv: routing_attention(*qkv, at, at, causal=True))(q, k, v)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_centroids_converge_to_the_means_of_clusters():
    """Four bundles of directions; each centroid ends at the mean direction of one, though padding points elsewhere."""
    rng, K, D = np.random.default_rng(0), 4, 8
    directions = np.linalg.qr(rng.normal(size=(D, D)))[0][:K]
    tokens = np.repeat(directions, 100, axis=0) + 0.1 * rng.normal(size=(K * 100, D))
    noise = 5 * rng.normal(size=(100, D))
    x = jnp.asarray(np.concatenate([tokens, noise]), jnp.float32)[None, :, None]
    mask = jnp.arange(500)[None] < 400
    start = unit(jnp.asarray(directions + 0.3 * rng.normal(size=(K, D)), jnp.float32))[None]
    step = jax.jit(lambda mu: updated(mu, x, 0.9, mask))
    mu, losses = start, [float(commitment(x, start, mask))]
    for _ in range(100):
        mu = step(mu)
        losses.append(float(commitment(x, mu, mask)))
    means = unit(jnp.stack([jnp.mean(unit(x[0, i * 100 : (i + 1) * 100, 0]), axis=0) for i in range(K)]))
    np.testing.assert_allclose(mu[0], means, rtol=0, atol=1e-4)
    assert np.max(np.abs(start[0] - means)) > 0.1 and losses[-1] < losses[0] / 2
    slow = jax.jit(lambda mu: updated(mu, x, 0.999, mask))(start)
    assert 0 < np.max(np.abs(slow - start)) < 0.01


def test_a_centroid_without_tokens_stays():
    x = jnp.ones((1, 5, 1, 2))
    mu = unit(jnp.array([[[1.0, 1.0], [-1.0, 0.0]]]))
    np.testing.assert_array_equal(updated(mu, x, 0.5)[0, 1], mu[0, 1])


def test_training_moves_centroids_and_evaluation_does_not():
    module = build(dict(name="routing", num_heads=2, num_clusters=3, decay=0.9))
    x = jax.random.normal(jax.random.key(0), (2, 24, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    train = jax.jit(lambda v: module.apply(v, x, Context(train=True), mutable=["centroids", "losses"])[1])
    new = train(variables)
    assert np.max(np.abs(new["centroids"]["mu"] - variables["centroids"]["mu"])) > 1e-3
    assert float(new["losses"]["commitment"][0]) > 0
    same = jax.jit(lambda v: module.apply(v, x, Context(), mutable=["centroids", "losses"])[1])(variables)
    np.testing.assert_array_equal(same["centroids"]["mu"], variables["centroids"]["mu"])
    assert "losses" not in same


def test_no_array_grows_with_the_square_of_the_length():
    """With sqrt(L) clusters the temporary memory of the gradient grows as L^1.5 at most."""

    def temporary(length: int) -> int:
        module = build(dict(name="routing", num_heads=1, local_heads=0, num_clusters=round(length**0.5), causal=True))
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context()), x)
        step = jax.jit(jax.grad(lambda v, x: jnp.sum(module.apply(v, x, Context())), argnums=1))
        return step.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 1.1 * 8 * temporary(1024)


def test_errors_name_what_is_wrong():
    x = jnp.zeros((1, 8, 8))
    with pytest.raises(ConfigError, match="num_clusters=0 must be at least 1"):
        build(dict(name="routing", num_clusters=0)).init(jax.random.key(0), x, Context())
    with pytest.raises(ConfigError, match="local_heads=5 must be between 0 and num_heads=4"):
        build(dict(name="routing", local_heads=5)).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="routing: what a token sees depends on later tokens"):
        build(dict(name="routing", causal=True)).init(jax.random.key(0), x, Context(decode=True))
