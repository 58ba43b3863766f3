"""Local attention, Longformer and BigBird against arrays of independent implementations."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.mixers import Context, build
from efficient_attn.mixers.bigbird import BigBird
from efficient_attn.mixers.longformer import longformer
from kernels.attention import attend, biases, masks

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation


pytestmark = pytest.mark.usefixtures("quick_compile")


def load(oracle_dir, name: str):
    """The hyper-parameters and the arrays."""
    stated = json.loads((oracle_dir / f"{name}.json").read_text())
    assert stated["self_check_max_abs_diff"] < TOLERANCE
    return stated["hyper"], {key: jnp.asarray(x) for key, x in np.load(oracle_dir / f"{name}.npz").items()}


def test_local_attention(oracle_dir):
    hyper, arrays = load(oracle_dir, "local_attention")
    for name, given in hyper.items():
        q, k, v = (jnp.moveaxis(arrays[f"in.{name}.{x}"], 1, 2) for x in "qkv")
        B, length, heads, _ = q.shape
        mixer = dict(
            name="block_local", num_heads=heads, block_size=given["window_size"], look_back=given["look_backward"],
            look_ahead=given["look_forward"], exact=given.get("exact_windowsize", False), causal=given["causal"],
        )  # fmt: skip
        keys = (jnp.ones((B, length), jnp.int32), arrays[f"in.{name}.mask"].astype(jnp.int32))
        out = attend(q, k, v, mask=build(mixer).mask(length), segment_ids=keys)
        has_key = jnp.moveaxis(arrays[f"aux.{name}.row_has_key"], 1, 2)[..., None]
        expected = jnp.moveaxis(arrays[f"out.{name}.y"], 1, 2)
        np.testing.assert_allclose(jnp.where(has_key, out, 0), jnp.where(has_key, expected, 0), rtol=0, atol=TOLERANCE)


def projected(arrays, heads: int, suffix: str = ""):
    """Queries, keys and values [B, L, H, D] from torch's Linear weights (out, in)."""
    x = arrays["in.x"]
    return tuple(
        (x @ arrays[f"w.{name}{suffix}.weight"].T + arrays[f"w.{name}{suffix}.bias"][None, None]).reshape(*x.shape[:2], heads, -1)
        for name in ("query", "key", "value")
    )


@pytest.mark.parametrize("name", ["longformer_local", "longformer_local_global_pad"])
def test_longformer(oracle_dir, name):
    hyper, arrays = load(oracle_dir, name)
    is_global, is_padding = arrays["in.is_global"], arrays["in.is_padding"]
    mixer = build(dict(name="longformer", num_heads=hyper["heads"], window=hyper["attention_window"]))
    out = longformer(
        projected(arrays, hyper["heads"]),
        projected(arrays, hyper["heads"], "_global"),
        is_global,
        max(1, int(is_global.sum(axis=1).max())),
        window=mixer.mask(is_global.shape[1]),
        segment_ids=jnp.where(is_padding, -1, 0),
    )
    out = jnp.where(is_padding[..., None], 0, out.reshape(arrays["out.y"].shape))
    np.testing.assert_allclose(out, arrays["out.y"], rtol=0, atol=TOLERANCE)


class GivenBlocks(BigBird):
    """BigBird whose random blocks are given: for each head, those of query blocks 1 ... n - 2."""

    blocks: tuple = ()

    def pattern(self, length: int) -> masks.Mask:
        drawn = tuple(masks.Blocks(self.block_size, ((), *rows, ())) for rows in self.blocks)
        return self.without_random(length) | masks.PerHead(drawn)


@pytest.mark.parametrize("name", ["bigbird_itc_random", "bigbird_itc_random_pad"])
def test_bigbird(oracle_dir, name):
    hyper, arrays = load(oracle_dir, name)
    heads, width, x = hyper["heads"], hyper["hidden"], arrays["in.x"]
    blocks = tuple(tuple(map(tuple, rows)) for rows in arrays["in.rand_blocks"].tolist())
    module = GivenBlocks(num_heads=heads, block_size=hyper["block_size"], blocks=blocks)
    params = {
        part: {
            "kernel": arrays[f"w.{part}.weight"].T.reshape(width, heads, -1),
            "bias": arrays[f"w.{part}.bias"].reshape(heads, -1),
        }
        for part in ("query", "key", "value")
    }
    params["out"] = {"kernel": jnp.eye(width).reshape(heads, -1, width), "bias": jnp.zeros(width)}
    position = np.arange(x.shape[1])
    seen = np.stack([m.allowed(position[:, None], position[None]) for m in masks.of_heads(module.mask(x.shape[1]))])
    np.testing.assert_array_equal(seen, arrays["aux.key_multiplicity"])
    y = module.apply({"params": params}, x, Context(mask=~arrays["in.is_padding"]))
    y = jnp.where(arrays["in.is_padding"][..., None], 0, y)
    np.testing.assert_allclose(y, arrays["out.y"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "portable"])
def test_a_key_counted_several_times_is_a_bias_of_its_logarithm(oracle_dir, implementation):
    """The oracle's random blocks are all block 0, which the rows between the global ones then count 1 + r times."""
    hyper, arrays = load(oracle_dir, "bigbird_itc_evalquirk")
    is_padding, block = arrays["in.is_padding"], hyper["block_size"]
    multiplicity = 1 + hyper["num_random_blocks"]
    last = hyper["N"] - block
    assert float(arrays["aux.key_multiplicity"].max()) == multiplicity

    def repeated(score, q_pos, kv_pos, head, count):
        return score + jnp.log(count) * ((kv_pos < block) & (q_pos >= block) & (q_pos < last))

    pattern = BigBird(num_heads=hyper["heads"], block_size=block).without_random(hyper["N"])
    out = attend(
        *projected(arrays, hyper["heads"]), mask=pattern, segment_ids=jnp.where(is_padding, -1, 0),
        bias=biases.Function(repeated, jnp.float32(multiplicity)), implementation=implementation,
    )  # fmt: skip
    out = jnp.where(is_padding[..., None], 0, out.reshape(arrays["out.y"].shape))
    np.testing.assert_allclose(out, arrays["out.y"], rtol=0, atol=TOLERANCE)
