"""`selective_scan`: the one entry to every implementation of Mamba's state-space layer S6 (Gu & Dao 2023, arXiv 2312.00752)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import devices
from kernels.dispatch import Choice, Implementation, anything, choose
from kernels.scan import carried, selective_chunked, selective_portable, selective_reference, triton
from kernels.scan.arguments import check_arrays, check_direction
from kernels.scan.selective_reference import Inputs, discretise, keeps


@dataclasses.dataclass(frozen=True)
class SelectiveSpec:
    """The static facts of one call, which decide what can run it: E channels in `groups`, each with N states."""

    batch: int
    length: int
    channels: int
    state: int
    groups: int
    dtype: str
    reset: bool
    reverse: bool
    platform: str


def _compiled(scan):
    """As one compiled function, also where the caller is not: its loops are then not traced again at every call."""
    return jax.jit(scan, static_argnums=(0, 1))


IMPLEMENTATIONS = {
    "reference": Implementation(
        _compiled(selective_reference.scan), anything, "lax.scan, one step after another: the specification"
    ),
    "associative": Implementation(
        _compiled(selective_reference.parallel_prefix),
        anything,
        "lax.associative_scan: O(log L) dependent steps, but several [B, L, E, N]",
    ),
    "chunked": Implementation(
        _compiled(selective_chunked.scan), anything, "states kept every 32 steps and computed again between"
    ),
    "portable": Implementation(
        _compiled(selective_portable.scan),
        selective_portable.why_not,
        "Pallas kernels with the states in registers, compiled on a GPU and interpreted on a CPU",
    ),
    "triton": Implementation(
        _compiled(triton.scan), triton.why_not, "Triton kernels through jax-triton, parallel in time inside chunks of 16 steps"
    ),
}
# Fastest first, as benchmarks/selective_scan.py measures it on CPUs. On a GPU the order that benchmarks/gpu_scan.py measured on
# such a device goes first (`devices.preference`): until its file is committed there, GPU kernels run only by name.
PREFERENCE = ("chunked", "reference", "associative")


def selective_scan(
    u: Float[Array, "B L E"],
    delta: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L *GN"],
    C: Float[Array, "B L *GN"],
    D: Float[Array, "E"] | None = None,
    z: Float[Array, "B L E"] | None = None,
    delta_bias: Float[Array, "E"] | None = None,
    *,
    softplus: bool = True,
    h0: Float[Array, "B E N"] | None = None,
    reset: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """The selective state-space model S6 (Gu & Dao 2023, algorithm 2), for each channel e of u:

        dt_t = softplus(delta_t + delta_bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t          N states; Euler's B_bar = dt B, as the released code, not eq. (4)
        y_t = (C_t . h_t + D u_t) silu(z_t)

    Args:
      u: the input.
      delta: step sizes before the bias and softplus.
      A: the continuous decay rates, not positive.
      B, C: [B, L, N], shared by all channels, or [B, L, G, N]: channel e reads group e // (E / G).
      D: the skip connection; None is none.
      z: the gate; None is none.
      delta_bias: added to delta; None is 0.
      softplus: without it, dt = delta + delta_bias, which must not be negative.
      h0: the state before the first step, zero by default.
      reset: True where a document starts: no state crosses a start, in either direction (see `linear_scan`).
      reverse: run from the last position to the first, from `h0` at the end.
      implementation: a name in `IMPLEMENTATIONS`, or None for the fastest measured on this platform; see `explain_selective`.

    Returns:
      `y` [B, L, E] in u's type, and `h_last` [B, E, N], the last state computed (the first position's in reverse). The state is
      float32 whatever the inputs are (float64 where an input is), and is returned so.

    Raises:
      ValueError: shapes do not fit together, L is 0, or the named implementation cannot run this call.
    """
    options = dict(h0=h0, reset=reset, reverse=reverse, implementation=implementation)
    choice = explain_selective(u, delta, A, B, C, D, z, delta_bias, **options)
    dtype = _state_dtype(u, delta, A, B, C, D, z, delta_bias, h0)
    if carried.is_split():
        arrays = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, reset=reset)
        h0 = jnp.zeros((len(u), *A.shape), dtype) if h0 is None else h0.astype(dtype)
        return _on_mesh(arrays, h0, softplus, reverse, choice.name)
    inputs = _inputs(dtype, u, delta, A, B, C, D, z, delta_bias, h0)
    y, last = IMPLEMENTATIONS[choice.name].run(softplus, reverse, inputs, keeps(reset, reverse, dtype))
    last = jnp.moveaxis(last, 1, 2).reshape(len(u), A.shape[1], u.shape[2])
    return y.reshape(u.shape).astype(u.dtype), jnp.swapaxes(last, 1, 2)


def _on_mesh(arrays, h0, softplus: bool, reverse: bool, implementation: str):
    def run(**arrays):
        return selective_scan(**arrays, softplus=softplus, reverse=reverse, implementation=implementation)

    def decay(arrays):
        bias = arrays["delta_bias"]
        dt = arrays["delta"].astype(h0.dtype)
        dt, _ = discretise(softplus, dt, dt, bias if bias is None else bias.astype(h0.dtype))
        return jnp.exp(dt.sum(axis=1)[..., None] * arrays["A"][None].astype(h0.dtype))

    by_group = "BL-" if arrays["B"].ndim == 3 else "BLM-"
    axes = {"u": "BLM", "delta": "BLM", "z": "BLM", "A": "M-", "B": by_group, "C": by_group, "D": "M", "delta_bias": "M"}
    return carried.scan(run, decay, arrays, {**axes, "reset": "BL"}, h0, "BM-", reverse=reverse)


def _inputs(dtype, u, delta, A, B, C, D, z, delta_bias, h0) -> Inputs:
    """The arguments by group of channels; those that do not vary in time, and the state, in the state's type."""
    batch, length, channels = u.shape
    groups, states = (1 if B.ndim == 3 else B.shape[2]), A.shape[1]

    def grouped(x):
        return None if x is None else x.reshape(*x.shape[:-1], groups, channels // groups)

    def at_full_precision(x):
        return None if x is None else x.astype(dtype)

    h0 = jnp.zeros((batch, channels, states), dtype) if h0 is None else h0
    return Inputs(
        u=grouped(u),
        delta=grouped(delta),
        A=jnp.moveaxis(grouped(at_full_precision(A.T)), 0, 1),
        B=B.reshape(batch, length, groups, states),
        C=C.reshape(batch, length, groups, states),
        D=grouped(at_full_precision(D)),
        z=grouped(z),
        delta_bias=grouped(at_full_precision(delta_bias)),
        h0=jnp.moveaxis(grouped(at_full_precision(jnp.swapaxes(h0, 1, 2))), 1, 2),
    )


def explain_selective(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, *, softplus=True, h0=None, reset=None, reverse=False, implementation=None
) -> Choice:
    """Which implementation `selective_scan` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why."""
    _check(u, A, {"B": B, "C": C}, {"delta": delta, "z": z}, {"D": D, "delta_bias": delta_bias}, h0)
    batch, length, channels = u.shape
    check_direction("selective_scan", reset, reverse, (batch, length), f"u {u.shape}")
    spec = SelectiveSpec(
        batch=batch,
        length=length,
        channels=channels,
        state=A.shape[1],
        groups=1 if B.ndim == 3 else B.shape[2],
        dtype=str(_state_dtype(u, delta, A, B, C, D, z, delta_bias, h0)),
        reset=reset is not None,
        reverse=reverse,
        platform=jax.default_backend(),
    )
    preference = devices.preference("selective_scan", spec.platform, PREFERENCE)
    return carried.told(choose("selective_scan", IMPLEMENTATIONS, preference, spec, implementation), length)


def _check(u, A, by_group, like_u, by_channel, h0) -> None:
    delta, optional = {"delta": like_u["delta"]}, {"z": like_u["z"], "h0": h0, **by_channel}
    check_arrays("selective_scan", {"u": u, "A": A, **by_group, **delta}, optional)
    if u.ndim != 3:
        raise ValueError(f"selective_scan: u has shape {u.shape}; it must be [B, L, E]")
    batch, length, channels = u.shape
    if length == 0:
        raise ValueError(f"selective_scan: u {u.shape} has length 0; at least one step is needed")
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"selective_scan: A has shape {A.shape}; for u {u.shape} it must be ({channels}, N)")
    states = A.shape[1]
    expected = {name: (x, u.shape) for name, x in like_u.items()} | {name: (x, (channels,)) for name, x in by_channel.items()}
    expected["h0"] = (h0, (batch, channels, states))
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {x.shape}; for u {u.shape} and A {A.shape} it must be {shape}")
    for name, x in by_group.items():
        shapes = [(batch, length, states), *((batch, length, G, states) for G in range(1, channels + 1) if channels % G == 0)]
        if x.shape not in shapes or x.shape != by_group["B"].shape:
            wanted = f"({batch}, {length}, {states}) or ({batch}, {length}, G, {states}) with G a divisor of {channels}"
            raise ValueError(f"selective_scan: {name} has shape {x.shape}; B and C must both be {wanted}")


def _state_dtype(*arrays) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays if x is not None))
