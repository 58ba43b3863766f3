"""Every bias through every implementation, each bias's closed form, and the merging of parts."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.attention import biases, chunked, explain, masks, portable
from kernels.attention.api import IMPLEMENTATIONS
from kernels.attention.call import Call
from tests.kernels import attention_bias_cases as cases
from tests.kernels import attention_cases

FAST = sorted(set(IMPLEMENTATIONS) - attention_cases.TESTED_APART - {"reference"})
TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 16 x 32, so that short sequences have many."""
    monkeypatch.setattr(chunked, "TILE_SIZES", attention_cases.SMALL_TILES)


def leaves_of(implementation: str, name: str, dtype) -> list[np.ndarray]:
    """out, lse (where it has one that is differentiable), and the gradients by q, k, v and all arrays of the bias."""
    q, k, v = cases.arguments(dtype)
    bias = cases.make(name, dtype)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), dtype)

    def loss(q, k, v, bias):
        out, lse = attention.attend(
            q, k, v, mask=masks.Causal(), bias=bias, return_lse=True, implementation=implementation
        )  # fmt: skip
        return (out * weights).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * weights[..., 0]).sum(), (out, lse)

    results = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, bias)
    return [np.asarray(x) for x in jax.tree.leaves(results)]


@functools.cache
def dense(name: str, dtype) -> list[np.ndarray]:
    with jax.enable_x64(dtype == jnp.float64):
        return leaves_of("reference", name, dtype)


def why_not(implementation: str, name: str) -> str | None:
    """The reason the implementation refuses the bias, or None."""
    choice = explain(
        *cases.arguments(jnp.float32), bias=cases.make(name, jnp.float32), return_lse=True, implementation="reference"
    )
    reason = choice.others[implementation]
    return reason if reason.startswith("cannot") else None


@pytest.mark.parametrize("name", cases.BIASES)
@pytest.mark.parametrize("implementation", FAST)
def test_every_bias_in_every_implementation(small_tiles, quick_compile, implementation, name):
    """An error of at most twice that of the dense float32 form against float64, + 1e-6.

    A number of a bias may sum up the gradients of n pairs, whose rounding errors add up like a random walk: + 1e-6 sqrt(n).
    """
    reason = why_not(implementation, name)
    if reason is not None:
        pytest.skip(f"{implementation} {reason}")
    exact = dense(name, jnp.float64)
    assert sum(not np.any(x) for x in exact) == cases.WITHOUT_GRADIENT.get(name, 0)
    single = zip(leaves_of(implementation, name, jnp.float32), dense(name, jnp.float32), exact, strict=True)
    for i, (x, y, truth) in enumerate(single):
        finite = np.isfinite(truth)
        assert np.isfinite(x[finite]).all()
        pairs = cases.PAIRS / x.size if 3 <= i < len(exact) - 2 else 1  # between those of q, k, v and out, lse: the bias's
        assert abs(x - truth)[finite].max() <= 2 * abs(y - truth)[finite].max() + 1e-6 * math.sqrt(max(1, pairs))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, made in cases.BIASES.items() if not made(np.random.default_rng(0)).gathers])
def test_rules_that_gather_nothing_lower_for_a_gpu(name):
    """Forward and all gradients, on a machine without one: no array is captured, and Triton has every operation."""

    def loss(q, k, v, bias):
        call = Call(q, k, v, bias, *[None] * 5, mask=masks.Causal(), softcap=None, scale=0.5)
        out, lse = portable.attend(call, interpret=False)
        return out.sum() + lse.sum()

    arguments = *cases.arguments(jnp.float32), cases.make(name, jnp.float32)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") >= 3


def scores_of(bias, score=0.0, heads=3, L=9, S=12):
    """What the bias makes of equal scores: [H, L, S] with queries at 3 .. 11 and keys at 0 .. 11."""
    q_pos, kv_pos = jnp.arange(S - L, S)[None, None, :, None], jnp.arange(S)[None, None, None]
    return np.asarray(bias.score(jnp.full((1, heads, L, S), score), q_pos, kv_pos, jnp.arange(heads)[None, :, None, None]))[0]


RELATIVE = np.arange(12)[None, :] - np.arange(3, 12)[:, None]
R1, R2 = np.array([0.5, 1.0, 2.0]), np.array([0.3, 1.0, 1.7])


def by_head(values):
    return np.asarray(values)[:, None, None]


CLOSED_FORMS = {
    "alibi": (biases.ALiBi(R1), 0.7, lambda d: 0.7 - by_head(R1) * d),
    "kerple, logarithmic": (biases.KerpleLog(R1, R2), 0.0, lambda d: -by_head(R1) * np.log(1 + by_head(R2) * d)),
    "kerple, power": (biases.KerplePower(R1, R2), 0.0, lambda d: -by_head(R1) * d ** by_head(R2)),
    "sandwich": (
        biases.Sandwich(R1, dim=6), 0.1, lambda d: 0.1 + sum(np.cos(d * 10_000 ** (-n / 3)) for n in range(3)) / by_head(R1)
    ),
    "distance-aware": (
        biases.DistanceAware(R1 - 1, R2), 2.0,
        lambda d: 2.0 * (1 + np.exp(by_head(R2))) / (1 + np.exp(by_head(R2) - by_head(R1 - 1) * d)),
    ),
    "distance-aware, negative score": (biases.DistanceAware(R1, R2), -2.0, lambda d: np.zeros((3, *d.shape))),
}  # fmt: skip


@pytest.mark.parametrize(("bias", "score", "expected"), CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_closed_forms(bias, score, expected):
    np.testing.assert_allclose(scores_of(jax.tree.map(jnp.asarray, bias), score), expected(abs(RELATIVE)), atol=2e-5)


def test_distance_aware_limits():
    """f(0) = 1, and f tends to 1 + e^v for w > 0 and to 0 for w < 0 (Wu et al. 2021, section 3.2), without overflow."""
    bias = biases.DistanceAware(jnp.array([1.0, -1.0]), jnp.array([0.5, 0.5]))
    far = bias.score(jnp.ones((1, 2, 1, 2)), jnp.zeros((1, 1, 1, 1), int), jnp.array([0, 10_000])[None, None, None], None)
    np.testing.assert_allclose(far[0, :, 0], [[1, 1 + math.exp(0.5)], [1, 0]], atol=1e-6)
    w = jax.grad(lambda w: biases.DistanceAware(w, bias.v).score(
        jnp.ones((1, 2, 1, 1)), jnp.zeros((1, 1, 1, 1), int), jnp.full((1, 1, 1, 1), 10_000), None
    ).sum())(bias.w)  # fmt: skip
    assert np.isfinite(w).all()


@pytest.fixture(scope="module")
def alibi(oracle_dir):
    return np.load(oracle_dir / "alibi.npz"), json.loads((oracle_dir / "alibi.json").read_text())["hyper"]


def test_alibi_slopes_are_the_papers(alibi):
    """Bloom's for every head count of the oracle; MPT's only where both agree, for powers of two."""
    arrays, _ = alibi
    counts = [int(name.rsplit("_", 1)[1]) for name in arrays if name.startswith("out.bloom_slopes_")]
    assert counts
    for n in counts:
        np.testing.assert_allclose(biases.alibi_slopes(n), arrays[f"out.bloom_slopes_{n}"], rtol=1e-6)
        if n & (n - 1) == 0:
            np.testing.assert_allclose(biases.alibi_slopes(n), arrays[f"out.mpt_slopes_{n}"], rtol=1e-6)
    with pytest.raises(ValueError, match="num_heads=0"):
        biases.alibi_slopes(0)


def test_alibi_bias_of_x_transformers(alibi):
    arrays, _ = alibi
    for name in (n for n in arrays if n.startswith("out.xtransformers_bias_")):
        heads, L, S = arrays[name].shape
        ours = scores_of(biases.ALiBi(jnp.asarray(biases.alibi_slopes(heads))), heads=heads, L=L, S=S)
        np.testing.assert_allclose(ours, arrays[name], atol=TOLERANCE)


def test_alibi_attention_of_bloom(alibi):
    arrays, hyper = alibi
    x = arrays["in.x"]
    fused = x @ arrays["w.query_key_value.weight"].T + arrays["w.query_key_value.bias"]
    q, k, v = jnp.moveaxis(jnp.asarray(fused).reshape(*x.shape[:2], hyper["heads"], 3, hyper["head_dim"]), 3, 0)
    out = attention.attend(q, k, v, mask=masks.Causal(), bias=biases.ALiBi(jnp.asarray(biases.alibi_slopes(hyper["heads"]))))
    ours = out.reshape(x.shape) @ arrays["w.dense.weight"].T
    np.testing.assert_allclose(np.asarray(ours) + arrays["w.dense.bias"], arrays["out.bloom_attention_y"], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["t5_bias_bidir", "t5_bias_causal"])
def test_t5_against_its_own_attention(oracle_dir, case):
    """Buckets of all distances, the bias, and attention without 1/sqrt(D)."""
    arrays, hyper = np.load(oracle_dir / f"{case}.npz"), json.loads((oracle_dir / f"{case}.json").read_text())["hyper"]
    rule = biases.T5Buckets(hyper["num_buckets"], hyper["max_distance"], bidirectional=not hyper["causal"])
    np.testing.assert_array_equal(rule(jnp.zeros((), jnp.int32), jnp.asarray(arrays["in.rel"])), arrays["out.bucket_of_rel"])
    bias = biases.Bucketed(jnp.asarray(arrays["w.relative_attention_bias.weight"].T), rule)
    B, L, _ = arrays["in.x"].shape
    np.testing.assert_allclose(scores_of(bias, heads=hyper["heads"], L=L, S=L), arrays["out.bias"], atol=1e-6)
    q, k, v = (
        jnp.asarray(arrays["in.x"] @ arrays[f"w.{n}.weight"].T).reshape(B, L, hyper["heads"], hyper["d_kv"]) for n in "qkv"
    )
    mask = masks.Causal() if hyper["causal"] else masks.Full()
    ours = attention.attend(q, k, v, bias=bias, mask=mask, scale=1.0).reshape(B, L, -1) @ arrays["w.o.weight"].T
    np.testing.assert_allclose(ours, arrays["out.y"], atol=TOLERANCE)


@pytest.mark.parametrize("buckets", [(2, 128), (6, 128), (32, 8)])
def test_buckets_that_cannot_be_shared_out(buckets):
    with pytest.raises(ValueError, match="num_buckets must be a positive multiple of 4"):
        biases.T5Buckets(*buckets)


def test_a_chain_gathers_where_a_part_does():
    alibi, t5 = biases.ALiBi(R1), biases.Bucketed(np.zeros((3, 32)))
    assert t5.gathers and not alibi.gathers
    assert biases.Chain((alibi, t5)).gathers and not biases.Chain((alibi, alibi)).gathers
    assert biases.At(t5, None, None).gathers
    assert biases.chain(None, alibi) is alibi and biases.chain(None) is None and biases.chain(alibi, t5).parts == (alibi, t5)


SPLITS = {
    "near and far": [masks.Causal() & masks.Window(5), masks.Causal() & ~masks.Window(5)],
    "before, at and after": [masks.Causal() & ~masks.Window(1), masks.Window(1), ~masks.Causal()],
    "one empty": [masks.Full(), ~masks.Full()],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_merging_parts_is_attention_over_their_union(small_tiles, quick_compile, split):
    """Forward and gradients of out and lse, rows without a key included (the queries that stand before all keys)."""
    whole = functools.reduce(lambda a, b: a | b, split)
    with jax.enable_x64(True):
        k, q, v = cases.arguments(jnp.float64)  # more queries than keys: the first see nothing before them
        v = v[:, : k.shape[1]]

        def merged(q, k, v):
            return attention.merge([attention.attend(q, k, v, mask=mask, return_lse=True) for mask in split])

        def union(q, k, v):
            return attention.attend(q, k, v, mask=whole, return_lse=True, implementation="reference")

        def run(fn):
            def loss(q, k, v):
                out, lse = fn(q, k, v)
                return (jnp.sin(out) + jnp.where(jnp.isfinite(lse), lse, 0)[..., None] ** 2).sum(), (out, lse)

            return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

        for x, y in zip(jax.tree.leaves(run(merged)), jax.tree.leaves(run(union)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def test_merging_nothing_with_nothing():
    out, lse = jnp.zeros((1, 2, 1, 3)), jnp.full((1, 2, 1), -jnp.inf)
    both, total = attention.merge([(out, lse), (out, lse)])
    assert not both.any() and np.isneginf(total).all()
    gradient = jax.grad(lambda lse: attention.merge([(out, lse), (out, lse)])[0].sum())(lse)
    assert not gradient.any()
    with pytest.raises(ValueError, match="merge: parts of shapes"):
        attention.merge([(out, lse), (out[:, :1], lse[:, :1])])
