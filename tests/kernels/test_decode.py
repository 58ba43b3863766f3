"""The decode kernel: right in JAX's interpreter with keys in a row and in blocks, lowered for an H200, cut to fill one.

On a GPU of compute capability 9.0, `JAX_PLATFORMS=cuda python -m benchmarks.decode_numerics` runs the whole table compiled.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_numerics
from kernels import compat, devices
from kernels.attention import biases, chunked, explain, masks, numerics, paged, reference
from kernels.attention.mosaic import decode
from kernels.attention.numerics import Case
from kernels.offline import decode as offline

BLOCKS = decode.Blocks(64, 2, 1)
INTERPRETED = {
    "in a row: a chunk of ragged rows, grouped heads, two consumers, a ring that goes round": (
        Case(3, 192, 64, "causal", B=2, H=2, G=1, ragged=True),
        0,
        decode.Options(decode.Blocks(64, 2, 2), splits=1),
    ),
    "blocks smaller than a tile, an empty row, soft-cap": (
        Case(1, 128, 64, "causal", B=3, H=2, G=1, softcap=3.0, ragged=True),
        16,
        decode.Options(BLOCKS, splits=1),
    ),
    "blocks larger than a tile, more parts than tiles": (
        Case(1, 128, 64, "causal", H=1, G=1),
        128,
        decode.Options(BLOCKS, splits=3),
    ),
}


@pytest.mark.parametrize(("case", "block_size", "options"), INTERPRETED.values(), ids=INTERPRETED)
def test_meets_the_criterion_interpreted(case, block_size, options, quick_compile):
    run = functools.partial(decode.attend_blocks, options=options)
    run = numerics.in_blocks(run, block_size) if block_size else functools.partial(decode.attend, chunked.attend, options=options)
    found = numerics.check(run, case, runs=1, forward_only=True)
    assert found["passed"], found


@pytest.mark.parametrize("block_size", [0, 8, 64])
def test_lowers_for_a_gpu(block_size):
    """`python -m kernels.offline --op=decode` does them all at each head size."""
    kernel = next(kernel for kernel in offline.kernels() if kernel.block_size == block_size)
    with compat.abstract_gpu():
        text = offline.lower(kernel).as_text()
    assert text.count(compat.MOSAIC_CALL) == 1 and "attention_decode" in text


def test_problems_name_what_a_compiled_kernel_must_not_do():
    good = {"kernel": "decode", "dtype": "bfloat16", "head_size": 128, "block_size": 16}
    good |= {"spilled_bytes": 0, "wgmma": 24, "shared_bytes": 215176}
    assert offline.problems([good]) == []
    [problem] = offline.problems([good | {"spilled_bytes": 8}])
    assert problem == "mosaic decode at head size 128, bfloat16, blocks of 16: spills 8 bytes"


def test_every_entry_of_the_table_fits_the_kernel():
    """A stage belongs to one consumer, else a consumer would miss phases of its barrier."""
    for size, blocks in decode.table().items():
        assert decode.Options(blocks).cut(4, size, 8, 4096, None, 1.0).blocks == blocks
        assert blocks.keys == decode.KEYS and size in decode.HEAD_SIZES
    with pytest.raises(ValueError, match="stages must be a multiple of consumers"):
        decode.Options(decode.Blocks(64, 3, 2)).cut(4, 64, 8, 4096, None, 1.0)


@pytest.mark.parametrize(("programs", "tiles"), [(1, 1), (1, 2048), (8, 2048), (32, 128), (512, 128), (500, 1024)])
def test_splits_fill_the_device(programs, tiles):
    """Programs run in waves, which together take at most a tenth longer than even shares of the tiles would."""
    parts = decode.splits(programs, tiles)
    waves = -(-programs * parts // decode.PROCESSORS)
    assert 1 <= parts <= min(tiles, decode.MAX_SPLITS)
    even = programs * tiles / decode.PROCESSORS + decode.OVERHEAD * -(-programs // decode.PROCESSORS)
    assert waves * (-(-tiles // parts) + decode.OVERHEAD) <= 1.1 * even + 1


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


Q, KV = array(2, 1, 8, 64), array(2, 128, 2, 64)
REFUSED = {
    "a window": ((Q, KV, KV), {"mask": masks.Causal() & masks.Window(9)}, "it has the masks Full and Causal, not And"),
    "many rows": ((array(2, 16, 10, 64), KV, KV), {}, "64 rows for the query heads of a group and their tokens, not 80"),
    "many tokens": ((array(2, 16, 8, 64), *[array(2, 64, 2, 64)] * 2), {}, "at most 1 / 8 of the keys, not 16 of 64"),
    "odd lengths": ((Q, *[array(2, 100, 2, 64)] * 2), {}, "keys must be a multiple of 64, not 100"),
    "positions of keys": ((Q, KV, KV), {"kv_positions": array(128, dtype=jnp.int32)}, "keys must be at their default positions"),
    "float32": ([array(*x.shape, dtype=jnp.float32) for x in (Q, KV, KV)], {}, "tensor cores take bfloat16 and float16"),
    "head size": ((array(2, 1, 8, 96), *[array(2, 128, 2, 96)] * 2), {}, "must be of one size in (64, 128, 256), not [96]"),
    "a bias": ((Q, KV, KV), {"bias": biases.ALiBi(array(8, dtype=jnp.float32))}, "it has no biases, as ALiBi"),
    "documents": ((Q, KV, KV), {"segment_ids": (array(2, 1, dtype=int), array(2, 128, dtype=int))}, "it has no segment ids"),
}


@pytest.mark.parametrize(("arrays", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_missing_is_refused_with_a_reason(arrays, options, reason):
    others = explain(*arrays, **options, implementation="reference").others
    assert others["decode"].startswith("cannot: ") and reason in others["decode"]


def test_blocks_that_do_not_fit_a_tile_are_refused():
    arrays = array(2, 8, 64), *[array(2, 9, 24, 64)] * 2, array(2, 4, dtype=jnp.int32)
    with pytest.raises(ValueError, match="blocks must hold 8, 16, 32 or a multiple of 64 tokens, not 24"):
        paged.explain(*arrays, implementation="mosaic")


def test_gradients_are_those_of_the_tiled_form(monkeypatch, quick_compile):
    """The kernel itself is replaced: what is checked is the rule around it."""
    call = Case(2, 64, 64, "causal", B=2, H=2, G=1, ragged=True, dtype="float32").call()
    dense = lambda q, k, v, *_, **options: reference.attend(dataclasses.replace(call, q=q, k=k, v=v))  # noqa: E731
    monkeypatch.setattr(decode, "attend_rows", dense)

    def loss(run, q, k, v):
        out, lse = run(dataclasses.replace(call, q=q, k=k, v=v))
        return (out * jnp.arange(64.0)[None, None, None]).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    runs = functools.partial(decode.attend, chunked.attend), reference.attend
    gradients = [jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2))) for run in runs]
    for ours, expected in zip(*(gradient(call.q, call.k, call.v) for gradient in gradients)):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_verdict_is_recorded_of_ops_whose_whole_table_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    rows = [check.key | {"passed": True} for check in decode_numerics.checks()][:-1]
    facts = {"environment": {"commit": "a", "date": "today", "jax": "1"}, "device": "NVIDIA Test 1", "assembler": "13"}
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(facts | {"rows": rows}))
    decode_numerics.record(file)
    found = json.loads((tmp_path / "numerics" / "nvidia-test-1.json").read_text())
    assert found["attend"]["decode"]["passed"] and found["attend"]["decode"]["measured"]["commit"] == "a"
    assert "paged.attend" not in found, "one of its calls was not run"
    rows[0]["passed"] = False
    assert not decode_numerics.verdicts(rows)["attend"]["passed"]
