"""The selective scan in Triton's own language for states that no program's registers hold; imported only where Triton is.

As `triton_kernels`, but a program takes NS of a channel's N states at a time, T steps of them at once in both passes: what has no
states (u, delta, z, y and their gradients) is read and written once for all. From chunk to chunk the states, backward their
adjoints and the gradient of A, lie in the arrays of outputs they end in, a few of which the second-level cache holds; a barrier
lets the threads of a program see what the others wrote.
"""

from typing import no_type_check

import triton
import triton.language as tl

from kernels.scan.triton_kernels import LOG2E, _compose, _decays, _positions, _row, _sigmoid, _states, _step_sizes


@triton.jit
@no_type_check
def forward(
    u, delta, A, B, C, D, z, bias, h0, keep,
    y, last, kept,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, NS: tl.constexpr, T: tl.constexpr,
    CH: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """y, h_last and, if KEPT, the state before each T steps."""
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols, states = tl.program_id(0) * CH + tl.arange(0, CH), tl.arange(0, NS)
    tile = states[:, None] * F + cols[None, :]
    row = (b * G + g) * N * F
    skip = tl.load(D + g * F + cols) if HAS_D else tl.zeros((CH,), tl.float32)
    for s in range(N // NS):
        tl.store(last + row + s * NS * F + tile, tl.load(h0 + row + s * NS * F + tile))
    for i in range(STEPS // T):
        tl.debug_barrier()
        times = i * T + tl.arange(0, T)
        at = b * STEPS + _positions(times, STEPS, REVERSE)
        in_group = at * G + g
        in_time = (in_group * F)[:, None] + cols[None, :]
        _, dt = _step_sizes(delta, bias + g * F, times, in_group * F, cols, L, SOFTPLUS, BIAS)
        u_t = tl.load(u + in_time).to(tl.float32)
        out = skip[None, :] * u_t
        for s in range(N // NS):
            of_states = in_group[:, None] * N + s * NS + states[None, :]
            B_t, C_t = tl.load(B + of_states).to(tl.float32), tl.load(C + of_states).to(tl.float32)
            h = tl.load(last + row + s * NS * F + tile)
            tl.debug_barrier()  # where a tile has fewer numbers than threads, several threads load what one of them stores
            if KEPT:
                tl.store(kept + (((b * (STEPS // T) + i) * G + g) * N + s * NS) * F + tile, h)
            a = _decays(dt, tl.load(A + (g * N + s * NS) * F + tile) * LOG2E, keep, at, KEEP)
            all_states = _states(h, a, B_t, dt * u_t)[0]
            out += tl.sum(C_t[:, :, None] * all_states, axis=1)
            tl.store(last + row + s * NS * F + tile, _row(all_states, T - 1, T))
        if HAS_Z:
            z_t = tl.load(z + in_time).to(tl.float32)
            out = out * z_t * _sigmoid(z_t)
        tl.store(y + in_time, out.to(y.dtype.element_ty))


@triton.jit
@no_type_check
def _slice(
    A, B, C, keep, kept, adjoint, dA, dB_parts, dC_parts, dt, dt_next, u_t, dout, at, at_next, tile, of_states, of_block,
    T: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Of NS states of a chunk: C h, and the gradients of dt u and, beside it, of dt [T, CH]; the pointers are to the states'."""
    B_t, C_t = tl.load(B + of_states).to(tl.float32), tl.load(C + of_states).to(tl.float32)
    rates = tl.load(A + tile)
    a = _decays(dt, rates * LOG2E, keep, at, KEEP)
    all_states, written = _states(tl.load(kept + tile), a, B_t, dt * u_t)
    kept_on = all_states - written
    tl.store(dC_parts + of_block, tl.sum(all_states * dout[:, None, :], axis=2))
    is_last = (tl.arange(0, T) == T - 1)[:, None, None]
    decays = tl.where(is_last, 1.0, _decays(dt_next, rates * LOG2E, keep, at_next, KEEP))
    through, totals = tl.associative_scan((decays, C_t[:, :, None] * dout[:, None, :]), 0, _compose, reverse=True)
    after, sums = tl.load(adjoint + tile), tl.load(dA + tile)
    tl.debug_barrier()  # where a tile has fewer numbers than threads, several threads load what one of them stores
    totals = totals + through * after[None, :, :]
    tl.store(adjoint + tile, _row(a, 0, T) * _row(totals, 0, T))
    tl.store(dB_parts + of_block, tl.sum(totals * (dt * u_t)[:, None, :], axis=2))
    both = totals * kept_on
    tl.store(dA + tile, sums + tl.sum(dt[:, None, :] * both, axis=0))
    read = tl.sum(C_t[:, :, None] * all_states, axis=1)
    return read, tl.sum(B_t[:, :, None] * totals, axis=1), tl.sum(rates[None, :, :] * both, axis=1)


@triton.jit
@no_type_check
def backward(
    u, delta, A, B, C, D, z, bias, keep, kept, dy, dlast,
    du, ddelta, dz, dB_parts, dC_parts, dA_parts, dD_parts, dbias_parts, dh0,
    L: tl.constexpr, STEPS: tl.constexpr, G: tl.constexpr, F: tl.constexpr, N: tl.constexpr, NS: tl.constexpr, T: tl.constexpr,
    CH: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """`selective_blocks.Gradients`, chunk by chunk from the last."""
    block, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols, states = block * CH + tl.arange(0, CH), tl.arange(0, NS)
    tile, row = states[:, None] * F + cols[None, :], (b * G + g) * N * F
    skip = tl.load(D + g * F + cols) if HAS_D else tl.zeros((CH,), tl.float32)
    dD, dbias = tl.zeros((CH,), tl.float32), tl.zeros((CH,), tl.float32)
    for s in range(N // NS):
        tl.store(dh0 + row + s * NS * F + tile, tl.load(dlast + row + s * NS * F + tile))
        tl.store(dA_parts + row + s * NS * F + tile, tl.zeros((NS, CH), tl.float32))
    for i in range(STEPS // T):
        tl.debug_barrier()
        chunk = STEPS // T - 1 - i
        times = chunk * T + tl.arange(0, T)
        after = tl.minimum(times + 1, STEPS - 1)
        at, at_next = b * STEPS + _positions(times, STEPS, REVERSE), b * STEPS + _positions(after, STEPS, REVERSE)
        in_group = at * G + g
        in_time = (in_group * F)[:, None] + cols[None, :]
        raw, dt = _step_sizes(delta, bias + g * F, times, in_group * F, cols, L, SOFTPLUS, BIAS)
        _, dt_next = _step_sizes(delta, bias + g * F, after, (at_next * G + g) * F, cols, L, SOFTPLUS, BIAS)
        u_t, dout = tl.load(u + in_time).to(tl.float32), tl.load(dy + in_time).to(tl.float32)
        if HAS_Z:
            z_t = tl.load(z + in_time).to(tl.float32)
            gate = _sigmoid(z_t)
            through_gate, dout = dout * gate * (1.0 + z_t * (1.0 - gate)), dout * z_t * gate
        out, dx, draw = skip[None, :] * u_t, tl.zeros((T, CH), tl.float32), tl.zeros((T, CH), tl.float32)
        before = ((b * (STEPS // T) + chunk) * G + g) * N * F
        of_states = in_group[:, None] * N + states[None, :]
        of_block = (in_group[:, None] * (F // CH) + block) * N + states[None, :]
        for s in range(N // NS):
            n, at_n = s * NS, s * NS * F
            read, dx_n, draw_n = _slice(
                A + g * N * F + at_n, B + n, C + n, keep, kept + before + at_n, dh0 + row + at_n, dA_parts + row + at_n,
                dB_parts + n, dC_parts + n, dt, dt_next, u_t, dout, at, at_next, tile, of_states, of_block, T, KEEP,
            )  # fmt: skip
            out, dx, draw = out + read, dx + dx_n, draw + draw_n
        if HAS_Z:
            tl.store(dz + in_time, (through_gate * out).to(dz.dtype.element_ty))
        draw = draw + dx * u_t
        draw = tl.where((times < L)[:, None], draw * _sigmoid(raw) if SOFTPLUS else draw, 0.0)
        dD, dbias = dD + tl.sum(dout * u_t, axis=0), dbias + tl.sum(draw, axis=0)
        tl.store(du + in_time, (dx * dt + skip[None, :] * dout).to(du.dtype.element_ty))
        tl.store(ddelta + in_time, draw.to(ddelta.dtype.element_ty))
    if HAS_D:
        tl.store(dD_parts + (b * G + g) * F + cols, dD)
    if BIAS:
        tl.store(dbias_parts + (b * G + g) * F + cols, dbias)
