"""Sinkhorn attention: balancing, the softmax it stands for, blocks sorted by a permutation, causality, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.sinkhorn import allowed_blocks, sinkhorn, sinkhorn_attention
from kernels.attention import attend, masks

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_balanced_rows_and_columns_add_up_to_one():
    scores = 2 * jax.random.normal(jax.random.key(0), (2, 3, 6, 6))
    allowed = allowed_blocks(jnp.arange(24)[None] < jnp.array([[24], [13]]), 4, causal=False)  # four of the second row's blocks
    balance = jax.jit(lambda s: sinkhorn(s, allowed, 4))
    weights = [balance(scores)]
    for _ in range(50):
        weights.append(balance(jnp.log(weights[-1])))
    off = [np.max(np.abs(w[0].sum(axis=2) - 1)) for w in weights]
    assert off[10] < off[0] / 4
    weights = weights[-1]
    for axis in (2, 3):
        np.testing.assert_allclose(weights[0].sum(axis=axis - 1), 1, atol=1e-4)
        np.testing.assert_allclose(weights[1].sum(axis=axis - 1)[:, :4], 1, atol=1e-4)
        np.testing.assert_array_equal(weights[1].sum(axis=axis - 1)[:, 4:], 0)


def test_balancing_is_division_by_sums():
    """Against plain division, rows first, for one and for three rounds."""
    with jax.enable_x64(True):
        scores = jax.random.normal(jax.random.key(0), (1, 2, 5, 5), jnp.float64)
        for causal in (False, True):
            mask = np.tri(5, k=-1, dtype=bool) if causal else np.ones((5, 5), bool)
            for iterations in (1, 3):
                weights = np.where(mask, np.exp(scores), 0)
                for _ in range(iterations):
                    rows = weights.sum(axis=3, keepdims=True)
                    weights = weights / np.where(rows > 0, rows, 1)
                    columns = weights.cumsum(axis=2) if causal else weights.sum(axis=2, keepdims=True)
                    weights = weights / np.where(columns > 0, columns, 1)
                ours = sinkhorn(scores, jnp.asarray(mask)[None], iterations, causal=causal)
                np.testing.assert_allclose(ours, weights, rtol=0, atol=1e-10)


def dense(q, k, v, sort, mask, *, block_size, causal):
    """Tables of [L, 2 L]: all tokens beside the sorted ones, of which a query may see its own block's."""
    L, D = q.shape[1], q.shape[3]
    real = mask[:, :, None, None]
    k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
    mixing = jnp.kron(sort, jnp.eye(block_size))  # token t of block i is the mixture of tokens t of all blocks
    keys, values = (jnp.concatenate([jnp.einsum("bhij,bjhd->bihd", mixing, x), x], axis=1) for x in (k, v))
    at = np.arange(L)
    same = jnp.asarray(at[:, None] // block_size == at[None] // block_size)[None]
    offset = np.equal.outer(at % block_size, at % block_size)
    earlier = at[None] // block_size < at[:, None] // block_size if causal else np.ones((L, L), bool)
    is_there = jnp.einsum("ij,bj->bi", jnp.asarray(offset & earlier, jnp.int32), mask.astype(jnp.int32)) > 0
    allowed = jnp.concatenate(
        [same & is_there[:, None, :], same & mask[:, None, :] & (jnp.tri(L, dtype=bool)[None] | (not causal))], 2
    )
    scores = jnp.where(allowed[:, None], jnp.einsum("bihd,bjhd->bhij", q, keys) * D**-0.5, -jnp.inf)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, axis=-1), values)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_dense_softmax(causal):
    B, L, H, D, b = 2, 20, 2, 3, 4
    with jax.enable_x64(True):
        q, k, v, dy = (jax.random.normal(key, (B, L, H, D), jnp.float64) for key in jax.random.split(jax.random.key(0), 4))
        scores = jax.random.normal(jax.random.key(1), (B, H, L // b, L // b), jnp.float64)
        mask = jnp.arange(L)[None] < jnp.array([[L], [14]])
        allowed = allowed_blocks(mask, b, causal=causal)

        def fast(q, k, v, scores):
            sort = sinkhorn(scores, allowed, 5, causal=causal)
            return sinkhorn_attention(q, k, v, sort, allowed, mask, block_size=b, causal=causal)

        def slow(q, k, v, scores):
            return dense(q, k, v, sinkhorn(scores, allowed, 5, causal=causal), mask, block_size=b, causal=causal)

        real = jnp.where(mask[..., None, None], 1.0, 0.0)  # a row of padding need not see anything
        results = [jax.vjp(jax.jit(lambda *a, f=f: real * f(*a)), q, k, v, scores) for f in (fast, slow)]
        (out, vjp), (expected, expected_vjp) = results
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)
        for ours, theirs in zip(jax.jit(vjp)(dy), jax.jit(expected_vjp)(dy)):
            assert np.all(np.isfinite(ours))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_a_hard_permutation_is_attention_to_that_block():
    L, b, order = 24, 6, (2, 0, 3, 1)
    q, k, v = (jax.random.normal(key, (1, L, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    scores = jnp.where(jax.nn.one_hot(jnp.array(order), 4) > 0, 50.0, -50.0)[None, None]
    mask = jnp.ones((1, L), bool)
    allowed = allowed_blocks(mask, b, causal=False)
    sort = jnp.broadcast_to(sinkhorn(scores, allowed, 3), (1, 2, 4, 4))
    out = jax.jit(lambda *a: sinkhorn_attention(*a, sort, allowed, mask, block_size=b))(q, k, v)
    pattern = masks.Blocks(b, tuple((i, j) for i, j in enumerate(order)))
    np.testing.assert_allclose(out, attend(q, k, v, mask=pattern), rtol=0, atol=1e-5)


def test_training_draws_noise_and_learns_to_sort():
    module = build(dict(name="sinkhorn", num_heads=2, block_size=4, max_length=32))
    x = jax.random.normal(jax.random.key(0), (2, 24, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    apply = jax.jit(lambda v, key: module.apply(v, x, Context(train=True), rngs={"dropout": key}))
    assert np.any(apply(variables, jax.random.key(0)) != apply(variables, jax.random.key(1)))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x, Context()) ** 2)))(variables)
    assert np.any(gradient["params"]["sort"]["kernel"] != 0)


def test_longer_rows_of_padding_change_nothing():
    """Whole blocks of padding are no blocks: the soft permutation is that of the real ones."""
    module = build(dict(name="sinkhorn", num_heads=2, block_size=4, max_length=32))
    x = jax.random.normal(jax.random.key(0), (2, 24, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x, Context())
    y = jax.jit(module.apply)(variables, x, Context(mask=jnp.arange(24)[None] < jnp.array([[24], [14]])))
    short = jax.jit(module.apply)(variables, x[1:, :14], Context())
    np.testing.assert_allclose(y[1, :14], short[0], rtol=0, atol=1e-5)


def test_errors_name_what_is_wrong():
    def start(length: int = 8, **arguments):
        build(dict(name="sinkhorn", **arguments)).init(jax.random.key(0), jnp.zeros((1, length, 8)), Context())

    with pytest.raises(ValueError, match="sinkhorn: a sequence of 33 positions is longer than max_length=32"):
        start(33, max_length=32)
    with pytest.raises(ConfigError, match=r"temperature=0.0 must be more than 0"):
        start(temperature=0.0)
    with pytest.raises(ConfigError, match="iterations=0 must be at least 1"):
        start(iterations=0)
