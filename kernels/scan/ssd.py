"""`ssd`: the one entry to every implementation of Mamba-2's state-space layer (Dao & Gu 2024, arXiv 2405.21060)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import devices
from kernels.dispatch import Choice, Implementation, anything, choose, shown
from kernels.scan import carried, ssd_forms, ssd_triton
from kernels.scan.arguments import check_arrays, check_direction
from kernels.scan.selective_reference import keeps


@dataclasses.dataclass(frozen=True)
class SSDSpec:
    """The static facts of one call, which decide what can run it: H heads of size P in `groups`, each with a state [P, N].

    dtype: of the state. products: of x, B and C, "mixed" where they differ.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    state: int
    groups: int
    dtype: str
    products: str
    platform: str


def _compiled(form):
    """As one compiled function, also where the caller is not."""
    return jax.jit(ssd_forms.on_steps(form))


IMPLEMENTATIONS = {
    "reference": Implementation(_compiled(ssd_forms.recurrence), anything, "lax.scan, one step after another: the specification"),
    "chunked": Implementation(_compiled(ssd_forms.dual), anything, "products of matrices inside chunks of 64 steps"),
    "triton": Implementation(
        jax.jit(ssd_triton.scan),
        ssd_triton.why_not,
        "Triton kernels through jax-triton, products of 16 bits on tensor cores",
    ),
}
PREFERENCE = ("chunked", "reference")  # measured on CPU; on a GPU what was measured there goes first


def ssd(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, "H"] | None,
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, "H"] | None = None,
    dt_bias: Float[Array, "H"] | None = None,
    *,
    softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    h0: Float[Array, "B H P N"] | None = None,
    reset: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """State-space duality (Dao & Gu 2024, listing 1), for each head:

        dt_t = clip(softplus(dt_t + dt_bias), *dt_limit)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T          a state [P, N] with one decay
        y_t = h_t C_t + D x_t

    Args:
      x: the input, H heads of size P.
      dt: step sizes before the bias, softplus and limits.
      A: one decay rate for each head, not positive; None is 0, the state of linear attention.
      B, C: head h reads group h // (H / G).
      D: the skip connection; None is none.
      dt_bias: added to dt; None is 0.
      softplus: without it, dt + dt_bias must not be negative.
      h0, reset, reverse: as in `selective_scan`.
      implementation: a name in `IMPLEMENTATIONS`, or None for the fastest; see `explain_ssd`.

    Returns:
      `y` [B, L, H, P] in x's type, and `h_last` [B, H, P, N]. The state is float32 whatever the inputs are (float64 where an
      input is), and is returned so.

    Raises:
      ValueError: shapes do not fit together, L is 0, or the named implementation cannot run this call.
    """
    choice = explain_ssd(x, dt, A, B, C, D, dt_bias, h0=h0, reset=reset, reverse=reverse, implementation=implementation)
    _check_limits(dt_limit)
    dtype = _state_dtype(x, dt, A, B, C, D, dt_bias, h0)
    state = (x.shape[0], *x.shape[2:], B.shape[3])
    h0 = jnp.zeros(state, dtype) if h0 is None else h0.astype(dtype)
    run = _on_mesh if carried.is_split() else _on_one_device
    arrays = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, reset=reset)
    return run(arrays, h0, softplus, dt_limit, reverse, choice.name)


def _on_one_device(arrays, h0, softplus: bool, dt_limit, reverse: bool, implementation: str):
    x, B, C, reset, dtype = arrays["x"], arrays["B"], arrays["C"], arrays["reset"], h0.dtype
    dt, A, D, dt_bias = (None if arrays[name] is None else arrays[name].astype(dtype) for name in ("dt", "A", "D", "dt_bias"))
    groups = B.shape[2]
    dt = _step_sizes(dt, dt_bias, softplus, dt_limit)
    log_decay = _log_decay(dt, A, None if reset is None else keeps(reset, reverse, dtype))

    def grouped(v):
        return None if v is None else v.reshape(*v.shape[:2], groups, -1, *v.shape[3:])

    def in_time(v):
        return jnp.flip(v, axis=1) if reverse else v

    ready = jax.tree.map(in_time, (grouped(x), grouped(dt), grouped(log_decay), B, C))
    skip = None if D is None else D.reshape(groups, -1)
    y, last = IMPLEMENTATIONS[implementation].run(*ready, skip, h0.reshape(len(h0), groups, -1, *h0.shape[2:]))
    return in_time(y).reshape(x.shape), last.reshape(h0.shape)


def _step_sizes(dt, dt_bias, softplus: bool, dt_limit) -> Float[Array, "B L H"]:
    dt = dt if dt_bias is None else dt + dt_bias[None, None, :]
    return jnp.clip(jax.nn.softplus(dt) if softplus else dt, *dt_limit)


def _on_mesh(arrays, h0, softplus: bool, dt_limit, reverse: bool, implementation: str):
    def run(**arrays):
        return ssd(**arrays, softplus=softplus, dt_limit=dt_limit, reverse=reverse, implementation=implementation)

    def decay(arrays):
        dt, A, dt_bias = (v if v is None else v.astype(h0.dtype) for v in (arrays["dt"], arrays["A"], arrays["dt_bias"]))
        if A is None:
            return jnp.ones((1, 1, 1, 1), h0.dtype)
        return jnp.exp(_step_sizes(dt, dt_bias, softplus, dt_limit).sum(axis=1) * A[None])[..., None, None]

    axes = {"x": "BLM-", "dt": "BLM", "A": "M", "B": "BLM-", "C": "BLM-", "D": "M", "dt_bias": "M", "reset": "BL"}
    return carried.scan(run, decay, arrays, axes, h0, "BM--", reverse=reverse)


def _log_decay(dt: Float[Array, "B L H"], A, keep) -> Float[Array, "B L H"] | None:
    """dt A, and what lets nothing pass where `keep` is 0; None where nothing decays."""
    log_decay = None if A is None else dt * A[None, None, :]
    if keep is None:
        return log_decay
    return jnp.where(keep[..., None] > 0, jnp.zeros_like(dt) if log_decay is None else log_decay, ssd_forms.NOTHING)


def explain_ssd(x, dt, A, B, C, D=None, dt_bias=None, *, h0=None, reset=None, reverse=False, implementation=None) -> Choice:
    """Which implementation `ssd` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why."""
    _check(x, dt, A, B, C, D, dt_bias, h0, reset, reverse)
    batch, length, heads, head_dim = x.shape
    spec = SSDSpec(
        batch=batch,
        length=length,
        heads=heads,
        head_dim=head_dim,
        state=B.shape[3],
        groups=B.shape[2],
        dtype=str(_state_dtype(x, dt, A, B, C, D, dt_bias, h0)),
        products=str(x.dtype) if x.dtype == B.dtype == C.dtype else "mixed",
        platform=jax.default_backend(),
    )
    preference = devices.preference("ssd", spec.platform, PREFERENCE)
    return carried.told(choose("ssd", IMPLEMENTATIONS, preference, spec, implementation), length)


def _check(x, dt, A, B, C, D, dt_bias, h0, reset, reverse) -> None:
    check_arrays("ssd", {"x": x, "dt": dt, "B": B, "C": C}, {"A": A, "D": D, "dt_bias": dt_bias, "h0": h0})
    if x.ndim != 4:
        raise ValueError(f"ssd: x has shape {x.shape}; it must be [B, L, H, P]")
    batch, length, heads, head_dim = x.shape
    if length == 0:
        raise ValueError(f"ssd: x {x.shape} has length 0; at least one step is needed")
    check_direction("ssd", reset, reverse, (batch, length), f"x {x.shape}")
    if B.ndim != 4 or B.shape[:2] != (batch, length) or B.shape[2] == 0 or heads % B.shape[2]:
        wanted = f"({batch}, {length}, G, N) with G a divisor of {heads}"
        raise ValueError(f"ssd: B has shape {B.shape}; for x {x.shape} it must be {wanted}")
    per_head = {"A": A, "D": D, "dt_bias": dt_bias}
    expected = {name: (v, (heads,)) for name, v in per_head.items()} | {"dt": (dt, (batch, length, heads)), "C": (C, B.shape)}
    expected["h0"] = (h0, (batch, heads, head_dim, B.shape[3]))
    for name, (v, shape) in expected.items():
        if v is not None and v.shape != shape:
            raise ValueError(f"ssd: {name} has shape {v.shape}; for x {x.shape} and B {B.shape} it must be {shape}")


def _check_limits(dt_limit) -> None:
    is_pair = isinstance(dt_limit, tuple | list) and len(dt_limit) == 2 and all(isinstance(v, int | float) for v in dt_limit)
    if not (is_pair and 0 <= dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"ssd: dt_limit={shown(dt_limit)}; two numbers (low, high) are expected, 0 <= low <= high")


def _state_dtype(*arrays) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *(v.dtype for v in arrays if v is not None))
