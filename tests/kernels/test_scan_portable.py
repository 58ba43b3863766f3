"""The scans' Pallas kernels, interpreted: several blocks of channels, spans and chunks, and what only they refuse or promise.

What every implementation must do is in test_scan and test_selective_scan; `JAX_PLATFORMS=cuda pytest tests/kernels -k scan` runs
these tests with kernels compiled for the GPU that is there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.scan import explain, explain_selective, linear_scan, portable, reference, selective_portable, selective_reference
from kernels.scan.api import ScanSpec
from kernels.scan.selective import SelectiveSpec
from kernels.scan.selective_blocks import Blocks, Plan, pad, shrink
from kernels.scan.selective_reference import Inputs, keeps

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def inputs_of(L, *, B=2, G=2, F=5, N=3, bare=False) -> Inputs:
    """Arrays of double precision; 5 channels of 3 states fill no block."""
    rng = np.random.default_rng(0)
    shapes = Inputs((B, L, G, F), (B, L, G, F), (G, N, F), (B, L, G, N), (B, L, G, N), (G, F), (B, L, G, F), (G, F), (B, G, N, F))
    values = Inputs(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))
    values = values._replace(A=-jnp.exp(values.A))
    return values._replace(D=None, z=None, delta_bias=None, delta=jnp.exp(values.delta)) if bare else values


def outputs_and_gradients(scan, inputs: Inputs, keep):
    """y, h_last and all gradients of a loss that reads both."""
    rng = np.random.default_rng(1)
    g, g_last = jnp.asarray(rng.normal(size=inputs.u.shape)), jnp.asarray(rng.normal(size=inputs.h0.shape))

    def loss(inputs):
        y, last = scan(inputs, keep)
        return (g * y + y * y).sum() + (g_last * last * last).sum(), (y, last)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return {"y": outputs[0], "h_last": outputs[1]} | {k: v for k, v in gradients._asdict().items() if v is not None}


# L, reverse, packed, bare; blocks of 2 channels, spans of 4 and 2 steps, chunks of 8: ragged, less than one, and whole
CASES = [(27, False, True, False), (19, True, True, False), (5, True, False, True), (16, False, False, False)]


@pytest.mark.parametrize(("L", "reverse", "packed", "bare"), CASES)
def test_blocks_spans_and_chunks_add_up(x64, L, reverse, packed, bare):
    inputs = inputs_of(L, bare=bare)
    reset = jnp.asarray(np.random.default_rng(2).random((2, L)) < 0.3) if packed else None
    keep = keeps(reset, reverse, jnp.float64)
    ours = functools.partial(selective_portable.scan, not bare, reverse, blocks=Blocks(2, 4, 2, 8, 1))
    expected = outputs_and_gradients(functools.partial(selective_reference.scan, not bare, reverse), inputs, keep)
    found = outputs_and_gradients(ours, inputs, keep)
    assert set(found) == set(expected)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-10, atol=1e-10, err_msg=key)


def test_only_states_before_chunks_are_kept():
    """The residuals of the backward pass: the inputs, and N / K of the size of u."""
    inputs = jax.tree.map(jnp.float32, inputs_of(64, G=1, F=4, N=4))
    scan = functools.partial(selective_portable.scan, True, False, keep=None, blocks=Blocks(4, 4, 2, 16, 1))
    residuals = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(scan, x)[1], inputs))
    sizes = sorted(x.size for x in residuals if x.size > 1)  # scalars are the padding's
    assert sizes == sorted([*(x.size for x in inputs), inputs.u.size * 4 // 16])


def test_the_same_call_gives_the_same_bits():
    inputs = jax.tree.map(jnp.float32, inputs_of(19))
    scan = functools.partial(selective_portable.scan, True, False, keep=None, blocks=Blocks(2, 4, 2, 8, 1))
    gradient = jax.jit(jax.grad(lambda inputs: jnp.sum(scan(inputs)[0] ** 2)))
    for one, other in zip(gradient(inputs), gradient(inputs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_whole_blocks_are_not_copied():
    inputs = inputs_of(16, F=4, N=4)
    plan = Plan(Blocks(2, 4, 2, 8, 1), 16, softplus=True, reverse=False, interpret=True)
    padded, keep = pad(plan, inputs, None)
    assert keep is None and jax.tree.map(jnp.shape, padded) == jax.tree.map(jnp.shape, inputs)


@pytest.mark.parametrize(("L", "F", "expected"), [(1, 3, (4, 1, 1, 1)), (6, 100, (64, 8, 2, 8)), (40, 64, (64, 8, 2, 16))])
def test_blocks_shrink_to_short_sequences(L, F, expected):
    assert shrink(Blocks(64, 8, 2, 16, 4), L, F) == Blocks(*expected, 4)


@pytest.mark.parametrize("time_varying", [False, True])
@pytest.mark.parametrize(("L", "reverse", "is_complex"), [(27, True, True), (3, False, False), (16, False, True)])
def test_blocks_and_spans_of_the_linear_scan(x64, L, reverse, is_complex, time_varying):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0))

    a, b, h0 = 0.5 * normal(*((2, L, 5) if time_varying else (5,))), normal(2, L, 5), normal(2, 5)
    ours = portable.scan(a, b, h0, reverse=reverse, blocks=portable.Blocks(2, 8, 1))
    np.testing.assert_allclose(ours, reference.scan(a, b, h0, reverse=reverse), rtol=1e-12, atol=1e-12)


SELECTIVE = SelectiveSpec(1, 8, 4, 16, 1, "float32", False, False, "gpu")
LINEAR = ScanSpec(1, 8, 4, "complex64", True, False, False, "gpu")


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        (SELECTIVE, {"platform": "tpu"}, "written for NVIDIA GPUs, and interpreted on cpu, not for tpu"),
        (SELECTIVE, {"dtype": "float64"}, "on a GPU its state is float32, not float64"),
        (SELECTIVE, {"state": 300}, "up to 256 states of a channel, not 300"),
        (LINEAR, {"platform": "tpu"}, "written for NVIDIA GPUs, and interpreted on cpu, not for tpu"),
        (LINEAR, {"dtype": "complex128"}, "on a GPU its state is float32 or complex64, not complex128"),
    ],
)
def test_what_the_kernels_cannot_run_says_why(spec, changes, reason):
    why_not = selective_portable.why_not if spec is SELECTIVE else portable.why_not
    assert why_not(spec) is None
    assert reason in why_not(dataclasses.replace(spec, **changes))


def test_nothing_unmeasured_is_chosen():
    a, b = jax.ShapeDtypeStruct((3,), "float32"), jax.ShapeDtypeStruct((2, 9, 3), "float32")
    assert "runs only when asked for by name" in explain(a, b).others["portable"]
    u, A, B, few_A, few_B = (
        jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 9, 4), (4, 300), (2, 9, 300), (4, 3), (2, 9, 3))
    )
    assert "runs only when asked for by name" in explain_selective(u, u, few_A, few_B, few_B).others["portable"]
    with pytest.raises(ValueError, match=r"'portable' cannot run this call.*up to 256 states"):
        explain_selective(u, u, A, B, B, implementation="portable")
    with pytest.raises(ValueError, match="'mosaic' does not exist"):
        linear_scan(jnp.zeros(3), jnp.zeros((2, 9, 3)), implementation="mosaic")
