"""SCFA: exact against the dense masked softmax, dropped tokens, dropout, documents, the work it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.scfa import Form, Tiles, scfa
from kernels.attention import Dropout

pytestmark = pytest.mark.usefixtures("quick_compile")


def dense(q, k, v, hashes, *, causal, groups=None, kept=None):
    """[L, L] tables with the mask (h_i == h_j) & (j <= i), of one group and of kept tokens."""
    L = q.shape[1]
    allowed = hashes[..., :, None] == hashes[..., None, :]
    if causal:
        allowed &= jnp.tri(L, dtype=bool)[None, None]
    if groups is not None:
        allowed &= (groups[:, :, None] == groups[:, None, :])[:, None]
    if kept is not None:
        is_kept = jnp.any(kept[..., None] == jnp.arange(L)[None, None, None], axis=2)
        allowed &= is_kept[..., :, None] & is_kept[..., None, :]
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = jnp.where(allowed, jnp.exp(scores - scores.max()), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("bhij,bjhd->bihd", weights / jnp.where(total > 0, total, 1), v)


def draw(L: int, dtype=jnp.float64, count: int = 3):
    return tuple(jax.random.normal(key, (2, L, 2, 3), dtype) for key in jax.random.split(jax.random.key(0), count))


CASES = {
    "causal": dict(causal=True),
    "both sides": dict(causal=False),
    "documents": dict(causal=True, groups=True),
    "kept": dict(causal=True, kept=True),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_masked_softmax(case):
    """Over more tiles than one, of which the last is not full, with hashes of unequal frequency."""
    L = 150
    options = dict(CASES[case])
    with jax.enable_x64(True):
        q, k, v, dy = draw(L, count=4)
        hashes = jnp.floor(6 * jax.random.uniform(jax.random.key(1), (2, 2, L)) ** 2).astype(jnp.int32)
        if options.pop("groups", False):
            options["groups"] = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None] // 70, (2, L))
        if options.pop("kept", False):
            options["kept"] = jax.lax.top_k(jax.random.uniform(jax.random.key(2), (2, 2, L)), 90)[1]
        out, vjp = jax.vjp(jax.jit(lambda *qkv: scfa(*qkv, hashes, **options)), q, k, v)
        expected, expected_vjp = jax.vjp(jax.jit(lambda *qkv: dense(*qkv, hashes, **options)), q, k, v)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)
        for ours, theirs in zip(jax.jit(vjp)(dy), jax.jit(expected_vjp)(dy)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
        named = jax.jit(lambda *qkv: scfa(*qkv, hashes, implementation="reference", **options))(q, k, v)
        np.testing.assert_allclose(named, expected, rtol=0, atol=1e-10)


def test_one_hash_is_softmax_attention_and_float32_is_as_good():
    q, k, v = (3 * x for x in draw(130, jnp.float32))
    hashes = jnp.zeros((2, 2, 130), jnp.int32)
    slow = jax.jit(lambda *qkv: dense(*qkv, hashes, causal=True))
    with jax.enable_x64(True):
        truth = np.asarray(slow(*(x.astype(jnp.float64) for x in (q, k, v))))
    error, allowed = (np.max(np.abs(f(q, k, v) - truth)) for f in (jax.jit(lambda *qkv: scfa(*qkv, hashes, causal=True)), slow))
    assert error <= 2 * allowed + 1e-6


def test_dropout_drops_the_same_weights_forward_and_backward():
    """By finite differences, and by the mean over draws."""
    q, k, v = draw(70, jnp.float32)
    hashes = jnp.broadcast_to(jnp.arange(70, dtype=jnp.int32) % 3, (2, 2, 70))

    def run(v, key, q=q):
        return scfa(q, k, v, hashes, causal=True, dropout=Dropout(0.5, key))

    one = jax.jit(run)(v, jax.random.key(0))
    assert np.any(one != jax.jit(run)(v, jax.random.key(1)))
    mean = jnp.mean(jax.jit(jax.vmap(run, (None, 0)))(v, jax.random.split(jax.random.key(2), 400)), axis=0)
    np.testing.assert_allclose(mean, dense(q, k, v, hashes, causal=True), rtol=0, atol=0.5)
    with jax.enable_x64(True):
        q64, v64, direction = (x.astype(jnp.float64) for x in (q, v, k))

        def loss(t, key):
            args = k.astype(jnp.float64), v64 + t * direction, hashes
            return jnp.sum(jnp.sin(scfa(q64 + t * direction, *args, causal=True, dropout=Dropout(0.5, key))))

        loss, slope = jax.jit(loss), jax.jit(jax.grad(loss))
        key, step = jax.random.key(0), 1e-5
        expected = (loss(step, key) - loss(-step, key)) / (2 * step)
        np.testing.assert_allclose(slope(0.0, key), expected, rtol=1e-7)


def test_tiles_without_a_pair_are_not_visited():
    """With n even buckets about L / n keys are visited for each query, and a few tiles for borders that differ among rows."""
    L, tile = 4096, 64
    for buckets in (1, 8, 32):
        segments = jnp.sort(jax.random.randint(jax.random.key(0), (4, L), 0, buckets), axis=1)
        x = jnp.zeros((4, L, 1))
        tiles = Tiles(Form(False, 1.0, tile), x, x, x, segments, None)
        visited = int(jnp.sum(tiles.last - tiles.first + 1)) * tile**2
        assert L**2 / buckets <= visited <= L * (L / buckets + 4 * tile)


def test_documents_are_as_if_alone():
    module = build(dict(name="scfa", num_heads=2, num_buckets=4, causal=True))
    x = jax.random.normal(jax.random.key(0), (2, 40, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    segment_ids = jnp.broadcast_to((jnp.arange(40) >= 17).astype(jnp.int32)[None], (2, 40))
    y = jax.jit(module.apply)(variables, x, Context(segment_ids=segment_ids))
    alone = jax.jit(module.apply)(variables, x[:, 17:], Context())
    np.testing.assert_allclose(y[:, 17:], alone, rtol=0, atol=1e-5)


def test_dropping_tokens_is_for_training():
    module = build(dict(name="scfa", num_heads=2, num_buckets=1, drop=0.5, use_bias=False))
    x = jax.random.normal(jax.random.key(0), (1, 20, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    apply = jax.jit(lambda key: module.apply(variables, x, Context(train=True), rngs={"dropout": key}))
    y, z = apply(jax.random.key(0)), apply(jax.random.key(1))
    assert np.any(y != z)
    both_dropped = np.mean(np.all(np.stack([y, z]) == 0, axis=(0, 3)))
    assert 0 < np.mean(np.all(y == 0, axis=-1)) < 0.5 and both_dropped < 0.3
    whole = build(dict(name="scfa", num_heads=2, num_buckets=1, use_bias=False))
    np.testing.assert_array_equal(
        jax.jit(module.apply)(variables, x, Context()), jax.jit(whole.apply)(variables, x, Context(train=True))
    )


def test_errors_name_what_is_wrong():
    x = jnp.zeros((1, 8, 8))
    with pytest.raises(ConfigError, match="num_buckets=3; give an even number, or 1"):
        build(dict(name="scfa", num_buckets=3)).init(jax.random.key(0), x, Context())
    with pytest.raises(ConfigError, match=r"drop=1.0 must be at least 0 and less than 1"):
        build(dict(name="scfa", drop=1.0)).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="only causal attention decodes"):
        build(dict(name="scfa")).init(jax.random.key(0), x, Context(decode=True))
