"""Attention and scans spread over devices equal the op on one device; what a mesh makes of a call is told and checked."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import mesh
from kernels.attention import masks, ring
from kernels.matmul import matmul

ROOT = pathlib.Path(__file__).parents[2]
CASES = ("causal", "window", "documents", "learned bias, dropout", "linear, time-invariant", "selective", "ssd")
MORE_CASES = ("full, both directions", "rows and heads alone", "linear", "linear, reverse", "selective, reverse")


def on_eight_devices(*cases):
    command = [sys.executable, "-m", "tests.kernels.on_eight_devices", *cases]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(*CASES)


def check(arrays):
    """FlashAttention's criterion: at most twice the float32 error of one device, against float64, and 1e-6."""
    assert arrays and all(spread <= 2 * plain + 1e-6 for spread, plain in arrays.values()), arrays


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_device_forward_and_backward(case, found):
    check(found["cases"][case])


@pytest.mark.exhaustive
def test_more_cases_are_equal_to_one_device():
    for arrays in on_eight_devices(*MORE_CASES)["cases"].values():
        check(arrays)


@pytest.mark.slow
def test_the_ring_runs_where_the_devices_divide_the_length_and_says_why_not_elsewhere(found):
    told = found["told"]
    assert told["divided"].startswith("ring: ") and "each device has every 8th token, and there are 8 steps" in told["divided"]
    assert told["odd"].startswith("chunked: ") and "the 8 devices along seq do not divide the length 126" in told["odd"]
    assert "pad it to a multiple" in told["by name"]


@pytest.mark.slow
def test_tokens_are_dealt_out_where_contiguous_stretches_would_have_unequal_work(found):
    assert found["layouts"] == {"causal": [True, 8], "window": [False, 2], "full": [False, 8]}


@pytest.mark.parametrize("block", [4, 16, 64])
def test_no_step_of_the_ring_is_left_out_where_devices_end_between_tiles(block):
    mask, L, n = masks.BlockLocal(block), 400, 4  # stretches of 100
    p = np.arange(L)
    device = p * n // L
    shifts = ((device[:, None] - device[None]) % n)[np.asarray(mask.allowed(p[:, None], p[None]))]
    assert ring.layout(mask, L, n)[1] == 1 + shifts.max()


def abstract(**sizes):
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    )


def test_without_a_mesh_there_is_nothing_to_lay_out():
    x = jnp.ones((4, 8))
    assert mesh.shards(mesh.ROWS) == 1 and mesh.along(8, mesh.SEQ) is None and mesh.constrain(x, mesh.ROWS, mesh.SEQ) is x


def test_an_axis_that_does_not_divide_leaves_the_array_whole():
    with abstract(data=2, fsdp=3, seq=4):
        assert mesh.along(12, mesh.ROWS) == ("data", "fsdp") and mesh.along(4, mesh.ROWS) is None
        assert mesh.along(8, mesh.SEQ) == "seq" and mesh.shards((*mesh.ROWS, mesh.SEQ)) == 24
    with abstract(data=1, seq=4):
        assert mesh.along(5, mesh.ROWS) is None and P(mesh.along(4, "seq")) == P("seq")


def test_rows_and_positions_are_not_joined_where_positions_are_split():
    def products(x, w):
        return [str(eqn.invars[0].aval.shape) for eqn in jax.make_jaxpr(matmul)(x, w).eqns if eqn.primitive.name == "dot_general"]

    x, w = jnp.ones((2, 8, 4)), jnp.ones((4, 4))
    assert products(x, w) == ["(16, 4)"]
    with abstract(seq=4):
        assert products(x, w) == ["(2, 8, 4)"]
