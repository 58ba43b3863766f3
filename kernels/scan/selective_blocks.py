"""What GPU kernels of the selective scan share: how a call is cut, padded and differentiated; `Passes` are the kernels.

A program owns a block of channels of one group of one batch row, holds their states in registers, and runs through time in
chunks of K steps. Forward it keeps the state before each chunk; backward it computes the K states of a chunk again from the one
kept (Gu & Dao 2023, section 3.3.2), and runs the adjoint through them (the formulas are in `selective_chunked`). No two programs
write to one place: what channels share (dB, dC) and what batch rows share (dA, dD, ddelta_bias) leaves as one part from each
program, and is summed by XLA, in the same order every time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import devices
from kernels.scan.selective_reference import Inputs, State


class Blocks(NamedTuple):
    """Channels of a program, steps of a span in the forward and the backward pass, K steps between kept states, and warps.

    The loads of a span are issued together. K is a multiple of both spans; all but K are powers of two. slice: how many states a
    program takes at a time, if not all (Triton's kernels can).
    """

    channels: int
    forward: int
    backward: int
    K: int
    warps: int
    slice: int = 0


def table(implementation: str, kind: str | None = None) -> dict[int, Blocks]:
    """For each number of states (the next one up is used), the blocks on such a device; None: on the one that is here."""
    found = devices.blocks(f"selective_{implementation}", devices.here() if kind is None else kind)
    return {states: Blocks(**entry) for states, entry in found["scan"].items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of a call to the kernels: L, the true length; `interpret`: by Pallas's interpreter."""

    blocks: Blocks
    L: int
    softplus: bool
    reverse: bool
    interpret: bool

    @property
    def chunks(self) -> int:
        """How many states are kept."""
        return -(-self.L // self.blocks.K)

    @property
    def padded(self) -> int:
        """The length in whole chunks."""
        return self.chunks * self.blocks.K


class Gradients(NamedTuple):
    """What a backward pass leaves: u, delta, z [B, L, G, F], h0, and parts to add up.

    Those of B and C are [B, L, G, blocks, N], one from each block of channels; those of A [B, G, N, F], of D and delta_bias
    [B, G, F], one from each batch row.
    """

    u: Array
    delta: Array
    z: Array | None
    B_parts: Array
    C_parts: Array
    A_parts: Array
    D_parts: Array | None
    delta_bias_parts: Array | None
    h0: Array


class Passes(NamedTuple):
    """The kernels, on padded `Inputs`.

    forward(plan, inputs, keep, with_states) is y, h_last and, if asked for, the kept states [B, chunks, G, N, F].
    backward(plan, inputs, keep, kept, dy, dlast) is `Gradients`.
    """

    forward: Callable[..., tuple[Array, Array, Array | None]]
    backward: Callable[..., Gradients]


def run(passes: Passes, plan: Plan, inputs: Inputs, keep) -> tuple[Float[Array, "B L G F"], State]:
    """y and h_last, as `selective_reference.scan`.

    Nothing is copied where L is whole chunks, F whole blocks of channels and N a power of two; otherwise they are padded.
    """
    (_, N, F), added = inputs.A.shape, plan.padded - plan.L
    y, last = _scan(passes, plan, *pad(plan, inputs, keep))
    y = y[:, added:] if plan.reverse else y[:, : plan.L]
    return y[..., :F], last[:, :, :N, :F]


def shrink(blocks: Blocks, L: int, F: int) -> Blocks:
    """`blocks` no larger than a short sequence or few channels can fill."""
    spans = [min(span, power_of_two(L)) for span in (blocks.forward, blocks.backward)]
    K = min(blocks.K, -(-L // max(spans)) * max(spans))
    return blocks._replace(channels=min(blocks.channels, power_of_two(F)), forward=spans[0], backward=spans[1], K=K)


def power_of_two(size: int) -> int:
    """The smallest power of two that is no less than `size`."""
    return 1 << (size - 1).bit_length()


def pad(plan: Plan, inputs: Inputs, keep):
    """The arrays in whole chunks of time, whole blocks of channels and a power of two of states.

    Channels and states that are added are 0 and stay so. Steps are added where the scan arrives last; there the kernels set dt to
    0, which keeps the state.
    """
    _, N, F = inputs.A.shape
    steps = plan.padded - plan.L
    added = {
        "L": (steps, 0) if plan.reverse else (0, steps),
        "F": (0, -F % plan.blocks.channels),
        "N": (0, power_of_two(N) - N),
    }
    axes = Inputs(u="BLGF", delta="BLGF", A="GNF", B="BLGN", C="BLGN", D="GF", z="BLGF", delta_bias="GF", h0="BGNF")

    def widened(x, names: str, fill: int = 0):
        return None if x is None else jnp.pad(x, [added.get(name, (0, 0)) for name in names], constant_values=fill)

    return Inputs(*map(widened, inputs, axes)), widened(keep, "BL", fill=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(passes: Passes, plan: Plan, inputs: Inputs, keep):
    y, last, _ = passes.forward(plan, inputs, keep, with_states=False)
    return y, last


def _forward(passes, plan, inputs, keep):
    y, last, kept = passes.forward(plan, inputs, keep, with_states=True)
    return (y, last), (inputs, keep, kept)


def _backward(passes, plan, residuals, cotangents):
    inputs, keep, kept = residuals
    d = passes.backward(plan, inputs, keep, kept, *cotangents)

    def of_rows(parts):
        return None if parts is None else parts.sum(axis=0)

    of_blocks = [parts.sum(axis=3).astype(x.dtype) for parts, x in ((d.B_parts, inputs.B), (d.C_parts, inputs.C))]
    rows = [of_rows(parts) for parts in (d.A_parts, d.D_parts, d.delta_bias_parts)]
    return Inputs(d.u, d.delta, rows[0], *of_blocks, rows[1], d.z, rows[2], d.h0), None


_scan.defvjp(_forward, _backward)
