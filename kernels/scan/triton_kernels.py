"""The selective scan in Triton's own language; imported only where Triton is (`kernels.scan.triton` launches it).

A program owns CH channels of one group g and batch row b. Forward, a thread has all N states of its channels in registers, and
goes step by step: nothing passes between threads. What a span of S steps reads is loaded while the span before is computed.
Backward, T steps are taken at once: inside a chunk the states [T, N, CH] come from `tl.associative_scan`, which Pallas cannot
express. Times count steps in the scan's order, and padding is as `selective_blocks.pad` makes it. An array that a call lacks is
any other pointer. `no_type_check` keeps run-time checks of annotations, which the tests switch on, out of what Triton compiles.

The adjoint is a scan from the end, lambda_t = C_t dy_t + a_{t+1} lambda_{t+1}; the other formulas are in `selective_chunked`.
"""

from typing import no_type_check

import triton
import triton.language as tl

# ruff: noqa: RUF005 - Triton adds tuples, and cannot unpack them

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _compose(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
@no_type_check
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = e^-|x|; log(1 + e) by its ratio to what 1 + e rounds to."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / (rounded - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
@no_type_check
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


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
def _decays(dt, log2_rates, keep, at, KEEP: tl.constexpr):
    """exp(dt A) [T, N, CH] as a power of two, 0 where a document starts; `at` are offsets of steps in [B, L]."""
    a = tl.exp2(dt[:, None, :] * log2_rates[None, :, :])
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
    adjoint, delta, bias, keep, log2_rates, C_t, dout, times, g, b, cols,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """lambda_t [T, N, CH] of a chunk. The decay into each next step is loaded again; that into the next chunk is in `adjoint`."""
    after = tl.minimum(times + 1, STEPS - 1)
    at = b * STEPS + _positions(after, STEPS, REVERSE)
    _, dt = _step_sizes(delta, bias + g * F, after, (at * G + g) * F, cols, L, SOFTPLUS, BIAS)
    is_last = (tl.arange(0, T) == T - 1)[:, None, None]
    decays = tl.where(is_last, 1.0, _decays(dt, log2_rates, keep, at, KEEP))
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
def _words(x, N: tl.constexpr, PACKED: tl.constexpr):
    """N adjacent numbers: if PACKED, which those of 16 bits can be, as N / 2 words of 32 bits."""
    found = ()
    if PACKED:
        for i in tl.static_range(N // 2):
            found = found + (tl.load(x.to(tl.pointer_type(tl.uint32)) + i),)
    else:
        for n in tl.static_range(N):
            found = found + (tl.load(x + n),)
    return found


@triton.jit
@no_type_check
def _half(word, upper: tl.constexpr, dtype: tl.constexpr):
    """One of the two numbers of 16 bits in a word, in float32."""
    if dtype == tl.bfloat16:  # the upper half of a float32
        number = (word & 0xFFFF0000 if upper else word << 16).to(tl.float32, bitcast=True)
    else:
        number = (word >> 16 if upper else word).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return number


@triton.jit
@no_type_check
def _span(
    u, delta, z, B, C, first, g, b, cols,
    STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr,
    HAS_Z: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What S steps read: of each (u, delta, z), the words of B, and those of C."""
    found = ()
    for t in tl.static_range(S):
        in_group = (b * STEPS + _positions(first + t, STEPS, REVERSE)) * G + g
        in_time = in_group * F + cols
        channels = tl.load(u + in_time), tl.load(delta + in_time), tl.load((z if HAS_Z else u) + in_time)
        found = found + ((channels, _words(B + in_group * N, N, PACKED), _words(C + in_group * N, N, PACKED)),)
    return found


@triton.jit
@no_type_check
def _step(h, log2_rates, B, C, dt, u, kept_on, dtype: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr):
    """The next states, one [CH] for each n, and C h; B and C are words if PACKED, else numbers."""
    x = dt * u
    out = tl.zeros_like(x)
    states = ()
    for n in tl.static_range(N):
        B_n = _half(B[n // 2], n % 2 == 1, dtype) if PACKED else B[n].to(tl.float32)
        C_n = _half(C[n // 2], n % 2 == 1, dtype) if PACKED else C[n].to(tl.float32)
        state = tl.exp2(dt * log2_rates[n]) * kept_on * h[n] + B_n * x
        out += C_n * state
        states = states + (state,)
    return states, out


@triton.jit
@no_type_check
def forward(
    u, delta, A, B, C, D, z, bias, h0, keep,
    y, last, kept,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    CH: tl.constexpr, AHEAD: tl.constexpr, PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """y, h_last and, if KEPT, the state before each T steps. AHEAD: spans are loaded ahead; PACKED: B and C as words."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(0) * CH + tl.arange(0, CH)
    log2_rates, h = (), ()
    for n in tl.static_range(N):
        log2_rates = log2_rates + (tl.load(A + (g * N + n) * F + cols) * LOG2E,)
        h = h + (tl.load(h0 + ((b * G + g) * N + n) * F + cols),)
    skip = tl.load(D + g * F + cols) if HAS_D else tl.zeros((CH,), tl.float32)
    shift = tl.load(bias + g * F + cols) if BIAS else tl.zeros((CH,), tl.float32)
    loaded = _span(u, delta, z, B, C, 0, g, b, cols, STEPS, G, F, N, S, REVERSE, HAS_Z, PACKED)
    for i in range(STEPS // S):
        now = loaded
        coming = tl.minimum(i + 1, STEPS // S - 1) if AHEAD else i
        loaded = _span(u, delta, z, B, C, coming * S, g, b, cols, STEPS, G, F, N, S, REVERSE, HAS_Z, PACKED)
        if not AHEAD:
            now = loaded
        if KEPT and i % (T // S) == 0:
            for n in tl.static_range(N):
                tl.store(kept + (((b * (STEPS // T) + i // (T // S)) * G + g) * N + n) * F + cols, h[n])
        for t in tl.static_range(S):
            at = b * STEPS + _positions(i * S + t, STEPS, REVERSE)
            raw = now[t][0][1].to(tl.float32) + shift
            dt = _softplus(raw) if SOFTPLUS else raw
            dt = tl.where(i * S + t < L, dt, 0.0) if STEPS != L else dt
            u_t = now[t][0][0].to(tl.float32)
            kept_on = tl.load(keep + at) if KEEP else 1.0
            h, out = _step(h, log2_rates, now[t][1], now[t][2], dt, u_t, kept_on, B.dtype.element_ty, N, PACKED)
            out += skip * u_t
            if HAS_Z:
                z_t = now[t][0][2].to(tl.float32)
                out = out * z_t * _sigmoid(z_t)
            tl.store(y + (at * G + g) * F + cols, out.to(y.dtype.element_ty))
    for n in tl.static_range(N):
        tl.store(last + ((b * G + g) * N + n) * F + cols, h[n])


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
    log2_rates = rates * LOG2E
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
        a = _decays(dt, log2_rates, keep, at, KEEP)
        all_states, written = _states(h, a, B_t, dt * u_t)
        kept_on = all_states - written  # p_t = a_t h_{t-1}
        first_decay = _row(a, 0, T)
        dout = _through_gate(dy, z, dz, all_states, C_t, skip[None, :] * u_t, in_time, HAS_Z)
        tl.store(dC_parts + of_block, tl.sum(all_states * dout[:, None, :], axis=2))
        totals = _adjoint(
            adjoint, delta, bias, keep, log2_rates, C_t, dout, times, g, b, cols, L, STEPS, G, F, T, SOFTPLUS, REVERSE, BIAS, KEEP
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
