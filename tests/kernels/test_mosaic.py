"""The Mosaic GPU kernels: right in JAX's interpreter, lowered for an H200, refused where they cannot, never chosen unproven.

What the interpreter cannot run is in `kernels.attention.mosaic.machine`: wgmma and layouts of registers. On a GPU of compute
capability 9.0, `JAX_PLATFORMS=cuda pytest tests/kernels/test_mosaic.py -m gpu` runs the whole table of numerics compiled.
"""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import compat, devices
from kernels.attention import Dropout, api, biases, explain, masks, mosaic, numerics, reference
from kernels.attention.mosaic import operands, program, tiling
from kernels.attention.numerics import Case
from kernels.attention.portable import lists
from kernels.devices import SHARED_BYTES
from kernels.offline import expected
from kernels.offline import mosaic as offline

ALONE, NARROW = mosaic.Blocks(64, 64, 1, 2), mosaic.Blocks(64, 32, 2, 2)
INTERPRETED = {
    "grouped heads, documents, positions, ALiBi, ends cut short": (
        Case(40, 100, 64, "causal", H=2, G=1, documents=3, bias="ALiBi", positions=True),
        dict.fromkeys(tiling.PASSES, ALONE) | {"dkv": mosaic.Blocks(64, 32, 2, 2, split=True)},
    ),
    "two consumers with rows of their own or with the same, soft-cap, a table, descriptors of large heads made anew": (
        Case(128, 100, 256, "window", H=1, G=1, softcap=5.0, bias="dense"),
        {"forward": NARROW, "dkv": NARROW._replace(split=True), "dq": NARROW, "table": NARROW._replace(consumers=1)},
    ),
    "stored tiles that differ by head, T5's buckets": (
        Case(70, 100, 64, "by head", bias="T5"),
        dict.fromkeys(tiling.PASSES, ALONE),
    ),
}


@pytest.mark.parametrize(("case", "blocks"), INTERPRETED.values(), ids=INTERPRETED)
def test_forward_and_backward_meet_the_criterion_interpreted(case, blocks, quick_compile):
    found = numerics.check(functools.partial(mosaic.attend, blocks=blocks), case, runs=1)
    assert found["passed"], found


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="compiled Mosaic GPU kernels need an NVIDIA GPU; none is here")
@pytest.mark.parametrize("case", list(numerics.table()), ids=str)
def test_the_table_of_numerics_on_a_gpu(case):
    found = numerics.check(mosaic.attend, case)
    assert found["passed"], found


def test_the_criterion_sees_an_error_of_a_few_roundings(quick_compile):
    case = Case(9, 9, 8, "causal", H=1, G=1)

    def off(call):
        out, lse = reference.attend(call)
        return out * 1.03, lse

    found = numerics.check(off, case, runs=1)
    assert not found["passed"] and not found["out"]["passed"] and found["lse"]["passed"]


@pytest.mark.parametrize("name", tiling.PASSES)
def test_every_entry_of_the_block_table_lowers_for_a_gpu(name):
    """Every pattern at one head size; `python -m kernels.offline --op=mosaic` does them all at each."""
    kernels = [kernel for kernel in offline.kernels() if kernel.name == name and kernel.dtype == "bfloat16"]
    sizes = list(tiling.table()[name])
    assert len(kernels) == len(sizes) * len(offline.masks_of(name))
    for i, mask in enumerate(offline.masks_of(name)):
        of_mask = [kernel for kernel in kernels if kernel.mask == mask]
        kernel = of_mask[i % len(of_mask)]
        with compat.abstract_gpu():
            text = offline.lower(kernel, length=512).as_text()
        assert text.count(compat.MOSAIC_CALL) == 1 and f"attention_{name}" in text


BF16 = jnp.bfloat16


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


X, X96, X32 = (array(1, 64, 2, D, dtype=dtype) for D, dtype in ((64, BF16), (96, BF16), (64, jnp.float32)))
REFUSED = {
    "head size": ((X96, X96, X96), {}, "must be of one size in (64, 128, 256), not [96]"),
    "head sizes that differ": ((X, X, array(1, 64, 2, 128)), {}, "not [64, 128]"),
    "float32": ((X32, X32, X32), {}, "tensor cores take bfloat16 and float16, not float32"),
    "positions of a stored mask": (
        (X, X, X),
        {"mask": masks.PerHead((masks.Full(), masks.Causal())), "q_positions": array(64, dtype=jnp.int32)},
        "must be evaluated before positions are known",
    ),
    "a table of queries": (
        (X, X, X),
        {"bias": biases.Labels(array(1, 1, 64, 7), biases.Clipped(3))},
        "of biases it has Dense, and rules that add by distance alone, not Labels",
    ),
    "positions of distances": (
        (X, X, X),
        {"bias": biases.Bucketed(array(2, 32)), "q_positions": array(64, dtype=jnp.int32)},
        "the bias Bucketed must be evaluated before positions are known",
    ),
    "dropout": ((X, X, X), {"dropout": Dropout(0.1, array(2, dtype=jnp.uint32))}, "it has no dropout"),
}


@pytest.mark.parametrize(("arrays", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_missing_is_refused_with_a_reason(arrays, options, reason):
    others = explain(*arrays, **options, implementation="reference").others
    assert others["mosaic"].startswith("cannot: ") and reason in others["mosaic"]
    with pytest.raises(ValueError, match="implementation='mosaic' cannot run this call"):
        explain(*arrays, **options, implementation="mosaic")


@pytest.mark.parametrize("name", ["dense", "dense, of keys", "T5", "KERPLE"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_numbers_of_each_tile_are_what_the_bias_adds(name, transposed):
    """Of every tile that the passes read, without a kernel; with more queries than a tile, and fewer than keys."""
    H, L, S = 2, 150, 200
    bias, x = numerics.BIASES[name](H, L, S), array(1, L, H, 64)
    call = dataclasses.replace(Case(1, 1, 64, "full").call(), q=x, k=array(1, S, H, 64), bias=bias)
    q_pos, kv_pos = jnp.arange(L)[None, None, :, None] + S - L, jnp.arange(S)[None, None, None]
    whole = bias.score(jnp.zeros((1, H, L, S)), q_pos, kv_pos, jnp.arange(H)[None, :, None, None])[0]
    sizes = (64, 128) if transposed else (128, 64)
    cut = tiling.Tiling(*sizes, L, S, mosaic.Blocks(64, 64, 2, 2), interpret=True)
    found = operands.added(call, bias, cut, transposed)
    for row, column in itertools.product(range(cut.rows), range(cut.columns)):
        own, visited = (column, row) if transposed else (row, column)
        start = found.start + found.column[0] * own + found.column[1] * visited
        numbers = jnp.broadcast_to(found.numbers[0], (H, *found.numbers.shape[2:]))
        tile = numbers[:, own * 128 * found.row :][:, :128, start : start + 64]
        tile = tile.swapaxes(1, 2) if transposed else tile
        expected = whole[:, row * sizes[0] :, column * sizes[1] :][:, : sizes[0], : sizes[1]]
        np.testing.assert_allclose(tile[:, : expected.shape[1], : expected.shape[2]], expected, atol=1e-5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where files of devices are looked up, with the H200's block table alone."""
    table = devices.blocks_file(devices.FALLBACK).read_text()
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    monkeypatch.setattr(devices, "here", lambda: "NVIDIA Test 1")
    devices.verified.cache_clear()
    devices.blocks.cache_clear()
    (tmp_path / "blocks").mkdir()
    (tmp_path / "numerics").mkdir()
    devices.blocks_file(devices.FALLBACK).write_text(table)
    yield tmp_path
    devices.verified.cache_clear()
    devices.blocks.cache_clear()


def test_no_kernel_is_chosen_on_a_gpu_before_its_numerics_are_committed(folder):
    assert explain(X, X, X).name not in api.GPU_KERNELS
    assert api.preference("gpu") == api.PREFERENCE
    record = {"attend": {"mosaic": {"passed": True, "cases": 88}, "portable": {"passed": False, "cases": 88}}}
    (folder / "numerics" / "nvidia-test-1.json").write_text(json.dumps(record))
    devices.verified.cache_clear()
    assert api.preference("gpu") == ("ring", "mosaic", "chunked", "reference")
    assert api.preference("cpu") == api.PREFERENCE


def test_block_sizes_are_those_of_the_device_or_of_an_h200(folder):
    theirs = tiling.table("NVIDIA Test 1")
    assert theirs == tiling.table(devices.FALLBACK) and set(theirs) == set(tiling.PASSES)
    own = {name: {"64": mosaic.Blocks(64, 64, 1, 4)._asdict()} for name in tiling.PASSES}
    (folder / "blocks" / "nvidia-test-1.json").write_text(json.dumps({"mosaic": own}))
    devices.blocks.cache_clear()
    assert tiling.table("NVIDIA Test 1")["dq"] == {64: mosaic.Blocks(64, 64, 1, 4)}


def test_narrow_blocks_of_a_pattern_are_visited_in_narrow_tiles():
    x = array(1, 4096, 2, 128)
    bigbird = offline.MASKS["BigBird"].mask
    cuts = {mask: tiling.plan(offline.call_of(x, x, x, mask), interpret=True).forward for mask in ("causal", "BigBird")}
    assert {mask: cut.kv_tile for mask, cut in cuts.items()} == {"causal": 128, "BigBird": 64}
    assert tiling._pairs(bigbird, cuts["BigBird"]) < 0.8 * tiling._pairs(bigbird, cuts["causal"])
    positions = {name: array(1, 4096, dtype=jnp.int32) for name in ("q_positions", "kv_positions")}
    call = dataclasses.replace(offline.call_of(x, x, x, "BigBird"), **positions)
    assert tiling.plan(call, interpret=True).forward.kv_tile == 128


def test_problems_name_what_a_compiled_kernel_must_not_do():
    good = {"kernel": "dkv", "dtype": "bfloat16", "head_size": 128, "mask": "causal"}
    good |= {"spilled_bytes": 0, "wgmma": 48, "shared_bytes": 133120}
    assert offline.problems([good]) == []
    bad = good | {"spilled_bytes": 16}, good | {"wgmma": 0}, good | {"shared_bytes": 2**18}
    for row, words in zip(bad, ("spills 16 bytes", "no wgmma", "262144 bytes of shared memory")):
        [problem] = offline.problems([row])
        assert problem.startswith("mosaic dkv at head size 128, bfloat16, causal") and words in problem


def test_the_model_counts_allowed_pairs_and_the_programs_that_a_processor_holds():
    assert expected.allowed_pairs(masks.Causal(), 256) == 256 * 257 // 2
    assert expected.allowed_pairs(masks.Causal() & masks.Window(100), 256) == 100 * 101 // 2 + 156 * 100
    figures = {"consumers": 2, "registers": 168, "shared_bytes": 227 * 1024}
    assert expected.programs(figures, expected.Card()) == 1
    assert expected.programs(figures | {"consumers": 1, "registers": 80, "shared_bytes": 70_000}, expected.Card()) == 3


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("bias", [None, "dense"])
def test_blocks_fit_in_shared_memory_with_what_comes_with_each_pair(device, bias):
    """A stored mask, a table of float32, or both, take stages from the blocks that were fastest without; never all but one."""
    for name, entries in tiling.table(device).items():
        for size, blocks in entries.items():
            call = Case(300, 300, size, "negated", documents=2, bias=bias).call()
            fitted = tiling._fitted(name, tiling._relieved(name, blocks, size, call), size, call)
            assert 2 <= fitted.stages <= blocks.stages
            assert tiling._shared_bytes(name, fitted, size, call) <= SHARED_BYTES
    plain = Case(300, 300, 64, "causal").call()
    assert tiling._fitted("dkv", tiling.table(device)["dkv"][64], 64, plain) == tiling.table(device)["dkv"][64]


def test_shared_memory_is_what_the_compiled_kernels_take():
    """Within what barriers leave of their share."""
    rows = json.loads(pathlib.Path(expected.COMPILED).read_text())["rows"]
    for row in rows:
        blocks = mosaic.Blocks(*(row[field] for field in mosaic.Blocks._fields))
        kernel = offline.Kernel(row["kernel"], row["dtype"], row["head_size"], blocks, row["mask"])
        call = offline.call_for(kernel, offline.MASKS[kernel.mask].length, jax.ShapeDtypeStruct)
        cut = getattr(tiling.plan(call, False, dict.fromkeys(tiling.PASSES, blocks)), kernel.name)
        counted = tiling._shared_bytes(kernel.name, cut.blocks, kernel.head_size, call)
        assert counted - tiling.BARRIERS < row["shared_bytes"] <= counted, row


def test_the_longest_lines_come_first():
    """BigBird's global queries see every key; under a causal mask the last line is the longest, which needs no list."""
    listed = {}
    for mask in ("BigBird", "causal"):
        call = Case(1024, 1024, 64, mask).call()
        listed[mask] = lists.by_row(call, tiling.plan(call, interpret=True).dq, stored=tiling.is_stored(call.mask))
    order = program.longest_first(listed["BigBird"])
    visits = listed["BigBird"].visits[0]
    assert sorted(order) == list(range(len(visits)))
    assert (np.diff(visits[order]) <= 0).all() and visits[order[0]] > visits[order[-1]] and order[0] == 0
    assert program.longest_first(listed["causal"]) is None
