"""The selective scan as Pallas kernels: compiled through Triton on an NVIDIA GPU, interpreted on a CPU.

One program runs through all time with the states [N, channels] of its block in registers (`selective_blocks` says what it keeps).
A few steps, a span, are unrolled, so that their loads are issued together, ahead of the recurrence that waits for them. Backward,
the states before the spans of a chunk are computed first and stay in registers, then span by span from the last one those of
its single steps; so K is far larger than what could be unrolled, and a state is computed three times in all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import compat
from kernels.scan import selective_blocks
from kernels.scan.selective_blocks import Blocks, Gradients, Passes, Plan
from kernels.scan.selective_reference import Inputs, State

table = functools.partial(selective_blocks.table, "portable")
"""Blocks by states; those of `kernels.offline` spill nothing."""


class Update(NamedTuple):
    """What takes the state one step on: u, dt and its derivative by delta [channels], B [N], keep a number or None."""

    u: Array
    dt: Array
    slope: Array
    B: Array
    keep: Array | None


def blocks_of(states: int) -> Blocks:
    """The entry of `table` for so many states."""
    found = table()
    return found[next(size for size in sorted(found) if size >= states)]


def why_not(spec) -> str | None:
    """The reason the kernels cannot run this call."""
    largest = max(table())
    reasons = {
        f"it is written for NVIDIA GPUs, and interpreted on cpu, not for {spec.platform}": spec.platform not in ("cpu", "gpu"),
        f"on a GPU its state is float32, not {spec.dtype}": spec.platform == "gpu" and spec.dtype != "float32",
        f"its registers hold up to {largest} states of a channel, not {spec.state}": spec.state > largest,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def scan(
    softplus: bool, reverse: bool, inputs: Inputs, keep, blocks: Blocks | None = None, interpret: bool | None = None
) -> tuple[Float[Array, "B L G F"], State]:
    """y [B, L, G, F] and h_last [B, G, N, F], as `selective_reference.scan`. Deterministic; memory B L E (1 + N / K).

    Args:
      blocks: in place of those of `table`.
      interpret: run Pallas's interpreter; None: where the default device is a CPU.
    """
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    _, N, F = inputs.A.shape
    blocks, L = blocks_of(N) if blocks is None else blocks, inputs.u.shape[1]
    plan = Plan(selective_blocks.shrink(blocks, L, F), L, softplus, reverse, interpret)
    return selective_blocks.run(PASSES, plan, inputs, keep)


def forward(plan: Plan, inputs: Inputs, keep, with_states: bool) -> tuple[Array, Array, Array | None]:
    """`Passes.forward`."""
    outputs = {"y": jax.ShapeDtypeStruct(inputs.u.shape, inputs.u.dtype), "last": _like(inputs.h0)}
    if with_states:
        outputs["kept"] = jax.ShapeDtypeStruct((len(inputs.u), plan.chunks, *inputs.h0.shape[1:]), inputs.h0.dtype)
    results = _launch(functools.partial(_forward_kernel, plan), "forward", plan, outputs, inputs, keep)
    return results["y"], results["last"], results.get("kept")


def backward(plan: Plan, inputs: Inputs, keep, kept, dy, dlast) -> Gradients:
    """`Passes.backward`."""
    B, L, G, F = inputs.u.shape
    N, dtype = inputs.B.shape[3], inputs.h0.dtype
    parts = jax.ShapeDtypeStruct((B, L, G, F // plan.blocks.channels, N), dtype)
    per_row = [None if x is None else jax.ShapeDtypeStruct((B, *x.shape), dtype) for x in (inputs.A, inputs.D, inputs.delta_bias)]
    z = None if inputs.z is None else _like(inputs.z)
    outputs = Gradients(_like(inputs.u), _like(inputs.delta), z, parts, parts, *per_row, _like(inputs.h0))
    kernel = functools.partial(_backward_kernel, plan)
    return Gradients(**_launch(kernel, "backward", plan, outputs._asdict(), inputs, keep, kept, dy, dlast))


PASSES = Passes(forward, backward)


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _launch(kernel, name: str, plan: Plan, outputs, inputs: Inputs, *operands):
    B, _, G, F = inputs.u.shape
    params = compat.triton_params(plan.blocks.warps, num_stages=1)
    grid = (F // plan.blocks.channels, G, B)
    run = pl.pallas_call(
        kernel, outputs, grid=grid, compiler_params=params, interpret=plan.interpret, name=f"selective_scan_{name}"
    )
    return run(inputs, *operands)


def _forward_kernel(plan: Plan, inputs: Inputs, keep, outputs):
    row = _Row(plan, inputs, keep)
    spans = plan.blocks.K // plan.blocks.forward

    def span(first, h):
        times = range(plan.blocks.forward)
        loaded = [(row.update(first + t), row.states(inputs.C, first + t), row.channels(inputs.z, first + t)) for t in times]
        for t, (update, C, z) in enumerate(loaded):
            h = row.carry(h, update) + row.written(update)
            y = row.read(h, C, update.u)
            row.put(outputs["y"], first + t, y if z is None else y * z * lax.logistic(z))
        return h

    def chunk(index, h):
        if "kept" in outputs:
            outputs["kept"][row.b, index, row.g, :, row.columns] = h
        return _repeat(spans, lambda i, h: span(index * plan.blocks.K + i * plan.blocks.forward, h), h)

    h = inputs.h0[row.b, row.g, :, row.columns]
    outputs["last"][row.b, row.g, :, row.columns] = _repeat(plan.chunks, chunk, h)


def _backward_kernel(plan: Plan, inputs: Inputs, keep, kept, dy, dlast, outputs):
    row, outputs = _Row(plan, inputs, keep), Gradients(**outputs)
    size = plan.blocks.backward
    spans = plan.blocks.K // size

    def starts(first, h):
        """The states before each span of a chunk."""

        def span(i, carry):
            h, found = carry
            found = [jnp.where(i == j, h, state) for j, state in enumerate(found)]
            for update in [row.update(first + i * size + t) for t in range(size)]:
                h = row.carry(h, update) + row.written(update)
            return h, found

        return _repeat(spans, span, (h, [h] * spans))[1]

    def span(first, h, carry):
        times = [first + t for t in range(size)]
        steps = []
        for update in [row.update(time) for time in times]:
            steps.append((update, row.carry(h, update)))
            h = steps[-1][1] + row.written(update)
        outer = [(row.states(inputs.C, time), row.channels(inputs.z, time), row.channels(dy, time)) for time in times]
        for time, of_state, of_output in reversed(list(zip(times, steps, outer))):
            carry = _adjoint_step(row, outputs, time, *of_state, *of_output, *carry)
        return carry

    def chunk(i, carry):
        index = plan.chunks - 1 - i
        first = index * plan.blocks.K
        found = starts(first, kept[row.b, index, row.g, :, row.columns])
        return _repeat(spans, lambda i, carry: span(first + (spans - 1 - i) * size, _pick(found, spans - 1 - i), carry), carry)

    zero = jnp.zeros(plan.blocks.channels, row.dtype)
    sums = jnp.zeros_like(row.A), None if row.D is None else zero, None if row.bias is None else zero
    dh0, sums = _repeat(plan.chunks, chunk, (dlast[row.b, row.g, :, row.columns], sums))
    outputs.h0[row.b, row.g, :, row.columns] = dh0
    for ref, total in zip((outputs.A_parts, outputs.D_parts, outputs.delta_bias_parts), sums):
        if ref is not None:
            ref[(row.b, row.g, *[slice(None)] * (total.ndim - 1), row.columns)] = total


def _adjoint_step(row: "_Row", outputs: Gradients, time, update: Update, previous, C, z, dy, adjoint, sums):
    """One step of the chain rule, from a_{t+1} lambda_{t+1} to a_t lambda_t; `previous` is p_t = a_t h_{t-1}."""
    u, dt, x = update.u, update.dt, update.dt * update.u
    h = previous + row.written(update)
    if z is not None:
        sigmoid = lax.logistic(z)
        row.put(outputs.z, time, dy * row.read(h, C, u) * sigmoid * (1 + z * (1 - sigmoid)))
        dy = dy * z * sigmoid
    adjoint = adjoint + C[:, None] * dy[None]
    both = adjoint * previous
    dx = jnp.sum(update.B[:, None] * adjoint, axis=0)
    ddelta = (jnp.sum(row.A * both, axis=0) + dx * u) * update.slope
    row.put(outputs.u, time, dx * dt if row.D is None else dx * dt + row.D * dy)
    row.put(outputs.delta, time, ddelta)
    row.put_part(outputs.B_parts, time, jnp.sum(adjoint * x[None], axis=1))
    row.put_part(outputs.C_parts, time, jnp.sum(h * dy[None], axis=1))
    dA, dD, dbias = sums
    sums = dA + dt[None] * both, None if dD is None else dD + dy * u, None if dbias is None else dbias + ddelta
    return row.carry(adjoint, update), sums


def _repeat(times: int, body, carry):
    """`carry = body(i, carry)` for i below `times`, without a loop for a single time."""
    return body(np.int32(0), carry) if times == 1 else lax.fori_loop(np.int32(0), np.int32(times), body, carry)


def _pick(states: list, i):
    """states[i] of values in registers, which have no addresses."""
    picked = states[0]
    for j, state in enumerate(states[1:], start=1):
        picked = jnp.where(i == j, state, picked)
    return picked


class _Row:
    """The channels of one program: what it loads, in the state's type, and where it writes. All arrays are references.

    Times count steps in the scan's order.
    """

    def __init__(self, plan: Plan, inputs: Inputs, keep: Any):
        self.block, self.g, self.b = (pl.program_id(axis) for axis in range(3))
        self.plan, self.inputs, self.keep, self.dtype = plan, inputs, keep, inputs.h0.dtype
        self.columns = pl.ds(self.block * plan.blocks.channels, plan.blocks.channels)
        self.A, self.D, self.bias = map(self._parameter, (inputs.A, inputs.D, inputs.delta_bias))

    def update(self, time) -> Update:
        u, delta = self.channels(self.inputs.u, time), self.channels(self.inputs.delta, time)
        keep = None if self.keep is None else self.keep[self.b, self._position(time)]
        return Update(u, *self._step_size(delta, time), self.states(self.inputs.B, time), keep)

    def carry(self, h, update: Update):
        """a_t h."""
        a = jnp.exp(update.dt[None] * self.A)
        return (a if update.keep is None else a * update.keep) * h

    def written(self, update: Update):
        """dt u_t B_t."""
        return update.B[:, None] * (update.dt * update.u)[None]

    def read(self, h, C, u):
        """C h + D u."""
        y = jnp.sum(C[:, None] * h, axis=0)
        return y if self.D is None else y + self.D * u

    def channels(self, ref, time):
        return None if ref is None else ref[self.b, self._position(time), self.g, self.columns].astype(self.dtype)

    def states(self, ref, time):
        return ref[self.b, self._position(time), self.g, :].astype(self.dtype)

    def put(self, ref, time, value) -> None:
        ref[self.b, self._position(time), self.g, self.columns] = value.astype(ref.dtype)

    def put_part(self, ref, time, value) -> None:
        ref[self.b, self._position(time), self.g, self.block, :] = value

    def _parameter(self, ref):
        """A [N, channels], D or delta_bias [channels]."""
        return None if ref is None else ref[(self.g, *[slice(None)] * (len(ref.shape) - 2), self.columns)]

    def _position(self, time):
        return self.plan.padded - 1 - time if self.plan.reverse else time

    def _step_size(self, delta, time):
        """dt and its derivative by delta; both are 0 past the sequence's end."""
        delta = delta if self.bias is None else delta + self.bias
        dt, slope = (jax.nn.softplus(delta), lax.logistic(delta)) if self.plan.softplus else (delta, jnp.ones_like(delta))
        if self.plan.padded == self.plan.L:
            return dt, slope
        return tuple(jnp.where(time < self.plan.L, v, jnp.zeros_like(v)) for v in (dt, slope))
