"""Luna: both forms against their formulas, and the limits of the packed sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context, build, state_size
from efficient_attn.mixers.luna import REFUSES_DOCUMENTS, causal_luna, packing_weights

pytestmark = pytest.mark.usefixtures("quick_compile")


def make(length=12, **arguments):
    module = build(dict(name="luna", num_heads=2, packed_length=3, **arguments))
    x = jax.random.normal(jax.random.key(0), (2, length, 8))
    return module, jax.jit(module.init)(jax.random.key(1), x, Context()), x


def test_packing_and_unpacking_are_two_attentions():
    module, variables, x = make()
    params = jax.tree.map(lambda p: p + 0.1, variables["params"])
    mask = jnp.arange(12)[None] < jnp.array([[12], [7]])

    def heads(x, name):
        return jnp.einsum("ble,ehd->blhd", x, params[name]["kernel"]) + params[name]["bias"][None, None]

    def attention(q, kv, mask):
        scores = jnp.einsum("bihd,bjhd->bhij", q, kv) / 2  # sqrt(D)
        return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30)), kv)

    packed = jnp.broadcast_to(params["packed"][None], (2, 3, 8))
    packed = attention(heads(packed, "packed_query"), heads(x, "packed_key"), mask).reshape(2, 3, 8)
    y = attention(heads(x, "query"), heads(packed, "key"), jnp.ones((2, 3), bool))
    expected = jnp.einsum("blhd,hde->ble", y, params["out"]["kernel"]) + params["out"]["bias"][None, None]
    out = jax.jit(module.apply)({"params": params}, x, Context(mask=mask))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def operands(length=70):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, packed_key = (jax.random.normal(key, (2, length, 2, 4), jnp.float64) for key in keys[:3])
    return q, k, packed_key, jax.random.normal(keys[3], (3, 2, 4), jnp.float64)


def in_full(q, k, weights):
    """Equations 9 to 11 on [L, H, ...], all tokens of one document, with the sums over all earlier tokens written out."""
    length = len(q)
    before, t = jnp.tri(length), jnp.arange(1, length + 1)[:, None, None]
    sums = jnp.einsum("tj,jhd,jhm->thdm", before, k, weights)
    a = jax.nn.softmax(jnp.einsum("thd,thdm->thm", q / k.shape[-1] ** 0.5, sums) / t, axis=-1)
    return jnp.einsum("thm,tj,jhm,jhd->thd", a, before, weights, k) / t


def test_causal_form_equals_its_formula_with_all_gradients():
    """The second row holds documents of 5 and 8 tokens and padding before, inside and after."""
    with jax.enable_x64(True):
        q, k, packed_key, packed = operands(17)
        mask = jnp.ones((2, 17), bool).at[1, jnp.array([0, 4, 15, 16])].set(False)
        documents = [np.array([1, 2, 3, 5, 6]), np.arange(7, 15)]
        reset = jnp.zeros((2, 17), bool).at[:, 0].set(True).at[1, 7].set(True)

        def linear(q, k, packed_key, packed):
            out, _ = causal_luna(q, k, packing_weights(packed, packed_key), mask, reset)
            return jnp.where(mask[..., None, None], out, 0)

        def expected(q, k, packed_key, packed):
            weights = jax.nn.elu(jnp.einsum("mhd,blhd->blhm", packed, packed_key) / 2) + 1
            out = jnp.zeros_like(q).at[0].set(in_full(q[0], k[0], weights[0]))
            for at in documents:
                out = out.at[1, at].set(in_full(q[1, at], k[1, at], weights[1, at]))
            return out

        arguments = (q, k, packed_key, packed)
        g = jax.random.normal(jax.random.key(5), q.shape, q.dtype)
        out, vjp = jax.vjp(jax.jit(linear), *arguments)
        due, due_vjp = jax.vjp(jax.jit(expected), *arguments)
        np.testing.assert_allclose(out, due, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(vjp(g), due_vjp(g), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
        low = [a.astype(jnp.float32) for a in arguments]
        error, dense_error = (float(jnp.max(jnp.abs(f(*low) - due))) for f in (jax.jit(linear), jax.jit(expected)))
        assert error <= 2 * dense_error + 1e-6


def test_one_packed_position_is_a_weighted_mean_of_the_past():
    """With l = 1 the softmax is 1, so that queries say nothing, and equal keys come back times the mean weight."""
    with jax.enable_x64(True):
        q, k, packed_key, packed = operands()
        weights = packing_weights(packed[:1], packed_key)
        out, _ = causal_luna(q, jnp.broadcast_to(k[:, :1], k.shape), weights)
        mean = jnp.cumsum(weights, axis=1) / jnp.arange(1, 71)[None, :, None, None]
        np.testing.assert_allclose(out, mean * k[:, :1], rtol=1e-10, atol=1e-10)


def test_state_does_not_grow_with_the_length():
    mixer = dict(name="luna", causal=True, num_heads=2, packed_length=3)
    assert state_size(mixer, 10, 8) == state_size(mixer, 10_000, 8) == 4 * (2 * 2 * 4 * 3 + 1)


def test_dropout_acts_in_training_alone():
    for causal in (False, True):
        module, variables, x = make(causal=causal, dropout=0.5)
        plain, same = (jax.jit(m.apply)(variables, x, Context()) for m in (module, make(causal=causal)[0]))
        np.testing.assert_array_equal(plain, same)
        dropped = jax.jit(module.apply)(variables, x, Context(train=True), rngs={"dropout": jax.random.key(3)})
        assert np.all(np.isfinite(dropped)) and float(jnp.max(jnp.abs(dropped - plain))) > 1e-2


def test_errors_name_what_does_not_fit():
    module, variables, x = make()
    with pytest.raises(ValueError, match=REFUSES_DOCUMENTS):
        module.apply(variables, x, Context(segment_ids=jnp.zeros((2, 12), jnp.int32)))
    with pytest.raises(ConfigError, match="only its causal form decodes"):
        module.apply(variables, x, Context(decode=True))
    with pytest.raises(ValueError, match="width 8 is not divisible by num_heads=3"):
        jax.eval_shape(build(dict(name="luna", num_heads=3)).init, jax.random.key(0), x, Context())
    with pytest.raises(ConfigError, match="packed_length=0 must be at least 1"):
        build(dict(name="luna", packed_length=0))
