"""S4, S4D, DSS and S4ND: the layers against their recurrences, the published initial values, the variants and the errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers import Context
from efficient_attn.mixers.dss import DSS
from efficient_attn.mixers.s4 import S4
from efficient_attn.mixers.s4d import INITS, S4D
from efficient_attn.mixers.s4nd import S4ND
from efficient_attn.mixers.ssm import hippo
from efficient_attn.mixers.ssm.discretise import dense_bilinear
from efficient_attn.mixers.ssm.features import convolve, recur
from efficient_attn.mixers.ssm.kernels import kernel

pytestmark = pytest.mark.usefixtures("quick_compile")


def initialise(module, width=3, length=9):
    """An input and the module's parameters; `jit` makes the many small arrays of initialisation one program."""
    x = jax.random.normal(jax.random.key(0), (2, length, width))
    return x, jax.jit(module.init)(jax.random.key(1), x, Context())


def systems(module, variables, width=3):
    return jax.jit(lambda variables: module.apply(variables, width, method="systems"))(variables)


@functools.partial(jax.jit, static_argnums=1)
def kernel_of(system, length):
    return system.kernel(length)


def by_hand(p, x, A, B, C):
    """2 Re(C x) + D u with x_k = A x_{k-1} + B u_k, forwards with C[0] and, one step ahead, backwards with C[1], in float64."""

    def run(u, C):
        state, y = np.zeros_like(A), []
        for u_k in u:
            state = A * state + B * u_k[:, None]
            y.append(2 * (C * state).sum(axis=-1).real)
        return np.stack(y)

    outputs = []
    for u in np.asarray(x, np.float64):
        y = run(u, C[0])
        if len(C) == 2:
            y[:-1] += run(u[::-1], C[1])[::-1][1:]
        outputs.append(y + np.asarray(p["D"]) * u)
    return np.stack(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("A_init", INITS)
def test_s4d_layer_equals_the_recurrence(causal, A_init):
    module = S4D(state_dim=8, causal=causal, activation="gelu", A_init=A_init, copies=1)
    x, variables = initialise(module)
    p = variables["params"]
    Lambda = -np.exp(np.asarray(p["Lambda_log_neg_re"], np.float64)) + 1j * np.asarray(p["Lambda_im"])
    B, C = (np.asarray(p[k], np.float64) @ np.array([1, 1j]) for k in ("B", "C"))
    A_bar = np.exp(Lambda * np.exp(np.asarray(p["step"], np.float64))[:, None])
    expected = by_hand(p, x, A_bar, (A_bar - 1) / Lambda * B, C)
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, x, Context()), jax.nn.gelu(jnp.asarray(expected)), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("module", [S4(state_dim=64), S4D(state_dim=64, step_transform="softplus")])
def test_published_initial_values(module):
    """HiPPO-LegS with real parts -1/2, log-uniform steps, complex normal C, normal D."""
    _, variables = initialise(module, width=256)
    p = variables["params"]
    (system, _) = systems(module, variables, 256)
    Delta = system.Delta if isinstance(module, S4) else (system.log_A / Lambda_of(p))[:, 0].real
    assert 0.001 <= np.min(Delta) < 0.0013 and 0.077 < np.max(Delta) <= 0.1001
    np.testing.assert_allclose(np.median(np.log(Delta)), np.log(0.01), atol=0.4)
    np.testing.assert_allclose(Lambda_of(p)[7], hippo.dplr("legs", 64)[0], rtol=1e-4)
    assert p["C"].shape == (2, 256, 32, 2) and p["B"].shape == (256, 32, 2)
    np.testing.assert_allclose(np.mean(np.sum(p["C"] ** 2, axis=-1)), 1.0, rtol=0.05)
    np.testing.assert_allclose(np.std(p["D"]), 1.0, rtol=0.2)


def Lambda_of(p):
    return -np.exp(np.asarray(p["Lambda_log_neg_re"])) + 1j * np.asarray(p["Lambda_im"])


@pytest.mark.parametrize("A_init", ["legs", "lagt", "fourier"])
def test_s4_starts_as_the_hippo_system(A_init):
    """The kernel of an untrained S4 is that of the measure's dense matrices (Fourier: but for a clip of real parts)."""
    module = S4(state_dim=8, A_init=A_init, causal=True, copies=1)
    _, variables = initialise(module)
    (system,) = systems(module, variables)
    A, B, _ = hippo.MEASURES[A_init](8)
    V = hippo.dplr(A_init, 8)[3]
    A_bar, B_bar = dense_bilinear(jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32), system.Delta[1])
    C = 2 * (np.asarray(system.C[1]) @ V.conj().T).real
    expected = kernel(A_bar, B_bar, jnp.asarray(C, jnp.float32), 64)
    np.testing.assert_allclose(kernel_of(system, 64)[1], expected, rtol=0, atol=2e-3 if A_init == "fourier" else 1e-4)


def test_copies_are_shared_by_channels_in_turn():
    module = S4(state_dim=8, copies=2)
    _, variables = initialise(module, width=6)
    p = dict(variables["params"])
    assert {k: p[k].shape[0] for k in ("B", "P", "Lambda_im", "step")} == {"B": 2, "P": 2, "Lambda_im": 2, "step": 6}
    p["B"] = p["B"].at[1].multiply(2.0)
    before, after = systems(module, variables, 6)[0], systems(module, {"params": p}, 6)[0]
    np.testing.assert_allclose(after.B / before.B, np.tile([[1.0], [2.0]], (3, 4)), rtol=1e-6)


def test_half_the_sampling_interval_splits_every_step():
    """Zero-order hold: two steps of Delta / 2 with the same input are one step of Delta, K_l = K'_{2l} + K'_{2l+1}."""
    module, half = S4D(state_dim=8, A_init="lin"), S4D(state_dim=8, A_init="lin", rate=0.5)
    _, variables = initialise(module)
    K, K_half = (kernel_of(systems(m, variables)[0], 2 * n) for m, n in ((module, 10), (half, 20)))
    np.testing.assert_allclose(K, K_half.reshape(3, 20, 2).sum(axis=-1), rtol=0, atol=1e-5)


def test_bandlimit_leaves_fast_modes_out():
    """alpha = 1 keeps what turns slower than half a cycle a step, the Nyquist frequency."""
    _, variables = initialise(S4D(state_dim=64, A_init="lin", dt_min=0.06, dt_max=0.06))
    limited = systems(S4D(state_dim=64, A_init="lin", bandlimit=1.0), variables)[0]
    cycles = np.pi * np.arange(32) * 0.06 / (2 * np.pi)
    np.testing.assert_array_equal(np.asarray(limited.B_bar[0]) != 0, cycles < 0.5)
    assert 0 < np.sum(cycles >= 0.5) < 32


# DSS


def dss_by_definition(module, p, length):
    """Proposition 1 in float64: w Lambda^-1 (e^x - 1) e^(lx), or w Lambda^-1 softmax_l(l x), real part."""
    im = np.asarray(p["Lambda_im"], np.float64)
    re = np.asarray(p["Lambda_re"], np.float64)
    re = -np.exp(re) if module.variant == "exp" else re
    Delta = np.exp(np.asarray(p["log_step"], np.float64))
    x = Delta[:, :1] * re + 1j * Delta[:, 1:] * im
    w = np.asarray(p["C"], np.float64)[0] @ np.array([1, 1j])
    powers = np.exp(x[:, :, None] * np.arange(length))
    powers = powers * (np.exp(x) - 1)[..., None] if module.variant == "exp" else powers / powers.sum(axis=-1, keepdims=True)
    return np.einsum("en,enl->el", w / (re + 1j * im), powers).real


@pytest.mark.parametrize("variant", ["exp", "softmax"])
def test_dss_kernel_is_the_definition(variant):
    """Softmax also with eigenvalues that grow, whose kernel is normalised all the same."""
    module = DSS(state_dim=4, variant=variant, length=40, causal=True)
    x, variables = initialise(module)
    p = dict(variables["params"])
    np.testing.assert_allclose(p["Lambda_im"], -hippo.dplr("legs", 8)[0].imag, rtol=1e-6)
    p["log_step"] = p["log_step"].at[:, 1].add(0.3)
    if variant == "softmax":
        p["Lambda_re"] = jnp.array([-0.5, 0.7, -2.0, 40.0])
    (system,) = systems(module, {"params": p})
    expected = dss_by_definition(module, p, 40)
    np.testing.assert_allclose(kernel_of(system, 40), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(kernel_of(system, 13), expected[:, :13], rtol=0, atol=2e-5)
    np.testing.assert_allclose(recur(system, x, system.zero_state(2))[0], convolve((system,), x), rtol=0, atol=2e-5)


def test_dss_softmax_needs_its_length():
    with pytest.raises(ValueError, match=r"length=0 must be the length, at least 1, that variant='softmax' sums over"):
        initialise(DSS(state_dim=4, variant="softmax"))
    with pytest.raises(ValueError, match=r"model.mixer.length=8 must be at least 9, the length of the input"):
        initialise(DSS(state_dim=4, variant="softmax", length=8))


# S4ND


def test_s4nd_spreads_a_pixel_as_an_outer_product():
    """Two-sided along both axes, from a pixel inside an image whose last row is incomplete."""
    module = S4ND(columns=5, state_dim=8, activation="gelu")
    _, variables = initialise(module, width=2, length=18)
    variables["params"]["D"] = jnp.zeros(2)
    impulse = jnp.zeros((1, 18, 2)).at[0, 1 * 5 + 2].set(1.0)
    kernels = []
    for axis, position, n in (("rows", 1, 4), ("columns", 2, 5)):
        pair = systems(S4D(**shared(module)), {"params": variables["params"][axis]}, 2)
        behind, ahead = (kernel_of(system, n) for system in pair)
        kernels.append(jnp.concatenate([ahead[:, :position][:, ::-1], behind[:, : n - position]], axis=1))
    expected = jnp.einsum("er,es->rse", *kernels).reshape(20, 2)[:18]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, impulse, Context())[0], jax.nn.gelu(expected), rtol=0, atol=1e-5)
    assert np.min(np.abs(expected)) > 0


def shared(module):
    return {k: getattr(module, k) for k in ("state_dim", "A_init", "discretisation", "copies", "dt_min", "dt_max")}


# Errors


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (S4(state_dim=7), ValueError, "state_dim=7 must be even"),
        (S4D(copies=2), ValueError, "copies=2 must divide the 3 channels"),
        (S4(A_init="legt"), ConfigError, r"model.mixer.A_init='legt' is unknown.*one of: fourier, lagt, legs"),
        (S4D(discretisation="euler"), ConfigError, "model.mixer.discretisation='euler' is unknown"),
        (S4D(dt_min=0.2), ValueError, "dt_min=0.2 must be more than 0 and at most dt_max=0.1"),
        (S4ND(columns=0), ValueError, "model.mixer.columns=0 must be at least 1"),
        (S4ND(columns=4, causal=True), ValueError, "S4ND is bidirectional along both axes"),
    ],
)
def test_errors_name_what_is_wrong(module, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4, 3)), Context()))


@pytest.mark.parametrize("module", [S4(), DSS()])
def test_only_causal_layers_decode(module):
    with pytest.raises(ValueError, match=f"only a causal {type(module).__name__} decodes token by token; set causal=True"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4, 3)), Context(decode=True)))
