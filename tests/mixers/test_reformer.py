"""Reformer: independent implementations, the softmax over what the rounds see, hashing, documents, cost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.content import take
from efficient_attn.mixers.lsh import angular_hash, draw_rotations, lsh_attention, merge_rounds, others, window_attention
from kernels.attention import attend, masks

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation
SELF_ONLY = 0.03  # and for rows that see only themselves
LSH = ["reformer_lsh_1hash_causal", "reformer_lsh_1hash_bidir", "reformer_lsh_4hash_causal"]


pytestmark = pytest.mark.usefixtures("quick_compile")


def load(oracle_dir, name: str):
    """The hyper-parameters and the arrays."""
    hyper = json.loads((oracle_dir / f"{name}.json").read_text())["hyper"]
    return hyper, {key: jnp.asarray(x) for key, x in np.load(oracle_dir / f"{name}.npz").items()}


def heads_of(x, weight, heads: int):
    """[B, L, H, D] by torch's Linear weight (out, in)."""
    return (x @ weight.T).reshape(*x.shape[:2], heads, -1)


@pytest.mark.parametrize("name", LSH)
def test_hashes_are_those_of_an_independent_implementation(oracle_dir, name):
    hyper, arrays = load(oracle_dir, name)
    qk = heads_of(arrays["in.x"], arrays["w.query_key.weight"], hyper["heads"])
    buckets = angular_hash(qk, arrays["in.rotations"], (hyper["num_buckets"],))
    np.testing.assert_array_equal(buckets, arrays["aux.buckets"])


def one_row_of_rounds(qk, v, buckets, hyper):
    """transformers' departure from the paper: the sorted rounds are one circle, in which a chunk sees all of its neighbour."""
    (B, L, H, D), R = qk.shape, buckets.shape[2]
    order = jnp.argsort(buckets, axis=-1, stable=True).astype(jnp.int32).reshape(B * H, R * L)
    k = qk * jax.lax.rsqrt(jnp.mean(qk**2, axis=-1, keepdims=True) + 1e-6) * D**-0.5
    rows = (take(jnp.moveaxis(x, 2, 1).reshape(B * H, L, D), order) for x in (qk, k, v))
    out, lse = window_attention(
        *rows,
        positions=order,
        segments=jnp.zeros_like(order),
        mask=others(hyper["causal"]),
        size=hyper["chunk_length"],
        before=hyper["chunks_before"],
        after=hyper["chunks_after"],
        circular=True,
        scale=1.0,
    )
    back = jnp.argsort(order.reshape(B * H * R, L), axis=-1)
    out, lse = merge_rounds(out.reshape(B * H * R, L, D), lse.reshape(B * H * R, L), back, (B, H, R))
    return jnp.where((lse == -jnp.inf)[..., None], v, out)


@pytest.mark.parametrize("name", LSH)
def test_lsh_oracle(oracle_dir, name):
    hyper, arrays = load(oracle_dir, name)
    x = arrays["in.x"]
    qk, v = (heads_of(x, arrays[f"w.{part}.weight"], hyper["heads"]) for part in ("query_key", "value"))
    out = jax.jit(lambda qk, v: one_row_of_rounds(qk, v, arrays["aux.buckets"], hyper))(qk, v).reshape(arrays["out.y"].shape)
    alone = arrays["aux.rows_self_only"][..., None]
    assert not bool(alone.all())
    np.testing.assert_allclose(jnp.where(alone, 0, out), jnp.where(alone, 0, arrays["out.y"]), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out, arrays["out.y"], rtol=0, atol=SELF_ONLY)
    options = dict(chunk_size=hyper["chunk_length"], look_back=hyper["chunks_before"], look_ahead=hyper["chunks_after"])
    options |= dict(across_buckets=True, correct_duplicates=False, causal=hyper["causal"])
    ours = jax.jit(lambda qk, v: lsh_attention(qk, v, arrays["aux.buckets"], **options))(qk, v)
    rank = jnp.argsort(jnp.argsort(arrays["aux.buckets"], axis=-1, stable=True), axis=-1)
    is_inner = jnp.all((rank >= hyper["chunk_length"]), axis=2).swapaxes(1, 2) & ~alone  # what no end joined to the other changes
    expected = arrays["out.y"].reshape(ours.shape)
    assert float(jnp.mean(is_inner)) > 0.3 and hyper["chunks_after"] == 0
    np.testing.assert_allclose(*(jnp.where(is_inner[..., None], y, 0) for y in (ours, expected)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["reformer_local_causal", "reformer_local_bidir"])
def test_local_oracle(oracle_dir, name):
    """Its bidirectional form joins the ends to a circle; `block_local` is the same but for that."""
    hyper, arrays = load(oracle_dir, name)
    x, (B, L, E) = arrays["in.x"], arrays["in.x"].shape
    heads = hyper.get("heads", 2)
    q, k, v = (heads_of(x, arrays[f"w.{part}.weight"], heads) for part in ("query", "key", "value"))
    rows = (jnp.moveaxis(y, 2, 1).reshape(B * heads, L, -1) for y in (q, k, v))
    at = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B * heads, L))
    mask = masks.Causal() if hyper["causal"] else masks.Full()
    sizes = dict(size=hyper["chunk"], before=hyper["before"], after=hyper["after"])
    out, _ = window_attention(*rows, positions=at, segments=jnp.zeros_like(at), mask=mask, circular=True, **sizes)
    out = jnp.moveaxis(out.reshape(B, heads, L, -1), 1, 2).reshape(B, L, E)
    np.testing.assert_allclose(out, arrays["out.y"], rtol=0, atol=TOLERANCE)
    mixer = dict(look_back=hyper["before"], look_ahead=hyper["after"], causal=hyper["causal"])
    block_local = build(dict(name="block_local", num_heads=heads, block_size=hyper["chunk"], **mixer))
    out = attend(q, k, v, mask=block_local.mask(L)).reshape(B, L, E)
    inner = slice(hyper["before"] * hyper["chunk"], L - hyper["after"] * hyper["chunk"])
    np.testing.assert_allclose(out[:, inner], arrays["out.y"][:, inner], rtol=0, atol=TOLERANCE)


def dense(qk, v, buckets, *, chunk, back, ahead, causal, across, corrected, groups):
    """Softmax over the union of what the rounds see (or over the multiset, if not corrected), from [L, L] tables."""
    B, L, H, D = qk.shape
    count = jnp.zeros((B, H, L, L), jnp.int32)
    ids = jnp.broadcast_to(groups[:, None], (B, H, L))
    for r in range(buckets.shape[2]):
        rank = jnp.argsort(jnp.argsort(ids * 1000 + buckets[:, :, r], axis=-1, stable=True), axis=-1) // chunk
        near = rank[..., :, None] - rank[..., None, :]
        same = (buckets[:, :, r, :, None] == buckets[:, :, r, None, :]) | across
        count += (near <= back) & (near >= -ahead) & same & (ids[..., :, None] == ids[..., None, :])
    count = jnp.where(jnp.eye(L, dtype=bool) | (causal & ~jnp.tri(L, dtype=bool)), 0, count)
    k = qk * jax.lax.rsqrt(jnp.mean(qk**2, axis=-1, keepdims=True) + 1e-6) * D**-0.5
    scores = jnp.einsum("bihd,bjhd->bhij", qk, k)
    weights = jnp.minimum(count, 1) if corrected else count
    weights = weights * jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhij,bjhd->bihd", weights / jnp.where(total > 0, total, 1), v)
    return jnp.where(jnp.moveaxis(total > 0, 1, 2), out, v), count


CASES = {
    "paper": dict(),
    "causal": dict(causal=True),
    "multiset": dict(causal=True, corrected=False),
    "across": dict(across=True, ahead=1),
    "documents": dict(causal=True, documents=True),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_softmax_over_what_the_rounds_see(case):
    options = dict(causal=False, across=False, corrected=True, ahead=0, documents=False) | CASES[case]
    B, L, H, D = 2, 37, 2, 4
    with jax.enable_x64(True):
        qk, v, dy = (jax.random.normal(key, (B, L, H, D), jnp.float64) for key in jax.random.split(jax.random.key(0), 3))
        groups = (jnp.arange(L, dtype=jnp.int32) // 15 if options.pop("documents") else jnp.zeros(L, jnp.int32))[None]
        groups = jnp.broadcast_to(groups, (B, L))
        buckets = angular_hash(qk, draw_rotations(jax.random.key(1), H, D, 3, (6,)), (6,))

        def fast(qk, v):
            return lsh_attention(
                qk, v, buckets, chunk_size=5, look_ahead=options["ahead"], causal=options["causal"], groups=groups,
                across_buckets=options["across"], correct_duplicates=options["corrected"],
            )  # fmt: skip

        def slow(qk, v):
            return dense(qk, v, buckets, chunk=5, back=1, groups=groups, **options)

        out, vjp = jax.vjp(jax.jit(fast), qk, v)
        expected, expected_vjp, count = jax.vjp(jax.jit(slow), qk, v, has_aux=True)
        assert int(count.max()) > 1 and float(jnp.mean(count > 0)) < 0.8
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)
        for ours, theirs in zip(jax.jit(vjp)(dy), expected_vjp(dy)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_float32_error_is_within_twice_that_of_the_dense_form():
    B, L, H, D = 1, 64, 2, 8
    qk, v = (3 * jax.random.normal(key, (B, L, H, D)) for key in jax.random.split(jax.random.key(0)))
    buckets = angular_hash(qk, draw_rotations(jax.random.key(1), H, D, 2, (4,)), (4,))
    options = dict(chunk=16, back=1, ahead=0, causal=True, across=False, corrected=True, groups=jnp.zeros((B, L), jnp.int32))
    slow = jax.jit(lambda qk, v: dense(qk, v, buckets, **options)[0])
    with jax.enable_x64(True):
        truth = np.asarray(slow(qk.astype(jnp.float64), v.astype(jnp.float64)))
    fast = jax.jit(lambda qk, v: lsh_attention(qk, v, buckets, chunk_size=16, causal=True))
    error, allowed = (np.max(np.abs(np.asarray(f(qk, v)) - truth)) for f in (fast, slow))
    assert error <= 2 * allowed + 1e-6


def test_one_bucket_and_chunk_is_softmax_over_all_others():
    qk, v = (jax.random.normal(key, (2, 33, 2, 4)) for key in jax.random.split(jax.random.key(0)))
    buckets = jnp.zeros((2, 2, 1, 33), jnp.int32)
    out = jax.jit(lambda qk, v: lsh_attention(qk, v, buckets, chunk_size=33))(qk, v)
    k = qk / jnp.linalg.norm(qk, axis=-1, keepdims=True)
    expected = jax.jit(lambda q, k, v: attend(q, k, v, mask=~masks.Band(0, 0), scale=1.0))(qk, k, v)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_collisions_fall_with_the_angle():
    """At angle 0 all, at pi none; by two buckets with the closed form 1 - angle / pi, by more in the order of the angles."""
    draws, D, angles = 4000, 16, np.linspace(0, np.pi, 7)
    base = np.eye(D)[0]
    x = jnp.asarray(np.stack([np.cos(a) * base + np.sin(a) * np.eye(D)[1] for a in angles]), jnp.float32)
    x = jnp.broadcast_to(jnp.concatenate([jnp.asarray(base, jnp.float32)[None], x])[None, :, None], (1, 8, 1, D))
    rates = {}
    for n in (2, 8, 32):
        buckets = angular_hash(x, draw_rotations(jax.random.key(n), 1, D, draws, (n,)), (n,))[0, 0]
        rates[n] = np.asarray(jnp.mean(buckets[:, :1] == buckets[:, 1:], axis=0))
        assert rates[n][0] == 1 and rates[n][-1] == 0
        assert np.all(np.diff(rates[n][:5]) < 0) and np.all(np.diff(rates[n]) <= 0)
    closed = 1 - angles / np.pi
    z = (rates[2] - closed)[1:-1] / np.sqrt(closed * (1 - closed) / draws)[1:-1]
    assert np.all(np.abs(z) < 4)
    assert np.all(rates[32][1:-1] < rates[8][1:-1]) and np.all(rates[8][1:-1] < rates[2][1:-1])


def test_factors_are_the_digits_of_a_bucket():
    x = jax.random.normal(jax.random.key(0), (1, 50, 2, 4))
    rotations = draw_rotations(jax.random.key(1), 2, 4, 3, (4, 6))
    parts = angular_hash(x, rotations[..., :2], (4,)), angular_hash(x, rotations[..., 2:], (6,))
    np.testing.assert_array_equal(angular_hash(x, rotations, (4, 6)), parts[0] * 6 + parts[1])


def module_and_input(length: int, **arguments):
    module = build(dict(name="reformer", num_heads=2, num_buckets=4, **dict(chunk_size=8) | arguments))
    x = jax.random.normal(jax.random.key(0), (2, length, 8))
    return module, jax.jit(module.init)(jax.random.key(1), x, Context()), x


def test_padding_is_as_if_it_were_not_there():
    module, variables, x = module_and_input(40, causal=True)
    mask = jnp.arange(40)[None, :] < jnp.array([[40], [27]])
    y = jax.jit(module.apply)(variables, x, Context(mask=mask))
    short = jax.jit(module.apply)(variables, x[1:, :27], Context())
    np.testing.assert_allclose(y[1, :27], short[0], rtol=0, atol=1e-5)


def test_hashes_are_drawn_anew_in_training_alone():
    module, variables, x = module_and_input(40)
    apply = jax.jit(lambda key: module.apply(variables, x, Context(train=True), rngs={"dropout": key}))
    assert np.any(apply(jax.random.key(0)) != apply(jax.random.key(1)))
    np.testing.assert_array_equal(apply(jax.random.key(0)), apply(jax.random.key(0)))
    fixed = build(dict(name="reformer", num_heads=2, num_buckets=4, chunk_size=8, resample=False))
    np.testing.assert_array_equal(
        jax.jit(fixed.apply)(variables, x, Context(train=True)), jax.jit(module.apply)(variables, x, Context())
    )


def test_nothing_grows_with_the_square_of_the_length():
    """The largest array of the backward pass, too, doubles with the length."""

    def largest(length: int) -> int:
        module = build(dict(name="reformer", num_heads=1, chunk_size=16, rounds=2))
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context()), x)
        step = jax.jit(jax.grad(lambda v, x: jnp.sum(module.apply(v, x, Context())), argnums=1))
        return step.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert largest(2048) < 2.5 * largest(1024)


def test_errors_name_what_is_wrong():
    x = jnp.zeros((1, 8, 8))
    with pytest.raises(ConfigError, match="num_buckets=3; give an even number"):
        build(dict(name="reformer", num_buckets=3)).init(jax.random.key(0), x, Context())
    with pytest.raises(ConfigError, match=r"chunk_size=0 must be at least 1"):
        build(dict(name="reformer", chunk_size=0)).init(jax.random.key(0), x, Context())
    with pytest.raises(ValueError, match="reformer: what a token sees depends on later tokens"):
        build(dict(name="reformer", causal=True)).init(jax.random.key(0), x, Context(decode=True))
    with pytest.raises(ConfigError, match=r"model.bias does not go with the mixer 'reformer'"):
        build(dict(name="reformer")).init(jax.random.key(0), x, Context(bias=object()))
    with pytest.raises(ValueError, match=r"buckets=\(4,\) for 3 rotated axes"):
        angular_hash(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 4, 1, 3)), (4,))
