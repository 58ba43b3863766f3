"""How a call is cut for Hopper: the block table of the three passes."""

import dataclasses
from typing import NamedTuple

from kernels import devices
from kernels.attention import biases, masks, tiles
from kernels.attention.call import Call
from kernels.attention.portable import lists
from kernels.attention.portable.tiling import Cut

HEAD_SIZES = (64, 128, 256)
"""Head sizes with entries in the block table of each pass; that of what biases add, where there are biases."""

WORTH = 0.8
"""Narrow tiles are taken where they visit at most so much of the pairs that those of the table do."""

PASSES = ("forward", "dkv", "dq", "table")

REGISTERS = {2: (240, 24), 3: (160, 32)}
"""By the number of consumers: registers that each thread of a consumer may have, and of the producer; 64 Ki a processor."""


class Blocks(NamedTuple):
    """How one pass is cut.

    A program owns `consumers` * `own` rows (queries in the forward pass and for dq, keys for dk and dv), `own` for each of its
    consumer warpgroups, and visits the other side in tiles of `visited`, of which `stages` are in shared memory at a time.
    `pingpong`: two consumers take turns on the tensor cores, one multiplies while the other computes its softmax.
    `split`: two consumers share their rows, one computes dk and the other dv: both sums would not fit into one's registers.
    """

    own: int
    visited: int
    consumers: int
    stages: int
    pingpong: bool = False
    split: bool = False

    @property
    def swizzle(self) -> int:
        """Bytes of a swizzled row of operands of wgmma, no more than a row of the visited side has where it is summed over."""
        return min(128, 2 * self.visited)

    @property
    def owners(self) -> int:
        """How many warpgroups have rows of their own."""
        return 1 if self.split else self.consumers


def table(kind: str = devices.FALLBACK) -> dict[str, dict[int, Blocks]]:
    """For each pass and head size, the blocks on such a device (`kernels/blocks`)."""
    found = devices.blocks("mosaic", kind)
    return {name: {size: Blocks(**entry) for size, entry in entries.items()} for name, entries in found.items()}


@dataclasses.dataclass(frozen=True)
class Tiling(Cut):
    """How one pass is cut; a side that a program owns has tiles of all its consumers' rows."""

    blocks: Blocks
    interpret: bool


class Plan(NamedTuple):
    """The tilings of the forward pass, of those for dk and dv, and for dq, and of that for the gradient of what a bias adds."""

    forward: Tiling
    dkv: Tiling
    dq: Tiling
    table: Tiling | None


def plan(call: Call, interpret: bool, blocks: dict[str, Blocks] | None = None) -> Plan:
    """How `call` is cut: by the table of the device that is here, or by `blocks`, those of each pass."""
    L, S = call.q.shape[1], call.k.shape[1]
    head_size = max(call.q.shape[3], call.v.shape[3])

    sizes = blocks or {name: entries[head_size] for name, entries in table(devices.here()).items() if head_size in entries}

    def tiling(name: str) -> Tiling:
        cuts = [_cut(name, size, L, S, interpret) for size in _widths(_relieved(name, sizes[name], head_size, call))]
        known = call.q_positions is None and call.kv_positions is None
        return cuts[-1] if known and _pairs(call.mask, cuts[-1]) <= WORTH * _pairs(call.mask, cuts[0]) else cuts[0]

    return Plan(*(tiling(name) if name in sizes else None for name in PASSES))


def _cut(name: str, size: Blocks, L: int, S: int, interpret: bool) -> Tiling:
    own, visited = size.own * size.owners, size.visited
    q_tile, kv_tile = (visited, own) if name == "dkv" else (own, visited)
    return Tiling(q_tile, kv_tile, L, S, size, interpret)


def _widths(size: Blocks) -> list[Blocks]:
    """These blocks, and for patterns of narrow blocks those that visit 64 at a time."""
    return [size, size._replace(visited=64)] if size.visited > 64 else [size]


def _pairs(mask: masks.Mask, cut: Cut) -> int:
    """The pairs of the tiles that are visited, at default positions."""
    kinds = tiles.tables(mask, cut.L, cut.S, cut.q_tile, cut.kv_tile)
    return int((kinds != masks.SKIP).sum()) * cut.q_tile * cut.kv_tile


def _relieved(name: str, size: Blocks, head_size: int, call: Call) -> Blocks:
    """The blocks for a call whose scores hold more registers through the products than those of the table do."""
    if name == "dkv" and head_size > 64 and size.consumers == 2 and call.softcap is not None:
        size = size._replace(split=True)  # their derivative takes those of one sum
    if call.bias is not None and not (name == "forward" and isinstance(call.bias, biases.ALiBi)):
        size = size._replace(visited=min(size.visited, 64))  # what it adds, or the distances for its gradient, take some too
    return size


def is_stored(mask: masks.Mask) -> bool:
    """Whether tiles to be tested are evaluated on the host: a kernel could not, or has operations that Mosaic GPU may lack."""
    return lists.is_stored(mask) or _holds(mask, (masks.Not, masks.Predicate))


def _holds(mask: masks.Mask, kinds: tuple[type, ...]) -> bool:
    """Whether the mask is of such a kind, or combines one that is."""
    return isinstance(mask, kinds) or any(_holds(part, kinds) for part in getattr(mask, "parts", ()))
