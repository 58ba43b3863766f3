"""The linear scan as a Pallas kernel: compiled through Triton on an NVIDIA GPU, interpreted on a CPU.

A program owns a block of states of one batch row and runs through all time with them in registers, a span of steps at a time,
whose loads are issued together. Complex numbers, which Triton does not have, are pairs of a real and an imaginary array, split
and joined around the kernel by XLA. The gradient is the scan run backwards (`adjoint`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Inexact

from kernels import compat
from kernels.scan.reference import State
from kernels.scan.selective_blocks import power_of_two


class Blocks(NamedTuple):
    """States of a program, steps of a span, warps of a program; powers of two."""

    states: int
    steps: int
    warps: int


BLOCKS = Blocks(128, 8, 2)
"""To start from on an H200: checked by `kernels.offline` to spill nothing, not measured."""

Parts = Sequence
"""The real array, or the real and the imaginary one."""


def why_not(spec) -> str | None:
    """The reason the kernel cannot run this call."""
    reasons = {
        f"it is written for NVIDIA GPUs, and interpreted on cpu, not for {spec.platform}": spec.platform not in ("cpu", "gpu"),
        f"on a GPU its state is float32 or complex64, not {spec.dtype}": (
            spec.platform == "gpu" and spec.dtype not in ("float32", "complex64")
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def scan(
    a: Inexact[Array, "B L N"] | Inexact[Array, "N"],
    b: State,
    h0: Inexact[Array, "B N"],
    *,
    reverse: bool = False,
    blocks: Blocks = BLOCKS,
    interpret: bool | None = None,
) -> State:
    """All states, as `reference.scan`. A length of no whole spans is padded where the scan arrives last, N to whole blocks.

    Args:
      blocks: in place of `BLOCKS`.
      interpret: run Pallas's interpreter; None: where the default device is a CPU.
    """
    B, L, N = b.shape
    blocks = Blocks(min(blocks.states, power_of_two(N)), min(blocks.steps, power_of_two(L)), blocks.warps)
    steps, states = -L % blocks.steps, -N % blocks.states
    in_time = (steps, 0) if reverse else (0, steps)

    def parts(x, *padding) -> Parts:
        x = jnp.pad(x, padding)
        return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)

    operands = (
        parts(a, (0, 0), in_time, (0, states)) if a.ndim == 3 else parts(a, (0, states)),
        parts(b, (0, 0), in_time, (0, states)),
        parts(h0, (0, 0), (0, states)),
    )
    shape = (B, L + steps, N + states)
    h = pl.pallas_call(
        functools.partial(_kernel, blocks, reverse),
        [jax.ShapeDtypeStruct(shape, x.dtype) for x in operands[1]],
        grid=(shape[2] // blocks.states, B),
        compiler_params=compat.triton_params(blocks.warps, num_stages=1),
        interpret=jax.default_backend() == "cpu" if interpret is None else interpret,
        name="linear_scan",
    )(*operands)
    h = lax.complex(*h) if len(h) == 2 else h[0]
    return (h[:, steps:] if reverse else h[:, :L])[:, :, :N]


def _kernel(blocks: Blocks, reverse: bool, a: Parts, b: Parts, h0: Parts, *out):
    block, row = (pl.program_id(axis) for axis in range(2))
    columns = pl.ds(block * blocks.states, blocks.states)
    length = b[0].shape[1]
    varies = len(a[0].shape) == 3

    def at(refs: Parts, *index) -> Parts:
        return tuple(ref[(*index, columns)] for ref in refs)

    def span(i, h):
        first = i * blocks.steps
        times = [length - 1 - (first + t) if reverse else first + t for t in range(blocks.steps)]
        loaded = [(t, at(a, row, t) if varies else fixed, at(b, row, t)) for t in times]
        for t, a_t, b_t in loaded:
            h = tuple(x + y for x, y in zip(_product(a_t, h), b_t))
            for ref, value in zip(out, h):
                ref[row, t, columns] = value
        return h

    fixed = None if varies else at(a)
    lax.fori_loop(np.int32(0), np.int32(length // blocks.steps), span, at(h0, row))


def _product(a: Parts, h: Parts) -> Parts:
    if len(a) == 1:
        return (a[0] * h[0],)
    return a[0] * h[0] - a[1] * h[1], a[0] * h[1] + a[1] * h[0]
