"""attend against arrays from torch.nn.functional.scaled_dot_product_attention, in every implementation that can."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.attention import biases, explain, masks
from kernels.attention.api import IMPLEMENTATIONS
from tests.kernels.attention_cases import TESTED_APART

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation
NAMES = sorted(set(IMPLEMENTATIONS) - TESTED_APART)
attend = jax.jit(attention.attend, static_argnames=("mask", "return_lse", "implementation"))


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    """The arrays with [B, H, L, D] turned to [B, L, H, D], and the stated semantics."""
    stated = json.loads((oracle_dir / "sdpa_flash_paged.json").read_text())
    arrays = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "sdpa_flash_paged.npz").items()}
    heads_second = [n for n in arrays if arrays[n].ndim == 4 and "paged" not in n and n != "in.mask"]
    arrays |= {name: jnp.moveaxis(arrays[name], 1, 2) for name in heads_second}
    assert "scale 1/sqrt(D)" in stated["semantics"][0] and stated["self_check_max_abs_diff"] < TOLERANCE
    return arrays


def check(ours, expected):
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def qkv(oracle):
    return oracle["in.q"], oracle["in.k"], oracle["in.v"]


@pytest.mark.parametrize("name", NAMES)
def test_dense(oracle, name):
    check(attend(*qkv(oracle), implementation=name), oracle["out.dense"])


@pytest.mark.parametrize("name", NAMES)
def test_additive_bias(oracle, name):
    bias = biases.Dense(oracle["in.bias"][None])
    check(attend(*qkv(oracle), bias=bias, implementation=name), oracle["out.bias"])


@pytest.mark.parametrize("name", NAMES)
def test_boolean_mask_as_a_bias_of_minus_infinity(oracle, name):
    bias = biases.Dense(jnp.where(oracle["in.mask"], 0.0, -jnp.inf))
    check(attend(*qkv(oracle), bias=bias, implementation=name), oracle["out.masked"])


@pytest.mark.parametrize("name", NAMES)
def test_padding_as_segment_ids(oracle, name):
    """Padding keys out equals leaving them away: the first N keys of the square causal case."""
    q, k, v = qkv(oracle)
    B, L, S = q.shape[0], q.shape[1], k.shape[1]
    ids = jnp.ones((B, L), jnp.int32), jnp.broadcast_to(jnp.arange(S) < L, (B, S)).astype(jnp.int32)
    options = {"mask": masks.Causal(), "segment_ids": ids, "q_positions": jnp.arange(L)}
    check(attend(q, k, v, **options, implementation=name), oracle["out.causal_square"])


@pytest.mark.parametrize("name", NAMES)
def test_causal_square_and_bottom_right(oracle, name):
    q, k, v = qkv(oracle)
    L = q.shape[1]
    square = attend(q, k[:, :L], v[:, :L], mask=masks.Causal(), implementation=name)
    check(square, oracle["out.causal_square"])
    check(attend(q, k, v, mask=masks.Causal(), implementation=name), oracle["out.causal_bottom_right"])


@pytest.mark.parametrize("name", NAMES)
def test_grouped_heads(oracle, name):
    """The arrays use the first G key/value heads; G, which they do not state, is the divisor of H that fits."""
    q, k, v = qkv(oracle)
    H = q.shape[2]
    groups = [G for G in range(1, H) if H % G == 0]
    outputs = {G: attend(q, k[:, :, :G], v[:, :, :G], implementation=name) for G in groups}
    G = min(groups, key=lambda G: float(abs(outputs[G] - oracle["out.gqa"]).max()))
    check(outputs[G], oracle["out.gqa"])


@pytest.mark.parametrize("name", NAMES)
def test_log_sum_exp(oracle, name):
    reason = explain(*qkv(oracle), return_lse=True, implementation="reference").others.get(name, "")
    if reason.startswith("cannot"):
        pytest.skip(f"{name} {reason}")
    _, lse = attend(*qkv(oracle), return_lse=True, implementation=name)
    check(jnp.moveaxis(lse, 1, 2), oracle["out.lse"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients(oracle, name):
    """Of sum(out * dy), out being the case whose gradients the arrays hold: bottom-right or square causal."""
    q, k, v = qkv(oracle)
    keys = oracle["out.causal_dk"].shape[1]

    def loss(q, k, v):
        return (attend(q, k, v, mask=masks.Causal(), implementation=name) * oracle["in.dy"]).sum()

    for ours, letter in zip(jax.grad(loss, argnums=(0, 1, 2))(q, k[:, :keys], v[:, :keys]), "qkv"):
        check(ours, oracle[f"out.causal_d{letter}"])
