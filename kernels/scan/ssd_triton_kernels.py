"""State-space duality in Triton's own language; imported only where Triton is (`kernels.scan.ssd_triton` launches it).

A program owns BP channels of one head of one batch row and goes through time in chunks of Q steps, the state [BP, N] in registers
from one to the next, so that no state but the last is ever in memory. Inside a chunk all is products of matrices on tensor cores,
operands in the type of x, sums in float32 (Dao & Gu 2024, section 6; the reference is `ssd_forms`). Log-decays, here to the base
2, add up along a chunk, and pairs of steps have differences of those sums; steps that let nothing pass are counted instead.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _log_decays(log_decay, at, valid, DECAYS: tl.constexpr):
    """The sums of log-decays up to each step [Q], and how many steps up to it let nothing pass; `at` are their offsets."""
    if DECAYS:
        steps = tl.load(log_decay + at, mask=valid, other=0.0)
        blocked = steps < -1e29
        return tl.cumsum(tl.where(blocked, 0.0, steps * LOG2E)), tl.cumsum(blocked.to(tl.int32))
    return tl.zeros(valid.shape, tl.float32), tl.zeros(valid.shape, tl.int32)


@triton.jit
@no_type_check
def forward(
    x, dt, log_decay, B, C, D, h0,
    y, last,
    L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    DECAYS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """y = C h + D x and h_last."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    channel = tl.program_id(0) * BP
    p, n, q = tl.arange(0, BP), tl.arange(0, N), tl.arange(0, Q)
    in_chunk, states_of_chunk = q[:, None] * (H * P) + p[None, :], q[:, None] * (G * N) + n[None, :]
    state = ((b * H + head) * P + channel) * N  # a number of 64 bits; what is added to it needs 32
    of_state = p[:, None] * N + n[None, :]
    h = tl.load(h0 + state + of_state)
    for chunk in tl.range((L + Q - 1) // Q, disable_licm=True):
        first = b * L + chunk * Q
        start, group_start = (first * H + head) * P + channel, (first * G + group) * N
        valid = chunk * Q + q < L
        x_t = tl.load(x + start + in_chunk, mask=valid[:, None], other=0.0)
        B_t = tl.load(B + group_start + states_of_chunk, mask=valid[:, None], other=0.0)
        C_t = tl.load(C + group_start + states_of_chunk, mask=valid[:, None], other=0.0)
        dt_t = tl.load(dt + first * H + head + q * H, mask=valid, other=0.0)
        sums, blocks = _log_decays(log_decay + first * H + head, q * H, valid, DECAYS)

        passes = (q[:, None] >= q[None, :]) & (blocks[:, None] == blocks[None, :])
        decays = tl.exp2(tl.where(passes, sums[:, None] - sums[None, :], float("-inf")))
        weights = tl.dot(C_t, tl.trans(B_t)) * decays * dt_t[None, :]
        out = tl.dot(weights.to(x_t.dtype), x_t)
        out += tl.dot(C_t, tl.trans(h.to(x_t.dtype))) * tl.where(blocks == 0, tl.exp2(sums), 0.0)[:, None]
        if SKIP:
            out += tl.load(D + head) * x_t.to(tl.float32)
        tl.store(y + start + in_chunk, out.to(y.dtype.element_ty), mask=valid[:, None])

        total, blocked = tl.sum(tl.where(q == Q - 1, sums, 0.0)), tl.sum(tl.where(q == Q - 1, blocks, 0))
        written = tl.where(blocks == blocked, tl.exp2(total - sums), 0.0) * dt_t
        h = h * tl.where(blocked == 0, tl.exp2(total), 0.0)
        h += tl.dot(tl.trans((x_t.to(tl.float32) * written[:, None]).to(x_t.dtype)), B_t)
    tl.store(last + state + of_state, h)
