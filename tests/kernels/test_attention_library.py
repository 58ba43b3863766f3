"""JAX's own attention in cuDNN: which masks it is given in its own terms, and what it says it cannot do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attend, library, masks
from kernels.attention.call import Call, spec_of

CAUSAL_WINDOW = masks.Causal() & masks.Window(5)


@pytest.mark.parametrize(
    ("mask", "changes", "options"),
    [
        (masks.Full(), {}, {}),
        (masks.Full(), {"kv_length": 24}, {}),
        (masks.Causal(), {}, {"is_causal": True}),
        (CAUSAL_WINDOW, {}, {"is_causal": True, "local_window_size": (4, 0)}),
        (masks.Window(5) & masks.Causal(), {}, {"is_causal": True, "local_window_size": (4, 0)}),
        (masks.Causal(), {"kv_length": 24}, None),
        (masks.Causal(), {"segment_ids": True}, None),
        (masks.Causal() & masks.Window(5, dilation=2), {}, None),
        (masks.Window(5), {}, None),
    ],
)
def test_cudnn_takes_masks_of_its_own_as_options(monkeypatch, mask, changes, options):
    x = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.bfloat16)
    call = jax.eval_shape(lambda x: _call_of(x, mask), x)
    spec = dataclasses.replace(spec_of(call, False, "gpu"), **changes)
    assert library._options(spec) == options
    assert library.why_not_cudnn(spec) is None


def test_masks_in_the_librarys_terms_are_the_same_masks():
    """By its XLA form, which takes the same options."""
    q, k, v = (jax.random.normal(key, (1, 16, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    for mask in (masks.Full(), masks.Causal(), CAUSAL_WINDOW):
        options = library._options(spec_of(_call_of(q, mask), False, "gpu"))
        ours = attend(q, k, v, mask=mask, implementation="reference")
        np.testing.assert_allclose(jax.nn.dot_product_attention(q, k, v, implementation="xla", **options), ours, atol=1e-5)


def test_cudnn_says_what_it_cannot_do():
    x = jax.ShapeDtypeStruct((1, 15, 2, 12), jnp.float32)
    call = jax.eval_shape(lambda x: _call_of(x, masks.Window(5)), x)
    spec = spec_of(call, False, "cpu")
    assert "not on cpu" in library.why_not_cudnn(spec)
    met = ("platform", "gpu", "not float32"), ("dtype", "bfloat16", "not 12"), ("head_dim", 16, "one head size")
    for field, value, left in met:
        spec = dataclasses.replace(spec, **{field: value})
        assert left in library.why_not_cudnn(spec)
    spec = dataclasses.replace(spec, v_head_dim=16)
    assert "lengths must be even" in library.why_not_cudnn(spec)
    assert library.why_not_cudnn(dataclasses.replace(spec, mask=masks.Causal())) is None


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs alone")
@pytest.mark.parametrize("mask", [masks.Full(), CAUSAL_WINDOW, masks.Window(5)], ids=["full", "causal window", "by a table"])
def test_cudnn_follows_the_reference(mask):
    q, k, v = (jax.random.normal(key, (1, 64, 2, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    got, want = (attend(q, k, v, mask=mask, implementation=name) for name in ("cudnn", "reference"))
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)


def _call_of(x, mask) -> Call:
    return Call(x, x, x, *[None] * 6, mask=mask, softcap=None, scale=1.0)
