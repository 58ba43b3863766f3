"""linear_scan: the reference against a plain loop, every implementation against the reference, and the edges."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels.scan import explain, linear_scan
from kernels.scan.api import IMPLEMENTATIONS

FAST = sorted(set(IMPLEMENTATIONS) - {"reference"})
scan = jax.jit(linear_scan, static_argnames=("reverse", "implementation"))


@pytest.fixture
def x64(quick_compile):
    with jax.enable_x64(True):
        yield


def arrays(L, *, time_varying, is_complex, B=2, N=3, seed=0):
    """a, b, h0, reset and two cotangents, in double precision."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)

    a = normal(*((B, L, N) if time_varying else (N,)))
    a = a / np.maximum(1.0, 1.1 * abs(a))
    return a, normal(B, L, N), normal(B, N), rng.random((B, L)) < 0.2, normal(B, L, N), normal(B, N)


def loop(a, b, h0, reset, reverse):
    """The definition, one step at a time in NumPy."""
    B, L, _ = b.shape
    a = np.broadcast_to(a, b.shape)
    out = np.zeros_like(b)
    for row in range(B):
        h = h0[row]
        for t in range(L)[:: -1 if reverse else 1]:
            crosses = reset[row, t] if not reverse else t + 1 < L and reset[row, t + 1]
            h = a[row, t] * (0 if crosses else h) + b[row, t]
            out[row, t] = h
    return out


def value_and_gradients(name, a, b, h0, reset, g, g_last, reverse):
    """h, h_last and the gradients by a, b, h0 of a real loss that reads both."""

    def loss(a, b, h0):
        h, last = linear_scan(a, b, h0=h0, reset=reset, reverse=reverse, implementation=name)
        return ((g * h).sum() + (g_last * last * last).sum() + (h * h.conj()).sum()).real, (h, last)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(a, b, h0))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time_varying", [False, True])
def test_reference_is_the_recurrence(x64, time_varying, reverse):
    a, b, h0, reset, *_ = arrays(9, time_varying=time_varying, is_complex=True)
    options = {"h0": jnp.asarray(h0), "reset": jnp.asarray(reset)}
    h, last = scan(jnp.asarray(a), jnp.asarray(b), **options, reverse=reverse, implementation="reference")
    expected = loop(a, b, h0, reset, reverse)
    np.testing.assert_allclose(h, expected, rtol=1e-12)
    np.testing.assert_allclose(last, expected[:, 0 if reverse else -1], rtol=1e-12)


# L, time-varying, reverse, complex, with resets
CASES = [
    (1, False, True, False, False),
    (2, True, False, True, False),
    (63, False, True, True, False),
    (63, True, False, False, True),
    (65, False, False, True, True),
    (65, True, True, True, True),
    (1000, True, False, True, False),
    (16384, False, False, True, False),
]


@pytest.mark.parametrize(("L", "time_varying", "reverse", "is_complex", "has_resets"), CASES)
@pytest.mark.parametrize("name", FAST)
def test_equals_reference_with_all_gradients(x64, name, L, time_varying, reverse, is_complex, has_resets):
    *data, reset, g, g_last = arrays(L, time_varying=time_varying, is_complex=is_complex)
    arguments = (*map(jnp.asarray, data), jnp.asarray(reset) if has_resets else None, g, g_last, reverse)
    for ours, expected in zip(value_and_gradients(name, *arguments), value_and_gradients("reference", *arguments), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_gradients_are_finite_differences(x64, name, is_complex):
    a, b, h0, *_ = (jnp.asarray(x) for x in arrays(19, time_varying=False, is_complex=is_complex))

    def as_jax(a, b, h0):
        return scan(jnp.asarray(a), jnp.asarray(b), h0=jnp.asarray(h0), implementation=name)

    check_grads(as_jax, (a, b, h0), order=1, modes=["rev"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_resets_equal_separate_sequences(x64, name, reverse):
    a, b, *_ = (jnp.asarray(x) for x in arrays(40, time_varying=False, is_complex=True, B=1))
    starts = (0, 1, 17, 33)
    reset = jnp.isin(jnp.arange(40), jnp.array(starts))[None]
    packed, _ = scan(a, b, reset=reset, reverse=reverse, implementation=name)
    pieces = [scan(a, part, reverse=reverse)[0] for part in jnp.split(b, starts[1:], axis=1)]
    np.testing.assert_allclose(packed, jnp.concatenate(pieces, axis=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_scan_continues_from_its_last_state(x64, name):
    a, b, h0, *_ = (jnp.asarray(x) for x in arrays(50, time_varying=False, is_complex=True))
    whole, last = scan(a, b, h0=h0, implementation=name)
    first, middle = scan(a, b[:, :23], h0=h0, implementation=name)
    second, end = scan(a, b[:, 23:], h0=middle, implementation=name)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-12)
    np.testing.assert_allclose(end, last, rtol=1e-12)


@pytest.mark.parametrize("name", FAST)
def test_float32_is_as_exact_as_the_decay_it_is_given(name):
    """Error against float64 at most twice that of the sequential float32 scan, plus what one unit in the last place of `a`
    costs: powers of `a` are rounded too. The bound is taken per decay, from the strongest to none, and is never a NaN."""
    rng = np.random.default_rng(1)
    modulus = np.array([0.0, 1e-30, 0.5, 0.9, 0.999, 0.99999, 1.0])
    a = (modulus * np.exp(1j * rng.uniform(0, 3, 7))).astype(np.complex64)
    b, g = ((rng.normal(size=(2, 2000, 7, 2)) @ (1, 1j)).astype(np.complex64) for _ in range(2))

    def run(name, a, dtype):
        h, pullback = jax.vjp(lambda a, b: scan(a, b, implementation=name)[0], jnp.asarray(a, dtype), jnp.asarray(b, dtype))
        da, db = pullback(jnp.asarray(g, dtype))
        return [np.asarray(x) for x in (h, da[None, None], db)]

    with jax.enable_x64(True):
        exact = run("reference", a, "complex128")
        moved = run("reference", a * (1 + np.finfo(np.float32).eps), "complex128")
    results = zip(run(name, a, "complex64"), run("reference", a, "complex64"), exact, moved, strict=True)
    for ours, sequential, truth, nearby in results:
        bound = 2 * abs(sequential - truth).max((0, 1)) + abs(nearby - truth).max((0, 1)) + 1e-6
        assert ours.dtype == np.complex64
        assert (abs(ours - truth).max((0, 1)) <= bound).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_state_is_float32_for_bfloat16_inputs(quick_compile, name):
    rng = np.random.default_rng(2)
    a = jnp.asarray(rng.uniform(0.9, 1, 4), jnp.bfloat16)
    b = jnp.asarray(rng.normal(size=(2, 40, 4)), jnp.bfloat16)
    h, last = scan(a, b, implementation=name)
    expected, _ = scan(a.astype(jnp.float32), b.astype(jnp.float32), implementation=name)
    assert h.dtype == last.dtype == jnp.float32
    np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-6)  # in bfloat16 it would be 4e-3
    assert jax.grad(lambda b: scan(a, b, implementation=name)[0].sum())(b).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_state_may_have_several_axes_and_mixed_types(x64, name):
    rng = np.random.default_rng(3)
    a, b = jnp.asarray(rng.uniform(0, 1, (4, 5)) * 1j), jnp.asarray(rng.normal(size=(2, 33, 4, 5)))
    h, last = scan(a, b, implementation=name)
    flat, flat_last = scan(a.reshape(-1), b.reshape(2, 33, -1), implementation=name)
    assert h.dtype == jnp.complex128
    np.testing.assert_array_equal(h.reshape(flat.shape), flat)
    np.testing.assert_array_equal(last.reshape(flat_last.shape), flat_last)


def test_a_time_invariant_decay_is_never_expanded():
    """Nothing in the forward and backward pass of `chunked` broadcasts anything to the size of `b`."""
    a, b = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((2, 64, 3), jnp.float32)

    def forward_and_backward(a, b, g):
        return jax.vjp(lambda a, b: linear_scan(a, b, implementation="chunked")[0], a, b)[1](g)

    trace = str(jax.make_jaxpr(forward_and_backward)(a, b, b))
    broadcasts = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\] = broadcast_in_dim", trace)]
    assert 0 < max(map(np.prod, broadcasts)) < b.size


def test_explain_says_what_runs_and_why():
    a, b = jax.ShapeDtypeStruct((3,), "complex64"), jax.ShapeDtypeStruct((2, 9, 3), "complex64")
    assert explain(a, b).name == "chunked"
    assert "asked for by name" in str(explain(a, b, implementation="reference"))


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "options", "message"),
    [
        ((2, 5), (2, 5, 3), {}, r"a has shape \(2, 5\); for b \(2, 5, 3\) it must be \(2, 5, 3\) or \(3,\)"),
        ((3,), (2, 0, 3), {}, "length 0"),
        ((3,), (2, 5, 3), {"implementation": "fast"}, "'fast' does not exist; use one of"),
    ],
)
def test_errors_say_what_was_expected(a_shape, b_shape, options, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(jnp.zeros(a_shape), jnp.zeros(b_shape), **options)
