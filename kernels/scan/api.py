"""`linear_scan`: the one entry to every implementation of h_t = a_t h_{t-1} + b_t."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels import devices
from kernels.dispatch import Choice, Implementation, anything, choose
from kernels.scan import associative, carried, chunked, portable, reference
from kernels.scan.adjoint import scan_with_adjoint
from kernels.scan.arguments import check_arrays, check_direction, check_shape


@dataclasses.dataclass(frozen=True)
class ScanSpec:
    """The static facts of one call, which decide what can run it. `state` is the flat state size N."""

    batch: int
    length: int
    state: int
    dtype: str
    time_invariant: bool
    reset: bool
    reverse: bool
    platform: str


def _reference(a, b, h0, reset, reverse):
    return reference.scan(reference.gate(a, reset, reverse), b, h0, reverse=reverse)


def _with_adjoint(scan):
    return lambda a, b, h0, reset, reverse: scan_with_adjoint(scan, reverse, a, b, h0, reset)


IMPLEMENTATIONS = {
    "reference": Implementation(_reference, anything, "lax.scan, one step after another: the specification"),
    "associative": Implementation(_with_adjoint(associative.scan), anything, "lax.associative_scan: O(log L) dependent steps"),
    "chunked": Implementation(_with_adjoint(chunked.scan), anything, "two passes over unrolled chunks"),
    "portable": Implementation(
        _with_adjoint(portable.scan),
        portable.why_not,
        "a Pallas kernel with the state in registers, compiled on a GPU and interpreted on a CPU",
    ),
}
# Fastest first, as benchmarks/scan.py measures it. A platform that is not listed takes the default; on a GPU what was measured on
# such a device goes first (`devices.preference`).
PREFERENCE = {"cpu": ("chunked", "reference", "associative")}
DEFAULT_PREFERENCE = ("associative", "chunked", "reference")


def linear_scan(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "B L *N"],
    *,
    h0: Inexact[Array, "B *N"] | None = None,
    reset: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B L *N"], Inexact[Array, "B *N"]]:
    """The states of h_t = a_t h_{t-1} + b_t (elementwise, real or complex), and the last one.

    Args:
      a: the decay, in one of two shapes: [B, L, *N], it varies in time, or [*N], it does not (S4D, S5, LRU); the second is
        never expanded to the first.
      b: the input [B, L, *N].
      h0: the state before the first step, zero by default.
      reset: True where a document starts. No state crosses a start: forward, h_{t-1} (or h0, where t is the first position) is
        dropped there; in reverse, what would pass from the start to the position before it is.
      reverse: run from the last position to the first, h_t = a_t h_{t+1} + b_t, from `h0` at the end.
      implementation: a name in `IMPLEMENTATIONS`, or None for the fastest measured on this platform; see `explain`.

    Under a mesh (`jax.set_mesh`, see `kernels.mesh`) each device scans its rows, states and stretch of the sequence: `carried`.

    Returns:
      `h` [B, L, *N] and `h_last` [B, *N], the last state computed (the first position's in reverse). The state is at least
      float32 or complex64 whatever the inputs are (64-bit where an input is), and is returned so.

    Raises:
      ValueError: an argument is no floating-point array or does not fit b, L is 0, or the named
        implementation cannot run this call.
    """
    choice = explain(a, b, h0=h0, reset=reset, reverse=reverse, implementation=implementation)
    if carried.is_split():
        return _on_mesh(a, b, h0, reset, reverse, choice.name)
    dtype = _state_dtype(a, b, h0)
    B, L, *N = b.shape
    time_varying = a.ndim == b.ndim
    a = a.astype(dtype).reshape((B, L, -1) if time_varying else (-1,))
    flat_h0 = jnp.zeros((B, a.shape[-1]), dtype) if h0 is None else h0.astype(dtype).reshape(B, -1)
    h = IMPLEMENTATIONS[choice.name].run(a, b.astype(dtype).reshape(B, L, -1), flat_h0, reset, reverse)
    last = h[:, 0] if reverse else h[:, -1]
    return h.reshape(b.shape), last.reshape(B, *N)


def _on_mesh(a, b, h0, reset, reverse: bool, implementation: str):
    dtype = _state_dtype(a, b, h0)
    h0 = jnp.zeros((b.shape[0], *b.shape[2:]), dtype) if h0 is None else h0.astype(dtype)
    state = "M" + "-" * (b.ndim - 3) if b.ndim > 2 else ""
    time_varying = a.ndim == b.ndim

    def run(b, a, reset, h0):
        return linear_scan(a, b, h0=h0, reset=reset, reverse=reverse, implementation=implementation)

    def decay(arrays):
        a, dtype = arrays["a"], h0.dtype
        return jnp.prod(a.astype(dtype), axis=1) if time_varying else a.astype(dtype) ** arrays["b"].shape[1]

    axes = {"b": "BL" + state, "a": "BL" + state if time_varying else state, "reset": "BL"}
    return carried.scan(run, decay, {"b": b, "a": a, "reset": reset}, axes, h0, "B" + state, reverse=reverse)


def explain(a, b, *, h0=None, reset=None, reverse=False, implementation=None) -> Choice:
    """Which implementation `linear_scan` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why."""
    check_arrays("linear_scan", {"a": a, "b": b}, {"h0": h0}, jnp.inexact)
    if b.ndim < 2:
        raise ValueError(f"linear_scan: b has shape {b.shape}; it must be [B, L, ...]")
    if a.shape not in (b.shape, b.shape[2:]):
        raise ValueError(f"linear_scan: a has shape {a.shape}; for b {b.shape} it must be {b.shape} or {b.shape[2:]}")
    if b.shape[1] == 0:
        raise ValueError(f"linear_scan: b {b.shape} has length 0; at least one step is needed")
    check_shape("linear_scan", "h0", h0, (b.shape[0], *b.shape[2:]), f"b {b.shape}")
    check_direction("linear_scan", reset, reverse, b.shape[:2], f"b {b.shape}")
    spec = ScanSpec(
        batch=b.shape[0],
        length=b.shape[1],
        state=functools.reduce(lambda x, y: x * y, b.shape[2:], 1),
        dtype=str(_state_dtype(a, b, h0)),
        time_invariant=a.ndim != b.ndim,
        reset=reset is not None,
        reverse=reverse,
        platform=jax.default_backend(),
    )
    preference = devices.preference("linear_scan", spec.platform, PREFERENCE.get(spec.platform, DEFAULT_PREFERENCE))
    return carried.told(choose("linear_scan", IMPLEMENTATIONS, preference, spec, implementation), spec.length)


def _state_dtype(a, b, h0) -> jnp.dtype:
    return jnp.result_type(a.dtype, b.dtype, jnp.float32, *([] if h0 is None else [h0.dtype]))
