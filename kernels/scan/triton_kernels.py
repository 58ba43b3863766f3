"""The selective scan in Triton's own language; imported only where Triton is (`kernels.scan.triton` launches it).

A program owns CH channels of one group g and batch row b, and takes T steps at once: inside a chunk, the states [T, N, CH] come
from `tl.associative_scan`, which Pallas cannot express; from one chunk to the next only the last state is carried. Times count
steps in the scan's order, and padding is as `selective_blocks.pad` makes it. An array that a call lacks is any other pointer.
`no_type_check` keeps run-time checks of annotations, which the tests switch on, out of functions that Triton compiles.

The adjoint is a scan from the end, lambda_t = C_t dy_t + a_{t+1} lambda_{t+1}; the other formulas are in `selective_chunked`.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _compose(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
@no_type_check
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|; log(1 + e) by its ratio to what 1 + e rounds to."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / (rounded - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
@no_type_check
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
@no_type_check
def _positions(times, STEPS: tl.constexpr, REVERSE: tl.constexpr):
    """Where steps lie in the arrays."""
    return STEPS - 1 - times if REVERSE else times


@triton.jit
@no_type_check
def _step_sizes(delta, bias, times, rows, cols, L: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr):
    """delta + bias and dt [T, CH]; dt is 0 past the sequence's end. `rows` are offsets of steps in [B, L, G, F]."""
    raw = tl.load(delta + rows[:, None] + cols[None, :]).to(tl.float32)
    if BIAS:
        raw += tl.load(bias + cols)[None, :]
    dt = _softplus(raw) if SOFTPLUS else raw
    return raw, tl.where((times < L)[:, None], dt, 0.0)


@triton.jit
@no_type_check
def _decays(dt, A, keep, at, KEEP: tl.constexpr):
    """exp(dt A) [T, N, CH], 0 where a document starts; `at` are offsets of steps in [B, L]."""
    a = tl.exp(dt[:, None, :] * A[None, :, :])
    if KEEP:
        a = a * tl.load(keep + at)[:, None, None]
    return a


@triton.jit
@no_type_check
def _load(
    u, delta, B, C, bias, chunk, g, b, cols, states,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A chunk's steps: their times, offsets in [B, L], in [B, L, G] and in [B, L, G, F]; delta + bias, dt, u; B and C [T, N]."""
    times = chunk * T + tl.arange(0, T)
    at = b * STEPS + _positions(times, STEPS, REVERSE)
    in_group = at * G + g
    rows = in_group * F
    raw, dt = _step_sizes(delta, bias + g * F, times, rows, cols, L, SOFTPLUS, BIAS)
    u_t = tl.load(u + rows[:, None] + cols[None, :]).to(tl.float32)
    of_states = in_group[:, None] * N + states[None, :]
    return times, at, in_group, rows, raw, dt, u_t, tl.load(B + of_states).to(tl.float32), tl.load(C + of_states).to(tl.float32)


@triton.jit
@no_type_check
def _through_gate(dy, z, dz, states_of_chunk, C_t, skip, tile, HAS_Z: tl.constexpr):
    """The gradient of C h + D u, whose second term is `skip`, [T, CH]; that of z is stored."""
    dout = tl.load(dy + tile).to(tl.float32)
    if HAS_Z:
        z_t = tl.load(z + tile).to(tl.float32)
        gate = _sigmoid(z_t)
        out = tl.sum(C_t[:, :, None] * states_of_chunk, axis=1) + skip
        tl.store(dz + tile, (dout * out * gate * (1.0 + z_t * (1.0 - gate))).to(dz.dtype.element_ty))
        dout = dout * z_t * gate
    return dout


@triton.jit
@no_type_check
def _adjoint(
    adjoint, delta, bias, keep, rates, C_t, dout, times, g, b, cols,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """lambda_t [T, N, CH] of a chunk. The decay into each next step is loaded again; that into the next chunk is in `adjoint`."""
    after = tl.minimum(times + 1, STEPS - 1)
    at = b * STEPS + _positions(after, STEPS, REVERSE)
    _, dt = _step_sizes(delta, bias + g * F, after, (at * G + g) * F, cols, L, SOFTPLUS, BIAS)
    is_last = (tl.arange(0, T) == T - 1)[:, None, None]
    decays = tl.where(is_last, 1.0, _decays(dt, rates, keep, at, KEEP))
    read = C_t[:, :, None] * dout[:, None, :]
    through, totals = tl.associative_scan((decays, read), 0, _compose, reverse=True)
    return totals + through * adjoint[None, :, :]


@triton.jit
@no_type_check
def _states(h, a, B, x):
    """The states [T, N, CH] of a chunk that starts from h [N, CH], and what each step writes."""
    written = B[:, :, None] * x[:, None, :]
    through, states = tl.associative_scan((a, written), 0, _compose)
    return states + through * h[None, :, :], written


@triton.jit
@no_type_check
def _row(values, index, T: tl.constexpr):
    """values[index] of [T, N, CH] in registers, which have no addresses."""
    return tl.sum(tl.where((tl.arange(0, T) == index)[:, None, None], values, 0.0), axis=0)


@triton.jit
@no_type_check
def forward(
    u, delta, A, B, C, D, z, bias, h0, keep,
    y, last, kept,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, T: tl.constexpr, CH: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, BIAS: tl.constexpr,
    KEEP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """y, h_last and, if KEPT, the state before each chunk."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(0) * CH + tl.arange(0, CH)
    states = tl.arange(0, N)
    tile = states[:, None] * F + cols[None, :]  # in [N, F]
    rates = tl.load(A + g * N * F + tile)
    skip = tl.load(D + g * F + cols) if HAS_D else tl.zeros((CH,), tl.float32)
    h = tl.load(h0 + (b * G + g) * N * F + tile)
    for chunk in range(STEPS // T):
        if KEPT:
            tl.store(kept + ((b * (STEPS // T) + chunk) * G + g) * N * F + tile, h)
        _, at, _, rows, _, dt, u_t, B_t, C_t = _load(
            u, delta, B, C, bias, chunk, g, b, cols, states, L, STEPS, G, F, N, T, SOFTPLUS, REVERSE, BIAS
        )
        all_states, _ = _states(h, _decays(dt, rates, keep, at, KEEP), B_t, dt * u_t)
        out = tl.sum(C_t[:, :, None] * all_states, axis=1) + skip[None, :] * u_t
        if HAS_Z:
            z_t = tl.load(z + rows[:, None] + cols[None, :]).to(tl.float32)
            out = out * z_t * _sigmoid(z_t)
        tl.store(y + rows[:, None] + cols[None, :], out.to(y.dtype.element_ty))
        h = _row(all_states, T - 1, T)
    tl.store(last + (b * G + g) * N * F + tile, h)


@triton.jit
@no_type_check
def backward(
    u, delta, A, B, C, D, z, bias, keep, kept, dy, dlast,
    du, ddelta, dz, dB_parts, dC_parts, dA_parts, dD_parts, dbias_parts, dh0,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, T: tl.constexpr, CH: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """`selective_blocks.Gradients`, chunk by chunk from the last."""
    block, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = block * CH + tl.arange(0, CH)
    states = tl.arange(0, N)
    tile = states[:, None] * F + cols[None, :]
    rates = tl.load(A + g * N * F + tile)
    skip = tl.load(D + g * F + cols) if HAS_D else tl.zeros((CH,), tl.float32)
    adjoint = tl.load(dlast + (b * G + g) * N * F + tile)
    dA = tl.zeros((N, CH), tl.float32)
    dD, dbias = tl.zeros((CH,), tl.float32), tl.zeros((CH,), tl.float32)
    for i in range(STEPS // T):
        chunk = STEPS // T - 1 - i
        times, at, in_group, rows, raw, dt, u_t, B_t, C_t = _load(
            u, delta, B, C, bias, chunk, g, b, cols, states, L, STEPS, G, F, N, T, SOFTPLUS, REVERSE, BIAS
        )
        in_time = rows[:, None] + cols[None, :]
        of_block = (in_group[:, None] * (F // CH) + block) * N + states[None, :]
        h = tl.load(kept + ((b * (STEPS // T) + chunk) * G + g) * N * F + tile)
        a = _decays(dt, rates, keep, at, KEEP)
        all_states, written = _states(h, a, B_t, dt * u_t)
        kept_on = all_states - written  # p_t = a_t h_{t-1}
        first_decay = _row(a, 0, T)
        dout = _through_gate(dy, z, dz, all_states, C_t, skip[None, :] * u_t, in_time, HAS_Z)
        tl.store(dC_parts + of_block, tl.sum(all_states * dout[:, None, :], axis=2))
        totals = _adjoint(
            adjoint, delta, bias, keep, rates, C_t, dout, times, g, b, cols, L, STEPS, G, F, T, SOFTPLUS, REVERSE, BIAS, KEEP
        )
        adjoint = first_decay * _row(totals, 0, T)
        tl.store(dB_parts + of_block, tl.sum(totals * (dt * u_t)[:, None, :], axis=2))
        both = totals * kept_on
        dx = tl.sum(B_t[:, :, None] * totals, axis=1)
        draw = tl.sum(rates[None, :, :] * both, axis=1) + dx * u_t
        draw = tl.where((times < L)[:, None], draw * _sigmoid(raw) if SOFTPLUS else draw, 0.0)
        dA += tl.sum(dt[:, None, :] * both, axis=0)
        dD += tl.sum(dout * u_t, axis=0)
        dbias += tl.sum(draw, axis=0)
        tl.store(du + in_time, (dx * dt + skip[None, :] * dout).to(du.dtype.element_ty))
        tl.store(ddelta + in_time, draw.to(ddelta.dtype.element_ty))
    tl.store(dA_parts + (b * G + g) * N * F + tile, dA)
    tl.store(dh0 + (b * G + g) * N * F + tile, adjoint)
    if HAS_D:
        tl.store(dD_parts + (b * G + g) * F + cols, dD)
    if BIAS:
        tl.store(dbias_parts + (b * G + g) * F + cols, dbias)
