"""What the three kernels share: launching, the walk over a line's tiles, and the ring of buffers between producer and consumers.

A program is one producer warpgroup, which copies tiles from global to shared memory (TMA), and one to three consumer warpgroups,
which multiply them. Each walks the same list of tiles, so that visit n of the producer is visit n of every consumer. Tile n lies
in slot n % stages of the ring. Two barriers guard a slot: `filled`, which the copy completes, and `emptied`, at which each
consumer arrives when it is done with the tile; the producer waits there before it copies into the slot again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import compat
from kernels.attention.call import Call
from kernels.attention.mosaic.decode import Cut
from kernels.attention.mosaic.operands import Added
from kernels.attention.mosaic.tiling import REGISTERS, Tiling, is_crowded
from kernels.attention.portable.lists import Lists

SWIZZLE = 128
"""Bytes of a swizzled row; tiles of shared memory are 8 rows of so many bytes, as wgmma reads them."""


def matrix(*shape: int, dtype, swizzle: int = SWIZZLE) -> Any:
    """A buffer in shared memory for operands of wgmma, or for what is read in its layout."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Groups of buffers [stages, ...] of shared memory; each group has a barrier for each slot filled, and one emptied."""

    groups: Sequence[Sequence[Any]]
    filled: Sequence[Any]
    emptied: Sequence[Any]

    @staticmethod
    def scratch(tiling: Tiling, *groups: Sequence[Any]) -> tuple:
        """What to allocate for the ring of these buffers."""
        stages, consumers = tiling.blocks.stages, tiling.blocks.consumers
        filled = [plgpu.Barrier(num_barriers=stages, num_arrivals=len(buffers)) for buffers in groups]
        return groups, filled, [plgpu.Barrier(num_barriers=stages, num_arrivals=consumers) for _ in groups]

    def fill(self, n, stages: int, *groups: Sequence[Any]) -> None:
        """The producer's part of visit n: copy, for each group, references to global memory."""
        slot = lax.rem(n, jnp.int32(stages))
        for sources, buffers, filled, emptied in zip(groups, self.groups, self.filled, self.emptied, strict=True):

            @pl.when(n >= stages)
            def _(emptied=emptied):
                plgpu.barrier_wait(emptied.at[slot])

            for source, buffer in zip(sources, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], filled.at[slot])

    def drain(self, n, stages: int) -> None:
        """The producer's part after n visits: wait until every slot is emptied, so that no barrier is left half used."""
        for back in range(1, stages + 1):

            @pl.when(n >= back)
            def _(back=back):
                for emptied in self.emptied:
                    plgpu.barrier_wait(emptied.at[lax.rem(n - back, jnp.int32(stages))])

    def slot(self, n, stages: int) -> list["Slot"]:
        """A consumer's view of visit n, one for each group."""
        at = lax.rem(n, jnp.int32(stages))
        groups = zip(self.groups, self.filled, self.emptied)
        return [Slot([ref.at[at] for ref in refs], filled.at[at], emptied.at[at]) for refs, filled, emptied in groups]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One group's buffers of one visit."""

    refs: Sequence[Any]
    filled: Any
    emptied: Any

    def wait(self) -> Sequence[Any]:
        """The buffers, once they are filled."""
        plgpu.barrier_wait(self.filled)
        return self.refs

    def release(self) -> None:
        plgpu.barrier_arrive(self.emptied)


def vector(*shape: int, dtype=jnp.float32) -> Any:
    """A buffer in shared memory for something of each row."""
    return plgpu.SMEM(shape, dtype)


def load(barrier, pairs: Sequence[tuple[Any, Any]], copies: bool = True) -> None:
    """Copy from global to shared memory, (source, target) each, and wait; or only wait for the warpgroup that copies."""
    for source, target in pairs if copies else ():
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def store(*triples) -> None:
    """Write each (matrix, buffer, target) through its buffer to global memory."""
    for value, buffer, _ in triples:
        buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    for _, buffer, target in triples:
        plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)


def stored(listed: Lists, tiling: Tiling, *, transposed: bool = False) -> Lists:
    """The lists with their patterns [patterns, owners, own, visited], keys by queries if `transposed`."""
    if listed.stored is None:
        return listed
    patterns = listed.stored.swapaxes(1, 2) if transposed else listed.stored
    blocks = tiling.blocks
    return dataclasses.replace(listed, stored=patterns.reshape(-1, blocks.owners, blocks.own, blocks.visited))


def pair_buffers(call: Call, listed: Lists, tiling: Tiling) -> list:
    """What to allocate in the ring for what comes with each pair: a stored pattern, and what a bias adds, if there are any."""
    blocks = tiling.blocks
    shape = blocks.stages, blocks.owners * blocks.own, blocks.visited
    added = [added_buffer(call.bias, *shape)] if isinstance(call.bias, Added) else []
    return [*pattern_buffers(listed, tiling), *added]


def pattern_buffers(listed: Lists, tiling: Tiling) -> list:
    shape = tiling.blocks.stages, tiling.blocks.owners, tiling.blocks.own, tiling.blocks.visited
    return [] if listed.stored is None else [plgpu.SMEM(shape, jnp.int8)]


def added_buffer(bias: Added, *shape: int) -> Any:
    dtype = bias.numbers.dtype
    return matrix(*shape, dtype=dtype, swizzle=min(SWIZZLE, shape[-1] * dtype.itemsize))


def of_pairs(call: Call, tiling: Tiling, pattern: list, b, head, own, visited) -> list:
    """References to what comes with each pair of a tile, by its number along each side."""
    return [*pattern, *([call.bias.of_tile(tiling, b, head, own, visited)] if isinstance(call.bias, Added) else [])]


def apart(call: Call, tiling: Tiling, refs: Sequence[Any], pattern: list, owner) -> tuple[list, dict[str, Any]]:
    """The buffers of a visit without what comes with each pair, and that, of one owner's rows, as fields of a `Tile`."""
    own = tiling.blocks.own
    at = {"stored": owner} if pattern else {}
    at |= {"added": pl.ds(owner * own, own)} if isinstance(call.bias, Added) else {}
    count = len(refs) - len(at)
    return list(refs[:count]), {name: ref.at[rows] for (name, rows), ref in zip(at.items(), refs[count:], strict=True)}


def own_operands(call: Call, buffers: Sequence[Any], owner, entry) -> list:
    """The matrices of one owner's rows, as the visit to `entry` has them for its products.

    wgmma takes a matrix by a descriptor of 64 bits for each 16 numbers of the head. Those of rows that stay are the same at each
    visit, and a compiler keeps them in registers: 64 for two matrices at head size 256. Where a call needs these for its scores,
    they are made again at each visit, since they move by a zero of which the compiler does not know that it is one.
    """
    zero = lax.shift_right_arithmetic(entry, jnp.int32(31)) if is_crowded(call) else 0
    return [ref.at[owner + zero] for ref in buffers]


def walk(listed: Lists, b, head, line, visit: Callable, state):
    """`state = visit(n, entry, pattern, tested, carry)` over the tiles of a line, those without a test first.

    state is (n, carry); pattern is a list of the reference to the tile's allowed pairs, empty where the mask is evaluated.
    """
    start, first_tested, end = listed.of_line(b, head, line)

    def body(tested, t, state):
        n, carry = state
        pattern = [] if listed.stored is None else [listed.stored.at[listed.patterns[t]]]
        return n + 1, visit(n, listed.entries[t], pattern, tested, carry)

    if listed.any_free:
        state = lax.fori_loop(start, first_tested, functools.partial(body, False), state)
    if listed.any_tested:
        state = lax.fori_loop(first_tested, end, functools.partial(body, True), state)
    return state


def longest_first(listed: Lists) -> Any:
    """The lines, those with most tiles first, so that no program is left alone with a long one at the end; None where the last
    lines are the longest, as under a causal mask."""
    visits = listed.visits.reshape(-1, listed.visits.shape[-1]).max(axis=0)
    if not isinstance(visits, np.ndarray):
        return jnp.argsort(-visits, stable=True)
    return None if (np.diff(visits) >= 0).all() else np.argsort(-visits, stable=True).astype(np.int32)


def own_line(order: Any, lines: int) -> jax.Array:
    """A program's line, by what `longest_first` gave."""
    at = lax.axis_index("line")
    return lines - 1 - at if order is None else order[at]


def visits(listed: Lists, b, head, line) -> jax.Array:
    """The number of tiles of a line."""
    start, _, end = listed.of_line(b, head, line)
    return end - start


def run_roles(machine, tiling: Tiling | Cut, produce: Callable[[], None], consume: Callable[[Any], None]) -> None:
    """Each warpgroup's part: `consume(number of the consumer)` or, the last one, `produce()`."""
    consumers = tiling.blocks.consumers
    warpgroup = lax.axis_index("warpgroup")
    most, fewest = REGISTERS.get(consumers, (None, None))

    @pl.when(warpgroup < consumers)
    def _():
        if most is not None:
            machine.registers(most, "increase")
        consume(warpgroup)

    @pl.when(warpgroup == consumers)
    def _():
        if fewest is not None:
            machine.registers(fewest, "decrease")
        produce()


def launch(
    kernel: Callable, name: str, tiling: Tiling | Cut, grid: dict[str, int], out: Sequence, scratch: Sequence, *operands, **params
):  # fmt: skip
    """Run `kernel(operands, outputs, scratch)`, of references, at every point of `grid`; operands may be pytrees.

    params: of Mosaic's compiler.
    """
    leaves, structure = jax.tree.flatten(operands)

    def body(*refs):
        inputs, rest = refs[: len(leaves)], refs[len(leaves) :]
        kernel(jax.tree.unflatten(structure, inputs), rest[: len(out)], rest[len(out) :])

    run = plgpu.kernel(
        body,
        out_type=list(out),
        scratch_types=list(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tiling.blocks.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, **params),
        interpret=compat.mosaic_interpreter() if tiling.interpret else None,
        kernel_name=f"attention_{name}",
    )
    return run(*map(jnp.asarray, leaves))
