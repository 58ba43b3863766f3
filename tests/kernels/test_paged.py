"""Paged attention: the oracle, contiguous attention on the same keys, and what the kernel refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attend, masks, paged
from kernels.offline import paged as offline
from kernels.offline.compiler import triton_calls

pytestmark = pytest.mark.usefixtures("quick_compile")
FLOAT32 = ("reference", "portable")
"""Implementations that take it; the other is in test_decode.py."""
attend_paged = jax.jit(paged.attend, static_argnames=("softcap", "scale", "return_lse", "implementation"))


@pytest.mark.parametrize("name", FLOAT32)
def test_oracle(oracle_dir, name):
    """torch's attention over the pages of each sequence; there [pages, page, H, D], and -1 for no page."""
    arrays = {name: jnp.asarray(x) for name, x in np.load(oracle_dir / "sdpa_flash_paged.npz").items()}
    k, v = (jnp.moveaxis(arrays[f"in.paged.{x}_pages"], 2, 0) for x in "kv")
    tables = jnp.maximum(arrays["in.paged.block_table"], 0)
    out = attend_paged(arrays["in.paged.q"], k, v, tables, arrays["in.paged.context_lens"], implementation=name)
    np.testing.assert_allclose(out, arrays["out.paged"], atol=1e-4)


def example(seed: int, lengths, *, H=4, G=2, D=16, n=4, dtype=jnp.float32):
    """q, pools in whose free blocks there are NaNs, tables in random order, lengths, and the same keys and values in a row."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths, np.int32)
    B, N = len(lengths), -(-int(max(lengths)) // n) + 1
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, H, D), (B, N * n, G, D), (B, N * n, G, D)))
    tables = rng.permutation(np.arange(1, 1 + B * N)).reshape(B, N).astype(np.int32)
    pools = []
    for x in (k, v):
        pool = np.full((G, 2 + B * N, n, D), np.nan, np.float32)
        pool[:, tables] = np.moveaxis(x.reshape(B, N, n, G, D), 3, 0)
        pools.append(jnp.asarray(pool, dtype))
    return (jnp.asarray(q, dtype), *pools, jnp.asarray(tables), jnp.asarray(lengths)), [jnp.asarray(x, dtype) for x in (k, v)]


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, scale=0.3)], ids=["plain", "soft-cap"])
def test_equals_attention_to_contiguous_keys(name, options):
    args, (k, v) = example(0, [1, 2, 63, 65, 16])
    out, lse = attend_paged(*args, return_lse=True, implementation=name, **options)
    slots = jnp.arange(k.shape[1])
    at = args[4][:, None] - 1
    expected = attend(
        args[0][:, None], k, v, mask=masks.Causal(), q_positions=at, kv_positions=slots, return_lse=True,
        implementation="reference", **options,
    )  # fmt: skip
    np.testing.assert_allclose(out, expected[0][:, 0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1][:, 0], atol=2e-6)


@pytest.mark.parametrize(("splits", "sizes"), [(1, dict(n=16)), (2, dict(n=4, H=3, G=1)), (3, dict(n=16)), (100, dict(n=128))])
def test_any_split_of_the_keys(splits, sizes):
    args, _ = example(1, [130, 0, 300], **sizes)
    options = dict(softcap=None, scale=0.25)
    expected = paged.reference(*args, **options)
    out, lse = jax.jit(functools.partial(paged.portable, splits=splits, **options))(*args)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)
    assert np.all(out[1] == 0) and np.all(lse[1] == -np.inf)


def test_bfloat16_follows_float32():
    args, _ = example(2, [65, 7], dtype=jnp.bfloat16)
    exact = paged.attend(*(x.astype(jnp.float32) for x in args[:3]), *args[3:])
    for name in FLOAT32:
        out = attend_paged(*args, implementation=name)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_what_cannot_run_is_said():
    args, _ = example(0, [5])
    spec = paged.Spec(1, 4, 2, 16, 16, 4, 2, "float32", "gpu")
    assert paged.why_not(spec) is None
    for change, words in (
        (dict(platform="tpu"), "not for tpu"),
        (dict(block_size=12), "power of two of tokens, not 12"),
        (dict(head_dim=80), "not 80 and 16"),
        (dict(v_head_dim=512), "not 16 and 512"),
        (dict(dtype="float64"), "no float64"),
    ):
        assert words in paged.why_not(dataclasses.replace(spec, **change))
    with pytest.raises(ValueError, match="implementation='pallas' does not exist"):
        paged.attend(*args, implementation="pallas")
    with pytest.raises(ValueError, match="H a multiple of G"):
        paged.attend(args[0][:, :3], *args[1:])
    with pytest.raises(ValueError, match="all three must have one floating type"):
        paged.attend(args[0].astype(jnp.bfloat16), *args[1:])
    for option, words in (
        (dict(softcap=-1.0), "softcap=-1.0; give a positive number"),
        (dict(scale=float("inf")), "scale=inf; give a number"),
    ):
        with pytest.raises(ValueError, match=f"^paged.attend: {words}"):
            paged.attend(*args, **option)
    assert paged.explain(*args[:4]).name != "portable", "nothing unmeasured is chosen"


@pytest.mark.parametrize("kernel", list(offline.kernels()), ids=str)
def test_lowers_for_a_gpu(kernel):
    [call] = triton_calls(offline.lower(kernel, length=512))
    assert call.name == "attention_paged" and call.ttir.count("tt.dot") == 2
    splits, heads, sequences = call.grid
    assert sequences * heads == offline.SEQUENCES * offline.KV_HEADS and splits > 1


def test_soft_cap_lowers_too():
    [call] = triton_calls(offline.lower(next(offline.kernels()), length=512, softcap=30.0))
    assert "tanh" in call.ttir
