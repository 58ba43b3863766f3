"""Nyström attention: against an independent implementation, against its formula, and its limits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build
from efficient_attn.mixers.nystrom import convolution, landmarks, nystrom, pseudo_inverse
from kernels.attention import attend

TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("name", ["nystromformer", "nystromformer_conv"])
def test_oracle(oracle_dir, name):
    hyper = json.loads((oracle_dir / f"{name}.json").read_text())["hyper"]
    a = {key: jnp.asarray(x) for key, x in np.load(oracle_dir / f"{name}.npz").items()}
    heads, taps = hyper["heads"], hyper["conv_kernel"] or 0
    x, width = a["in.x"], a["in.x"].shape[-1]
    assert x.shape[1] == hyper["N"]
    largest = float(jnp.max(jnp.abs(a["aux.pinv"])))
    inverse = pseudo_inverse(a["aux.kernel2"], init="original")
    np.testing.assert_allclose(inverse, a["aux.pinv"], rtol=0, atol=TOLERANCE * largest)
    params = {
        part: {
            "kernel": a[f"w.{part}.weight"].T.reshape(width, heads, -1),
            "bias": a[f"w.{part}.bias"].reshape(heads, -1),
        }
        for part in ("query", "key", "value")
    }
    params["out"] = {"kernel": jnp.eye(width).reshape(heads, -1, width), "bias": jnp.zeros(width)}
    if taps:
        params["conv"] = a["w.conv.weight"][:, 0, :, 0].T
    mixer = dict(name="nystrom", num_heads=heads, num_landmarks=hyper["landmarks"], conv_kernel=taps, pinv_init="original")
    y = jax.jit(build(mixer).apply)({"params": params}, x, Context())
    np.testing.assert_allclose(y, a["out.y"], rtol=0, atol=TOLERANCE)


def qkv(length: int, dtype=jnp.float32, heads: int = 2):
    return tuple(jax.random.normal(key, (2, length, heads, 4), dtype) for key in jax.random.split(jax.random.key(0), 3))


def dense(q, k, v, runs: list[list[int]], iterations: int):
    """The formula with [L, m] matrices, of one row whose landmarks are the means over `runs`."""
    scale = q.shape[-1] ** -0.5
    q_mean, k_mean = (jnp.stack([x[:, jnp.array(run)].mean(axis=1) for run in runs], axis=1) for x in (q, k))

    def softmax(a, b):
        return jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", a, b) * scale, axis=-1)

    kernel = softmax(q_mean, k_mean)
    z = jnp.swapaxes(kernel, -1, -2) / kernel.sum(-2).max(-1)[..., None, None]
    one = jnp.eye(len(runs))[None, None]
    for _ in range(iterations):
        az = kernel @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return jnp.einsum("bhij,bjhd->bihd", softmax(q, k_mean) @ z @ softmax(q_mean, k), v)


def test_equals_the_formula_with_all_gradients_and_padding_takes_no_part():
    """11 real tokens of 14 in 4 runs of 3, 3, 3, 2."""
    with jax.enable_x64(True):
        q, k, v = qkv(14, jnp.float64)
        mask = jnp.broadcast_to(jnp.arange(14) < 11, (2, 14))
        ours = jax.jit(lambda *a: nystrom(*a, mask, 4)[:, :11])
        theirs = jax.jit(lambda *a: dense(*(x[:, :11] for x in a), runs, 6))
        runs = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
        g = jax.random.normal(jax.random.key(1), (2, 11, 2, 4), jnp.float64)
        expected, expected_vjp = jax.vjp(theirs, q, k, v)
        out, vjp = jax.vjp(ours, q, k, v)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(vjp(g), expected_vjp(g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
        low = [x.astype(jnp.float32) for x in (q, k, v)]
        error, dense_error = (float(jnp.max(jnp.abs(f(*low) - expected))) for f in (ours, theirs))
        assert error <= 2 * dense_error + 1e-6


def test_landmarks_of_few_tokens():
    mask = jnp.array([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1], [0] * 7], bool)
    runs, is_there = landmarks(mask, 4)
    assert is_there.tolist() == [[True] * 3 + [False], [True] * 4, [False] * 4]
    assert runs[0, :3].tolist() == [0, 1, 2]
    assert runs[1][mask[1]].tolist() == [0, 0, 1, 2, 2, 3]
    q, k, v = (jnp.concatenate([x, x[:1]])[:, :7] for x in qkv(9))

    out, vjp = jax.jit(lambda *qkv: jax.vjp(lambda *qkv: nystrom(*qkv, mask, 4), *qkv))(q, k, v)
    assert all(np.all(np.isfinite(x)) for x in jax.jit(vjp)(out))
    np.testing.assert_array_equal(out[2], 0.0)


def test_few_tokens_and_few_positions_are_attended_exactly():
    """As many landmarks as real tokens: A Z A = A, once the iteration has converged; as many as positions: no landmarks."""
    with jax.enable_x64(True):
        q, k, v = qkv(9, jnp.float64)
        mask = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
        exact = attend(q[:, :6], k[:, :6], v[:, :6])
        run = jax.jit(nystrom, static_argnums=4, static_argnames="iterations")
        np.testing.assert_allclose(run(q, k, v, mask, 6, iterations=40)[:, :6], exact, rtol=0, atol=1e-6)
        np.testing.assert_allclose(run(q, k, v, mask, 9)[:, :6], exact, rtol=1e-10, atol=1e-10)


def test_constant_keys_are_exact():
    """All scores of a row are equal, so that exact attention is the mean of the values."""
    q, k, v = qkv(13)
    out = jax.jit(nystrom, static_argnums=4)(q, jnp.broadcast_to(k[:, :1], k.shape), v, jnp.ones((2, 13), bool), 4)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=0, atol=1e-5)


def test_pseudo_inverse_inverts_and_converges_faster_from_the_exact_norm():
    kernel = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (3, 2, 5, 5)), axis=-1)
    with jax.enable_x64(True):
        kernel, inverse = kernel.astype(jnp.float64), jax.jit(pseudo_inverse, static_argnums=(1, 2))
        identity = np.broadcast_to(np.eye(5), kernel.shape)
        np.testing.assert_allclose(kernel @ inverse(kernel, 30), identity, rtol=0, atol=1e-8)
        residual = [np.linalg.norm(kernel @ inverse(kernel, 4, init) - identity) for init in ("exact", "original")]
    assert residual[0] < residual[1]


def test_convolution_is_centred_and_stops_at_the_ends():
    v = jax.random.normal(jax.random.key(0), (2, 6, 2, 3))
    taps = jax.random.normal(jax.random.key(1), (5, 2))
    out = jax.jit(convolution)(v, taps)
    for h in range(2):
        expected = np.stack([[np.convolve(v[b, :, h, d], taps[::-1, h], "same") for d in range(3)] for b in range(2)])
        np.testing.assert_allclose(out[:, :, h], np.moveaxis(expected, 1, 2), rtol=0, atol=1e-5)


def test_no_product_of_length_by_length():
    """The largest array of the compiled backward pass at L = 2048 is far from L^2."""
    shape = jax.ShapeDtypeStruct((1, 2048, 1, 4), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 2048), bool)
    grad = jax.jit(jax.grad(lambda q, k, v, mask: jnp.sum(nystrom(q, k, v, mask, 8))))
    assert grad.lower(shape, shape, shape, mask).compile().memory_analysis().temp_size_in_bytes < 2048**2


def test_errors_name_what_does_not_fit():
    x = jnp.zeros((1, 4, 8))
    for arguments, message in (
        (dict(conv_kernel=4), "conv_kernel=4 must be odd"),
        (dict(dropout=0.1), "dropout=0.1: no attention weights are formed"),
        (dict(bias=dict(name="alibi")), r"model.mixer.bias \(name='alibi'\) does not go with"),
        (dict(num_landmarks=2, pinv_init="svd"), "model.mixer.pinv_init='svd' is unknown.*exact, original"),
    ):
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(build(dict(name="nystrom", num_heads=2, **arguments)).init, jax.random.key(0), x, Context())
    with pytest.raises(ConfigError, match="'nystrom' has no causal form"):
        build(dict(name="nystrom", causal=True))
    with pytest.raises(ConfigError, match="num_landmarks=0 must be at least 1"):
        build(dict(name="nystrom", num_landmarks=0))
