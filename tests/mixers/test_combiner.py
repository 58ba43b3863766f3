"""Combiner against its definition over explicit sets of tokens, its limits (exact attention), full support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.combiner import FACTORISATIONS, Tokens
from kernels.attention import Dropout, attend, masks

B, H, D, SIZE = 2, 2, 3, 4


pytestmark = pytest.mark.usefixtures("quick_compile")


def blocks_but_own(i, L):
    own = range(i // SIZE * SIZE, i // SIZE * SIZE + SIZE)
    return own, [range(start, start + SIZE) for start in range(0, L, SIZE) if start != own.start]


def siblings(i, L):
    """What is before i cut by the bits of i, from the highest on; what is after it likewise from the end."""
    parts, start, end = [], 0, 1 << (L - 1).bit_length()
    while end - start > 1:
        middle = (start + end) // 2
        start, end, other = (start, middle, range(middle, end)) if i < middle else (middle, end, range(start, middle))
        parts.append(other)
    return [i], parts


def columns_but_own_row(i, L):
    row = range(i // SIZE * SIZE, i // SIZE * SIZE + SIZE)
    return row, [[j for j in range(column, L, SIZE) if j not in row] for column in range(SIZE)]


def other_columns(i, L):
    return range(i % SIZE, L, SIZE), [range(column, L, SIZE) for column in range(SIZE) if column != i % SIZE]


SETS = {"fixed": blocks_but_own, "logsparse": siblings, "axial_rowmajor": columns_but_own_row, "axial_vertical": other_columns}


def definition(name: str, q, k, v, *, causal: bool, valid):
    """Dense, over all sets that the factorisation makes: those of one token that are direct, and the parts."""
    L = q.shape[1]
    seen = [[tuple(j for j in part if j < L and (j <= i or not causal)) for part in SETS[name](i, L)[1]] for i in range(L)]
    direct = [[(j,) for j in SETS[name](i, L)[0] if j < L and (j <= i or not causal)] for i in range(L)]
    sets = sorted({(is_part, s) for is_part, of in ((0, direct), (1, seen)) for row in of for s in row if s})
    edges = np.array([[s in (direct, seen)[is_part][i] for is_part, s in sets] for i in range(L)])
    inside = np.array([[j in s for j in range(L)] for _, s in sets])[None] & valid[:, None]
    q_part, k_part = (jnp.max(jnp.where(inside[..., None, None], x[:, None], -1e30), axis=2) for x in (q, k))
    scores = jnp.where(inside[:, None], jnp.einsum("bnhd,bjhd->bhnj", q_part, k) / D**0.5, -1e30)
    values = jnp.einsum("bhnj,bjhd->bnhd", jax.nn.softmax(scores, axis=-1), v)
    scores = jnp.einsum("bihd,bnhd->bhin", q, k_part) / D**0.5
    scores = jnp.where(edges[None, None] & inside.any(axis=2)[:, None, None], scores, -1e30)
    return jnp.einsum("bhin,bnhd->bihd", jax.nn.softmax(scores, axis=-1), values)


def run(name: str, q, k, v, *, causal: bool, valid=None, size: int = SIZE, dropout=None):
    valid = jnp.ones(q.shape[:2], bool) if valid is None else jnp.asarray(valid)
    tokens = Tokens(q, k, v, valid, causal, dropout, dict(scale=D**-0.5, implementation=None))
    return FACTORISATIONS[name](tokens, size)[:, : q.shape[1]]


def operands(length: int, seed: int = 0):
    return tuple(np.random.default_rng(seed).normal(size=(3, B, length, H, D)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FACTORISATIONS)
def test_is_its_definition_with_all_gradients(name, causal):
    length = 11
    valid = np.arange(length)[None] < np.array([[length], [7]])
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, operands(length)))
        cotangent = jnp.asarray(operands(length, seed=1)[0]) * valid[..., None, None]

        def both(f):
            out, pullback = jax.vjp(lambda *arrays: f(name, *arrays, causal=causal, valid=valid), *arrays)
            return out * valid[..., None, None], pullback(cotangent)

        ours, theirs = (jax.jit(functools.partial(both, f))() for f in (run, definition))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "length"), [("fixed", 1, 11), ("axial_rowmajor", 11, 22), ("axial_vertical", 24, 19), ("fixed", 24, 19)]
)
def test_parts_of_one_token_are_exact_attention(name, size, length, causal):
    """Blocks of one token; columns of two rows, of which one is the own; a single row; nothing but the own block."""
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, operands(length, seed=2)))
        ours = jax.jit(functools.partial(run, name, causal=causal, size=size))(*arrays)
        exact = attend(*arrays, mask=masks.Causal() if causal else masks.Full(), implementation="reference")
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FACTORISATIONS)
def test_weights_are_positive_and_sum_to_one(name):
    """The weights are the output where values are unit vectors: of each token, for each query."""
    length = 14
    q, k, _ = map(jnp.asarray, operands(length, seed=3))
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None, :], (B, length, H, length))
    q, k = (jnp.pad(x, ((0, 0),) * 3 + ((0, length - D),)) for x in (q, k))  # one head size for all
    for causal in (False, True):
        weights = jax.jit(functools.partial(run, name, causal=causal))(q, k, v)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
        allowed = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
        np.testing.assert_array_equal(weights > 0, np.broadcast_to(allowed[None, :, None, :], weights.shape))


@pytest.mark.parametrize("name", ["fixed", "logsparse"])
def test_dropout_keeps_the_mean(name):
    q, k, v = (jnp.asarray(x[:1], jnp.float32) for x in operands(6, seed=4))
    draws = jax.jit(jax.vmap(lambda key: run(name, q, k, v, causal=False, size=2, dropout=Dropout(0.5, key))))
    draws, whole = draws(jax.random.split(jax.random.key(0), 100)), run(name, q, k, v, causal=False, size=2)
    z = (draws.mean(axis=0) - whole) / (draws.std(axis=0) / 10)
    assert np.abs(z).max() < 5 and draws.std(axis=0).min() > 0.01


@pytest.mark.parametrize("name", ["fixed", "logsparse", "axial_vertical"])
def test_the_other_factorisations_decode_and_keep_the_future_out(name):
    """What the contract tests check of "axial_rowmajor"."""
    mixer = build(dict(name="combiner", num_heads=2, factorisation=name, size=4, causal=True))
    x = jax.random.normal(jax.random.key(0), (2, 11, 8))
    variables = jax.jit(mixer.init)(jax.random.key(1), x, Context())
    parallel = jax.jit(mixer.apply)(variables, x, Context())
    gradient = jax.jit(jax.grad(lambda x: mixer.apply(variables, x, Context())[:, 6].sum()))(x)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=(0, 2)), np.arange(11) <= 6)
    cache = jax.eval_shape(mixer.init, jax.random.key(0), x, Context(decode=True))["cache"]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
    step, outputs = jax.jit(lambda v, x: mixer.apply(v, x, Context(decode=True), mutable=["cache"])), []
    for part in (x[:, :5], x[:, 5:6], x[:, 6:]):
        y, updated = step({**variables, "cache": cache}, part)
        cache = updated["cache"]
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), parallel, atol=2e-6)


def test_errors():
    x = jnp.zeros((1, 8, 4))
    for arguments, error, message in (
        (dict(size=0), ConfigError, "size=0 must be at least 1"),
        (dict(factorisation="fixd"), ConfigError, r"fixd.*did you mean 'fixed'"),
        (dict(bias=dict(name="alibi")), ConfigError, "does not go with"),
    ):
        with pytest.raises(error, match=message):
            build(dict(name="combiner", num_heads=2, **arguments)).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="would share cells"):
        build(dict(name="combiner")).init(jax.random.key(0), x, Context(segment_ids=jnp.zeros((1, 8), jnp.int32)))
