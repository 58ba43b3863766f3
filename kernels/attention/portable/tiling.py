"""How a call is cut into tiles: the block table of the three passes, and the shapes padded to whole tiles."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import biases
from kernels.attention.call import Call, default_positions

MIN_TILE = 16
"""The smallest side of a product on tensor cores; shorter lengths and head sizes are padded up to it."""


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of the loop's software pipeline."""

    q: int
    kv: int
    warps: int
    stages: int


BLOCKS = {
    "forward": {64: Blocks(128, 64, 4, 3), 128: Blocks(128, 128, 8, 2), 256: Blocks(64, 64, 8, 2)},
    "dkv": {64: Blocks(64, 64, 4, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(128, 32, 8, 2)},
    "dq": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 8, 2)},
}
"""For each pass and head size (the next one up is used), the blocks to start from on an H100 or H200 in bfloat16.

Found without a GPU by `kernels.offline`: nothing spills at 64 and 128; at 256 only dkv does, where tiles are tested."""

FLOAT32_BLOCKS = {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 32, 8, 1), 256: Blocks(16, 32, 8, 1)}
"""The same of all passes in float32, whose products do without tensor cores and hold their operands in registers."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tiles of q_tile queries x kv_tile keys over L queries and S keys."""

    q_tile: int
    kv_tile: int
    L: int
    S: int

    @property
    def rows(self) -> int:
        return -(-self.L // self.q_tile)

    @property
    def columns(self) -> int:
        return -(-self.S // self.kv_tile)

    @property
    def padded(self) -> dict[str, int]:
        """The lengths in whole tiles."""
        return {"L": self.rows * self.q_tile, "S": self.columns * self.kv_tile}


@dataclasses.dataclass(frozen=True)
class Tiling(Cut):
    """How one pass is cut; all sizes are powers of two but the true lengths L and S."""

    warps: int
    stages: int
    interpret: bool


class Plan(NamedTuple):
    """The tilings of the forward pass, of the pass for dk and dv, and of that for dq and the bias's gradients."""

    forward: Tiling
    dkv: Tiling
    dq: Tiling


def plan(call: Call, interpret: bool, blocks: dict[str, Blocks] | None = None) -> Plan:
    """How `call` is cut: by `BLOCKS`, or by `blocks`, those of each pass."""
    (_, L, _, D), S, Dv = call.q.shape, call.k.shape[1], call.v.shape[3]

    def tiling(name: str) -> Tiling:
        size = blocks[name] if blocks else _blocks(name, call.q.dtype, max(D, Dv))
        q_tile, kv_tile = min(size.q, power_of_two(L)), min(size.kv, power_of_two(S))
        return Tiling(q_tile, kv_tile, L, S, size.warps, size.stages, interpret)

    return Plan(tiling("forward"), tiling("dkv"), tiling("dq"))


def power_of_two(size: int) -> int:
    """The smallest power of two, from `MIN_TILE` up, that is no less than `size`."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())


def pad(call: Call, tiling: Cut) -> Call:
    """The call in whole tiles, with what a kernel can load: powers of two, positions for both or neither, a key of words.

    Nothing is copied where lengths are whole tiles and head sizes powers of two.
    """
    ends = tiling.padded
    q_positions, kv_positions = call.q_positions, call.kv_positions
    if q_positions is not None or kv_positions is not None:
        defaults = default_positions(tiling.L, tiling.S)
        q_positions = defaults[0] if q_positions is None else q_positions
        kv_positions = defaults[1] if kv_positions is None else kv_positions
    return dataclasses.replace(
        call,
        q=pad_axis(pad_axis(call.q, 1, ends["L"]), 3, power_of_two(call.q.shape[3])),
        k=pad_axis(pad_axis(call.k, 1, ends["S"]), 3, power_of_two(call.k.shape[3])),
        v=pad_axis(pad_axis(call.v, 1, ends["S"]), 3, power_of_two(call.v.shape[3])),
        bias=biases.pad(call.bias, ends),
        q_segments=pad_axis(call.q_segments, 1, ends["L"]),
        kv_segments=pad_axis(call.kv_segments, 1, ends["S"]),
        q_positions=pad_axis(_int32(q_positions), 1, ends["L"]),
        kv_positions=pad_axis(_int32(kv_positions), 1, ends["S"]),
        dropout=None if call.dropout is None else call.dropout.with_words(),
    )


def pad_axis(x: jax.Array | None, axis: int, size: int, fill: Any = 0) -> jax.Array | None:
    """`x` with `fill` at the end of `axis`, up to `size`."""
    if x is None:
        return None
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


def _int32(positions):
    return None if positions is None else positions.astype(jnp.int32)


def _blocks(name: str, dtype, head_size: int) -> Blocks:
    table = BLOCKS[name] if dtype.itemsize == 2 else FLOAT32_BLOCKS
    return table[next((key for key in sorted(table) if head_size <= key), max(table))]
