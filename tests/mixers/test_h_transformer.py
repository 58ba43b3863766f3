"""H-Transformer-1D against its definition on every pair, its limits (exact attention), its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.h_transformer import hierarchical_attention, level_mask, padded_length
from kernels.attention import Dropout, attend, masks

B, H, G, D = 2, 4, 2, 3


pytestmark = pytest.mark.usefixtures("quick_compile")


def operands(length: int, seed: int = 0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, length, heads, D)).astype(dtype) for heads in (H, G, G))


def level_of(i: int, j: int, block: int) -> int:
    """The finest level at which i and j lie in the same or in neighbouring blocks."""
    level = 0
    while abs((i >> level) // block - (j >> level) // block) > 1:
        level += 1
    return level


def dense(q, k, v, *, block: int, causal: bool, valid=None):
    """The definition, pair by pair, in jnp of the inputs' type."""
    L = q.shape[1]
    valid = np.ones((B, L), bool) if valid is None else valid
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    levels = np.array([[level_of(i, j, block) for j in range(L)] for i in range(L)])
    scores = jnp.zeros((B, H, L, L), q.dtype)
    for level in range(levels.max() + 1):
        cells = np.arange(L) >> level
        same = (cells[:, None] == cells[None])[None] & valid[:, None, :]
        mean = jnp.asarray(same / np.maximum(same.sum(axis=-1, keepdims=True), 1), q.dtype)
        rows = q if causal else jnp.einsum("bij,bjhd->bihd", mean, q)
        columns = jnp.einsum("bij,bjhd->bihd", mean, k)
        scores = jnp.where((levels == level)[None, None], jnp.einsum("bihd,bjhd->bhij", rows, columns), scores)
    seen = valid[:, None, None, :] & ((np.tril(np.ones((L, L), bool)) if causal else np.ones((L, L), bool))[None, None])
    weights = jax.nn.softmax(jnp.where(seen, scores / D**0.5, -jnp.inf), axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [2, 4])
def test_is_its_definition_with_all_gradients(causal, block):
    length = 27
    valid = np.arange(length)[None] < np.array([[length], [17]])
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, operands(length)))
        cotangent = jnp.asarray(operands(length, seed=1)[0]) * valid[..., None, None]

        @functools.partial(jax.jit, static_argnums=0)
        def both(f, *arrays):
            out, pullback = jax.vjp(f, *arrays)
            return out * valid[..., None, None], pullback(cotangent)

        ours = both(functools.partial(hierarchical_attention, block_size=block, causal=causal, valid=jnp.asarray(valid)), *arrays)
        theirs = both(functools.partial(dense, block=block, causal=causal, valid=valid), *arrays)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 9, 16])
def test_two_blocks_are_exact_attention(causal, length):
    with jax.enable_x64(True):
        q, k, v = map(jnp.asarray, operands(length))
        ours = jax.jit(functools.partial(hierarchical_attention, block_size=8, causal=causal))(q, k, v)
        exact = attend(q, k, v, mask=masks.Causal() if causal else masks.Full(), implementation="reference")
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_that_are_constant_in_coarse_cells_are_exact(causal):
    """64 tokens in blocks of 4: cells of the coarsest level hold 8."""
    with jax.enable_x64(True):
        q, k, _ = (jnp.asarray(np.repeat(x, 8, axis=1)) for x in operands(8))
        v = jnp.asarray(operands(64, seed=2)[2])
        q = jnp.asarray(operands(64, seed=3)[0]) if causal else q  # only keys are averaged
        ours = jax.jit(functools.partial(hierarchical_attention, block_size=4, causal=causal))(q, k, v)
        exact = attend(q, k, v, mask=masks.Causal() if causal else masks.Full(), implementation="reference")
        other = jax.jit(functools.partial(hierarchical_attention, block_size=4, causal=causal))(q, k + 0.1 * v, v)
        changed = attend(q, k + 0.1 * v, v, mask=masks.Causal() if causal else masks.Full(), implementation="reference")
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)
    assert np.abs(other - changed).max() > 1e-3  # elsewhere it is an approximation


@pytest.mark.parametrize("causal", [False, True])
def test_levels_partition_the_pairs(causal):
    block, length = 4, 64
    assert padded_length(length, block) == length and padded_length(length + 1, block) == 2 * length
    position, count = np.arange(length), np.zeros((length, length), int)
    for level in range(4):
        cells = position >> level
        count += level_mask(level, block, causal).allowed(cells[:, None], cells[None])
    np.testing.assert_array_equal(count, np.tril(np.ones_like(count)) if causal else 1)


def test_float32_is_as_good_as_dense_float32():
    length = 40
    exact = operands(length, seed=4)
    with jax.enable_x64(True):
        truth = np.asarray(dense(*map(jnp.asarray, exact), block=4, causal=False))
    low = tuple(jnp.asarray(x, jnp.float32) for x in exact)
    ours = jax.jit(functools.partial(hierarchical_attention, block_size=4, causal=False))(*low)
    error, bound = (np.abs(x - truth).max() for x in (ours, dense(*low, block=4, causal=False)))
    assert error <= 2 * bound + 1e-6


def test_dropout_keeps_the_mean():
    """Weights are dropped at every level, and divided by what is kept."""
    q, k, v = (jnp.asarray(x[:1], jnp.float32) for x in operands(8))

    def drop(key):
        return hierarchical_attention(q, k, v, block_size=2, causal=False, dropout=Dropout(0.5, key))

    draws = jax.jit(jax.vmap(drop))(jax.random.split(jax.random.key(0), 100))
    whole = hierarchical_attention(q, k, v, block_size=2, causal=False)
    z = (draws.mean(axis=0) - whole) / (draws.std(axis=0) / 10)
    assert np.abs(z).max() < 5 and draws.std(axis=0).min() > 0.01


def test_memory_grows_as_the_length():
    def temporary_bytes(length):
        module = build(dict(name="h_transformer_1d", num_heads=1, causal=False))
        x = jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
        variables = jax.eval_shape(module.init, jax.random.key(0), x, Context())
        gradient = jax.grad(lambda variables, x: module.apply(variables, x, Context()).sum())
        return jax.jit(gradient).lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1024) < 2.5 * temporary_bytes(512)


def test_state_and_errors():
    mixer = dict(name="h_transformer_1d", num_heads=2, causal=True)
    x = jnp.zeros((1, 8, 4))
    assert state_size(mixer, 100, 8) - state_size(mixer, 10, 8) == 90 * 2 * 8 * 4  # keys and values, float32
    with pytest.raises(ConfigError, match="block_size=3 must be even"):
        build(dict(mixer, block_size=3)).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="would share cells"):
        build(mixer).init(jax.random.key(0), x, Context(segment_ids=jnp.zeros((1, 8), jnp.int32)))
    with pytest.raises(ConfigError, match=r"'alibi'.* does not go with"):
        build(dict(mixer, bias=dict(name="alibi"))).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="only causal"):
        build(dict(mixer, causal=False)).init(jax.random.key(0), x, Context(decode=True))
