"""ssd: the recurrence against a plain loop and an oracle, the matrix form against the recurrence, and the edges."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.dispatch import anything
from kernels.scan import explain_ssd, ssd, ssd_forms
from kernels.scan.ssd import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation
IN_TIME = ("x", "dt", "B", "C")
ANYWHERE = [name for name, implementation in IMPLEMENTATIONS.items() if implementation.supports is anything]
OPTIONAL = ("A", "D", "dt_bias", "h0")
scan = jax.jit(ssd, static_argnames=("softplus", "dt_limit", "reverse", "implementation"))


@pytest.fixture
def x64():
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def arrays(L, *, B=2, H=4, P=3, G=2, N=5, seed=0) -> dict:
    """Every argument of `ssd`, in double precision."""
    rng = np.random.default_rng(seed)
    shapes = dict(x=(B, L, H, P), dt=(B, L, H), A=(H,), B=(B, L, G, N), C=(B, L, G, N), D=(H,), dt_bias=(H,), h0=(B, H, P, N))
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return values | {"A": -np.exp(values["A"])}


def resets(L, B=2):
    return jnp.asarray(np.random.default_rng(1).random((B, L)) < 0.1)


def loop(x, dt, A, B, C, D, dt_bias, h0, reset, reverse):
    """The definition in NumPy, one head and one position at a time."""
    rows, L, H, _ = x.shape
    y, last = np.zeros_like(x), np.zeros_like(h0)
    for row in range(rows):
        for head in range(H):
            group, h = head // (H // B.shape[2]), h0[row, head]
            for t in range(L)[:: -1 if reverse else 1]:
                crosses = reset[row, t] if not reverse else t + 1 < L and reset[row, t + 1]
                step = np.clip(np.log1p(np.exp(dt[row, t, head] + dt_bias[head])), 0.3, 1.5)
                written = step * np.outer(x[row, t, head], B[row, t, group])
                h = np.exp(step * A[head]) * (0 if crosses else h) + written
                y[row, t, head] = h @ C[row, t, group] + D[head] * x[row, t, head]
            last[row, head] = h
    return y, last


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_is_the_recurrence(x64, reverse):
    values, reset = arrays(9), resets(9)
    options = dict(reset=reset, reverse=reverse, dt_limit=(0.3, 1.5))
    y, last = scan(**jax.tree.map(jnp.asarray, values), **options, implementation="reference")
    expected = loop(**values, reset=reset, reverse=reverse)
    np.testing.assert_allclose(y, expected[0], rtol=1e-11)
    np.testing.assert_allclose(last, expected[1], rtol=1e-11)


def value_and_gradients(name, values, **options):
    """y, h_last and the gradient of every array, of a loss that reads both."""
    rng = np.random.default_rng(2)
    g, g_last = rng.normal(size=values["x"].shape), rng.normal(size=arrays(1)["h0"].shape)

    def loss(values):
        y, last = ssd(**values, implementation=name, **options)
        return (g * y).sum() + (y * y).sum() + (g_last * last).sum(), (y, last)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, values))
    return {"y": outputs[0], "h_last": outputs[1], **gradients}


# L, groups, reverse, with resets, optional arguments left out
CASES = [
    (1, 2, False, False, ()),
    (2, 1, True, True, ("h0",)),
    (63, 4, False, True, ("A",)),
    (65, 2, True, True, ("dt_bias",)),
    (1000, 1, False, False, OPTIONAL),
]


@pytest.mark.parametrize(("L", "groups", "reverse", "has_resets", "left_out"), CASES)
def test_matrix_form_is_the_recurrence_with_all_gradients(x64, L, groups, reverse, has_resets, left_out):
    values = {key: v for key, v in arrays(L, G=groups).items() if key not in left_out}
    constants = {"A": None} if "A" in left_out else {}
    options = constants | dict(reset=resets(L) if has_resets else None, reverse=reverse)
    ours, expected = (value_and_gradients(name, values, **options) for name in ("chunked", "reference"))
    assert set(ours) == {"y", "h_last", *values}
    for key in ours:
        np.testing.assert_allclose(ours[key], expected[key], rtol=1e-10, atol=1e-10, err_msg=key)


def test_stretches_of_chunks_are_the_recurrence_with_all_gradients(x64, monkeypatch):
    """Three stretches of two chunks, the last of them padding."""
    chunked = dataclasses.replace(
        IMPLEMENTATIONS["chunked"], run=ssd_forms.on_steps(functools.partial(ssd_forms.dual, scores=2**16))
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", chunked)
    options = dict(reset=resets(300), reverse=True)
    ours, expected = (value_and_gradients(name, arrays(300), **options) for name in ("chunked", "reference"))
    for key in expected:
        np.testing.assert_allclose(ours[key], expected[key], rtol=1e-10, atol=1e-10, err_msg=key)


def test_resets_equal_separate_sequences(x64):
    starts = (0, 1, 17, 80)
    values = {key: jnp.asarray(v) for key, v in arrays(140, B=1).items() if key != "h0"}
    packed, _ = scan(**values, reset=jnp.isin(jnp.arange(140), jnp.array(starts))[None])
    parts = [{**values, **{key: jnp.split(values[key], starts[1:], axis=1)[i] for key in IN_TIME}} for i in range(len(starts))]
    pieces = [scan(**part, implementation="reference")[0] for part in parts]
    np.testing.assert_allclose(packed, jnp.concatenate(pieces, axis=1), rtol=1e-11, atol=1e-12)


def test_float32_error_is_at_most_twice_the_recurrences():
    """Against float64, per array and relative to its size; decays are mixed, a strong one between weak ones."""
    values = {key: v.astype(np.float32) for key, v in arrays(300).items()}
    values["dt"] = values["dt"] - 3 + 300 * (np.arange(300) % 20 == 7)[None, :, None].astype(np.float32)
    with jax.enable_x64(True):
        exact = value_and_gradients("reference", {key: v.astype(np.float64) for key, v in values.items()})
        exact = jax.tree.map(np.asarray, exact)

    def errors(name):
        results = value_and_gradients(name, values)
        assert all(v.dtype == np.float32 for v in results.values())
        return {key: abs(np.float64(v) - exact[key]).max() / abs(exact[key]).max() for key, v in results.items()}

    plain, ours = errors("reference"), errors("chunked")
    assert all(ours[key] <= 2 * plain[key] + 1e-6 for key in exact), (ours, plain)


@pytest.mark.parametrize("form", [ssd_forms.recurrence, ssd_forms.dual])
def test_one_strong_decay_leaves_the_mild_ones_around_it_exact(form):
    """In float32 against float64, each strength in a head of its own; what strong steps let through is 0, and its gradient."""
    rng = np.random.default_rng(0)
    strong = np.float32([-1e4, -1e6, -1e30, -np.inf])
    x, B, C, h0 = (
        rng.normal(size=shape).astype(np.float32) for shape in ((1, 20, 1, 4, 3), (1, 20, 1, 5), (1, 20, 1, 5), (1, 1, 4, 3, 5))
    )
    log_decay = -0.1 * rng.random((1, 20, 1, 4), np.float32)
    log_decay[:, 9] = strong

    def results(dtype):
        values = [jnp.asarray(v, dtype) for v in (x, log_decay, B, C, h0)]
        outputs, pullback = jax.vjp(jax.jit(form), *values)
        return [np.asarray(v) for v in (*outputs, *pullback(jax.tree.map(jnp.ones_like, outputs)))]

    with jax.enable_x64(True):
        exact = results(jnp.float64)
    found = results(jnp.float32)
    for ours, truth in zip(found, exact):
        np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-6 * abs(truth).max())
    assert not found[3][:, 9].any()


@pytest.mark.parametrize("name", ANYWHERE)
def test_step_sizes_over_twelve_orders_of_magnitude_stay_finite(name):
    values = {key: v.astype(np.float32) for key, v in arrays(80).items() if key != "dt_bias"}
    values["dt"] = np.broadcast_to(np.logspace(-9, 3, 80, dtype=np.float32)[None, :, None], values["dt"].shape)
    results = value_and_gradients(name, values, softplus=False, reset=resets(80))
    assert all(np.all(np.isfinite(v)) for v in results.values())


@pytest.mark.parametrize("name", ANYWHERE)
def test_the_state_is_float32_for_bfloat16_inputs(name):
    values = {key: jnp.asarray(v, jnp.bfloat16) for key, v in arrays(70).items()}
    y, last = scan(**values, implementation=name)
    expected, expected_last = scan(**{key: v.astype(jnp.float32) for key, v in values.items()}, implementation=name)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_allclose(last, expected_last, rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7)


@pytest.mark.parametrize("case", ["mamba2_ssd_mixer", "mamba2_ssd_mixer_groups_ragged"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_oracle(oracle_dir, name, case):
    """The bare operator of an independent Mamba-2 mixer; B and C come repeated for every head of a group."""
    stated = json.loads((oracle_dir / f"{case}.json").read_text())
    assert "ssd_out includes the D skip" in stated["semantics"][-1]
    a = {key: jnp.asarray(value) for key, value in np.load(oracle_dir / f"{case}.npz").items()}
    each = stated["hyper"]["heads"] // stated["hyper"]["groups"]
    B, C = a["aux.B"][:, :, ::each], a["aux.C"][:, :, ::each]
    y, last = scan(a["aux.u"], a["aux.dt"], a["aux.A"], B, C, a["w.D"], softplus=False, implementation=name)
    np.testing.assert_allclose(y, a["aux.ssd_out"], atol=TOLERANCE)
    np.testing.assert_allclose(last, a["aux.last_state"], atol=TOLERANCE)


def test_explain_says_what_runs_and_why():
    shapes = {name: jax.ShapeDtypeStruct(v.shape, "float32") for name, v in arrays(9).items()}
    assert explain_ssd(**shapes).name == "chunked"
    assert "asked for by name" in str(explain_ssd(**shapes, implementation="reference"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(A=(3,)), r"A has shape \(3,\).* must be \(4,\)"),
        (dict(dt=(2, 5, 1)), r"dt has shape \(2, 5, 1\).* must be \(2, 5, 4\)"),
        (dict(C=(2, 5, 2, 4)), r"C has shape \(2, 5, 2, 4\).* must be \(2, 5, 2, 5\)"),
        (dict(h0=(2, 4, 5, 3)), r"h0 has shape \(2, 4, 5, 3\).* must be \(2, 4, 3, 5\)"),
        (dict(B=(2, 5, 3, 5), C=(2, 5, 3, 5)), "G a divisor of 4"),
        (dict(x=(2, 0, 4, 3)), "length 0"),
    ],
)
def test_errors_say_what_was_expected(changes, message):
    shapes = {name: v.shape for name, v in arrays(5).items()} | changes
    with pytest.raises(ValueError, match=message):
        explain_ssd(**{name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()})
