"""Every kernel lowers for a GPU on a machine without one: all passes, block sizes, masks, biases and options."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from kernels import attention, compat
from kernels.attention import Dropout, biases, masks
from kernels.attention.api import _call
from kernels.attention.portable import attend
from kernels.attention.portable.tiling import BLOCKS, FLOAT32_BLOCKS
from kernels.offline import __main__ as command
from kernels.offline import attention as offline
from kernels.offline import scan as offline_scan
from kernels.offline.compiler import longest_loop, requested_bytes, triton_calls


@pytest.mark.parametrize("name", offline.PASSES)
def test_every_kernel_of_the_block_table_lowers_to_triton(name):
    kernels = [kernel for kernel in offline.kernels() if kernel.name == name]
    assert len(kernels) == len(offline.MASKS) * len(BLOCKS["forward"]) + len(FLOAT32_BLOCKS)
    for i, kernel in enumerate(kernels):
        if kernel.dtype == "float32" or i % 4 == 0:  # each head size on another mask
            [call] = triton_calls(offline.lower(kernel, length=1024))
            assert call.name == f"attention_{name}" and call.ttir.count("tt.dot") >= 2
            assert (call.num_warps, call.num_stages) == (kernel.blocks.warps, kernel.blocks.stages)
        total, visited = offline.tiles(kernel, length=2048)
        assert visited == total if kernel.mask == "full" else visited < 0.6 * total


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def per_head(bias, leaves=1):
    return bias(*[array(2)] * leaves)


def gain(score, q_pos, kv_pos, head, params):
    return score * params["gain"] - params["slope"] * jnp.abs(q_pos - kv_pos)


FEATURES = {
    "float32": ({}, jnp.float32, 3),
    "float16": ({}, jnp.float16, 3),
    "soft-cap": ({"softcap": 3.0}, jnp.bfloat16, 3),
    "dropout": ({"dropout": array(2, dtype=jnp.uint32)}, jnp.bfloat16, 3),
    "segments": ({"segment_ids": array(1, 200, dtype=jnp.int32)}, jnp.bfloat16, 3),
    "positions": ({"q_positions": array(200, dtype=jnp.int32)}, jnp.bfloat16, 3),
    "dense": ({"bias": biases.Dense(array(1, 2, 200, 200))}, jnp.bfloat16, 4),
    "dense, of keys": ({"bias": biases.Dense(array(1, 1, 1, 200))}, jnp.bfloat16, 4),
    "function": ({"bias": biases.Function(gain, {"gain": array(), "slope": array()}, gathers=False)}, jnp.bfloat16, 3),
    "alibi": ({"bias": per_head(biases.ALiBi)}, jnp.bfloat16, 3),
    "kerple, logarithmic": ({"bias": per_head(biases.KerpleLog, 2)}, jnp.bfloat16, 3),
    "kerple, power": ({"bias": per_head(biases.KerplePower, 2)}, jnp.bfloat16, 3),
    "sandwich": ({"bias": per_head(biases.Sandwich)}, jnp.bfloat16, 3),
    "distance-aware": ({"bias": per_head(biases.DistanceAware, 2)}, jnp.bfloat16, 3),
    "a mask for each head": ({"mask": masks.PerHead((masks.Causal(), masks.Strided(3)))}, jnp.bfloat16, 3),
    "a mask that looks up": ({"mask": masks.random_blocks(16, 13, 2, seed=0)}, jnp.bfloat16, 3),
    "strided": ({"mask": masks.Causal() & (masks.Band(9, 0) | masks.Strided(9))}, jnp.bfloat16, 3),
    "fixed": ({"mask": masks.BlockLocal(12) | masks.Fixed(12, 3, shift=1)}, jnp.bfloat16, 3),
    "global": ({"mask": masks.Global((0, 1, 30)) | masks.Window(3, dilation=2) | masks.GlobalKeys((7,))}, jnp.bfloat16, 3),
    "image-local": ({"mask": masks.Local1D(8, 12) & ~masks.Local2D(10, 20, 2, 4, 1, 2)}, jnp.bfloat16, 3),
    "predicate": ({"mask": masks.Predicate(lambda q, k: (k <= q) & (k % 7 != 3))}, jnp.bfloat16, 3),
}


@pytest.mark.parametrize(("options", "dtype", "kernels"), FEATURES.values(), ids=FEATURES)
def test_every_feature_lowers_forward_and_backward(options, dtype, kernels):
    """With grouped heads, a head size that is no power of two, and a length that is no whole number of tiles."""
    q, kv = array(1, 200, 2, 40, dtype=dtype), array(1, 200, 1, 40, dtype=dtype)
    names = ("bias", "segment_ids", "q_positions", "kv_positions", "dropout")
    mask, softcap = options.get("mask", masks.Causal()), options.get("softcap")

    def loss(q, k, v, bias, segment_ids, q_positions, kv_positions, key):
        dropout = None if key is None else Dropout(0.1, key)
        arrays = (q, k, v, bias, segment_ids, q_positions, kv_positions, dropout)
        out, lse = attend(_call(*arrays, mask=mask, softcap=softcap, scale=None), interpret=False)
        return out.astype(jnp.float32).sum() + lse.sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    with compat.abstract_gpu():
        lowered = gradient.trace(q, kv, kv, *(options.get(name) for name in names)).lower(lowering_platforms=("cuda",))
    assert len(triton_calls(lowered)) == kernels


def test_every_bias_that_gathers_says_so():
    """A rule that says it does not, and does, is refused by the lowering, not computed wrongly."""
    bias = dataclasses.replace(biases.Function(lambda s, q, k, h, p: s + p[jnp.abs(q - k) % 4], array(4)), gathers=False)
    x = array(1, 64, 2, 64)

    def run(q, bias):
        return attend(_call(q, q, q, bias, *[None] * 4, mask=masks.Causal(), softcap=None, scale=None), interpret=False)

    with compat.abstract_gpu(), pytest.raises(NotImplementedError, match="gather"):
        jax.jit(run).trace(x, bias).lower(lowering_platforms=("cuda",))


def test_problems_name_what_a_compiled_kernel_must_not_do():
    good = {
        "kernel": "dkv",
        "dtype": "float16",
        "head_size": 128,
        "mask": "causal",
        "spilled_bytes": 0,
        "tensor_core": 8,
        "shared_bytes": 1024,
    }
    assert offline.problems([good, good | {"head_size": 256, "spilled_bytes": 4}]) == []
    bad = good | {"spilled_bytes": 320}, good | {"tensor_core": 0}, good | {"shared_bytes": 2**18}
    for row, words in zip(bad, ("spills 320 bytes", "no tensor-core", "262144 bytes of shared memory")):
        [problem] = offline.problems([row])
        assert problem.startswith("dkv at head size 128, float16, causal") and words in problem


def test_attend_chooses_nothing_unmeasured():
    x = array(1, 64, 2, 64)
    assert attention.explain(x, x, x).name != "portable"


PALLAS = [kernel for kernel in offline_scan.kernels() if kernel.implementation == "portable"]


@pytest.mark.parametrize("kernel", PALLAS, ids=lambda k: f"{k.name}-{k.dtype}-{k.states}-{k.options}")
def test_every_scan_lowers_and_moves_the_bytes_that_are_counted(kernel):
    """The count is of the loads and stores in the lowered kernel, at another size than the report's."""
    [call] = triton_calls(offline_scan.lower(kernel, batch=2, length=64))
    assert call.name in ("linear_scan", f"selective_scan_{kernel.name}")
    assert "tt.reduce" in call.ttir or kernel.name.startswith("linear")
    if kernel.name in ("forward", "backward"):
        assert requested_bytes(call) == offline_scan.traffic(kernel, batch=2, length=64)["requested"]


def test_scans_move_little_more_than_the_ideal():
    """For Mamba's 16 states, all of the pass: inputs, outputs and kept states once, and what blocks of channels share."""
    rows = [offline_scan.report(kernel, compiled=False) for kernel in PALLAS if kernel.options == "all"]
    ratios = {(row["name"], row["dtype"], row["states"]): row["ratio"] for row in rows}
    assert all(1 < ratios[name, dtype, 16] <= 1.3 for name in ("forward", "backward") for dtype in ("bfloat16", "float32"))
    assert not offline_scan.problems(rows)


def test_problems_name_a_scan_that_spills_or_moves_too_much():
    good = dataclasses.asdict(offline_scan.Kernel("backward", "bfloat16", 16, "all")) | {"ratio": 1.2}
    good |= {"spilled_bytes": 0, "shared_bytes": 512}
    assert offline_scan.problems([good, good | {"options": "bare", "ratio": 1.4}, good | {"states": 64, "ratio": 2.0}]) == []
    bad = good | {"spilled_bytes": 24}, good | {"ratio": 1.31}, good | {"shared_bytes": 2**18}
    for row, words in zip(bad, ("spills 24 bytes", "moves 1.31 times the ideal", "262144 bytes of shared memory")):
        [problem] = offline_scan.problems([row])
        assert problem.startswith("portable backward of 16 states, bfloat16, all") and words in problem


def test_bytes_of_a_loop_whose_bounds_depend_on_data_are_refused():
    with pytest.raises(ValueError, match="only loops of constant bounds have countable bytes"):
        requested_bytes(
            triton_calls(offline.lower(offline.Kernel("forward", "bfloat16", 64, BLOCKS["forward"][64], "causal")))[0]
        )


def test_rows_of_other_kernels_stay_if_they_are_of_the_same_commit(tmp_path):
    path, facts = tmp_path / "table.json", {"environment": {"commit": "a", "jax": "1", "date": "today"}}
    rows = [{"kernel": "dkv"}, {"kernel": "dq"}]
    assert command._kept(path, facts, "dq") == []
    path.write_text(json.dumps({"environment": {"commit": "a", "jax": "1", "date": "yesterday"}, "rows": rows}))
    assert command._kept(path, facts, "dq") == [{"kernel": "dkv"}] and command._kept(path, facts, None) == []
    assert command._kept(path, {"environment": {"commit": "b", "jax": "1", "date": "today"}}, "dq") == []


@pytest.mark.parametrize("op", command.OPS)
def test_every_kernel_is_known_by_the_name_in_its_row(op):
    kernel = next(iter(command.OPS[op].kernels()))
    assert command._name(command.OPS[op].report(kernel, compiled=False)) == kernel.name


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.EX2 R2, R3 ;
        /*0020*/                   FADD R2, R2, R4 ;
        /*0030*/              @!P0 SHFL.BFLY PT, R5, R2, 0x1, 0x1f ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   FMUL R2, R2, R5 ;
        /*0060*/             @!UP0 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80 ;
"""


def test_the_longest_loop_is_counted():
    """The outer one, with the inner one's instructions; the jump to itself at the end is padding."""
    assert longest_loop(SASS) == {"instructions": 6, "exponentials": 1, "shuffles": 1}
    assert longest_loop("") == {"instructions": 0, "exponentials": 0, "shuffles": 0}
