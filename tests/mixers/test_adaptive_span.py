"""Adaptive span against its formula with all gradients, its limits, the loss on spans, learning in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.adaptive_span import SoftSpan, clipped
from kernels.attention import attend, masks

B, L, H, D, E = 2, 17, 2, 3, 6


pytestmark = pytest.mark.usefixtures("quick_compile")


def definition(q, k, v, z, *, ramp, span, causal):
    """m e^s / sum m e^s, written out; z [B or 1, H, L or 1, 1]."""
    i, j = np.mgrid[:L, :L]
    distance = i - j if causal else abs(i - j)
    m = jnp.clip((ramp + z - distance[None, None]) / ramp, 0, 1)
    m = jnp.where(((distance >= 0) & (distance < span))[None, None], m, 0)
    e = m * jnp.exp(jnp.einsum("bihd,bjhd->bhij", q, k) / D**0.5)
    return jnp.einsum("bhij,bjhd->bihd", e / e.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_is_its_formula_with_all_gradients(causal, by_token):
    rng = np.random.default_rng(0)
    span, ramp = 9, 2.5
    window = masks.Causal() & masks.Window(span) if causal else masks.Window(span)
    with jax.enable_x64(True):
        q, k, v, cotangent = (jnp.asarray(x) for x in rng.normal(size=(4, B, L, H, D)))
        z = jnp.asarray(rng.uniform(0.1, 7.9, size=(B, H, L, 1) if by_token else (1, H, 1, 1)))

        def both(f):
            out, pullback = jax.vjp(f, q, k, v, z)
            return out, pullback(cotangent)

        ours = jax.jit(lambda: both(lambda q, k, v, z: attend(q, k, v, mask=window, bias=SoftSpan(z, ramp))))()
        theirs = jax.jit(lambda: both(lambda *a: definition(*a, ramp=ramp, span=span, causal=causal)))()
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_the_longest_span_is_dense_attention(causal):
    x = jax.random.normal(jax.random.key(0), (B, L, E))
    mixer = build(dict(name="adaptive_span", num_heads=H, max_span=L, init_span=float(L), causal=causal))
    variables = jax.jit(mixer.init)(jax.random.key(1), x, Context())
    params = {name: value for name, value in variables["params"].items() if name != "span"}
    dense = build(dict(name="softmax", num_heads=H, causal=causal))
    y, z = (jax.jit(m.apply)({"params": p}, x, Context()) for m, p in ((mixer, variables["params"]), (dense, params)))
    np.testing.assert_allclose(y, z, rtol=0, atol=1e-6)


def test_a_short_span_hides_what_is_farther():
    """z = 2, R = 3: m(x) = (5 - x) / 3 vanishes from 5 steps on."""
    x = jax.random.normal(jax.random.key(0), (1, L, E))
    mixer = build(dict(name="adaptive_span", num_heads=H, max_span=L, init_span=2.0, ramp=3.0, causal=True))
    variables = jax.jit(mixer.init)(jax.random.key(1), x, Context())
    gradient = jax.jit(jax.grad(lambda x: mixer.apply(variables, x, Context())[:, 12].sum()))(x)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=(0, 2)), [8 <= j <= 12 for j in range(L)])


def test_clipping_lets_a_span_come_back():
    x, outward, inward = jnp.array([-0.5, 0.0, 0.5, 1.0, 1.5]), jnp.array([1.0, 1, 1, -1, -1]), jnp.array([-1.0, -1, -1, 1, 1])
    value, pullback = jax.vjp(clipped, x)
    np.testing.assert_array_equal(value, [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(pullback(outward)[0], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(pullback(inward)[0], inward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_loss_is_the_mean_span_of_real_tokens(dynamic):
    x = jax.random.normal(jax.random.key(0), (B, L, E))
    arguments = dict(name="adaptive_span", num_heads=H, max_span=20, init_span=5.0, span_loss=0.1, dynamic=dynamic)
    mixer = build(arguments)
    variables = jax.jit(mixer.init)(jax.random.key(1), x, Context())
    mask = jnp.arange(L)[None] < jnp.array([[L], [6]])

    @jax.jit
    def sown(params, x):
        return mixer.apply({"params": params}, x, Context(mask=mask), mutable=["losses"])[1]["losses"]["mean_span"][0]

    if not dynamic:
        assert sown(variables["params"], x) == pytest.approx(0.5)
        gradient = jax.jit(jax.grad(sown))(variables["params"], x)
        np.testing.assert_allclose(gradient["span"], 0.1 * 20 / H, rtol=1e-6)
        return
    head = variables["params"]["span"]
    z = 20 * jax.nn.sigmoid(x @ head["kernel"] + head["bias"][None, None])
    assert sown(variables["params"], x) == pytest.approx(0.1 * float(jnp.mean(z[mask])), rel=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(head["bias"]), 5 / 20, rtol=1e-6)
    other = x.at[1, 6:].set(100.0)
    assert sown(variables["params"], other) == pytest.approx(float(sown(variables["params"], x)), rel=1e-5)


def test_spans_grow_where_the_task_needs_them_and_shrink_where_not():
    """Head 0's only task is to read 6 steps back; the loss on spans pulls the other head to 0."""
    x = jax.random.normal(jax.random.key(0), (4, L, E))
    far = jnp.roll(x, 6, axis=1)
    bias = dict(name="transformer_xl")
    mixer = build(dict(name="adaptive_span", num_heads=1, max_span=L, init_span=3.0, ramp=4.0, causal=True, bias=bias))
    params = jax.jit(mixer.init)(jax.random.key(1), x, Context())["params"]

    def loss(params, weight):
        y, sown = mixer.apply({"params": params}, x, Context(), mutable=["losses"])
        return jnp.mean((y - far)[:, 6:] ** 2) + weight * sown["losses"]["mean_span"][0] / mixer.span_loss

    def trained(weight):
        step = jax.jit(lambda p: jax.tree.map(lambda p, g: p - 0.3 * g, p, jax.grad(loss)(p, weight)))
        new = params
        for _ in range(40):
            new = step(new)
        return float(new["span"][0])

    start = float(params["span"][0])
    assert trained(0.0) > start and trained(0.05) < start


def test_state_and_errors():
    mixer = dict(name="adaptive_span", num_heads=2, max_span=8, causal=True)
    assert state_size(mixer, 10, 8) == state_size(mixer, 1000, 8)
    x = jnp.zeros((1, 4, 8))
    for arguments, message in (
        (dict(max_span=0), "max_span=0 must be at least 1"),
        (dict(ramp=0.0), r"ramp=0.0 more than 0"),
        (dict(init_span=9.0), "init_span=9.0 must be between 0 and max_span=8"),
        (dict(dynamic=True), "init_span=0.0 must be strictly between"),
    ):
        with pytest.raises(ConfigError, match=message):
            build({**mixer, **arguments}).init(jax.random.key(0), x, Context())
