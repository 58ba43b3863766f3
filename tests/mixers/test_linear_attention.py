"""Linear attention: against an independent implementation and against the sum it stands for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.mixers import Context, state_size
from efficient_attn.mixers.linear_attention import LinearAttention, linear_attention

pytestmark = pytest.mark.usefixtures("quick_compile")

# performer-pytorch adds 1e-6 to its causal sums of keys, hence two tolerances: the oracle folder states both
TOLERANCE = {False: 1e-4, True: 2e-3}


@pytest.mark.parametrize("causal", [False, True])
def test_oracle(oracle_dir, causal):
    stated = json.loads((oracle_dir / "performer_favor.json").read_text())
    assert any("phi=elu+1 on UNscaled q,k" in line for line in stated["semantics"])
    a = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "performer_favor.npz").items()}
    q, k, v = (jnp.moveaxis(a[f"in.{name}"], 1, 2) for name in "qkv")
    out, _ = linear_attention(q, k, v, causal=causal)
    expected = jnp.moveaxis(a["out.y_elu_causal" if causal else "out.y_elu"], 1, 2)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[causal])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_quadratic_sum(causal, packed):
    with jax.enable_x64(True):
        q, k, v = (jax.random.normal(key, (2, 70, 3, 4), jnp.float64) for key in jax.random.split(jax.random.key(0), 3))
        mask = jnp.arange(70)[None, :] < jnp.array([[70], [50]])
        starts = jnp.isin(jnp.arange(70), jnp.array([0, 9, 40]))[None, :] & jnp.ones((2, 1), bool)
        out, _ = linear_attention(q, k, v, causal=causal, mask=mask, reset=starts if packed else None)
        weights = jnp.einsum("bihd,bjhd->bhij", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
        document = jnp.cumsum(starts, axis=1) if packed else jnp.zeros((2, 70))
        allowed = (document[:, :, None] == document[:, None, :]) & mask[:, None, :]
        allowed &= jnp.tri(70, dtype=bool)[None] if causal else True
        weights = jnp.where(allowed[:, None], weights, 0)
        total = weights.sum(-1, keepdims=True)
        expected = jnp.einsum("bhij,bjhd->bihd", weights / jnp.where(total > 0, total, 1), v)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)


def test_a_row_without_keys_is_zero_and_has_finite_gradients():
    q, k, v = (jax.random.normal(key, (1, 5, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))

    def loss(q, k, v):
        out, _ = linear_attention(q, k, v, causal=True, mask=jnp.zeros((1, 5), bool))
        return jnp.sum(out) + jnp.sum(out**2)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert value == 0 and all(np.all(np.isfinite(g)) for g in gradients)


def test_state_does_not_grow_with_the_length():
    mixer = dict(name="linear_attention", causal=True, num_heads=2)
    assert state_size(mixer, 10, 8) == state_size(mixer, 10_000, 8) == 4 * 2 * 4 * 5


def test_errors_name_what_does_not_fit():
    with pytest.raises(ValueError, match="width 8 is not divisible by num_heads=3"):
        LinearAttention(num_heads=3).init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context())
    with pytest.raises(ValueError, match="only causal linear attention decodes"):
        LinearAttention(num_heads=2).init(jax.random.key(0), jnp.zeros((1, 4, 8)), Context(decode=True))
