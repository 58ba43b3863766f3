"""BP-Transformer against its definition over explicit spans, coverage, and its limit (exact attention)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.bp_transformer import Edges, bp_attention, num_labels
from kernels.attention import attend, masks, tiles

B, H, D = 2, 2, 3


pytestmark = pytest.mark.usefixtures("quick_compile")


def walk(i: int, k: int, length: int) -> list[tuple[int, int, int, int]]:
    """(level, node, side, nodes of the level before it) for token i, taken node by node away from it on either side."""
    found = []
    for side, step in ((0, -1), (1, 1)):
        level, at = 0, i + step
        while 0 <= at << level < length:
            taken = 0
            while taken < k or (at % 2 == 0 if step < 0 else at % 2 == 1):  # the next node begins inside one of the next level
                if 0 <= at << level < length:
                    found.append((level, at, side, taken))
                at, taken = at + step, taken + 1
            level, at = level + 1, at >> 1
    return found


def definition(q, k, v, *, neighbours: int, causal: bool, bias, valid):
    """Dense, over all spans and the edges of `walk`."""
    L = q.shape[1]
    spans = [(level, node) for level in range(L.bit_length()) for node in range(-(-L // 2**level))]
    labels = np.full((L, len(spans)), -1)
    labels[np.arange(L), np.arange(L)] = 0
    for i in range(L):
        for level, node, side, offset in walk(i, neighbours, L):
            if not (causal and side):
                labels[i, spans.index((level, node))] = 1 + (2 * level + side) * (neighbours + 1) + offset
    inside = np.array([[j >> level == node for j in range(L)] for level, node in spans])[None] & valid[:, None]
    mean = jnp.einsum("bnj,bjhd->bnhd", inside / np.maximum(inside.sum(axis=2, keepdims=True), 1), q)
    scores = jnp.where(inside[:, None], jnp.einsum("bnhd,bjhd->bhnj", mean, k) / D**0.5, -1e30)
    keys, values = (jnp.einsum("bhnj,bjhd->bnhd", jax.nn.softmax(scores, axis=-1), x) for x in (k, v))
    seen = (labels >= 0)[None, None] & inside.any(axis=2)[:, None, None]
    scores = jnp.einsum("bihd,bnhd->bhin", q, keys) / D**0.5 + bias[None, :, np.maximum(labels, 0)]
    return jnp.einsum("bhin,bnhd->bihd", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), values)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("neighbours", [1, 2])
def test_is_its_definition_with_all_gradients(causal, neighbours):
    length = 13
    valid = np.arange(length)[None] < np.array([[length], [11]])
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, cotangent = (jnp.asarray(x) for x in rng.normal(size=(4, B, length, H, D)))
        bias = jnp.asarray(rng.normal(size=(H, num_labels(neighbours))))
        cotangent = cotangent * valid[..., None, None]

        def both(f):
            def masked(q, k, v, bias):
                return f(q, k, v, bias=bias, neighbours=neighbours, causal=causal, valid=valid) * valid[..., None, None]

            out, pullback = jax.vjp(masked, q, k, v, bias)
            return out, pullback(cotangent)

        ours = jax.jit(functools.partial(both, lambda *a, valid, **o: bp_attention(*a, valid=jnp.asarray(valid), **o)))()
        theirs = jax.jit(functools.partial(both, definition))()
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 16, 31, 64])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_every_token_is_reached_once(length, k):
    leaves = 1 << (length - 1).bit_length()
    for causal in (False, True):
        edges = Edges(k, leaves, length, causal)
        size = edges.first(edges.levels)
        tokens_of = np.concatenate([np.kron(np.eye(leaves >> n), np.ones((1, 1 << n))) for n in range(edges.levels)])
        reached = edges.allowed(np.arange(size - length, size)[:, None], np.arange(size)[None]) @ tokens_of
        np.testing.assert_array_equal(reached[:, :length], np.tril(np.ones((length, length))) if causal else 1)
    assert (
        edges.allowed(np.arange(size - length, size)[:, None], np.arange(size)[None]).sum(axis=1).max()
        <= 1 + (k + 1) * edges.levels
    )


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_hide_no_edge_and_skip_most(causal):
    edges = Edges(2, 512, 500, causal)
    size = edges.first(edges.levels)
    kinds = tiles.tables(edges, 500, size, 32, 32)[0]
    allowed = edges.allowed(np.arange(size - 500, size)[:, None], np.arange(size)[None])
    padded = np.pad(allowed, ((0, -500 % 32), (0, -size % 32))).reshape(-(-500 // 32), 32, -(-size // 32), 32)
    np.testing.assert_array_equal(kinds != masks.SKIP, padded.any(axis=(1, 3)))
    assert np.mean(kinds != masks.SKIP) < 0.5
    bounds = np.arange(0, 480, 32)
    skipped = (
        edges.tile(size - 500 + bounds[:, None], size - 500 + bounds[:, None] + 31, bounds[None], bounds[None] + 31) == masks.SKIP
    )
    assert not (skipped & padded[:15, :, :15].any(axis=(1, 3))).any()


@pytest.mark.parametrize("causal", [False, True])
def test_many_neighbours_are_exact_attention(causal):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in np.random.default_rng(1).normal(size=(3, B, 11, H, D)))
        ours = jax.jit(functools.partial(bp_attention, neighbours=11, causal=causal))(q, k, v)
        exact = attend(q, k, v, mask=masks.Causal() if causal else masks.Full(), implementation="reference")
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)


def test_errors():
    x = jnp.zeros((1, 8, 4))
    with pytest.raises(ConfigError, match="neighbours=0 must be at least 1"):
        build(dict(name="bp_transformer", num_heads=2, neighbours=0)).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="would share cells"):
        build(dict(name="bp_transformer")).init(jax.random.key(0), x, Context(segment_ids=jnp.zeros((1, 8), jnp.int32)))
