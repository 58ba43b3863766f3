"""State-space duality in Triton's own language; imported only where Triton is (`kernels.scan.ssd_triton` launches it).

A program owns BP channels of one head of one batch row and goes through time in chunks of Q steps, the state [BP, N] in registers
from one to the next, and in memory only if it is kept. Inside a chunk all is products of matrices on tensor cores,
operands in the type of x, sums in float32 (Dao & Gu 2024, section 6; the reference is `ssd_forms`). A state may be beyond
float16's largest number, 65,504, and enters such a product divided by its own size.

Log-decays, here to the base 2, add up along a chunk, and pairs of steps have differences of those sums. For these to be exact
behind a strong decay, a sum is two float32 numbers, and no step counts for less than `NOTHING`.

Backward, the same from the last chunk to the first, with the adjoint of the state in registers, BN states at a time, and the
state before each chunk as the forward pass kept it. What heads share leaves as one part from each program.
With M_ij = exp(l_{j+1} + ... + l_i), i >= j, S = C B^T, W = M dt_j (dy x^T), a_i = exp(l_1 + ... + l_i), h the state before the
chunk, w_j = exp(l_{j+1} + ... + l_Q), and lambda the gradient of the state after it,

    d(dt x) = (S M)^T dy + w (B lambda^T)       dC = W B + a (dy h)       dB = W^T C + w dt (x lambda)
    dh = exp(l_1 + ... + l_Q) lambda + (a dy)^T C

and l_k has a part in M_ij where i >= k > j, in a_i where i >= k, in w_j where j < k, and in the decay of all of h.
"""

from typing import no_type_check

import triton
import triton.language as tl

# ruff: noqa: RUF005 - Triton adds tuples, and cannot unpack them

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-160.0)
"""A log-decay to the base 2 of which float32 has no other number than 0 left."""


@triton.jit
@no_type_check
def _add(high1, low1, high2, low2):
    """The sum of two numbers that are each a rounded one and what it lacks (the two-sum of Knuth 1969, section 4.2.2)."""
    high = high1 + high2
    second = high - high1
    return high, low1 + low2 + ((high1 - (high - second)) + (high2 - second))


@triton.jit
@no_type_check
def _log_decays(log_decay, at, valid, DECAYS: tl.constexpr):
    """The sums of log-decays up to each step [Q], rounded and what these lack, and which steps let nothing pass; `at` are their
    offsets."""
    high, low, blocked = tl.zeros(valid.shape, tl.float32), tl.zeros(valid.shape, tl.float32), valid != valid
    if DECAYS:
        steps = tl.load(log_decay + at, mask=valid, other=0.0) * LOG2E
        blocked = steps < NOTHING
        high, low = tl.associative_scan((tl.where(blocked, NOTHING, steps), low), 0, _add)
    return high, low, blocked


@triton.jit
@no_type_check
def _passing(high, low, Q: tl.constexpr):
    """What is left at step i of what j wrote, M [Q, Q]; at i of the state before, a; after the chunk of what j wrote, w; of h."""
    q = tl.arange(0, Q)
    total_high, total_low = tl.sum(tl.where(q == Q - 1, high, 0.0)), tl.sum(tl.where(q == Q - 1, low, 0.0))
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decays = tl.exp2(tl.where(q[:, None] >= q[None, :], between, float("-inf")))
    return decays, tl.exp2(high + low), tl.exp2((total_high - high) + (total_low - low)), tl.exp2(total_high + total_low)


@triton.jit
@no_type_check
def _size(state, dtype: tl.constexpr):
    """What a state, or its adjoint, is divided by before it enters a product, which is then multiplied by it: float16 has no
    numbers beyond 65,504."""
    return tl.maximum(tl.max(tl.abs(state)) / 32768.0, 1.0) if dtype == tl.float16 else 1.0


@triton.jit
@no_type_check
def forward(
    x, dt, log_decay, B, C, D, h0,
    y, last, kept,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    DECAYS: tl.constexpr, SKIP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """y = C h + D x, h_last and, if KEPT, the state before each chunk, rounded to its type."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    channel = tl.program_id(0) * BP
    p, n, q = tl.arange(0, BP), tl.arange(0, N), tl.arange(0, Q)
    in_chunk, states_of_chunk = q[:, None] * (H * P) + p[None, :], q[:, None] * (G * N) + n[None, :]
    state = ((b * H + head) * P + channel) * N  # a number of 64 bits; what is added to it needs 32
    of_state = p[:, None] * N + n[None, :]
    h = tl.load(h0 + state + of_state)
    for chunk in tl.range((L + Q - 1) // Q, disable_licm=True):
        if KEPT:
            before = ((b * ((L + Q - 1) // Q) + chunk) * H + head) * P + channel
            tl.store(kept + before * N + of_state, h.to(kept.dtype.element_ty))
        first = b * L + chunk * Q
        start, group_start = (first * H + head) * P + channel, (first * G + group) * N
        valid = chunk * Q + q < L
        x_t = tl.load(x + start + in_chunk, mask=valid[:, None], other=0.0)
        B_t = tl.load(B + group_start + states_of_chunk, mask=valid[:, None], other=0.0)
        C_t = tl.load(C + group_start + states_of_chunk, mask=valid[:, None], other=0.0)
        dt_t = tl.load(dt + first * H + head + q * H, mask=valid, other=0.0)
        high, low, _ = _log_decays(log_decay + first * H + head, q * H, valid, DECAYS)

        decays, entering, leaving, through = _passing(high, low, Q)
        weights = tl.dot(C_t, tl.trans(B_t)) * decays * dt_t[None, :]
        out = tl.dot(weights.to(x_t.dtype), x_t)
        size = _size(h, x_t.dtype)
        out += tl.dot(C_t, tl.trans((h / size).to(x_t.dtype))) * (entering * size)[:, None]
        if SKIP:
            out += tl.load(D + head) * x_t.to(tl.float32)
        tl.store(y + start + in_chunk, out.to(y.dtype.element_ty), mask=valid[:, None])
        written = (x_t.to(tl.float32) * (leaving * dt_t)[:, None]).to(x_t.dtype)
        h = h * through + tl.dot(tl.trans(written), B_t)
    tl.store(last + state + of_state, h)


@triton.jit
@no_type_check
def _products(B, C, adjoint, size, tile, valid, Q: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """C B^T [Q, Q] and B lambda^T [Q, BP], a tile of BN states at a time; `tile` are offsets of one in B and C."""
    scores, read = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BP), tl.float32)
    for k in tl.static_range(N // BN):
        B_t = tl.load(B + k * BN + tile, mask=valid[:, None], other=0.0)
        C_t = tl.load(C + k * BN + tile, mask=valid[:, None], other=0.0)
        scores = tl.dot(C_t, tl.trans(B_t), acc=scores)
        read = tl.dot(B_t, tl.trans((adjoint[k] / size).to(B_t.dtype)), acc=read)
    return scores, read * size


@triton.jit
@no_type_check
def _through_states(
    B, C, h, dB_parts, dC_parts, adjoint, size, pairs, written, dy, through, tile, of_state, parts_of_chunk, valid,
    N: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The parts of dB and dC are stored; dh, and the gradients of what enters a step [Q] and of the state's own decay, returned.

    pairs: W. written: w dt x. dy: a dy. All [Q, Q] or [Q, BP], as they enter products.
    """
    after, entering, own = (), tl.zeros(valid.shape, tl.float32), 0.0
    for k in tl.static_range(N // BN):
        B_t = tl.load(B + k * BN + tile, mask=valid[:, None], other=0.0)
        C_t = tl.load(C + k * BN + tile, mask=valid[:, None], other=0.0)
        h_t = tl.load(h + k * BN + of_state)
        dB = tl.dot(tl.trans(pairs), C_t, acc=tl.dot(written, (adjoint[k] / size).to(B_t.dtype)) * size)
        tl.store(dB_parts + k * BN + parts_of_chunk, dB.to(dB_parts.dtype.element_ty), mask=valid[:, None])
        h_size = _size(h_t.to(tl.float32), B_t.dtype)
        dC = tl.dot(dy, (h_t.to(tl.float32) / h_size).to(B_t.dtype)) * h_size
        entering += tl.sum(dC * C_t.to(tl.float32), axis=1)
        dC = tl.dot(pairs, B_t, acc=dC)
        tl.store(dC_parts + k * BN + parts_of_chunk, dC.to(dC_parts.dtype.element_ty), mask=valid[:, None])
        own += tl.sum(tl.sum(adjoint[k] * h_t.to(tl.float32), axis=1), axis=0)
        after = after + (tl.dot(tl.trans(dy), C_t, acc=adjoint[k] * through),)
    return after, entering, own * through


@triton.jit
@no_type_check
def _largest(states, dtype: tl.constexpr, number: tl.constexpr):
    """The largest `_size` of so many parts of a state."""
    size = _size(states[0], dtype)
    for k in tl.static_range(1, number):
        size = tl.maximum(size, _size(states[k], dtype))
    return size


@triton.jit
@no_type_check
def backward(
    x, dt, log_decay, B, C, D, kept, dy, dlast,
    dx, ddt_parts, dlog_decay_parts, dB_parts, dC_parts, dD_parts, dh0,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DECAYS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """`ssd_triton.Gradients`, by the formulas above."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    block = tl.program_id(0)
    p, n, q = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    in_chunk, states_of_chunk = q[:, None] * (H * P) + p[None, :], q[:, None] * (G * N) + n[None, :]
    steps, parts_of_chunk = q * (H * (P // BP)), q[:, None] * (H * (P // BP) * N) + n[None, :]
    state = ((b * H + head) * P + block * BP) * N
    of_state = p[:, None] * N + n[None, :]
    adjoint = ()
    for k in tl.static_range(N // BN):
        adjoint = adjoint + (tl.load(dlast + state + k * BN + of_state),)
    dD = tl.zeros((BP,), tl.float32)
    for i in tl.range((L + Q - 1) // Q, disable_licm=True):
        chunk = (L + Q - 1) // Q - 1 - i
        first = b * L + chunk * Q
        start, group_start = (first * H + head) * P + block * BP, (first * G + group) * N
        part = (first * H + head) * (P // BP) + block
        valid = chunk * Q + q < L
        x_t = tl.load(x + start + in_chunk, mask=valid[:, None], other=0.0)
        dy_t = tl.load(dy + start + in_chunk, mask=valid[:, None], other=0.0)
        dt_t = tl.load(dt + first * H + head + q * H, mask=valid, other=0.0)
        high, low, blocked = _log_decays(log_decay + first * H + head, q * H, valid, DECAYS)
        decays, entering, leaving, through = _passing(high, low, Q)
        B_c, C_c = B + group_start, C + group_start
        size = _largest(adjoint, x_t.dtype, N // BN)
        weights, dwritten = _products(B_c, C_c, adjoint, size, states_of_chunk, valid, Q, BP, N, BN)
        weights, dwritten = weights * decays, dwritten * leaving[:, None]
        pairs = tl.dot(dy_t, tl.trans(x_t)) * dt_t[None, :]
        later = tl.sum(pairs * weights, axis=1) - tl.sum(pairs * weights, axis=0)
        pairs = (pairs * decays).to(x_t.dtype)
        full, dy_full = x_t.to(tl.float32), dy_t.to(tl.float32)
        earlier = tl.sum(dwritten * full, axis=1) * dt_t
        dwritten = tl.dot(tl.trans(weights.to(x_t.dtype)), dy_t, acc=dwritten)
        tl.store(ddt_parts + part + steps, tl.sum(full * dwritten, axis=1), mask=valid)
        dx_t = dwritten * dt_t[:, None]
        if SKIP:
            dx_t += tl.load(D + head) * dy_full
            dD += tl.sum(dy_full * full, axis=0)
        tl.store(dx + start + in_chunk, dx_t.to(dx.dtype.element_ty), mask=valid[:, None])

        written, dy_in = (full * (leaving * dt_t)[:, None]).to(x_t.dtype), (dy_full * entering[:, None]).to(x_t.dtype)
        before = (((b * ((L + Q - 1) // Q) + chunk) * H + head) * P + block * BP) * N
        adjoint, of_entering, own = _through_states(
            B_c, C_c, kept + before, dB_parts + part * N, dC_parts + part * N, adjoint, size, pairs, written, dy_in, through,
            states_of_chunk, of_state, parts_of_chunk, valid, N, BN,
        )  # fmt: skip
        if DECAYS:
            dl = tl.cumsum(later + of_entering, reverse=True) + tl.cumsum(earlier) - earlier + own
            tl.store(dlog_decay_parts + part + steps, tl.where(blocked, 0.0, dl), mask=valid)
    for k in tl.static_range(N // BN):
        tl.store(dh0 + state + k * BN + of_state, adjoint[k])
    if SKIP:
        tl.store(dD_parts + (b * H + head) * (P // BP) + block, tl.sum(dD, axis=0))
