"""How a call is cut for Hopper: the block table of the three passes."""

import dataclasses
from typing import NamedTuple

import jax

from kernels import devices
from kernels.attention import biases, masks, tiles
from kernels.attention.call import Call
from kernels.attention.portable import lists
from kernels.attention.portable.tiling import Cut
from kernels.devices import SHARED_BYTES

HEAD_SIZES = (64, 128, 256)
"""Head sizes with entries in the block table of each pass; that of what biases add, where there are biases."""

WORTH = 0.8
"""Narrow tiles are taken where they visit at most so much of the pairs that those of the table do."""

PASSES = ("forward", "dkv", "dq", "table")

EVALUATED = ("ALiBi",)
"""The rules, with one number a head, that kernels evaluate, at positions traced or not; others' registers spill."""

ALIGNMENT = 1024
"""Each buffer takes a multiple of this many bytes of shared memory."""

REDUCTION, BARRIERS = 2048, 256
"""Bytes of shared memory that reductions along rows take, where there are any, and at most those of barriers."""

REGISTERS = {2: (240, 24), 3: (160, 32)}
"""By the number of consumers: registers that each thread of a consumer may have, and of the producer; 64 Ki a processor."""


class Blocks(NamedTuple):
    """How one pass is cut.

    A program owns `consumers` * `own` rows (queries in the forward pass and for dq, keys for dk and dv), `own` for each of its
    consumer warpgroups, and visits the other side in tiles of `visited`, of which `stages` are in shared memory at a time.
    `split`: two consumers share their rows, one computes dk and the other dv: both sums would not fit into one's registers.
    """

    own: int
    visited: int
    consumers: int
    stages: int
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
        relieved = _relieved(name, sizes[name], head_size, call)
        cuts = [_cut(name, _fitted(name, size, head_size, call), L, S, interpret) for size in _widths(relieved)]
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
        widest = 64 if head_size <= 128 else 32
        size = size._replace(visited=min(size.visited, widest))  # what it adds, or the distances for its gradient, take some too
    return size


def is_crowded(call: Call) -> bool:
    """Whether scores need the registers that the descriptors of large heads take (`program.own_operands`)."""
    arrays = call.bias, call.q_segments, call.q_positions, call.kv_positions
    return call.q.shape[3] > 128 and (call.softcap is not None or any(x is not None for x in arrays))


def added_to(call: Call) -> bool:
    """Whether the call's bias reaches kernels as numbers."""
    return call.bias is not None and type(call.bias).__name__ not in EVALUATED


def _fitted(name: str, size: Blocks, head_size: int, call: Call) -> Blocks:
    """These blocks with fewer stages, where what comes with each pair of a tile would not fit in shared memory beside as many.

    Where only one stage would fit, tiles are half as wide, so that one is copied while another is at work. Blocks that fit in no
    such form stay as they are: the launch says what they ask for.
    """
    stages, widths = range(size.stages, 1, -1), (size.visited, size.visited // 2)
    smaller = (size._replace(visited=visited, stages=n) for visited in widths for n in stages)
    return next((blocks for blocks in smaller if _shared_bytes(name, blocks, head_size, call) <= SHARED_BYTES), size)


def _shared_bytes(name: str, size: Blocks, head_size: int, call: Call) -> int:
    """What a program takes of shared memory, less what barriers leave of `BARRIERS`."""
    rows, pairs = size.owners * size.own, size.owners * size.own * size.visited
    number = (call.bias.table.dtype.itemsize if isinstance(call.bias, biases.Dense) else 4) if added_to(call) else 0
    of_row, of_pair = head_size * call.q.dtype.itemsize, is_stored(call.mask)
    integers = (call.q_segments is not None) + (call.q_positions is not None or call.kv_positions is not None)
    sums = 0 if added_to(call) or name != "dq" else len(jax.tree.leaves(call.bias))
    if name == "table":
        kept = [pairs * number, pairs * 4]
        visited = [rows * of_row, size.visited * of_row] * 2 + [pairs * of_pair]
        visited += [rows * 4] * (2 + integers) + [size.visited * 4] * integers
    else:
        of_own, of_visited = {"forward": (1, 0), "dkv": (0, 2), "dq": (2 + sums, 0)}[name]  # vectors
        kept = [rows * of_row] * (1 if name == "forward" else 2) + [rows * 4] * (of_own + integers)
        visited = [size.visited * of_row] * 2 + [size.visited * 4] * (of_visited + integers) + [pairs * number, pairs * of_pair]
    buffers = kept + [size.stages * n for n in visited]
    total = sum(-(-n // ALIGNMENT) * ALIGNMENT for n in buffers)
    return total + REDUCTION * (name == "forward" or sums > 0) + BARRIERS


def is_stored(mask: masks.Mask) -> bool:
    """Whether tiles to be tested are evaluated on the host: a kernel could not, or has operations that Mosaic GPU may lack."""
    return lists.is_stored(mask) or _holds(mask, (masks.Not, masks.Predicate))


def _holds(mask: masks.Mask, kinds: tuple[type, ...]) -> bool:
    """Whether the mask is of such a kind, or combines one that is."""
    return isinstance(mask, kinds) or any(_holds(part, kinds) for part in getattr(mask, "parts", ()))
