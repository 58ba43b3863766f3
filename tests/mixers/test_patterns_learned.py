"""Attention whose weights come from no comparison of tokens (hard-coded Gaussians, Synthesizer), and ETC's labels, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.gaussian import gaussian_attention

B, L, H, D = 2, 23, 3, 4
E = H * D


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


pytestmark = pytest.mark.usefixtures("quick_compile")


def initialised(module, length: int = L):
    """Parameters off their initial values, and an input, in the module's type."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, length, E)), module.dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, Context())
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.5, size=p.shape), module.dtype), shapes), x


def apply(module, variables, x, ctx=None):
    return jax.jit(module.apply)(variables, x, ctx or Context())


def project(params, name: str, x) -> np.ndarray:
    """One of the layers' linear maps in float64: [B, L, H, D]."""
    bias = np.float64(params[name]["bias"]) if "bias" in params[name] else 0
    return np.einsum("ble,ehd->blhd", np.asarray(x, np.float64), np.float64(params[name]["kernel"])) + bias


def output(params, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    heads = np.einsum("bhls,bshd->blhd", np.broadcast_to(weights, (B, *weights.shape[1:])), v)
    bias = np.float64(params["out"]["bias"]) if "bias" in params["out"] else 0
    return np.einsum("blhd,hde->ble", heads, np.float64(params["out"]["kernel"])) + bias


def softmax(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    weights = np.where(allowed, np.exp(scores), 0)
    return weights / weights.sum(axis=-1, keepdims=True)


def density(centres, stddev: float, allowed) -> np.ndarray:
    """N(j; i + c_h, stddev^2) [1, H, L, L], zero where not allowed."""
    i, j = np.arange(L)[:, None], np.arange(L)[None]
    z = [(j - i - c) / stddev for c in centres]
    return np.where(allowed, np.exp(-0.5 * np.square(z)) / (stddev * np.sqrt(2 * np.pi)), 0)[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("centres, stddev", [((), 1.0), ((-2, 3, 0), 0.7), ((-5, 0, 4), 2.5)])
def test_gaussian_heads_are_the_closed_form(x64, causal, centres, stddev):
    """To what the weights left out add up to, 2e-9 of the largest value."""
    module = build(dict(name="gaussian", num_heads=H, centres=centres, stddev=stddev, causal=causal), dtype=jnp.float64)
    variables, x = initialised(module)
    params = variables["params"]
    assert set(params) == {"value", "out"}
    allowed = np.tri(L, dtype=bool) if causal else np.ones((L, L), bool)
    weights = density(centres or ((-1, 0, -1) if causal else (-1, 0, 1)), stddev, allowed)
    expected = output(params, weights, project(params, "value", x))
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=0, atol=1e-7)


def test_what_gaussian_heads_leave_out_is_below_float32_resolution(x64):
    v = jnp.ones((1, 101, 1, 1), jnp.float64)
    out = np.asarray(gaussian_attention(v, (0,), 2.0))
    alone = np.asarray(gaussian_attention(v, (0,), 2.0, groups=jnp.arange(101, dtype=jnp.int32)[None]))
    density = np.exp(-0.5 * (np.arange(-50, 51) / 2.0) ** 2) / (2.0 * np.sqrt(2 * np.pi))
    assert 0 < density.sum() - out[0, 50, 0, 0] < 2**-24 * density.max()
    np.testing.assert_allclose(alone, density[50], rtol=1e-12)


def test_gaussian_heads_decode_from_a_cache_of_their_reach():
    mixer = dict(name="gaussian", num_heads=H, centres=(-2, -1, 0), stddev=0.5, causal=True)
    assert state_size(mixer, 50, E) == state_size(mixer, 500, E) == 4 * (2 + 3) * E
    with pytest.raises(ConfigError, match=r"centres=\(0, 1\) must be one for each of num_heads=3"):
        build({**mixer, "centres": (0, 1)}).init(jax.random.key(0), jnp.zeros((1, 4, E)), Context())
    with pytest.raises(ConfigError, match=r"\.stddev=0\.0 must be more than 0"):
        build({**mixer, "stddev": 0.0}).init(jax.random.key(0), jnp.zeros((1, 4, E)), Context())
    with pytest.raises(ConfigError, match=r"centres=\(9, 9, 9\).*no position at or before"):
        build({**mixer, "centres": (9, 9, 9)}).init(jax.random.key(0), jnp.zeros((1, 4, E)), Context())


def synthetic_scores(mode: str, params, x) -> np.ndarray:
    """S [B or 1, H, L, L] by the paper's definitions, in float64."""
    length = x.shape[1]
    if mode == "random":
        return np.float64(params["scores"])[None, :, :length, :length]
    if mode == "factorized_random":
        first, second = np.float64(params["scores_1"]), np.float64(params["scores_2"])
        return np.einsum("hir,hjr->hij", first, second)[None, :, :length, :length]
    hidden = np.maximum(project(params, "hidden", x), 0)
    scores = (
        np.einsum("blhd,hjd->bhlj", hidden, np.float64(params["scores"]))
        + np.float64(params["scores_bias"])[None, ..., 0][:, :, None]
    )
    return scores[..., :length]


@pytest.mark.parametrize("causal, dot_product", [(False, False), (True, True)])
@pytest.mark.parametrize("mode", ["dense", "random", "factorized_random"])
def test_synthesizer_is_the_softmax_of_its_scores(x64, mode, causal, dot_product):
    arguments = dict(name="synthesizer", num_heads=H, mode=mode, max_length=L + 4, rank=2, causal=causal, dot_product=dot_product)
    module = build(arguments, dtype=jnp.float64)
    variables, x = initialised(module)
    params = variables["params"]
    assert ("query" in params) == ("key" in params) == dot_product
    scores = synthetic_scores(mode, params, x)
    if dot_product:
        scores = scores + np.einsum("blhd,bshd->bhls", project(params, "query", x), project(params, "key", x)) / np.sqrt(D)
    weights = softmax(scores, np.tri(L, dtype=bool) if causal else True)
    expected = output(params, weights, project(params, "value", x))
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode, dot_product", [("dense", True), ("random", False)])
def test_synthesizer_of_packed_documents_and_of_a_cache(mode, dot_product):
    """What the contract tests ask, of the modes that they leave out."""
    module = build(dict(name="synthesizer", num_heads=H, mode=mode, max_length=L, dot_product=dot_product, causal=True))
    variables, x = initialised(module)
    parallel = apply(module, variables, x)
    packed = apply(module, variables, x, Context(segment_ids=jnp.array([[3] * 9 + [0] * 14] * B)))
    np.testing.assert_allclose(packed[:, :9], parallel[:, :9], rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 9:], apply(module, variables, x[:, 9:]), rtol=0, atol=1e-5)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, Context(decode=True)), x)["cache"]
    cache, start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), 0
    step = jax.jit(lambda v, x: module.apply(v, x, Context(decode=True), mutable=["cache"]))
    for size in (9, 7, 7):
        y, updated = step({**variables, "cache": cache}, x[:, start : start + size])
        np.testing.assert_allclose(y, parallel[:, start : start + size], rtol=0, atol=2e-5)
        cache, start = updated["cache"], start + size


def test_synthesizer_errors():
    def init(length=4, ctx=None, **arguments):
        module = build(dict(name="synthesizer", num_heads=H, max_length=5, **arguments))
        return module.init(jax.random.key(0), jnp.zeros((1, length, E)), ctx or Context())

    with pytest.raises(ValueError, match="a sequence of 6 positions is longer than max_length=5"):
        init(length=6)
    with pytest.raises(ConfigError, match=r"mode='rand' is unknown.*one of: dense, factorized_random, random"):
        init(mode="rand")
    with pytest.raises(ValueError, match="only causal"):
        init(ctx=Context(decode=True))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_etc_adds_the_label_of_each_pair(x64, scale):
    """q_i . (k_j + a_label) scale, with clipped distances between long tokens and three labels for pairs with a global one."""
    n, radius, clip = 3, 6, 2
    module = build(dict(name="etc", num_heads=H, global_tokens=n, radius=radius, clip=clip, scale=scale), dtype=jnp.float64)
    variables, x = initialised(module)
    params = variables["params"]
    labels = np.array(
        [
            [
                (2 * clip + 1 if j < n else 2 * clip + 2)
                if i < n
                else 2 * clip + 3
                if j < n
                else clip + max(-clip, min(clip, j - i))
                for j in range(L)
            ]
            for i in range(L)
        ]
    )
    q, k, v = (project(params, name, x) for name in ("query", "key", "value"))
    vectors = np.float64(params["labels"])
    assert vectors.shape == (labels.max() + 1, D)
    scores = np.einsum("blhd,bshd->bhls", q, k) + np.einsum("blhd,lsd->bhls", q, vectors[labels])
    i, j = np.arange(L)[:, None], np.arange(L)[None]
    weights = softmax(scores * (scale or D**-0.5), (abs(i - j) <= radius) | (i < n) | (j < n))
    np.testing.assert_allclose(apply(module, variables, x), output(params, weights, v), rtol=0, atol=1e-10)
