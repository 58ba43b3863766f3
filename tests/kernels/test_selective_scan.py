"""selective_scan: the reference against a plain loop, every implementation against the reference, and the edges."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.scan import explain_selective, selective_portable, selective_scan
from kernels.scan.selective import IMPLEMENTATIONS, SelectiveSpec
from kernels.scan.selective_blocks import Blocks
from kernels.scan.selective_chunked import K

SPEC = SelectiveSpec(2, 9, 4, 3, 1, "float32", True, True, jax.default_backend())
WHY_NOT = {name: implementation.supports(SPEC) for name, implementation in IMPLEMENTATIONS.items()}
NAMES = [pytest.param(n, marks=pytest.mark.skipif(why is not None, reason=str(why))) for n, why in WHY_NOT.items()]
FAST = sorted(name for name, why in WHY_NOT.items() if why is None and name != "reference")
TOLERANCE = 1e-4  # the oracle folder's own, for another float32 implementation
IN_TIME = ("u", "delta", "B", "C", "z")
OPTIONAL = ("D", "z", "delta_bias", "h0")
scan = jax.jit(selective_scan, static_argnames=("softplus", "reverse", "implementation"))


@pytest.fixture(autouse=True)
def single_steps(monkeypatch):
    """Nothing unrolled in the Pallas kernels, which is quick to compile; test_scan_portable has spans of several steps."""
    monkeypatch.setattr(selective_portable, "table", lambda: {256: Blocks(64, 1, 1, 4, 8)})


@pytest.fixture
def x64(quick_compile):
    with jax.enable_x64(True):
        yield


def arrays(L, *, groups=0, B=2, E=4, N=3, seed=0) -> dict:
    """Every argument of `selective_scan`, in double precision; groups=0: B and C without a group axis."""
    rng = np.random.default_rng(seed)
    shared = (B, L, groups, N) if groups else (B, L, N)
    shapes = dict(u=(B, L, E), delta=(B, L, E), A=(E, N), B=shared, C=shared, D=(E,), z=(B, L, E), delta_bias=(E,), h0=(B, E, N))
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return values | {"A": -np.exp(values["A"])}


def resets(L, B=2):
    return jnp.asarray(np.random.default_rng(1).random((B, L)) < 0.2)


def loop(u, delta, A, B, C, D, z, delta_bias, h0, reset, reverse):
    """The definition in NumPy, one row, one position and one channel at a time."""
    rows, L, E = u.shape
    B, C = (np.repeat(x, E // x.shape[2], axis=2) if x.ndim == 4 else np.repeat(x[:, :, None], E, axis=2) for x in (B, C))
    y, last = np.zeros_like(u), np.zeros_like(h0)
    for row in range(rows):
        for e in range(E):
            h = h0[row, e]
            for t in range(L)[:: -1 if reverse else 1]:
                crosses = reset[row, t] if not reverse else t + 1 < L and reset[row, t + 1]
                dt = np.log1p(np.exp(delta[row, t, e] + delta_bias[e]))
                h = np.exp(dt * A[e]) * (0 if crosses else h) + dt * u[row, t, e] * B[row, t, e]
                gate = z[row, t, e] / (1 + np.exp(-z[row, t, e]))
                y[row, t, e] = (C[row, t, e] @ h + D[e] * u[row, t, e]) * gate
            last[row, e] = h
    return y, last


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
def test_reference_is_the_recurrence(x64, groups, reverse):
    values, reset = arrays(9, groups=groups), resets(9)
    y, last = scan(**jax.tree.map(jnp.asarray, values), reset=reset, reverse=reverse, implementation="reference")
    expected = loop(**values, reset=reset, reverse=reverse)
    np.testing.assert_allclose(y, expected[0], rtol=1e-12)
    np.testing.assert_allclose(last, expected[1], rtol=1e-12)


def value_and_gradients(name, values, reset=None, **options):
    """y, h_last and the gradient of every array, of a loss that reads both."""
    rng = np.random.default_rng(2)
    g, g_last = rng.normal(size=values["u"].shape), rng.normal(size=(len(values["u"]), *values["A"].shape))

    def loss(values):
        y, last = selective_scan(**values, reset=reset, implementation=name, **options)
        return (g * y).sum() + (y * y).sum() + (g_last * last).sum(), (y, last)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, values))
    return {"y": outputs[0], "h_last": outputs[1], **gradients}


# L, groups, reverse, with resets, softplus, optional arguments left out
CASES = [
    (1, 0, False, False, True, ()),
    (2, 0, True, True, True, ("h0",)),
    (63, 2, False, True, True, ()),
    (64, 0, True, False, True, ("D", "z")),
    (65, 2, True, True, False, ("delta_bias",)),
    (1000, 0, False, False, True, OPTIONAL),
    pytest.param(16384, 0, True, True, True, (), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("L", "groups", "reverse", "has_resets", "softplus", "left_out"), CASES)
def test_all_equal_the_reference_with_all_gradients(x64, L, groups, reverse, has_resets, softplus, left_out):
    values = {key: x for key, x in arrays(L, groups=groups).items() if key not in left_out}
    if not softplus:
        values["delta"] = np.exp(values["delta"])
    options = dict(reset=resets(L) if has_resets else None, reverse=reverse, softplus=softplus)
    expected = value_and_gradients("reference", values, **options)
    for name in FAST:
        ours = value_and_gradients(name, values, **options)
        assert set(ours) == {"y", "h_last", *values}
        for key in ours:
            np.testing.assert_allclose(ours[key], expected[key], rtol=1e-10, atol=1e-10, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("reverse", [False, True])
def test_resets_equal_separate_sequences(x64, reverse):
    starts = (0, 1, 17, 40)
    values = {key: jnp.asarray(x) for key, x in arrays(70, B=1).items() if key != "h0"}
    reset = jnp.isin(jnp.arange(70), jnp.array(starts))[None]
    packed, _ = scan(**values, reset=reset, reverse=reverse)
    parts = [{**values, **{key: jnp.split(values[key], starts[1:], axis=1)[i] for key in IN_TIME}} for i in range(len(starts))]
    pieces = [scan(**part, reverse=reverse, implementation="reference")[0] for part in parts]
    np.testing.assert_allclose(packed, jnp.concatenate(pieces, axis=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_continues_from_its_last_state(x64, reverse):
    values = jax.tree.map(jnp.asarray, arrays(70))
    whole, last = scan(**values, reverse=reverse)
    left, right = ({**values, **{k: values[k][:, part] for k in IN_TIME}} for part in (slice(45), slice(45, 70)))
    first, second = (right, left) if reverse else (left, right)
    y_first, middle = scan(**first, reverse=reverse)
    y_second, end = scan(**{**second, "h0": middle}, reverse=reverse)
    pieces = [y_second, y_first] if reverse else [y_first, y_second]
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-11)
    np.testing.assert_allclose(end, last, rtol=1e-11)


def test_float32_error_is_at_most_twice_the_references():
    """Against float64, per array and relative to its size: FlashAttention's criterion."""
    values = {key: x.astype(np.float32) for key, x in arrays(300).items()}
    values["delta"] -= 2
    with jax.enable_x64(True):
        exact = value_and_gradients("reference", {key: x.astype(np.float64) for key, x in values.items()})
        exact = jax.tree.map(np.asarray, exact)

    def errors(name):
        results = value_and_gradients(name, values)
        assert all(x.dtype == np.float32 for x in results.values())
        return {key: abs(np.float64(x) - exact[key]).max() / abs(exact[key]).max() for key, x in results.items()}

    bounds = {key: 2 * error + 1e-6 for key, error in errors("reference").items()}
    for name in FAST:
        assert all(error <= bounds[key] for key, error in errors(name).items()), name


@pytest.mark.parametrize("name", NAMES)
def test_step_sizes_over_twelve_orders_of_magnitude_stay_finite(quick_compile, name):
    values = {key: x.astype(np.float32) for key, x in arrays(80).items() if key != "delta_bias"}
    dt = np.logspace(-9, 3, 80, dtype=np.float32)[None, :, None]
    values["delta"] = np.broadcast_to(np.where(dt > 50, dt, np.log(np.expm1(np.minimum(dt, 50)))), values["u"].shape)
    np.testing.assert_allclose(jax.nn.softplus(values["delta"][0, :, 0]), dt[0, :, 0], rtol=1e-2)
    assert all(np.all(np.isfinite(x)) for x in value_and_gradients(name, values).values())


def test_memory_has_no_term_in_length_times_channels_times_states():
    """Forward and backward, temporary bytes for each further step: those of some [E] arrays, a small part of one [E, N]."""
    E, N = 64, 32

    def temporary_bytes(L):
        shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in arrays(L, B=1, E=E, N=N).items()}
        gradient = jax.jit(jax.grad(lambda v: selective_scan(**v, implementation="chunked")[0].sum()))
        return gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    each_step = (temporary_bytes(64 * K) - temporary_bytes(32 * K)) / (32 * K)
    assert 0 < each_step <= 4 * (8 * E + 2 * E * N / K)
    assert each_step < 4 * E * N / 3


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_float32_for_bfloat16_inputs(quick_compile, name):
    values = {key: jnp.asarray(x, jnp.bfloat16) for key, x in arrays(40).items()}
    y, last = scan(**values, implementation=name)
    expected, expected_last = scan(**{key: x.astype(jnp.float32) for key, x in values.items()}, implementation=name)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_array_equal(last, expected_last)
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))
    gradient = jax.eval_shape(jax.grad(lambda v: scan(**v, implementation=name)[0].astype(jnp.float32).sum()), values)
    assert all(x.dtype == jnp.bfloat16 for x in gradient.values())


@pytest.mark.parametrize("name", NAMES)
def test_oracle(oracle_dir, name):
    """The state-space part of an independent Mamba block, from its convolution's output to the gate."""
    stated = json.loads((oracle_dir / "mamba_s6_mixer.json").read_text())
    assert "Bbar = dt*B (Euler, not ZOH)" in stated["semantics"][3]
    x = {key: jnp.asarray(value) for key, value in np.load(oracle_dir / "mamba_s6_mixer.npz").items()}
    arguments = (x["aux.conv_out_u"], x["aux.dt"], -jnp.exp(x["w.A_log"]), x["aux.B"], x["aux.C"], x["w.D"])
    y, last = scan(*arguments, softplus=False, implementation=name)
    np.testing.assert_allclose(y, x["aux.scan_out_before_gate"], atol=TOLERANCE)
    np.testing.assert_allclose(last, x["aux.last_state"], atol=TOLERANCE)


def test_explain_says_what_runs_and_why():
    shapes = {name: jax.ShapeDtypeStruct(x.shape, "float32") for name, x in arrays(9).items()}
    assert explain_selective(**shapes).name == "chunked"
    assert "asked for by name" in str(explain_selective(**shapes, implementation="reference"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(A=(3, 3)), r"A has shape \(3, 3\); for u \(2, 5, 4\) it must be \(4, N\)"),
        (dict(delta=(2, 5, 1)), r"delta has shape \(2, 5, 1\).* must be \(2, 5, 4\)"),
        (dict(D=(3,)), r"D has shape \(3,\).* must be \(4,\)"),
        (dict(h0=(2, 3, 4)), r"h0 has shape \(2, 3, 4\).* must be \(2, 4, 3\)"),
        (dict(B=(2, 5, 2)), r"B has shape \(2, 5, 2\); B and C must both be \(2, 5, 3\) or \(2, 5, G, 3\)"),
        (dict(B=(2, 5, 3, 3), C=(2, 5, 3, 3)), "G a divisor of 4"),
        (dict(u=(2, 0, 4)), "length 0"),
    ],
)
def test_errors_say_what_was_expected(changes, message):
    shapes = {name: x.shape for name, x in arrays(5).items()} | changes
    with pytest.raises(ValueError, match=message):
        explain_selective(**{name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()})


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="'fast' does not exist; use one of"):
        selective_scan(**jax.tree.map(jnp.float32, arrays(5)), implementation="fast")
