"""The Triton kernels of the selective scan: interpreted on the CPU, compiled for an H200, and run on a GPU where there is one."""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.offline import scan as offline_scan
from kernels.scan import explain_selective, selective_scan, ssd_triton, triton
from kernels.scan.selective import SelectiveSpec
from kernels.scan.selective_blocks import shrink
from kernels.scan.ssd import SSDSpec

ROOT = pathlib.Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason=f"needs an NVIDIA GPU; this is {jax.default_backend()}")


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_are_the_reference():
    """Outputs and all gradients: groups, resets, reverse, optional arguments left out, broken chunks, strong decays, float16."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    script = pathlib.Path(__file__).with_name("scan_triton_interpreted.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 15


@pytest.mark.slow
@needs_triton
def test_compiled_for_an_h200_nothing_spills():
    """In a process of its own: run-time checks of shapes are no part of a kernel, and may be switched on here."""
    code = """
import json
from kernels.offline import scan
rows = [scan.report(kernel, compiled=True) for kernel in scan.kernels() if kernel.implementation == "triton"]
print(json.dumps([rows, scan.problems(rows)]))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows, problems = json.loads(done.stdout)
    assert len(rows) == 4 * len(triton.table()) + 3 * len(ssd_triton.SIZES) + 3 and problems == []
    assert all(row["tensor_core"] > 0 for row in rows if row["name"].startswith("ssd"))
    assert all(row["registers"] > 32 for row in rows)


SPEC = SelectiveSpec(1, 8, 4, 16, 1, "float32", False, False, "gpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "Triton runs on NVIDIA GPUs, not on cpu"),
        ({"dtype": "float64"}, "its state is float32, not float64"),
        ({"state": 257}, "it has blocks for up to 256 states of a channel, not 257"),
    ],
)
def test_what_the_kernels_cannot_run_says_why(monkeypatch, changes, reason):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_triton")
    assert triton.why_not(SPEC) is None
    assert triton.why_not(dataclasses.replace(SPEC, **changes)) == reason


SSD = SSDSpec(1, 8, 2, 64, 128, 1, "float32", "bfloat16", "gpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "Triton runs on NVIDIA GPUs, not on cpu"),
        ({"products": "float32"}, "x, B and C must all be bfloat16 or float16, not float32"),
        ({"products": "mixed"}, "x, B and C must all be bfloat16 or float16, not mixed"),
        ({"dtype": "float64"}, "its state is float32, not float64"),
        ({"head_dim": 65}, "head sizes are (16, 32, 64, 128), not 65"),
        ({"state": 256}, "numbers of states are (16, 32, 64, 128), not 256"),
    ],
)
def test_what_the_matrix_form_cannot_run_says_why(monkeypatch, changes, reason):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_triton")
    assert ssd_triton.why_not(SSD) is None
    assert reason in ssd_triton.why_not(dataclasses.replace(SSD, **changes))


def test_without_jax_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install jax-triton" in triton.why_not(SPEC)


@pytest.mark.parametrize("states", triton.table())
def test_a_chunk_is_one_span_of_the_backward_pass(states):
    """At every length: T is a power of two, and the kept states are those before the chunks that a program takes at once."""
    for length in (1, 2, 3, 17, 4096):
        blocks = shrink(triton.table()[states], length, 100)
        assert blocks.backward == blocks.K and blocks.K % blocks.forward == 0 and blocks.K & (blocks.K - 1) == 0


def test_it_is_never_chosen_off_a_gpu():
    u, A, B = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 9, 4), (4, 3), (2, 9, 3)))
    expected = "cannot: Triton runs on NVIDIA GPUs, not on cpu" if jax.default_backend() == "cpu" else "asked for by name"
    assert expected in explain_selective(u, u, A, B, B).others["triton"]


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_it_is_the_reference():
    rng = np.random.default_rng(0)
    shapes = {"u": (2, 100, 40), "delta": (2, 100, 40), "A": (40, 16), "B": (2, 100, 16), "C": (2, 100, 16), "z": (2, 100, 40)}
    values = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    values["A"] = -jnp.exp(values["A"])

    def gradients(name):
        return jax.jit(jax.grad(lambda v: jnp.sum(selective_scan(**v, implementation=name)[0] ** 2)))(values)

    ours, expected = gradients("triton"), gradients("reference")
    for name in values:
        scale = float(jnp.max(jnp.abs(expected[name])))
        np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_bytes_are_within_the_bound_that_holds_for_pallas():
    passes = itertools.product(("forward", "backward"), (16, 64, 256))
    kernels = [offline_scan.Kernel(name, "bfloat16", states, "all", "triton") for name, states in passes]
    rows = [offline_scan.report(kernel, compiled=False) for kernel in kernels]
    assert not offline_scan.problems(rows) and all(row["ratio"] > 1 for row in rows)
