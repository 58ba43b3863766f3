"""What holds of `chunked` alone: which tiles it visits, what memory it takes, and whom NaN reaches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attend, chunked, masks
from kernels.attention.call import Call
from tests.kernels import attention_cases


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 16 x 32, so that short sequences have many."""
    monkeypatch.setattr(chunked, "TILE_SIZES", attention_cases.SMALL_TILES)


@pytest.mark.parametrize(
    ("mask", "poisoned", "clean"),
    [(masks.Causal(), slice(96, 128), slice(0, 96)), (masks.Window(16), slice(0, 32), slice(64, 128))],
)
def test_chunked_never_visits_a_tile_that_the_mask_rules_out(small_tiles, quick_compile, mask, poisoned, clean):
    """NaN in the keys and values of tiles ruled out for the clean queries leaves these and their gradients finite."""
    q, k, v = attention_cases.Sizes(128, 128, 2).arguments(jnp.float32)
    k, v = (x.at[:, poisoned].set(jnp.nan) for x in (k, v))

    def loss(q):
        return attend(q, k, v, mask=mask, implementation="chunked")[:, clean].sum()

    value, dq = jax.value_and_grad(loss)(q)
    assert np.isfinite(value) and np.isfinite(dq[:, clean]).all()
    assert np.isnan(attend(q, k, v, implementation="chunked")).all()


def test_chunked_gathers_where_a_pattern_is_scattered(small_tiles):
    """So that the cases of `tests.kernels.test_attention` try both kinds of tiles."""
    is_gathered = {}
    for name, (mask, L, S, H) in attention_cases.MASKS.items():
        q, k, v = attention_cases.Sizes(L, S, H).arguments(jnp.float32)
        is_gathered[name] = chunked.tiling_of(Call(q, k, v, *[None] * 6, mask=mask, softcap=None, scale=1.0)).gathered
    assert is_gathered["global"] and is_gathered["butterfly"] and not is_gathered["causal"] and not is_gathered["window"]


def test_a_step_of_decoding_is_one_tile():
    """Of all rows: keys are as many as they are, and read once."""
    q, k = (jax.ShapeDtypeStruct((8, length, 4, 32), jnp.float32) for length in (1, 1100))
    call = Call(q, k, k, *[None] * 6, mask=masks.Causal(), softcap=None, scale=1.0)
    tiling = chunked.tiling_of(dataclasses.replace(call, q_positions=jax.ShapeDtypeStruct((8, 1), jnp.int32)))
    assert (tiling.groups, tiling.rows, tiling.blocks, tiling.padded["S"]) == (1, 1, 1, 1100)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("mask", ["causal", "strided", "bigbird", "by head", "nothing"])
def test_chunked_visits_no_more_tiles_than_the_pattern_needs(monkeypatch, mask, gathered):
    """Counted in the loop, against the blocks of 16 x 8 that the pairs themselves touch; a tile has up to four of them."""
    width, (mask, L, S, H) = 4, attention_cases.MASKS[mask]
    q, k, v = attention_cases.Sizes(L, S, H).arguments(jnp.float32)
    call = Call(q, k, v, *[None] * 6, mask=mask, softcap=None, scale=1.0)
    tiling = dataclasses.replace(chunked.tiling_of(call), q_tile=16, kv_block=8, width=width, gathered=gathered)
    monkeypatch.setattr(chunked, "tiling_of", lambda call: tiling)
    counted = np.asarray(chunked.visits(call))
    assert counted.shape == (tiling.groups, tiling.rows)
    for group, row in np.ndindex(counted.shape):
        pairs = attention_cases.allowed_pairs(mask, L, S)
        pairs = pairs[group % len(pairs), 16 * row : 16 * row + 16]
        columns = [c for c in range(-(-S // 8)) if pairs[:, 8 * c : 8 * c + 8].any()]
        least = -(-len(columns) // width)
        if not gathered:
            least, end = 0, -1
            for column in columns:
                least, end = (least, end) if column < end else (least + 1, column + width)
        assert least <= counted[group, row] <= least + gathered  # those of full blocks are apart


def test_chunked_passes_nan_on_to_those_who_see_it():
    """At a size whose products are reduced for the sake of speed (`kernels.matmul.batched`)."""
    q, k, v, do = jax.random.normal(jax.random.key(0), (4, 1, 512, 8, 64))
    k = k.at[:, 300].set(jnp.nan)

    def run(name):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, mask=masks.Causal(), implementation=name), q, k, v)
        return out, *pullback(do)

    with jax.debug_nans(False):
        (out, *gradients), (expected, *_) = (jax.jit(run, static_argnums=0)(name) for name in ("chunked", "reference"))
    np.testing.assert_array_equal(jnp.isnan(out), jnp.isnan(expected))
    assert jnp.isnan(expected).any(axis=(0, 2, 3)).sum() == 512 - 300
    assert all(jnp.isnan(gradient).any() for gradient in gradients)


def test_chunked_memory_is_linear_in_length():
    """Temporary bytes of forward and backward for 4x the length: less than 4x chunked, about 16x dense."""

    def temporary_bytes(name, L):
        x = jax.ShapeDtypeStruct((1, L, 2, 8), jnp.float32)
        loss = jax.grad(lambda q, k, v: attend(q, k, v, mask=masks.Causal(), implementation=name).sum(), argnums=(0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("chunked", 32768) < 4 * temporary_bytes("chunked", 8192)  # where tiles are of one size
    assert temporary_bytes("reference", 8192) > 12 * temporary_bytes("reference", 2048)
